"""`cliplet.load`: what a model, a bundle and their options come to, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import picture
from PIL import Image

import cliplet
from cliplet import plan as planning
from cliplet.artifact import MODEL_FILE, Bundle, Engine
from cliplet.errors import ArtifactError, ClipletError, DataError, UsageError
from cliplet.model_spec import file_sha256
from cliplet.plan import DEVICES, OFFERED, PRECISIONS, TaggerSettings, find_engine, make_plan
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


# --- thresholds that are no good ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read .*thresholds.json"),
        ("[0.3]", r"thresholds.json holds \[0.3\]"),
        ('{"1": 0.3}', "null for a threshold"),
        ('{"1": {"value": 0.3, "aggregation": "max"}}', "for the aggregation 'max'"),
        ('{"1": {"value": 0.3, "aggregation": {"kind": "median"}}}', "for the aggregation .*median"),
    ],
)
def test_broken_thresholds_beside_a_clip(toy_clip: Path, tmp_path: Path, content: str, message: str) -> None:
    folder = shutil.copytree(toy_clip, tmp_path / "calibrated")
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "thresholds.json").write_text(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        make_plan(TaggerSettings(model=f"open_clip:local-dir:{folder}", views="1"))
    assert "cliplet calibrate MODEL" in caught.value.fix


# --- classifiers -------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """What a plan reads of a trained classifier: no weights, a threshold for each class."""
    folder = tmp_path / "classifier"
    folder.mkdir()
    vocabulary = Vocabulary((ClassName("cat"), ClassName("dog")))
    details = {"schema": 1, "sha256": "0" * 64, "config": {}, "vocabulary": vocabulary.to_json()}
    (folder / "classifier.json").write_text(json.dumps(details))
    (folder / "thresholds.json").write_text(json.dumps({"values": {"cat": 0.1, "dog": 0.8}, "how": "F1"}))
    return folder


@pytest.fixture
def classifier_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose manifest says that it is a classifier; no engine of it is ever loaded."""
    copy = shutil.copytree(bundle, tmp_path / "classifier-bundle")
    thresholds = {"1": {"value": 0.7, "how": "F1"}}
    changed = {"kind": "classifier", "aggregation": {}, "thresholds": thresholds}
    file = copy / "cliplet.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    return copy


@pytest.mark.parametrize("kind", ["classifier", "classifier_bundle"])
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"aggregate": "max"}, "--aggregate max"),
        ({"aggregate": "cdul"}, "--aggregate cdul"),
        ({"zeta": 0.0}, "--zeta 0.0"),
        ({"aggregate": "cdul", "zeta": 0.5}, "--aggregate cdul and --zeta 0.5"),
    ],
)
def test_a_classifier_aggregates_nothing(
    request: pytest.FixtureRequest, kind: str, options: dict[str, object], flags: str
) -> None:
    model = str(request.getfixturevalue(kind))
    assert "F1" in make_plan(TaggerSettings(model=model)).threshold_source
    with pytest.raises(UsageError, match=f"{flags} for .*") as caught:
        make_plan(TaggerSettings(model=model, **options))
    assert caught.value.fix.startswith("leave --")


@pytest.mark.parametrize("content", ["{", "[0.3]"])
def test_broken_thresholds_of_a_classifier(classifier: Path, content: str) -> None:
    (classifier / "thresholds.json").write_text(content)
    with pytest.raises(ArtifactError, match="thresholds.json"):
        make_plan(TaggerSettings(model=str(classifier)))


# --- runtime, device and precision -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "device", "precision", "message", "fix"),
    [
        ("openvino", "cuda", "fp32", "openvino runs on cpu alone", "--device cpu"),
        ("tensorrt", "cpu", "fp16", "tensorrt runs on cuda alone", "--device cuda"),
        ("tensorrt_rtx", "cpu", "fp32", "tensorrt_rtx runs on cuda alone", "--device cuda"),
        ("openvino", "cpu", "fp16", "has fp32, bf16, int8", "--precision fp32, or --runtime onnx"),
        ("onnx", "cpu", "bf16", "has fp32, fp16, int8", "--precision fp32, or --runtime openvino"),
        ("onnx", "cuda", "bf16", "has fp32, fp16, int8", "--precision fp32, or --runtime tensorrt"),
        ("tensorrt", "cuda", "int8", "has fp32, fp16, bf16", "--precision fp32, or --runtime onnx"),
        ("torch", "cpu", "int8", "has fp32, fp16, bf16", "--precision fp32, or --runtime openvino"),
    ],
)
def test_what_does_not_go_together_is_refused_first(
    runtime: str, device: str, precision: str, message: str, fix: str
) -> None:
    """Before the model is even looked for."""
    settings = TaggerSettings(model="nothing", runtime=runtime, device=device, precision=precision)
    with pytest.raises(UsageError, match=message) as caught:
        make_plan(settings)
    assert caught.value.fix == fix


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_torch_has_every_float(toy_clip: Path, device: str, precision: str) -> None:
    model = f"open_clip:local-dir:{toy_clip}"
    settings = TaggerSettings(
        model=model, classes=CLASSES, runtime="torch", device=device, precision=precision
    )
    assert make_plan(settings).runtime == "torch"


@pytest.mark.parametrize(
    ("device", "precision", "installed", "runtime"),
    [
        ("cpu", "fp32", "openvino onnx", "openvino"),
        ("cpu", "fp32", "onnx", "onnx"),
        ("cpu", "fp16", "openvino onnx", "onnx"),
        ("cpu", "bf16", "openvino onnx", "openvino"),
        ("cpu", "bf16", "onnx", "openvino"),
        ("cuda", "fp32", "tensorrt onnx", "onnx"),
        ("cuda", "int8", "tensorrt onnx", "onnx"),
    ],
)
def test_auto_takes_what_has_the_precision(
    toy_clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    precision: str,
    installed: str,
    runtime: str,
) -> None:
    monkeypatch.setattr(planning, "usable_runtimes", lambda _: installed.split())
    settings = TaggerSettings(
        model=f"open_clip:local-dir:{toy_clip}", classes=CLASSES, device=device, precision=precision
    )
    assert make_plan(settings).runtime == runtime


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("installed", ["", "openvino", "onnx", "tensorrt onnx"])
def test_auto_never_takes_what_cannot_be(
    toy_clip: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: str, installed: str
) -> None:
    monkeypatch.setattr(planning, "usable_runtimes", lambda _: installed.split())
    settings = TaggerSettings(
        model=f"open_clip:local-dir:{toy_clip}", classes=CLASSES, device=device, precision=precision
    )
    chosen = make_plan(settings).runtime
    assert precision in OFFERED[chosen]
    make_plan(replace(settings, runtime=chosen))


def with_engines(bundle: Bundle, *names: tuple[str, str, str]) -> Bundle:
    engines = tuple(Engine(runtime, precision, "f", precision, on, {}) for runtime, precision, on in names)
    return replace(bundle, manifest=replace(bundle.manifest, engines=engines))


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        (("onnx", "fp16", "cuda"), None),
        (("tensorrt", "fp16", "cuda"), None),
        (
            ("openvino", "bf16", "cpu"),
            "cliplet export {model} --classes CLASSES --runtime openvino --precision bf16",
        ),
        (("openvino", "fp16", "cpu"), "--precision fp32, or --runtime onnx"),
        (("openvino", "bf16", "cuda"), "--device cpu"),
    ],
)
def test_only_an_export_that_is_possible_is_suggested(
    bundle: Path, asked: tuple[str, str, str], fix: str | None
) -> None:
    held = with_engines(Bundle.load(bundle), ("onnx", "fp16", "cpu"), ("tensorrt", "fp16", "sm89"))
    if fix is None:
        assert find_engine(held, *asked).runtime == asked[0]
        return
    with pytest.raises(UsageError) as caught:
        find_engine(held, *asked)
    assert caught.value.fix.startswith(fix.format(model=held.manifest.model))


@pytest.mark.parametrize(
    ("precision", "engines", "runtime"),
    [
        ("fp16", [("onnx", "fp16", "cpu"), ("openvino", "fp32", "cpu")], "onnx"),
        ("fp32", [("onnx", "fp32", "cpu"), ("openvino", "fp32", "cpu")], "openvino"),
        ("bf16", [("openvino", "bf16", "cpu")], "openvino"),
    ],
)
def test_auto_takes_an_engine_of_the_bundle(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    engines: list[tuple[str, str, str]],
    runtime: str,
) -> None:
    held = with_engines(Bundle.load(bundle), *engines)
    monkeypatch.setattr(Bundle, "load", lambda _: held)
    monkeypatch.setattr(planning, "usable_runtimes", lambda _: ["openvino", "onnx"])
    plan = make_plan(TaggerSettings(model=str(bundle), precision=precision))
    assert plan.runtime == runtime
    assert plan.engine == next(e for e in held.manifest.engines if e.name == f"{runtime}-{precision}")


# --- what makes two runs the same --------------------------------------------------------------------------


def test_another_export_is_another_run(bundle: Path, tmp_path: Path) -> None:
    """The same weights and classes, but other bytes: as after a calibration on other images."""
    before = make_plan(TaggerSettings(model=str(bundle))).fingerprint()
    copy = shutil.copytree(bundle, tmp_path / "again")
    assert make_plan(TaggerSettings(model=str(copy))).fingerprint() == before
    (copy / MODEL_FILE).write_bytes((copy / MODEL_FILE).read_bytes() + b"\0")
    file = copy / "cliplet.json"
    manifest = json.loads(file.read_text())
    manifest["files"][MODEL_FILE] = file_sha256(copy / MODEL_FILE)
    file.write_text(json.dumps(manifest))
    after = make_plan(TaggerSettings(model=str(copy))).fingerprint()
    assert after["engine"] == {MODEL_FILE: file_sha256(copy / MODEL_FILE)}
    assert {k for k in before if before[k] != after[k]} == {"engine"}


def test_what_is_no_bundle_has_no_engine_yet(toy_clip: Path, bundle: Path) -> None:
    for settings in (
        TaggerSettings(model=f"open_clip:local-dir:{toy_clip}", classes=CLASSES),
        TaggerSettings(model=str(bundle), runtime="torch"),
    ):
        assert "engine" not in make_plan(settings).fingerprint()
