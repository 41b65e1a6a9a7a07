"""The images of a run: a data set that is there, or scenes that are made for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from cliplet.datasets import Dataset, open_dataset
from cliplet.errors import DataError, UsageError
from cliplet.progress import ProgressBar
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world
from cliplet.vocabulary import Vocabulary

from .classifier_recipe import ClassifierRecipe
from .feed import SMALLEST_BATCH

SCENES_SEED = 7  # `tiny` learned from the scenes of seed 0
SCENE_WORKERS = 2


@dataclass(frozen=True)
class DataOptions:
    """Where a run finds its images.

    Attributes:
        root: the data set's folder; None makes scenes for recipes of the scene world.
        vocabulary: class names, where the data brings none or others are wanted.
        check_counts: refuse public data sets of another size than the official one.
    """

    root: Path | None = None
    vocabulary: Vocabulary | None = None
    check_counts: bool = True


def run_data(
    recipe: ClassifierRecipe, out: Path, options: DataOptions, fabric: Fabric, quiet: bool
) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation images; the latter None where the recipe names no split for them."""
    root = options.root
    if root is None:
        if recipe.dataset != "scenes":
            raise UsageError(
                f"recipe for {recipe.dataset} without --root", "the data set's folder", "--root FOLDER"
            )
        root = out / "scenes"
        if fabric.is_global_zero:
            make_scenes(recipe, root, quiet)
        fabric.barrier()
    settings: dict[str, Any] = {
        "vocabulary": options.vocabulary,
        "difficult": recipe.difficult,
        "check_counts": options.check_counts,
    }
    data = open_dataset(recipe.dataset, root, recipe.train_split, **settings)
    if options.root is None:
        _refuse_other_scenes(data, recipe.train_scenes, "train_scenes", root)
    if not recipe.eval_split:
        return data, None
    evaluation = open_dataset(recipe.dataset, root, recipe.eval_split, **settings)
    if options.root is None:
        _refuse_other_scenes(evaluation, recipe.eval_scenes, "eval_scenes", root)
    return data, evaluation if evaluation.truth_NC is not None else None


def _refuse_other_scenes(data: Dataset, wanted: int, field: str, root: Path) -> None:
    if len(data.images) != wanted:
        raise UsageError(
            f"{root} holds {len(data.images)} scenes of an earlier run",
            f"the {wanted} of this recipe's {field}",
            f"remove {root}, or choose another --out",
        )


def make_scenes(recipe: ClassifierRecipe, root: Path, quiet: bool = False) -> None:
    """The recipe's scenes in `root`, unless they are there."""
    if root.is_dir():
        return
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts = {recipe.train_split: recipe.train_scenes, recipe.eval_split: recipe.eval_scenes}
    with ProgressBar("scenes", sum(counts.values()), "scenes", quiet=quiet) as bar:
        for part, count in counts.items():
            world = scene_world(part, seed=SCENES_SEED)
            write_scenes(world, partial, count, workers=SCENE_WORKERS, progress=bar.advance)
    partial.rename(root)


def refuse_too_few(learned: int, held_out: int, batch: int, unreadable: Mapping[str, str]) -> None:
    """Raise `DataError` unless there are two batches of images to learn from.

    Args:
        learned, held_out: how many images are learned from, and are kept for the choice of an epoch.
        unreadable: those that are neither: path to reason.
    """
    if learned >= 2 * batch:
        return
    lost = "".join(f"; {path}: {reason}" for path, reason in list(unreadable.items())[:1])
    # What a usual share of held-out images would leave, where nearly all are held out.
    possible = round(0.9 * (learned + held_out)) if held_out > learned else learned
    mends = ["--set held_out=0.1"] if held_out > learned else []
    if 2 * SMALLEST_BATCH <= possible < 2 * batch:
        mends.append(f"--batch-size {possible // 2}")
    raise DataError(
        f"{learned} images to learn from beside {held_out} held out, {len(unreadable)} could not be read{lost}",
        f"at least two batches of {batch}",
        " ".join(mends) if possible >= 2 * SMALLEST_BATCH else "choose more images that can be decoded",
    )
