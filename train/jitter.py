"""Random flips and colour changes for a batch, each image with its own, from a generator that seed and step decide.

Legend: B images of a batch, S side of an image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

ADJUSTMENTS = 4  # brightness, contrast, saturation, hue


def step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """The source of all randomness of one step, whichever process or resumed run asks."""
    mixed = (seed * 1_000_003 + epoch) * 1_000_003 + step
    return torch.Generator().manual_seed(mixed % 2**63)


def seed_layers(seed: int, epoch: int, step: int, rank: int) -> None:
    """Let the layers that draw for themselves (dropout, stochastic depth) draw what this step of this process draws.

    They ask torch's own generator, whose state a resumed run does not have.
    """
    mixed = np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed) % 2**63)


def flips(count: int, generator: torch.Generator) -> Tensor:
    """Which of `count` images are mirrored, bool [B]."""
    return torch.rand(count, generator=generator) < 0.5


def mirrored(pixels_B3SS: Tensor, flip_B: Tensor) -> Tensor:
    """The images, those marked mirrored left to right."""
    chosen = flip_B.to(pixels_B3SS.device)[:, None, None, None]
    return torch.where(chosen, pixels_B3SS.flip(-1), pixels_B3SS)


def jitter_parameters(count: int, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors float [B, 4] of brightness, contrast, saturation (around 1) and hue (around 0), and their order [B, 4].

    They are drawn as torchvision's ColorJitter(strength, strength, strength, strength) draws them: factors from
    1 - strength to 1 + strength, hue from -strength to strength turns, in a random order.
    """
    reach = 2 * torch.rand(count, ADJUSTMENTS, generator=generator) - 1
    centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors = centre + strength * reach
    factors[:, :3].clamp_(min=0)
    order = torch.rand(count, ADJUSTMENTS, generator=generator).argsort(1)
    return factors, order


def jittered(pixels_B3SS: Tensor, factors_B4: Tensor, order_B4: Tensor) -> Tensor:
    """Images in 0..1 with each its own brightness, contrast, saturation and hue."""
    changed = []
    for image, factors, order in zip(pixels_B3SS, factors_B4.tolist(), order_B4.tolist(), strict=True):
        for kind in order:
            image = _adjusted(image, kind, factors[kind])
        changed.append(image)
    return torch.stack(changed)


def _adjusted(image: Tensor, kind: int, factor: float) -> Tensor:
    adjust = (
        vision.adjust_brightness,
        vision.adjust_contrast,
        vision.adjust_saturation,
        vision.adjust_hue,
    )[kind]
    adjusted: Tensor = adjust(image, factor)
    return adjusted
