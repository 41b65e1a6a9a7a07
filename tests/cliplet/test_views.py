"""Geometry of views: which boxes an image is looked at through, and how images share a canvas."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional

from cliplet.errors import ArtifactError, UsageError
from cliplet.views import MAX_CANVAS, Aggregation, Preprocessing, Views, place_on_canvas, whole_image_box

MEAN = (0.5, 0.5, 0.5)


def preprocessing(size: int = 32, resize_mode: str = "shortest") -> Preprocessing:
    return Preprocessing(size, MEAN, MEAN, resize_mode=resize_mode)


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("1+2x2", 5), ("1+3x3", 10), ("1+2x2+3x3+4x4", 30), (" 1 + 3X3 ", 10)]
)
def test_views_are_counted(text: str, count: int) -> None:
    views = Views.parse(text)
    assert views.count == count
    feeds = place_on_canvas([np.zeros((48, 64, 3), np.uint8)], views, preprocessing())
    assert feeds["boxes"].shape == (1, count, 4)
    assert Views.parse(str(views)) == views


@pytest.mark.parametrize(
    "text", ["", "0", "2x2", "1+2x3", "1+1x1", "1+10x10", "3x3+1", "1,2x2", "1++2x2", "whole"]
)
def test_other_views_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--views 1"):
        Views.parse(text)


def test_cells_tile_the_whole_image() -> None:
    boxes = Views.parse("1+3x3").cells(100, 70)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert areas.sum() == pytest.approx(100 * 70)
    assert boxes[0].tolist() == pytest.approx([0, 0, 100 / 3, 70 / 3])
    assert boxes[-1].tolist() == pytest.approx([200 / 3, 140 / 3, 100, 70])


@pytest.mark.parametrize("size", [(100, 70), (70, 100), (33, 32), (32, 32), (640, 427), (1, 1), (640, 1)])
def test_the_middle_square_is_where_torchvision_cuts_it(size: tuple[int, int]) -> None:
    """A ramp of x and one of y, resized and cropped by torchvision, tell where its crop begins and ends."""
    width, height = size
    x0, y0, x1, y1 = whole_image_box(width, height, preprocessing())
    assert (x1 - x0, y1 - y0) == pytest.approx((min(size), min(size)), abs=max(size) / 32)
    for axis, length, begin, end in ((1, width, x0, x1), (0, height, y0, y1)):
        ramp = np.arange(length, dtype=np.float32) + 0.5
        image = Image.fromarray(np.broadcast_to(ramp if axis else ramp[:, None], (height, width)).copy())
        cut = functional.center_crop(
            functional.resize(image, [32], functional.InterpolationMode.BILINEAR), [32]
        )
        middle = np.asarray(cut).mean()
        assert middle == pytest.approx((begin + end) / 2, abs=max(0.02 * length, 0.5))


def test_squash_sees_everything() -> None:
    assert whole_image_box(100, 70, preprocessing(resize_mode="squash")) == (0, 0, 100, 70)


def test_longest_pads_to_a_square() -> None:
    white = np.full((20, 60, 3), 255, np.uint8)
    feeds = place_on_canvas([white], Views.parse("1+2x2"), preprocessing(30, resize_mode="longest"))
    assert feeds["boxes"][0, 0].tolist() == [0, 0, 60, 60]
    assert feeds["boxes"][0, 1].tolist() == [0, 20, 30, 30]
    assert feeds["image"][0, 20:40, :60].min() == 255
    assert feeds["image"][0, :20].max() == feeds["image"][0, 40:].max() == 0


def test_images_of_different_sizes_share_a_canvas() -> None:
    pictures = [np.full((40, 50, 3), 7, np.uint8), np.full((90, 20, 3), 9, np.uint8)]
    feeds = place_on_canvas(pictures, Views.parse("1+2x2"), preprocessing())
    assert feeds["image"].shape == (2, 96, 64, 3)
    assert feeds["image"][0, :40, :50].min() == 7
    assert feeds["boxes"].shape == (2, 5, 4)
    assert feeds["boxes"][1, 1:, [0, 2]].max() == 20


def test_own_boxes_follow_the_whole_image() -> None:
    pictures = [np.zeros((40, 50, 3), np.uint8)] * 2
    boxes = [np.array([[1, 2, 30, 20], [-5, 0, 90, 90]]), np.array([[0, 0, 10, 10]])]
    feeds = place_on_canvas(pictures, Views.parse("1"), preprocessing(), boxes)
    assert feeds["boxes"].shape == (2, 3, 4)
    assert feeds["boxes"][0, 2].tolist() == [0, 0, 50, 40]
    assert feeds["boxes"][1, 1].tolist() == feeds["boxes"][1, 2].tolist() == [0, 0, 10, 10]


def test_the_whole_image_is_found_before_it_was_shrunk() -> None:
    """1000 x 333 pixels shrunk to 300 x 100: the square is the one of the full image, in the pixels that are left."""
    feeds = place_on_canvas(
        [np.zeros((100, 300, 3), np.uint8)], Views.parse("1"), preprocessing(), full_sizes=[(1000, 333)]
    )
    x0, y0, x1, y1 = whole_image_box(1000, 333, preprocessing())
    assert feeds["boxes"][0, 0].tolist() == pytest.approx(
        [x0 * 0.3, y0 * 100 / 333, x1 * 0.3, y1 * 100 / 333]
    )


@pytest.mark.parametrize("box", [[10, 10, 10, 20], [60, 0, 70, 10], [5, 5, 1, 1]])
def test_an_empty_box_is_refused(box: list[int]) -> None:
    with pytest.raises(UsageError, match="holds nothing"):
        place_on_canvas(
            [np.zeros((40, 50, 3), np.uint8)], Views.parse("1"), preprocessing(), [np.array([box])]
        )


def test_the_canvas_has_room_for_the_smallest_view_and_an_end() -> None:
    small = preprocessing(64)
    assert Views.parse("1").room(small)["fit"] < Views.parse("1+2x2").room(small)["fit"] <= MAX_CANVAS
    assert Views.parse("1+4x4").room(preprocessing(224)) == {
        "fit": MAX_CANVAS,
        "short": 448,
        "keep": MAX_CANVAS,
    }


def test_unknown_preprocessing_and_aggregation_are_refused() -> None:
    with pytest.raises(ArtifactError, match="stretch"):
        preprocessing(resize_mode="stretch")
    with pytest.raises(UsageError, match="median"):
        Aggregation("median")
    with pytest.raises(UsageError, match="zeta"):
        Aggregation("cdul", 1.5)
