"""A bank of scene fragments for training: pixels of one size, and what share of each a class covers.

From every scene come the whole image, cells of 2x2 and 3x3 grids and boxes loosely around objects, each
squashed to a square. Cells matter: a model that has seen whole images only is lost in the views that tagging
looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from cliplet.processes import mapped
from cliplet.scenes import Scene, SceneWorld

Box = tuple[int, int, int, int]
SEEN_OF_OBJECT = 0.4  # an object is named when this share of it is in the fragment ...
SEEN_OF_FRAGMENT = 0.1  # ... or when it covers this share of the fragment; below both it is ambiguous
EMPTY_BELOW = 0.004  # a class covering less of the fragment than this is not there
CHUNK = 200


@dataclass(frozen=True, eq=False)
class FragmentBank:
    """Fragments of scenes.

    Args:
        pixels: uint8 [N, S, S, 3], RGB.
        shares: float32 [N, C], share of the pixels that each nameable class covers; 0 where none.
        traces: bool [N, C], classes of which something is there, nameable or not.
    """

    pixels: np.ndarray
    shares: np.ndarray
    traces: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)


def fragment_bank(
    world: SceneWorld,
    scenes: int,
    side: int,
    *,
    fragments_per_scene: int = 3,
    empty_kept: float = 0.25,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> FragmentBank:
    """Fragments of the first `scenes` scenes of a world: every whole image, and others beside it.

    Args:
        world: where the scenes come from.
        scenes: how many are made.
        side: pixels of a fragment's side.
        fragments_per_scene: grid cells and boxes around objects cut from each scene beside the whole image.
        empty_kept: chance that a fragment without any object is kept.
        workers: processes; the bank is the same for any number.
        progress: called with the number of scenes just cut up.
    """
    starts = range(0, scenes, CHUNK)
    make = partial(_chunk, world, scenes, side, fragments_per_scene, empty_kept)
    parts: list[FragmentBank] = []
    for start, part in zip(starts, mapped(make, starts, workers), strict=True):
        parts.append(part)
        if progress:
            progress(min(CHUNK, scenes - start))
    return FragmentBank(
        np.concatenate([p.pixels for p in parts]),
        np.concatenate([p.shares for p in parts]),
        np.concatenate([p.traces for p in parts]),
    )


def _chunk(
    world: SceneWorld, scenes: int, side: int, per_scene: int, empty_kept: float, start: int
) -> FragmentBank:
    pixels, shares, traces = [], [], []
    for index in range(start, min(scenes, start + CHUNK)):
        rng = np.random.default_rng([world.seed, 77, index])
        scene = world.scene(index)
        height, width = scene.owners.shape
        boxes = [(0, 0, width, height)] + [_random_box(rng, scene) for _ in range(per_scene)]
        image = Image.fromarray(scene.image)
        for box in boxes:
            share_C, trace_C = seen_in(scene, box, world.classes)
            if not trace_C.any() and rng.random() > empty_kept:
                continue
            small = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
            pixels.append(np.asarray(small))
            shares.append(share_C)
            traces.append(trace_C)
    return FragmentBank(np.stack(pixels), np.stack(shares), np.stack(traces))


def seen_in(scene: Scene, box: Box, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the box covered by nameable classes, float32 [C], and classes with any trace, bool [C]."""
    x0, y0, x1, y1 = box
    count = len(scene.objects) + 1
    everywhere = np.bincount(scene.owners.ravel(), minlength=count)
    inside = np.bincount(scene.owners[y0:y1, x0:x1].ravel(), minlength=count)
    area = (x1 - x0) * (y1 - y0)
    shares_C = np.zeros(len(classes), np.float32)
    traces_C = np.zeros(len(classes), np.bool_)
    for k, thing in enumerate(scene.objects, start=1):
        share = inside[k] / area
        if share < EMPTY_BELOW:
            continue
        column = classes.index(thing.name)
        traces_C[column] = True
        if inside[k] >= SEEN_OF_OBJECT * everywhere[k] or share >= SEEN_OF_FRAGMENT:
            shares_C[column] += share
    return shares_C, traces_C


def grid_boxes(width: int, height: int, cells: int) -> list[Box]:
    """The `cells` x `cells` boxes that tile an image, row by row."""
    xs = [round(width * k / cells) for k in range(cells + 1)]
    ys = [round(height * k / cells) for k in range(cells + 1)]
    return [(xs[i], ys[j], xs[i + 1], ys[j + 1]) for j in range(cells) for i in range(cells)]


def _random_box(rng: np.random.Generator, scene: Scene) -> Box:
    """A cell of a 2x2 or 3x3 grid, or a box loosely around an object."""
    height, width = scene.owners.shape
    if not scene.objects or rng.random() < 0.5:
        boxes = grid_boxes(width, height, int(rng.integers(2, 4)))
        return boxes[rng.integers(len(boxes))]
    x0, y0, x1, y1 = scene.objects[rng.integers(len(scene.objects))].box
    # From tight to 2.4 times the object, off centre by up to a quarter of it.
    w, h = (x1 - x0) * rng.uniform(0.9, 2.4), (y1 - y0) * rng.uniform(0.9, 2.4)
    x = (x0 + x1) / 2 + rng.uniform(-0.25, 0.25) * (x1 - x0) - w / 2
    y = (y0 + y1) / 2 + rng.uniform(-0.25, 0.25) * (y1 - y0) - h / 2
    left, top = int(max(0, min(x, width - 8))), int(max(0, min(y, height - 8)))
    return left, top, int(min(width, max(x + w, left + 8))), int(min(height, max(y + h, top + 8)))
