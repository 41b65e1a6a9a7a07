"""Thresholds: the search on scores whose best thresholds are known, and `cliplet calibrate` on each kind of model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

import cliplet
from cliplet.classifier import Classifier, ClassifierConfig, save_classifier
from cliplet.cli import main
from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.plan import TaggerSettings, make_plan
from cliplet.train.calibrate import (
    best_f1_threshold,
    between_scores,
    count_thresholds,
    cross_validate,
    expected_counts,
    f1_thresholds,
)
from cliplet.views import Preprocessing
from cliplet.vocabulary import ClassName, Vocabulary

NAMES = ("cat", "dog", "bird")
SCORES = st.lists(st.integers(0, 20), min_size=1, max_size=40)


@settings(max_examples=30, deadline=None)
@given(SCORES, st.data())
def test_no_threshold_has_a_better_f1(levels: list[int], data: st.DataObject) -> None:
    scores = np.array(levels, np.float32) / 20
    truth = np.array(data.draw(st.lists(st.booleans(), min_size=len(levels), max_size=len(levels))))
    threshold = best_f1_threshold(scores, truth)
    assert 0 <= threshold <= 1

    def f1(at: float) -> float:
        return float(sklearn.metrics.f1_score(truth, scores >= np.float32(at), zero_division=0))

    assert f1(threshold) == pytest.approx(max(f1(k / 40) for k in range(42)))


@given(SCORES, st.integers(0, 41))
def test_a_threshold_between_scores_tags_the_same_images(levels: list[int], at: int) -> None:
    for kind in (np.float32, np.float64):
        scores = np.array(levels, kind) / kind(20.5)
        wanted = scores >= kind(at / 40)
        moved = between_scores(scores, at / 40)
        np.testing.assert_array_equal(scores >= kind(moved), wanted)
        assert 0 <= moved <= 1
        assert len(str(moved)) <= 6


def test_scores_closer_than_their_digits_are_told_apart() -> None:
    low, high = np.float32(0.5), np.nextafter(np.float32(0.5), np.float32(1))
    scores = np.array([low, high])
    assert (scores >= np.float32(between_scores(scores, float(high)))).tolist() == [False, True]


@pytest.mark.parametrize(
    ("mean", "expected"),
    [(None, [0.9 + 0.5 + 0.1, 0.3]), (0.6, [1.5, 0.3]), (1.2, [3.0, 0.6]), (1.8, [3.0, 0.9])],
)
def test_expected_counts(mean: float | None, expected: list[float]) -> None:
    probs = np.array([[0.9, 0.1], [0.5, 0.1], [0.1, 0.1]])
    np.testing.assert_allclose(expected_counts(probs, mean), expected)


@pytest.mark.parametrize("mean", [0, -1, 2.1, float("nan")])
def test_a_mean_that_no_images_have_is_refused(mean: float) -> None:
    with pytest.raises(UsageError, match="--mean-per-image"):
        expected_counts(np.ones((4, 2)), mean)


@pytest.mark.parametrize(
    ("scores", "expected", "tagged"),
    [
        ([0.1, 0.2, 0.3, 0.4], 2, 2),
        ([0.1, 0.2, 0.3, 0.4], 2.4, 2),
        ([0.1, 0.2, 0.3, 0.4], 0.2, 0),
        ([0.1, 0.2, 0.3, 0.4], 4, 4),
        ([0.1, 0.3, 0.3, 0.3], 1, 0),
        ([0.1, 0.3, 0.3, 0.3], 2, 3),
    ],
)
def test_as_many_tags_as_are_expected(scores: list[float], expected: float, tagged: int) -> None:
    scores_NC = np.array(scores, np.float32)[:, None]
    (threshold,) = count_thresholds(scores_NC, np.array([expected]))
    assert 0 <= threshold <= 1
    assert (scores_NC >= np.float32(threshold)).sum() == tagged


def separable(seed: int, noise: float, images: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Scores of three classes whose best thresholds are 0.2, 0.5 and 0.8, blurred by noise."""
    rng = np.random.default_rng(seed)
    truth = rng.random((images, 3)) < 0.3
    sides = np.where(truth, 0.1, -0.1) + noise * rng.normal(size=truth.shape)
    return np.clip(np.array([0.2, 0.5, 0.8]) + sides, 0, 1).astype(np.float32), truth


def test_known_thresholds_are_found() -> None:
    scores, truth = separable(0, 0.02)
    found = f1_thresholds(scores, truth)
    np.testing.assert_allclose(found.values_C, [0.2, 0.5, 0.8], atol=0.05)
    assert found.few == ()
    held_out = cross_validate(scores, truth)
    np.testing.assert_array_equal(held_out.f1_C, 1.0)
    assert held_out.by_class.CF1 == 1
    assert held_out.by_global.CF1 < 0.9


def test_the_held_out_estimate_is_the_lower_one() -> None:
    in_sample, held_out, fresh = [], [], []
    for seed in range(12):
        scores, truth = separable(seed, 0.15, images=60)
        values = f1_thresholds(scores, truth, min_positives=1).values_C
        in_sample.append(sklearn.metrics.f1_score(truth, scores >= values, average="macro"))
        held_out.append(cross_validate(scores, truth, min_positives=1, seed=seed).f1_C.mean())
        others, their_truth = separable(1000 + seed, 0.15, images=3000)
        fresh.append(sklearn.metrics.f1_score(their_truth, others >= values, average="macro"))
    assert np.mean(held_out) < np.mean(in_sample) - 0.02
    assert abs(np.mean(held_out) - np.mean(fresh)) < abs(np.mean(in_sample) - np.mean(fresh))


def test_an_image_has_no_part_in_its_own_threshold() -> None:
    # One image a fold: each image's threshold comes from the others alone, so it can be had in a plain loop.
    scores, truth = separable(3, 0.1, images=25)
    tagged = np.zeros_like(truth)
    for n in range(25):
        others = np.arange(25) != n
        values = f1_thresholds(scores[others], truth[others], min_positives=1).values_C
        tagged[n] = scores[n] >= values.astype(np.float32)
    expected = sklearn.metrics.f1_score(truth, tagged, average=None)
    np.testing.assert_allclose(cross_validate(scores, truth, folds=25, min_positives=1).f1_C, expected)


def test_classes_with_few_positives_get_the_global_threshold() -> None:
    scores, truth = separable(0, 0.02)
    truth[:, 1] = False
    truth[:4, 1] = True
    found = f1_thresholds(scores, truth, min_positives=5)
    assert found.few == (1,)
    assert found.values_C[1] == found.overall == best_f1_threshold(scores.ravel(), truth.ravel())
    assert f1_thresholds(scores, truth, min_positives=4).few == ()


@pytest.mark.parametrize(
    ("images", "folds", "mend"),
    [
        (300, 0, "--folds 5"),
        (300, 1, "--folds 5"),
        (300, 301, "--folds 5"),
        (3, 5, "--folds 3"),
        (2, 5, "--folds 2"),
        (1, 5, "choose two images or more"),
    ],
)
def test_folds_that_cannot_be(images: int, folds: int, mend: str) -> None:
    with pytest.raises(UsageError, match="folds") as caught:
        cross_validate(*separable(0, 0.1, images), folds=folds)
    assert caught.value.fix == mend


def test_labels_without_any_class_are_refused() -> None:
    scores, truth = separable(0, 0.1)
    with pytest.raises(DataError, match="holds any class"):
        f1_thresholds(scores, truth & False)


# --- the verb ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos with labels: some images of each class, of the third one a single image."""
    folder = tmp_path_factory.mktemp("data") / "labelled"
    shutil.copytree(photos, folder)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.jpg"))
    rows = [
        f"{f},{';'.join(n for k, n in enumerate(NAMES[:2]) if i % (k + 2) == 0)}" for i, f in enumerate(files)
    ]
    rows[0] += ";bird"
    (folder / "labels.csv").write_text("file,classes\n" + "\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return folder


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    preprocessing = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", "squash")
    config = ClassifierConfig(trunk="test_resnet", boost=3.0, preprocessing=preprocessing)
    vocabulary = Vocabulary(tuple(ClassName(name) for name in ("bird", "horse", "dog", "cat")))
    save_classifier(tmp_path / "classifier", Classifier(config, vocabulary))
    return tmp_path / "classifier"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def data(folder: Path) -> list[object]:
    return ["--data", "folder", "--root", folder]


def folds(folder: Path) -> list[object]:
    return [*data(folder), "--folds", 3, "--min-positives", 3]


def test_a_classifier_keeps_its_thresholds(
    classifier: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "calibrate", classifier, *folds(labelled))
    assert code == 0, err
    assert "too few positives, so the global threshold: bird, horse" in out
    assert f"wrote {classifier / 'thresholds.json'}" in out
    entry = json.loads((classifier / "thresholds.json").read_text())
    assert list(entry["values"]) == ["bird", "horse", "dog", "cat"]
    assert entry["values"]["bird"] == entry["values"]["horse"] == entry["global"]["value"]
    assert entry["on"]["images"] == 24 and len(entry["on"]["sha256"]) == 64
    assert f"CF1 {entry['f1_cross_validated']['CF1']:.1f} %" in entry["how"]
    code, out, err = run(
        capsys, "eval", classifier, "--data", "folder", "--root", labelled, "--out", tmp_path / "eval"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert found["thresholds"].endswith(entry["how"])
    for name in NAMES:
        assert found["classes"][name]["threshold"] == pytest.approx(entry["values"][name])
        assert found["classes"][name]["F1"] == pytest.approx(entry["f1_in_sample"]["classes"][name])


def test_a_bundle_keeps_its_thresholds_under_its_views(
    toy_clip: Path, own_cache: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ",".join(NAMES)
    before = set((own_cache / "bundles").glob("*"))
    with cliplet.load(f"open_clip:local-dir:{toy_clip}", classes=classes, prompts="my {}"):
        (made,) = set((own_cache / "bundles").glob("*")) - before
    bundle = shutil.copytree(made, tmp_path / "bundle")
    manifest = bundle / "cliplet.json"
    # With views 1 every aggregation is the same, but thresholds are looked up by it.
    manifest.write_text(manifest.read_text().replace('"kind": "cdul"', '"kind": "mean"'))
    code, out, err = run(capsys, "calibrate", bundle, *folds(labelled), "--views", "1", "--json")
    assert code == 0, err
    values = json.loads(out)["values"]
    calibrated = make_plan(TaggerSettings(model=str(bundle), views="1"))
    assert dict(zip(NAMES, calibrated.thresholds, strict=True)) == values
    assert "best F1 of each class on 24 images" in calibrated.threshold_source
    assert "not calibrated" in make_plan(TaggerSettings(model=str(bundle), views="1+2x2")).threshold_source


def test_a_clip_without_labels(
    toy_clip: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = f"open_clip:local-dir:{toy_clip}", tmp_path / "more" / "thresholds.json"
    arguments = ["calibrate", model, "--data", "folder", "--root", photos, "--classes", "cat,dog,bird"]
    code, _, err = run(capsys, *arguments, "--out", file)
    assert code == 2
    assert "--method expected-count needs none" in err
    arguments += ["--method", "expected-count", "--mean-per-image", "1.5", "--views", "1"]
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "has no place for thresholds" in err
    code, out, err = run(capsys, *arguments, "--out", file)
    assert code == 0, err
    entry = json.loads(file.read_text())
    with cliplet.load(model, classes="cat,dog,bird", views="1") as tagger:
        scores = np.array([r.scores for r in tagger.label(sorted(photos.rglob("*.jpg")))])
    tagged = scores >= np.array([entry["values"][name] for name in NAMES], np.float32)
    expected = np.minimum(24 * 1.5 * scores.sum(0) / scores.sum(), 24)
    assert np.abs(tagged.sum(0) - expected).max() <= 0.5
    assert "no labels were used" in out


@pytest.fixture
def pseudo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "pseudo.npy", rng.random((24, 3)))
    np.savez(tmp_path / "pseudo.npz", labels=rng.random((24, 3)) < 0.5)
    np.savez(tmp_path / "two.npz", a=np.zeros((24, 3)), b=np.zeros((24, 3)))
    np.save(tmp_path / "short.npy", np.zeros((23, 3)))
    np.save(tmp_path / "words.npy", np.full((24, 3), "yes"))
    np.save(tmp_path / "objects.npy", np.full((24, 3), None), allow_pickle=True)
    (tmp_path / "text.npy").write_text("0 1 0")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "pseudo-f1", "--pseudo", "pseudo.npy"], None),
        (["--method", "pseudo-f1", "--pseudo", "pseudo.npz"], None),
        (["--method", "expected-count", "--pseudo", "pseudo.npy"], None),
        (["--method", "pseudo-f1"], "without pseudo-labels"),
        (["--pseudo", "pseudo.npy"], "--method f1 with --pseudo"),
        (["--mean-per-image", "2"], "for --method expected-count only"),
        (["--method", "pseudo-f1", "--pseudo", "short.npy"], r"holds float64 \[23, 3\]"),
        (["--method", "pseudo-f1", "--pseudo", "words.npy"], "holds <U3"),
        (["--method", "pseudo-f1", "--pseudo", "objects.npy"], "cannot read"),
        (["--method", "pseudo-f1", "--pseudo", "text.npy"], "cannot read"),
        (["--method", "pseudo-f1", "--pseudo", "two.npz"], "one array of numbers"),
        (["--method", "pseudo-f1", "--pseudo", "."], "holds no classifier.json"),
    ],
)
def test_pseudo_labels(
    options: list[str],
    message: str | None,
    classifier: Path,
    labelled: Path,
    pseudo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(pseudo)
    needed = data(labelled) if "expected-count" in options else folds(labelled)
    code, _, err = run(capsys, "calibrate", classifier, *needed, "--quiet", *options)
    if message is None:
        assert code == 0, err
        entry = json.loads((classifier / "thresholds.json").read_text())
        assert f"({options[-1]})" in entry["how"] or f"the pseudo-labels {options[-1]} " in entry["how"]
    else:
        assert code in (1, 2)
        assert not (classifier / "thresholds.json").exists()
        with pytest.raises(ClipletError, match=message):
            raise ClipletError(err)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("expected-count", ["--folds", "99"]),
        ("expected-count", ["--min-positives", "10"]),
        ("expected-count", ["--seed", "0"]),
        ("expected-count", ["--pseudo-threshold", "0.5"]),
        ("f1", ["--pseudo-threshold", "0.5"]),
    ],
)
def test_options_that_a_method_does_not_use_are_refused(
    method: str, option: list[str], classifier: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "calibrate", classifier, *data(labelled), "--method", method, *option)
    assert code == 2
    assert f"--method {method} with {option[0]}, which it does not use" in err
    assert f"fix: leave {option[0]} out" in err


def test_thresholds_of_other_classes_are_refused(
    classifier: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other: dict[str, Any] = {"values": {"cat": 0.1, "dog": 0.2, "bird": 0.3, "cow": 0.4}, "how": "?"}
    (tmp_path / "t.json").write_text(json.dumps(other))
    arguments = ["eval", classifier, "--data", "folder", "--root", labelled, "--out", tmp_path / "eval"]
    code, _, err = run(capsys, *arguments, "--thresholds", tmp_path / "t.json")
    assert code == 1
    assert "thresholds of other classes: 'cow', 'horse'" in err
