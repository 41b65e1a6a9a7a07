"""Two processes do together what one does: the same questions, the same labels, one classifier, also after a kill."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import TOY, TOY_ARGUMENTS, ending, run_of_two, toy_scenes, trained

from cliplet.checkpoint import load_details
from cliplet.classifier import Classifier, ClassifierConfig, load_classifier
from cliplet.datasets import open_dataset
from cliplet.errors import EnvironmentError_, UsageError
from cliplet.train import train_classifier
from cliplet.train.feed import ImageBatch, share_of
from cliplet.train.label_bank import LabelBank
from cliplet.train.loop import Learning, RunOptions, train_step
from cliplet.train.objectives import Objective
from cliplet.train.world import averaged_buffers, gathered, is_first_process, launched, summed
from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

BROKEN = ("train_000003.jpg", "train_000031.jpg")  # one in each process's half


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy_scenes(tmp_path_factory.mktemp("data"))
    for name in BROKEN:
        (folder / "JPEGImages" / name).write_text("no image")
    return folder


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone")
    trained(TOY, out, scenes)
    return out


@pytest.fixture(scope="module")
def together(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same run of two processes, and what they printed."""
    out = tmp_path_factory.mktemp("together")
    ended = of_two(scenes, out, [])
    assert ended.returncode == 0, ended.stderr
    return out, ended.stdout


def of_two(scenes: Path, out: Path, moments: list[tuple[str, int]]) -> subprocess.CompletedProcess[str]:
    arguments = ["train", "scenes_ccd", "--root", scenes, "--out", out, *TOY_ARGUMENTS]
    return run_of_two(out, moments, *arguments)


def asked(out: Path) -> tuple[dict[str, np.ndarray], int]:
    """What the teacher said of the whole images, by path, and in how many banks that is."""
    found: dict[str, np.ndarray] = {}
    banks = 0
    for folder in (out / "banks").iterdir():
        bank = LabelBank.read(folder)
        if "regions" not in bank.provenance:
            banks += 1
            found |= {p: row for p, row, done in zip(bank.paths, bank.probs, bank.done, strict=True) if done}
    return found, banks


def test_two_processes_share_the_work_of_one(alone: Path, together: tuple[Path, str]) -> None:
    out, told = together
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (alone, out))
    assert (one["processes"], two["processes"]) == (1, 2)
    (rows, banks), (rows_of_two, banks_of_two) = asked(alone), asked(out)
    assert (banks, banks_of_two) == (1, 2)
    assert rows.keys() == rows_of_two.keys()
    assert len(rows) == 40 - len(BROKEN)
    for path, row in rows.items():
        np.testing.assert_allclose(rows_of_two[path], row, rtol=1e-3, atol=1e-5)
    assert two["labels"]["per_image"] == pytest.approx(one["labels"]["per_image"], rel=1e-4)
    assert two["labels"]["label_map"] == pytest.approx(one["labels"]["label_map"], abs=0.5)
    assert two["images"] == one["images"]
    assert sorted(Path(p).name for p in two["images"]["unreadable"]) == sorted(BROKEN)
    # Batch normalisation sees half a batch in each, so what is learned is alike, not the same.
    losses = [[row["loss"] for row in report["history"]] for report in (one, two)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.15)
    assert two["measured"]["map"] == pytest.approx(one["measured"]["map"], abs=20)
    load_classifier(out / "classifier")
    assert told.count("a classifier in") == 1


def test_two_processes_killed_within_an_epoch_go_on(
    scenes: Path, together: tuple[Path, str], tmp_path: Path
) -> None:
    killed = of_two(scenes, tmp_path, [("cliplet.train.loop:train_step", 6)])
    assert killed.returncode == 1
    progress = load_details(tmp_path / "checkpoint", "checkpoint")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    assert progress["images"] == 32  # those of both
    ended = of_two(scenes, tmp_path, [])
    assert ended.returncode == 0, ended.stderr
    assert ending(tmp_path) == ending(together[0])


class OneOfSome:
    """Fabric as the process `rank` of `world` has it, without the others."""

    def __init__(self, fabric: Any, rank: int, world: int) -> None:
        self.fabric, self.global_rank, self.world_size = fabric, rank, world

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fabric, name)


@pytest.fixture
def learning(scenes: Path, tmp_path: Path) -> Learning:
    """A run with true labels and random weights, before its first step."""
    data = open_dataset("scenes", scenes, "train")
    assert data.truth_NC is not None
    recipe = replace(TOY, method="bce", batch=8)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fed = Preprocessing(recipe.image_size, IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")
    config = ClassifierConfig(trunk=recipe.trunk, boost=recipe.boost, preprocessing=fed)
    classifier = Classifier(config, data.vocabulary)
    fabric = launched("fp32", "cpu", tmp_path)
    indices = np.arange(len(data.images))
    objective = Objective(recipe, data.truth_NC)
    return Learning(recipe, fabric, objective, classifier, data, indices, tmp_path, RunOptions())


@pytest.mark.parametrize(("images", "world"), [(8, 2), (7, 2), (7, 3), (4, 4)])
def test_mean_of_the_processes_gradients_is_that_of_the_batch(
    learning: Learning, images: int, world: int
) -> None:
    """With fixed statistics of batch normalisation; each image keeps its own flip, whoever has it."""
    fabric, size = learning.fabric, learning.recipe.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
    gradients: list[torch.Tensor] = []

    def noted() -> None:
        found = [p.grad.flatten() for p in learning.learner.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))

    learning.learner.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning.optimizer, "step", noted)
        for rank, count in [(0, 1), *((r, world) for r in range(world))]:
            own = share_of(np.arange(images), rank, count)
            learning.fabric = OneOfSome(fabric, rank, count)
            batch = ImageBatch(own, pixels[own], np.arange(len(own)), ())
            train_step(learning, batch, images, 0)
    whole, *parts = gradients
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_process_has_an_image_of_every_batch(learning: Learning, world: int) -> None:
    learning.indices = np.arange(8 * 4 + 3)
    learning.fabric = OneOfSome(learning.fabric, 0, world)
    shares = [share_of(batch, rank, world) for batch in learning.batches() for rank in range(world)]
    assert min(map(len, shares)) >= 1
    assert sorted(np.concatenate(shares)) == list(range(35))


def test_fewer_images_a_batch_than_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabric = SimpleNamespace(world_size=32, is_global_zero=False)
    monkeypatch.setattr(train_classifier, "launched", lambda *_: fabric)
    with pytest.raises(UsageError, match="batches of 16 for 32 processes") as e:
        trained(TOY, tmp_path, None)
    assert e.value.fix == "--batch-size 32"


def test_one_process_shares_with_nobody(tmp_path: Path) -> None:
    fabric = launched("fp32", "cpu", tmp_path)
    array = np.arange(3)
    assert summed(fabric, array) is array
    assert gathered(fabric, ["a"]) == ["a"]
    norm = torch.nn.BatchNorm2d(2)
    averaged_buffers(fabric, norm)
    assert norm.running_var is not None
    assert norm.running_var.tolist() == [1, 1]


@pytest.mark.parametrize(("rank", "first"), [(None, True), ("0", True), ("1", False)])
def test_first_process_speaks(rank: str | None, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_first_process() == first


def test_float16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp16 on the CPU"):
        launched("fp16", "cpu", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_told(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_, match="no usable GPU"):
        launched("fp32", "cuda", tmp_path)
