#!/usr/bin/env python3
"""Export the graphs of Keras's ResNet50, InceptionV3 and Xception as ONNX, with random weights, for the tests.

Usage: python models/export_keras.py --out FOLDER
"""

import argparse
import os
from pathlib import Path

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND="tensorflow", CUDA_VISIBLE_DEVICES="-1")

import keras
import numpy as np

NETWORKS = {
    "keras_resnet50": ("ResNet50", 224),
    "keras_inception_v3": ("InceptionV3", 299),
    "keras_xception": ("Xception", 299),
}


def randomise(model):
    """Set biases and statistics to random values: the export would remove zeros from the graph."""
    rng = np.random.default_rng(7)
    for weight in model.weights:
        kind = weight.path.split("/")[-1]
        if kind in ("bias", "beta", "moving_mean"):
            weight.assign(rng.normal(0, 0.05, weight.shape))
        elif kind in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(0.9, 1.1, weight.shape))


def main():
    """Write every network whose file does not exist."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the ONNX files")
    folder = parser.parse_args().out
    for name, (network, size) in NETWORKS.items():
        path = folder / f"{name}.onnx"
        if path.exists():
            continue
        keras.utils.set_random_seed(1)
        model = getattr(keras.applications, network)(weights=None)
        randomise(model)
        # Keras can export a model only after it was called once.
        model(np.zeros((1, size, size, 3), np.float32))
        model.export(path, format="onnx", verbose=False)
        print(path)


if __name__ == "__main__":
    main()
