"""One run from unlabelled images to a classifier: what it leaves behind, when it goes on, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import TOY, ending, killed_at, toy_scenes, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from towers import save_toy_tower

from cliplet.classifier import classifier_details, load_classifier
from cliplet.datasets import open_dataset
from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.lock import lock_folder
from cliplet.metrics import mean_average_precision
from cliplet.train import train_classifier
from cliplet.train.classifier_recipe import ClassifierRecipe
from cliplet.train.predict import predict
from cliplet.train.recipes import folder_ccd, with_method
from cliplet.train.run_data import DataOptions
from cliplet.train.trunk_weights import student_input
from cliplet.vision_tower import load_vision_tower
from cliplet.vocabulary import Vocabulary, read_vocabulary

FOLDER = replace(
    folder_ccd(),
    **{
        name: getattr(TOY, name)
        for name in (
            "teacher", "teacher_normalisation", "trunk", "trunk_weights", "image_size", "region_size", "epochs",
            "warmup_epochs", "batch", "precision", "learning_rate",
        )
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def vocabulary(scenes: Path) -> Vocabulary:
    return read_vocabulary(str(scenes / "classes.txt"))


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("banks")


@pytest.fixture(scope="module")
def finished(scenes: Path, banks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    out = tmp_path_factory.mktemp("finished")
    trained(TOY, out, scenes, banks=banks)
    return out


@pytest.fixture
def photos_of(scenes: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a folder of the training images, without labels or classes."""

    def copy() -> Path:
        folder = tmp_path / "photos"
        folder.mkdir()
        for file in (scenes / "JPEGImages").glob("train_*.jpg"):
            shutil.copy(file, folder)
        return folder

    return copy


def test_report_says_what_was_done(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["recipe"] == TOY.to_json()
    assert report["images"] == {"learned": 36, "held_out": 4, "unreadable": {}}
    assert (report["skipped"], report["precision"], report["processes"]) == ({}, "fp32", 1)
    assert (report["data"]["images"], report["evaluation"]["images"]) == (40, 16)
    assert report["evaluation"]["split"] == "test-seen"
    assert [row["epoch"] for row in report["history"]] == [0, 1, 2]
    assert all({"loss", "held_out_map", "eval_map", "seconds"} <= row.keys() for row in report["history"])
    updates = [row["epoch"] for row in report["history"] if "threshold" in row]
    assert updates == list(TOY.update_epochs) == [1]
    assert {"regions_per_image", "label_map"} <= report["history"][1].keys()
    bias = report["labels"]["bias"]
    assert list(bias) == report["data"]["classes"]
    assert sum(found["sure_images"] for found in bias.values()) <= 40
    assert all(0 < found["value"] <= 1 for found in bias.values())
    measured = report["measured"]
    assert measured["map"] == report["history"][report["chosen_epoch"]]["eval_map"]
    assert measured["last_map"] == report["history"][-1]["eval_map"]
    assert measured["best_map"] == max(row["eval_map"] for row in report["history"])
    assert measured["map"] == pytest.approx(np.mean(list(measured["ap"].values())))
    assert {"torch", "timm"} <= report["versions"].keys()


def test_kept_classifier_is_the_chosen_epochs(finished: Path, scenes: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    details = classifier_details(finished / "classifier")
    assert details["epoch"] == report["chosen_epoch"]
    assert details["recipe"] == TOY.to_json()
    evaluation = open_dataset("scenes", scenes, "test-seen")
    assert evaluation.truth_NC is not None
    classifier = load_classifier(finished / "classifier")
    assert classifier.config.preprocessing.size == 64
    scores_NC = predict(classifier, evaluation.images).scores_NC
    found = mean_average_precision(scores_NC, evaluation.truth_NC)
    assert found == pytest.approx(report["measured"]["map"], abs=1e-3)


def test_curves_are_for_tensorboard(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert {"loss", "held_out_map", "eval_map", "regions_per_image"} <= set(events.Tags()["scalars"])
    history = json.loads((finished / "report.json").read_text())["history"]
    assert [e.step for e in events.Scalars("eval_map")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("eval_map")] == pytest.approx([r["eval_map"] for r in history])


def test_run_that_has_ended_is_not_repeated(
    finished: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_classifier, "_train", pytest.fail)
    assert trained(TOY, finished, scenes) == json.loads((finished / "report.json").read_text())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"differs in seed \(0 then, 1 now\)"),
        ({"method": "an", "epochs": 4}, r"epochs \(3 then, 4 now\), method \(ccd then, an now\)"),
        ({"eval_split": ""}, r"eval_split \(test-seen then,  now\), the images"),
    ],
)
def test_other_recipe_in_the_same_folder_is_refused(
    change: dict[str, Any], named: str, finished: Path, scenes: Path
) -> None:
    with pytest.raises(UsageError, match=named) as e:
        trained(replace(TOY, **change), finished, scenes)
    assert "--overwrite" in e.value.fix


def test_other_images_in_the_same_folder_are_refused(
    finished: Path, photos_of: Callable[[], Path], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    photos, out = photos_of(), tmp_path / "run"
    options = {"data": DataOptions(root=photos, vocabulary=vocabulary)}
    with killed_at("cliplet.train.loop:train_step", 1):
        trained(FOLDER, out, None, **options)
    next(photos.iterdir()).unlink()
    with pytest.raises(UsageError, match="another run, which differs in the images"):
        trained(FOLDER, out, None, **options)


def test_overwriting_starts_anew_but_keeps_scenes_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_method(TOY, "an")
    trained(recipe, tmp_path, None)
    before, made = ending(tmp_path), (tmp_path / "scenes" / "labels.csv").stat().st_mtime_ns
    answers = sorted((tmp_path / "banks").iterdir())
    monkeypatch.setattr("cliplet.train.label_pass._score_chunk", pytest.fail)
    trained(replace(recipe, seed=1), tmp_path, None, overwrite=True)
    assert ending(tmp_path)["classifier.head.weight"] != before["classifier.head.weight"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    trained(recipe, tmp_path, None, overwrite=True)
    assert ending(tmp_path) == before
    assert (tmp_path / "scenes" / "labels.csv").stat().st_mtime_ns == made
    assert sorted((tmp_path / "banks").iterdir()) == answers
    with pytest.raises(UsageError, match=r"scenes holds 40 scenes of an earlier run\nexpected: the 48"):
        trained(replace(recipe, train_scenes=48), tmp_path, None, overwrite=True)
    with pytest.raises(UsageError, match=r"scenes holds 16 scenes of an earlier run\nexpected: the 20"):
        trained(replace(recipe, eval_scenes=20), tmp_path, None, overwrite=True)


def test_scenes_that_were_half_made_are_made_again(tmp_path: Path) -> None:
    recipe = replace(with_method(TOY, "bce"), epochs=1)
    (tmp_path / "scenes.partial").mkdir()
    (tmp_path / "scenes.partial" / "classes.txt").write_text("nonsense")
    report = trained(recipe, tmp_path, None)
    assert (report["data"]["images"], report["evaluation"]["images"]) == (40, 16)
    assert not (tmp_path / "scenes.partial").exists()


def test_two_runs_at_once_in_one_folder_are_refused(scenes: Path, tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    with pytest.raises(UsageError, match="another run is writing"):
        trained(TOY, tmp_path, scenes)
    os.close(lock)
    with killed_at("cliplet.train.loop:train_step", 1):
        trained(with_method(TOY, "bce"), tmp_path, scenes)
    os.close(lock_folder(tmp_path))


def test_seed_decides_and_the_teacher_is_asked_once(
    finished: Path, scenes: Path, banks: Path, tmp_path: Path
) -> None:
    shared = sorted(banks.iterdir())
    trained(TOY, tmp_path / "same", scenes, banks=banks)
    assert ending(tmp_path / "same") == ending(finished)
    trained(replace(TOY, seed=1), tmp_path / "other", scenes, banks=banks)
    assert ending(tmp_path / "other")["classifier.head.weight"] != ending(finished)["classifier.head.weight"]
    # What it says of one classifier's regions is of no use to another run and stays in the run's folder.
    assert sorted(banks.iterdir()) == shared
    assert len(list((tmp_path / "other" / "banks").iterdir())) == 1


@pytest.mark.parametrize("method", ["an", "an_ls", "wan", "epr", "durand", "ll_r", "ll_ct", "asl", "bce_ls"])
def test_every_other_method_learns(method: str, scenes: Path, banks: Path, tmp_path: Path) -> None:
    recipe = replace(with_method(TOY, method), epochs=2, seed=3)
    report = trained(recipe, tmp_path, scenes, banks=banks, evaluate_epochs=False)
    losses = [row["loss"] for row in report["history"]]
    assert losses[1] < losses[0]
    assert ["eval_map" in row for row in report["history"]] == [False, True]
    assert "threshold" not in report["history"][1]
    if method == "bce_ls":
        assert report["labels"].keys() == {"per_image"}


def test_unreadable_images_are_named_and_left_out(
    photos_of: Callable[[], Path], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    photos = photos_of()
    broken = [photos / "train_000002.jpg", photos / "train_000017.jpg"]
    broken[0].write_text("no image")
    broken[1].write_bytes(broken[1].read_bytes()[:300])
    report = trained(FOLDER, tmp_path / "run", None, data=DataOptions(root=photos, vocabulary=vocabulary))
    assert report["images"]["unreadable"].keys() == set(map(str, broken))
    assert report["images"]["learned"] + report["images"]["held_out"] == 38
    assert report["skipped"] == {}


def test_with_true_labels_unreadable_images_are_found_while_training(scenes: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(scenes, tmp_path / "scenes")
    (moved / "JPEGImages" / "train_000005.jpg").write_text("no image")
    (moved / "JPEGImages" / "test-seen_000003.jpg").unlink()
    report = trained(with_method(replace(TOY, selection="last"), "bce"), tmp_path / "run", moved)
    assert [Path(p).name for p in report["skipped"]] == ["train_000005.jpg"]
    assert [Path(p).name for p in report["measured"]["unreadable"]] == ["test-seen_000003.jpg"]
    (reason,) = report["measured"]["unreadable"].values()
    assert reason.startswith("read: ")


def test_folder_without_labels_gives_a_classifier_and_no_map(
    photos_of: Callable[[], Path], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    data = DataOptions(root=photos_of(), vocabulary=vocabulary)
    report = trained(FOLDER, tmp_path / "run", None, data=data)
    assert (report["measured"], report["evaluation"]) == ({}, None)
    assert not any({"eval_map", "label_map"} & row.keys() for row in report["history"])
    assert load_classifier(tmp_path / "run" / "classifier").vocabulary.names == vocabulary.names


def test_images_without_any_class_train_and_evaluate(
    photos_of: Callable[[], Path], scenes: Path, tmp_path: Path
) -> None:
    photos = photos_of()
    (photos / "labels.csv").write_text(
        "file,classes\n" + "".join(f"{p.name},\n" for p in photos.glob("*.jpg"))
    )
    shutil.copy(scenes / "classes.txt", photos)
    recipe = replace(with_method(FOLDER, "bce"), eval_split="all")
    report = trained(recipe, tmp_path / "run", None, data=DataOptions(root=photos))
    json.loads((tmp_path / "run" / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["labels"]["per_image"] == report["measured"]["map"] == 0
    assert report["chosen_epoch"] == recipe.epochs - 1
    assert "held_out_map" not in report["history"][0]


def spoil(photos: Path) -> None:
    for file in photos.glob("*.jpg"):
        file.write_text("no image")


def thin_out(photos: Path) -> None:
    for file in sorted(photos.glob("*.jpg"))[20:]:
        file.unlink()


@pytest.mark.parametrize(
    ("recipe", "damage", "error", "message"),
    [
        (
            FOLDER,
            spoil,
            DataError,
            r"0 images to learn from .*, 40 could not be read; .*train_000000.jpg: decode: ",
        ),
        (
            FOLDER,
            thin_out,
            DataError,
            r"18 images .* 2 held out, 0 could not be read\n.* 16\nfix: --batch-size 9",
        ),
        (
            replace(FOLDER, held_out=0.99),
            None,
            DataError,
            r"0 images to learn from beside 40 held out.*\n.* 16\nfix: --set held_out=0.1",
        ),
        (with_method(FOLDER, "bce"), None, DataError, "learns from true labels, and these images have none"),
        (replace(FOLDER, precision="fp16"), None, UsageError, "fp16 on the CPU"),
        (
            replace(FOLDER, trunk="resnet18"),
            None,
            UsageError,
            "image tower of tiny is not the trunk resnet18",
        ),
        (replace(FOLDER, trunk="resnet_of_none"), None, UsageError, "timm has no model 'resnet_of_none'"),
        (replace(FOLDER, bias_guard="none"), None, DataError, "no image is surely of the class"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_reason(
    recipe: ClassifierRecipe,
    damage: Callable[[Path], None] | None,
    error: type[ClipletError],
    message: str,
    photos_of: Callable[[], Path],
    vocabulary: Vocabulary,
    tmp_path: Path,
) -> None:
    photos = photos_of()
    if damage:
        damage(photos)
    with pytest.raises(error, match=message):
        trained(recipe, tmp_path / "run", None, data=DataOptions(root=photos, vocabulary=vocabulary))
    assert not (tmp_path / "run" / "classifier").exists()


def test_folder_needs_a_root_and_classes(photos_of: Callable[[], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe for folder without --root"):
        trained(FOLDER, tmp_path / "run", None)
    with pytest.raises(UsageError, match="no classes") as e:
        trained(FOLDER, tmp_path / "run", photos_of())
    assert "--classes" in e.value.fix


def test_precision_is_in_the_report(scenes: Path, tmp_path: Path) -> None:
    recipe = replace(with_method(TOY, "bce"), precision="bf16", epochs=1)
    assert trained(recipe, tmp_path, scenes)["precision"] == "bf16"


def test_a_trunk_of_one_size_is_refused_before_the_warm_up(scenes: Path, banks: Path, tmp_path: Path) -> None:
    recipe = replace(TOY, trunk="test_vit3", trunk_weights="random")
    with pytest.raises(UsageError, match="--set region_size=64"):
        trained(recipe, tmp_path, scenes, banks=banks)
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("kind", ["clip_vision_model", "mlcd_vision_model"])
def test_a_student_with_a_vision_tower_learns_and_outlives_its_folder(
    kind: str, scenes: Path, banks: Path, tmp_path: Path
) -> None:
    """Regions are searched for at another side than the student's, so positions are interpolated too."""
    tower = save_toy_tower(tmp_path / "tower", kind)
    recipe = replace(TOY, trunk=f"mlcd:{tower}", trunk_weights="pretrained", epochs=2)
    report = trained(recipe, tmp_path / "run", scenes, banks=banks)
    shutil.rmtree(tower)
    evaluation = open_dataset("scenes", scenes, "test-seen")
    assert evaluation.truth_NC is not None
    classifier = load_classifier(tmp_path / "run" / "classifier")
    found = mean_average_precision(predict(classifier, evaluation.images).scores_NC, evaluation.truth_NC)
    assert found == pytest.approx(report["measured"]["map"], abs=1e-3)
    losses = [row["loss"] for row in report["history"]]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_a_vision_tower_starts_from_its_folder(vocabulary: Vocabulary, tmp_path: Path) -> None:
    tower = save_toy_tower(tmp_path)
    recipe = replace(TOY, trunk=f"mlcd:{tower}", trunk_weights="pretrained")
    wanted = load_vision_tower(tower, recipe.image_size).state_dict()
    found = train_classifier.new_classifier(recipe, vocabulary).trunk.state_dict()
    assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)
    by_chance = train_classifier.new_classifier(replace(recipe, trunk_weights="random"), vocabulary).trunk
    assert not by_chance.model.embeddings.class_embedding.equal(wanted["model.embeddings.class_embedding"])
    with pytest.raises(UsageError, match="trunk_weights 'teacher' with the trunk mlcd:"):
        train_classifier.new_classifier(replace(recipe, trunk_weights="teacher"), vocabulary)


@pytest.mark.parametrize(
    ("change", "mean"),
    [({}, 0.485), ({"trunk_weights": "teacher"}, 0.48145466), ({"trunk": "mlcd:"}, 0.25)],
    ids=["imagenet", "teacher", "tower"],
)
def test_a_student_is_fed_what_its_weights_know(change: dict[str, Any], mean: float, tmp_path: Path) -> None:
    described = {"image_mean": [mean, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"shortest_edge": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    recipe = replace(TOY, **{"trunk_weights": "pretrained", **change})
    fed = student_input(replace(recipe, trunk=recipe.trunk.replace("mlcd:", f"mlcd:{tmp_path}")))
    assert (fed.mean[0], fed.size, fed.resize_mode) == (mean, TOY.image_size, "squash")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_learns_what_a_cpu_learns(scenes: Path, tmp_path: Path, precision: str) -> None:
    recipe = replace(TOY, epochs=2, precision=precision)
    on_gpu = trained(recipe, tmp_path / "gpu", scenes, device="cuda")
    on_cpu = trained(replace(recipe, precision="fp32"), tmp_path / "cpu", scenes)
    assert on_gpu["device"].startswith("cuda")
    assert on_gpu["precision"] == precision
    losses = [[row["loss"] for row in report["history"]] for report in (on_gpu, on_cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
