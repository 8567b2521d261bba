"""Converts MobileNetV2 from the ONNX file to a LiteRT model: the same weights, channels last, ReLU6 fused, as its converter does."""

import flatbuffers
import numpy as np
import onnx
import tflite
from onnx import numpy_helper
from tflite import BuiltinOperator as Code

SAME = tflite.Padding.SAME
RELU6, NO_ACTIVATION = tflite.ActivationFunctionType.RELU6, tflite.ActivationFunctionType.NONE


class Model:
    """Collects the tensors, buffers and operators of a model and writes them as a FlatBuffer."""

    def __init__(self):
        """Start an empty model; the first buffer is empty, as the format requires."""
        self.fb = flatbuffers.Builder(16 << 20)
        self.buffers, self.tensors, self.operators, self.codes = [b""], [], [], []

    def tensor(self, name, shape, values=None, kind=tflite.TensorType.FLOAT32):
        """Add a tensor; with values it is a constant."""
        buffer = 0
        if values is not None:
            buffer = len(self.buffers)
            self.buffers.append(values.tobytes())
        self.tensors.append((name, shape, buffer, kind))
        return len(self.tensors) - 1

    def operator(self, code, inputs, output, options_kind, options):
        """Add an operator; `options` writes its table."""
        if code not in self.codes:
            self.codes.append(code)
        self.operators.append((self.codes.index(code), inputs, output, options_kind, options))

    def vector(self, integers):
        """Write a vector of 32-bit integers."""
        return self.fb.CreateNumpyVector(np.array(integers, np.int32))

    def offsets(self, start, offsets):
        """Write a vector of tables."""
        start(self.fb, len(offsets))
        for offset in reversed(offsets):
            self.fb.PrependUOffsetTRelative(offset)
        return self.fb.EndVector()

    def finish(self, inputs, outputs):
        """Write the model and return the bytes of the file."""
        fb = self.fb
        buffers = []
        for data in self.buffers:
            data = fb.CreateByteVector(data) if data else None
            tflite.BufferStart(fb)
            if data is not None:
                tflite.BufferAddData(fb, data)
            buffers.append(tflite.BufferEnd(fb))
        tensors = []
        for name, shape, buffer, kind in self.tensors:
            shape, name = self.vector(shape), fb.CreateString(name)
            tflite.TensorStart(fb)
            tflite.TensorAddShape(fb, shape)
            tflite.TensorAddType(fb, kind)
            tflite.TensorAddBuffer(fb, buffer)
            tflite.TensorAddName(fb, name)
            tensors.append(tflite.TensorEnd(fb))
        operators = []
        for code, sources, output, options_kind, options in self.operators:
            table, sources, outs = options(fb), self.vector(sources), self.vector([output])
            tflite.OperatorStart(fb)
            tflite.OperatorAddOpcodeIndex(fb, code)
            tflite.OperatorAddInputs(fb, sources)
            tflite.OperatorAddOutputs(fb, outs)
            tflite.OperatorAddBuiltinOptionsType(fb, options_kind)
            tflite.OperatorAddBuiltinOptions(fb, table)
            operators.append(tflite.OperatorEnd(fb))
        codes = []
        for code in self.codes:
            tflite.OperatorCodeStart(fb)
            tflite.OperatorCodeAddDeprecatedBuiltinCode(fb, code)
            tflite.OperatorCodeAddVersion(fb, 1)
            tflite.OperatorCodeAddBuiltinCode(fb, code)
            codes.append(tflite.OperatorCodeEnd(fb))
        inputs, outputs = self.vector(inputs), self.vector(outputs)
        tensors = self.offsets(tflite.SubGraphStartTensorsVector, tensors)
        operators = self.offsets(tflite.SubGraphStartOperatorsVector, operators)
        tflite.SubGraphStart(fb)
        tflite.SubGraphAddTensors(fb, tensors)
        tflite.SubGraphAddInputs(fb, inputs)
        tflite.SubGraphAddOutputs(fb, outputs)
        tflite.SubGraphAddOperators(fb, operators)
        graph = tflite.SubGraphEnd(fb)
        codes = self.offsets(tflite.ModelStartOperatorCodesVector, codes)
        graphs = self.offsets(tflite.ModelStartSubgraphsVector, [graph])
        buffers = self.offsets(tflite.ModelStartBuffersVector, buffers)
        tflite.ModelStart(fb)
        tflite.ModelAddVersion(fb, 3)
        tflite.ModelAddOperatorCodes(fb, codes)
        tflite.ModelAddSubgraphs(fb, graphs)
        tflite.ModelAddBuffers(fb, buffers)
        fb.Finish(tflite.ModelEnd(fb), b"TFL3")
        return bytes(fb.Output())


def convolution(depthwise, stride, activation):
    """Return a function that writes the options of a convolution."""

    def options(fb):
        kind = "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions"
        call = lambda name, *values: getattr(tflite, f"{kind}{name}")(fb, *values)
        call("Start")
        call("AddPadding", SAME)
        call("AddStrideW", stride)
        call("AddStrideH", stride)
        if depthwise:
            call("AddDepthMultiplier", 1)
        call("AddFusedActivationFunction", activation)
        call("AddDilationWFactor", 1)
        call("AddDilationHFactor", 1)
        return call("End")

    return options


def options_table(kind, **values):
    """Return a function that writes the options table `kind` with these values."""

    def options(fb):
        getattr(tflite, f"{kind}Start")(fb)
        for name, value in values.items():
            getattr(tflite, f"{kind}Add{name}")(fb, value)
        return getattr(tflite, f"{kind}End")(fb)

    return options


def build(path, output):
    """Convert the ONNX file up to the tensor `output`; return the bytes of a LiteRT model."""
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    model, at, shapes = Model(), {}, {}
    name = graph.input[0].name
    shapes[name] = [1, 224, 224, 3]
    at[name] = source = model.tensor(name, shapes[name])
    clipped = {node.input[0]: node for node in graph.node if node.op_type == "Clip"}
    for node in graph.node:
        kind, x, out = node.op_type, node.input[0], node.output[0]
        if kind == "Conv":
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            stride, depthwise = attributes["strides"][0], attributes.get("group", 1) > 1
            kernel, bias = (constants[name].astype(np.float32) for name in node.input[1:3])
            # ONNX: out, in, h, w. LiteRT: out, h, w, in; depthwise 1, h, w, channels.
            kernel = np.ascontiguousarray(kernel.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1)))
            clip = clipped.get(out)
            out = clip.output[0] if clip else out
            side = -(-shapes[x][1] // stride)
            shapes[out] = [1, side, side, len(bias)]
            sources = [at[x], model.tensor(f"{out}.w", kernel.shape, kernel), model.tensor(f"{out}.b", bias.shape, bias)]
            at[out] = model.tensor(out, shapes[out])
            code = Code.DEPTHWISE_CONV_2D if depthwise else Code.CONV_2D
            table = tflite.BuiltinOptions.DepthwiseConv2DOptions if depthwise else tflite.BuiltinOptions.Conv2DOptions
            options = convolution(depthwise, stride, RELU6 if clip else NO_ACTIVATION)
            model.operator(code, sources, at[out], table, options)
        elif kind == "Add":
            shapes[out] = shapes[x]
            at[out] = model.tensor(out, shapes[out])
            options = options_table("AddOptions", FusedActivationFunction=NO_ACTIVATION)
            model.operator(Code.ADD, [at[name] for name in node.input], at[out], tflite.BuiltinOptions.AddOptions, options)
        elif kind == "GlobalAveragePool":
            axes = np.array([1, 2], np.int32)
            axes = model.tensor("axes", axes.shape, axes, tflite.TensorType.INT32)
            at[output] = model.tensor(output, [1, shapes[x][3]])
            model.operator(Code.MEAN, [at[x], axes], at[output], tflite.BuiltinOptions.ReducerOptions, options_table("ReducerOptions", KeepDims=False))
    return model.finish([source], [at[output]])
