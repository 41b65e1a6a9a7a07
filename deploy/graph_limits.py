"""What one request may ask of a raw graph: its tensors come from anywhere, and an engine would try anything.

Legend: B images, V views, H x W canvas pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Self

import numpy as np

from cliplet.contract import TEXT, GraphContract
from cliplet.engine_sidecar import MOST_ELEMENTS, Profile
from cliplet.errors import DataError

# Pixels of one image's canvas: four times the largest square that an image is shrunk to. An engine needs about 31
# bytes for each of them while it looks at that image.
MOST_PIXELS = 4096**2
# Values of all canvases of a run, half a gigabyte, and those of an image that counts as large: more of them are let in
# only where the server was told to take larger batches.
USUAL_VALUES = 2**29
LARGE_IMAGE = 2112**2 * 3
# Views of all images of a run: those of the longest `--views` there is are 285.
MOST_VIEWS = 320
# Further away from its canvas than any view reaches.
FARTHEST = 2.0**20


@dataclass(frozen=True)
class GraphLimits:
    """The largest request.

    Attributes:
        images: B; of the text tower, sentences.
        views: B x V.
        pixels: H x W.
        values: B x H x W x 3.
    """

    images: int
    views: int
    pixels: int
    values: int

    @classmethod
    def of(cls, profile: Profile) -> Self:
        """Those of a graph that is served with these sizes, which fit in any case."""
        images, views, side = profile.batch[2], profile.views[2], profile.canvas[2]
        return cls(
            images,
            max(MOST_VIEWS, images * views),
            max(MOST_PIXELS, side**2),
            max(images * side**2 * 3, min(max(USUAL_VALUES, images * LARGE_IMAGE), MOST_ELEMENTS)),
        )

    def to_parameters(self) -> dict[str, str]:
        """As a model's configuration carries them."""
        return {f"most_{name}": str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Self:
        return cls(**{field.name: int(parameters[f"most_{field.name}"]) for field in fields(cls)})

    def check(self, contract: GraphContract, feeds: Mapping[str, np.ndarray]) -> None:
        """Raise `DataError` unless the feeds fit the contract and these limits, and boxes are where views can be."""
        contract.check_feeds(feeds)
        rows = len(feeds[contract.inputs[0].name])
        _hold("images" if contract is not TEXT else "sentences", rows, self.images)
        if contract is TEXT:
            return
        image, boxes = feeds["image"], feeds["boxes"]
        self.check_run(rows, image.shape[1:3], boxes.size // 4)
        # Written so that NaN is refused, too.
        if not (np.abs(boxes) <= FARTHEST).all():
            raise DataError(
                "a box is not a number, or lies far away from its canvas", "x0, y0, x1, y1 in pixels"
            )
        corners = boxes.reshape(-1, 4)
        if (corners[:, 2:] - corners[:, :2] > np.asarray(image.shape[2:0:-1]) + 1).any():
            raise DataError("a box is longer than its canvas", "x0, y0, x1, y1 in pixels, on the canvas")

    def check_run(self, images: int, canvas: Sequence[int], views: int) -> None:
        """Raise `DataError` if so many images on canvases of this height and width, with so many views of all of
        them, are more than one run may take, whether one request or several ask for it."""
        height, width = canvas
        _hold("pixels on the canvas of an image", height * width, self.pixels)
        _hold("values on all canvases", images * height * width * 3, self.values)
        _hold("views", views, self.views)


def _hold(what: str, count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise DataError(f"{count:,} {what}, at most {most:,}" if count else f"no {what}", f"1 to {most:,}")
