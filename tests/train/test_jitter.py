"""Flips and colour changes: torchvision's, each image with its own, repeatable from seed, epoch and step."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchvision.transforms import ColorJitter
from torchvision.transforms.v2 import functional as vision

from cliplet.train.jitter import flips, jitter_parameters, jittered, mirrored, step_generator


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 12, 12, generator=generator(9))


def test_a_generator_belongs_to_one_step_of_one_epoch_of_one_seed() -> None:
    names = list(itertools.product((0, 1, 2, 1_000_003), (0, 1, 999_999, 1_000_000), (0, 1, 2, 20_000)))
    draws = {tuple(torch.rand(4, generator=step_generator(*name)).tolist()) for name in names}
    assert len(draws) == len(names)
    torch.manual_seed(5)
    first = torch.rand(4, generator=step_generator(3, 2, 1))
    torch.manual_seed(6)
    assert first.equal(torch.rand(4, generator=step_generator(3, 2, 1)))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_changes_are_torchvisions_in_the_drawn_order(order: tuple[int, ...]) -> None:
    adjust = [
        vision.adjust_brightness,
        vision.adjust_contrast,
        vision.adjust_saturation,
        vision.adjust_hue,
    ]
    pixels = images(3)
    factors, _ = jitter_parameters(3, 0.5, generator())
    found = jittered(pixels, factors, torch.tensor([order] * 3))
    for image, own, changed in zip(pixels, factors.tolist(), found, strict=True):
        for kind in order:
            image = adjust[kind](image, own[kind])
        torch.testing.assert_close(changed, image, rtol=0, atol=0)
    assert not torch.allclose(found, pixels, atol=0.02)


def test_the_order_matters_and_each_image_has_its_own() -> None:
    pixels = images(1).expand(64, -1, -1, -1)
    factors, order = jitter_parameters(64, 0.5, generator())
    assert len({tuple(row) for row in order.tolist()}) > 15
    assert all(sorted(row) == [0, 1, 2, 3] for row in order.tolist())
    found = jittered(pixels, factors, order)
    assert len({tuple(image.flatten().tolist()) for image in found}) == 64
    same = jittered(pixels, factors[:1].expand(64, -1), order)
    assert 1 < len({tuple(image.flatten().tolist()) for image in same}) <= 24


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5])
def test_factors_are_uniform_in_the_range_of_color_jitter(strength: float) -> None:
    factors, _ = jitter_parameters(4000, strength, generator())
    known = ColorJitter(strength, strength, strength, strength)
    for kind, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        low, high = getattr(known, name) or ((1, 1) if kind < 3 else (0, 0))
        drawn = factors[:, kind]
        assert low <= drawn.min() and drawn.max() <= high
        assert drawn.mean().item() == pytest.approx((low + high) / 2, abs=0.02)
        assert drawn.std().item() == pytest.approx((high - low) / 12**0.5, abs=0.01)


def test_no_change_leaves_the_image() -> None:
    factors, order = jitter_parameters(4, 0.0, generator())
    torch.testing.assert_close(jittered(images(4), factors, order), images(4), rtol=0, atol=1e-5)


def test_the_same_generator_gives_the_same() -> None:
    for draw in (lambda g: flips(20, g), lambda g: torch.cat(jitter_parameters(5, 0.5, g))):
        assert draw(generator(3)).equal(draw(generator(3)))
        assert not draw(generator(3)).equal(draw(generator(4)))


def test_marked_images_are_mirrored_left_to_right() -> None:
    pixels = images(6)
    flip = torch.tensor([True, False, True, True, False, False])
    found = mirrored(pixels, flip)
    for image, marked, changed in zip(pixels, flip, found, strict=True):
        assert changed.equal(image[:, :, torch.arange(11, -1, -1)] if marked else image)
    assert 400 < int(flips(1000, generator()).sum()) < 600
