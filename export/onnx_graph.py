"""ONNX graphs: traced in float32 from the modules of `cliplet.export.graphs`, and their vocabulary exchanged.

Legend: B images, V views, C classes, D embedding.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch.export import Dim
from torch.onnx import OnnxExporterError

from cliplet.contract import FEATURES, PIXELS, SNIPPETS, TEXT, TEXT_INITIALIZER, GraphContract, TensorSpec
from cliplet.errors import DataError, explained_os_errors

OPSET = 18
DYNAMIC = Dim.DYNAMIC
# Protocol buffers end at 2 GiB; larger weights go into a file of their own.
LARGEST_INLINE_BYTES = 1_800_000_000


def trace(
    module: torch.nn.Module,
    contract: GraphContract,
    example: dict[str, torch.Tensor],
    target: Path,
    fixed: Collection[str] = (),
) -> None:
    """Write the ONNX graph of `module` in float32, with the contract's tensor names and axes.

    Args:
        module: returns the contract's outputs, then the tensors PIXELS and FEATURES if the contract's graph has them.
        example: an input for each of the module's arguments, in order; the names become the graph's.
        fixed: axes of the contract whose sizes stay those of the example.

    Raises:
        DataError: the module does something that ONNX has no operator for.
    """
    inner = (PIXELS, FEATURES) if contract is not TEXT else ()
    specs = {spec.name: spec for spec in contract.inputs}
    dynamic = tuple(_dynamic_axes(specs[name], fixed) if name in specs else {0: DYNAMIC} for name in example)
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx"), _quiet("onnxscript"):
            # Remarks on the exporter's own passes; what counts is the comparison that follows.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                tuple(example.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example),
                output_names=[*(spec.name for spec in contract.outputs), *inner],
                dynamic_shapes=dynamic,
                verbose=False,
            )
    except OnnxExporterError as error:
        cause = error.__cause__ or error
        raise DataError(
            f"this model cannot be traced to ONNX: {str(cause).splitlines()[0]}",
            "an architecture of operators that ONNX has: ViT, ResNet, ConvNeXt, SigLIP, MobileCLIP and most of timm",
            "use it eagerly with --runtime torch, or choose the nearest of these",
        ) from error
    model = program.model_proto
    # These two had to be outputs to keep their names, and are needed inside only.
    kept = [value for value in model.graph.output if value.name not in inner]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    # Names of axes inside the graph are the tracer's; only the contract's shall be seen.
    del model.graph.value_info[:]
    _forget_sources(model.graph)
    save_graph(model, target)


def _forget_sources(graph: onnx.GraphProto) -> None:
    """Take out what the tracer wrote about the code that made each node: stack traces, with this machine's folders."""
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_sources(attribute.g)


def _dynamic_axes(spec: TensorSpec, fixed: Collection[str]) -> dict[int, Any]:
    return {i: DYNAMIC for i, axis in enumerate(spec.axes) if isinstance(axis, str) and axis not in fixed}


def name_axes(source: Path, target: Path, contract: GraphContract, sizes: Mapping[str, int]) -> None:
    """Write a graph whose inputs and outputs have the contract's axes: a number where `sizes` has one."""
    model = onnx.load(str(source))
    _set_axes(model, contract, sizes)
    save_graph(model, target)


def _set_axes(model: onnx.ModelProto, contract: GraphContract, sizes: Mapping[str, int]) -> None:
    values = (*model.graph.input, *model.graph.output)
    for tensor, value in zip((*contract.inputs, *contract.outputs), values, strict=True):
        for dim, axis in zip(value.type.tensor_type.shape.dim, tensor.axes, strict=True):
            if isinstance(axis, str) and axis in sizes:
                dim.dim_value = sizes[axis]
            elif isinstance(axis, str) and not dim.HasField("dim_value"):
                dim.dim_param = axis


def save_graph(model: onnx.ModelProto, target: Path) -> None:
    """Write a graph that the ONNX checker accepts; weights beyond 1.8 GB go into `<target>.data`."""
    # Not ByteSize, which protobuf refuses to count beyond 2 GiB.
    large = sum(len(t.raw_data) for t in model.graph.initializer) > LARGEST_INLINE_BYTES
    with explained_os_errors(target):
        # onnx appends to a file of weights that is there.
        Path(f"{target}.data").unlink(missing_ok=True)
        onnx.save(
            model, str(target), save_as_external_data=large, location=f"{target.name}.data" if large else None
        )
    onnx.checker.check_model(str(target))


def set_metadata(file: Path, facts: Mapping[str, str]) -> None:
    """Add facts to the metadata of a graph; weights in a file of their own stay untouched."""
    model = onnx.load(str(file), load_external_data=False)
    known = {prop.key: prop.value for prop in model.metadata_props}
    onnx.helper.set_model_props(model, {**known, **facts})
    with explained_os_errors(file):
        file.write_bytes(model.SerializeToString())


def metadata(file: Path) -> dict[str, str]:
    """The facts that a graph holds about itself."""
    model = onnx.load(str(file), load_external_data=False)
    return {prop.key: prop.value for prop in model.metadata_props}


def set_vocabulary(source: Path, target: Path, text_CD: np.ndarray) -> None:
    """Write a `snippets` graph with another text matrix float [C, D] as its initializer `text`."""
    model = onnx.load(str(source))
    kept = [i for i in model.graph.input if i.name != TEXT_INITIALIZER]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    others = [t for t in model.graph.initializer if t.name != TEXT_INITIALIZER]
    del model.graph.initializer[:]
    rows_CD = np.ascontiguousarray(text_CD, np.float32)
    model.graph.initializer.extend([*others, numpy_helper.from_array(rows_CD, TEXT_INITIALIZER)])
    _set_axes(model, SNIPPETS, {"C": len(text_CD)})
    save_graph(model, target)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Only errors of `logger` pass, for as long as the context lasts."""
    chosen = logging.getLogger(logger)
    before = chosen.level
    chosen.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chosen.setLevel(before)
