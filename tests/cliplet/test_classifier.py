"""The classifier: its formula by hand, trunks of several families, its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from towers import save_toy_tower

from cliplet.classifier import (
    Classifier,
    ClassifierConfig,
    classifier_details,
    load_classifier,
    save_classifier,
)
from cliplet.errors import ArtifactError, ClipletError, UsageError
from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from cliplet.vocabulary import ClassName, Vocabulary

VOCABULARY = Vocabulary((ClassName("cat", ("kitten",)), ClassName("dog"), ClassName("tv monitor")))
FED = Preprocessing(64, IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Networks this small only wait for a second thread."""
    torch.set_num_threads(1)


def classifier_of(trunk: str = "test_resnet", boost: float = 3.0, fed: Preprocessing = FED) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(trunk=trunk, boost=boost, preprocessing=fed), VOCABULARY).eval()


class Pixels(nn.Module):
    """A trunk whose feature map is the normalised image itself."""

    def forward_intermediates(self, pixels: Tensor, **options: object) -> list[Tensor]:
        assert options["intermediates_only"] and options["norm"]
        return [pixels]


def with_pixels(boost: float) -> Classifier:
    """A classifier on 2 x 1 images whose head sees their normalised colours."""
    classifier = classifier_of(
        boost=boost, fed=Preprocessing(64, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0), "bilinear", "squash")
    )
    classifier.trunk = Pixels()
    classifier.head = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        # Class 0 is red, class 1 minus green plus 1, class 2 blue minus red.
        classifier.head.weight.copy_(
            torch.tensor([[1.0, 0, 0], [0, -1.0, 0], [-1.0, 0, 1.0]])[..., None, None]
        )
        classifier.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    return classifier


@pytest.mark.parametrize("boost", [3.0, 1.0, 0.5])
def test_a_logit_is_the_mean_of_the_boosted_map_by_hand(boost: float) -> None:
    # Two pixels: (1, 1/2, 1) and (0, 1/4, 1), normalised (1, 1, 1) and (-1, 0, 1).
    pixels = torch.tensor([[1.0, 0.5, 1.0], [0.0, 0.25, 1.0]]).T.reshape(1, 3, 1, 2)
    logits, cam = with_pixels(boost)(pixels)
    # Maps (1, -1), (0, 1), (0, 2); only what is positive is boosted.
    torch.testing.assert_close(cam, torch.tensor([[[[boost, -1.0]], [[0.0, boost]], [[0.0, 2 * boost]]]]))
    torch.testing.assert_close(logits, torch.tensor([[(boost - 1) / 2, boost / 2, boost]]))


def test_gradients_are_boosted_where_the_map_is_positive() -> None:
    classifier = with_pixels(3.0)
    logits, _ = classifier(torch.tensor([[1.0, 0.5, 1.0], [0.0, 0.25, 1.0]]).T.reshape(1, 3, 1, 2))
    logits.sum().backward()
    # Map 0 is boosted at one of two pixels, map 1 at one, map 2 at one; exactly 0 is not above 0.
    torch.testing.assert_close(classifier.head.bias.grad, torch.tensor([2.0, 2.0, 2.0]))


@pytest.mark.parametrize(
    ("trunk", "cells"),
    [
        ("test_resnet", 2),
        ("test_convnext", 2),
        ("test_efficientnet", 2),
        ("test_vit", 4),
        ("ghostnet_050", 2),
    ],
)
def test_trunks_of_other_families_give_maps(trunk: str, cells: int) -> None:
    classifier = classifier_of(trunk)
    logits, cam = classifier(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 3) and cam.shape == (2, 3, cells, cells)
    torch.testing.assert_close(logits, cam.flatten(2).mean(2))
    assert cam.flatten(2).std(2).min() > 0, "a map that says where"


def test_the_trunk_is_timms_own_and_its_input_is_normalised() -> None:
    classifier = classifier_of()
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        features = classifier.trunk.forward_features((pixels - mean) / std)
        cam = torch.einsum("bdhw,cd->bchw", features, classifier.head.weight[:, :, 0, 0])
        cam = cam + classifier.head.bias[:, None, None]
        boosted = 3 * cam.relu() - (-cam).relu()
        torch.testing.assert_close(classifier(pixels)[1], boosted)
        assert not torch.allclose(cam, boosted)


def test_a_saved_classifier_gives_the_same_outputs_to_the_bit(tmp_path: Path) -> None:
    classifier = classifier_of().train()
    for _ in range(2):
        classifier(torch.rand(4, 3, 64, 64))  # statistics of batch normalisation that are not the first ones
    save_classifier(tmp_path, classifier, {"epoch": 4})
    loaded = load_classifier(tmp_path)
    assert not loaded.training and loaded.config == classifier.config
    assert loaded.vocabulary.to_json() == VOCABULARY.to_json()
    details = classifier_details(tmp_path)
    assert (details["epoch"], details["kind"]) == (4, "classifier") and len(details["sha256"]) == 64
    for name, tensor in classifier.state_dict().items():
        assert tensor.equal(loaded.state_dict()[name]) and tensor.shape == loaded.state_dict()[name].shape
    pixels = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        for wanted, found in zip(classifier.eval()(pixels), loaded(pixels), strict=True):
            assert wanted.equal(found)


@pytest.mark.parametrize("kind", ["clip_vision_model", "mlcd_vision_model"])
def test_a_vision_tower_needs_its_folder_no_more_once_it_is_saved(kind: str, tmp_path: Path) -> None:
    tower = save_toy_tower(tmp_path / "tower", kind)
    classifier = classifier_of(f"mlcd:{tower}")
    logits, cam = classifier(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 3) and cam.shape == (2, 3, 8, 8)
    save_classifier(tmp_path / "classifier", classifier)
    shutil.rmtree(tower)
    loaded = load_classifier(tmp_path / "classifier")
    assert loaded.config == classifier.config
    pixels = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        for wanted, found in zip(classifier(pixels), loaded(pixels), strict=True):
            assert wanted.equal(found)


def test_a_timm_trunk_is_described_as_before_there_were_towers(tmp_path: Path) -> None:
    save_classifier(tmp_path, classifier_of())
    assert sorted(classifier_details(tmp_path)["config"]) == ["boost", "preprocessing", "trunk"]


def changed_weights(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def changed_details(folder: Path, **changes: object) -> None:
    file = folder / "classifier.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def other_trunk(folder: Path) -> None:
    config = classifier_details(folder)["config"]
    changed_details(folder, config={**config, "trunk": "test_convnext"})


def fewer_classes(folder: Path) -> None:
    changed_details(folder, vocabulary=Vocabulary((ClassName("cat"),)).to_json())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (changed_weights, "changed after it was written"),
        (lambda folder: changed_details(folder, schema=2), "schema 2"),
        (lambda folder: (folder / "classifier.json").unlink(), "cannot read"),
        (other_trunk, "do not fit a test_convnext with 3 classes"),
        (fewer_classes, "do not fit a test_resnet with 1 classes"),
    ],
)
def test_a_folder_that_was_changed_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    save_classifier(tmp_path, classifier_of())
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=said):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("trunk", "boost", "error", "said"),
    [
        ("resnet5000", 3.0, UsageError, "timm has no model 'resnet5000'"),
        ("resnet50.no_such_weights", 3.0, UsageError, "timm has no model"),
        ("", 3.0, UsageError, "timm has no model"),
        ("test_resnet", -1.0, UsageError, "a factor above 0"),
        ("test_resnet", 0.0, UsageError, "a factor above 0"),
    ],
)
def test_what_cannot_be_a_classifier_is_refused(
    trunk: str, boost: float, error: type[ClipletError], said: str
) -> None:
    with pytest.raises(error, match=said):
        ClassifierConfig(trunk=trunk, boost=boost, preprocessing=FED)


@pytest.mark.parametrize(("size", "said"), [(64, "there is no folder"), (60, "patches of 8")])
def test_a_vision_tower_that_cannot_be_a_trunk_is_refused(size: int, said: str, tmp_path: Path) -> None:
    if size != 64:
        save_toy_tower(tmp_path / "tower")
    with pytest.raises(UsageError, match=said):
        classifier_of(f"mlcd:{tmp_path / 'tower'}", fed=Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD))


def test_a_trunk_without_feature_maps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", lambda *_, **__: nn.Identity())
    with pytest.raises(UsageError, match="gives no feature maps"):
        classifier_of()


def test_a_timm_trunk_has_no_vision_towers_configuration() -> None:
    with pytest.raises(UsageError, match="'test_resnet' with the configuration of a vision tower"):
        ClassifierConfig(trunk="test_resnet", boost=3.0, preprocessing=FED, tower={"patch_size": 8})


def test_weights_are_not_touched_by_what_is_loaded(tmp_path: Path) -> None:
    """Loaded arrays lie in a buffer that cannot be written; training goes on with copies."""
    save_classifier(tmp_path, classifier_of())
    loaded = load_classifier(tmp_path).train()
    logits, _ = loaded(torch.rand(2, 3, 64, 64))
    logits.sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert np.isfinite(loaded.head.weight.detach().numpy()).all()
