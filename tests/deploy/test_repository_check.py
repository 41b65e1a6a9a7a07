"""The lint finds every breakage before a server starts, and nothing where nothing is broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served import add_engine, make_student, make_teacher
from toy_engine import toy_engine

from cliplet.artifact import Engine
from cliplet.deploy.repository import ServeSettings, plan_served, write_repository
from cliplet.deploy.repository_check import check_repository
from cliplet.engine_sidecar import Profile

ROOM = 2**34
CAPABLE = {"backends": {"python", "onnxruntime", "tensorrt", "openvino"}, "shm_bytes": ROOM, "gpu": True}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("bundles") / "teacher")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("bundles") / "student")


def repository(folder: Path, bundle: Path, **settings: Any) -> Path:
    """A repository that serves a copy of a bundle, to be spoilt, as `pets`."""
    own = folder / "bundle"
    if not own.exists():
        shutil.copytree(bundle, own)
    chosen = ServeSettings(**settings)
    return write_repository(plan_served([("pets", own)], chosen)[0], folder / "repository", chosen)


def with_plan(teacher: Path, folder: Path) -> Path:
    bundle = Path(shutil.copytree(teacher, folder / "bundle"))
    sizes = Profile(batch=(1, 4, 16), views=(1, 10, 30), canvas=(32, 640, 2048))
    plan = toy_engine(folder, profile=sizes)
    engine = Engine("tensorrt", "fp16", f"engines/{plan.name}", "fp16", "sm89", {})
    add_engine(bundle, engine, plan, plan.with_suffix(".json"))
    return repository(folder, bundle, target="container", device="cuda", precision="fp16")


def replaced(old: str, new: str, model: str = "pets_classifier") -> Callable[[Path], None]:
    """A breakage: one text of a configuration for another."""

    def change(folder: Path) -> None:
        config = folder / model / "config.pbtxt"
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new, 1))

    return change


def removed(path: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        place = folder / path
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return change


def appended(path: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        place = folder / path
        data = place.read_bytes()
        # It may be a link to the bundle's own file.
        place.unlink()
        place.write_bytes(data + text.encode())

    return change


def added_warm_up(folder: Path) -> None:
    sample = 'key: "image" value { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "photo" }'
    appended(
        "pets/config.pbtxt",
        f'model_warmup [ {{ name: "photo" batch_size: 1 inputs [ {{ {sample} }} ] }} ]',
    )(folder)


def test_what_was_just_written_has_no_problems(teacher: Path, student: Path, tmp_path: Path) -> None:
    settings = ServeSettings(cache=True)
    served, _ = plan_served([("a", teacher), ("b", student)], settings)
    folder = write_repository(served, tmp_path / "repository", settings)
    assert check_repository(folder) == []
    assert check_repository(folder, backends={"python"}, shm_bytes=ROOM, gpu=False) == []


@pytest.mark.parametrize(
    ("broken", "model", "message"),
    [
        (removed("pets_classifier/config.pbtxt"), "pets_classifier", "config.pbtxt is missing"),
        (replaced("max_batch_size: 32", "max_batch_size: many"), "pets_classifier", "cannot be read: line"),
        (replaced("backend:", "back_end:"), "pets_classifier", "cannot be read: line"),
        (replaced('name: "pets', 'name: "dogs'), "pets_classifier", "calls it dogs_classifier"),
        (removed("pets_classifier/1"), "pets_classifier", "folder of its version"),
        (removed("pets_classifier/1/model.py"), "pets_classifier", "1/model.py, which its backend loads"),
        (removed("pets/1/cliplet_paths.py"), "pets", "which model.py imports"),
        (replaced('"python"', '"pytorch"'), "pets_classifier", "no backend 'pytorch'"),
        (replaced("max_batch_size: 32", "max_batch_size: 0"), "pets_classifier", "max_batch_size is 0"),
        (replaced("size: [ 32 ]", "size: [ 64 ]"), "pets_classifier", "preferred batches of [64]"),
        (replaced("max_batch_size: 32", "max_batch_size: 8"), "pets", "which takes 8"),
        (replaced("size: 32", "size: 8", "pets"), "pets", "promises batches of 32"),
        (replaced("TYPE_UINT8", "TYPE_FP32"), "pets_classifier", "in its contract TYPE_UINT8"),
        (replaced('"probs"', '"scores"'), "pets_classifier", "its contract ['probs', 'cam']"),
        (replaced("dims: [ 4, 2, 2 ]", "dims: [ 4, 2 ]"), "pets_classifier", "dims [4, 2]"),
        (replaced("dims: [ 4, 2, 2 ]", "dims: [ 4, 7, 7 ]"), "pets_classifier", "in its engine [4, 2, 2]"),
        (replaced("dims: [ -1, -1, 3 ]", "dims: [ -1, -1, 4 ]"), "pets_classifier", "in its contract"),
        (removed("../bundle"), "pets_classifier", "model.onnx is missing"),
        (appended("../bundle/model.onnx", "x"), "pets_classifier", "has changed since it was exported"),
        (removed("pets_classifier"), "pets", "it asks pets_classifier"),
        (removed("pets/labels.txt"), "pets", "labels.txt with the names"),
        (appended("pets/labels.txt", "unicorn\n"), "pets", "5 names"),
        (replaced("dims: [ 4 ] label", "dims: [ 5 ] label", "pets"), "pets", "scores of [5] classes"),
        (replaced('\\"dog\\"', '\\"cow\\"', "pets"), "pets", "which are not the 4 of the bundle"),
        (replaced('\\"schema\\": 1', '\\"schema\\": 0', "pets"), "pets", "schema 0"),
        (replaced('{\\"schema', "{", "pets"), "pets", "does not describe its model"),
        (
            replaced("KIND_CPU", "KIND_CPU rate_limiter { resources [ { name: 'x' count: 1 } ] }", "pets"),
            "pets",
            "both would wait forever",
        ),
        (replaced("KIND_CPU", "KIND_GPU"), "pets_classifier", "for a GPU"),
        (replaced("dims: [ 32, 32, 3 ]", "dims: [ 32, 32, 1 ]"), "pets_classifier", "does not fit the input"),
        (replaced('key: "boxes"', 'key: "box"'), "pets_classifier", "feeds ['box', 'image']"),
        (replaced("batch_size: 32 inputs", "batch_size: 33 inputs"), "pets_classifier", "a batch of 33"),
        (added_warm_up, "pets", "warmup/photo"),
        (replaced("enable: false", "enable: true", "pets"), "pets", "a response cache and the output cam"),
    ],
)
def test_what_is_broken_is_found(
    student: Path, tmp_path: Path, broken: Callable[[Path], None], model: str, message: str
) -> None:
    folder = repository(tmp_path, student)
    broken(folder)
    problems = check_repository(folder, backends={"python"}, shm_bytes=ROOM, gpu=False)
    assert [p for p in problems if p.model == model and message in p.happened], problems
    assert all(p.fix for p in problems)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (replaced("max_batch_size: 16", "max_batch_size: 32", "pets_snippets"), "built for 1 to 16 images"),
        (replaced('views\\": \\"1+3x3', 'views\\": \\"1+9x9', "pets"), "built for 1 to 30"),
        (appended("pets_snippets/1/sm89-10.9.0-fp16.plan", "x"), "has changed since it was exported"),
        (
            appended("pets_snippets/1/sm89-10.9.0-fp16.plan", "x"),
            "is not the plan that its side-car tells of",
        ),
        (removed("pets_snippets/1/sm89-10.9.0-fp16.json"), "sm89-10.9.0-fp16.json"),
        (removed("pets_snippets/1/sm89-10.9.0-fp16.plan"), "which its backend loads, is missing"),
    ],
)
def test_a_plan_is_held_to_its_side_car(
    teacher: Path, tmp_path: Path, broken: Callable[[Path], None], message: str
) -> None:
    folder = with_plan(teacher, tmp_path)
    assert check_repository(folder, **CAPABLE) == []  # type: ignore[arg-type]
    broken(folder)
    found = [
        f"{p.happened} {p.fix}" for p in check_repository(folder, **CAPABLE) if p.model == "pets_snippets"
    ]  # type: ignore[arg-type]
    assert any(message in text for text in found), found


def test_an_ir_is_read_and_needs_its_weights(student: Path, tmp_path: Path) -> None:
    from cliplet.export.openvino_ir import write_ir

    bundle = Path(shutil.copytree(student, tmp_path / "bundle"))
    write_ir(student / "model.onnx", tmp_path / "model.xml")
    engine = Engine("openvino", "fp32", "openvino/model.xml", "fp32", "cpu", {})
    add_engine(bundle, engine, tmp_path / "model.xml", tmp_path / "model.bin")
    folder = repository(tmp_path, bundle, target="container", runtime="openvino")
    assert check_repository(folder, **CAPABLE) == []  # type: ignore[arg-type]
    replaced("dims: [ 4, 2, 2 ]", "dims: [ 4, 7, 7 ]")(folder)
    removed("pets_classifier/1/model.bin")(folder)
    found = " ".join(p.happened for p in check_repository(folder))
    assert "in its engine [4, 2, 2]" in found and "model.bin, the weights of its IR, is missing" in found


def test_shared_memory_has_to_hold_the_largest_batches(student: Path, tmp_path: Path) -> None:
    folder = repository(tmp_path, student)
    (problem,) = check_repository(folder, shm_bytes=64 * 2**20)
    assert "/dev/shm has 64 MiB" in problem.happened and "--shm-size" in problem.fix


@pytest.mark.parametrize("make", [False, True])
def test_an_empty_repository_is_a_problem(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "nothing"
    if make:
        folder.mkdir()
    (problem,) = check_repository(folder)
    assert "holds no model" in problem.happened


def test_a_stranger_is_held_to_what_is_common(tmp_path: Path) -> None:
    model = tmp_path / "resnet"
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.onnx").touch()
    (model / "config.pbtxt").write_text(
        'backend: "onnxruntime" max_batch_size: 4 default_model_filename: "model.onnx"'
    )
    assert check_repository(tmp_path, backends={"onnxruntime"}) == []
    (problem,) = check_repository(tmp_path, backends={"python"})
    assert str(problem).startswith("resnet: the server has no backend 'onnxruntime', only python\n  fix: ")
