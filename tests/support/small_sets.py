"""Data sets of a few made-up images, and the parts of a run that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from helpers import picture
from lightning_fabric import Fabric
from PIL import Image

from cliplet.datasets import Dataset
from cliplet.listing import ImageRef
from cliplet.train.classifier_recipe import ClassifierRecipe
from cliplet.train.loop import Learning, RunOptions
from cliplet.train.objectives import Objective
from cliplet.train.train_classifier import new_classifier
from cliplet.vocabulary import Vocabulary


def image_set(
    folder: Path, sizes: Sequence[tuple[int, int]], vocabulary: Vocabulary, truth_NC: np.ndarray | None = None
) -> Dataset:
    """PNGs of the given (width, height), each with its own content."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        Image.fromarray(picture(*size, seed=100 + i)).save(folder / f"{i:02d}.png")
    images = tuple(ImageRef(f"{i:02d}.png", str(folder / f"{i:02d}.png")) for i in range(len(sizes)))
    return Dataset("folder", "all", vocabulary, images, truth_NC, ())


def one_process() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def learning_of(recipe: ClassifierRecipe, data: Dataset, objective: Objective, folder: Path) -> Learning:
    """A run of these images that has not begun."""
    classifier = new_classifier(recipe, data.vocabulary)
    return Learning(
        recipe,
        one_process(),
        objective,
        classifier,
        data,
        np.arange(len(data.images)),
        folder,
        RunOptions(workers=1, quiet=True),
    )
