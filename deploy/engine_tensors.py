"""Which tensors an engine's file says it has, read from the file itself without a runtime and without its weights.

Only what lies at the outside of an ONNX graph or an OpenVINO IR is looked at; weights, which make up nearly all of a
file, are skipped unread.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from cliplet.errors import ArtifactError

# Fields of ONNX messages (onnx.proto3): ModelProto.graph, GraphProto.input and .output, ValueInfoProto.name and .type,
# TypeProto.tensor_type, .elem_type and .shape, TensorShapeProto.dim, Dimension.dim_value.
_GRAPH, _INPUT, _OUTPUT, _NAME, _TYPE, _TENSOR, _ELEMENTS, _SHAPE, _DIM, _SIZE = (
    7,
    11,
    12,
    1,
    2,
    1,
    1,
    2,
    1,
    1,
)
_ONNX_TYPES = {1: "float32", 2: "uint8", 7: "int64"}
_IR_TYPES = {"FP32": "float32", "U8": "uint8", "I64": "int64"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class EngineTensor:
    """A tensor as a file has it: type, and its axes, -1 where any size goes."""

    dtype: str
    axes: tuple[int, ...]


def engine_tensors(file: Path) -> dict[str, EngineTensor]:
    """Inputs and outputs by name, of an `.onnx` or an IR's `.xml` file.

    Raises:
        ArtifactError: the file is neither.
    """
    try:
        found = _ir_tensors(file) if file.suffix == ".xml" else _onnx_tensors(file)
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        raise ArtifactError(
            f"cannot read the tensors of {file}: {error}", "an ONNX graph or an OpenVINO IR", "export again"
        ) from error
    if not found:
        raise ArtifactError(f"{file} has no tensors", "an ONNX graph or an OpenVINO IR", "export again")
    return found


def _onnx_tensors(file: Path) -> dict[str, EngineTensor]:
    found = {}
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start, end in _parts(data, (0, len(data)), _GRAPH):
            for kind in (_INPUT, _OUTPUT):
                for tensor in _parts(data, (start, end), kind):
                    name = b"".join(data[a:b] for a, b in _parts(data, tensor, _NAME)).decode()
                    found[name] = _onnx_tensor(data, tensor)
    return found


def _onnx_tensor(data: mmap.mmap, place: tuple[int, int]) -> EngineTensor:
    dtype, axes = "", []
    for kind in _parts(data, place, _TYPE):
        for tensor in _parts(data, kind, _TENSOR):
            dtype = _ONNX_TYPES.get(_number(data, tensor, _ELEMENTS, 0), "another type")
            for shape in _parts(data, tensor, _SHAPE):
                axes += [_number(data, dim, _SIZE, -1) for dim in _parts(data, shape, _DIM)]
    return EngineTensor(dtype, tuple(axes))


def _parts(data: mmap.mmap, place: tuple[int, int], field: int) -> list[tuple[int, int]]:
    """Where the contents of each length-delimited `field` of a message lie."""
    return [(a, b) for number, kind, a, b in _fields(data, *place) if (number, kind) == (field, _BYTES)]


def _number(data: mmap.mmap, place: tuple[int, int], field: int, missing: int) -> int:
    """The whole number in `field` of a message."""
    for number, kind, start, _ in _fields(data, *place):
        if (number, kind) == (field, _VARINT):
            return _varint(data, start)[0]
    return missing


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, and where the contents begin and end of each field of a protobuf message."""
    while position < end:
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            after = _varint(data, position)[1]
        elif kind == _BYTES:
            size, position = _varint(data, position)
            after = position + size
        elif kind in (_FIXED32, _FIXED64):
            after = position + (4 if kind == _FIXED32 else 8)
        else:
            raise ValueError(f"a field of type {kind} at byte {position}")
        if after > end:
            raise ValueError(f"it ends too early, at byte {end}")
        yield number, kind, position, after
        position = after


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """A protobuf number, and where it ends."""
    value = 0
    for count in range(10):
        byte = data[position + count]
        value |= (byte & 127) << (7 * count)
        if byte < 128:
            return value, position + count + 1
    raise ValueError(f"no number at byte {position}")


def _ir_tensors(file: Path) -> dict[str, EngineTensor]:
    found = {}
    for layer in ElementTree.parse(file).getroot().findall("./layers/layer"):
        kind = layer.get("type")
        port = layer.find({"Parameter": "output/port", "Result": "input/port"}.get(kind or "", "none"))
        if port is not None:
            names = port.get("names") if kind == "Parameter" else layer.get("output_names")
            dtype = _IR_TYPES.get(port.get("precision", ""), "another type")
            axes = tuple(int(dim.text or -1) for dim in port.findall("dim"))
            found.update({name: EngineTensor(dtype, axes) for name in (names or "").split(",")})
    return found
