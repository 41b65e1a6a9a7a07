"""onnxruntime runs where it was asked to, or says why not."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from cliplet.contract import SNIPPETS, GraphContract, TensorSpec
from cliplet.errors import ArtifactError, EnvironmentError_
from cliplet.runners import open_runner
from cliplet.runners.onnx_runner import OnnxRunner

HALVING = GraphContract(
    "halving", (TensorSpec("x", "float32", ("N", 4)),), (TensorSpec("y", "float32", ("N", 4)),)
)


@pytest.fixture(params=["inside", "beside"])
def halving(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A graph y = x W / 2, whose weights lie inside of its file or beside it."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> g (float[N,4] x) => (float[N,4] y)
        <float[1] half = {0.5}> { features = MatMul(x, W) y = Mul(features, half) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.diag(np.arange(4, dtype=np.float32)), "W"))
    beside = request.param == "beside"
    onnx.save(
        model, tmp_path / "model.onnx", save_as_external_data=beside, location="model.data", size_threshold=0
    )
    return tmp_path / "model.onnx"


def test_inner_tensors_are_seen(halving: Path) -> None:
    x = np.ones((3, 4), np.float32)
    with OnnxRunner(halving, HALVING, observe=("features",)) as runner:
        outputs = runner.infer({"x": x})
    assert list(outputs) == ["y", "features"]
    np.testing.assert_array_equal(outputs["features"], [[0, 1, 2, 3]] * 3)
    np.testing.assert_array_equal(outputs["y"], outputs["features"] / 2)
    with OnnxRunner(halving, HALVING) as runner:
        assert list(runner.infer({"x": x})) == ["y"]


def test_what_cannot_be_observed(halving: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match=r"no inner tensors \['pixels'\]"):
        OnnxRunner(halving, HALVING, observe=("features", "pixels"))
    halving.write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="cannot load"):
        OnnxRunner(halving, HALVING, observe=("features",))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EnvironmentError_, match=r"the package onnx[\s\S]*cliplet\[export\]"):
        OnnxRunner(halving, HALVING, observe=("features",))


def test_precision_is_what_export_noted_in_the_file(halving: Path) -> None:
    with OnnxRunner(halving, HALVING) as runner:
        assert runner.precision == "fp32"
    note(halving, "fp32+int8")
    with OnnxRunner(halving, HALVING, observe=("features",)) as runner:
        assert runner.precision == "fp32+int8"


@pytest.mark.parametrize(
    "noted, machine, precision",
    [
        ("fp16", "x86_64", "fp16/fp32"),
        ("fp16", "AMD64", "fp16/fp32"),
        ("fp16", "aarch64", "fp16"),
        ("fp16+fp32", "x86_64", "fp16+fp32/fp32"),
        ("fp16+int8", "x86_64", "fp16+int8/fp32+int8"),
        ("bf16", "x86_64", "bf16"),
    ],
)
def test_fp16_that_is_multiplied_in_float32(
    noted: str, machine: str, precision: str, halving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note(halving, noted)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with OnnxRunner(halving, HALVING) as runner:
        assert runner.precision == precision


def test_on_a_gpu_fp16_is_fp16(halving: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note(halving, "fp16")
    cpu = onnxruntime.InferenceSession(str(halving), providers=["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: OnGpu(cpu))
    with OnnxRunner(halving, HALVING, "cuda", precision="fp16") as runner:
        assert runner.precision == "fp16"


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="only known of x86")
def test_onnxruntime_itself_casts_fp16_to_float32(tmp_path: Path) -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> g (float16[N,3,4,4] x) => (float16[N,2] y)
        { c = Conv(x, K) f = Flatten(c) m = MatMul(f, W) y = Gemm(m, V) }"""
    )
    for name, shape in (("K", (2, 3, 4, 4)), ("W", (2, 2)), ("V", (2, 2))):
        # Equal constants would be shared, and then be cast at every run.
        values = np.full(shape, ord(name), np.float16)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    run = onnx.load(tmp_path / "run.onnx").graph
    assert sum(node.op_type in ("Conv", "MatMul", "Gemm") for node in run.node) == 3
    assert {tensor.data_type for tensor in run.initializer} == {onnx.TensorProto.FLOAT}
    casts = [(*node.input, *node.output) for node in run.node if node.op_type == "Cast"]
    assert len(casts) == 2 and casts[0][0] == "x" and casts[1][-1] == "y"


@pytest.mark.parametrize(
    "noted, asked, fits",
    [
        (None, "fp32", True),
        (None, "fp16", False),
        ("fp16", "fp16", True),
        ("fp16", "fp32", False),
        ("fp32+int8", "int8", True),
        ("fp32+int8", "fp32", False),
        ("fp32+int8", "fp16", False),
    ],
)
def test_a_graph_in_another_precision_than_asked(
    noted: str | None, asked: str, fits: bool, halving: Path
) -> None:
    if noted is not None:
        note(halving, noted)
    if fits:
        open_runner("onnx", halving, HALVING, precision=asked).__exit__(None, None, None)
        return
    with pytest.raises(ArtifactError, match=f"asked for {asked}, but .* is in") as caught:
        open_runner("onnx", halving, HALVING, precision=asked)
    assert (noted or "fp32") in caught.value.happened


class OnGpu:
    """A session that says it runs on a GPU."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def note(graph: Path, precision: str) -> None:
    """Write into a graph what export would have found."""
    model = onnx.load(graph, load_external_data=False)
    model.metadata_props.add(key="cliplet.precision", value=precision)
    onnx.save(model, graph)


def test_a_device_without_its_provider_is_refused(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EnvironmentError_, match="asked for device 'cuda'"):
        OnnxRunner(tmp_path / "model.onnx", SNIPPETS, "cuda")


def test_a_session_that_fell_back_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class FellBack:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: FellBack())
    with pytest.raises(EnvironmentError_, match="the session runs on CPUExecutionProvider"):
        OnnxRunner(tmp_path / "model.onnx", SNIPPETS, "cuda")


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="cannot load"):
        OnnxRunner(tmp_path / "model.onnx", SNIPPETS)
    with pytest.raises(ArtifactError, match="cannot load"):
        OnnxRunner(tmp_path / "missing.onnx", SNIPPETS)
