"""Predictions: a plain loop with Pillow and torch says the same; what cannot be scored is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import picture
from PIL import Image

from cliplet.classifier import Classifier, ClassifierConfig
from cliplet.errors import ClipletError, DataError, EnvironmentError_, UsageError
from cliplet.listing import ImageRef
from cliplet.train.feed import PixelCache
from cliplet.train.predict import predict, scored_batches, unit_pixels, usable_device
from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from cliplet.vocabulary import read_vocabulary

SIZE = 48
BROKEN, MISSING = 4, 9


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    fed = Preprocessing(SIZE, IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")
    config = ClassifierConfig(trunk="test_resnet", boost=3.0, preprocessing=fed)
    built = Classifier(config, read_vocabulary("cat,dog,bird"))
    torch.nn.init.normal_(built.head.weight, std=0.5)
    return built.eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRef]:
    folder = tmp_path_factory.mktemp("images")
    for i in range(14):
        Image.fromarray(picture(50 + 3 * i, 95 - 4 * i, seed=i)).save(folder / f"{i:02d}.png")
    (folder / f"{BROKEN:02d}.png").write_bytes(b"no image")
    (folder / f"{MISSING:02d}.png").unlink()
    return [ImageRef(f"{i:02d}.png", str(folder / f"{i:02d}.png")) for i in range(14)]


def plain(classifier: Classifier, images: Sequence[ImageRef], size: int = SIZE) -> dict[int, np.ndarray]:
    """Scores of each image by itself, by the shortest code there is."""
    found = {}
    for index, ref in enumerate(images):
        if index in (BROKEN, MISSING):
            continue
        with Image.open(ref.file) as image:
            pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
        with torch.inference_mode():
            logits, _ = classifier(torch.tensor(pixels).permute(2, 0, 1)[None])
        found[index] = torch.sigmoid(logits)[0].numpy()
    return found


@pytest.mark.parametrize(("batch_size", "workers"), [(64, 0), (5, 1), (1, 3)])
def test_scores_are_those_of_a_plain_loop(
    classifier: Classifier, images: list[ImageRef], batch_size: int, workers: int
) -> None:
    told: list[int] = []
    found = predict(classifier, images, batch_size=batch_size, workers=workers, progress=told.append)
    wanted = plain(classifier, images)
    assert found.scores_NC.dtype == np.float32 and sum(told) == 14
    for index, scores_C in wanted.items():
        np.testing.assert_allclose(found.scores_NC[index], scores_C, atol=1e-5)
    assert np.ptp(np.stack(list(wanted.values())), axis=0).min() > 0.01, (
        "images differ, or nothing was tested"
    )
    assert sorted(np.flatnonzero(np.isnan(found.scores_NC).any(1))) == [BROKEN, MISSING]
    assert np.isnan(found.scores_NC[[BROKEN, MISSING]]).all()
    assert [path for path, _ in found.failed] == ["04.png", "09.png"]
    assert found.failed[0][1].startswith("decode: ") and found.failed[1][1].startswith("read: ")


def test_nothing_but_unreadable_images(classifier: Classifier, images: list[ImageRef]) -> None:
    found = predict(classifier, [images[BROKEN], images[MISSING]])
    assert np.isnan(found.scores_NC).all() and len(found.failed) == 2


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_is_close_and_is_what_was_asked_for(
    classifier: Classifier, images: list[ImageRef], precision: str, dtype: torch.dtype
) -> None:
    seen: list[torch.dtype] = []
    handle = classifier.head.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    found = predict(classifier, images, precision=precision).scores_NC
    handle.remove()
    exact = predict(classifier, images).scores_NC
    assert seen == [dtype] and found.dtype == np.float32
    np.testing.assert_allclose(found, exact, atol=0.02)
    assert not np.array_equal(found, exact, equal_nan=True)


def test_batches_come_with_maps_at_any_size_and_the_mode_is_given_back(
    classifier: Classifier, images: list[ImageRef]
) -> None:
    classifier.train()
    before = classifier.trunk.bn1.running_mean.clone()
    cache = PixelCache(10**8)
    wanted = plain(classifier.eval(), images, 64)
    classifier.train()
    for _ in range(2):
        scored = list(
            scored_batches(classifier, images, [np.array([9, 2, 1]), np.array([0])], size=64, cache=cache)
        )
        assert [s.images.indices_B.tolist() for s in scored] == [[2, 1], [0]]
        assert scored[0].cam_BChw.shape == (2, 3, 2, 2)
        torch.testing.assert_close(scored[0].cam_BChw.flatten(2).mean(2), scored[0].logits_BC)
        np.testing.assert_allclose(scored[0].logits_BC.sigmoid()[1].numpy(), wanted[1], atol=1e-5)
    assert classifier.training and classifier.trunk.bn1.running_mean.equal(before)
    classifier.eval()


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"precision": "int8"}, UsageError, "precision 'int8'"),
        ({"device": "cuda"}, EnvironmentError_, "torch finds no usable GPU"),
    ],
)
def test_what_cannot_be_done_is_refused(
    classifier: Classifier,
    images: list[ImageRef],
    settings: dict[str, Any],
    error: type[ClipletError],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=said):
        predict(classifier, images, **settings)


def test_scores_that_are_not_finite_name_their_images(classifier: Classifier, images: list[ImageRef]) -> None:
    kept = classifier.head.bias.detach().clone()
    with torch.no_grad():
        classifier.head.bias[1] = float("nan")
    try:
        with pytest.raises(DataError, match=r"scores of 12 images are not finite \(00.png, 01.png, 02.png\)"):
            predict(classifier, images)
    finally:
        with torch.no_grad():
            classifier.head.bias.copy_(kept)


def test_pixels_become_shares_of_one_without_a_copy_in_another_order() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
    found = unit_pixels(pixels, torch.device("cpu"))
    assert found.shape == (2, 3, 5, 5) and found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(found.numpy(), pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    assert usable_device("cpu") == torch.device("cpu")


def test_paths_are_those_of_the_user(classifier: Classifier, tmp_path: Path) -> None:
    found = predict(classifier, [ImageRef("shown to you", str(tmp_path / "gone.png"))])
    assert found.failed[0][0] == "shown to you"
