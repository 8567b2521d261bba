#!/usr/bin/env python3
"""Compares the time of ONNX Runtime, LiteRT and bloomcast on the same network, in alternating rounds. `make peers` runs it.

It measures the backbone alone (from the input tensor to the features), and a whole frame (from a JPEG of 640×480 in memory to the
probabilities; for the other runtimes with OpenCV's decoder and resize). It prints the median and the range of each, and
bloomcast's time divided by that of the faster of the other two, per round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from ai_edge_litert.interpreter import Interpreter

import tflite_model

ROOT = Path(__file__).resolve().parents[2]
NETWORK = ROOT / "models" / "mobilenet_v2_1.0_224.onnx"
PROGRAM = ROOT / "target" / "release" / "bloomcast"


def onnx_runtime(threads):
    """Return a function that computes the features of an input `[1, 3, 224, 224]` with ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(NETWORK), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(["features"], {"image": image})[0]


def lite_rt(threads, model):
    """Return the same for LiteRT, whose input is `[1, 224, 224, 3]`."""
    interpreter = Interpreter(model_content=model, num_threads=threads)
    interpreter.allocate_tensors()
    source, features = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(image):
        interpreter.set_tensor(source, image)
        interpreter.invoke()
        return interpreter.get_tensor(features)

    return run


def timed(work, runs):
    """Return the median time of a call, in milliseconds."""
    for _ in range(5):
        work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def bloomcast(threads, runs, jpeg):
    """Return bloomcast's medians of the backbone and of the whole frame, in milliseconds, and its kernels."""
    command = [PROGRAM, "bench", "--json", "--threads", str(threads), "--runs", str(runs), "--image", jpeg]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    stages = report["stages"]
    return report["backbone_alone"]["median_ms"], stages["frame"]["median_ms"], report["kernels"]


def spread(values):
    """Format the median with the minimum and the maximum."""
    return f"{statistics.median(values):6.2f} ({min(values):.2f}–{max(values):.2f})"


def main():
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()

    model = tflite_model.build(NETWORK, "features")
    rng = np.random.default_rng(7)
    test_image = cv2.GaussianBlur(rng.integers(0, 256, (480, 640, 3), np.uint8), (0, 0), 4)
    jpeg = ROOT / "target" / "peers.jpg"
    cv2.imwrite(str(jpeg), test_image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    encoded = np.fromfile(jpeg, np.uint8)
    weight = rng.standard_normal((5, 1280), np.float32)

    def frame(run, channels_first):
        image = cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        image = cv2.resize(image, (224, 224), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 127.5 - 1
        image = np.ascontiguousarray(image.transpose(2, 0, 1)) if channels_first else image
        logits = weight @ run(image[None])[0]
        exponents = np.exp(logits - logits.max())
        return exponents / exponents.sum()

    image = rng.uniform(-1, 1, (1, 3, 224, 224)).astype(np.float32)
    channels_last = np.ascontiguousarray(image.transpose(0, 2, 3, 1))
    difference = np.abs(onnx_runtime(1)(image) - lite_rt(1, model)(channels_last)).max()
    if difference > 1e-3:
        sys.exit(f"the features of ONNX Runtime and LiteRT differ by {difference}")

    for threads in arguments.threads:
        ort, lite = onnx_runtime(threads), lite_rt(threads, model)
        backbone = {"ort": [], "litert": [], "bloomcast": []}
        whole = {"ort": [], "litert": [], "bloomcast": []}
        for _ in range(arguments.rounds):
            backbone["ort"].append(timed(lambda: ort(image), arguments.runs))
            backbone["litert"].append(timed(lambda: lite(channels_last), arguments.runs))
            backbone_ms, frame_ms, kernels = bloomcast(threads, arguments.runs, jpeg)
            backbone["bloomcast"].append(backbone_ms)
            whole["bloomcast"].append(frame_ms)
            whole["ort"].append(timed(lambda: frame(ort, True), arguments.runs))
            whole["litert"].append(timed(lambda: frame(lite, False), arguments.runs))
        for title, times in (("backbone", backbone), ("frame", whole)):
            rounds = zip(times["bloomcast"], times["ort"], times["litert"])
            ratios = [own / min(ort_ms, litert_ms) for own, ort_ms, litert_ms in rounds]
            print(
                f"{threads} thread{'s' if threads > 1 else ' '} {title:8}  ONNX Runtime {spread(times['ort'])}  LiteRT {spread(times['litert'])}"
                f"  bloomcast {spread(times['bloomcast'])} ms ({kernels})  ratio {spread(ratios)}"
            )


main()
