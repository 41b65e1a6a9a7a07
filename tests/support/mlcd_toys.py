"""Runs of `cliplet train mlcd` that take a second, and what they end with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cliplet.checkpoint import load_arrays
from cliplet.images import find_images
from cliplet.listing import ImageRef
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world
from cliplet.train.loop import RunOptions
from cliplet.train.mlcd import MlcdOptions, train_mlcd
from cliplet.train.mlcd_recipe import MlcdRecipe, mlcd_recipe

# Batches of 16, 16, 16 and 12: four steps an epoch.
IMAGES, STEPS = 60, 4
TOY = replace(
    mlcd_recipe("mlcd"),
    clusters=12,
    positives=3,
    negative_rate=0.5,
    trunk="test_resnet",
    image_size=32,
    epochs=2,
    batch=16,
    precision="fp32",
    # In eight steps, the loss falls visibly with a larger scale only.
    scale=16.0,
)
# The same by `cliplet train mlcd`.
TOY_ARGUMENTS = [
    *("--clusters", "12", "--positives", "3", "--negative-rate", "0.5", "--trunk", "test_resnet"),
    *("--image-size", "32", "--epochs", "2", "--batch-size", "16", "--precision", "fp32"),
    *("--set", "scale=16"),
    *("--threads", "1", "--workers", "1"),
]


def toy_photos(folder: Path) -> Path:
    """A folder of sixty images without labels."""
    done = write_scenes(scene_world("train", seed=3), folder / "scenes", IMAGES, workers=1)
    return done.images


def images_in(photos: Path) -> Sequence[ImageRef]:
    return find_images([str(photos)]).images


def trained(recipe: MlcdRecipe, photos: Path, out: Path, **more: Any) -> dict[str, Any]:
    """The report of a run on one thread, with the options of `RunOptions` and `MlcdOptions` by their names."""
    run = {name: more.pop(name) for name in list(more) if name in RunOptions.__dataclass_fields__}
    options = MlcdOptions(threads=1, run=RunOptions(**{"workers": 1, "quiet": True, **run}), **more)
    return train_mlcd(recipe, images_in(photos), out, options)


def ending(out: Path) -> dict[str, Any]:
    """All that a run ends with, to the bit, besides the time that it took."""
    report = json.loads((out / "report.json").read_text())
    timed = ("seconds", "images_per_second")
    found: dict[str, Any] = {
        "history": [{k: v for k, v in row.items() if k not in timed} for row in report["history"]]
    }
    for stem in ("trunk", "checkpoint"):
        arrays, _ = load_arrays(out / stem, stem)
        found |= {f"{stem}.{name}": array.tobytes() for name, array in arrays.items()}
    return found
