"""Random crops: where they lie, what they show, and that a seed decides."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from cliplet.train.crops import ASPECT, crop_boxes, crop_draws, cropped


def boxes_of(least: float, count: int = 4000) -> torch.Tensor:
    return crop_boxes(count, least, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("least", [0.1, 0.4, 1.0])
def test_crops_lie_in_the_image_and_have_the_area_and_aspect(least: float) -> None:
    x, y, wide, high = boxes_of(least).unbind(1)
    for centre, half in ((x, wide), (y, high)):
        assert (centre.abs() + half).max() <= 1 + 1e-6 and half.min() > 0
    # What does not fit is cut, so areas may end a little below.
    assert (wide * high).min() >= least / ASPECT - 1e-6
    aspect = wide / high
    assert aspect.max() <= ASPECT + 1e-5 and aspect.min() >= 1 / ASPECT - 1e-5
    if least == 0.1:
        assert (wide * high).mean() == pytest.approx((1 + least) / 2, abs=0.03)
        assert aspect.log().mean() == pytest.approx(0, abs=0.01)
        # They reach every edge.
        assert (
            min((x - wide).min(), (y - high).min()) < -0.99 and max((x + wide).max(), (y + high).max()) > 0.99
        )


def test_pixels_are_those_in_the_box() -> None:
    """A box whose edges are pixels' edges, at its own size, is a slice."""
    pixels = torch.rand(2, 3, 20, 20)
    left, top, width, height = 4, 6, 10, 10
    box = [(left + width / 2) / 10 - 1, (top + height / 2) / 10 - 1, width / 20, height / 20]
    boxes, flip = torch.tensor([box, box]), torch.tensor([False, True])
    plain, mirrored = cropped(pixels, boxes, flip, 10)
    torch.testing.assert_close(plain, pixels[0, :, 6:16, 4:14], atol=1e-5, rtol=0)
    torch.testing.assert_close(mirrored, pixels[1, :, 6:16, 4:14].flip(-1), atol=1e-5, rtol=0)


def test_crops_are_resized_as_torch_interpolates() -> None:
    pixels = torch.rand(1, 3, 16, 16)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    found = cropped(pixels, box, torch.tensor([False]), 24)
    wanted = functional.interpolate(pixels, size=(24, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_generator_decides() -> None:
    draws = [crop_draws(50, 0.4, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert draws[0][0].equal(draws[1][0]) and draws[0][1].equal(draws[1][1])
    assert not draws[0][0].equal(draws[2][0])
    assert math.isclose(float(torch.cat([flip for _, flip in draws]).float().mean()), 0.5, abs_tol=0.15)
