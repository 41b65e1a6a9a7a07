"""Facts about an ONNX graph, read without the weights that lie in other files."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from cliplet.contract import GRAPHS
from cliplet.errors import ArtifactError
from cliplet.runners.onnx_runner import PRECISION_KEY

from .encoder import encoder_nodes, load_graph, reads, subgraphs, tensor_types
from .facts import Facts, by_count, constant_facts, shown_shape, understood, weights_file_facts
from .precision import count_precisions

_OWN = "cliplet."
_NUMPY_NAMES = {TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64"}
_HALF_BYTES = (TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1)
_LOW = {
    kind
    for name, kind in TensorProto.DataType.items()
    if name.startswith(("FLOAT16", "BFLOAT16", "FLOAT8", "FLOAT4", "INT8", "UINT8", "INT4", "UINT4"))
}


def onnx_facts(path: Path) -> Facts:
    """What a graph takes, gives and holds, which operators it is made of, and where precision is lowered.

    Operators are counted by where they stand: in the `encoder` (between the tensors `pixels` and `features`), `outside`
    of it, or `on_constants` alone, as those that expand quantised weights. Operators in the body of a loop count
    where the loop stands. A weights file that is missing is `damage`.

    Raises:
        ArtifactError: the file or a weights file is cut short, or the file is no ONNX graph.
    """
    with understood(path, "an ONNX graph", "export again"):
        model = load_graph(path, weights=False)
        _refuse_hollow(model, path)
        tensors = list(_tensors(model.graph))
        external = _external(path.parent, tensors)
        damage = [f"{name} is missing" for name, facts in external.items() if not facts["present"]]
        sides = _sides(model.graph)
        return {
            "intact": not damage,
            "damage": damage,
            "bytes": path.stat().st_size,
            "graph": _contract_name(model.graph),
            "opset": {o.domain or "ai.onnx": o.version for o in model.opset_import},
            "ir_version": model.ir_version,
            "producer": f"{model.producer_name} {model.producer_version}".strip(),
            "inputs": {value.name: _value(value) for value in model.graph.input},
            "outputs": {value.name: _value(value) for value in model.graph.output},
            "metadata": _metadata(model),
            "precision": _precision(path, model, sides),
            "operators": _operators(model.graph.node, sides),
            "functions": len(model.functions),
            **constant_facts((t.name, _type(t.data_type), t.dims, _bytes(t)) for t in tensors),
            "external_data": external,
        }


def _refuse_hollow(model: ModelProto, path: Path) -> None:
    """A protocol buffer that ends between two of its fields is whole to its reader."""
    for held, what in (
        (model.graph.node, "operators"),
        (model.graph.output, "outputs"),
        (model.opset_import, "opset"),
    ):
        if not held:
            raise ArtifactError(
                f"{path} holds no {what}: it is cut short or no ONNX graph",
                "a whole ONNX graph",
                "export again",
            )


def _contract_name(graph: GraphProto) -> str | None:
    """The contract that has the graph's tensors, by their names."""
    names = [[v.name for v in graph.input], [v.name for v in graph.output]]
    fits = (c.name for c in GRAPHS.values() if names == [[t.name for t in s] for s in (c.inputs, c.outputs)])
    return next(fits, None)


def _value(value: ValueInfoProto) -> Facts:
    tensor = value.type.tensor_type
    axes = (d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return {
        "type": _type(tensor.elem_type),
        "shape": shown_shape(axes) if tensor.HasField("shape") else "unknown",
    }


def _metadata(model: ModelProto) -> Facts:
    """What the graph says about itself; what cliplet wrote stands below `cliplet`, as it was before it was text."""
    found: Facts = {}
    for prop in model.metadata_props:
        if prop.key.startswith(_OWN):
            found.setdefault("cliplet", {})[prop.key.removeprefix(_OWN)] = _parsed(prop.value)
        else:
            found[prop.key] = prop.value
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _sides(graph: GraphProto) -> list[str]:
    """Where each node stands; all are outside in a graph without an encoder."""
    try:
        inside = encoder_nodes(graph)
    except ArtifactError:
        inside = [False] * len(graph.node)
    live = {value.name for value in graph.input}
    sides = []
    for node, is_encoder in zip(graph.node, inside, strict=True):
        fed = bool(live.intersection(reads(node)))
        if fed:
            live.update(node.output)
        sides.append("encoder" if is_encoder else "outside" if fed else "on_constants")
    return sides


def _operators(nodes: Iterable[NodeProto], sides: list[str]) -> Facts:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for node, side in zip(nodes, sides, strict=True):
        counts[side].update(_kinds(node))
    order = ("encoder", "outside", "on_constants")
    return {
        "count": sum(sum(c.values()) for c in counts.values()),
        **{side: by_count(counts[side]) for side in order},
    }


def _kinds(node: NodeProto) -> Iterator[str]:
    """A node's operator and those in its bodies. Constants are no operators."""
    if node.op_type != "Constant":
        yield f"{node.domain}:{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from _kinds(inner)


def _precision(path: Path, model: ModelProto, sides: list[str]) -> Facts:
    """What the encoder's products are done in, and which operators give a low type; or why that cannot be told."""
    said = {prop.key: prop.value for prop in model.metadata_props}.get(PRECISION_KEY)
    facts: Facts = {"noted": said} if said is not None else {}
    try:
        products = count_precisions(path)
        types = tensor_types(model)
    except ArtifactError as error:
        return {**facts, "read": None, "unread_because": error.happened}
    lowered: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for node, side in zip(model.graph.node, sides, strict=True):
        kind = types.get(next(iter(node.output), ""), TensorProto.UNDEFINED)
        if kind in _LOW and node.op_type != "Constant":
            lowered[side][_type(kind)][node.op_type] += 1
    return {
        **facts,
        "read": "+".join(sorted(products)),
        "products": by_count(products),
        "lowered": {
            side: {kind: by_count(counts) for kind, counts in sorted(kinds.items())}
            for side, kinds in sorted(lowered.items())
        },
    }


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All constants, those in the bodies of loops too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                named = TensorProto.FromString(attribute.t.SerializeToString())
                named.name = named.name or next(iter(node.output), node.name)
                yield named
        for inner in subgraphs(node):
            yield from _tensors(inner)


def _external(folder: Path, tensors: list[TensorProto]) -> dict[str, Facts]:
    """The weights files that a graph names."""
    ends: dict[str, int] = defaultdict(int)
    users: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            end = int(where.get("offset", 0)) + int(where.get("length", _bytes(tensor)))
            ends[where["location"]] = max(ends[where["location"]], end)
            users[where["location"]] += 1
    return {
        name: {**weights_file_facts(folder / name, end), "tensors": users[name]}
        for name, end in sorted(ends.items())
    }


def _type(kind: int) -> str:
    return _NUMPY_NAMES.get(kind) or str(TensorProto.DataType.Name(kind)).lower()


def _bytes(tensor: TensorProto) -> int:
    if tensor.data_type == TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    count = math.prod(tensor.dims)
    if tensor.data_type in _HALF_BYTES:
        return (count + 1) // 2
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
