"""OpenVINO IRs: written from ONNX graphs, quantised with NNCF, and their vocabulary exchanged.

An IR is an `.xml` with the graph and a `.bin` with the weights beside it.

Legend: C classes, D embedding.
"""

from __future__ import annotations

import importlib
import io
import itertools
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from cliplet.contract import FEATURES, PIXELS, TEXT_INITIALIZER
from cliplet.errors import ArtifactError, DataError, EnvironmentError_, explained_os_errors
from cliplet.runners.openvino_runner import (
    cut_graph,
    find_tensor,
    load_openvino,
    no_telemetry,
    openvino_core,
    read_graph,
)

# Element types of weights other than float32.
_WEIGHTS = {"f16": "fp16", "bf16": "bf16"}


@dataclass(frozen=True)
class Quantisation:
    """What a graph was calibrated on: images, and views of them, that NNCF took, by our own count."""

    images: int
    views: int


def write_ir(onnx: Path, xml: Path) -> None:
    """Write the IR of an ONNX graph, its weights in float32 as they are.

    Raises:
        ArtifactError: the file is no graph, or has operators that OpenVINO does not.
        EnvironmentError_: OpenVINO is missing, or the files cannot be written.
    """
    _save(read_graph(onnx), xml)


def set_text(source: Path, target: Path, text_CD: np.ndarray) -> None:
    """Write the IR `source` of a `snippets` graph with another text matrix float [C, D]; both may be one file.

    Raises:
        ArtifactError: the IR has no constant `text`.
        DataError: rows of another length than those it has.
    """
    model = read_graph(source)
    output = find_tensor(model, TEXT_INITIALIZER)
    if output is None or output.get_node().get_type_name() != "Constant":
        raise ArtifactError(f"{source} has no constant {TEXT_INITIALIZER!r}", "the IR of a `snippets` graph")
    width = output.shape[1]
    if text_CD.ndim != 2 or text_CD.shape[1] != width:
        raise DataError(f"a text matrix {list(text_CD.shape)}", f"[C, {width}], as the graph's features have")
    constant = load_openvino().opset13.constant(
        np.ascontiguousarray(text_CD, np.float32), name=TEXT_INITIALIZER
    )
    constant.output(0).set_names({TEXT_INITIALIZER})
    _replace(output, constant.output(0))
    model.validate_nodes_and_infer_types()
    _save(model, target)


def quantize_ir(
    source: Path, target: Path, calibration: Iterable[Mapping[str, np.ndarray]], images: int
) -> Quantisation:
    """Write `source` (an IR or ONNX graph) as an IR whose encoder computes in int8, and say on what it was calibrated.

    The encoder is cut out, quantised alone by NNCF and put back: what lies around it stays as it was.

    Args:
        calibration: feeds of the graph, of any batch sizes.
        images: to calibrate on, at most.

    Raises:
        DataError: no image reached NNCF.
        ArtifactError: `source` is no graph with an encoder.
        EnvironmentError_: OpenVINO or NNCF is missing, or the files cannot be written.
    """
    nncf = _load_nncf()
    model = read_graph(source)
    if find_tensor(model, PIXELS) is None or find_tensor(model, FEATURES) is None:
        raise ArtifactError(
            f"{source} has no tensors {PIXELS!r} and {FEATURES!r}", "a graph with an encoder", "export again"
        )
    before, encoder, _ = cut_graph(model)
    samples = _Samples(before, encoder, itertools.islice(_single_images(calibration), images))
    if not samples.feeds:
        raise DataError("no image to calibrate on", "at least one", "name a folder with images")
    kinds = {node.get_type_name() for node in encoder.get_ops()}
    # Its progress bars.
    with redirect_stdout(io.StringIO()):
        quantised = nncf.quantize(
            encoder,
            nncf.Dataset(range(len(samples.feeds)), samples.take),
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(samples.feeds),
            # Attention and layer norms; an attention pool behind convolutions alone makes no transformer.
            model_type=nncf.ModelType.TRANSFORMER if {"Softmax", "MVN"} <= kinds else None,
        )
    if not samples.views:
        raise DataError(f"NNCF took none of {len(samples.feeds)} images", "to calibrate on some of them")
    _put_back(model, quantised)
    _save(model, target)
    return Quantisation(len(samples.views), sum(samples.views.values()))


def read_precision_ir(path: Path) -> str:
    """Precision that an IR's graph holds: `int8` if it is quantised, else that of its weights (`fp32`, `fp16`).

    Raises:
        ArtifactError: no IR.
    """
    kinds: set[str] = set()
    try:
        for _, layer in ElementTree.iterparse(path):
            if layer.tag == "layer":
                data = layer.find("data")
                is_constant = layer.get("type") == "Const" and data is not None
                kinds.add(str(data.get("element_type")) if is_constant else str(layer.get("type")))  # type: ignore[union-attr]
                layer.clear()
    except (OSError, ElementTree.ParseError) as error:
        raise ArtifactError(
            f"cannot read {path}: {error}", "the .xml of an OpenVINO IR", "export again"
        ) from error
    if kinds & {"FakeQuantize", "i8", "u8"}:
        return "int8"
    return next((name for kind, name in _WEIGHTS.items() if kind in kinds), "fp32")


class _Samples:
    """What NNCF is fed, one image with all its views at a time, and the count of what it took.

    Attributes:
        feeds: of the graph, kept as uint8 images: views are cut anew each time that NNCF asks, which takes little
            time and spares gigabytes.
        views: for each image that was taken, its number of views.
    """

    def __init__(self, before: Any, encoder: Any, feeds: Iterable[dict[str, np.ndarray]]) -> None:
        self.feeds = list(feeds)
        self.views: dict[int, int] = {}
        # NNCF refuses others than the encoder's own inputs.
        self._names = {port.any_name for port in encoder.inputs}
        self._before = openvino_core().compile_model(before, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def take(self, index: int) -> dict[str, np.ndarray]:
        feeds = self.feeds[index]
        pixels = self._before(feeds)[PIXELS].copy()
        self.views[index] = len(pixels)
        return {name: array for name, array in {**feeds, PIXELS: pixels}.items() if name in self._names}


def _single_images(calibration: Iterable[Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    for feeds in calibration:
        for i in range(min(map(len, feeds.values()))):
            yield {name: array[i : i + 1] for name, array in feeds.items()}


def _put_back(model: Any, encoder: Any) -> None:
    """Exchange what lies between `pixels` and `features` in `model` for another encoder."""
    old = find_tensor(model, FEATURES)
    new = encoder.output(0).get_node().input_value(0)
    for port in encoder.inputs:
        _replace(port, find_tensor(model, port.any_name))
    _replace(old, new)
    old.set_names(set())
    new.set_names({FEATURES})
    model.validate_nodes_and_infer_types()


def _replace(old: Any, new: Any) -> None:
    for target in old.get_target_inputs():
        target.replace_source_output(new)


def _save(model: Any, xml: Path) -> None:
    """Write both files under another name first: the weights of `model` may be a view of the file that is replaced."""
    with explained_os_errors(xml), tempfile.TemporaryDirectory(dir=xml.parent, prefix=".openvino-") as folder:
        written = Path(folder) / xml.name
        try:
            load_openvino().save_model(model, str(written), compress_to_fp16=False)
        except RuntimeError as error:
            # OpenVINO does not say what the system said.
            raise EnvironmentError_(
                f"OpenVINO cannot write {xml}: {error}",
                "a folder that can be written, with room for the weights",
                "free some space or choose another --out",
            ) from error
        for suffix in (".bin", ".xml"):
            written.with_suffix(suffix).replace(xml.with_suffix(suffix))


def _load_nncf() -> Any:
    try:
        # Imported with it, and warns of a missing GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        with no_telemetry():
            nncf = importlib.import_module("nncf")
    except ImportError as error:
        raise EnvironmentError_(
            f"nncf cannot be imported: {error}",
            "the library nncf, which quantises",
            "pip install 'cliplet[export]'",
        ) from error
    nncf.set_log_level(logging.ERROR)
    return nncf
