"""IRs hold the graph as it was, in float32 or quantised on images that were counted, with any vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import picture
from onnx import TensorProto, helper
from traced import write_graph

from cliplet.contract import FEATURES, PIXELS, SNIPPETS
from cliplet.errors import ArtifactError, DataError, EnvironmentError_
from cliplet.export.openvino_ir import Quantisation, quantize_ir, read_precision_ir, set_text, write_ir
from cliplet.model_spec import parse_model_spec
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.runners.openvino_runner import OpenVinoRunner
from cliplet.snippets import Snippets
from cliplet.teacher import load_teacher
from cliplet.views import Aggregation, Views, place_on_canvas
from cliplet.vocabulary import read_vocabulary

INNER = (PIXELS, FEATURES)


@pytest.fixture(scope="module")
def module(toy_clip: Path) -> Snippets:
    teacher = load_teacher(parse_model_spec(f"open_clip:local-dir:{toy_clip}"))
    return teacher.snippets(read_vocabulary("cat,dog,bird"), Aggregation())


@pytest.fixture(scope="module")
def onnx_file(module: Snippets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_graph(module, file)
    return file


@pytest.fixture(scope="module")
def ir(onnx_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ir") / "model.xml"
    write_ir(onnx_file, file)
    return file


def feeds(module: Snippets, seed: int = 0, images: int = 2) -> dict[str, np.ndarray]:
    pictures = [picture(90 + 20 * i, 60, seed + i) for i in range(images)]
    return place_on_canvas(pictures, Views.parse("1+2x2"), module.preprocessing)


def calibration(module: Snippets, batches: int = 4) -> Iterator[dict[str, np.ndarray]]:
    return (feeds(module, 10 * i, images=3) for i in range(batches))


@pytest.fixture(scope="module")
def int8(module: Snippets, ir: Path) -> tuple[Path, Quantisation]:
    file = ir.with_name("model.int8.xml")
    return file, quantize_ir(ir, file, calibration(module), images=8)


def run(file: Path, given: dict[str, np.ndarray], precision: str = "fp32") -> dict[str, np.ndarray]:
    with OpenVinoRunner(file, SNIPPETS, precision, threads=1, observe=INNER) as runner:
        return runner.infer(given)


def test_the_ir_gives_the_scores_of_its_onnx_graph(module: Snippets, onnx_file: Path, ir: Path) -> None:
    with OnnxRunner(onnx_file, SNIPPETS, threads=1) as runner:
        wanted = runner.infer(feeds(module))
    found = run(ir, feeds(module))
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)
    assert read_precision_ir(ir) == "fp32"
    assert sorted(p.name for p in ir.parent.iterdir() if "int8" not in p.name) == ["model.bin", "model.xml"]


def test_weights_are_not_compressed(module: Snippets, ir: Path) -> None:
    weights = sum(p.numel() for p in module.encoder.parameters())
    # A few are folded into others.
    assert ir.with_suffix(".bin").stat().st_size > 0.9 * 4 * weights


def test_int8_is_in_the_encoder_alone(module: Snippets, ir: Path, int8: tuple[Path, Quantisation]) -> None:
    file, report = int8
    assert report == Quantisation(images=8, views=40)
    assert read_precision_ir(file) == "int8"
    given = feeds(module, seed=50)
    exact, found = run(ir, given), run(file, given, "int8")
    np.testing.assert_array_equal(found[PIXELS], exact[PIXELS])
    cosines_N = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(found[FEATURES], exact[FEATURES], strict=True)
    ]
    assert 0.9 < min(cosines_N) < 1 - 1e-6
    with torch.inference_mode():
        unit_BVD = module.unit(torch.from_numpy(found[FEATURES]), torch.from_numpy(given["boxes"]))
        view_probs_BVC, _ = module.score(unit_BVD, module.text)
    np.testing.assert_allclose(found["view_probs"], view_probs_BVC.numpy(), atol=1e-5)


def test_a_quantised_graph_is_no_other_precision(int8: tuple[Path, Quantisation]) -> None:
    with pytest.raises(ArtifactError, match="computes in int8"):
        OpenVinoRunner(int8[0], SNIPPETS, "fp32", threads=1)


def test_nncf_is_quiet_and_counted_even_with_few_images(
    module: Snippets, onnx_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = quantize_ir(onnx_file, tmp_path / "few.xml", calibration(module, batches=1), images=100)
    assert report == Quantisation(images=3, views=15)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("batches", "images"), [(0, 10), (2, 0)])
def test_no_image_is_an_error(module: Snippets, ir: Path, tmp_path: Path, batches: int, images: int) -> None:
    with pytest.raises(DataError, match="no image to calibrate on"):
        quantize_ir(ir, tmp_path / "none.xml", calibration(module, batches), images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("classes", [1, 3, 7])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_another_vocabulary(
    module: Snippets,
    onnx_file: Path,
    ir: Path,
    int8: tuple[Path, Quantisation],
    tmp_path: Path,
    classes: int,
    precision: str,
) -> None:
    rows_CD = np.random.default_rng(classes).normal(size=(classes, 32)).astype(np.float32)
    rows_CD /= np.linalg.norm(rows_CD, axis=1, keepdims=True)
    set_text(ir if precision == "fp32" else int8[0], tmp_path / "other.xml", rows_CD)
    found = run(tmp_path / "other.xml", feeds(module), precision)
    assert found["scores"].shape == (2, classes)
    with torch.inference_mode():
        boxes = torch.from_numpy(feeds(module)["boxes"])
        unit_BVD = module.unit(torch.from_numpy(found[FEATURES]), boxes)
        _, scores_BC = module.score(unit_BVD, torch.from_numpy(rows_CD))
    np.testing.assert_allclose(found["scores"], scores_BC.numpy(), atol=1e-5)
    assert read_precision_ir(tmp_path / "other.xml") == precision


def test_the_vocabulary_of_a_file_in_place_and_back(
    module: Snippets, onnx_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.xml"
    write_ir(onnx_file, file)
    before = run(file, feeds(module))
    set_text(file, file, -module.text.numpy()[:2])
    assert run(file, feeds(module))["scores"].shape == (2, 2)
    set_text(file, file, module.text.numpy())
    np.testing.assert_array_equal(run(file, feeds(module))["scores"], before["scores"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.xml"]


@pytest.mark.parametrize("shape", [(3, 31), (32,)])
def test_rows_of_another_length_are_refused(ir: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="text matrix"):
        set_text(ir, tmp_path / "other.xml", np.ones(shape, np.float32))


def test_a_graph_without_encoder_or_text(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("image", "scores")]
    made = helper.make_graph([helper.make_node("Relu", ["image"], ["scores"])], "toy", values[:1], values[1:])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)]), file)
    with pytest.raises(ArtifactError, match="has no tensors"):
        quantize_ir(file, tmp_path / "int8.xml", [], 1)
    with pytest.raises(ArtifactError, match="no constant 'text'"):
        set_text(file, tmp_path / "text.xml", np.ones((2, 2), np.float32))


def test_a_folder_that_cannot_be_written(onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_, match="cannot write"):
        write_ir(onnx_file, tmp_path / "missing" / "model.xml")


@pytest.mark.parametrize("content", [None, b"", b"<net><layers>", b"not a graph"])
def test_the_precision_of_a_file_that_is_no_ir(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.xml").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"cannot read .*model\.xml"):
        read_precision_ir(tmp_path / "model.xml")


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_an_ir_whose_weights_are_cut_short(ir: Path, tmp_path: Path, keep: float) -> None:
    (tmp_path / "model.xml").write_bytes(ir.read_bytes())
    weights = ir.with_suffix(".bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(weights[: int(len(weights) * keep)])
    with pytest.raises(ArtifactError, match="export again"):
        OpenVinoRunner(tmp_path / "model.xml", SNIPPETS)
