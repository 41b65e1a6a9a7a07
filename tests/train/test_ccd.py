"""CCD's phases on a dozen images: the whole label update once more, image by image, with Pillow and plain numpy.

Legend: N images, C classes, S side in pixels, h x w cells of a map.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import image_set, learning_of
from torch.nn import functional

from cliplet.datasets import Dataset
from cliplet.errors import DataError, UsageError
from cliplet.listing import ImageRef
from cliplet.model_spec import parse_model_spec
from cliplet.teacher import Teacher, load_teacher
from cliplet.train import ccd, feed
from cliplet.train.ccd import (
    ccd_objective,
    estimated_bias,
    search_threshold,
    training_view_scores,
    update_labels,
    update_latent_labels,
)
from cliplet.train.classifier_recipe import ClassifierRecipe
from cliplet.train.loop import Learning
from cliplet.train.objectives import Ccd, Cdul
from cliplet.train.recipes import scenes_ccd, scenes_ccd_released, with_method
from cliplet.train.regions import Regions
from cliplet.train.released_teacher import ReleasedTeacher
from cliplet.train.teacher_labels import PassOptions
from cliplet.vocabulary import Vocabulary, prompt_set, read_vocabulary

VOCABULARY = read_vocabulary("cat,dog,bird,car,boat,tree")
CLASSES = VOCABULARY.names
SIDE = 128
# Sides in even multiples of SIDE: every corner of a region, and of the square around it, is a whole pixel.
SIZES = [(256, 256), (512, 256), (256, 512)] * 4
MENDED = replace(
    scenes_ccd(),
    trunk_weights="random",
    image_size=64,
    region_size=SIDE,
    precision="fp32",
    mean_classes=1.0,
    max_regions=4,
    teacher_normalisation="own",
    blend=0.3,
)
RELEASED = replace(
    scenes_ccd_released(),
    trunk_weights="random",
    image_size=64,
    region_size=SIDE,
    precision="fp32",
    teacher_size=SIDE,
    blend=0.3,
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks this small only wait for a second thread."""
    torch.set_num_threads(1)
    monkeypatch.setattr("cliplet.runners.torch_runner.usable_cores", lambda: 1)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    truth = np.random.default_rng(5).random((len(SIZES), len(CLASSES))) < 0.4
    return image_set(
        tmp_path / "images", SIZES, VOCABULARY, truth | np.eye(len(SIZES), len(CLASSES), dtype=bool)
    )


def some_probs(count: int = len(SIZES)) -> np.ndarray:
    """The teacher's word on whole images: every class is top-1 of two images that it is sure of."""
    rng = np.random.default_rng(3)
    probs = rng.dirichlet(np.ones(len(CLASSES)), count)
    probs[np.arange(count), np.arange(count) % len(CLASSES)] += 2 + rng.random(count)
    return (probs / probs.sum(1, keepdims=True)).astype(np.float32)


def begun(recipe: ClassifierRecipe, data: Dataset, folder: Path) -> Learning:
    torch.manual_seed(0)
    learning = learning_of(recipe, data, ccd_objective(recipe, some_probs(), CLASSES), folder / "checkpoint")
    # An untrained head says the same of every image.
    torch.nn.init.normal_(learning.classifier.head.weight, std=0.3)
    learning.classifier.train()
    return learning


# ---- the update, written once more ----


def maps_of(learning: Learning, ref: ImageRef, size: int) -> tuple[np.ndarray, torch.Tensor]:
    """Scores [C] and maps [C, h, w] of an image by itself."""
    with Image.open(ref.file) as image:
        pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
    classifier = learning.classifier.eval()
    with torch.inference_mode():
        logits, cam = classifier(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    classifier.train()
    return torch.sigmoid(logits)[0].numpy(), cam[0]


def box_of(cam_hw: torch.Tensor, rule: str) -> tuple[int, int, int, int]:
    """In pixels of the squashed image, 16 of margin added (an eighth of 128)."""
    large = functional.interpolate(cam_hw[None, None], (SIDE, SIDE), mode="bilinear")[0, 0].numpy()
    normal = (large - large.min()) / (large.max() - large.min() + 1e-5)
    found = np.argwhere(normal > 0.95)
    (y0, x0), (y1, x1) = (found[0], found[-1]) if rule == "first_last" else (found.min(0), found.max(0))
    left, right = min(x0, x1), max(x0, x1) + 1
    return (max(0, left - 16), max(0, y0 - 16), min(SIDE, right + 16), min(SIDE, y1 + 1 + 16))


def square_around(box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """The square in the image's own pixels, pushed inside where it would leave it."""
    x0, y0, x1, y1 = (v * full // SIDE for v, full in zip(box, (width, height) * 2, strict=True))
    side = max(x1 - x0, y1 - y0)
    placed = []
    for begin, end, full in ((x0, x1, width), (y0, y1, height)):
        length = min(side, full)
        assert (begin + end - length) % 2 == 0, "sizes were chosen so that no half pixels occur"
        start = min(max((begin + end - length) // 2, 0), full - length)
        placed.append((start, start + length))
    return placed[0][0], placed[1][0], placed[0][1], placed[1][1]


def scored_alone(teacher: Teacher, text: torch.Tensor, crop: Image.Image) -> np.ndarray:
    """Probabilities [C] of a crop, resized by Pillow in floating point, the encoder asked eagerly."""
    fed = teacher.preprocessing
    planes = []
    for plane in np.asarray(crop, np.float32).transpose(2, 0, 1):
        narrow = Image.fromarray(plane).resize((fed.size, crop.height), Image.Resampling.BICUBIC)
        narrow = Image.fromarray(np.asarray(narrow).clip(0, 255))
        planes.append(
            np.asarray(narrow.resize((fed.size, fed.size), Image.Resampling.BICUBIC)).clip(0, 255) / 255
        )
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (fed.mean, fed.std))
    pixels = torch.from_numpy((np.stack(planes) - mean) / std)[None].float()
    with torch.inference_mode():
        cosines = teacher.clip.encode_image(pixels, normalize=True)[0] @ text.T
    return torch.softmax(teacher.scale * cosines, 0).numpy()


def prompted(recipe: ClassifierRecipe) -> Vocabulary:
    return replace(VOCABULARY, prompts=prompt_set(recipe.prompts))


def updated_by_hand(
    learning: Learning, threshold: float | None, readable: list[int]
) -> tuple[np.ndarray, list[int]]:
    """Labels after the update, and how many regions each image had; no threshold: it is found among the scores."""
    recipe, images = learning.recipe, learning.data.images
    teacher = load_teacher(parse_model_spec(recipe.teacher))
    vocabulary = prompted(recipe)
    text = teacher.text_matrix(vocabulary)
    released = ReleasedTeacher(teacher, vocabulary, size=SIDE, scale=None)
    seen = {i: maps_of(learning, images[i], SIDE) for i in readable}
    if threshold is None:
        ranked = sorted((float(s) for scores, _ in seen.values() for s in scores), reverse=True)
        threshold = ranked[round(recipe.mean_classes * len(readable)) - 1]
    objective = learning.objective
    assert isinstance(objective, Ccd) and objective.bias_C is not None
    labels, counts = objective.labels_NC.astype(float), []
    floor = 1 / len(CLASSES) if recipe.floor < 0 else recipe.floor
    for i in readable:
        scores, cams = seen[i]
        classes = [c for c in np.argsort(-scores)[: recipe.max_regions] if scores[c] >= threshold]
        q = np.zeros(len(CLASSES))
        with Image.open(images[i].file) as image:
            for c in classes:
                box = box_of(cams[c], recipe.box_rule)
                if recipe.crop_shape == "square":
                    crop = image.crop(square_around(box, image.width, image.height))
                    q = np.maximum(q, scored_alone(teacher, text, crop))
                else:
                    q = np.maximum(q, released.probs_crop(released.squashed(np.asarray(image)), box))
        new = np.maximum(q, floor) / objective.bias_C
        labels[i] = np.clip(recipe.blend * labels[i] + (1 - recipe.blend) * new, 0, 1)
        counts.append(len(classes))
    return labels, counts


def middle_score(learning: Learning) -> float:
    """A threshold that some images' classes reach and others' do not."""
    best = sorted(maps_of(learning, ref, SIDE)[0].max() for ref in learning.data.images)
    return float((best[3] + best[4]) / 2)


@pytest.mark.parametrize("kind", ["mended", "released"])
def test_a_label_update_is_the_loop_over_images_and_crops(kind: str, data: Dataset, tmp_path: Path) -> None:
    learning = begun(MENDED if kind == "mended" else RELEASED, data, tmp_path)
    threshold = None
    if kind == "released":
        # Too few images for one window of the walk: it ends where it starts.
        threshold = middle_score(learning)
        learning.recipe = replace(learning.recipe, threshold_start=threshold)
    everyone = list(range(len(SIZES)))
    wanted, counts = updated_by_hand(learning, threshold, everyone)
    before = learning.objective.labels_NC.copy()
    row = update_labels(learning, PassOptions(tmp_path / "banks", workers=1, quiet=True))
    np.testing.assert_allclose(learning.objective.labels_NC, wanted, atol=2e-4)
    assert np.abs(wanted - before).max() > 0.1 and min(counts) == 0 < 1 < max(counts), "nothing was tested"
    assert row["regions_per_image"] == pytest.approx(np.mean(counts))
    assert 0 <= row["label_map"] <= 100
    assert learning.progress.skipped == {}
    if kind == "released":
        assert (row["threshold"], row["threshold_found"], row["windows"]) == (threshold, False, 0)


def test_an_image_lost_on_the_way_keeps_its_labels_and_is_noted(data: Dataset, tmp_path: Path) -> None:
    """One is gone, one becomes unreadable, one can be read again when the teacher asks for it, one cannot then."""
    learning = begun(MENDED, data, tmp_path)
    gone, broken, hidden, late = 2, 5, 7, 9
    Path(data.images[gone].file).unlink()
    Path(data.images[broken].file).write_bytes(b"no image")
    others = [i for i in range(len(SIZES)) if i not in (gone, broken, hidden)]
    wanted, _ = updated_by_hand(learning, None, others)
    read, all_regions = feed.read_image, ccd.all_regions

    def losing_one_after(learning: Learning) -> Regions:
        found = all_regions(learning)
        Path(data.images[late].file).unlink()
        return found

    def hiding(ref: ImageRef) -> bytes:
        if ref == data.images[hidden]:
            raise feed.ImageError("read", "not there at the moment")
        return read(ref)

    before = learning.objective.labels_NC.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "read_image", hiding)
        patch.setattr(ccd, "all_regions", losing_one_after)
        update_labels(learning, PassOptions(tmp_path / "banks", workers=1, quiet=True))
    found = learning.objective.labels_NC
    lost = [gone, broken, hidden, late]
    assert np.array_equal(found[lost], before[lost])
    wanted[late] = before[late]
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    skipped = learning.progress.skipped
    assert sorted(skipped) == ["02.png", "05.png", "07.png", "09.png"]
    assert skipped["02.png"].startswith("read: ") and skipped["05.png"].startswith("decode: ")


def test_an_update_that_was_interrupted_ends_the_same(data: Dataset, tmp_path: Path) -> None:
    labels = []
    for attempt in range(2):
        learning = begun(MENDED, data, tmp_path)
        update_labels(learning, PassOptions(tmp_path / "banks", workers=attempt, quiet=True))
        labels.append(learning.objective.labels_NC)
    assert np.array_equal(*labels)
    assert len(list((tmp_path / "banks").iterdir())) == 1, "the second run asked nothing new"


# ---- bias ----


def test_the_bias_is_the_mean_top_probability_of_sure_images() -> None:
    """CCD's public code, image by image."""
    probs = np.random.default_rng(0).dirichlet(np.full(5, 0.3), 200).astype(np.float32)
    recipe = replace(scenes_ccd(), max_entropy=0.9)
    tops: dict[int, list[float]] = {c: [] for c in range(5)}
    for row in probs:
        if -sum(float(p) * math.log(float(p) + 1e-10) for p in row) <= 0.9:
            tops[int(row.argmax())].append(float(row.max()))
    bias = estimated_bias(recipe, probs, CLASSES[:5])
    assert bias.images_C.tolist() == [len(tops[c]) for c in range(5)] and 20 < bias.images_C.sum() < 180
    np.testing.assert_allclose(bias.value_C, [np.mean(tops[c]) for c in range(5)], rtol=1e-6)


def test_a_class_without_a_sure_image_needs_a_guard() -> None:
    # `dog` is never on top, `bird` only where all is undecided.
    probs = np.array([[0.9, 0.05, 0.05], [0.7, 0.2, 0.1], [0.33, 0.33, 0.34]], np.float32)
    recipe = replace(scenes_ccd(), max_entropy=1.0, bias_guard="none", mean_classes=1.0)
    with pytest.raises(DataError, match="surely of the class 'dog', 'bird'.*0 / 0") as caught:
        ccd_objective(recipe, probs, ("cat", "dog", "bird"))
    assert caught.value.fix == "--set bias_guard=mean"
    for guard, value in (("mean", 0.8), ("one", 1.0)):
        bias = estimated_bias(replace(recipe, bias_guard=guard), probs, ("cat", "dog", "bird"))
        assert bias.value_C.tolist() == pytest.approx([0.8, value, value])
    plain = ccd_objective(replace(recipe, debias=False, floor=0.0), probs, ("cat", "dog", "bird"))
    assert np.array_equal(plain.labels_NC, probs), "who does not debias needs no bias"


def test_images_are_weighed_by_whether_the_teacher_is_sure() -> None:
    probs = np.array([[0.9, 0.05, 0.05], [0.33, 0.33, 0.34]], np.float32)
    recipe = replace(scenes_ccd(), max_entropy=1.0, unsure_weight=0.25, mean_classes=2.0)
    assert ccd_objective(recipe, probs, ("cat", "dog", "bird")).weights_N.tolist() == [1, 0.25]


def test_more_regions_than_classes_are_refused_before_anything_is_learned() -> None:
    recipe = replace(scenes_ccd(), mean_classes=5.0)
    with pytest.raises(UsageError, match="mean_classes 5.0 with 3 classes") as caught:
        ccd_objective(recipe, some_probs()[:, :3], ("cat", "dog", "bird"))
    assert caught.value.fix == "--set mean_classes=1"
    for other in (replace(recipe, label_update=False), replace(recipe, threshold_search="walk")):
        ccd_objective(other, some_probs()[:, :3], ("cat", "dog", "bird"))


# ---- threshold ----


def stub(recipe: ClassifierRecipe) -> Any:
    return SimpleNamespace(recipe=recipe)


def regions_with(scores_NC: np.ndarray) -> Regions:
    count = len(scores_NC)
    return Regions(scores_NC, np.zeros((count, 1), np.int64), np.zeros((count, 1, 4), np.float32))


@pytest.mark.parametrize("mean_classes", [0.5, 2.0, 5.0])
def test_the_quantile_search_gives_images_that_many_classes(mean_classes: float) -> None:
    scores = np.random.default_rng(1).random((40, 6), np.float32)
    recipe = replace(MENDED, mean_classes=mean_classes)
    threshold, said = search_threshold(stub(recipe), regions_with(scores))
    assert (scores >= threshold).sum() == 40 * mean_classes and said == {"threshold": threshold}
    # Images that were lost have no scores; they do not count.
    with_lost = np.concatenate([scores, np.zeros((7, 6), np.float32)])
    assert search_threshold(stub(recipe), regions_with(with_lost))[0] == threshold


def walk_by_hand(scores_NC: np.ndarray, start: float, bound: float) -> tuple[float, bool]:
    """CCD's public code: image after image, a look after every 100, the first time after 101."""
    tau, total = start, 0
    for number, row in enumerate(scores_NC):
        total += int(sum(score >= np.float32(tau) for score in row))
        if number and number % 100 == 0:
            if bound < total / 100 < bound + 2:
                return tau, True
            tau, total = tau + 0.001, 0
    return tau, False


@pytest.mark.parametrize(("start", "bound"), [(0.05, 4.0), (0.296, 4.0), (0.05, 9.0)])
def test_the_walk_is_over_training_views(start: float, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(2).random((950, 9), np.float32)
    monkeypatch.setattr(ccd, "training_view_scores", lambda learning: scores)
    recipe = replace(RELEASED, threshold_start=start, mean_classes=bound)
    threshold, said = search_threshold(stub(recipe), regions_with(np.zeros((3, 9), np.float32)))
    wanted, found = walk_by_hand(scores, start, bound)
    assert threshold == pytest.approx(wanted) and said["threshold_found"] == found
    assert said["threshold"] == threshold and said["windows"] <= 9


def test_training_views_are_every_image_once_in_random_order_some_mirrored(
    data: Dataset, tmp_path: Path
) -> None:
    learning = begun(replace(RELEASED, image_size=SIDE), data, tmp_path)
    found = training_view_scores(learning)
    assert found.shape == (len(SIZES), len(CLASSES)) and found.dtype == np.float32
    plain, mirrored = [], []
    for ref in data.images:
        plain.append(maps_of(learning, ref, SIDE)[0])
        with Image.open(ref.file) as image:
            image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).transpose(
                Image.Transpose.FLIP_LEFT_RIGHT
            ).save(tmp_path / "turned.png")
        mirrored.append(maps_of(learning, ImageRef("turned", str(tmp_path / "turned.png")), SIDE)[0])
    distance = np.abs(found[:, None] - np.concatenate([plain, mirrored])[None]).max(2)
    nearest = distance.argmin(1)
    assert distance.min(1).max() < 1e-5
    assert sorted(nearest % len(SIZES)) == list(range(len(SIZES)))
    assert (nearest % len(SIZES)).tolist() != list(range(len(SIZES)))
    assert 0 < (nearest >= len(SIZES)).sum() < len(SIZES)
    assert np.array_equal(found, training_view_scores(learning)), "the same in a run that was continued"


# ---- CDUL ----


def test_cduls_labels_move_towards_the_predictions_of_plain_views(data: Dataset, tmp_path: Path) -> None:
    recipe = replace(with_method(MENDED, "cdul"), image_size=SIDE)
    learning = learning_of(recipe, data, Cdul(recipe, some_probs()), tmp_path / "checkpoint")
    before = learning.objective.labels_NC.copy()
    Path(data.images[3].file).unlink()
    logits = np.zeros(before.shape)
    for i, ref in enumerate(data.images):
        if i != 3:
            p = maps_of(learning, ref, SIDE)[0].astype(float)
            logits[i] = np.log(p / (1 - p))
    row = update_latent_labels(learning)
    u = np.log(before.astype(float) / (1 - before.astype(float)))
    psi = np.exp(-0.5 * (before - 0.5) ** 2) / math.sqrt(2 * math.pi)
    wanted = 1 / (1 + np.exp(-(u - psi * (u - logits))))
    wanted[3] = before[3]
    np.testing.assert_allclose(learning.objective.labels_NC, wanted, atol=1e-5)
    assert "label_map" in row and list(learning.progress.skipped) == ["03.png"]
