"""Low precision in a graph: the encoder in fp16 or bf16, all else in float32 as it was; and what is found in a file.

Runtimes that take types literally (TensorRT, strongly typed) compute what the graph says, and weights take half the
room.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto, version_converter

from cliplet.errors import ArtifactError, UsageError
from cliplet.runners.onnx_runner import PRECISION_KEY

from .encoder import encoder_nodes, load_graph, set_nodes, skeleton, tensor_types
from .lowering import Lowering
from .onnx_graph import save_graph

LOW_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Convolution and pooling have bfloat16 from here on.
_BF16_OPSET = 22
# Matrix products in any form, and the inputs whose types tell what each is done in.
_PRODUCTS = {
    "Conv": (0, 1),
    "ConvTranspose": (0, 1),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
}
_NAMES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
}


def lower_precision(source: Path, target: Path, precision: str) -> None:
    """Write a float32 graph `snippets`, `classifier` or `trunk` with its encoder in `fp16` or `bf16`.

    Inputs, outputs and names are the source's. For bf16 the opset rises to the first that has convolutions in it.

    Raises:
        UsageError: another precision.
        ArtifactError: the graph has no encoder, is not in float32, or no product of it can be low.
    """
    if precision not in LOW_TYPES:
        raise UsageError(f"precision {precision!r}", f"one of {', '.join(LOW_TYPES)}")
    model = load_graph(source)
    _make_initializers(model)
    if precision == "bf16":
        _raise_opset(model, _BF16_OPSET)
    Lowering(model, LOW_TYPES[precision], precision).run()
    found = note_precision(model)
    if precision not in found.split("+"):
        raise ArtifactError(f"no product of {source} can be done in {precision}: {found}", "one that can")
    save_graph(model, target)


def read_precision(path: Path) -> str:
    """What the encoder's matrix products are done in: `fp32`, `fp16`, `bf16` or `int8`, joined by `+` if mixed.

    Raises:
        ArtifactError: the file is no graph with an encoder.
    """
    return _joined(count_precisions(path))


def count_precisions(path: Path) -> Counter[str]:
    """How many of the encoder's products (MatMul, Gemm, Conv) are done in each precision, by the types they read.

    Between QuantizeLinear and DequantizeLinear a product counts as int8 if both of its factors come from the
    latter: a runtime that fuses the three computes it so.
    """
    return _counted(load_graph(path, weights=False))


def note_precision(model: ModelProto) -> str:
    """What `read_precision` finds, noted in the model's metadata, where a session without onnx sees it."""
    found = _joined(_counted(model))
    kept = [p for p in model.metadata_props if p.key != PRECISION_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=PRECISION_KEY, value=found)
    return found


def _joined(counts: Counter[str]) -> str:
    return "+".join(sorted(counts))


def _counted(model: ModelProto) -> Counter[str]:
    types = tensor_types(model)
    made_by = {name: node for node in model.graph.node for name in node.output}
    counts: Counter[str] = Counter()
    for node, inside in zip(model.graph.node, encoder_nodes(model.graph), strict=True):
        if inside and node.op_type in _PRODUCTS:
            factors = {_factor(node.input[i], made_by, types) for i in _PRODUCTS[node.op_type]}
            # A product of an integer and a float is done in float.
            counts["+".join(sorted(factors - {"int8"} or factors))] += 1
    if not counts:
        raise ArtifactError("the encoder has no matrix product", "an encoder with weights")
    return counts


def _factor(name: str, made_by: dict[str, NodeProto], types: dict[str, int]) -> str:
    node = made_by.get(name)
    if node is not None and node.op_type == "DequantizeLinear":
        name = node.input[0]
    return _NAMES.get(types[name], TensorProto.DataType.Name(types[name]).lower())


def _make_initializers(model: ModelProto) -> None:
    """Constants that are nodes become initializers, so that there is one kind of constant."""
    nodes = []
    for node in model.graph.node:
        value = [a.t for a in node.attribute if a.name == "value"]
        if node.op_type == "Constant" and value:
            tensor = TensorProto()
            tensor.CopyFrom(value[0])
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
        else:
            nodes.append(node)
    set_nodes(model, nodes)


def _raise_opset(model: ModelProto, opset: int) -> None:
    (imported,) = [o for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if imported.version >= opset:
        return
    # Without its weights, which the converter would copy through a protocol buffer of at most 2 GiB.
    try:
        converted = version_converter.convert_version(skeleton(model), opset)
    except RuntimeError as error:
        raise ArtifactError(f"the graph cannot be brought to opset {opset}: {error}") from error
    known = {t.name for t in model.graph.initializer}
    model.graph.initializer.extend(t for t in converted.graph.initializer if t.name not in known)
    set_nodes(model, list(converted.graph.node))
    imported.version = opset
