"""Classifiers as models: exported, labelled with, and equal to what training measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Cli, picture
from PIL import Image

import cliplet
from cliplet.artifact import Bundle
from cliplet.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier
from cliplet.cli import main
from cliplet.errors import UsageError
from cliplet.labels import read_labels
from cliplet.listing import find_images
from cliplet.model_spec import parse_model_spec
from cliplet.plan import TaggerSettings, make_plan
from cliplet.train.predict import predict
from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from cliplet.vocabulary import read_vocabulary

CLASSES = "cat,dog,bird,boat"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier with random weights whose scores differ between images."""
    torch.manual_seed(3)
    fed = Preprocessing(64, IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")
    made = Classifier(
        ClassifierConfig(trunk="test_resnet", boost=3.0, preprocessing=fed), read_vocabulary(CLASSES)
    )
    with torch.no_grad():
        made.head.weight.mul_(30)
    folder = tmp_path_factory.mktemp("trained") / "classifier"
    save_classifier(folder, made, {"recipe": {"method": "ccd"}})
    return folder


@pytest.fixture(scope="module")
def bundle(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    options = ["--runtime", "onnx,openvino", "--precision", "fp32", "--count", "6"]
    assert main(["export", str(classifier), "--out", str(out), *options]) == 0
    return out


@pytest.mark.parametrize("runtime", ["torch", "onnx", "openvino"])
def test_a_classifier_labels_as_it_was_trained(classifier: Path, photos: Path, runtime: str) -> None:
    """Files through decoding, resizing in the graph and all: within what rounding a resized image to bytes costs."""
    refs = find_images([str(photos)]).images
    wanted_NC = predict(load_classifier(classifier), refs).scores_NC
    with cliplet.load(str(classifier), runtime=runtime) as tagger:
        found = tagger.label([ref.file for ref in refs])
    assert wanted_NC.std() > 0.05
    np.testing.assert_allclose(np.stack([r.scores for r in found]), wanted_NC, atol=0.02)


def test_the_bundle_knows_what_it_is(bundle: Path, classifier: Path) -> None:
    manifest = Bundle.load(bundle).manifest
    assert manifest.kind == "classifier"
    assert manifest.trained["recipe"] == {"method": "ccd"}
    assert manifest.identity == parse_model_spec(str(classifier)).identity()
    assert {e.name for e in manifest.engines} == {"onnx-fp32", "openvino-fp32"}
    assert main(["verify", str(bundle), "--count", "4"]) == 0


def test_images_of_a_batch_may_differ_in_size(bundle: Path) -> None:
    pictures = [picture(90, 60, 1), picture(64, 200, 2), picture(30, 31, 3)]
    with cliplet.load(str(bundle), runtime="onnx") as tagger:
        together = [r.scores for r in tagger.label(pictures)]
        alone = [tagger.label([p])[0].scores for p in pictures]
        cam = tagger.score([tagger._picture(pictures[0])[1]])["cam"]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert cam.shape[:2] == (1, 4)


def test_thresholds_travel_with_the_bundle(classifier: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "classifier")
    assert make_plan(TaggerSettings(model=str(folder))).thresholds == (0.5,) * 4
    values = dict(zip(CLASSES.split(","), (0.1, 0.2, 0.3, 0.4), strict=True))
    (folder / "thresholds.json").write_text(json.dumps({"values": values, "how": "by hand"}))
    out = tmp_path / "bundle"
    assert main(["export", str(folder), "--out", str(out), "--runtime", "onnx", "--count", "4"]) == 0
    plan = make_plan(TaggerSettings(model=str(out)))
    assert plan.thresholds == (0.1, 0.2, 0.3, 0.4)
    assert "by hand" in plan.threshold_source


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"views": "1+3x3"}, "looks at the whole image"), ({"classes": "cat,dog"}, "made for other classes")],
)
def test_a_classifier_refuses_what_it_cannot_do(
    classifier: Path, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        cliplet.load(str(classifier), **settings)


def test_views_are_refused_of_what_sees_the_whole(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--runtime", "tensorrt_rtx", "--target", "sm89", "--views", "4"]
    assert main(["export", str(classifier), "--out", str(tmp_path / "new"), *options]) == 2
    assert "--views 4 for" in capsys.readouterr().err


def test_its_classes_cannot_be_exchanged(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(bundle), "--classes", "a,b", "--out", str(tmp_path / "new")]) == 2
    assert "a classifier has learned its own" in capsys.readouterr().err


def test_label_and_eval_take_it(
    bundle: Path, classifier: Path, photos: Path, tmp_path: Path, cli: Cli
) -> None:
    done = cli("label", photos, "--model", bundle, "--out", tmp_path / "labels", "--quiet")
    assert done.returncode == 0, done.stderr
    rows = {row.path: row.scores for row in read_labels(tmp_path / "labels")}
    assert len(rows) == 24
    again = cli("label", photos, "--model", classifier, "--out", tmp_path / "direct", "--quiet")
    assert again.returncode == 0, again.stderr
    for row in read_labels(tmp_path / "direct"):
        np.testing.assert_allclose(row.scores, rows[row.path], atol=1e-4)
    assert Image.open(next(iter(rows))).size[0] > 0
