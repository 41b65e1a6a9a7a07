"""What a raw graph takes from strangers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from served import make_student

from cliplet.contract import CLASSIFIER, SNIPPETS, TEXT, GraphContract
from cliplet.deploy.graph_limits import GraphLimits
from cliplet.deploy.repository import ServeSettings, plan_served
from cliplet.deploy.triton_backend import GraphService
from cliplet.engine_sidecar import Profile
from cliplet.errors import DataError

LIMITS = GraphLimits(images=3, views=6, pixels=100, values=600)


def snippets(images: int, height: int, width: int, views: int, value: float = 5) -> dict[str, np.ndarray]:
    return {
        "image": np.zeros((images, height, width, 3), np.uint8),
        "boxes": np.full((images, views, 4), value, np.float32),
    }


@pytest.mark.parametrize(
    ("contract", "feeds", "problem"),
    [
        (SNIPPETS, snippets(1, 10, 10, 6), ""),
        (SNIPPETS, snippets(3, 2, 2, 2), ""),
        (SNIPPETS, snippets(2, 10, 10, 1), ""),
        (SNIPPETS, snippets(1, 1, 100, 1, -(2.0**20)), ""),
        (TEXT, {"tokens": np.zeros((3, 4), np.int64)}, ""),
        (SNIPPETS, snippets(0, 2, 2, 2), "no images"),
        (SNIPPETS, snippets(4, 2, 2, 1), "4 images, at most 3"),
        (SNIPPETS, snippets(1, 0, 2, 1), "no pixels"),
        (SNIPPETS, snippets(1, 101, 1, 1), "101 pixels"),
        (SNIPPETS, snippets(3, 10, 10, 1), "900 values"),
        (SNIPPETS, snippets(1, 2, 2, 0), "no views"),
        (SNIPPETS, snippets(3, 2, 2, 3), "9 views"),
        (SNIPPETS, snippets(1, 2, 2, 1, np.nan), "not a number"),
        (SNIPPETS, snippets(1, 2, 2, 1, -np.inf), "not a number"),
        (SNIPPETS, snippets(1, 2, 2, 1, 2.0**21), "far away"),
        (SNIPPETS, snippets(1, 9, 4, 1) | {"boxes": np.asarray([[[0, 0, 5, 9]]], np.float32)}, ""),
        (SNIPPETS, snippets(1, 9, 4, 1) | {"boxes": np.asarray([[[0, 0, 9, 4]]], np.float32)}, "longer than its canvas"),
        (SNIPPETS, {"image": np.zeros((1, 2, 2, 3), np.uint8)}, "got tensors"),
        (SNIPPETS, snippets(1, 2, 2, 1) | {"boxes": np.zeros((2, 1, 4), np.float32)}, "its axis B"),
        (CLASSIFIER, snippets(1, 2, 2, 1), "boxes"),
        (CLASSIFIER, {"image": np.zeros((1, 2, 2, 3), np.uint8), "boxes": np.full((1, 4), np.nan, np.float32)}, "not a number"),
        (TEXT, {"tokens": np.zeros((4, 4), np.int64)}, "4 sentences"),
    ],
)  # fmt: skip
def test_limits(contract: GraphContract, feeds: Mapping[str, np.ndarray], problem: str) -> None:
    if not problem:
        LIMITS.check(contract, feeds)
        return
    with pytest.raises(DataError, match=problem):
        LIMITS.check(contract, feeds)


@pytest.mark.parametrize(
    ("profile", "images", "views"),
    [(Profile(batch=(1, 2, 4)), 4, 320), (Profile(batch=(1, 1, 64), views=(1, 1, 90)), 64, 5760)],
)
def test_what_a_server_is_told_to_take_fits(profile: Profile, images: int, views: int) -> None:
    limits = GraphLimits.of(profile)
    assert (limits.images, limits.views) == (images, views)
    assert limits.values >= profile.batch[2] * profile.canvas[2] ** 2 * 3
    assert GraphLimits.from_parameters(limits.to_parameters()) == limits


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GraphService]:
    bundle: Path = make_student(tmp_path_factory.mktemp("bundle") / "student")
    served = plan_served([("pets", bundle)], ServeSettings(threads=1))[0][0]
    opened = GraphService(served.graphs[0].parameters)
    yield opened
    opened.close()


def test_a_wide_and_a_high_canvas_do_not_meet(service: GraphService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they would take as many pixels as the product of their longer sides."""
    seen: list[tuple[int, ...]] = []
    infer = service.runner.infer

    def watched(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        seen.append(feeds["image"].shape)
        return infer(feeds)

    monkeypatch.setattr(service.runner, "infer", watched)
    boxes = np.array([[0, 0, 8, 8]], np.float32)
    shapes = [(1, 8, 2**20, 3), (1, 2**20, 8, 3)]
    answers = service.answer([{"image": np.zeros(s, np.uint8), "boxes": boxes} for s in shapes])
    assert seen == shapes
    assert all(isinstance(answer, dict) for answer in answers)


def test_one_bad_request_leaves_the_others(service: GraphService) -> None:
    good = {"image": np.zeros((1, 8, 8, 3), np.uint8), "boxes": np.array([[0, 0, 8, 8]], np.float32)}
    answers = service.answer([good, {**good, "boxes": good["boxes"] * np.nan}, good])
    assert isinstance(answers[1], DataError)
    assert all(isinstance(answer, dict) for answer in answers[::2])
