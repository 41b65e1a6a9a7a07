"""The scene world: images of several known objects, made from cut-outs, with exact truth.

    world = scene_world("train", seed=0)
    scene = world.scene(7)            # always the same pixels, whatever else was or is made
    scene.image                       # uint8 [H, W, 3], RGB
    [(o.name, o.box) for o in scene.objects]

Sprites are pasted with random scale, turn, mirror, light and overlap on textured backgrounds. Classes have a
long tail and keep company (a person with a horse, a sofa with a tv monitor), so that labelling is as unfair
as it is on photographs. An object too hidden to be seen is placed again, never left out of the truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from cliplet.backgrounds import background
from cliplet.errors import UsageError
from cliplet.sprites import (
    HELD_OUT_SETS,
    TRAINING_SETS,
    Pose,
    Sprite,
    embedded_sprites,
    light,
    posed,
    read_sprites,
)

PARTS = ("train", "test-seen", "test-unseen")
SIZES = ((320, 240), (320, 240), (320, 240), (240, 320), (256, 256))  # width, height; repeated: more often
MIN_VISIBLE = 0.35  # of an object's pixels; a smaller part is not fairly called the object
PLACES_TRIED = 8

# From the most to the least frequent class; a class not named here comes after them, in alphabetical order.
FREQUENT_FIRST = (
    "person", "car", "chair", "dog", "bird", "cat", "bottle", "boat", "train", "aeroplane", "bus",
    "tv monitor", "horse", "bicycle", "cow", "sheep", "umbrella", "motorbike", "sofa", "potted plant",
)  # fmt: skip
COMPANIONS: Mapping[str, tuple[str, ...]] = {
    "person": ("horse", "bicycle", "motorbike", "dog", "umbrella", "chair"),
    "horse": ("person",),
    "bicycle": ("person",),
    "motorbike": ("person",),
    "umbrella": ("person",),
    "sofa": ("tv monitor", "cat", "potted plant"),
    "tv monitor": ("sofa", "chair"),
    "potted plant": ("sofa", "chair"),
    "chair": ("tv monitor", "bottle"),
    "bottle": ("chair",),
    "car": ("bus", "person"),
    "bus": ("car",),
    "sheep": ("dog", "sheep"),
    "cow": ("cow",),
    "dog": ("cat", "person"),
    "boat": ("bird",),
}


@dataclass(frozen=True)
class SceneObject:
    """One object of the truth.

    Args:
        name: its class.
        box: (x0, y0, x1, y1) around its visible pixels, x1 and y1 exclusive.
        visible: share of its pixels that nothing hides, at least `MIN_VISIBLE`.
        drawing: name of its sprite (`set/class/drawing`).
    """

    name: str
    box: tuple[int, int, int, int]
    visible: float
    drawing: str


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and its truth.

    Args:
        image: uint8 [H, W, 3], RGB.
        objects: all objects, from the back to the front.
        owners: uint8 [H, W]: 0 for background, k where `objects[k - 1]` is seen.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    owners: np.ndarray

    @property
    def classes(self) -> tuple[str, ...]:
        """The distinct class names in the scene, in alphabetical order."""
        return tuple(sorted({o.name for o in self.objects}))


@dataclass(frozen=True, eq=False)
class SceneWorld:
    """All scenes of one seed and part; `scene(i)` makes the i-th.

    Args:
        sprites: cut-outs by class.
        seed: another seed is another world.
        part: one of `PARTS`; parts of one seed share no scene.
        max_objects: most objects in a scene.
        min_objects: fewest objects tried (one may be given up where no place is left for it).
        tail: exponent of the long tail: class of rank r is drawn in proportion to 1 / r**tail; 0 is balanced.
        company: chance that a further object is a usual companion of one already there.
    """

    sprites: Mapping[str, tuple[Sprite, ...]]
    seed: int = 0
    part: str = "train"
    max_objects: int = 5
    min_objects: int = 1
    tail: float = 0.7
    company: float = 0.4
    classes: tuple[str, ...] = field(init=False)
    chances: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise UsageError(f"no part {self.part!r}", f"one of {', '.join(PARTS)}")
        if not 1 <= self.min_objects <= self.max_objects <= 20:
            raise UsageError(
                f"from {self.min_objects} to {self.max_objects} objects in a scene", "1 <= min <= max <= 20"
            )
        if not self.sprites:
            raise UsageError("a scene world without sprites", "cut-outs of at least one class")
        object.__setattr__(self, "classes", tuple(sorted(self.sprites)))
        object.__setattr__(self, "chances", class_chances(self.classes, self.tail))

    def scene(self, index: int) -> Scene:
        """Scene number `index`; the same pixels and truth however many scenes are made, and where."""
        rng = np.random.default_rng([self.seed, PARTS.index(self.part), index])
        size = SIZES[rng.integers(len(SIZES))]
        canvas = _Canvas(background(rng, size))
        names = self._names(rng)
        for position, name in enumerate(names):
            sprite = self.sprites[name][rng.integers(len(self.sprites[name]))]
            cutout = posed(sprite, _random_pose(rng, min(size), len(names)))
            if position == 0 or rng.random() < 0.9:
                canvas.place(rng, cutout, name, sprite.name)
        return canvas.finished(rng)

    def _names(self, rng: np.random.Generator) -> list[str]:
        count = int(rng.integers(self.min_objects, self.max_objects + 1))
        names: list[str] = []
        for _ in range(count):
            near = [c for n in names for c in COMPANIONS.get(n, ()) if c in self.sprites]
            if near and rng.random() < self.company:
                names.append(near[rng.integers(len(near))])
            else:
                names.append(self.classes[rng.choice(len(self.classes), p=self.chances)])
        return names


def scene_world(
    part: str = "train",
    *,
    seed: int = 0,
    sprites: Path | None = None,
    max_objects: int = 5,
    tail: float = 0.7,
) -> SceneWorld:
    """The world of one part, from the embedded drawings or from a folder of `class/*.png` cut-outs.

    Without a folder, `test-unseen` shows only the held-out drawing set and the other parts never show it. Of
    a folder every part shows all drawings: keep drawings apart by giving another folder.
    """
    if sprites is not None:
        drawings = read_sprites(sprites)
    else:
        drawings = embedded_sprites(HELD_OUT_SETS if part == "test-unseen" else TRAINING_SETS)
    return SceneWorld(drawings, seed=seed, part=part, max_objects=max_objects, tail=tail)


def class_chances(classes: tuple[str, ...], tail: float) -> np.ndarray:
    """Chance of each class, float64 [C], falling with its rank as 1 / rank**tail."""
    known = {name: rank for rank, name in enumerate(FREQUENT_FIRST)}
    order = sorted(classes, key=lambda name: (known.get(name, len(known)), name))
    ranks = np.array([order.index(name) + 1 for name in classes], dtype=np.float64)
    weights = ranks**-tail
    return weights / weights.sum()


def _random_pose(rng: np.random.Generator, shorter: int, crowd: int) -> Pose:
    """A pose for one of `crowd` objects on a canvas whose shorter side is `shorter` pixels."""
    largest = 0.95 / math.sqrt(crowd) ** 0.75
    smallest = max(0.17, 0.4 / crowd)
    return Pose(
        side=shorter * math.exp(rng.uniform(math.log(smallest), math.log(largest))),
        degrees=float(np.clip(rng.normal(0, 14), -40, 40)),
        flip=bool(rng.random() < 0.5),
        slant=rng.normal(0, 0.08),
        colours=light(rng),
    )


class _Canvas:
    """A scene being made: pixels, and which object is seen at each of them."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.owners = np.zeros((image.height, image.width), np.uint8)
        self.names: list[tuple[str, str]] = []
        self.pixels: list[int] = [0]  # of each owner when nothing hides it
        self.seen = np.zeros(1, np.int64)  # of each owner now; index 0, the background, is not kept

    def place(self, rng: np.random.Generator, cutout: Image.Image, name: str, drawing: str) -> None:
        """Paste the cut-out where no object, itself included, is hidden too much; else leave it out."""
        solid = np.asarray(cutout.getchannel("A")) > 127
        total = int(np.count_nonzero(solid))
        if total < 40:
            return
        for _ in range(PLACES_TRIED):
            # Up to 12 % of the cut-out may lie beyond the edge of the image on each side.
            x = int(rng.integers(-cutout.width // 8, max(1, self.image.width - cutout.width * 7 // 8)))
            y = int(rng.integers(-cutout.height // 8, max(1, self.image.height - cutout.height * 7 // 8)))
            left, top = max(0, -x), max(0, -y)
            region = self.owners[y + top : y + cutout.height, x + left : x + cutout.width]
            shown = solid[top : top + region.shape[0], left : left + region.shape[1]]
            inside = int(np.count_nonzero(shown))
            lost = np.bincount(region[shown], minlength=len(self.pixels))
            if inside < 0.75 * total or self._hides_too_much(lost):
                continue
            region[shown] = len(self.pixels)
            self.pixels.append(total)
            self.seen = np.append(self.seen - lost, inside)
            self.names.append((name, drawing))
            self._paste(rng, cutout, x, y)
            return

    def _hides_too_much(self, lost: np.ndarray) -> bool:
        return any(
            lost[k] and self.seen[k] - lost[k] < MIN_VISIBLE * self.pixels[k]
            for k in range(1, len(self.pixels))
        )

    def _paste(self, rng: np.random.Generator, cutout: Image.Image, x: int, y: int) -> None:
        alpha = cutout.getchannel("A")
        if rng.random() < 0.3:
            # A cast shadow: the outline again, darker and a little aside.
            dx, dy = rng.integers(-8, 9, 2)
            self.image.paste((20, 20, 25), (x + int(dx), y + int(dy)), alpha.point(_dimmed))
        self.image.paste(cutout, (x, y), alpha)

    def finished(self, rng: np.random.Generator) -> Scene:
        """The scene with light over all of it, and its truth."""
        image = self.image
        if rng.random() < 0.5:
            ramp = rng.integers(130, 256, (2, 2), dtype=np.uint8)
            shade = Image.fromarray(ramp).resize(image.size, Image.Resampling.BILINEAR)
            image = ImageChops.multiply(image, Image.merge("RGB", (shade, shade, shade)))
        objects = tuple(self._truth(k + 1, *named) for k, named in enumerate(self.names))
        return Scene(np.array(image), objects, self.owners)

    def _truth(self, owner: int, name: str, drawing: str) -> SceneObject:
        mine = self.owners == owner
        rows, columns = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
        box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        return SceneObject(name, box, int(self.seen[owner]) / self.pixels[owner], drawing)


def _dimmed(alpha: int) -> int:
    return alpha * 2 // 5
