"""Textured backgrounds from a random generator: fields, noise, stripes, checks, blobs, rooms, landscapes.

Backgrounds are drawn small and enlarged, which is fast and leaves no sharp repeated pattern a net could learn
instead of the objects. Many carry plain shapes as decoys: a shape with an edge is not yet an object.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Painter = Callable[[np.random.Generator, tuple[int, int]], Image.Image]


def background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A random RGB background of the size (width, height)."""
    image = PAINTERS[rng.integers(len(PAINTERS))](rng, size)
    if rng.random() < 0.6:
        _decoys(rng, image)
    if rng.random() < 0.5:
        image = _with_grain(rng, image)
    return image


def _colour(rng: np.random.Generator) -> Colour:
    # Half muted, half any colour: everyday surfaces are greyer than a uniform draw.
    rgb = rng.uniform(0, 255, 3)
    if rng.random() < 0.5:
        rgb = rgb.mean() + 0.35 * (rgb - rgb.mean())
    return int(rgb[0]), int(rgb[1]), int(rgb[2])


def _near(rng: np.random.Generator, colour: Colour, spread: float = 45.0) -> Colour:
    near = np.clip(np.array(colour) + rng.normal(0, spread, 3), 0, 255)
    return int(near[0]), int(near[1]), int(near[2])


def _field(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Smooth field of a few random colours."""
    cells = rng.integers(2, 7, 2)
    base = np.array(_colour(rng))
    pixels = np.clip(base + rng.normal(0, rng.uniform(8, 70), (cells[0], cells[1], 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


def _noise(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Fractal noise between two colours: cloud, stone, foliage."""
    total = np.zeros((48, 64), np.float32)
    for octave, cells in enumerate(((3, 4), (6, 8), (12, 16), (24, 32))):
        values = rng.random(cells, dtype=np.float32)
        grown = Image.fromarray(values).resize((64, 48), Image.Resampling.BICUBIC)
        total += np.asarray(grown) * rng.uniform(0.5, 0.9) ** octave
    total = (total - total.min()) / (total.max() - total.min() + 1e-6)
    first, second = np.array(_colour(rng)), np.array(_colour(rng))
    pixels = first + (second - first) * total[:, :, None]
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


def _pixels(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Coloured patches with hard edges, from fine to coarse."""
    cells = int(rng.integers(4, 40))
    shape = (cells, max(1, cells * size[0] // size[1]), 3)
    pixels = np.clip(np.array(_colour(rng)) + rng.normal(0, rng.uniform(10, 60), shape), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def _stripes(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Stripes or checks of two colours, turned at random."""
    image = Image.new("RGB", size, _colour(rng))
    draw = ImageDraw.Draw(image)
    step, second = int(rng.integers(6, 50)), _colour(rng)
    slant = int(rng.uniform(-1, 1) * size[1])
    thick = max(2, int(step * rng.uniform(0.2, 0.7)))
    for x in range(-size[1], size[0] + size[1], step):
        draw.line([(x, 0), (x + slant, size[1])], second, thick)
    if rng.random() < 0.4:
        third = _near(rng, second)
        for y in range(0, size[1], step):
            draw.line([(0, y), (size[0], y)], third, thick)
    return image


def _blobs(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Soft ellipses on one colour."""
    small = size[0] // 4, size[1] // 4
    base = _colour(rng)
    image = Image.new("RGB", small, base)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(5, 30))):
        x, y = rng.uniform(0, small[0]), rng.uniform(0, small[1])
        a, b = rng.uniform(2, 18, 2)
        draw.ellipse([x - a, y - b, x + a, y + b], _near(rng, base, 60))
    return image.resize(size, Image.Resampling.BILINEAR)


def _landscape(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Sky over hills or ground, or a wall over a floor."""
    width, height = size[0] // 2, size[1] // 2
    sky, ground = _colour(rng), _colour(rng)
    rows = np.linspace(0, 1, height)[:, None, None]
    sky_rows = np.array(sky) + (np.array(_near(rng, sky)) - np.array(sky)) * rows
    image = Image.fromarray(np.broadcast_to(sky_rows, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    horizon = rng.uniform(0.3, 0.8) * height
    for _ in range(int(rng.integers(1, 4))):
        rough = 0.0 if rng.random() < 0.4 else rng.uniform(2, 20)
        tops = horizon + rough * rng.normal(0, 1, 9)
        line = list(zip(np.linspace(0, width, 9).tolist(), tops.tolist(), strict=True))
        draw.polygon([(0, height), *line, (width, height)], _near(rng, ground))
        horizon += rng.uniform(5, 30)
    return image.resize(size, Image.Resampling.BILINEAR)


def _mosaic(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Overlapping polygons: cloth, leaves, rubble."""
    base = _colour(rng)
    image = Image.new("RGB", (size[0] // 2, size[1] // 2), base)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(10, 40))):
        centre = rng.uniform(0, 1, 2) * image.size
        corners = centre + rng.normal(0, rng.uniform(5, 25), (int(rng.integers(3, 6)), 2))
        draw.polygon([tuple(c) for c in corners.tolist()], _near(rng, base, 50))
    return image.resize(size, Image.Resampling.BILINEAR)


def _decoys(rng: np.random.Generator, image: Image.Image) -> None:
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 6))):
        x, y = rng.uniform(0, 1, 2) * image.size
        a, b = rng.uniform(5, 55, 2)
        fill = _colour(rng)
        kind = int(rng.integers(4))
        if kind == 0:
            draw.ellipse([x - a, y - b, x + a, y + b], fill)
        elif kind == 1:
            draw.rounded_rectangle([x - a, y - b, x + a, y + b], min(a, b) / 3, fill, _colour(rng), 2)
        elif kind == 2:
            draw.line([(x, y), (x + 2 * a - 50, y + 2 * b - 50)], fill, int(rng.integers(2, 12)))
        else:
            corners = np.array([x, y]) + rng.normal(0, (a + b) / 2, (int(rng.integers(3, 7)), 2))
            draw.polygon([tuple(c) for c in corners.tolist()], fill)


@cache
def _grain_sheet() -> Image.Image:
    values = np.random.default_rng(20240501).normal(128, 24, (640, 640))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _with_grain(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    sheet = _grain_sheet()
    x, y = (int(rng.integers(sheet.width - image.width)), int(rng.integers(sheet.height - image.height)))
    tile = sheet.crop((x, y, x + image.width, y + image.height))
    if rng.random() < 0.4:
        tile = tile.filter(ImageFilter.BoxBlur(1))
    return ImageChops.add(image, Image.merge("RGB", (tile, tile, tile)), 1.0, -128)


PAINTERS: tuple[Painter, ...] = (
    _field,
    _field,
    _noise,
    _noise,
    _pixels,
    _stripes,
    _blobs,
    _landscape,
    _landscape,
    _mosaic,
)
