"""INT8 for onnxruntime: what is quantised, what it costs in agreement, and how many images were really seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser
from traced import pictures_on_canvas, traced

from cliplet.contract import FEATURES, SNIPPETS
from cliplet.errors import ArtifactError, DataError, UsageError
from cliplet.export.precision import lower_precision
from cliplet.export.quantize import quantize_onnx
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.views import Preprocessing


class Drawn:
    """Batches of 4 pictures that count how many of them were drawn."""

    def __init__(self, preprocessing: Preprocessing, batches: int) -> None:
        self.preprocessing = preprocessing
        self.batches = batches
        self.count = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for i in range(self.batches):
            self.count += 1
            yield pictures_on_canvas(self.preprocessing, 4, seed=4 * i)


@pytest.mark.parametrize(
    ("architecture", "floats"),
    # Two products of activations in each attention block; the first convolution of a network of convolutions.
    [("vit", 2), ("resnet", 3), ("convnext", 1), ("tiny", 1)],
)
def test_the_encoder_computes_in_int8_and_agrees(architecture: str, floats: int, tmp_path: Path) -> None:
    source, preprocessing = traced(architecture)
    report = quantize_onnx(source, tmp_path / "int8.onnx", Drawn(preprocessing, 4), 16)
    assert (report.images, report.precision) == (16, "fp32+int8")
    assert report.products["fp32"] == floats
    assert (tmp_path / "int8.onnx").stat().st_size < source.stat().st_size
    feeds = pictures_on_canvas(preprocessing, 4, seed=100)
    with (
        OnnxRunner(source, SNIPPETS, observe=(FEATURES,)) as whole,
        OnnxRunner(tmp_path / "int8.onnx", SNIPPETS, observe=(FEATURES,)) as quantized,
    ):
        wanted, found = whole.infer(feeds), quantized.infer(feeds)
        assert quantized.precision == "fp32+int8"
    cosines = np.sum(wanted[FEATURES] * found[FEATURES], 1) / (
        np.linalg.norm(wanted[FEATURES], axis=1) * np.linalg.norm(found[FEATURES], axis=1)
    )
    assert 0.98 < cosines.min() < 1
    # What onnxruntime makes of the pairs of nodes, told by itself.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    fused = sum(kinds.count(k) for k in ("QLinearConv", "MatMulIntegerToFloat", "QGemm"))
    assert fused == report.products["int8"]


@pytest.mark.parametrize(
    ("end", "products"),
    [
        ("features = Conv(d, W3)", {"fp32": 2, "int8": 1}),
        ("e = Conv(d, W3) features = AveragePool <kernel_shape = [3, 3]> (e)", {"fp32": 1, "int8": 2}),
    ],
)
def test_features_are_not_rounded_to_256_levels(end: str, products: dict[str, int], tmp_path: Path) -> None:
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 18]> g (float[N,4,9,9] image) => (float[N,4,S,S] cam)
        {{ pixels = Identity(image) a = Conv(pixels, W1) b = Relu(a) c = Conv(b, W2) d = Relu(c)
          {end} cam = Identity(features) }}"""
    )
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(4, 4, 1, 1)).astype(np.float32) for name in ("W1", "W2", "W3")}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    onnx.save(model, tmp_path / "model.onnx")
    feed = {"image": rng.normal(size=(3, 4, 9, 9)).astype(np.float32)}
    report = quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", [feed], 3)
    assert report.products == products
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    (cam,) = session.run(None, feed)
    assert len(np.unique(cam[cam != 0])) > 256


def test_what_lies_outside_of_the_encoder_is_as_it_was(tmp_path: Path) -> None:
    source, preprocessing = traced("tiny")
    quantize_onnx(source, tmp_path / "int8.onnx", Drawn(preprocessing, 1), 4)
    before, after = onnx.load(source).graph, onnx.load(tmp_path / "int8.onnx").graph
    assert (after.input, after.output) == (before.input, before.output)
    text, was = (next(t for t in graph.initializer if t.name == "text") for graph in (after, before))
    np.testing.assert_array_equal(numpy_helper.to_array(text), numpy_helper.to_array(was))
    outer = [n for n in before.node if n.op_type in ("Scan", "MatMul", "Softmax", "ReduceL2")]
    assert len(outer) == 4
    for node in outer:
        (same,) = [n for n in after.node if n.output == node.output]
        assert same.input == node.input


def test_metadata_is_kept(tmp_path: Path) -> None:
    source, preprocessing = traced("tiny")
    model = onnx.load(source)
    model.metadata_props.add(key="cliplet.classes", value='["cat"]')
    onnx.save(model, tmp_path / "model.onnx")
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", Drawn(preprocessing, 1), 4)
    found = {p.key: p.value for p in onnx.load(tmp_path / "int8.onnx").metadata_props}
    assert found["cliplet.classes"] == '["cat"]'
    assert found["cliplet.precision"] == "fp32+int8"


@pytest.mark.parametrize(
    ("asked", "batches", "reached", "drawn"), [(6, 9, 6, 2), (8, 9, 8, 2), (99, 2, 8, 2)]
)
def test_images_are_counted_where_they_are_handed_out(
    asked: int, batches: int, reached: int, drawn: int, tmp_path: Path
) -> None:
    source, preprocessing = traced("tiny")
    feeds = Drawn(preprocessing, batches)
    assert quantize_onnx(source, tmp_path / "int8.onnx", feeds, asked).images == reached
    assert feeds.count == drawn


def test_more_images_widen_the_ranges(tmp_path: Path) -> None:
    source, preprocessing = traced("tiny")

    def ranges(batches: int) -> np.ndarray:
        quantize_onnx(source, tmp_path / "int8.onnx", Drawn(preprocessing, batches), 999)
        constants = onnx.load(tmp_path / "int8.onnx").graph.initializer
        scales = {t.name: numpy_helper.to_array(t) for t in constants if t.name.endswith("_scale")}
        return np.array([scales[name] for name in sorted(scales) if scales[name].ndim == 0])

    few, many = ranges(1), ranges(6)
    assert np.all(many >= few * 0.999) and np.any(many > few * 1.01)


def test_no_image_is_an_error(tmp_path: Path) -> None:
    source, preprocessing = traced("tiny")
    with pytest.raises(DataError, match="no image reached the calibrator"):
        quantize_onnx(source, tmp_path / "int8.onnx", iter(()), 16)
    with pytest.raises(UsageError, match="0 images"):
        quantize_onnx(source, tmp_path / "int8.onnx", Drawn(preprocessing, 1), 0)
    assert not list(tmp_path.iterdir())


def test_a_graph_in_low_precision_is_refused(tmp_path: Path) -> None:
    source, preprocessing = traced("tiny")
    lower_precision(source, tmp_path / "fp16.onnx", "fp16")
    with pytest.raises(ArtifactError, match="is in fp16"):
        quantize_onnx(tmp_path / "fp16.onnx", tmp_path / "int8.onnx", Drawn(preprocessing, 1), 4)
