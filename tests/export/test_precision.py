"""Low precision in a graph: what becomes low, what stays, and that both are read back from types."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser, shape_inference
from traced import pictures_on_canvas, traced

from cliplet.contract import FEATURES, SNIPPETS
from cliplet.errors import ArtifactError, UsageError
from cliplet.export.precision import count_precisions, lower_precision, read_precision
from cliplet.runners.onnx_runner import OnnxRunner

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
ALL = ("vit", "resnet", "convnext", "tiny")
HEADER = '<ir_version: 10, opset_import: ["" : 18]> g (float[N,8] x) => (float[N,8] y)'


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {
        t.name: t.data_type for t in graph.initializer
    }


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """A graph of one matrix product W [8, 8] and what a test writes around it, as a file."""

    def write(body: str, **constants: np.ndarray) -> Path:
        model = parser.parse_model(f"{HEADER} {{ {body} }}")
        weights = {"W": np.eye(8, dtype=np.float32), **constants}
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
        onnx.save(model, tmp_path / "source.onnx")
        return tmp_path / "source.onnx"

    return write


def lowered(source: Path, precision: str = "fp16") -> onnx.ModelProto:
    lower_precision(source, source.parent / "target.onnx", precision)
    return onnx.load(source.parent / "target.onnx")


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("architecture", ALL)
def test_only_the_encoder_becomes_low(architecture: str, precision: str, tmp_path: Path) -> None:
    source, _ = traced(architecture)
    target = tmp_path / "low.onnx"
    lower_precision(source, target, precision)
    model, before = onnx.load(target), onnx.load(source)
    onnx.checker.check_model(model, full_check=True)
    types = types_of(model)
    made_by = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in made_by:
            assert made_by[node.input[0]].op_type != "Cast", f"{node.name} casts what was cast"
        if node.op_type in ("LayerNormalization", "Softmax", "ReduceMean", "ReduceL2", "Erf"):
            assert types[node.output[0]] == TensorProto.FLOAT, node.name
    low = {name for name, kind in types.items() if kind == LOW[precision]}
    untouched = {n.output[0]: n for n in before.graph.node if not low.intersection(n.output)}
    scan = next(n for n in model.graph.node if n.op_type == "Scan")
    assert scan.input == untouched[scan.output[0]].input
    assert types[FEATURES] == types["text"] == types["pixels"] == TensorProto.FLOAT
    assert (model.graph.input, model.graph.output) == (before.graph.input, before.graph.output)
    assert read_precision(source) == "fp32"
    assert read_precision(target) == precision
    assert count_precisions(target)[precision] == count_precisions(source)["fp32"]


@pytest.mark.parametrize("architecture", ALL)
def test_fp16_scores_are_those_of_float32(architecture: str, tmp_path: Path) -> None:
    source, preprocessing = traced(architecture)
    target = tmp_path / "low.onnx"
    lower_precision(source, target, "fp16")
    feeds = pictures_on_canvas(preprocessing, 3)
    with (
        OnnxRunner(source, SNIPPETS, observe=(FEATURES,)) as whole,
        OnnxRunner(target, SNIPPETS, observe=(FEATURES,)) as half,
    ):
        wanted, found = whole.infer(feeds), half.infer(feeds)
        assert half.precision == "fp16/fp32"
    largest = np.abs(wanted[FEATURES]).max()
    assert 0 < np.abs(wanted[FEATURES] - found[FEATURES]).max() < 0.005 * largest
    np.testing.assert_allclose(found["view_probs"], wanted["view_probs"], atol=0.01)


def test_weights_take_half_the_room(tmp_path: Path) -> None:
    def bytes_of(path: Path) -> int:
        return sum(len(t.raw_data) for t in onnx.load(path).graph.initializer)

    source, _ = traced("resnet")
    lower_precision(source, tmp_path / "low.onnx", "bf16")
    assert bytes_of(tmp_path / "low.onnx") < 0.52 * bytes_of(source)


@pytest.mark.parametrize(
    ("constant", "fits"),
    [
        (np.float32(70_000), False),
        (np.float32(1e-12), False),
        (np.full(8, 1e-9, np.float32), False),
        (np.float32(-np.inf), True),
        (np.float32(60_000), True),
        (np.zeros(8, np.float32), True),
        (np.array([1, 1e-12] * 4, np.float32), True),
    ],
    ids=["overflow", "underflow", "all underflow", "infinite", "large", "zeros", "some underflow"],
)
def test_a_constant_that_fp16_cannot_hold(
    constant: np.ndarray, fits: bool, written: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    source = written(
        "pixels = Identity(x) a = MatMul(pixels, W) b = Where(M, a, c) features = MatMul(b, W) y = Relu(features)",
        c=np.asarray(constant),
        M=np.ones(8, bool),
    )
    with caplog.at_level(logging.WARNING):
        types = types_of(lowered(source))
    assert types["b"] == (TensorProto.FLOAT16 if fits else TensorProto.FLOAT)
    assert caplog.messages == ([] if fits else ["c stays in float32: fp16 does not hold its values"])
    assert count_precisions(source.parent / "target.onnx") == {"fp16": 2}


def test_bfloat16_holds_what_float32_does(written: Callable[..., Path]) -> None:
    body = (
        "pixels = Identity(x) a = MatMul(pixels, W) b = Add(a, c) features = MatMul(b, W) y = Relu(features)"
    )
    types = types_of(lowered(written(body, c=np.full(8, 1e30, np.float32)), "bf16"))
    assert types["b"] == TensorProto.BFLOAT16


def test_a_gelu_is_computed_in_float32_as_a_whole(written: Callable[..., Path]) -> None:
    source = written(
        "pixels = Identity(x) a = MatMul(pixels, W) s = Div(a, r) e = Erf(s) o = Add(e, one) h = Mul(half, o)"
        "gelu = Mul(a, h) t = Relu(gelu) features = MatMul(t, W) y = Relu(features)",
        r=np.float32(2**0.5),
        one=np.float32(1),
        half=np.float32(0.5),
    )
    types = types_of(lowered(source))
    assert {name: types[name] for name in ("a", "t")} == dict.fromkeys("at", TensorProto.FLOAT16)
    assert {types[name] for name in ("s", "e", "o", "h", "gelu")} == {TensorProto.FLOAT}


def test_what_is_shared_with_the_rest_stays_for_it(written: Callable[..., Path]) -> None:
    source = written(
        "pixels = MatMul(x, W) a = MatMul(pixels, W) features = Relu(a) b = Add(features, a) y = MatMul(b, W)"
    )
    model = lowered(source)
    types = types_of(model)
    assert types["W"] == types["b"] == types["y"] == types["pixels"] == TensorProto.FLOAT
    assert types["a"] == TensorProto.FLOAT16
    (product,) = [n for n in model.graph.node if n.output[0] == "a"]
    assert types[product.input[1]] == TensorProto.FLOAT16


def test_constants_that_are_nodes(written: Callable[..., Path]) -> None:
    source = written(
        "pixels = Identity(x) c = Constant <value = float[1] {0.5}> () k = Constant <value = float[1] {2.0}> ()"
        "a = MatMul(pixels, W) features = Mul(a, c) y = Mul(features, k)"
    )
    model = lowered(source)
    assert types_of(model)["c_fp16"] == TensorProto.FLOAT16
    outputs = onnx.reference.ReferenceEvaluator(model).run(None, {"x": np.ones((2, 8), np.float32)})
    np.testing.assert_array_equal(outputs[0], np.ones((2, 8), np.float32))


def test_what_is_mixed_is_read_as_mixed(written: Callable[..., Path]) -> None:
    source = written(
        "pixels = Identity(x) a = MatMul(pixels, W) h = Cast <to = 10> (a) b = MatMul(h, V)"
        "features = Cast <to = 1> (b) y = Relu(features)",
        V=np.eye(8, dtype=np.float16),
    )
    assert read_precision(source) == "fp16+fp32"
    with pytest.raises(ArtifactError, match="low precision already"):
        lower_precision(source, source.parent / "target.onnx", "bf16")


def test_int8_weights_alone_do_not_make_a_product_int8(written: Callable[..., Path]) -> None:
    constants = {"Q": np.eye(8, dtype=np.int8), "s": np.float32(0.1), "z": np.uint8(0)}
    weights = "pixels = Identity(x) w = DequantizeLinear(Q, s)"
    after = "features = Relu(a) y = Relu(features)"
    assert read_precision(written(f"{weights} a = MatMul(pixels, w) {after}", **constants)) == "fp32"
    both = "q = QuantizeLinear(pixels, s, z) d = DequantizeLinear(q, s, z) a = MatMul(d, w)"
    assert read_precision(written(f"{weights} {both} {after}", **constants)) == "int8"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a = MatMul(x, W) y = Relu(a)", "nothing lies between"),
        ("pixels = Identity(x) features = Relu(pixels) y = Relu(features)", "no matrix product"),
        ("pixels = Identity(x) a = MatMul(pixels, W) features = other.Op(a) y = Relu(features)", "other"),
        (
            "pixels = Identity(x) a = MatMul(pixels, W) features = Add(a, W) b = Cast <to = 11> (features)"
            "y = Add(b, x)",
            "contradict",
        ),
    ],
)
def test_a_graph_that_cannot_be_lowered(body: str, message: str, written: Callable[..., Path]) -> None:
    source = written(body)
    with pytest.raises(ArtifactError, match=message):
        lower_precision(source, source.parent / "target.onnx", "fp16")
    assert not (source.parent / "target.onnx").exists()


def test_what_is_no_graph_or_no_precision(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="cannot read"):
        read_precision(tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="'int4'"):
        lower_precision(tmp_path / "model.onnx", tmp_path / "target.onnx", "int4")
