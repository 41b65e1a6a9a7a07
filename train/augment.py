"""Random changes to a batch of images that leave their captions true: place, light, colour, blur, holes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .recipes import TinyClipRecipe

# Legend: B images, H W pixels.


def augmented(pixels_BHW3: Tensor, recipe: TinyClipRecipe, generator: torch.Generator) -> Tensor:
    """Augmented images, float32 [B, 3, H, W] in 0..1, from uint8 [B, H, W, 3]."""
    images = pixels_BHW3.permute(0, 3, 1, 2).float().div_(255)
    images = _moved(images, recipe, generator)
    images = _coloured(images, recipe, generator)
    images = _blurred(images, recipe.blur, generator)
    return _erased(images, recipe.erase, generator).clamp_(0, 1)


def _between(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _moved(images: Tensor, recipe: TinyClipRecipe, generator: torch.Generator) -> Tensor:
    count = len(images)
    turn = _between(-1, 1, count, generator) * math.radians(recipe.turn_degrees)
    # Width and height vary apart: whole images are squashed, cells of them less so.
    wide = torch.exp(_between(-1, 1, count, generator) * recipe.zoom)
    high = torch.exp(_between(-1, 1, count, generator) * recipe.zoom)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    shift = _between(-1, 1, 2 * count, generator).view(count, 2) * recipe.zoom / 2
    cos, sin = torch.cos(turn), torch.sin(turn)
    rows = torch.stack(
        [
            torch.stack([mirror * cos * wide, -sin * high, shift[:, 0]], 1),
            torch.stack([mirror * sin * wide, cos * high, shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _coloured(images: Tensor, recipe: TinyClipRecipe, generator: torch.Generator) -> Tensor:
    count, strength = len(images), recipe.colour
    # Hue turn and saturation act on chroma in the YIQ plane, gains and offset on each channel.
    turn = torch.randn(count, generator=generator) * 0.5 * strength
    wild = torch.rand(count, generator=generator) < 0.15 * strength
    turn = torch.where(wild, _between(-math.pi, math.pi, count, generator), turn)
    saturation = torch.exp(torch.randn(count, generator=generator) * 0.3 * strength)
    saturation = saturation * (torch.rand(count, generator=generator) >= recipe.gray)
    to_chroma = torch.tensor([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    from_chroma = torch.tensor([[0.956, 0.621], [-0.272, -0.647], [-1.106, 1.703]])
    luma = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    cos, sin = saturation * torch.cos(turn), saturation * torch.sin(turn)
    turned = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    matrix = luma + from_chroma @ turned @ to_chroma
    gain = torch.exp(torch.randn(count, 3, 1, generator=generator) * 0.08 * strength)
    gain = gain * torch.exp(torch.randn(count, 1, 1, generator=generator) * 0.25 * strength)
    pivot = images.mean((1, 2, 3))
    offset = pivot * (1 - gain.mean((1, 2))) + torch.randn(count, generator=generator) * 0.08 * strength
    flat = torch.baddbmm(offset[:, None, None], matrix * gain, images.flatten(2))
    return flat.view_as(images)


def _blurred(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(len(images), generator=generator) < share
    if chosen.any():
        padded = F.pad(images[chosen], (1, 1, 1, 1), mode="replicate")
        images[chosen] = F.avg_pool2d(padded, 3, stride=1)
    return images


def _erased(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    side = images.shape[-1]
    for k in torch.nonzero(torch.rand(len(images), generator=generator) < share).flatten().tolist():
        height, width = (_between(0.1, 0.35, 2, generator) * side).int().tolist()
        top, left = (torch.rand(2, generator=generator) * side).int().tolist()
        colour = torch.rand(3, 1, 1, generator=generator)
        images[k, :, top : top + height, left : left + width] = colour
    return images
