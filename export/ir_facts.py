"""Facts about an OpenVINO IR, read from its XML without OpenVINO."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from cliplet.contract import FEATURES, GRAPHS, PIXELS
from cliplet.errors import ArtifactError

from .facts import Facts, by_count, constant_facts, shown_shape, understood, weights_file_facts
from .openvino_ir import read_precision_ir

_FIX = "export again"
# OpenVINO's short names of types, as elsewhere.
_TYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "boolean": "bool"}
_TYPES |= {
    f"{letter}{bits}": f"{name}{bits}"
    for letter, name in (("i", "int"), ("u", "uint"))
    for bits in (4, 8, 16, 32, 64)
}
_LOW = ("bfloat16", "float16", "int4", "int8", "uint4", "uint8")
_NO_OPERATORS = ("Const", "Parameter", "Result")


def ir_facts(path: Path) -> Facts:
    """What a graph takes, gives and holds, and which operators it is made of; as `onnx_facts` has it.

    A precision that an engine is only asked for when it is loaded, as bf16 is, does not stand in an IR.

    Raises:
        ArtifactError: the .xml or its .bin is cut short, or is no IR.
    """
    with understood(path, "the .xml of an OpenVINO IR", _FIX):
        net = _net(path)
        weights = path.with_suffix(".bin")
        constants = [_constant(layer) for layer in net.root.iter("layer") if layer.get("type") == "Const"]
        bin_facts = weights_file_facts(weights, max((end for *_, end in constants), default=0))
        return {
            "intact": bin_facts["present"],
            "damage": [] if bin_facts["present"] else [f"{weights.name} is missing"],
            "bytes": path.stat().st_size,
            "graph": net.contract_name(),
            "ir_version": int(net.root.get("version", 0)),
            "producer": net.producer(),
            "inputs": net.inputs,
            "outputs": net.outputs,
            "precision": {"read": read_precision_ir(path), "lowered": net.lowered()},
            "operators": net.operators(),
            **constant_facts((name, kind, shape, size) for name, kind, shape, size, _ in constants),
            "weights": {"file": weights.name, **bin_facts},
        }


def _net(path: Path) -> _Net:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ArtifactError(
            f"{path} is cut short or no XML: {error}", "the .xml of an OpenVINO IR", _FIX
        ) from error
    layers = {layer.attrib["id"]: layer for layer in root.findall("layers/layer")}
    if root.tag != "net" or not layers:
        raise ArtifactError(f"{path} is XML, but holds no layers", "the .xml of an OpenVINO IR", _FIX)
    after: dict[str, list[str]] = defaultdict(list)
    before: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for edge in root.findall("edges/edge"):
        start, port, end = (edge.attrib[name] for name in ("from-layer", "from-port", "to-layer"))
        if not {start, end} <= layers.keys():
            raise ArtifactError(f"{path} has an edge to a layer that is not there", "a whole IR", _FIX)
        after[start].append(end)
        before[end].append((start, port))
    return _Net(root, layers, after, before)


@dataclass(frozen=True)
class _Net:
    """The main graph: layers by id, the layers after each, and the layers before each with the port of each."""

    root: Element
    layers: Mapping[str, Element]
    after: Mapping[str, list[str]]
    before: Mapping[str, list[tuple[str, str]]]

    @cached_property
    def inputs(self) -> dict[str, Facts]:
        return dict(_tensor(layer.find("output/port")) for layer in self.of_type("Parameter"))

    @cached_property
    def outputs(self) -> dict[str, Facts]:
        found = {}
        for result in self.of_type("Result"):
            ((start, number),) = self.before[result.attrib["id"]]
            ports = (p for p in self.layers[start].findall("output/port") if p.get("id") == number)
            name, facts = _tensor(next(ports, None))
            found[name] = facts
        return found

    def of_type(self, kind: str) -> Iterator[Element]:
        return (layer for layer in self.layers.values() if layer.get("type") == kind)

    def contract_name(self) -> str | None:
        names = (set(self.inputs), set(self.outputs))
        fits = (
            c.name
            for c in GRAPHS.values()
            if names == ({t.name for t in c.inputs}, {t.name for t in c.outputs})
        )
        return next(fits, None)

    def producer(self) -> str | None:
        info = self.root.find("rt_info/Runtime_version")
        return f"OpenVINO {info.get('value')}" if info is not None else None

    def operators(self) -> Facts:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for number, layer in self.layers.items():
            kinds = (str(inner.get("type")) for inner in layer.iter("layer"))
            counts[self.sides[number]].update(kind for kind in kinds if kind not in _NO_OPERATORS)
        order = ("encoder", "outside", "on_constants")
        return {
            "count": sum(sum(c.values()) for c in counts.values()),
            **{side: by_count(counts[side]) for side in order},
        }

    def lowered(self) -> Facts:
        """Operators that give a low type, by where they stand, type and operator."""
        found: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        for number, layer in self.layers.items():
            port = layer.find("output/port")
            kind = _port_type(port) if port is not None else ""
            if kind in _LOW and layer.get("type") not in _NO_OPERATORS:
                found[self.sides[number]][kind][str(layer.get("type"))] += 1
        return {
            side: {kind: by_count(counts) for kind, counts in sorted(kinds.items())}
            for side, kinds in sorted(found.items())
        }

    @cached_property
    def sides(self) -> dict[str, str]:
        """Where each layer stands: in the encoder, outside, or on constants alone."""
        begin, end = self._maker(PIXELS), self._maker(FEATURES)
        encoder: set[str] = set()
        if begin and end:
            earlier = {number: [start for start, _ in found] for number, found in self.before.items()}
            encoder = _reached([begin], self.after) & _reached([end], earlier) - {begin}
        live = _reached([layer.attrib["id"] for layer in self.of_type("Parameter")], self.after)
        return {
            number: "encoder" if number in encoder else "outside" if number in live else "on_constants"
            for number in self.layers
        }

    def _maker(self, tensor: str) -> str | None:
        """The layer that gives a tensor."""
        for number, layer in self.layers.items():
            if any(tensor in port.get("names", "").split(",") for port in layer.findall("output/port")):
                return number
        return None


def _reached(starts: list[str], neighbours: Mapping[str, list[str]]) -> set[str]:
    """The layers `starts` and all that can be reached from them."""
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += neighbours.get(number, [])
    return found


def _tensor(port: Element | None) -> tuple[str, Facts]:
    """Name, type and shape of what comes out of a port."""
    if port is None:
        raise ArtifactError("an input or output of the graph has no port", "a whole IR", _FIX)
    axes = ("?" if dim.text == "-1" else dim.text for dim in port.findall("dim"))
    return port.get("names", "unnamed"), {"type": _port_type(port), "shape": shown_shape(axes)}


def _port_type(port: Element) -> str:
    """Ports write types in capitals, and floats of 32 bits as FP32."""
    kind = port.get("precision", "").lower().replace("fp", "f")
    return _TYPES.get(kind, kind)


def _constant(layer: Element) -> tuple[str, str, list[int], int, int]:
    """Name, type, shape, bytes and end in the .bin of a constant."""
    data = layer.find("data")
    if data is None:
        raise ArtifactError(f"constant {layer.get('name')!r} has no data", "a whole IR", _FIX)
    kind, size = data.attrib["element_type"], int(data.attrib["size"])
    shape = [int(side) for side in data.get("shape", "").split(",") if side.strip()]
    return layer.get("name", ""), _TYPES.get(kind, kind), shape, size, int(data.attrib["offset"]) + size
