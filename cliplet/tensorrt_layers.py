"""What precision a TensorRT engine's encoder computes in, seen in the typed network and in the finished engine.

The encoder's convolutions and matrix products are found in the network, between the tensors `pixels` and `features`.
A finished engine names with each of its layers the nodes of the ONNX graph that went into it: so the same products are
found again, with the types of what they read and write.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cliplet.contract import FEATURES, PIXELS

# From the lowest on: a product that reads int8 and writes float is done in int8.
TYPES = ("int8", "fp8", "bf16", "fp16", "fp32")
_NETWORK_TYPES = {"INT8": "int8", "FP8": "fp8", "BF16": "bf16", "HALF": "fp16", "FLOAT": "fp32"}
# TensorRT's releases write types in these ways.
_ENGINE_TYPES = (
    ("int8", re.compile(r"\bint8\b", re.IGNORECASE)),
    ("fp8", re.compile(r"\bfp8\b", re.IGNORECASE)),
    ("bf16", re.compile(r"\b(bfloat16|bf16)\b", re.IGNORECASE)),
    ("fp16", re.compile(r"\b(half|fp16)\b", re.IGNORECASE)),
    ("fp32", re.compile(r"\b(float|fp32)\b", re.IGNORECASE)),
)
_PRODUCTS = ("CONVOLUTION", "MATRIX_MULTIPLY")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_DATATYPE = re.compile(r"(?:Format/)?Datatype: ([^,}]*)")


@dataclass(frozen=True)
class EngineLayer:
    """A layer of a finished engine: the ONNX nodes that went into it, and the types that it reads and writes."""

    nodes: frozenset[str]
    types: frozenset[str]


def network_products(network: Any) -> dict[str, str]:
    """Type by ONNX node of the encoder's products; of all products in a graph that names no encoder."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {name: layer for layer in layers for name in _names(_outputs(layer))}
    inside = _encoder(layers, makers) if {PIXELS, FEATURES} <= makers.keys() else set(map(id, layers))
    products = [layer for layer in layers if id(layer) in inside and layer.type.name in _PRODUCTS]
    return {_node(layer): _network_type(layer, makers) for layer in products}


def engine_products(layers: Iterable[EngineLayer], nodes: Iterable[str]) -> dict[str, str]:
    """Type by ONNX node of those `nodes` that a finished engine shows: in a layer with no other of them.

    What is fused with a second product is left out, since its insides are not seen.
    """
    wanted = frozenset(nodes)
    found: dict[str, str] = {}
    for layer in layers:
        held = layer.nodes & wanted
        lowest = next((kind for kind in TYPES if kind in layer.types), None)
        if len(held) == 1 and lowest is not None:
            found[next(iter(held))] = lowest
    return found


def summary(products: dict[str, str]) -> tuple[str, dict[str, int]]:
    """Their precision, such as `fp16`, or `fp16+fp32` where it is mixed; and how many there are of each."""
    counts = Counter(products.values())
    ordered = {kind: counts[kind] for kind in TYPES if kind in counts}
    return "+".join(sorted(ordered)), ordered


def computes_in(precision: str, found: str) -> bool:
    """Whether a summary of products is what was asked for: float32 is all of it, lower precision at least in part.

    Low precision leaves some products in float32 on purpose, where they would overflow or where a type is cast.
    """
    return found == precision or (precision != "fp32" and precision in found.split("+"))


def layers_of_inspector(text: str) -> list[EngineLayer]:
    """Layers of an engine as its inspector writes them in JSON."""
    listed = json.loads(text).get("Layers", [])
    return [_layer_of_json(layer) for layer in listed if isinstance(layer, dict)]


def layers_of_builder(message: str) -> list[EngineLayer]:
    """Layers of an engine as the builder lists them, a line each, in its most detailed log."""
    lines = [line for line in message.splitlines() if line.startswith("Name: ")]
    return [_layer_of_line(line) for line in lines]


def _layer_of_json(layer: dict[str, Any]) -> EngineLayer:
    tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])]
    words = [str(t.get("Datatype", t.get("Format/Datatype", ""))) for t in tensors if isinstance(t, dict)]
    return EngineLayer(frozenset(_NODE.findall(str(layer.get("Metadata", "")))), _types(words))


def _layer_of_line(line: str) -> EngineLayer:
    # The constants of a layer are left out: scaling factors stay in float32 where the product does not.
    read, _, rest = line.partition("Constants: [")
    written = rest[rest.find("Outputs: [") :] if rest else ""
    return EngineLayer(frozenset(_NODE.findall(line)), _types(_DATATYPE.findall(f"{read} {written}")))


def _types(words: Iterable[str]) -> frozenset[str]:
    return frozenset(kind for word in words for kind, pattern in _ENGINE_TYPES if pattern.search(word))


def _encoder(layers: list[Any], makers: dict[str, Any]) -> set[int]:
    """The layers on the ways from PIXELS to FEATURES, by `id` since names of layers need not be unique."""
    readers: dict[str, list[Any]] = {}
    for layer in layers:
        for name in _names(_inputs(layer)):
            readers.setdefault(name, []).append(layer)
    forward = _reached(PIXELS, lambda name: readers.get(name, []), _outputs)
    back = _reached(FEATURES, lambda name: [makers[name]] if name in makers else [], _inputs)
    return forward & back


def _reached(
    start: str, next_layers: Callable[[str], list[Any]], ends: Callable[[Any], Iterator[Any]]
) -> set[int]:
    """All layers that a walk from a tensor comes through, by `id`."""
    found: set[int] = set()
    stack = [start]
    while stack:
        for layer in next_layers(stack.pop()):
            if id(layer) not in found:
                found.add(id(layer))
                stack += _names(ends(layer))
    return found


def _network_type(layer: Any, makers: dict[str, Any]) -> str:
    """The lowest type of what a product reads; int8 if that was int8 before it was scaled."""
    found = set()
    for tensor in _inputs(layer):
        maker = makers.get(tensor.name)
        if maker is not None and maker.type.name == "DEQUANTIZE":
            tensor = maker.get_input(0)
        found.add(_NETWORK_TYPES.get(tensor.dtype.name, tensor.dtype.name.lower()))
    return next((kind for kind in TYPES if kind in found), "+".join(sorted(found)))


def _node(layer: Any) -> str:
    named = _NODE.search(str(layer.metadata))
    return named[1] if named else str(layer.name)


def _names(tensors: Iterable[Any]) -> list[str]:
    return [tensor.name for tensor in tensors]


def _inputs(layer: Any) -> Iterator[Any]:
    tensors = (layer.get_input(i) for i in range(layer.num_inputs))
    return (tensor for tensor in tensors if tensor is not None)


def _outputs(layer: Any) -> Iterator[Any]:
    return (layer.get_output(i) for i in range(layer.num_outputs))
