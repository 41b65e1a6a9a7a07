"""Tensors are read from the files of engines as the runtimes themselves read them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from served import make_teacher

from cliplet.deploy.engine_tensors import EngineTensor, engine_tensors
from cliplet.errors import ArtifactError

TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(int64)": "int64"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("bundles") / "teacher")


@pytest.mark.parametrize("name", ["model.onnx", "text.onnx"])
def test_an_onnx_graph_as_onnxruntime_sees_it(teacher: Path, name: str) -> None:
    session = onnxruntime.InferenceSession(str(teacher / name))
    wanted = {
        t.name: EngineTensor(TYPES[t.type], tuple(s if isinstance(s, int) else -1 for s in t.shape))
        for t in (*session.get_inputs(), *session.get_outputs())
    }
    assert engine_tensors(teacher / name) == wanted


def test_an_ir_as_its_graph(teacher: Path, tmp_path: Path) -> None:
    from cliplet.export.openvino_ir import write_ir

    write_ir(teacher / "model.onnx", tmp_path / "model.xml")
    assert engine_tensors(tmp_path / "model.xml") == engine_tensors(teacher / "model.onnx")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.onnx", b""),
        ("model.onnx", b"\x3a\xff\x01cut short"),
        ("model.onnx", b"\xff" * 40),
        ("model.onnx", b"\x08\x0a"),
        ("model.xml", b"<net><layers>"),
        ("model.xml", b"<net/>"),
        ("lost.onnx", None),
    ],
)
def test_what_is_no_engine(tmp_path: Path, name: str, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ArtifactError):
        engine_tensors(tmp_path / name)


def test_a_graph_that_was_cut_off_is_no_graph(teacher: Path, tmp_path: Path) -> None:
    whole = (teacher / "model.onnx").read_bytes()
    for part in range(1, 10):
        (tmp_path / "model.onnx").write_bytes(whole[: len(whole) * part // 10])
        with pytest.raises(ArtifactError):
            engine_tensors(tmp_path / "model.onnx")
