"""Sizes and side-cars of engines: what they say, and what is refused."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_engine import TOY, toy_engine

from cliplet.contract import CLASSIFIER, SNIPPETS
from cliplet.engine_sidecar import Profile, SideCar, place_file, shown_bounds, sidecar_path
from cliplet.errors import ArtifactError, EnvironmentError_, UsageError
from cliplet.images import decode_image
from cliplet.views import Preprocessing, Views, place_on_canvas


def test_a_profile_from_flags() -> None:
    profile = Profile.parse(batch="1,4,32", views="10", canvas=None)
    assert (profile.batch, profile.views, profile.canvas) == ((1, 4, 32), (10, 10, 10), Profile.canvas)
    image, boxes = SNIPPETS.inputs
    low, best, high = profile.canvas
    assert profile.shapes(image) == [(1, low, low, 3), (4, best, best, 3), (32, high, high, 3)]
    assert profile.shapes(boxes) == [(1, 10, 4), (4, 10, 4), (32, 10, 4)]
    assert profile.shapes(CLASSIFIER.inputs[1]) == [(1, 4), (4, 4), (32, 4)]


def preprocessing(size: int = 224, resize_mode: str = "shortest") -> Preprocessing:
    return Preprocessing(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize_mode=resize_mode)


def test_a_profile_without_flags() -> None:
    assert Profile.parse() == Profile() == Profile().for_preprocessing(preprocessing())
    assert [shown_bounds(b) for b in (Profile.batch, Profile.views)] == ["1,8,32", "1,10,30"]
    large = Profile.parse(batch="3", canvas="64").for_preprocessing(preprocessing(448))
    assert (large.batch, large.canvas) == ((3, 3, 3), (32, 1216, 2048))
    with pytest.raises(UsageError, match="--batch 1,8,96 of --canvas 32,640,3200"):
        Profile(batch=(1, 8, 96)).for_preprocessing(preprocessing(resize_mode="longest"))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [32, 224, 448])
@pytest.mark.parametrize(
    "width, height",
    [(1, 1), (640, 480), (480, 640), (4096, 300), (20, 3000), (3055, 20), (2047, 13), (9000, 60)],
)
def test_the_canvas_has_room_for_all_that_is_fed(mode: str, size: int, width: int, height: int) -> None:
    fed = preprocessing(size, mode)
    stream = io.BytesIO()
    Image.new("L", (width, height)).save(stream, "PNG")
    for views in (Views(), Views((3,))):
        picture = decode_image(stream.getvalue(), **views.room(fed))
        full = [(picture.width, picture.height)]
        feeds = place_on_canvas([picture.pixels], views, fed, full_sizes=full)
        Profile().for_preprocessing(fed).check(SNIPPETS, feeds, "tensorrt")


@pytest.mark.parametrize("size", [32, 224, 336])
def test_the_canvas_has_room_for_every_strip_that_is_padded(size: int) -> None:
    fed = preprocessing(size, "longest")
    sides = []
    for width in range(1, 130):
        # What decoding makes of strips that are a little wider than the rounded width says.
        for full in ((width, 2048), (4 * width + 1, 8192)):
            picture = np.zeros((2048, width, 3), np.uint8)
            sides.append(place_on_canvas([picture], Views(), fed, full_sizes=[full])["image"].shape[2])
    least, _, most = Profile().for_preprocessing(fed).canvas
    assert least <= min(sides) and 2500 < max(sides) <= most


@pytest.mark.parametrize(
    "flags, words, fix",
    [
        ({"batch": "8,4,32"}, "--batch 8,4,32 .*minimum 8 is above its optimum 4", "--batch 4,8,32"),
        ({"views": "1,40,30"}, "--views 1,40,30 .*optimum 40 is above its maximum 30", "--views 1,30,40"),
        ({"canvas": "0,448,640"}, "--canvas 0,448,640 .*minimum 0 is below 1", "--canvas 1,448,640"),
        ({"batch": "1,2"}, "--batch '1,2'", "--batch 1,8,32"),
        ({"batch": "many"}, "--batch 'many'", "--batch 1,8,32"),
        ({"batch": "1,8,4096", "canvas": "32,448,1024"}, "12,884,901,888 values", "smaller maximum"),
    ],
)
def test_bounds_that_cannot_be(flags: dict[str, str], words: str, fix: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Profile.parse(flags.get("batch"), flags.get("views"), flags.get("canvas"))
    assert fix in caught.value.fix


def test_feeds_are_held_against_the_profile() -> None:
    profile = Profile(batch=(1, 2, 4), views=(1, 5, 10), canvas=(32, 64, 96))
    feeds: dict[str, np.ndarray] = {
        "image": np.zeros((4, 96, 32, 3), np.uint8),
        "boxes": np.zeros((4, 10, 4), np.float32),
    }
    profile.check(SNIPPETS, feeds, "tensorrt")
    feeds["boxes"] = np.zeros((4, 17, 4), np.float32)
    with pytest.raises(UsageError, match="17 views of an image") as caught:
        profile.check(SNIPPETS, feeds, "tensorrt")
    assert caught.value.fix == "cliplet export MODEL --runtime tensorrt --out BUNDLE --views 1,5,17"


def test_a_side_car_comes_back(tmp_path: Path) -> None:
    plan = toy_engine(tmp_path)
    read = SideCar.of(plan)
    assert (read.target, read.outputs, read.profile.batch) == ("sm89", ("probs", "features"), (1, 2, 4))
    read.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == sidecar_path(plan).read_text()
    read.profile.check(TOY, {"image": np.zeros((1, 8, 8, 3), np.uint8)}, "tensorrt")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: data.pop("target"), "is incomplete"),
        (lambda data: data["profile"].update(batch=[4, 2, 1]), "is incomplete"),
        (lambda data: data["profile"].pop("canvas"), "is incomplete"),
        (lambda data: data.update(schema=99), "has schema 99"),
        (lambda data: data.clear(), "cannot read"),
    ],
)
def test_a_damaged_side_car(damage: object, words: str, tmp_path: Path) -> None:
    plan = toy_engine(tmp_path)
    data = json.loads(sidecar_path(plan).read_text())
    damage(data)  # type: ignore[operator]
    sidecar_path(plan).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=words):
        SideCar.of(plan)
    sidecar_path(plan).write_text(json.dumps(data)[:-1])
    with pytest.raises(ArtifactError, match="cannot read"):
        SideCar.of(plan)


def test_what_builds_a_damaged_engine_again(tmp_path: Path) -> None:
    plan = toy_engine(tmp_path, library="tensorrt_rtx")
    data = json.loads(sidecar_path(plan).read_text())
    sidecar_path(plan).write_text(json.dumps({**data, "profile": {}}))
    with pytest.raises(ArtifactError) as caught:
        SideCar.of(plan)
    assert caught.value.fix == "cliplet export MODEL --runtime tensorrt_rtx --out BUNDLE"
    sidecar_path(plan).unlink()
    with pytest.raises(ArtifactError) as caught:
        SideCar.of(plan)
    assert "or --runtime tensorrt_rtx if that built it" in caught.value.fix


def test_a_file_is_placed_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    place_file(target, lambda path: path.write_bytes(b"whole"))
    assert target.read_bytes() == b"whole"

    def full(path: Path) -> None:
        path.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EnvironmentError_, match="no space left"):
        place_file(target, full)
    assert target.read_bytes() == b"whole" and list(target.parent.iterdir()) == [target]
