"""One run from unlabelled images to a trunk: what it leaves behind, when it goes on, what it refuses, who uses it."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fields_read import attributes_read
from mlcd_toys import STEPS, TOY, ending, toy_photos, trained
from runs import TOY as CCD
from runs import killed_at
from small_sets import one_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cliplet.checkpoint import load_arrays
from cliplet.classifier import load_classifier, save_classifier
from cliplet.errors import ArtifactError, ClipletError, DataError, UsageError
from cliplet.images import ImageError
from cliplet.listing import ImageRef
from cliplet.lock import lock_folder
from cliplet.train import embeddings as embeddings_module
from cliplet.train import mlcd, mlcd_loop, mlcd_recipe
from cliplet.train.class_centres import ClassCentres
from cliplet.train.clusters import read_clusters
from cliplet.train.embedder import load_encoder
from cliplet.train.loop import RunOptions
from cliplet.train.mlcd_loop import TrunkLearning, rate_at, set_gradient_checkpointing
from cliplet.train.mlcd_recipe import CHOICES, LOSSES, RANGES, MlcdRecipe
from cliplet.train.run_folder import begin_run
from cliplet.train.train_classifier import new_classifier
from cliplet.train.trunk_weights import student_input, trunk_sha256
from cliplet.trunk_files import load_trunk, new_trunk, save_trunk, trunk_details
from cliplet.vocabulary import ClassName, Vocabulary


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_photos(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def embeddings(photos: Path, finished: Path) -> Path:
    """Embeddings of the photos, to share."""
    return finished / "embeddings"


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    out = tmp_path_factory.mktemp("finished")
    trained(TOY, photos, out)
    return out


@pytest.fixture
def copied(photos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def test_report_says_what_was_done(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["recipe"] == TOY.to_json()
    assert report["images"] == {"learned": 60, "unreadable": {}}
    assert (report["skipped"], report["precision"], report["processes"]) == ({}, "fp32", 1)
    assert report["embeddings"]["embedder"]["model"] == "tiny"
    assert report["clusters"]["count"] == 12 and report["clusters"]["reseeded"] >= 0
    assert [row["epoch"] for row in report["history"]] == [0, 1]
    assert report["history"][1]["loss"] < report["history"][0]["loss"]
    assert all({"images_per_second", "seconds"} <= row.keys() for row in report["history"])
    # Centres, their gradient and AdamW's two moments alone, of 12 clusters and 96 features in 4 bytes.
    assert report["centres_bytes_per_process"] > 4 * 12 * 96 * 4
    assert report["trunk"] == {"sha256": trunk_details(finished / "trunk")["sha256"], "width": 96}


def test_trunk_is_what_was_learned(finished: Path) -> None:
    arrays, _ = load_arrays(finished / "checkpoint", "checkpoint")
    trunk, config = load_trunk(finished / "trunk")
    state = trunk.state_dict()
    learned = {n.removeprefix("learner.trunk."): a for n, a in arrays.items() if "learner.trunk." in n}
    assert state.keys() == learned.keys()
    assert all(np.array_equal(learned[name], tensor.numpy()) for name, tensor in state.items())
    assert (config.trunk, config.width, config.preprocessing.size) == ("test_resnet", 96, 32)
    assert config.preprocessing.resize_mode == "squash"
    assert trunk_details(finished / "trunk")["recipe"] == TOY.to_json()
    # Not what it began with.
    torch.manual_seed(TOY.seed)
    begun = new_trunk("test_resnet", 32).state_dict()
    assert not begun["conv1.0.weight"].equal(state["conv1.0.weight"])


def test_curves_are_for_tensorboard(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    history = json.loads((finished / "report.json").read_text())["history"]
    assert {"loss", "images_per_second"} <= set(events.Tags()["scalars"])
    logged = {(e.step, round(e.value, 3)) for e in events.Scalars("loss")}
    assert {(row["epoch"] + 1, round(row["loss"], 3)) for row in history} <= logged


def test_seed_decides_and_the_teacher_is_asked_once(
    finished: Path, embeddings: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cliplet.train.embedder.TorchEmbedder.embed", pytest.fail)
    trained(TOY, photos, tmp_path / "same", embeddings=embeddings)
    assert ending(tmp_path / "same") == ending(finished)
    trained(replace(TOY, seed=1), photos, tmp_path / "other", embeddings=embeddings)
    assert (
        ending(tmp_path / "other")["checkpoint.array.centres"] != ending(finished)["checkpoint.array.centres"]
    )


def test_a_run_that_has_ended_is_not_repeated(
    finished: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlcd, "_train", pytest.fail)
    assert trained(TOY, photos, finished) == json.loads((finished / "report.json").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "mlc"},
        {"loss": "unicom", "angle": 0.3},
        {"neck": "none"},
        {"precision": "bf16", "channels_last": False},
        {"clusters": 0, "positives": 2, "least_crop": 1.0, "weight_decay": 0.0},
        {"warmup_steps": 0, "centres_factor": 1.0, "scale": 32.0, "threshold": 0.2, "negative_rate": 1.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_setting_learns(
    changes: dict[str, Any], embeddings: Path, photos: Path, tmp_path: Path
) -> None:
    recipe = replace(TOY, **changes)
    report = trained(recipe, photos, tmp_path, embeddings=embeddings)
    losses = [row["loss"] for row in report["history"]]
    assert losses[1] < losses[0]
    assert report["precision"] == recipe.precision
    assert report["clusters"]["count"] == (recipe.clusters or 3)
    found = read_clusters(tmp_path / "clusters")
    assert found is not None and found.nearest_NL.shape == (
        60,
        1 if recipe.loss == "unicom" else recipe.positives,
    )


def test_recomputing_learns_the_same(embeddings: Path, photos: Path, tmp_path: Path) -> None:
    """Of a trunk with layer norms, which count nothing; with batch norms they would count twice."""
    recipe = replace(TOY, trunk="test_vit", neck="none")
    plain = trained(recipe, photos, tmp_path / "plain", embeddings=embeddings)
    calls = []
    original = torch.utils.checkpoint.checkpoint

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return original(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.checkpoint, "checkpoint", counted)
        again = replace(recipe, gradient_checkpointing=True)
        recomputed = trained(again, photos, tmp_path / "recomputed", embeddings=embeddings)
    assert len(calls) >= 2 * STEPS
    losses = [[row["loss"] for row in report["history"]] for report in (plain, recomputed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "where",
    [
        ("cliplet.train.embeddings:EmbeddingFile.write", 1),
        ("cliplet.train.mlcd:write_clusters", 1),
        ("cliplet.train.mlcd_loop:train_step", STEPS + 2),
    ],
)
def test_a_run_that_was_stopped_goes_on(
    where: tuple[str, int], finished: Path, photos: Path, tmp_path: Path
) -> None:
    with killed_at(*where):
        trained(TOY, photos, tmp_path)
    assert not (tmp_path / "trunk").exists()
    trained(TOY, photos, tmp_path)
    assert ending(tmp_path) == ending(finished)


def test_a_run_stopped_within_an_epoch_repeats_no_step(
    finished: Path, embeddings: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"embeddings": embeddings, "checkpoint_steps": 1}
    with killed_at("cliplet.train.mlcd_loop:train_step", STEPS + 3):
        trained(TOY, photos, tmp_path, **more)
    steps = []
    original = mlcd_loop.train_step

    def noted(learning: TrunkLearning, batch: Any, wanted: int, step: int) -> float:
        steps.append((learning.progress.epoch, step))
        return original(learning, batch, wanted, step)

    monkeypatch.setattr(mlcd_loop, "train_step", noted)
    trained(TOY, photos, tmp_path, **more)
    assert steps == [(1, 2), (1, 3)]
    assert ending(tmp_path) == ending(finished)


def test_unreadable_images_are_named_and_left_out(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, lost = copied / "train_000002.jpg", copied / "train_000017.jpg"
    broken.write_text("no image")
    original = mlcd.learn

    def without(learning: TrunkLearning) -> None:
        lost.unlink()
        original(learning)

    monkeypatch.setattr(mlcd, "learn", without)
    report = trained(TOY, copied, tmp_path / "run")
    assert report["images"]["learned"] == 59
    assert list(report["images"]["unreadable"]) == [str(broken)]
    assert list(report["skipped"]) == [str(lost)]


def test_images_that_all_vanish_stop_the_run(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = mlcd.learn

    def without(learning: TrunkLearning) -> None:
        shutil.rmtree(copied)
        original(learning)

    monkeypatch.setattr(mlcd, "learn", without)
    with pytest.raises(DataError, match="16 images of a batch could not be read; .*jpg: read: No such file"):
        trained(TOY, copied, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(
    embeddings: Path, photos: Path, tmp_path: Path
) -> None:
    recipe = replace(TOY, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(DataError, match=r"loss of epoch 1, step \d is not finite") as e:
        trained(recipe, photos, tmp_path, embeddings=embeddings)
    assert e.value.happened.count(".jpg") == TOY.batch
    assert not (tmp_path / "trunk").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"differs in seed \(0 then, 1 now\)"),
        ({"loss": "mlc", "epochs": 4}, r"epochs \(2 then, 4 now\), loss \(mlcd then, mlc now\)"),
        ({"teacher": "open_clip:local-dir:nowhere"}, "nowhere"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(
    change: dict[str, Any], named: str, finished: Path, photos: Path
) -> None:
    with pytest.raises(ClipletError, match=named):
        trained(replace(TOY, **change), photos, finished)


def test_a_changed_collection_is_refused_with_the_reason(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained(replace(TOY, epochs=1), copied, out)
    (copied / "train_000004.jpg").unlink()
    with pytest.raises(UsageError, match=r"1 file gone \(.*train_000004.jpg") as e:
        trained(replace(TOY, epochs=1), copied, out)
    assert "--overwrite" in e.value.fix
    report = trained(replace(TOY, epochs=1), copied, out, overwrite=True)
    assert report["images"]["learned"] == 59


def test_overwriting_starts_anew_but_keeps_embeddings_that_fit(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(TOY, photos, tmp_path)
    before = ending(tmp_path)
    monkeypatch.setattr("cliplet.train.embedder.TorchEmbedder.embed", pytest.fail)
    trained(replace(TOY, seed=1), photos, tmp_path, overwrite=True)
    assert ending(tmp_path) != before
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    trained(TOY, photos, tmp_path, overwrite=True)
    assert ending(tmp_path) == before


def spoilt_row(folder: Path) -> None:
    rows = np.load(folder / "embeddings.npy", mmap_mode="r+")
    rows[7] = np.nan
    rows.flush()


def cut_off(folder: Path) -> None:
    file = folder / "embeddings.npy"
    os.truncate(file, file.stat().st_size // 2)


def of_another_schema(folder: Path) -> None:
    (folder / "embeddings.json").write_text('{"schema": 9}')


@pytest.mark.parametrize("harm", [spoilt_row, cut_off, of_another_schema])
def test_overwriting_mends_embeddings_that_are_damaged(
    harm: Callable[[Path], None], photos: Path, embeddings: Path, tmp_path: Path
) -> None:
    """As the error recommends; where they are shared, it recommends something else."""
    recipe = replace(TOY, epochs=1)
    own = Path(shutil.copytree(embeddings, tmp_path / "run" / "embeddings"))
    harm(own)
    with pytest.raises(ClipletError, match=r"not finite|cannot read .*embeddings.npy|schema 9") as e:
        trained(recipe, photos, tmp_path / "run")
    assert "overwrite" in e.value.fix
    assert trained(recipe, photos, tmp_path / "run", overwrite=True)["images"]["learned"] == 60
    assert np.array_equal(np.load(own / "embeddings.npy"), np.load(embeddings / "embeddings.npy"))
    shared = Path(shutil.copytree(embeddings, tmp_path / "shared"))
    harm(shared)
    with pytest.raises(ClipletError) as e:
        trained(recipe, photos, tmp_path / "other", embeddings=shared, overwrite=True)
    assert e.value.fix.startswith(f"remove {shared}, or name another --embeddings")


def test_shared_embeddings_of_a_changed_collection_name_another_mend(copied: Path, tmp_path: Path) -> None:
    recipe, shared = replace(TOY, epochs=1), tmp_path / "shared"
    trained(recipe, copied, tmp_path / "one", embeddings=shared)
    (copied / "train_000004.jpg").unlink()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"1 file gone \(.*train_000004.jpg") as e:
            trained(recipe, copied, tmp_path / "two", embeddings=shared, overwrite=overwrite)
        assert e.value.fix.startswith(f"remove {shared}, or name another --embeddings")
    shutil.rmtree(shared)
    assert (
        trained(recipe, copied, tmp_path / "two", embeddings=shared, overwrite=True)["images"]["learned"]
        == 59
    )


def test_overwriting_tries_failed_images_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, load = replace(TOY, epochs=1), embeddings_module._load_image

    def fails_once(ref: ImageRef, room: Any) -> Any:
        return ImageError("read", "away") if ref.path.endswith("000005.jpg") else load(ref, room)

    with monkeypatch.context() as patched:
        patched.setattr(embeddings_module, "_load_image", fails_once)
        report = trained(recipe, photos, tmp_path)
    assert list(report["images"]["unreadable"].values()) == ["read: away"]
    again = trained(recipe, photos, tmp_path, overwrite=True)
    assert again["images"] == {"learned": 60, "unreadable": {}}


def test_another_run_is_refused_before_anything_is_embedded(
    finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(finished / "run.json", out)
    monkeypatch.setattr("cliplet.train.embedder.TorchEmbedder.embed", pytest.fail)
    with pytest.raises(UsageError, match=r"another run, which differs in seed \(0 then, 1 now\)"):
        trained(replace(TOY, seed=1), photos, out)
    assert not (out / "embeddings").exists()


def test_a_trunk_that_was_removed_is_written_again(finished: Path, photos: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(out / "trunk")
    trained(TOY, photos, out)
    assert ending(out) == ending(finished)
    next((out / "trunk").glob("*.safetensors")).unlink()
    shutil.rmtree(out / "checkpoint")
    with pytest.raises(UsageError, match=r"has ended, but .*trunk and .*checkpoint are gone") as e:
        trained(TOY, photos, out)
    assert "--overwrite" in e.value.fix


def test_workers_of_0_are_one_a_core_also_while_training(
    photos: Path, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def noted(learning: TrunkLearning) -> None:
        given.append(learning.options.workers)

    monkeypatch.setattr(mlcd, "usable_cores", lambda: 3)
    monkeypatch.setattr(mlcd, "learn", noted)
    trained(replace(TOY, epochs=1), photos, tmp_path, embeddings=embeddings, workers=0)
    assert given == [3]


def test_tiny_is_warned_of_where_images_are_no_drawn_scenes(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = replace(TOY, epochs=1)
    trained(recipe, copied, tmp_path / "scenes")
    assert "the teacher tiny" not in caplog.text
    (copied / "train_000003.jpg").rename(copied / "holiday.jpg")
    trained(recipe, copied, tmp_path / "photos")
    told = [r.getMessage() for r in caplog.records if "the teacher tiny" in r.getMessage()]
    assert len(told) == 1 and "1 images are none" in told[0] and "holiday.jpg" in told[0]


def test_two_runs_at_once_in_one_folder_are_refused(photos: Path, tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    with pytest.raises(UsageError, match="another run is writing"):
        trained(TOY, photos, tmp_path)
    os.close(lock)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"clusters": 61}, DataError, "60 images in 61 clusters"),
        ({"clusters": 3}, DataError, r"60 images in 3 clusters, of which 3 are an image's labels"),
        ({"trunk": "resnet_of_none"}, UsageError, "no trunk 'resnet_of_none'"),
        ({"trunk": "test_vit", "image_size": 30}, UsageError, "images of 30 pixels"),
        (
            {"trunk": "open_clip:ViT-S-32-alt", "trunk_weights": "pretrained"},
            UsageError,
            "pretrained weights",
        ),
        ({"precision": "fp16"}, UsageError, "fp16 on the CPU"),
        ({"loss": "mlc", "threshold": 0.1}, UsageError, "threshold 0.1 with the loss mlc"),
        ({"margin": 3.0}, UsageError, "margin 3.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_trained_is_refused_before_anything_is_embedded(
    change: dict[str, Any], error: type[ClipletError], said: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        trained(replace(TOY, **change), photos, tmp_path)
    assert not (tmp_path / "embeddings").exists()


def test_duplicates_leave_too_few_clusters(copied: Path, tmp_path: Path) -> None:
    files = sorted(copied.glob("*.jpg"))
    for file in files[10:]:
        shutil.copy(files[0], file)
    with pytest.raises(DataError, match="10 different embeddings among 60 images"):
        trained(TOY, copied, tmp_path / "run")


def test_batches_smaller_than_the_processes_are_refused(tmp_path: Path, photos: Path) -> None:
    class Many:
        world_size, is_global_zero = 9, False

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError, match="16 for 9 processes") as e:
        patch.setattr(mlcd, "launched", lambda *_: Many)
        trained(TOY, photos, tmp_path)
    assert e.value.fix == "--batch-size 18"


def test_a_trunk_without_checkpointing_is_refused() -> None:
    with pytest.raises(UsageError, match="the trunk mine has no gradient checkpointing"):
        set_gradient_checkpointing(torch.nn.Linear(1, 1), "mine")


@pytest.mark.parametrize("spoilt", [False, True])
def test_processes_agree_on_an_overflow(spoilt: bool) -> None:
    class Learning:
        centres = ClassCentres(4, 3, TOY.loss_settings())

        class fabric:
            world_size = 1

    gradient = torch.ones(4, 3)
    gradient[1, 2] = math.nan if spoilt else 1
    Learning.centres.centres.grad = gradient
    mlcd_loop._agree_on_overflow(Learning)  # type: ignore[arg-type]
    assert torch.isfinite(gradient).any() == (not spoilt)


def test_the_rate_warms_up_and_falls_as_a_cosine() -> None:
    recipe = replace(TOY, learning_rate=2.0, warmup_steps=10)
    rates = [rate_at(recipe, number, 210) for number in range(210)]
    assert rates[:10] == pytest.approx(np.linspace(0.2, 2, 10))
    assert (
        rates[10] == 2 and rates[110] == pytest.approx(1) and rates[60] == pytest.approx(1 + math.sqrt(0.5))
    )
    assert 0 < rates[-1] < 0.001
    # A short run warms up for a tenth of it.
    assert rate_at(recipe, 4, 50) == 2 and rate_at(recipe, 3, 50) == pytest.approx(1.6)
    assert rate_at(replace(recipe, warmup_steps=0), 0, 50) == 2


def learning_of(count: int, folder: Path) -> TrunkLearning:
    """A run over so many images that has not begun."""
    learner, config = mlcd.new_learner(TOY)
    centres = ClassCentres(12, config.width, TOY.loss_settings())
    images = [ImageRef(f"{i}.jpg", f"{i}.jpg") for i in range(count)]
    labels_NL = np.zeros((count, 3), np.int32)
    return TrunkLearning(TOY, one_process(), learner, centres, images, labels_NL, folder, RunOptions())


def test_a_batch_of_one_image_joins_the_one_before(tmp_path: Path) -> None:
    assert [len(batch) for batch in learning_of(33, tmp_path).batches()] == [16, 17]
    assert [len(batch) for batch in learning_of(34, tmp_path).batches()] == [16, 16, 2]


def test_biases_and_norms_do_not_decay(tmp_path: Path) -> None:
    learning = learning_of(20, tmp_path)
    decays = {
        id(p): group["weight_decay"] for group in learning.optimizer.param_groups for p in group["params"]
    }
    named = dict(learning.learner.named_parameters())
    assert len(decays) == len(named)
    for name, parameter in named.items():
        assert decays[id(parameter)] == (TOY.weight_decay if parameter.ndim > 1 else 0), name
    assert learning.centres_optimizer.param_groups[0]["weight_decay"] == TOY.weight_decay


# Recipes


def test_every_field_is_read_and_described() -> None:
    folder = Path(mlcd_loop.__file__).parent
    sources = [(folder / name).read_text() for name in ("mlcd.py", "mlcd_loop.py")]
    read = attributes_read(sources, ["recipe"]) | attributes_read([inspect.getsource(mlcd_recipe)], ["self"])
    for field in fields(MlcdRecipe):
        assert field.name in read, f"nothing reads {field.name}"
        assert field.name in str(MlcdRecipe.__doc__), f"{field.name} is not described"


@pytest.mark.parametrize("name", CHOICES)
def test_a_word_that_is_no_choice_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} 'other' in a recipe"):
        replace(TOY, **{name: "other"})


@pytest.mark.parametrize("name", RANGES)
def test_a_number_out_of_its_range_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is"):
        replace(TOY, **{name: RANGES[name][0] - 1})


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_bring_what_belongs_to_them(loss: str) -> None:
    settings = mlcd_recipe.mlcd_recipe(loss).loss_settings()
    assert (settings.kind, settings.angle) == (loss, 0.3 if loss == "unicom" else 0)
    assert settings.scale == (4 if loss == "mlcd" else 8)
    assert (settings.negative_rate, settings.positives) == (0.1, 8)


@pytest.mark.parametrize(
    ("changes", "images", "clusters"),
    [
        ({}, 4000, 200),
        ({}, 100, 9),
        ({"clusters": 50}, 100, 50),
        ({"clusters": 100}, 100, 100),
        ({"loss": "unicom"}, 30, 2),
        ({}, 8, None),
        ({"clusters": 8}, 100, None),
        ({"clusters": 101}, 100, None),
    ],
)
def test_number_of_clusters(changes: dict[str, Any], images: int, clusters: int | None) -> None:
    recipe = replace(mlcd_recipe.mlcd_recipe("mlcd"), **changes)
    if clusters is not None:
        assert recipe.clusters_of(images) == clusters
        return
    with pytest.raises(DataError, match=f"{images} images") as e:
        recipe.clusters_of(images)
    assert e.value.expected == "at least as many images as clusters, and more clusters than labels"
    words = e.value.fix.split()
    mended = replace(recipe, clusters=int(words[1]), positives=int(words[3]))
    assert mended.clusters_of(images) == int(words[1])


def test_one_image_cannot_be_clustered_however_it_is_asked() -> None:
    with pytest.raises(DataError, match="1 images in 9 clusters") as e:
        mlcd_recipe.mlcd_recipe("mlcd").clusters_of(1)
    assert "--clusters" not in e.value.fix and "more images" in e.value.fix


# Students

VOCABULARY = Vocabulary((ClassName("cat"), ClassName("dog"), ClassName("bus")))


def student_of(trunk: Path, **changes: Any) -> Any:
    return replace(CCD, **{"trunk": f"mlcd:{trunk}", "trunk_weights": "pretrained", **changes})


def test_a_student_starts_from_the_trunk_and_outlives_its_folder(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished / "trunk", tmp_path / "trunk"))
    wanted = load_trunk(folder)[0].state_dict()
    recipe = student_of(folder)
    classifier = new_classifier(recipe, VOCABULARY)
    found = classifier.trunk.state_dict()
    assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)
    assert classifier.config.trunk == "test_resnet" and classifier.config.tower is None
    assert classifier.config.preprocessing == student_input(recipe)
    assert classifier.config.preprocessing.size == CCD.image_size
    save_classifier(tmp_path / "classifier", classifier)
    shutil.rmtree(folder)
    again = load_classifier(tmp_path / "classifier").trunk.state_dict()
    assert all(again[name].equal(wanted[name]) for name in wanted)


def test_a_student_is_fed_as_its_trunk(finished: Path, tmp_path: Path) -> None:
    trunk, config = load_trunk(finished / "trunk")
    fed = replace(config.preprocessing, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_trunk(tmp_path, trunk, replace(config, preprocessing=fed))
    found = student_input(student_of(tmp_path, image_size=64))
    assert (found.mean, found.std, found.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64)
    assert student_input(student_of(tmp_path, trunk_weights="random")).mean == (0.1, 0.2, 0.3)


def test_learned_positions_are_fitted_to_the_student(embeddings: Path, photos: Path, tmp_path: Path) -> None:
    trained(replace(TOY, trunk="test_vit", epochs=1), photos, tmp_path, embeddings=embeddings)
    learned = load_trunk(tmp_path / "trunk")[0].state_dict()
    found = new_classifier(student_of(tmp_path / "trunk", image_size=64), VOCABULARY).trunk.state_dict()
    assert learned["pos_embed"].shape[1] == 5 and found["pos_embed"].shape[1] == 17
    others = [name for name in learned if name != "pos_embed"]
    assert all(found[name].equal(learned[name]) for name in others)
    classifier = new_classifier(student_of(tmp_path / "trunk", image_size=32), VOCABULARY)
    assert classifier.trunk.state_dict()["pos_embed"].equal(learned["pos_embed"])


def test_what_starts_no_student_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trunk_weights 'teacher' with the trunk mlcd:"):
        new_classifier(replace(student_of(finished / "trunk"), trunk_weights="teacher"), VOCABULARY)
    trunk, config = load_trunk(finished / "trunk")
    save_trunk(tmp_path / "tower", trunk, replace(config, trunk="open_clip:RN50"))
    with pytest.raises(UsageError, match="holds the image tower open_clip:RN50"):
        new_classifier(student_of(tmp_path / "tower"), VOCABULARY)
    shutil.copytree(finished / "trunk", tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").glob("*.safetensors")
    file.write_bytes(b"")
    with pytest.raises(ArtifactError, match="was changed"):
        new_classifier(student_of(tmp_path / "damaged"), VOCABULARY)


@pytest.mark.parametrize("name", ["mlcd:{}", "{}", "{}/trunk"])
def test_a_trunk_by_a_wrong_name_is_told_its_own(name: str, finished: Path) -> None:
    wrong = name.format(finished)
    with pytest.raises(UsageError, match="is the folder of a (run|trunk), wh") as e:
        new_classifier(replace(CCD, trunk=wrong, trunk_weights="pretrained"), VOCABULARY)
    assert e.value.fix == f"name mlcd:{finished / 'trunk'} instead of {wrong}"
    if not name.endswith("trunk"):
        with pytest.raises(UsageError) as e:
            load_encoder(wrong)
        assert e.value.fix == f"name mlcd:{finished / 'trunk'} instead of {wrong}"
        if wrong.startswith("mlcd:"):
            with pytest.raises(UsageError, match="is the folder of a run"):
                trunk_sha256(replace(CCD, trunk=wrong, trunk_weights="pretrained"))
    assert load_encoder(f"{finished / 'trunk'}").preprocessing.size == 32


def test_a_run_knows_the_weights_it_started_from(finished: Path, tmp_path: Path) -> None:
    recipe = student_of(finished / "trunk")
    hash_ = trunk_sha256(recipe)
    assert hash_ == trunk_details(finished / "trunk")["sha256"] and trunk_sha256(CCD) is None
    assert begin_run(recipe, [], tmp_path, True, hash_) is None
    assert json.loads((tmp_path / "run.json").read_text())["trunk"] == hash_
    assert begin_run(recipe, [], tmp_path, True, hash_) is None
    with pytest.raises(UsageError, match="differs in the weights of the trunk's folder"):
        begin_run(recipe, [], tmp_path, True, "other")
