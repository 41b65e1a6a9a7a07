"""The doctor reports what it tried, names what is broken, and never raises."""

from __future__ import annotations

import importlib.metadata
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cliplet import doctor
from cliplet.doctor import Finding, as_json, can_label, examine, one_node_model, report

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return examine()


def only(findings: list[Finding], group: str, name: str) -> Finding:
    (found,) = [f for f in findings if (f.group, f.name) == (group, name)]
    return found


def test_this_machine_can_label(findings: list[Finding]) -> None:
    assert only(findings, "onnxruntime", "CPUExecutionProvider").status == "ok"
    assert only(findings, "decoders", "simplejpeg").status == "ok"
    assert "JPEG" in only(findings, "decoders", "Pillow").detail
    assert can_label(findings)


def test_every_group_has_a_finding(findings: list[Finding]) -> None:
    groups = "machine libraries decoders onnxruntime openvino torch tensorrt triton models browser"
    assert {f.group for f in findings} == set(groups.split())


def test_what_is_not_ok_says_how_to_mend_it(findings: list[Finding]) -> None:
    assert [f for f in findings if f.status in ("missing", "broken") and not f.fix] == []


def test_the_model_written_by_hand_is_what_onnx_reads() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(one_node_model())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Relu"]


def test_the_model_written_by_hand_runs() -> None:
    session = onnxruntime.InferenceSession(one_node_model(), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"x": np.array([-3, 5], np.float32)})
    assert answer.tolist() == [0, 5]


def test_a_provider_that_is_listed_but_not_created_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = "CUDAExecutionProvider"
    if pretended in onnxruntime.get_available_providers():
        pytest.skip("this machine may really have the provider that the test pretends")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [pretended, "CPUExecutionProvider"])
    findings = examine()
    cuda = only(findings, "onnxruntime", pretended)
    assert cuda.status == "broken"
    assert "runs on CPUExecutionProvider" in cuda.detail and "not in available" in cuda.detail
    assert can_label(findings)


@pytest.mark.parametrize(
    ("stands_for", "expected"),
    [("os.abort()", "killed by signal 6"), ("raise ValueError('no such device')", "no such device")],
)
def test_a_provider_that_aborts_or_raises_is_broken(
    stands_for: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = f"import os\ndef get_available_providers(): return ['Fake']\ndef InferenceSession(*a, **k): {stands_for}\n"
    (tmp_path / "onnxruntime.py").write_text(fake)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["FakeExecutionProvider"])
    findings = examine()
    provider = only(findings, "onnxruntime", "FakeExecutionProvider")
    assert provider.status == "broken" and expected in provider.detail
    assert not can_label(findings)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    true_version = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnx":
            raise importlib.metadata.PackageNotFoundError(name)
        return true_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = only(examine(), "libraries", "onnx")
    assert (found.status, found.fix) == ("missing", "pip install 'cliplet[export]'")


def test_without_onnxruntime_nothing_can_be_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    findings = examine()
    found = only(findings, "onnxruntime", "onnxruntime")
    assert (found.status, found.fix) == ("missing", "pip install 'cliplet[edge]'")
    assert not can_label(findings)


def test_a_decoder_that_raises_or_lies_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: np.zeros((8, 8, 3), np.uint8))
    assert only(examine(), "decoders", "simplejpeg").status == "broken"

    def fails(*_: object) -> None:
        raise RuntimeError("libturbojpeg went away")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fails)
    findings = examine()
    assert "libturbojpeg went away" in only(findings, "decoders", "simplejpeg").detail
    assert can_label(findings), "Pillow decodes in its place"


def test_a_check_that_fails_becomes_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> None:
        raise RuntimeError("no metadata")

    monkeypatch.setattr(importlib.metadata, "requires", fails)
    found = only(examine(), "libraries", "check")
    assert (found.status, found.detail) == ("broken", "RuntimeError: no metadata")


@pytest.mark.parametrize(
    ("answer", "status", "detail"),
    [
        ("echo 'NVIDIA L4, 23034 MiB, 8.9, 580.1'", "ok", "NVIDIA L4, 23034 MiB, sm_89, driver 580.1"),
        ("echo 'NVML: driver mismatch' >&2; exit 9", "broken", "NVML: driver mismatch"),
    ],
)
def test_gpu(answer: str, status: str, detail: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (gpu,) = [f for f in examine() if f.group == "machine" and f.name.startswith("GPU")]
    assert (gpu.status, gpu.detail) == (status, detail)


@pytest.mark.parametrize(("torn", "status"), [(0, "ok"), (3, "broken")])
def test_embedded_model(torn: int, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = tmp_path / "assets" / "tiny" / "open_clip_model.safetensors"
    weights.parent.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(9)
    weights.write_bytes(whole[: len(whole) - torn])
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    assert only(examine(), "models", "tiny").status == status


def test_json_round_trip(findings: list[Finding]) -> None:
    assert [Finding(**row) for row in json.loads(as_json(findings))] == findings


def test_the_table_shows_every_finding() -> None:
    findings = [
        Finding("machine", "cores", "ok", "2 usable"),
        Finding("libraries", "[red]odd[/red]", "missing", "(edge)", "pip install 'cliplet[edge]'"),
    ]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report(findings))
    text = console.export_text()
    assert "2 usable" in text and "[red]odd[/red]" in text and "pip install 'cliplet[edge]'" in text


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from cliplet.doctor import examine; examine(); "
        "assert 'torch' not in sys.modules and 'openvino' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
