"""Random crops for a batch, each image with its own, from a generator that seed and step decide.

Legend: B images of a batch, S side of a crop, T side of the images it is taken from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from .jitter import flips

# Images are decoded at this multiple of a crop's side, so that a crop is enlarged little where it shows little.
ROOM = 1.25
ASPECT = 4 / 3  # at most, of width to height or height to width


def crop_boxes(count: int, least: float, generator: torch.Generator) -> Tensor:
    """Boxes float [B, 4] of random crops: centre x, y and half width, height, from -1 to 1 across the image.

    As torchvision's RandomResizedCrop draws them: an area from `least` to all of the image's, an aspect of at most
    4 : 3 on a logarithmic scale; here a side that would not fit is cut to the image instead of drawn again.
    """
    area_B, aspect_B, x_B, y_B = torch.rand(4, count, generator=generator)
    area_B = least + (1 - least) * area_B
    stretch_B = torch.exp((2 * aspect_B - 1) * math.log(ASPECT) / 2)
    wide_B = (area_B.sqrt() * stretch_B).clamp(max=1)
    high_B = (area_B.sqrt() / stretch_B).clamp(max=1)
    return torch.stack([(2 * x_B - 1) * (1 - wide_B), (2 * y_B - 1) * (1 - high_B), wide_B, high_B], 1)


def crop_draws(count: int, least: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Boxes of `crop_boxes`, and which of the images are mirrored, bool [B]."""
    return crop_boxes(count, least, generator), flips(count, generator)


def cropped(pixels_B3TT: Tensor, boxes_B4: Tensor, flip_B: Tensor, size: int) -> Tensor:
    """What lies in the boxes float [B, 3, S, S], resized (bilinear), those marked mirrored left to right."""
    x_B, y_B, wide_B, high_B = boxes_B4.to(pixels_B3TT.device).unbind(1)
    wide_B = torch.where(flip_B.to(wide_B.device), -wide_B, wide_B)
    zero_B = torch.zeros_like(x_B)
    affine_B23 = torch.stack(
        [torch.stack([wide_B, zero_B, x_B], 1), torch.stack([zero_B, high_B, y_B], 1)], 1
    )
    grid = functional.affine_grid(affine_B23, [len(x_B), 3, size, size], align_corners=False)
    found: Tensor = functional.grid_sample(
        pixels_B3TT, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return found
