"""Boxes of activation maps: against pixel-by-pixel Python, on maps of which the box is known, and at the edges.

Legend: B images, C classes, R maps, S side in pixels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cliplet.train.recipes import scenes_ccd, voc12_ccd_released
from cliplet.train.regions import Regions, box_of_maps, find_regions, squared, widened

RULES = ("first_last", "bounding")


def enlarged(small: np.ndarray, size: int) -> list[list[float]]:
    """Bilinear enlargement, pixel centres aligned and edges repeated, one pixel after the other."""
    height, width = small.shape
    large = [[0.0] * size for _ in range(size)]
    for y in range(size):
        for x in range(size):
            v = min(max((y + 0.5) * height / size - 0.5, 0), height - 1)
            u = min(max((x + 0.5) * width / size - 0.5, 0), width - 1)
            top, left = int(v), int(u)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            fy, fx = v - top, u - left
            large[y][x] = (1 - fy) * (
                (1 - fx) * float(small[top, left]) + fx * float(small[top, right])
            ) + fy * ((1 - fx) * float(small[below, left]) + fx * float(small[below, right]))
    return large


def naive_box(small: np.ndarray, size: int, threshold: float, rule: str) -> list[float]:
    large = enlarged(small, size)
    flat = [value for row in large for value in row]
    low, high = min(flat), max(flat)
    inside = [
        (x, y)
        for y in range(size)
        for x in range(size)
        if (large[y][x] - low) / (high - low + 1e-5) > threshold
    ]
    if not inside:
        return [0, 0, 1, 1]
    if rule == "first_last":
        (left, y0), (right, y1) = inside[0], inside[-1]
        x0, x1 = min(left, right), max(left, right)
    else:
        x0, x1 = min(x for x, _ in inside), max(x for x, _ in inside)
        y0, y1 = min(y for _, y in inside), max(y for _, y in inside)
    return [x0 / size, y0 / size, (x1 + 1) / size, (y1 + 1) / size]


# Whole numbers far from ties: a pixel at the threshold must not depend on the last bit.
MAPS = arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.integers(-7, 7))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(MAPS, st.sampled_from([8, 13, 20]), st.sampled_from([0.9501, 0.5003, 0.2007]))
def test_boxes_are_those_found_pixel_by_pixel(
    rule: str, small: np.ndarray, size: int, threshold: float
) -> None:
    found = box_of_maps(torch.from_numpy(small)[None], size, threshold, rule)
    np.testing.assert_allclose(found[0].numpy(), naive_box(small, size, threshold, rule), atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_many_maps_at_once_are_each_alone(rule: str) -> None:
    maps = torch.randn(70, 3, 4, generator=torch.Generator().manual_seed(0))
    found = box_of_maps(maps, 16, 0.6, rule)
    alone = torch.cat([box_of_maps(one[None], 16, 0.6, rule) for one in maps])
    assert found.equal(alone) and len(found.unique(dim=0)) > 20


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [0.0, -3.5, 1e6])
def test_a_flat_map_is_about_the_whole_image(rule: str, value: float) -> None:
    assert box_of_maps(torch.full((2, 5, 5), value), 40, 0.95, rule).tolist() == [[0, 0, 1, 1]] * 2


def bar(rows: list[str]) -> torch.Tensor:
    """A map of 0 and 1 from a drawing."""
    return torch.tensor([[[float(cell == "#") for cell in row] for row in rows]])


def test_the_released_rule_misses_the_width_between_its_first_and_last_pixel() -> None:
    """CCD's public code: rows are exact, columns only span the first and the last pixel in reading order."""
    drawn = bar([".........", "...##....", ".#######.", "....#....", "........."])
    size = 9 * 5
    released, bounding = (box_of_maps(drawn, size, 0.95, rule)[0] for rule in RULES)
    assert released[1] == bounding[1] and released[3] == bounding[3]
    assert bounding[0] < released[0] < released[2] < bounding[2]
    assert (bounding[2] - bounding[0]) > 2 * (released[2] - released[0])


def test_the_released_crop_of_a_single_peak_is_about_160_of_640_pixels() -> None:
    recipe = voc12_ccd_released()
    cam = torch.zeros(1, 1, 20, 20)
    cam[0, 0, 10, 7] = 5.0
    found = find_regions(torch.tensor([[2.0]]), cam, replace(recipe, max_regions=1))
    x0, y0, x1, y1 = 640 * found.boxes_NK4[0, 0]
    assert 160 <= x1 - x0 <= 164 and 160 <= y1 - y0 <= 164
    assert (x0 + x1) / 2 == pytest.approx(7.5 * 32, abs=2) and (y0 + y1) / 2 == pytest.approx(
        10.5 * 32, abs=2
    )


def test_corners_the_wrong_way_round_are_put_in_order() -> None:
    """Both pixels are inside the box, as they are where the first lies to the left of the last."""
    drawn = bar(
        ["......#.", "........", "#.......", "........", "........", "........", "........", "........"]
    )
    found = [box_of_maps(m, 8, 0.95, "first_last")[0] * 8 for m in (drawn, drawn.flip(-1))]
    assert [box.tolist() for box in found] == [[0, 0, 7, 3], [1, 0, 8, 3]]


@pytest.mark.parametrize(
    ("box", "margin", "wanted"),
    [
        ((0.4, 0.5, 0.6, 0.7), 0.1, (0.3, 0.4, 0.7, 0.8)),
        ((0.05, 0.5, 0.6, 0.98), 0.125, (0.0, 0.375, 0.725, 1.0)),
        ((0.0, 0.0, 1.0, 1.0), 0.5, (0.0, 0.0, 1.0, 1.0)),
        ((0.4, 0.5, 0.6, 0.7), 0.0, (0.4, 0.5, 0.6, 0.7)),
    ],
)
def test_margins_end_at_the_image(box: tuple[float, ...], margin: float, wanted: tuple[float, ...]) -> None:
    found = widened(torch.tensor([box]), margin)
    assert found[0].tolist() == pytest.approx(wanted, abs=1e-6)


SIDES = st.integers(1, 2000)
SHARES = st.floats(0, 1, width=32)


@given(SIDES, SIDES, st.lists(st.tuples(SHARES, SHARES, SHARES, SHARES), min_size=0, max_size=4))
def test_squares_are_square_inside_the_image_and_around_their_boxes(
    width: int, height: int, corners: list[tuple[float, float, float, float]]
) -> None:
    boxes = np.asarray(
        [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners], np.float32
    ).reshape(-1, 4)
    found = squared(boxes, width, height)
    assert found.shape == boxes.shape and found.dtype == np.float32
    sides = np.array([width, height, width, height])
    slack = 1e-3 * max(width, height) + 1e-6
    for before, after in zip(boxes * sides, found * sides, strict=True):
        longer = max(before[2] - before[0], before[3] - before[1])
        assert after.min() >= -slack and after[2] <= width + slack and after[3] <= height + slack
        assert after[2] - after[0] == pytest.approx(min(longer, width), abs=slack)
        assert after[3] - after[1] == pytest.approx(min(longer, height), abs=slack)
        assert (after[:2] <= before[:2] + slack).all() and (after[2:] >= before[2:] - slack).all()
        if longer <= min(width, height):
            middle, own = (before[:2] + before[2:]) / 2, (after[:2] + after[2:]) / 2
            room = (middle - longer / 2 >= 0) & (middle + longer / 2 <= [width, height])
            np.testing.assert_allclose(own[room], middle[room], atol=slack)


def test_a_square_by_hand() -> None:
    """In 200 x 100 pixels: a wide box near the top, a tall one at the right edge, one wider than the image is high."""
    boxes = np.array([[0.25, 0.0, 0.5, 0.1], [0.95, 0.2, 1.0, 0.6], [0.1, 0.4, 0.9, 0.6]], np.float32)
    wanted = [[50, 0, 100, 50], [160, 20, 200, 60], [20, 0, 180, 100]]
    np.testing.assert_allclose(squared(boxes, 200, 100) * [200, 100, 200, 100], wanted, atol=1e-3)


def test_regions_are_those_of_the_most_probable_classes_that_reach_the_threshold() -> None:
    recipe = replace(scenes_ccd(), region_size=32, max_regions=2, crop_margin=0.05)
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor([[0.3, 2.0, -1.0, 2.0], [-3.0, -1.0, -2.0, -4.0]])
    cam = torch.randn(2, 4, 3, 3, generator=generator)
    found = find_regions(logits, cam, recipe)
    assert found.classes_NK.tolist() == [[1, 3], [1, 2]], "the first of equals comes first"
    np.testing.assert_allclose(found.scores_NC, 1 / (1 + np.exp(-logits.numpy())), rtol=1e-6)
    for image, classes in enumerate(found.classes_NK):
        for place, c in enumerate(classes):
            wanted = widened(box_of_maps(cam[image, c][None], 32, 0.95, "bounding"), 0.05)
            np.testing.assert_allclose(found.boxes_NK4[image, place], wanted[0].numpy(), atol=1e-6)
    assert len(found.of_image(0, 0.9)) == 0 and len(found.of_image(1, 0.05)) == 2
    assert found.of_image(0, 0.5).tolist() == found.boxes_NK4[0].tolist()
    # Exactly at the threshold counts.
    at = float(found.scores_NC[1, 1])
    above = float(np.nextafter(np.float32(at), np.float32(1)))
    assert len(found.of_image(1, at)) == 1 and len(found.of_image(1, above)) == 0


def test_no_images_give_no_regions_and_more_regions_than_classes_are_the_classes() -> None:
    recipe = replace(scenes_ccd(), region_size=16)
    found = find_regions(torch.zeros(0, 3), torch.zeros(0, 3, 2, 2), recipe)
    assert found.boxes_NK4.shape == (0, 3, 4)


def test_a_digest_names_regions_and_threshold() -> None:
    rng = np.random.default_rng(0)
    parts: list[np.ndarray] = [
        rng.random((2, 3), np.float32),
        rng.integers(0, 3, (2, 2)),
        rng.random((2, 2, 4), np.float32),
    ]
    first = Regions(*parts).digest(0.5)
    assert first == Regions(*(p.copy() for p in parts)).digest(0.5)
    others = {Regions(*parts).digest(0.5001)}
    for place in range(3):
        changed = [p.copy() for p in parts]
        changed[place].flat[0] += 1
        others.add(Regions(*changed).digest(0.5))
    assert len(others) == 4 and first not in others
