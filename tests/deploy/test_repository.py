"""Repositories as files: what follows from a bundle stands in them, and nothing is left half-done."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from served import STUDENT_CLASSES, add_engine, make_student, make_teacher
from toy_engine import toy_engine
from tritonclient.grpc import model_config_pb2

from cliplet.artifact import Bundle, Engine
from cliplet.deploy.repository import (
    Served,
    ServeSettings,
    plan_served,
    shared_memory_bytes,
    write_repository,
)
from cliplet.engine_sidecar import Profile
from cliplet.errors import ArtifactError, ClipletError, DataError, UsageError
from cliplet.serving import CARD_KEY, ModelCard


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("bundles") / "a teacher (tiny)")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("bundles") / "student")


def written(
    folder: Path, bundles: Sequence[tuple[str | None, Path]], **settings: Any
) -> tuple[list[Served], dict[str, Any]]:
    """What is served, and each model's configuration as Triton reads it."""
    chosen = ServeSettings(**settings)
    served, refused = plan_served(bundles, chosen)
    assert not refused
    write_repository(served, folder, chosen)
    return served, {path.parent.name: parsed(path) for path in folder.glob("*/config.pbtxt")}


def parsed(path: Path) -> Any:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def tensors(listed: Any) -> dict[str, tuple[str, list[int]]]:
    return {t.name: (model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in listed}


def test_one_bundle_is_a_tagger_and_its_graphs(teacher: Path, tmp_path: Path) -> None:
    (served,), models = written(tmp_path / "repository", [(None, teacher)])
    assert served.models == ("a-teacher-tiny", "a-teacher-tiny_snippets", "a-teacher-tiny_text")
    assert set(models) == set(served.models)
    tagger, graph, text = (models[name] for name in served.models)
    assert tensors(tagger.input) == {"image": ("TYPE_STRING", [1])}
    assert tensors(tagger.output) == {
        "record": ("TYPE_STRING", [1]),
        "scores": ("TYPE_FP32", [20]),
        "view_probs": ("TYPE_FP32", [10, 20]),
    }
    assert tensors(graph.input) == {"image": ("TYPE_UINT8", [-1, -1, 3]), "boxes": ("TYPE_FP32", [-1, 4])}
    assert tensors(graph.output) == {"view_probs": ("TYPE_FP32", [-1, 20]), "scores": ("TYPE_FP32", [20])}
    assert tensors(text.input) == {"tokens": ("TYPE_INT64", [16])}
    assert tensors(text.output) == {"text": ("TYPE_FP32", [128])}
    # 32 views make a batch: three images of ten.
    assert (tagger.max_batch_size, graph.max_batch_size) == (3, 3)
    assert list(graph.dynamic_batching.preferred_batch_size) == [3]
    assert [w.batch_size for w in graph.model_warmup] == [1, 3]
    assert list(graph.model_warmup[1].inputs["boxes"].dims) == [10, 4]
    assert not tagger.model_warmup
    assert tagger.instance_group[0].count == graph.instance_group[0].count + 1


def test_a_classifier_has_its_own_tensors(student: Path, tmp_path: Path) -> None:
    _, models = written(tmp_path / "repository", [("pets", student)])
    assert tensors(models["pets"].output)["cam"] == ("TYPE_FP32", [4, 2, 2])
    assert tensors(models["pets_classifier"].input)["boxes"] == ("TYPE_FP32", [4])
    assert models["pets"].max_batch_size == 32
    labels = next(t.label_filename for t in models["pets"].output if t.name == "scores")
    assert (tmp_path / "repository/pets" / labels).read_text().splitlines() == list(STUDENT_CLASSES)


def test_the_card_tells_all_that_the_plan_knows(student: Path, tmp_path: Path) -> None:
    (served,), models = written(tmp_path / "r", [("pets", student)], threshold=0.25, max_pixels=1000)
    card = ModelCard.from_json(models["pets"].parameters[CARD_KEY].string_value, "test")
    assert card.to_json() == served.card.to_json()
    assert card.manifest.to_json() == Bundle.load(student).manifest.to_json()
    assert (card.thresholds, card.max_pixels, card.graph) == ((0.25,) * 4, 1000, "pets_classifier")


@pytest.mark.parametrize(
    ("settings", "read", "value"),
    [
        ({"queue_delay_us": 77}, lambda m: m["pets"].dynamic_batching.max_queue_delay_microseconds, 77),
        ({"max_queue": 5}, lambda m: m["pets"].dynamic_batching.default_queue_policy.max_queue_size, 5),
        (
            {"timeout_us": 9},
            lambda m: m["pets_classifier"].dynamic_batching.default_queue_policy.default_timeout_microseconds,
            9,
        ),
        ({"instances": 3}, lambda m: m["pets_classifier"].instance_group[0].count, 3),
        (
            {"max_batch_size": 4},
            lambda m: (m["pets"].max_batch_size, m["pets_classifier"].max_batch_size),
            (4, 4),
        ),
        ({"threads": 2}, lambda m: m["pets_classifier"].parameters["threads"].string_value, "2"),
        ({"cache": True}, lambda m: (m["pets"].response_cache.enable, len(m["pets"].output)), (True, 2)),
    ],
)
def test_settings_arrive(
    student: Path, tmp_path: Path, settings: dict[str, Any], read: Any, value: Any
) -> None:
    _, models = written(tmp_path / "repository", [("pets", student)], **settings)
    assert read(models) == value


def test_one_image_at_a_time(teacher: Path, student: Path, tmp_path: Path) -> None:
    _, models = written(tmp_path / "repository", [("big", teacher), ("small", student)], max_batch_size=1)
    for name in ("big_snippets", "small_classifier"):
        warmups = models[name].model_warmup
        assert models[name].max_batch_size == 1
        assert warmups and len({str(w.inputs) for w in warmups}) == len(warmups), "each shape once"


def test_queues_reject_and_know_two_priorities(student: Path, tmp_path: Path) -> None:
    _, models = written(tmp_path / "repository", [("pets", student)])
    for model in models.values():
        batching = model.dynamic_batching
        assert (batching.priority_levels, batching.default_priority_level) == (2, 2)
        policy = batching.default_queue_policy
        assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
        assert policy.max_queue_size > 0 and policy.allow_timeout_override


def test_bundles_that_share_a_cpu_take_turns(teacher: Path, student: Path, tmp_path: Path) -> None:
    _, alone = written(tmp_path / "one", [("a", student)])
    _, both = written(tmp_path / "two", [("a", student), ("b", teacher)])

    def limited(models: dict[str, Any]) -> set[str]:
        return {name for name, m in models.items() if m.instance_group[0].rate_limiter.resources}

    assert limited(alone) == set()
    # Never a tagger, which waits for its graph.
    assert limited(both) == {"a_classifier", "b_snippets", "b_text"}


def test_a_folder_name_may_hold_anything(student: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(student, tmp_path / 'a\nbackend: "x" $name'))
    _, models = written(tmp_path / "repository", [("pets", bundle)])
    assert all(model.backend == "python" for model in models.values())


def test_a_class_name_may_hold_anything(student: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(student, tmp_path / "bundle"))
    manifest = json.loads((bundle / "cliplet.json").read_text())
    manifest["vocabulary"]["classes"][0]["name"] = 'Käse "alt" \\ $name'
    (bundle / "cliplet.json").write_text(json.dumps(manifest))
    _, models = written(tmp_path / "repository", [("pets", bundle)])
    card = ModelCard.from_json(models["pets"].parameters[CARD_KEY].string_value, "test")
    assert card.manifest.vocabulary.names[0] == 'Käse "alt" \\ $name'


def test_an_older_repository_is_replaced_whole(teacher: Path, student: Path, tmp_path: Path) -> None:
    written(tmp_path / "repository", [("old", teacher)])
    written(tmp_path / "repository", [("new", student)])
    assert sorted(p.name for p in (tmp_path / "repository").iterdir()) == ["new", "new_classifier"]
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]


def test_what_cliplet_did_not_write_stays(student: Path, tmp_path: Path) -> None:
    other = tmp_path / "repository" / "resnet"
    other.mkdir(parents=True)
    (other / "config.pbtxt").write_text('name: "resnet"')
    with pytest.raises(UsageError, match="resnet, which is no model that cliplet wrote"):
        written(tmp_path / "repository", [("pets", student)])
    assert (other / "config.pbtxt").read_text() == 'name: "resnet"'


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no bundle"),
        (("a/b",), "'a/b'"),
        (("",), "name ''"),
        ((".hidden",), "hidden"),
        (("same", "same"), "both be served as same"),
        (("pets", "pets_classifier"), "both be served as pets_classifier"),
    ],
)
def test_names_that_cannot_be(student: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        plan_served([(name, student) for name in names], ServeSettings())


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_size": -1},
        {"max_queue": 0},
        {"instances": 0},
        {"max_pixels": 0},
        {"target": "moon"},
        {"max_batch_size": 10**6},
        {"views": "1+2x2"},
        {"runtime": "openvino"},
    ],
)
def test_settings_that_cannot_be(student: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        plan_served([("pets", student)], ServeSettings(**settings))


def spoiled(student: Path, folder: Path, how: str) -> Path:
    bundle = Path(shutil.copytree(student, folder))
    if how == "changed":
        (bundle / "model.onnx").write_bytes(b"other bytes")
    elif how == "lost":
        (bundle / "model.onnx").unlink()
    else:
        shutil.rmtree(bundle)
        bundle.mkdir()
    return bundle


@pytest.mark.parametrize(
    ("how", "kind"), [("changed", ArtifactError), ("lost", ArtifactError), ("empty", DataError)]
)
def test_a_broken_bundle_is_named(student: Path, tmp_path: Path, how: str, kind: type[ClipletError]) -> None:
    broken = spoiled(student, tmp_path / "bundle", how)
    with pytest.raises(kind, match="cannot serve bad: "):
        plan_served([("good", student), ("bad", broken)], ServeSettings())
    served, refused = plan_served([("good", student), ("bad", broken)], ServeSettings(), skip_broken=True)
    assert [s.name for s in served] == ["good"]
    assert [(r.name, r.folder, type(r.error)) for r in refused] == [("bad", broken, kind)]
    with pytest.raises(kind):
        plan_served([("bad", broken)], ServeSettings(), skip_broken=True)


def with_plan(bundle: Path, folder: Path, library: str = "tensorrt", **facts: Any) -> Path:
    """A copy of a bundle that also holds a (toy) TensorRT engine."""
    copy = Path(shutil.copytree(bundle, folder / "bundle"))
    sizes = Profile(batch=(1, 4, 16), views=(1, 10, 30), canvas=(32, 640, 2048))
    plan = toy_engine(folder, **{"library": library, "profile": sizes, **facts})
    engine = Engine(library, "fp16", f"engines/{plan.name}", "fp16", "sm89", {})
    return add_engine(copy, engine, plan, plan.with_suffix(".json"))


GPU = {"target": "container", "device": "cuda", "precision": "fp16"}


def test_a_container_with_a_gpu_runs_the_plan_itself(teacher: Path, tmp_path: Path) -> None:
    bundle = with_plan(teacher, tmp_path)
    _, models = written(tmp_path / "repository", [("pets", bundle)], **GPU)
    graph = models["pets_snippets"]
    assert (graph.backend, graph.max_batch_size) == ("tensorrt", 16)
    file = tmp_path / "repository/pets_snippets/1" / graph.default_model_filename
    assert file.read_bytes() == b"a plan" and not (file.parent / "model.py").exists()
    assert graph.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    # Smallest, best and largest of what it was built for.
    assert [w.batch_size for w in graph.model_warmup] == [1, 4, 16]
    assert list(graph.model_warmup[2].inputs["image"].dims) == [2048, 2048, 3]
    assert list(models["pets"].dynamic_batching.preferred_batch_size) == [4, 16]
    assert models["pets"].backend == "python"
    assert models["pets_text"].backend == "onnxruntime"


@pytest.mark.parametrize(
    ("facts", "settings", "message"),
    [
        ({}, {"max_batch_size": 17}, "1 to 17 images"),
        ({"profile": Profile(batch=(2, 4, 8))}, {}, "built for 2 to 8"),
        ({"profile": Profile(views=(1, 5, 5))}, {}, "10 of an image"),
        ({"library": "tensorrt_rtx"}, {"runtime": "tensorrt_rtx"}, "cannot load engines of TensorRT for RTX"),
    ],
)
def test_what_an_engine_does_not_take(
    teacher: Path, tmp_path: Path, facts: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    bundle = with_plan(teacher, tmp_path, **facts)
    with pytest.raises(UsageError, match=message):
        plan_served([("pets", bundle)], ServeSettings(**{**GPU, **settings}))


def test_a_container_without_a_gpu_runs_onnx(student: Path, tmp_path: Path) -> None:
    _, models = written(tmp_path / "repository", [("pets", student)], target="container", threads=3)
    graph = models["pets_classifier"]
    assert graph.backend == "onnxruntime"
    assert graph.parameters["intra_op_thread_count"].string_value == "3"
    file = tmp_path / "repository/pets_classifier/1/model.onnx"
    assert file.read_bytes() == (student / "model.onnx").read_bytes()


def test_an_ir_gets_the_names_that_its_backend_looks_for(student: Path, tmp_path: Path) -> None:
    for name in ("int8.xml", "int8.bin"):
        (tmp_path / name).write_text(name)
    engine = Engine("openvino", "int8", "openvino/int8.xml", "int8", "cpu", {})
    bundle = Path(shutil.copytree(student, tmp_path / "bundle"))
    add_engine(bundle, engine, tmp_path / "int8.xml", tmp_path / "int8.bin")
    settings = {"target": "container", "runtime": "openvino", "precision": "int8"}
    _, models = written(tmp_path / "repository", [("pets", bundle)], **settings)
    version = tmp_path / "repository/pets_classifier/1"
    assert models["pets_classifier"].default_model_filename == "model.xml"
    assert {p.name: p.read_text() for p in version.iterdir()} == {
        "model.xml": "int8.xml",
        "model.bin": "int8.bin",
    }


def test_memory_grows_with_instances_and_batches(student: Path) -> None:
    def needed(**settings: Any) -> int:
        chosen = ServeSettings(**settings)
        return shared_memory_bytes(plan_served([("pets", student)], chosen)[0], chosen)

    assert needed(max_batch_size=1) < needed(max_batch_size=8) < needed(max_batch_size=8, instances=2)
    # In a container only the tagger is Python.
    assert needed(target="container") < needed()
