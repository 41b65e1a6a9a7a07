"""onnxruntime runs where it was asked to, or says why not."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from cliplet.contract import SNIPPETS
from cliplet.errors import ArtifactError, EnvironmentError_
from cliplet.runners.onnx_runner import OnnxRunner


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
