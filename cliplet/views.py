"""Where to look in an image (all of it, cells of n x n grids, boxes of one's own) and how views become a score.

Only geometry, in numpy; `cliplet.snippets` cuts and scores what lies in the boxes.

Legend: B images, V views, H x W canvas pixels. A box is (x0, y0, x1, y1) in canvas pixels, where the
canvas is the array that holds an image, from its upper left corner on unless the image is padded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cliplet.errors import ArtifactError, UsageError

# Images are shrunk to this longer side when they are decoded, unless the whole-image view needs more.
MAX_CANVAS = 640
# Pixels that a canvas offers for each pixel of a view's side. An image that is shrunk twice, to the canvas and
# then to the view, loses a little: with 2, a ViT-B/32's features of photographs keep a cosine of 0.99998 to
# those that open_clip's own transform gives.
OVERSAMPLING = 2
# Canvas sides are multiples of this, so that an engine meets few different shapes.
CANVAS_STEP = 32
# What ImageNet classifiers are fed with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
AGGREGATIONS = ("cdul", "max", "mean")


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder wants to be fed; open_clip's own words and numbers.

    Attributes:
        size: side S of the square input, in pixels.
        mean, std: of RGB values in 0..1.
        interpolation: `bicubic` or `bilinear`, always antialiased.
        resize_mode: how the whole image becomes a square: `shortest` cuts the middle square out, `squash`
            ignores the aspect, `longest` pads with `fill`.
        fill: value in 0..255 of the padding.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill: int = 0

    def __post_init__(self) -> None:
        if self.resize_mode not in RESIZE_MODES or self.interpolation not in INTERPOLATIONS:
            raise ArtifactError(
                f"preprocessing with resize mode {self.resize_mode!r} and interpolation {self.interpolation!r}",
                f"one of {RESIZE_MODES} and one of {INTERPOLATIONS}",
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        return cls(**{**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])})


@dataclass(frozen=True)
class Views:
    """Which views of every image are scored: the whole image first, then the cells of each grid, row by row.

    `Views.parse("1+3x3")` is the whole image and nine cells. Cells tile the full image and are squashed
    to the encoder's square, so that no part of the image is left unseen.
    """

    grids: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Views:
        """Views as written on a command line: `1`, `1+2x2`, `1+3x3`, `1+2x2+3x3+4x4`.

        Raises:
            UsageError: anything else.
        """
        whole, *grids = text.replace(" ", "").lower().split("+")
        sides = [re.fullmatch(r"([2-9])x([2-9])", g) for g in grids]
        if whole not in ("1", "1x1") or not all(m and m[1] == m[2] for m in sides):
            raise UsageError(
                f"views {text!r}",
                "the whole image and square grids of 2x2 to 9x9 cells, such as 1, 1+2x2, 1+3x3 or 1+2x2+3x3+4x4",
                "--views 1+3x3",
            )
        return cls(tuple(int(m[1]) for m in sides if m))

    def __str__(self) -> str:
        return "+".join(["1", *(f"{n}x{n}" for n in self.grids)])

    @property
    def count(self) -> int:
        """Number of views V of an image."""
        return 1 + sum(n * n for n in self.grids)

    def cells(self, width: int, height: int) -> np.ndarray:
        """Boxes float32 [V - 1, 4] of the grids' cells in an image of `width` x `height` pixels."""
        rows = []
        for n in self.grids:
            xs = np.linspace(0, width, n + 1)
            ys = np.linspace(0, height, n + 1)
            rows += [(xs[j], ys[i], xs[j + 1], ys[i + 1]) for i in range(n) for j in range(n)]
        return np.asarray(rows, np.float32).reshape(-1, 4)

    def room(self, preprocessing: Preprocessing) -> dict[str, int]:
        """How far images may be shrunk when they are decoded: `fit`, `short` and `keep` of `decode_image`.

        The whole image keeps OVERSAMPLING pixels for each that the encoder sees. Cells of a grid keep as many
        only up to MAX_CANVAS: beyond it, memory and time would grow for details that a first look does without.
        Images that are little larger stay as they are: to shrink them takes longer than to look at all of them.
        """
        finest = max(self.grids, default=1)
        fit = min(MAX_CANVAS, OVERSAMPLING * finest * preprocessing.size)
        return {
            "fit": fit,
            "short": OVERSAMPLING * preprocessing.size,
            "keep": min(MAX_CANVAS, 3 * fit // 2),
        }


@dataclass(frozen=True)
class Aggregation:
    """How the probabilities of an image's views become one score a class.

    Attributes:
        kind: `cdul`: half of the whole image's probability plus half of the local views' aggregate (their
            largest probability where that reaches `zeta`, else their smallest; CDUL, equations 5 and 6).
            `max`: the largest of all views. `mean`: their mean.
        zeta: the threshold of `cdul`.
    """

    kind: str = "cdul"
    zeta: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in AGGREGATIONS or not 0 <= self.zeta <= 1:
            raise UsageError(
                f"aggregation {self.kind!r} with zeta {self.zeta}",
                f"one of {', '.join(AGGREGATIONS)}, and zeta between 0 and 1",
                "--aggregate cdul --zeta 0",
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def whole_image_box(
    width: int, height: int, preprocessing: Preprocessing
) -> tuple[float, float, float, float]:
    """What open_clip's own transform would show the encoder of an image, as a box in its pixels.

    In `shortest` mode that is the middle square, in `longest` mode a square that reaches beyond the image.
    Both are found as torchvision finds them: a side is resized to a whole number of pixels first, and what is
    cut off or padded is a whole number of those.
    """
    size = preprocessing.size
    if preprocessing.resize_mode == "squash":
        return (0.0, 0.0, float(width), float(height))
    if preprocessing.resize_mode == "shortest":
        shorter, longer = sorted((width, height))
        resized = max(size, int(size * longer / shorter))
        begin = round((resized - size) / 2)
    else:
        shorter, longer = sorted((width, height), reverse=True)
        resized = max(1, round(size * longer / shorter))
        begin = -((size - resized) // 2)
    # `longer` is now the side that is cut or padded; the other one is seen from end to end.
    step = longer / resized
    part = (begin * step, (begin + size) * step)
    along_width = (width >= height) == (preprocessing.resize_mode == "shortest")
    return (part[0], 0.0, part[1], float(height)) if along_width else (0.0, part[0], float(width), part[1])


def place_on_canvas(
    pictures: Sequence[np.ndarray],
    views: Views,
    preprocessing: Preprocessing,
    boxes: Sequence[np.ndarray] | None = None,
    full_sizes: Sequence[tuple[int, int]] | None = None,
) -> dict[str, np.ndarray]:
    """Feeds of the `snippets` graph for images uint8 [h, w, 3] of any sizes.

    Args:
        boxes: float32 [v, 4] of one's own for each image, in its pixels, scored after the whole image in
            place of the grids. Images with fewer boxes than the longest list repeat their last one, which
            changes no maximum and no minimum.
        full_sizes: (width, height) of the images before they were shrunk, if they were. The whole-image view
            is found in those, where open_clip's transform would find it.

    Returns:
        `image` uint8 [B, H, W, 3] and `boxes` float32 [B, V, 4].

    Raises:
        UsageError: the images and the lists of boxes are not equally many, or a box is empty.
    """
    per_image = _boxes(pictures, views, preprocessing, boxes, full_sizes)
    # A whole image that is padded reaches beyond its pixels: the canvas has room for that on all sides.
    before = [np.ceil(np.maximum(0, -b[0, :2])).astype(int) for b in per_image]
    extents = [
        np.maximum(np.ceil(b[0, 2:]).astype(int), (p.shape[1], p.shape[0])) + offset
        for p, b, offset in zip(pictures, per_image, before, strict=True)
    ]
    width, height = np.max(extents, axis=0)
    canvas = np.full((len(pictures), _round_up(height), _round_up(width), 3), preprocessing.fill, np.uint8)
    for i, (picture, (dx, dy)) in enumerate(zip(pictures, before, strict=True)):
        h, w = picture.shape[:2]
        canvas[i, dy : dy + h, dx : dx + w] = picture
        per_image[i] = per_image[i] + np.asarray([dx, dy, dx, dy], np.float32)
    return {"image": canvas, "boxes": np.stack(per_image)}


def _boxes(
    pictures: Sequence[np.ndarray],
    views: Views,
    preprocessing: Preprocessing,
    own: Sequence[np.ndarray] | None,
    full_sizes: Sequence[tuple[int, int]] | None,
) -> list[np.ndarray]:
    """For each image the boxes float32 [V, 4] of its views, in its pixels."""
    sizes = [(p.shape[1], p.shape[0]) for p in pictures]
    if own is not None and len(own) != len(pictures):
        raise UsageError(
            f"{len(own)} lists of boxes for {len(pictures)} images", "one list of boxes for each image"
        )
    local = [views.cells(*s) for s in sizes] if own is None else list(map(_inside, own, sizes))
    longest = max(map(len, local))
    found = []
    for (width, height), full, cells in zip(sizes, full_sizes or sizes, local, strict=True):
        shrunk = np.asarray([width / full[0], height / full[1]] * 2)
        whole = np.asarray([whole_image_box(*full, preprocessing)]) * shrunk
        listed = np.concatenate([whole, cells])
        found.append(
            np.concatenate([listed, np.repeat(listed[-1:], longest - len(cells), 0)]).astype(np.float32)
        )
    return found


def _inside(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes float32 [v, 4] cut off where the image of `size` (width, height) ends."""
    own = np.asarray(boxes, np.float32).reshape(-1, 4)
    clipped = np.clip(own, 0, np.asarray([*size, *size], np.float32))
    empty = (clipped[:, 2] <= clipped[:, 0]) | (clipped[:, 3] <= clipped[:, 1])
    if empty.any():
        raise UsageError(
            f"box {own[int(np.argmax(empty))].tolist()} holds nothing of an image of {size[0]} x {size[1]} pixels",
            "x0 < x1 and y0 < y1, in pixels, inside the image",
        )
    return clipped


def _round_up(side: int) -> int:
    return -(-side // CANVAS_STEP) * CANVAS_STEP
