"""Training that is stopped at any moment ends as an undisturbed run does, to the bit; and what stops it says why."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from runs import STEPS, TOY, TOY_ARGUMENTS, ending, killed_at, killed_runs, toy_scenes, trained

from cliplet.checkpoint import load_arrays, load_details
from cliplet.classifier import Classifier, ClassifierConfig
from cliplet.datasets import open_dataset
from cliplet.errors import DataError
from cliplet.train import loop
from cliplet.train.classifier_recipe import ClassifierRecipe
from cliplet.train.feed import ImageBatch, PixelCache
from cliplet.train.jitter import seed_layers
from cliplet.train.loop import Learning, RunOptions, read_back_precision, train_step
from cliplet.train.objectives import Ccd, Objective
from cliplet.train.recipes import with_method
from cliplet.train.world import launched
from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

STEP = "cliplet.train.loop:train_step"
SAVE = "cliplet.train.loop:Learning.save"
BANK = "cliplet.train.label_bank:LabelBank.write"
UPDATE = "cliplet.train.objectives:Cdul.update"
MEASURE = "cliplet.train.measuring:Watch.measure"
KEPT = "cliplet.train.measuring:save_classifier"
RELEASED = {"selection": "released", "held_out": 0.0, "threshold_search": "walk", "box_rule": "first_last"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the teacher said, asked once for all tests that need not ask."""
    return tmp_path_factory.mktemp("banks")


@pytest.fixture(scope="module")
def undisturbed(scenes: Path, banks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed")
    trained(TOY, out, scenes, banks=banks, checkpoint_steps=2)
    return ending(out)


@pytest.fixture
def learning(scenes: Path, tmp_path: Path) -> Iterator[Learning]:
    yield learning_of(replace(TOY, method="bce"), scenes, tmp_path)


def learning_of(recipe: ClassifierRecipe, scenes: Path, folder: Path) -> Learning:
    """A run with true labels and random weights, before its first step."""
    data = open_dataset("scenes", scenes, "train")
    assert data.truth_NC is not None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fed = Preprocessing(recipe.image_size, IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")
    config = ClassifierConfig(trunk=recipe.trunk, boost=recipe.boost, preprocessing=fed)
    classifier = Classifier(config, data.vocabulary)
    fabric = launched(recipe.precision, "cpu", folder)
    objective = Objective(recipe, data.truth_NC)
    return Learning(
        recipe, fabric, objective, classifier, data, np.arange(len(data.images)), folder, RunOptions()
    )


def batch_of(learning: Learning, count: int) -> ImageBatch:
    indices, size = np.arange(count), learning.recipe.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return ImageBatch(indices, pixels, indices, ())


@pytest.mark.parametrize(
    ("method", "settings", "moments"),
    [
        # Within an epoch, within the label update, before that is kept, after an epoch, within the last one.
        ("ccd", {}, [(STEP, 3), (BANK, 1), (SAVE, 1), (SAVE, 3), (STEP, 2)]),
        ("ccd", {"precision": "bf16"}, [(STEP, 3), (BANK, 1), (SAVE, 3)]),
        ("ccd", {"average": 0.9}, [(STEP, 3), (BANK, 1), (STEP, 3), (KEPT, 1)]),
        ("ccd", RELEASED, [(BANK, 1), (STEP, 3)]),
        ("cdul", {}, [(UPDATE, 1), (STEP, 2), (SAVE, 2), (STEP, 3)]),
        ("role", {}, [(STEP, 3), (MEASURE, 1), (STEP, 3)]),
        ("ll_cp", {"large_loss_percent": 5.0}, [(STEP, 3), (STEP, 3), (STEP, 3)]),
    ],
)
def test_stopped_run_ends_as_an_undisturbed_one(
    method: str,
    settings: dict[str, Any],
    moments: list[tuple[str, int]],
    scenes: Path,
    banks: Path,
    tmp_path: Path,
) -> None:
    recipe = replace(with_method(TOY, method), **settings)
    options = {"banks": banks, "checkpoint_steps": 2}
    trained(recipe, tmp_path / "whole", scenes, **options)
    for where, count in moments:
        with killed_at(where, count):
            trained(recipe, tmp_path / "stopped", scenes, **options)
    trained(recipe, tmp_path / "stopped", scenes, **options)
    assert ending(tmp_path / "stopped") == ending(tmp_path / "whole")


def test_stopped_run_of_a_trunk_with_random_depth_ends_as_an_undisturbed_one(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers draw from torch's own generator, of which a checkpoint holds nothing."""
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: original(*a, **k, drop_path_rate=0.5))
    recipe = with_method(replace(TOY, trunk="test_convnext", trunk_weights="random"), "bce")
    trained(recipe, tmp_path / "whole", scenes, checkpoint_steps=2)
    for moment in [(STEP, 4), (STEP, 3)]:
        with killed_at(*moment):
            trained(recipe, tmp_path / "stopped", scenes, checkpoint_steps=1)
        torch.manual_seed(1234)  # as if another process went on
    trained(recipe, tmp_path / "stopped", scenes, checkpoint_steps=1)
    assert ending(tmp_path / "stopped") == ending(tmp_path / "whole")
    # And depth is random at all: without it the run ends elsewhere.
    monkeypatch.setattr(timm, "create_model", original)
    trained(recipe, tmp_path / "full", scenes, checkpoint_steps=2)
    assert ending(tmp_path / "full")["history"] != ending(tmp_path / "whole")["history"]


def test_processes_and_steps_draw_other_layers() -> None:
    drawn = set()
    for seed, epoch, step, rank in itertools.product(range(2), repeat=4):
        seed_layers(seed, epoch, step, rank)
        drawn.add(float(torch.rand(1)))
    assert len(drawn) == 16


def test_labels_of_ll_cp_change_within_an_epoch(scenes: Path, banks: Path, tmp_path: Path) -> None:
    """Else the table above would not show that a checkpoint in the middle of an epoch holds them."""
    recipe = replace(with_method(TOY, "ll_cp"), large_loss_percent=5.0)
    sums = []
    for count in (3, 5):
        with killed_at(STEP, count):
            trained(recipe, tmp_path / str(count), scenes, banks=banks, checkpoint_steps=1)
        sums.append(load_arrays(tmp_path / str(count) / "checkpoint", "checkpoint")[0]["array.labels"].sum())
    assert sums[1] > sums[0] >= 36


def test_run_killed_by_the_system_goes_on(scenes: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL while the teacher answers, within an epoch, while regions are scored, after an epoch's last step."""
    moments = [(BANK, 1), (STEP, 3), (BANK, 1), (SAVE, 3)]
    arguments = ["train", "scenes_ccd", "--root", scenes, "--out", tmp_path, "--quiet", *TOY_ARGUMENTS]
    assert killed_runs(moments, *arguments) == [-signal.SIGKILL] * len(moments)
    progress = load_details(tmp_path / "checkpoint", "checkpoint")["progress"]
    assert (progress["epoch"], progress["step"], progress["updated"]) == (1, 2, 1)
    assert not (tmp_path / "report.json").exists()
    trained(TOY, tmp_path, scenes, checkpoint_steps=2)
    assert ending(tmp_path) == undisturbed


def test_nothing_of_how_it_is_carried_out_changes_what_it_ends_with(
    scenes: Path, banks: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    trained(TOY, tmp_path, scenes, workers=3, checkpoint_steps=1, cache=PixelCache(10**8), banks=banks)
    assert ending(tmp_path) == undisturbed


def test_images_that_vanish_are_named_and_training_goes_on(
    scenes: Path, banks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = copied(scenes, tmp_path)
    gone = [moved / "JPEGImages" / f"train_{i:06d}.jpg" for i in range(5)]

    def vanishing(learning: Learning, batch: ImageBatch, wanted: int, step: int) -> float:
        for file in gone:
            file.unlink(missing_ok=True)
        return train_step(learning, batch, wanted, step)

    monkeypatch.setattr(loop, "train_step", vanishing)
    report = trained(TOY, tmp_path / "run", moved, workers=0)
    assert set(report["skipped"]) == set(map(str, gone))
    assert all(reason.startswith("read: ") for reason in report["skipped"].values())
    assert report["images"] == {"learned": 36, "held_out": 4, "unreadable": {}}
    assert np.isfinite([row["loss"] for row in report["history"]]).all()


def test_batch_without_any_image_stops_the_run_until_they_are_back(
    scenes: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    moved = copied(scenes, tmp_path)
    with killed_at(STEP, STEPS + 3):
        trained(TOY, tmp_path / "run", moved, checkpoint_steps=2)
    (moved / "JPEGImages").rename(moved / "elsewhere")
    (moved / "JPEGImages").mkdir()
    # Its first image is where the data set looks for them all.
    first = "train_000000.jpg"
    os.link(moved / "elsewhere" / first, moved / "JPEGImages" / first)
    os.link(moved / "elsewhere" / "test-seen_000000.jpg", moved / "JPEGImages" / "test-seen_000000.jpg")
    with pytest.raises(
        DataError, match=r"no image of a batch of 4 could be read; .*train_0000\d\d.jpg: read"
    ) as e:
        trained(TOY, tmp_path / "run", moved, checkpoint_steps=2)
    assert "run the same command again" in e.value.fix
    (moved / "JPEGImages" / first).unlink()
    (moved / "JPEGImages" / "test-seen_000000.jpg").unlink()
    (moved / "JPEGImages").rmdir()
    (moved / "elsewhere").rename(moved / "JPEGImages")
    trained(TOY, tmp_path / "run", moved, checkpoint_steps=2)
    assert ending(tmp_path / "run") == undisturbed


def copied(scenes: Path, folder: Path) -> Path:
    """The scenes once more, to be damaged; files that are removed stay where they come from."""
    for file in (f for f in scenes.rglob("*") if f.is_file()):
        target = folder / "scenes" / file.relative_to(scenes)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, target)
    return folder / "scenes"


def test_loss_that_is_not_finite_names_the_images_and_spares_the_checkpoint(
    scenes: Path,
    banks: Path,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original: Callable[..., torch.Tensor] = Ccd.loss
    calls: list[np.ndarray] = []

    def broken(self: Ccd, step: Any) -> torch.Tensor:
        calls.append(step.indices_B)
        return original(self, step) * (torch.nan if len(calls) == STEPS + 3 else 1)

    with monkeypatch.context() as patch, pytest.raises(DataError) as e:
        patch.setattr(Ccd, "loss", broken)
        trained(TOY, tmp_path, scenes, banks=banks, checkpoint_steps=2)
    assert e.value.happened.startswith("the loss of epoch 2, step 3 is not finite; its images: ")
    assert e.value.happened.count(".jpg") == len(calls[-1]) == 4
    assert all(f"train_{i:06d}.jpg" in e.value.happened for i in calls[-1])
    progress = load_details(tmp_path / "checkpoint", "checkpoint")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    trained(TOY, tmp_path, scenes, banks=banks, checkpoint_steps=2)
    assert ending(tmp_path) == undisturbed


def test_learning_rate_that_explodes_is_told(scenes: Path, banks: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="loss of epoch 1, step 2 is not finite"):
        trained(replace(TOY, learning_rate=1e30), tmp_path, scenes, banks=banks)
    assert not (tmp_path / "classifier").exists()


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_accumulated_gradient(learning: Learning, batch_statistics: bool) -> None:
    """It is the whole batch's where batch normalisation has fixed statistics, and another where it computes them."""
    gradients = []
    for accumulate in (1, 2):
        learning.recipe = replace(learning.recipe, accumulate=accumulate)
        gradients.append(gradient_of_a_step(learning, batch_statistics))
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert (difference > 0.01) if batch_statistics else (difference < 1e-4)


@pytest.mark.parametrize(("images", "accumulate"), [(8, 2), (7, 2), (5, 3), (3, 8)])
def test_accumulated_parts_of_other_sizes_weigh_by_their_images(
    learning: Learning, images: int, accumulate: int
) -> None:
    whole = gradient_of_a_step(learning, False, images)
    learning.recipe = replace(learning.recipe, accumulate=accumulate)
    torch.testing.assert_close(gradient_of_a_step(learning, False, images), whole, rtol=1e-3, atol=1e-6)


def gradient_of_a_step(learning: Learning, batch_statistics: bool, images: int = 8) -> torch.Tensor:
    """The gradient that a step hands to the optimiser, which does nothing with it."""
    found = []

    def noted() -> None:
        found.append(torch.cat([p.grad.flatten() for p in learning.learner.parameters()]))

    learning.learner.train(batch_statistics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning.optimizer, "step", noted)
        train_step(learning, batch_of(learning, images), images, 0)
    return found[0]


def test_step_is_adams_on_the_mean_loss(learning: Learning) -> None:
    """Once more with torch alone: plain view, BCE, Adam with the head's rate ten times the trunk's."""
    twin = learning_of(
        learning.recipe, Path(learning.data.images[0].path).parents[1], learning.folder
    ).classifier
    batch = batch_of(learning, 6)
    learning.learner.train()
    loss = train_step(learning, batch, 6, 0)
    draws = torch.rand(6, generator=torch.Generator().manual_seed(0)) < 0.5
    pixels = torch.from_numpy(batch.pixels_BSS3).permute(0, 3, 1, 2) / 255
    pixels[draws] = pixels[draws].flip(3)
    assert learning.data.truth_NC is not None
    truth = torch.from_numpy(learning.data.truth_NC[:6].astype(np.float32))
    twin.train()
    logits, _ = twin(pixels.contiguous(memory_format=torch.channels_last))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
    expected.backward()
    rate = learning.recipe.learning_rate
    adam = torch.optim.Adam(
        [{"params": twin.trunk.parameters()}, {"params": twin.head.parameters(), "lr": 10 * rate}], lr=rate
    )
    adam.step()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    learned = dict(learning.learner.classifier.named_parameters())
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        # Adam's first step follows the gradient's sign, which rounding decides where the gradient is nothing.
        clear = parameter.grad.abs() > 1e-5
        torch.testing.assert_close(learned[name][clear], parameter[clear], rtol=0, atol=rate / 50, msg=name)


def test_average_is_the_exponential_one_of_all_steps(
    scenes: Path, banks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []

    def noted(learning: Learning, batch: ImageBatch, wanted: int, step: int) -> float:
        loss = train_step(learning, batch, wanted, step)
        weights.append(learning.learner.classifier.head.weight.detach().clone())
        return loss

    monkeypatch.setattr(loop, "train_step", noted)
    recipe = replace(TOY, method="an", average=0.75, selection="last")
    trained(recipe, tmp_path, scenes, banks=banks)
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.75 * expected + 0.25 * weight
    kept = load_arrays(tmp_path / "classifier", "classifier")[0]["head.weight"]
    assert len(weights) == 3 * STEPS
    np.testing.assert_allclose(kept, expected.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_precision_is_read_back(scenes: Path, tmp_path: Path, precision: str, average: float) -> None:
    recipe = replace(TOY, method="bce", precision=precision, average=average)
    assert read_back_precision(learning_of(recipe, scenes, tmp_path)) == precision


def test_other_precision_than_asked_for_is_refused(learning: Learning) -> None:
    learning.recipe = replace(learning.recipe, precision="bf16")
    with pytest.raises(DataError, match="training computes in fp32"):
        read_back_precision(learning)
