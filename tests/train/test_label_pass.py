"""The teacher's pass: rows against the tagger asked image by image, order, resuming, failures, regions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import picture
from PIL import Image

import cliplet
from cliplet.errors import ClipletError, EnvironmentError_, UsageError
from cliplet.images import ImageRef, Picture, decode_image, find_images, read_image
from cliplet.model_spec import parse_model_spec
from cliplet.tagger import Tagger
from cliplet.teacher import load_teacher
from cliplet.train.label_bank import LabelBank
from cliplet.train.label_pass import PassReport, open_teacher, provenance, score_images
from cliplet.vocabulary import PROMPT_SETS, ClassName, Vocabulary

VOCABULARY = Vocabulary(
    (ClassName("cat", ("kitten",)), ClassName("dog: the animal, really"), ClassName("bird"))
)


@pytest.fixture(scope="module")
def model(toy_clip: Path) -> str:
    return f"open_clip:local-dir:{toy_clip}"


@pytest.fixture(scope="module")
def tagger(model: str) -> Tagger:
    return open_teacher(model, VOCABULARY, views="1+2x2", threads=1)


@pytest.fixture(scope="module")
def images(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ImageRef]:
    """24 photographs of different sizes, and two files that are none among them."""
    found = find_images([str(photos)]).images
    broken = tmp_path_factory.mktemp("broken")
    (broken / "a.jpg").write_bytes(b"no image")
    bad = [ImageRef("bad", str(broken / "a.jpg")), ImageRef("missing", str(broken / "b.jpg"))]
    return [*found[:9], bad[0], *found[9:], bad[1]]


def bank_of(
    folder: Path, tagger: Tagger, images: Sequence[ImageRef], views: int = 5, **more: Any
) -> LabelBank:
    paths = [ref.path for ref in images]
    return LabelBank.open(
        folder, paths=paths, classes=tagger.classes, views=views, provenance=provenance(tagger), **more
    )


def run(folder: Path, tagger: Tagger, images: Sequence[ImageRef], **settings: Any) -> PassReport:
    views = 1 if "boxes" in settings else 5
    with bank_of(folder, tagger, images, views) as bank:
        return score_images(tagger, images, bank, **{"chunk": 8, **settings})


def decoded(tagger: Tagger, ref: ImageRef) -> Picture:
    return decode_image(read_image(ref), **tagger.room)


def test_every_row_is_what_the_tagger_says_of_that_image(
    tagger: Tagger, images: list[ImageRef], tmp_path: Path
) -> None:
    settled: list[int] = []
    report = run(tmp_path, tagger, images, progress=settled.append)
    assert (report.done, report.failed, report.views, sum(settled)) == (24, 2, 120, 26)
    assert report.seconds > 0
    bank = LabelBank.read(tmp_path)
    assert [(e.path, e.stage) for e in bank.errors] == [("bad", "decode"), ("missing", "read")]
    for index in np.flatnonzero(bank.done):
        wanted = tagger.score([decoded(tagger, images[index])])["view_probs"][0]
        np.testing.assert_allclose(bank.probs[index], wanted, atol=1e-5)
    assert np.ptp(bank.probs[bank.done], axis=0).min() > 1e-4, "images differ, or nothing was tested"


@pytest.mark.parametrize("with_boxes", [False, True])
def test_rows_depend_neither_on_threads_nor_on_interruptions(
    tagger: Tagger, images: list[ImageRef], tmp_path: Path, with_boxes: bool
) -> None:
    settings: dict[str, Any] = {"boxes": some_boxes} if with_boxes else {}
    run(tmp_path / "a", tagger, images, workers=1, **settings)
    calls = 0

    def interrupt(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", tagger, images, workers=5, progress=interrupt, **settings)
    # What a kill between two states leaves: one image of a chunk is pending.
    state = np.load(tmp_path / "b" / "state.npy", mmap_mode="r+")
    assert 0 < (state == 1).sum() < 24
    state[3] = 0
    state.flush()
    report = run(tmp_path / "b", tagger, images, workers=3, **settings)
    assert report.done == 8 + 8 + 1, "the first chunk again, and those that were never begun"
    a, b = LabelBank.read(tmp_path / "a"), LabelBank.read(tmp_path / "b")
    assert a.probs.tobytes() == b.probs.tobytes()
    assert a.done.tolist() == b.done.tolist() and a.errors == b.errors
    assert run(tmp_path / "b", tagger, images, **settings) == PassReport(0, 0, pytest.approx(0, abs=1), 0)


def test_a_grown_list_ends_as_if_it_had_been_whole(
    tagger: Tagger, images: list[ImageRef], tmp_path: Path
) -> None:
    run(tmp_path / "grown", tagger, images[:12])
    run(tmp_path / "grown", tagger, images)
    run(tmp_path / "whole", tagger, images)
    grown, whole = LabelBank.read(tmp_path / "grown"), LabelBank.read(tmp_path / "whole")
    assert grown.probs.tobytes() == whole.probs.tobytes()
    assert grown.errors == whole.errors


def some_boxes(rows: np.ndarray, pictures: list[Picture]) -> list[np.ndarray]:
    """0 to 4 regions of each image, and 40 of one, found from its row alone."""
    found = []
    for row, _ in zip(rows, pictures, strict=True):
        rng = np.random.default_rng(int(row))
        count = 40 if row == 11 else int(row) % 5
        corners = rng.uniform(0, 0.6, (count, 2))
        found.append(
            np.concatenate([corners, corners + rng.uniform(0.2, 0.4, (count, 2))], 1).astype(np.float32)
        )
    return found


def test_regions_give_the_class_wise_maximum_over_crops(
    tagger: Tagger, images: list[ImageRef], tmp_path: Path
) -> None:
    report = run(tmp_path, tagger, images, boxes=some_boxes)
    bank = LabelBank.read(tmp_path)
    assert bank.probs.shape == (26, 1, 3)
    counted = 0
    for row in np.flatnonzero(bank.done):
        image = decode_image(read_image(images[row]), fit=640)
        (boxes,) = some_boxes(np.array([row]), [image])
        counted += len(boxes)
        wanted = np.zeros(3, np.float32)
        if len(boxes):
            height, width = image.pixels.shape[:2]
            in_pixels = boxes * np.float32([width, height, width, height])
            wanted = tagger.score([image], [in_pixels])["view_probs"][0, 1:].max(0)
        np.testing.assert_allclose(bank.probs[row, 0], wanted, atol=1e-5)
    assert report.views == counted > 80


def test_regions_are_cut_out_of_larger_pictures(tagger: Tagger, tmp_path: Path) -> None:
    Image.fromarray(picture(1280, 960)).save(tmp_path / "large.png")
    refs = find_images([str(tmp_path / "large.png")]).images
    seen: list[tuple[int, ...]] = []

    def boxes(_: np.ndarray, pictures: list[Picture]) -> list[np.ndarray]:
        seen.extend(p.pixels.shape for p in pictures)
        return [np.float32([[0, 0, 0.5, 0.5]])]

    assert run(tmp_path / "bank", tagger, refs, boxes=boxes).views == 1
    assert seen == [(480, 640, 3)]


class Picky:
    """An engine that refuses some batches, and remembers how many images and views all had."""

    def __init__(self, runner: Any, refuses: Callable[[np.ndarray], bool]) -> None:
        self.runner, self.refuses = runner, refuses
        self.shapes: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.shapes.append(feeds["boxes"].shape[:2])
        if self.refuses(feeds["image"]):
            raise EnvironmentError_("the engine failed on this")
        found: dict[str, np.ndarray] = self.runner.infer(feeds)
        return found


@pytest.mark.parametrize(
    "settings", [{}, {"boxes": lambda rows, _: [np.float32([[0, 0, 1, 1]])] * len(rows)}]
)
def test_an_image_that_the_engine_refuses_fails_alone(
    tagger: Tagger, images: list[ImageRef], tmp_path: Path, settings: dict[str, Any]
) -> None:
    culprit = next(ref for ref in images if ref.path.endswith("005.jpg"))
    data = read_image(culprit)
    levels = [int(decode_image(data, fit=fit).pixels.sum()) for fit in (tagger.room["fit"], 640)]
    picky = Picky(tagger.runner, lambda image: any(int(one.sum()) in levels for one in image))
    report = run(tmp_path, Tagger(tagger.plan, picky, tagger.preprocessing), images, **settings)
    assert (report.done, report.failed) == (23, 3)
    infer = [e for e in LabelBank.read(tmp_path).errors if e.stage == "infer"]
    assert [(e.path, e.reason) for e in infer] == [(culprit.path, "the engine failed on this")]


def test_crops_of_many_images_share_a_batch_and_little_is_padded(
    tagger: Tagger, images: list[ImageRef], tmp_path: Path
) -> None:
    watched = Picky(tagger.runner, lambda _: False)
    report = run(
        tmp_path, Tagger(tagger.plan, watched, tagger.preprocessing), images, boxes=some_boxes, chunk=26
    )
    sizes = [batch * views for batch, views in watched.shapes]
    assert max(sizes) <= 32 and len(sizes) == 4
    assert report.views <= sum(sizes) <= 1.3 * report.views


def test_a_broken_engine_is_not_the_images_fault(
    tagger: Tagger, images: list[ImageRef], tmp_path: Path
) -> None:
    broken = Tagger(tagger.plan, Picky(tagger.runner, lambda _: True), tagger.preprocessing)
    with pytest.raises(EnvironmentError_, match="refused all 8 images"):
        run(tmp_path, broken, images)
    assert len(LabelBank.read(tmp_path).pending()) == 26
    assert run(tmp_path, tagger, images).done == 24


def test_decoding_runs_at_most_one_chunk_ahead(
    tagger: Tagger, images: list[ImageRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    settled: list[int] = []
    ahead: list[int] = []
    lock = threading.Lock()

    def reading(ref: ImageRef) -> bytes:
        with lock:
            started.append(ref.path)
            ahead.append(len(started) - sum(settled))
        return read_image(ref)

    monkeypatch.setattr("cliplet.train.label_pass.read_image", reading)
    run(tmp_path, tagger, images, chunk=4, progress=settled.append)
    assert sorted(started) == sorted(ref.path for ref in images)
    assert max(ahead) <= 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 1}, "1 views"),
        ({"views": 5, "boxes": some_boxes}, "5 views"),
        ({"views": 5, "drop": 1}, "not those of"),
        ({"views": 1, "boxes": lambda rows, pictures: []}, "0 lists of boxes"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tagger: Tagger, images: list[ImageRef], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with bank_of(tmp_path, tagger, images, settings["views"]) as bank:
        given = images[settings.get("drop", 0) :]
        with pytest.raises(UsageError, match=message):
            score_images(tagger, given, bank, boxes=settings.get("boxes"))


def test_a_teacher_takes_any_vocabulary(model: str, tagger: Tagger) -> None:
    """Names with commas, colons and synonyms of one's own, which no command line could spell."""
    assert tagger.classes == VOCABULARY.names
    pixels = Picture(picture(64, 64), 64, 64)
    scored = tagger.score([pixels])["view_probs"]
    with open_teacher(model, VOCABULARY, views="1+2x2", runtime="torch", threads=1) as eager:
        np.testing.assert_allclose(eager.score([pixels])["view_probs"], scored, atol=1e-5)
    origami = replace(VOCABULARY, prompts=PROMPT_SETS["ensemble7"])
    with open_teacher(model, origami, views="1+2x2", threads=1) as other:
        assert np.abs(other.score([pixels])["view_probs"] - scored).max() > 1e-3
        assert provenance(other) != provenance(tagger)


def test_a_bundle_keeps_its_own_vocabulary(model: str, tagger: Tagger, own_cache: Path) -> None:
    described = {m.parent: m.read_text() for m in (own_cache / "bundles").glob("*/cliplet.json")}
    folder = next(f for f, text in described.items() if "really" in text and '"prompt_set": "photo"' in text)
    pixels = Picture(picture(64, 64), 64, 64)
    with open_teacher(str(folder), VOCABULARY, views="1+2x2", threads=1) as bundled:
        np.testing.assert_allclose(
            bundled.score([pixels])["view_probs"], tagger.score([pixels])["view_probs"], atol=1e-6
        )
    with pytest.raises(UsageError, match="other classes or prompts"):
        open_teacher(str(folder), Vocabulary(VOCABULARY.classes[:2]), views="1")


@pytest.mark.parametrize(
    ("normalisation", "mean", "std"),
    [
        ("own", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_the_encoder_is_fed_with_the_normalisation_that_was_asked_for(
    model: str, normalisation: Any, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    pixels = picture(32, 32)
    teacher = load_teacher(parse_model_spec(model))
    fed = torch.from_numpy((pixels / 255 - mean) / std).float().permute(2, 0, 1)[None]
    with torch.inference_mode():
        cosines = teacher.clip.encode_image(fed, normalize=True) @ teacher.text_matrix(VOCABULARY).T
        wanted = (teacher.scale * cosines).softmax(-1).numpy()
    with open_teacher(
        model, VOCABULARY, views="1", normalisation=normalisation, runtime="torch", threads=1
    ) as tagger:
        assert tagger.preprocessing.mean == mean and tagger.preprocessing.std == std
        found = tagger.score([Picture(pixels, 32, 32)])["view_probs"][0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert provenance(tagger)["preprocessing"]["std"] == std


def test_a_squashed_whole_image_is_seen_from_edge_to_edge(model: str) -> None:
    pictures = [Picture(picture(96, 48), 96, 48)]
    with (
        open_teacher(model, VOCABULARY, views="1", threads=1) as own,
        open_teacher(model, VOCABULARY, views="1", whole_image="squash", threads=1) as squash,
    ):
        scored = own.score(pictures, [np.array([[0, 0, 96, 48]])])["view_probs"][0]
        np.testing.assert_allclose(squash.score(pictures)["view_probs"][0, 0], scored[1], atol=1e-5)
        assert np.abs(scored[0] - scored[1]).max() > 1e-4
        assert provenance(own) != provenance(squash)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"normalisation": "imagenet"}, UsageError, "runtime torch"),
        ({"normalisation": "clip"}, UsageError, "own or imagenet"),
        ({"whole_image": "stretch"}, UsageError, "own or squash"),
        ({"views": "2x2"}, UsageError, "views"),
        ({"runtime": "tensorrt"}, UsageError, "runtime"),
    ],
)
def test_teachers_that_cannot_be_opened(
    model: str, options: dict[str, Any], error: type[ClipletError], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_teacher(model, VOCABULARY, **{"views": "1", **options})


def test_the_labels_of_a_bank_are_those_of_the_tagger(
    model: str, images: list[ImageRef], tmp_path: Path
) -> None:
    """A bank of all views holds what `cliplet label` would have scored."""
    from cliplet.pseudo_labels import cdul_labels

    readable = [ref for ref in images if ref.path not in ("bad", "missing")]
    with cliplet.load(model, classes="cat,dog,bird", views="1+2x2", threads=1) as tagger:
        run(tmp_path, tagger, readable)
        scores = cdul_labels(np.array(LabelBank.read(tmp_path).probs))
        records = tagger.label([ref.path for ref in readable])
    np.testing.assert_allclose(scores, np.stack([r.scores for r in records]), atol=1e-5)
