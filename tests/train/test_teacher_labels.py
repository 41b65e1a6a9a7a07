"""The teacher's word on a data set, both ways of asking: what it says, what it remembers, what it cannot do.

Legend: N images, V views, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import image_set, one_process

from cliplet.datasets import Dataset
from cliplet.errors import ClipletError, UsageError
from cliplet.images import Picture, decode_image, read_image
from cliplet.model_spec import parse_model_spec
from cliplet.runners.torch_runner import TorchRunner
from cliplet.teacher import load_teacher
from cliplet.train import teacher_labels as module
from cliplet.train.classifier_recipe import ClassifierRecipe
from cliplet.train.recipes import scenes_ccd, scenes_ccd_released
from cliplet.train.released_teacher import ReleasedTeacher
from cliplet.train.teacher_labels import PassOptions, RescaledRunner, learned_scale, teacher_labels
from cliplet.train.teacher_tagger import open_teacher
from cliplet.vocabulary import ClassName, Vocabulary, prompt_set

VOCABULARY = Vocabulary((ClassName("cat", ("kitten",)), ClassName("dog"), ClassName("bird")))
BROKEN = 4


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks this small only wait for a second thread."""
    torch.set_num_threads(1)
    monkeypatch.setattr("cliplet.runners.torch_runner.usable_cores", lambda: 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight images; number 4 is none."""
    found = image_set(
        tmp_path_factory.mktemp("images"), [(60 + 9 * i, 99 - 7 * i) for i in range(8)], VOCABULARY
    )
    Path(found.images[BROKEN].file).write_bytes(b"no image")
    return found


@pytest.fixture(scope="module")
def batched(toy_clip: Path) -> ClassifierRecipe:
    # Asked as it is: exporting it to ONNX first takes longer than all else here.
    return replace(
        scenes_ccd(),
        teacher=f"open_clip:local-dir:{toy_clip}",
        views="1+2x2",
        teacher_normalisation="imagenet",
    )


RELEASED = replace(scenes_ccd_released(), teacher_size=64)


def asked(recipe: ClassifierRecipe, data: Dataset, banks: Path, **more: Any) -> module.TeacherLabels:
    return teacher_labels(recipe, data, one_process(), PassOptions(banks, workers=1, quiet=True), **more)


def pixels_of(data: Dataset, index: int) -> np.ndarray:
    with Image.open(data.images[index].file) as image:
        return np.asarray(image.convert("RGB"))


def some_boxes(rows: np.ndarray, pictures: list[Picture]) -> list[np.ndarray]:
    """As many regions as the image's number modulo 3, in eighths of its sides."""
    assert len(rows) == len(pictures)
    boxes = np.array([[0, 0, 4, 4], [2, 1, 8, 6]], np.float32) / 8
    return [boxes[: int(row) % 3] for row in rows]


def test_batched_rows_are_the_taggers_and_unreadable_images_are_named(
    batched: ClassifierRecipe, data: Dataset, tmp_path: Path
) -> None:
    found = asked(batched, data, tmp_path)
    assert found.probs_NVC.shape == (8, 5, 3) and found.probs_NVC.dtype == np.float32
    assert np.flatnonzero(~found.done_N).tolist() == [BROKEN]
    assert [(e.path, e.stage) for e in found.errors] == [("04.png", "decode")]
    assert not found.probs_NVC[BROKEN].any()
    vocabulary = replace(VOCABULARY, prompts=prompt_set("photo"))
    with open_teacher(
        batched.teacher,
        vocabulary,
        views="1+2x2",
        normalisation="imagenet",
        whole_image="squash",
        runtime="torch",
    ) as tagger:
        for index in np.flatnonzero(found.done_N).tolist():
            picture = decode_image(read_image(data.images[index]), **tagger.room)
            wanted = tagger.score([picture])["view_probs"][0]
            np.testing.assert_allclose(found.probs_NVC[index], wanted, atol=1e-5)
    assert np.ptp(found.probs_NVC[found.done_N], axis=0).min() > 1e-4


def test_one_by_one_rows_are_the_released_teachers(data: Dataset, tmp_path: Path) -> None:
    found = asked(RELEASED, data, tmp_path)
    vocabulary = replace(VOCABULARY, prompts=prompt_set(RELEASED.prompts))
    teacher = ReleasedTeacher(load_teacher(parse_model_spec("tiny")), vocabulary, size=64, scale=None)
    assert found.probs_NVC.shape == (8, 1, 3) and [e.path for e in found.errors] == ["04.png"]
    for index in np.flatnonzero(found.done_N).tolist():
        np.testing.assert_allclose(
            found.probs_NVC[index, 0], teacher.probs_whole(pixels_of(data, index)), atol=1e-6
        )
    assert not found.probs_NVC[BROKEN].any() and found.done_N.sum() == 7


def test_one_by_one_regions_are_cut_out_of_the_squashed_image(data: Dataset, tmp_path: Path) -> None:
    found = asked(RELEASED, data, tmp_path, boxes=some_boxes, purpose={"boxes": "some"})
    vocabulary = replace(VOCABULARY, prompts=prompt_set(RELEASED.prompts))
    teacher = ReleasedTeacher(load_teacher(parse_model_spec("tiny")), vocabulary, size=64, scale=None)
    for index in np.flatnonzero(found.done_N).tolist():
        squashed = teacher.squashed(pixels_of(data, index))
        each = [teacher.probs_crop(squashed, box) for box in ((0, 0, 32, 32), (16, 8, 64, 48))][: index % 3]
        wanted = np.max(each, axis=0) if each else np.zeros(3)
        np.testing.assert_allclose(found.probs_NVC[index, 0], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("box", "cut"),
    [
        ((0.5, 0.5, 0.5, 0.5), (32, 32, 33, 33)),
        ((0.999, 0.0, 1.0, 1.0), (63, 0, 64, 64)),
        ((0.2, 0.999, 0.3, 1.0), (13, 63, 19, 64)),
        ((1.0, 1.0, 1.0, 1.0), (63, 63, 64, 64)),
    ],
)
def test_a_region_of_less_than_a_pixel_is_a_pixel(
    data: Dataset,
    tmp_path: Path,
    box: tuple[float, ...],
    cut: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []

    def noted(self: ReleasedTeacher, squashed: np.ndarray, box: tuple[int, ...]) -> np.ndarray:
        seen.append(box)
        return np.full(3, 1 / 3, np.float32)

    monkeypatch.setattr(ReleasedTeacher, "probs_crop", noted)
    one = data.subset([0])
    asked(RELEASED, one, tmp_path, boxes=lambda rows, _: [np.array([box], np.float32)] * len(rows))
    assert seen == [cut]


def test_batched_regions_look_at_the_boxes_whatever_the_views(
    batched: ClassifierRecipe, data: Dataset, tmp_path: Path
) -> None:
    found = asked(batched, data, tmp_path, boxes=some_boxes, purpose={"boxes": "some"})
    assert found.probs_NVC.shape == (8, 1, 3)
    regions = np.arange(8) % 3
    assert (found.probs_NVC[found.done_N & (regions == 0)] == 0).all()
    assert found.probs_NVC[found.done_N & (regions == 1)].sum(2) == pytest.approx(1, abs=1e-5)
    assert (found.probs_NVC[found.done_N & (regions == 2)].sum(2) > 1 + 1e-5).any()


@pytest.mark.parametrize("released", [False, True])
def test_what_was_answered_is_not_asked_again_and_other_questions_are(
    batched: ClassifierRecipe, data: Dataset, tmp_path: Path, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RELEASED if released else replace(batched, views="1")
    first = asked(recipe, data, tmp_path)
    asker = module._OneByOne if released else module._Batched
    calls: list[int] = []
    fill: Callable[..., None] = asker.fill

    def counted(self: Any, images: Any, bank: Any, *rest: Any) -> None:
        calls.append(len(bank.pending()))
        fill(self, images, bank, *rest)

    monkeypatch.setattr(asker, "fill", counted)
    again = asked(recipe, data, tmp_path)
    assert not calls
    assert np.array_equal(first.probs_NVC, again.probs_NVC) and first.errors == again.errors
    others: list[tuple[ClassifierRecipe, Dataset, dict[str, Any]]] = [
        (replace(recipe, prompts="plain"), data, {}),
        (recipe, data.subset([0, 1, 2]), {}),
        (recipe, data, {"boxes": some_boxes, "purpose": {"regions": "a"}}),
        (recipe, data, {"boxes": some_boxes, "purpose": {"regions": "b"}}),
        (replace(recipe, softmax_scale=7.0), data, {}),
    ]
    for other, images, more in others:
        asked(other, images, tmp_path, **more)
    assert calls == [8, 3, 8, 8, 8]
    # What the student is and learns by is nothing to the teacher.
    asked(replace(recipe, epochs=9, boost=2.0, seed=4), data, tmp_path)
    assert len(calls) == 5


def test_a_pass_that_was_stopped_goes_on(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = asked(RELEASED, data, tmp_path / "whole")
    monkeypatch.setattr(module, "FLUSH_EVERY", 2)
    probs_whole, left = ReleasedTeacher.probs_whole, 5

    def stopping(self: ReleasedTeacher, image: np.ndarray) -> np.ndarray:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return probs_whole(self, image)

    monkeypatch.setattr(ReleasedTeacher, "probs_whole", stopping)
    with pytest.raises(KeyboardInterrupt):
        asked(RELEASED, data, tmp_path / "parts")
    left = 3
    found = asked(RELEASED, data, tmp_path / "parts")
    assert np.array_equal(found.probs_NVC, whole.probs_NVC) and found.errors == whole.errors


def test_another_softmax_scale_is_that_of_the_module_itself(toy_clip: Path) -> None:
    """The module is asked again with its temperature set, instead of its answers being changed."""
    vocabulary = replace(VOCABULARY, prompts=prompt_set("photo"))
    model = f"open_clip:local-dir:{toy_clip}"
    tagger = open_teacher(model, vocabulary, views="1+2x2", normalisation="imagenet", runtime="torch")
    assert isinstance(tagger.runner, TorchRunner)
    rng = np.random.default_rng(0)
    feeds = {
        "image": rng.integers(0, 256, (2, 64, 96, 3), np.uint8),
        "boxes": np.array([[[0, 0, 96, 64], [5, 6, 50, 40]], [[0, 0, 60, 64], [1, 2, 9, 60]]], np.float32),
    }
    eager = tagger.runner._module
    own = learned_scale(model)
    assert own == pytest.approx(eager.scale)
    with RescaledRunner(tagger.runner, own, 4.5) as rescaled:
        found = rescaled.infer(feeds)["view_probs"]
        assert (rescaled.runtime, rescaled.device) == (tagger.runner.runtime, "cpu")
    assert not hasattr(tagger.runner, "_module"), "the engine is freed with it"
    eager.scale = 4.5
    with torch.inference_mode():
        wanted = eager(torch.from_numpy(feeds["image"]), torch.from_numpy(feeds["boxes"]))[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_recipes_scale_reaches_both_ways_of_asking(
    batched: ClassifierRecipe, data: Dataset, tmp_path: Path
) -> None:
    for recipe in (batched, RELEASED):
        own = learned_scale(recipe.teacher)
        rows = asked(recipe, data, tmp_path).probs_NVC[0].astype(float)
        softer = asked(replace(recipe, softmax_scale=own / 2), data, tmp_path).probs_NVC[0]
        wanted = np.sqrt(rows) / np.sqrt(rows).sum(-1, keepdims=True)
        np.testing.assert_allclose(softer, wanted, atol=1e-5)


def test_the_engine_can_be_chosen(
    batched: ClassifierRecipe, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = module.open_teacher
    monkeypatch.setattr(
        module, "open_teacher", lambda *a, **k: asked.append(k["runtime"]) or original(*a, **k)
    )
    own = replace(batched, teacher_normalisation="own", views="1")
    found = {
        runtime: teacher_labels(
            own, data, one_process(), PassOptions(tmp_path, quiet=True, runtime=runtime)
        ).probs_NVC
        for runtime in (None, "torch")
    }
    assert asked == ["onnx", "torch"]
    np.testing.assert_allclose(found[None], found["torch"], atol=1e-4)
    with pytest.raises(UsageError, match="runtime onnx with scoring one_by_one"):
        teacher_labels(RELEASED, data, one_process(), PassOptions(tmp_path, quiet=True, runtime="onnx"))


def test_what_a_teacher_cannot_do_is_refused(
    toy_clip: Path, toy_siglip: Path, data: Dataset, tmp_path: Path
) -> None:
    siglip = f"open_clip:local-dir:{toy_siglip}"
    table: list[tuple[ClassifierRecipe, type[ClipletError], str]] = [
        (
            replace(scenes_ccd(), teacher=siglip, softmax_scale=50.0, teacher_normalisation="imagenet"),
            UsageError,
            "which gives sigmoids",
        ),
        (replace(RELEASED, views="1+2x2"), UsageError, "views 1.2x2 with scoring one_by_one"),
        (replace(RELEASED, teacher_normalisation="own"), UsageError, "one_by_one with normalisation own"),
        (replace(RELEASED, whole_image="own"), UsageError, "whole image own"),
        (replace(RELEASED, teacher=siglip), UsageError, "gives sigmoids"),
        (replace(RELEASED, teacher=f"open_clip:local-dir:{toy_clip}"), UsageError, "32 x 32 pixels only"),
        (replace(RELEASED, teacher="giant"), UsageError, "unknown model 'giant'"),
    ]
    for recipe, error, said in table:
        with pytest.raises(error, match=said):
            asked(recipe, data, tmp_path)
    assert list(tmp_path.iterdir()) == []
