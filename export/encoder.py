"""The encoder inside a traced graph: which nodes it is made of, and which element type each tensor has.

Everything is read from how nodes are connected and from the types that ONNX infers; no operator or weight is known
by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, shape_inference

from cliplet.contract import FEATURES, PIXELS
from cliplet.errors import ArtifactError

# Constants up to this size stay in a skeleton: shapes and axes, which inference reads.
_SMALL_BYTES = 1024


def load_graph(path: Path, weights: bool = True) -> ModelProto:
    """The ONNX model in a file; without `weights`, those in a file beside it are not read.

    Raises:
        ArtifactError: it cannot be read, or is no ONNX model.
    """
    try:
        model = onnx.load(str(path), load_external_data=weights)
    # Each reader of onnx raises what its own library has.
    except Exception as error:  # noqa: BLE001
        raise ArtifactError(f"cannot read {path}: {error}", "an ONNX graph", "export again") from error
    return model


def skeleton(model: ModelProto) -> ModelProto:
    """A copy of the model in which large weights are inputs, so that it fits into a protocol buffer."""
    bare = ModelProto(ir_version=model.ir_version, functions=model.functions)
    bare.opset_import.extend(model.opset_import)
    graph = bare.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    listed = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() <= _SMALL_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in listed:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return bare


def tensor_types(model: ModelProto) -> dict[str, int]:
    """The element type, one of `TensorProto`'s, of each tensor of the main graph.

    Raises:
        ArtifactError: types contradict, or ONNX does not know an operator.
    """
    try:
        graph = shape_inference.infer_shapes(skeleton(model), check_type=True, strict_mode=True).graph
    except (shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise ArtifactError(
            f"the types in the graph contradict: {error}", "a graph that ONNX accepts"
        ) from error
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        unknown = [name for name in node.output if name and not types.get(name)]
        if unknown:
            raise ArtifactError(
                f"operator {node.domain or 'ai.onnx'}:{node.op_type} has an output of unknown type",
                "operators of ONNX alone",
            )
    return types


def encoder_nodes(graph: GraphProto) -> list[bool]:
    """For each node whether it is part of the encoder: it follows `pixels`, and `features` follows it.

    Raises:
        ArtifactError: there is no such part.
    """
    after = _marked(graph, {PIXELS})
    needed = {FEATURES}
    inside = [False] * len(graph.node)
    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        if needed.intersection(node.output) and PIXELS not in node.output:
            inside[i] = after[i]
            needed.update(reads(node))
    if not any(inside):
        raise ArtifactError(
            f"the graph has no encoder: nothing lies between tensors {PIXELS!r} and {FEATURES!r}",
            "a graph that `cliplet export` has traced",
            "export again",
        )
    return inside


def ancestors(graph: GraphProto, name: str) -> set[str]:
    """All tensors that the tensor `name` is computed from, itself included."""
    needed = {name}
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(reads(node))
    return needed


def reads(node: NodeProto) -> Iterator[str]:
    """Names of all tensors that a node reads; those of its subgraphs too, whose own names are among them."""
    yield from filter(None, node.input)
    yield from captured(node)


def captured(node: NodeProto) -> Iterator[str]:
    """Names that occur in a node's subgraphs."""
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from reads(inner)
        for value in graph.output:
            yield value.name


def subgraphs(node: NodeProto) -> list[GraphProto]:
    return [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]


def _marked(graph: GraphProto, names: set[str]) -> list[bool]:
    """For each node whether it is computed from one of the tensors `names`."""
    marked = []
    for node in graph.node:
        marked.append(bool(names.intersection(reads(node))))
        if marked[-1]:
            names.update(node.output)
    return marked


def set_nodes(model: ModelProto, nodes: Iterable[NodeProto]) -> None:
    """Put `nodes` in the place of the main graph's."""
    # Copies first: clearing the field frees what it holds.
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
