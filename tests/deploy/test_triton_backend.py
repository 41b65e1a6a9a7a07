"""The Python models apart from Triton: batches share a run, and each request answers for itself alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import picture
from PIL import Image
from served import make_student, make_teacher

import cliplet
from cliplet.contract import SNIPPETS
from cliplet.deploy.repository import ServeSettings, plan_served
from cliplet.deploy.triton_backend import (
    GraphService,
    GraphUnavailable,
    TaggerService,
    error_code,
    graph_error,
)
from cliplet.errors import DataError, EnvironmentError_, UsageError
from cliplet.serving import ImageRecord, ModelCard, parse_image_problem

SIZES = [(90, 60), (64, 200), (30, 31), (700, 500), (1, 1)]


def encoded(width: int, height: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(width, height, seed)).save(file, "PNG")
    return file.getvalue()


def request(*images: bytes) -> np.ndarray:
    return np.array([[image] for image in images], object)


@pytest.fixture(scope="module", params=["teacher", "student"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = {"teacher": make_teacher, "student": make_student}[request.param]
    return make(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="module")
def card(bundle: Path) -> ModelCard:
    return plan_served([("pets", bundle)], ServeSettings(threads=1, max_batch_size=2))[0][0].card


@pytest.fixture(scope="module")
def graph(bundle: Path) -> Iterator[GraphService]:
    served = plan_served([("pets", bundle)], ServeSettings(threads=1))[0][0]
    service = GraphService(served.graphs[0].parameters)
    yield service
    service.close()


class Calls:
    """The graph as the tagger calls it, with the number of images of each call; `refuse` may raise."""

    def __init__(self, graph: GraphService) -> None:
        self.graph, self.sizes = graph, list[int]()

    def refuse(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Refuses nothing."""

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sizes.append(len(feeds["image"]))
        self.refuse(feeds)
        (answer,) = self.graph.answer([feeds])
        assert isinstance(answer, dict)
        return answer


def test_answers_equal_those_of_a_local_tagger(
    bundle: Path, card: ModelCard, graph: GraphService, tmp_path: Path
) -> None:
    images = [encoded(*size, seed) for seed, size in enumerate(SIZES)]
    files = [tmp_path / str(number) for number in range(len(images))]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(image)
    calls = Calls(graph)
    answers = TaggerService(card, calls).answer(
        [request(*images[:2]), request(*images[2:])], [["record", "scores"]] * 2
    )
    assert calls.sizes == [2, 2, 1]
    with cliplet.load(str(bundle), runtime="onnx", threads=1) as tagger:
        local = tagger.label(files)
    rows: list[Any] = []
    for answer in answers:
        assert isinstance(answer, dict) and set(answer) == {"record", "scores"}
        assert answer["record"].shape == (len(answer["scores"]), 1)
        rows += zip(answer["record"][:, 0], answer["scores"], strict=True)
    for (text, scores), wanted, size in zip(rows, local, SIZES, strict=True):
        record = ImageRecord.from_json(text)
        np.testing.assert_allclose(scores, wanted.scores, atol=1e-5)
        assert tuple(label["name"] for label in record.labels) == wanted.labels
        assert (record.width, record.height) == size
        assert len(record.boxes) == tagger.plan.views.count
        threshold = dict(zip(tagger.classes, tagger.plan.thresholds, strict=True))
        assert all(
            label["threshold"] == threshold[label["name"]] <= label["score"] for label in record.labels
        )


def test_boxes_are_in_pixels_of_the_displayed_image(card: ModelCard, graph: GraphService) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(picture(1600, 900)).save(file, "JPEG", exif=exif)
    (answer,) = TaggerService(card, Calls(graph)).answer([request(file.getvalue())], [["record"]])
    assert isinstance(answer, dict)
    record = ImageRecord.from_json(answer["record"][0, 0])
    assert (record.width, record.height) == (900, 1600)
    if card.manifest.kind == "snippets":
        # The last cell of 3 x 3.
        assert record.boxes[-1] == pytest.approx((600, 3200 / 3, 900, 1600))
    assert record.boxes[0] == (0, 0, 900, 1600)


def test_more_is_given_to_those_who_ask(card: ModelCard, graph: GraphService) -> None:
    extra = "view_probs" if card.manifest.kind == "snippets" else "cam"
    image = request(encoded(80, 60))
    first, second = TaggerService(card, Calls(graph)).answer([image, image], [["scores"], [extra]])
    assert isinstance(first, dict) and isinstance(second, dict)
    assert extra not in first and len(second[extra]) == 1


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "decode: zero bytes"),
        (b"\x00\x01garbage", "decode: not an image"),
        (b"hello", "looks like text"),
        (encoded(60, 40)[:200], "decode: truncated"),
        (encoded(400, 400), "decompression bomb: 160,000 pixels, at most 100,000"),
    ],
)
def test_a_bad_image_spoils_its_own_request_alone(
    card: ModelCard, graph: GraphService, image: bytes, reason: str
) -> None:
    from dataclasses import replace

    service = TaggerService(replace(card, max_pixels=100_000), Calls(graph))
    good = encoded(80, 60)
    answers = service.answer([request(good), request(image), request(good, image)], [["scores"]] * 3)
    assert isinstance(answers[0], dict)
    assert isinstance(answers[1], DataError) and isinstance(answers[2], DataError)
    assert reason in answers[1].happened and error_code(answers[1]) == "INVALID_ARG"
    assert parse_image_problem(answers[1].happened) == tuple(answers[1].happened.split(": ", 1))
    assert answers[2].happened == f"image 2 of 2: {answers[1].happened}"
    assert parse_image_problem(answers[2].happened) == parse_image_problem(answers[1].happened)


def test_an_image_that_the_engine_refuses_is_found_out(card: ModelCard, graph: GraphService) -> None:
    calls = Calls(graph)

    def refuse(feeds: Mapping[str, np.ndarray]) -> None:
        if (feeds["image"] == 255).all(axis=(1, 2, 3)).any():
            raise DataError("too bright")

    calls.refuse = refuse  # type: ignore[method-assign]
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    answers = TaggerService(card, calls).answer(
        [request(encoded(64, 64)), request(file.getvalue())], [["scores"]] * 2
    )
    assert isinstance(answers[0], dict)
    assert isinstance(answers[1], DataError) and answers[1].happened == "infer: too bright"


def test_an_overloaded_graph_is_not_asked_again(card: ModelCard, graph: GraphService) -> None:
    calls = Calls(graph)

    def refuse(_: Mapping[str, np.ndarray]) -> None:
        raise graph_error("[request id: x] Exceeds maximum queue size")

    calls.refuse = refuse  # type: ignore[method-assign]
    answers = TaggerService(card, calls).answer([request(encoded(64, 64))] * 2, [["scores"]] * 2)
    assert calls.sizes == [2]
    assert [error_code(a) for a in answers if not isinstance(a, dict)] == ["UNAVAILABLE"] * 2


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Exceeds maximum queue size", GraphUnavailable),
        ("Request timeout expired", GraphUnavailable),
        ("Stub process 'x' is not healthy.", GraphUnavailable),
        ("Server not ready", GraphUnavailable),
        ("unexpected shape", EnvironmentError_),
    ],
)
def test_what_another_model_says(message: str, kind: type[Exception]) -> None:
    assert type(graph_error(message)) is kind


def test_kept_answers_have_to_be_whole(card: ModelCard, graph: GraphService) -> None:
    """Triton's cache would give the part that one client asked for to all others."""
    service = TaggerService(card, Calls(graph), whole_answers=True)
    image = request(encoded(64, 64))
    part, whole = service.answer([image, image], [["record"], ["record", "scores"]])
    assert isinstance(part, UsageError) and isinstance(whole, dict)


def test_a_graph_runs_requests_together(bundle: Path, graph: GraphService) -> None:
    with cliplet.load(str(bundle), runtime="onnx", threads=1) as tagger:
        seen: list[dict[str, np.ndarray]] = []
        infer = tagger.runner.infer
        tagger.runner.infer = lambda feeds: (seen.append(dict(feeds)), infer(feeds))[1]  # type: ignore[method-assign]
        tagger.label([picture(64, 64, seed) for seed in range(3)])
        feeds = seen[0]
        wanted = infer(feeds)
    parts = [{name: array[rows] for name, array in feeds.items()} for rows in (slice(0, 1), slice(1, 3))]
    first, second = graph.answer(parts)
    assert isinstance(first, dict) and isinstance(second, dict)
    for name, array in wanted.items():
        np.testing.assert_allclose(np.concatenate([first[name], second[name]]), array, atol=1e-5)


def test_a_graph_answers_for_each_request_alone(bundle: Path, graph: GraphService) -> None:
    good = {
        t.name: np.zeros([s if isinstance(s, int) else {"B": 1, "V": 2}.get(s, 64) for s in t.axes], t.dtype)
        for t in graph.contract.inputs
    }
    good["boxes"][..., 2:] = 64
    bad = {**good, "boxes": good["boxes"].astype(np.float64)}
    answers = graph.answer([good, bad, good])
    assert [isinstance(a, dict) for a in answers] == [True, False, True]
    assert isinstance(answers[1], DataError)


@pytest.mark.parametrize("limits", [{"views": 1}, {"pixels": 64 * 80}, {"values": 64 * 80 * 3}])
def test_what_is_too_much_together_runs_alone(
    graph: GraphService, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    """Each request keeps to the limits, but a run for both would not: a wide canvas and a high one, a view of each."""
    one_box = np.array([0, 0, 64, 64], np.float32)
    boxes = one_box.reshape((1, 1, 4) if graph.contract is SNIPPETS else (1, 4))
    both = [{"image": np.zeros((1, *sides, 3), np.uint8), "boxes": boxes} for sides in ((64, 80), (80, 64))]
    sizes, infer = list[int](), graph.runner.infer
    monkeypatch.setattr(
        graph.runner, "infer", lambda feeds: (sizes.append(len(feeds["image"])), infer(feeds))[1]
    )
    assert all(isinstance(answer, dict) for answer in graph.answer(both))
    monkeypatch.setattr(graph, "limits", replace(graph.limits, **limits))
    assert all(isinstance(answer, dict) for answer in graph.answer(both))
    assert sizes == [2, 1, 1]
