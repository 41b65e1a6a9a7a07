"""INT8 for onnxruntime on CPUs: the encoder's products between QuantizeLinear and DequantizeLinear, all else float32.

What was found to be fastest and closest on a CPU with AVX-512 VNNI: activations as uint8 and weights as int8 by output
channel (with both signed, ResNets are as slow as in float32); smallest and largest value seen as the range. Products
of two activations, norms, softmax and GELU stay in float32, and so does:

- the result of MatMul and Gemm, which in transformers has few very large values;
- the first convolution of a convolutional network, which is quick and all else depends on;
- what gives `features`, if it is a convolution: 256 levels would be seen in the class activation maps.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import ModelProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from cliplet.contract import FEATURES
from cliplet.errors import ArtifactError, DataError, UsageError

from .encoder import encoder_nodes, load_graph
from .onnx_graph import LARGEST_INLINE_BYTES, save_graph
from .precision import count_precisions, note_precision, read_precision

_MATRIX_PRODUCTS = frozenset(("MatMul", "Gemm"))
# Between two quantised convolutions these compute in int8 too, which spares going to float32 and back.
_JOINS = frozenset(("Add", "AveragePool", "Concat", "MaxPool", "Relu"))


@dataclass(frozen=True)
class QuantizationReport:
    """What a quantisation did.

    Attributes:
        images: how many the calibrator was handed, counted while it was.
        precision: of the encoder, read back from the finished file.
        products: how many of the encoder's matrix products are done in each precision.
    """

    images: int
    precision: str
    products: Mapping[str, int]


def quantize_onnx(
    source: Path, target: Path, calibration: Iterable[dict[str, np.ndarray]], images: int
) -> QuantizationReport:
    """Write a float32 graph with its encoder in INT8, calibrated on the first `images` images of `calibration`.

    Args:
        calibration: feeds of the graph, `image` [B, H, W, 3] and `boxes`. They are drawn and run one after the
            other; of each, only the smallest and the largest value of every tensor is kept.

    Raises:
        UsageError: `images` is not positive.
        DataError: not one image reached the calibrator.
        ArtifactError: the graph is not in float32, or has nothing to quantise.
    """
    if images < 1:
        raise UsageError(f"calibration on {images} images", "at least one")
    if (found := read_precision(source)) != "fp32":
        raise ArtifactError(f"{source} is in {found}", "the graph in float32")
    model = load_graph(source)
    chosen = _chosen_nodes(model)
    feeds = _CountedFeeds(calibration, images)
    large = sum(len(t.raw_data) for t in model.graph.initializer) > LARGEST_INLINE_BYTES
    with tempfile.TemporaryDirectory(prefix="cliplet-int8-", dir=target.parent) as folder, _quiet():
        written = Path(folder) / "model.onnx"
        try:
            quantize_static(
                model,
                str(written),
                feeds,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=sorted(_MATRIX_PRODUCTS | _JOINS | {"Conv"}),
                nodes_to_quantize=chosen,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                use_external_data_format=large,
                # Not CalibMaxIntermediateOutputs: onnxruntime 1.31 then drops what it has seen instead of merging it.
                extra_options={
                    "MatMulConstBOnly": True,
                    "OpTypesToExcludeOutputQuantization": sorted(_MATRIX_PRODUCTS),
                },
            )
        except ValueError as error:
            if feeds.images:
                raise
            raise DataError(
                "no image reached the calibrator",
                "images like those to be labelled",
                "name a folder with images",
            ) from error
        quantized = load_graph(written)
    del quantized.graph.value_info[:]
    note_precision(quantized)
    save_graph(quantized, target)
    return QuantizationReport(feeds.images, read_precision(target), dict(count_precisions(target)))


class _CountedFeeds(CalibrationDataReader):
    """Hands out at most `limit` images and counts them."""

    def __init__(self, feeds: Iterable[dict[str, np.ndarray]], limit: int) -> None:
        self._feeds = iter(feeds)
        self._limit = limit
        self.images = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        left = self._limit - self.images
        feed = next(self._feeds, None) if left else None
        if feed is None:
            return None
        feed = {name: array[:left] for name, array in feed.items()}
        self.images += len(feed["image"])
        return feed


def _chosen_nodes(model: ModelProto) -> list[str]:
    """Names of the nodes to quantise; those that have none are given one."""
    constants = {t.name for t in model.graph.initializer}
    nodes = [n for n, inside in zip(model.graph.node, encoder_nodes(model.graph), strict=True) if inside]
    convolutions = [n for n in nodes if n.op_type == "Conv" and FEATURES not in n.output]
    # A ViT has one, which cuts its patches; a convolutional network has many.
    quantized_ids = {id(n) for n in (convolutions[1:] or convolutions)}
    for i, node in enumerate(nodes):
        # Nodes are chosen by name.
        node.name = node.name or f"encoder_{i}"
    chosen: list[str] = []
    int8_tensors: set[str] = set()
    for node in nodes:
        if node.op_type == "Conv":
            take = id(node) in quantized_ids
        elif node.op_type in _MATRIX_PRODUCTS:
            take = node.input[1] in constants
        else:
            joins = node.op_type in _JOINS and FEATURES not in node.output
            take = joins and int8_tensors.issuperset(node.input)
        if take:
            chosen.append(node.name)
            if node.op_type not in _MATRIX_PRODUCTS:
                int8_tensors.update(node.output)
    if not chosen:
        raise ArtifactError("the encoder has no product with constant weights", "one that can be quantised")
    return chosen


@contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice on graphs that are thrown away, for as long as the context lasts."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    onnxruntime.set_default_logger_severity(3)
    try:
        yield
    finally:
        root.setLevel(before)
        onnxruntime.set_default_logger_severity(2)
