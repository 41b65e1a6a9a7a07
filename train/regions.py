"""From class activation maps to boxes: where in an image its probable classes are (CCD, Kim & Shim 2025).

Boxes are (x0, y0, x1, y1) as shares of the image's width and height, 0..1.

Legend: B images, C classes, R regions, K regions kept for each image, h x w cells of a CAM, S side in pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .classifier_recipe import ClassifierRecipe

EPSILON = 1e-5  # of the min-max normalisation
MAPS_AT_ONCE = 64  # that are enlarged together, so that 80 classes at 640 pixels fit into memory


@dataclass(frozen=True, eq=False)
class Regions:
    """Boxes of the most probable classes of images.

    Attributes:
        scores_NC: float32 [N, C], sigmoids of the classifier at this size.
        classes_NK: int64 [N, K], most probable first.
        boxes_NK4: float32 [N, K, 4], one for each of those classes.
    """

    scores_NC: np.ndarray
    classes_NK: np.ndarray
    boxes_NK4: np.ndarray

    def of_image(self, index: int, threshold: float) -> np.ndarray:
        """Boxes float32 [r, 4] of the image's classes whose score reaches `threshold`; r may be 0."""
        kept = self.scores_NC[index, self.classes_NK[index]] >= threshold
        return self.boxes_NK4[index, kept]

    def digest(self, threshold: float) -> str:
        """A name for exactly these regions from this threshold on."""
        parts = (self.scores_NC, self.classes_NK, self.boxes_NK4, np.float64(threshold))
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def find_regions(logits_BC: Tensor, cam_BChw: Tensor, recipe: ClassifierRecipe) -> Regions:
    """The regions of a batch, before any score decides which of them count."""
    kept = min(recipe.max_regions, logits_BC.shape[1])
    classes_BK = logits_BC.argsort(dim=1, descending=True, stable=True)[:, :kept]
    maps_BKhw = cam_BChw.gather(1, classes_BK[:, :, None, None].expand(-1, -1, *cam_BChw.shape[2:]))
    boxes = [
        box_of_maps(maps, recipe.region_size, recipe.cam_threshold, recipe.box_rule)
        for maps in maps_BKhw.flatten(0, 1).split(MAPS_AT_ONCE)
    ]
    boxes_BK4 = widened(torch.cat(boxes).unflatten(0, classes_BK.shape), recipe.crop_margin)
    return Regions(
        logits_BC.sigmoid().float().cpu().numpy(),
        classes_BK.cpu().numpy(),
        boxes_BK4.cpu().numpy(),
    )


def box_of_maps(maps_Rhw: Tensor, size: int, threshold: float, rule: str) -> Tensor:
    """Boxes float [R, 4] around what exceeds `threshold` in each map, enlarged bilinearly and scaled to 0..1.

    Args:
        rule: `bounding` takes in all such pixels. `first_last`, the public code's, has the first and the last of
            them in reading order as its corners: right from top to bottom, but not from left to right.
    """
    large_RSS = functional.interpolate(
        maps_Rhw[:, None].float(), size=(size, size), mode="bilinear", align_corners=False
    )[:, 0]
    low = large_RSS.amin((1, 2), keepdim=True)
    high = large_RSS.amax((1, 2), keepdim=True)
    inside_RSS = (large_RSS - low) / (high - low + EPSILON) > threshold
    # A flat map exceeds nothing anywhere: its region is the whole image.
    empty_R = ~inside_RSS.flatten(1).any(1)
    inside_RSS = inside_RSS | empty_R[:, None, None]
    if rule == "first_last":
        first, last = _ends(inside_RSS.flatten(1))
        y0, y1 = first // size, last // size
        # The last pixel may lie to the left of the first; both belong to the box.
        x0, x1 = (first % size).minimum(last % size), (first % size).maximum(last % size)
    else:
        x0, x1 = _ends(inside_RSS.any(1))
        y0, y1 = _ends(inside_RSS.any(2))
    # A pixel ends where the next one begins.
    return torch.stack([x0, y0, x1 + 1, y1 + 1], 1).float() / size


def _ends(line_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Positions int64 [R] of the first and the last true value of each line."""
    marks = line_RN.int()
    return marks.argmax(1), marks.shape[1] - 1 - marks.flip(1).argmax(1)


def widened(boxes: Tensor, margin: float) -> Tensor:
    """Boxes [..., 4] with `margin` added on all sides, cut off at the image's edges."""
    reach = torch.tensor([-margin, -margin, margin, margin], device=boxes.device)
    return (boxes + reach).clamp(0, 1)


def squared(boxes_R4: np.ndarray, width: int, height: int) -> np.ndarray:
    """Boxes float32 [R, 4] grown to squares in an image of `width` x `height` pixels, moved where they leave it.

    A square that is larger than the image's shorter side ends at that side.
    """
    pixels = boxes_R4 * np.asarray([width, height, width, height], np.float32)
    sides = pixels[:, 2:] - pixels[:, :2]
    longer = sides.max(axis=1, keepdims=True, initial=0)
    extent = np.asarray([width, height], np.float32)
    wanted = np.minimum(longer, extent)
    begin = (pixels[:, :2] + pixels[:, 2:]) / 2 - wanted / 2
    begin = np.clip(begin, 0, extent - wanted)
    return (np.concatenate([begin, begin + wanted], 1) / np.tile(extent, 2)).astype(np.float32)
