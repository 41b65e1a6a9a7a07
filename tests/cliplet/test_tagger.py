"""`cliplet.load`: what a model, a bundle and their options come to, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import picture
from PIL import Image

import cliplet
from cliplet.artifact import MODEL_FILE
from cliplet.errors import ArtifactError, ClipletError, DataError, UsageError
from cliplet.plan import TaggerSettings, make_plan
from cliplet.vocabulary import ClassName, Vocabulary, prompt_set

CLASSES = "cat,dog,bird"


@pytest.fixture(scope="module")
def bundle(toy_clip: Path, own_cache: Path) -> Path:
    with cliplet.load(f"open_clip:local-dir:{toy_clip}", classes=CLASSES, views="1", aggregate="max"):
        manifests = (own_cache / "bundles").glob("*/cliplet.json")
        return next(
            m.parent
            for m in manifests
            if json.loads(m.read_text())["aggregation"]["kind"] == "max"
            and len(json.loads(m.read_text())["vocabulary"]["classes"]) == 3
        )


def test_images_come_as_paths_arrays_or_pillow(toy_clip: Path, tmp_path: Path) -> None:
    array = picture(90, 60)
    Image.fromarray(array).save(tmp_path / "a.png")
    with cliplet.load(f"open_clip:local-dir:{toy_clip}", classes=CLASSES, views="1+2x2") as tagger:
        records = tagger.label([tmp_path / "a.png", array, Image.fromarray(array)])
        assert [r.path for r in records] == [str(tmp_path / "a.png"), "", ""]
        assert {(r.width, r.height) for r in records} == {(90, 60)}
        np.testing.assert_allclose(records[1].scores, records[0].scores, atol=1e-6)
        np.testing.assert_allclose(records[2].scores, records[0].scores, atol=1e-6)
        turned = Image.fromarray(array)
        turned.getexif()[0x0112] = 6
        assert (tagger.label([turned])[0].width, tagger.label([turned])[0].height) == (60, 90)
        with pytest.raises(DataError, match=r"uint8 \[height, width, 3\]"):
            tagger.label([array.astype(np.float32)])
        with pytest.raises(DataError, match="No such file"):
            tagger.label([tmp_path / "b.png"])


def test_own_boxes_take_the_place_of_the_grid(toy_clip: Path) -> None:
    array = picture(90, 60)
    with cliplet.load(f"open_clip:local-dir:{toy_clip}", classes=CLASSES, views="1+2x2") as tagger:
        cells = np.array([[0, 0, 45, 30], [45, 0, 90, 30], [0, 30, 45, 60], [45, 30, 90, 60]])
        (by_grid,) = tagger.label([array])
        (by_boxes,) = tagger.label([array], boxes=[cells])
        (by_one,) = tagger.label([array], boxes=[cells[:1]])
        for images, boxes in (([array, array], [cells]), (["a.png"], [cells])):
            with pytest.raises(UsageError, match="boxes are in their pixels"):
                tagger.label(images, boxes=boxes)
    np.testing.assert_allclose(by_boxes.scores, by_grid.scores, atol=1e-6)
    assert np.abs(by_one.scores - by_grid.scores).max() > 1e-4


def test_a_bundle_brings_its_classes_and_its_aggregation(bundle: Path) -> None:
    plan = make_plan(TaggerSettings(model=str(bundle)))
    assert plan.vocabulary.names == ("cat", "dog", "bird")
    assert plan.aggregation.kind == "max"
    with cliplet.load(str(bundle), classes=CLASSES, aggregate="max") as tagger:
        assert tagger.runner.precision == "fp32"
        assert tagger.runner.device == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "cat,dog"}, "other classes or prompts"),
        ({"prompts": "the {}"}, "other classes or prompts"),
        ({"aggregate": "mean"}, "aggregates with max"),
        ({"zeta": 0.4}, "aggregates with max"),
        ({"runtime": "torch"}, "holds a graph"),
    ],
)
def test_a_bundle_refuses_what_it_cannot_change(
    bundle: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        cliplet.load(str(bundle), **options)


def test_a_damaged_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    (copy / MODEL_FILE).write_bytes((copy / MODEL_FILE).read_bytes()[:-1])
    with pytest.raises(ClipletError, match="has changed"):
        cliplet.load(str(copy))


def test_thresholds_come_with_the_model_when_they_were_calibrated(toy_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_clip, tmp_path / "calibrated")
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "thresholds.json").write_text(json.dumps({"1+2x2": {"value": 0.42, "how": "by hand"}}))
    model = f"open_clip:local-dir:{folder}"
    calibrated = make_plan(TaggerSettings(model=model, views="1+2x2"))
    assert calibrated.thresholds == (0.42, 0.42)
    assert "by hand" in calibrated.threshold_source
    for other in ({"views": "1"}, {"views": "1+2x2", "aggregate": "mean"}):
        plan = make_plan(TaggerSettings(model=model, **other))
        assert "not calibrated" in plan.threshold_source
    for other in ({"classes": "cat,bird"}, {"prompts": "the {}"}):
        plan = make_plan(TaggerSettings(model=model, views="1+2x2", **other))
        assert "not calibrated" in plan.threshold_source
    assert make_plan(TaggerSettings(model=model, threshold=0.1)).thresholds == (0.1, 0.1)


def test_thresholds_may_differ_by_class(toy_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_clip, tmp_path / "calibrated")
    (folder / "classes.txt").write_text("cat\ndog\n")
    file = folder / "thresholds.json"
    entry = {"values": {"dog": 0.0, "cat": 0.999}, "how": "best F1"}
    file.write_text(json.dumps({"1": entry, "1+2x2": {**entry, "aggregation": {"kind": "max", "zeta": 0.0}}}))
    model = f"open_clip:local-dir:{folder}"
    plan = make_plan(TaggerSettings(model=model, views="1"))
    assert plan.thresholds == (0.999, 0.0)
    assert plan.threshold_source == "0 to 0.999 by class, calibrated with the model: best F1"
    with cliplet.load(model, views="1", runtime="torch") as tagger:
        assert tagger.label([picture(90, 60)])[0].labels == ("dog",)
    for aggregate, found in ((None, (0.3, 0.3)), ("max", (0.999, 0.0))):
        settings = TaggerSettings(model=model, views="1+2x2", aggregate=aggregate)
        assert make_plan(settings).thresholds == found
    file.write_text(json.dumps({"1": {"values": {"dog": 0.1, "bird": 0.2}, "how": "?"}}))
    with pytest.raises(ArtifactError, match="of other classes: 'bird', 'cat'"):
        make_plan(TaggerSettings(model=model, views="1"))


def test_a_vocabulary_may_be_given_as_it_is(toy_clip: Path, bundle: Path) -> None:
    own = Vocabulary((ClassName("cat", ("kitten", "tom")), ClassName("dog")), prompt_set("the {}"))
    plan = make_plan(TaggerSettings(model=f"open_clip:local-dir:{toy_clip}"), own)
    assert plan.vocabulary is own
    assert len(plan.thresholds) == 2
    with pytest.raises(UsageError, match="other classes or prompts"):
        make_plan(TaggerSettings(model=str(bundle)), own)


def test_a_model_without_classes_asks_for_them(toy_clip: Path) -> None:
    with pytest.raises(UsageError, match="--classes classes.txt"):
        make_plan(TaggerSettings(model=f"open_clip:local-dir:{toy_clip}"))


@pytest.mark.parametrize(
    ("field", "value"), [("runtime", "tensorflow"), ("device", "tpu"), ("threshold", -0.1), ("views", "4")]
)
def test_settings_are_checked_at_birth(field: str, value: object) -> None:
    with pytest.raises(UsageError):
        make_plan(TaggerSettings(**{"classes": CLASSES, field: value}))
