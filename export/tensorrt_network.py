"""An ONNX graph as TensorRT's parser takes it, or what it refuses and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from cliplet.contract import GraphContract
from cliplet.errors import DataError
from cliplet.tensorrt_library import Library, Said


def parse_graph(
    library: Library, source: Path, network: Any, contract: GraphContract, observe: tuple[str, ...]
) -> None:
    """Fill a network from a graph, with the contract's inputs and outputs, and the tensors in `observe` behind them.

    Raises:
        DataError: the file is no graph of this contract, or holds an operator that the library refuses.
    """
    parser = library.parser(network)
    with library.listening() as said:
        parsed = parser.parse_from_file(str(source))
    if not parsed:
        raise _refusal(library, source, parser, said)
    found = [network.get_input(i).name for i in range(network.num_inputs)]
    found += [network.get_output(i).name for i in range(network.num_outputs)]
    wanted = [tensor.name for tensor in (*contract.inputs, *contract.outputs)]
    if found != wanted:
        raise DataError(f"{source} has tensors {found}", f"those of graph {contract.name!r}: {wanted}")
    inner = {tensor.name: tensor for tensor in _inner_tensors(network)}
    for name in observe:
        if name not in inner:
            raise DataError(
                f"{source} has no inner tensor {name!r}", "a graph that cliplet traced", "export again"
            )
        network.mark_output(inner[name])


def _inner_tensors(network: Any) -> Iterator[Any]:
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        yield from (layer.get_output(j) for j in range(layer.num_outputs))


def _refusal(library: Library, source: Path, parser: Any, said: Said) -> DataError:
    """What to raise for a graph that the parser does not take: the operator, its node, and what to do instead."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    refused = next((error for error in errors if error.node_operator()), None)
    if refused is None:
        return DataError(f"{library} cannot read {source}: {said.reason}", "an ONNX graph", "export again")
    operator, node = refused.node_operator(), refused.node_name()
    elsewhere = "--runtime onnx, whose CUDA provider runs it on a GPU"
    if parser.supports_operator(operator):
        return DataError(
            f"{library} refuses operator {operator} of node {node!r}: {refused.desc()}",
            "types, shapes and attributes that its parser knows",
            elsewhere,
        )
    similar = [name for name in _similar(operator) if parser.supports_operator(name)]
    return DataError(
        f"{library} has no operator {operator} (node {node!r})",
        f"operators that it has; the nearest by name: {', '.join(similar[:3]) or 'none'}",
        elsewhere,
    )


def _similar(operator: str) -> list[str]:
    """Other operators of ONNX, those most like this one first: parts of its name (Conv for DeformConv), then look."""
    known = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain} - {operator}
    parts = sorted((name for name in known if name in operator), key=len, reverse=True)
    return [*parts, *difflib.get_close_matches(operator, known - set(parts), 10)]
