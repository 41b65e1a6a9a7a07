"""Cut-out drawings by class: the embedded sets, or any folder of `class/*.png`, and how one is posed.

The embedded sets live in `assets/sprites/<set>/<class>/<name>.png`. One of them, `twemoji`, is held out: no
training image ever shows it, so that a test on it tells whether a model knows the object or the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cliplet.errors import DataError

TRAINING_SETS = ("emojione", "firefox", "fluent-3d", "fluent-flat", "noto", "noto-v1")
HELD_OUT_SETS = ("twemoji",)

Sprites = Mapping[str, tuple["Sprite", ...]]


@dataclass(frozen=True, eq=False)
class Sprite:
    """One cut-out: its name (`set/class/drawing`) and its RGBA pixels at full and at half size."""

    name: str
    full: Image.Image
    half: Image.Image


@dataclass(frozen=True)
class Pose:
    """How one sprite is shown: size, turn, mirror, slant and light.

    Args:
        side: length in pixels of the sprite's longer side.
        degrees: turn against the clock.
        flip: whether left and right are exchanged.
        slant: horizontal shift per unit of height.
        colours: 12 numbers, three rows of (red, green, blue, offset).
    """

    side: float
    degrees: float
    flip: bool
    slant: float
    colours: tuple[float, ...]


def assets_folder() -> Path:
    """The folder of the embedded sprite sets."""
    return Path(__file__).parent / "assets" / "sprites"


def embedded_sprites(sets: Iterable[str] = TRAINING_SETS) -> dict[str, tuple[Sprite, ...]]:
    """The sprites of the named embedded sets by class, classes and drawings in alphabetical order."""
    found: dict[str, list[Sprite]] = {}
    for name in sorted(sets):
        folder = assets_folder() / name
        if not folder.is_dir():
            raise DataError(
                f"no embedded sprite set {name!r}",
                f"one of {', '.join(TRAINING_SETS + HELD_OUT_SETS)}",
                "pip install --force-reinstall cliplet",
            )
        for class_name, sprites in read_sprites(folder).items():
            found.setdefault(class_name, []).extend(sprites)
    return {name: tuple(found[name]) for name in sorted(found)}


def read_sprites(folder: Path) -> dict[str, tuple[Sprite, ...]]:
    """The sprites in `folder/<class>/*.png` by class; the name of a class is the name of its folder."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}", "a folder of class folders, each with PNG cut-outs")
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise DataError(
            f"{folder} holds no class folders",
            "one folder for each class, each with PNG cut-outs: dog/rex.png, cat/tom.png",
            f"mkdir '{folder / 'dog'}' and move the dogs' PNG files into it",
        )
    return {path.name: _class_sprites(path) for path in classes}


def _class_sprites(folder: Path) -> tuple[Sprite, ...]:
    files = sorted(folder.glob("*.png"))
    if not files:
        raise DataError(f"{folder} holds no PNG files", "at least one cut-out for each class")
    return tuple(_read_sprite(path) for path in files)


def _read_sprite(path: Path) -> Sprite:
    try:
        with Image.open(path) as image:
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            rgba = image.convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}", "a PNG cut-out") from error
    opaque = rgba.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
    inside = opaque.getbbox()
    if not has_alpha or opaque.getextrema()[0] == 255:
        raise DataError(
            f"{path} has no transparent pixel",
            "a cut-out: a PNG with an alpha channel that is 0 around the object",
            "remove its background in an image editor and save it as PNG with alpha",
        )
    if inside is None:
        raise DataError(f"{path} has no opaque pixel", "a cut-out whose object can be seen")
    rgba = rgba.crop(inside)
    rgba.thumbnail((256, 256), Image.Resampling.LANCZOS)
    half = rgba.resize((max(1, rgba.width // 2), max(1, rgba.height // 2)), Image.Resampling.BOX)
    return Sprite("/".join(path.with_suffix("").parts[-3:]), rgba, half)


def posed(sprite: Sprite, pose: Pose) -> Image.Image:
    """The sprite in its pose: an RGBA image just large enough to hold it."""
    # The half-size copy keeps small sprites from aliasing: bilinear looks at four pixels only.
    source = sprite.half if pose.side < 0.6 * max(sprite.full.size) else sprite.full
    width, height = source.size
    scale = pose.side / max(width, height)
    turn = math.radians(pose.degrees)
    mirror = -1.0 if pose.flip else 1.0
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    a, b = cos * mirror, sin + pose.slant * cos
    c, d = -sin * mirror, cos - pose.slant * sin
    out = (
        max(1, math.ceil(abs(a) * width + abs(b) * height)),
        max(1, math.ceil(abs(c) * width + abs(d) * height)),
    )
    size = a * d - b * c
    back = d / size, -b / size, -c / size, a / size
    x = width / 2 - back[0] * out[0] / 2 - back[1] * out[1] / 2
    y = height / 2 - back[2] * out[0] / 2 - back[3] * out[1] / 2
    matrix = back[0], back[1], x, back[2], back[3], y
    shown = source.transform(out, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    alpha = shown.getchannel("A")
    coloured = shown.convert("RGB").convert("RGB", pose.colours)
    coloured.putalpha(alpha)
    return coloured


def light(rng: np.random.Generator, strength: float = 1.0) -> tuple[float, ...]:
    """A random colour matrix for `Pose`: hue turn, saturation, contrast, tint and brightness."""
    turn, offset = rng.normal(0.0, 0.35 * strength), rng.normal(0.0, 10.0 * strength)
    saturation = float(np.clip(rng.normal(1.0, 0.25 * strength), 0.0, 1.8))
    cos, sin = saturation * math.cos(turn), saturation * math.sin(turn)
    gains = rng.uniform(1 - 0.3 * strength, 1 + 0.2 * strength) * rng.uniform(0.92, 1.08, size=3)
    rows = (_LUMA + cos * _COSINE + sin * _SINE) * gains[:, None]
    return tuple(value for row in rows.tolist() for value in (*row, offset))


# A hue turn is a rotation of the YIQ chroma plane; as one RGB matrix: luma + cos * _COSINE + sin * _SINE.
_TO_CHROMA = np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_CHROMA = np.array([[0.956, 0.621], [-0.272, -0.647], [-1.106, 1.703]])
_LUMA = np.array([[0.299, 0.587, 0.114]] * 3)
_COSINE = _FROM_CHROMA @ _TO_CHROMA
_SINE = _FROM_CHROMA @ np.array([[0.0, -1.0], [1.0, 0.0]]) @ _TO_CHROMA
