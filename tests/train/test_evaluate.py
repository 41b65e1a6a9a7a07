"""`cliplet eval`: known scores give known numbers, nothing that failed is counted or forgotten."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics
from PIL import Image

from cliplet.classifier import CLASSIFIER_FILE, Classifier, ClassifierConfig, save_classifier
from cliplet.cli import main
from cliplet.datasets import Dataset, open_dataset
from cliplet.labels import RUN_SCHEMA_VERSION, ErrorRecord, LabelRecord, LabelStore
from cliplet.train.evaluate import Evaluation, data_digest
from cliplet.train.plots import write_plots
from cliplet.train.scoring import kind_of_model
from cliplet.views import Preprocessing
from cliplet.vocabulary import ClassName, Vocabulary

NAMES = ("cat", "dog", "tv monitor")
# The model's classes: another order, another spelling, and one more.
MODEL_NAMES = ("TVMonitor", "Dog", "cow", "cat")
PICTURES = {
    "average_precision.png",
    "precision_recall.png",
    "calibration.png",
    "confusion.png",
    "co_occurrence.png",
}
IMAGES = 24


@pytest.fixture(scope="module")
def data(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photos with labels; the third one is no image, the third class is on none of the others."""
    folder = shutil.copytree(photos, tmp_path_factory.mktemp("data") / "photos")
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg"))
    rng = np.random.default_rng(0)
    rows = [";".join(n for n in NAMES[:2] if rng.random() < 0.5) for _ in files]
    rows[2] = "tv monitor"
    (folder / files[2]).write_text("I am no image")
    lines = [f"{file},{row}" for file, row in zip(files, rows, strict=True)]
    (folder / "labels.csv").write_text("\n".join(["file,classes", *lines]))
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return folder


@pytest.fixture
def dataset(data: Path) -> Dataset:
    return open_dataset("folder", data, "all")


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(1).random((IMAGES, len(MODEL_NAMES))).astype(np.float32)


@pytest.fixture
def labels(dataset: Dataset, scores: np.ndarray, tmp_path: Path) -> Path:
    """Labels of all images but the damaged one, with the scores above and a threshold of 0.4 to 0.7 by class."""
    vocabulary = Vocabulary(tuple(ClassName(name) for name in MODEL_NAMES))
    run = {
        "schema": RUN_SCHEMA_VERSION,
        "fingerprint": {"vocabulary": vocabulary.to_json()},
        "classes": list(MODEL_NAMES),
        "thresholds": [0.4, 0.5, 0.6, 0.7],
        "threshold_source": "by hand",
        "cwd": os.getcwd(),
    }
    bad = dataset.paths.index(next(i.path for i in dataset.images if Path(i.file).read_bytes()[:1] == b"I"))
    rows = [
        LabelRecord(path, 1, 1, (), scores[n], "m", 0.0) for n, path in enumerate(dataset.paths) if n != bad
    ]
    with LabelStore(tmp_path / "labels") as store:
        store.begin(run)
        # Relative to where they were labelled, and in another order.
        store.write_part([replace(row, path=os.path.relpath(row.path)) for row in reversed(rows)])
        store.write_errors([ErrorRecord(dataset.paths[bad], "decode", "damaged")])
    return tmp_path / "labels"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["eval", *(str(a) for a in arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_every_number_can_be_had_from_the_scores(
    labels: Path,
    data: Path,
    dataset: Dataset,
    scores: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "eval"
    code, shown, err = run(capsys, labels, "--data", "folder", "--root", data, "--out", out)
    assert code == 0, err
    assert {path.name for path in out.iterdir()} == {"metrics.json", "scores.parquet", *PICTURES}
    found = json.loads((out / "metrics.json").read_text())
    table = pq.read_table(out / "scores.parquet")
    assert json.loads(table.schema.metadata[b"classes"]) == list(NAMES)
    theirs = np.array(table.column("scores").to_pylist(), np.float32)
    truth = np.array(table.column("truth").to_pylist())
    paths = table.column("path").to_pylist()
    assert dataset.truth_NC is not None
    for path, row, true in zip(paths, theirs, truth, strict=True):
        n = dataset.paths.index(path)
        np.testing.assert_array_equal(row, scores[n][[3, 1, 0]])
        np.testing.assert_array_equal(true, dataset.truth_NC[n])

    tagged = theirs >= np.array([0.7, 0.5, 0.4], np.float32)
    precisions = [
        sklearn.metrics.average_precision_score(t, s) if t.any() else 0.0
        for s, t in zip(theirs.T, truth.T, strict=True)
    ]
    assert found["mAP"] == pytest.approx(100 * np.mean(precisions), abs=1e-3)
    micro = sklearn.metrics.f1_score(truth, tagged, average="micro")
    assert found["OF1"] == pytest.approx(100 * micro, abs=1e-3)
    for c, name in enumerate(NAMES):
        own = found["classes"][name]
        assert own["AP"] == pytest.approx(100 * precisions[c], abs=1e-3)
        assert (own["positives"], own["tagged"]) == (truth[:, c].sum(), tagged[:, c].sum())
        assert own["threshold"] == (0.7, 0.5, 0.4)[c]
    worst = found["confusions"][0]
    i, j = NAMES.index(worst["present"]), NAMES.index(worst["tagged"])
    rows = truth[:, i] & ~truth[:, j]
    assert worst["images"] == rows.sum()
    assert worst["share"] == pytest.approx(100 * tagged[rows, j].mean(), abs=1e-3)

    assert found["images"] == len(paths) == IMAGES - 1
    assert [f["reason"] for f in found["failed"]] == ["damaged"]
    assert found["failed"][0]["path"] not in paths
    assert found["classes_without_positives"] == ["tv monitor"]
    assert found["model"]["classes_not_in_the_data"] == ["cow"]
    assert found["data"]["sha256"] == data_digest(dataset)
    for said in (
        f"mAP {found['mAP']:.2f} %",
        "at the thresholds: by hand",
        "failed and are left out: 1",
        "damaged",
        "no positives, so AP 0: tv monitor",
        "since the data lacks them: cow",
        f"next: look at {out}",
    ):
        assert said in shown
    for name in PICTURES:
        with Image.open(out / name) as image:
            assert min(image.size) > 200
            assert len(image.convert("L").getcolors(256) or []) > 10


def test_a_classifier_is_scored_by_its_sigmoids(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "classifier"
    preprocessing = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", "squash")
    vocabulary = Vocabulary(tuple(ClassName(name) for name in MODEL_NAMES))
    config = ClassifierConfig(trunk="test_resnet", boost=3.0, preprocessing=preprocessing)
    save_classifier(folder, Classifier(config, vocabulary))
    assert (folder / CLASSIFIER_FILE).exists() and kind_of_model(str(folder)) == "classifier"
    arguments = [folder, "--data", "folder", "--root", data, "--out", tmp_path / "eval", "--limit", 10]
    code, shown, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    found = json.loads(shown)
    assert found["images"] + len(found["failed"]) == 10
    assert "looks like text" in found["failed"][0]["reason"]
    assert "not calibrated" in found["thresholds"]
    assert found["model"]["identity"]["config"]["trunk"] == "test_resnet"
    assert "10 of 24 images chosen" in found["data"]["notes"]
    code, _, err = run(capsys, *arguments, "--views", "1+2x2")
    assert code == 2
    assert "a classifier looks at the whole image" in err


def test_a_clip_is_asked_about_the_classes_of_the_data(
    toy_clip: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"open_clip:local-dir:{toy_clip}"
    arguments = [
        "--data",
        "folder",
        "--root",
        data,
        "--out",
        tmp_path / "eval",
        "--views",
        "1+2x2",
        "--quiet",
    ]
    code, shown, err = run(capsys, model, *arguments)
    assert (code, shown) == (0, ""), err
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert found["images"] == IMAGES - 1
    assert found["model"]["identity"]["views"] == "1+2x2"
    names = [entry["name"] for entry in found["model"]["identity"]["vocabulary"]["classes"]]
    assert names == list(NAMES)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("row missing", 1, "has no row for 1 of 24 images"),
        ("class missing", 1, "knows no 'dog' of folder"),
        ("no labels", 2, "the images of folder all have no labels"),
        ("empty folder", 1, "holds no classifier.json, cliplet.json or run.json"),
        ("all failed", 1, "none of 24 images could be scored"),
        ("batch size", 2, "--batch-size -1"),
    ],
)
def test_what_cannot_be_evaluated(
    change: str,
    code: int,
    message: str,
    labels: Path,
    data: Path,
    dataset: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, model, options = data, labels, []
    if change == "row missing":
        (labels / "errors.parquet").unlink()
    elif change == "class missing":
        file = labels / "run.json"
        file.write_text(file.read_text().replace('"Dog"', '"wolf"'))
    elif change == "no labels":
        # The labels name the images where they lie, so the images stay and their labels.csv goes.
        root = tmp_path / "list.txt"
        root.write_text("\n".join(dataset.paths))
    elif change == "empty folder":
        model = tmp_path / "empty"
        model.mkdir()
    elif change == "all failed":
        for part in (labels / "labels").iterdir():
            part.unlink()
        with LabelStore(labels) as store:
            store.write_errors([ErrorRecord(path, "read", "gone") for path in dataset.paths])
    else:
        options = ["--batch-size", "-1"]
    arguments = [model, "--data", "folder", "--root", root, "--out", tmp_path / "eval", *options]
    if change == "no labels":
        arguments += ["--classes", ",".join(NAMES)]
    found, _, err = run(capsys, *arguments)
    assert (found, message in err) == (code, True), err
    assert "Traceback" not in err
    assert not (tmp_path / "eval").exists()


def test_the_hash_of_the_data_is_of_what_it_holds_and_not_of_where(data: Path, tmp_path: Path) -> None:
    here = open_dataset("folder", data, "all")
    there = open_dataset("folder", shutil.copytree(data, tmp_path / "copy"), "all")
    assert data_digest(here) == data_digest(there)
    assert here.truth_NC is not None
    changed = here.truth_NC.copy()
    changed[5, 1] ^= True
    names = Vocabulary(tuple(ClassName(name) for name in ("cat", "dog", "tv")))
    others = [replace(here, truth_NC=changed), replace(here, vocabulary=names), here.subset(range(5))]
    assert len({data_digest(other) for other in (here, *others)}) == 4


@pytest.mark.parametrize(("classes", "images"), [(1, 1), (30, 40)])
def test_pictures_of_few_and_of_many_classes(classes: int, images: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    evaluation = Evaluation(
        names=tuple(f"a class with a long name {c}" for c in range(classes)),
        scores_NC=rng.random((images, classes)).astype(np.float32),
        truth_NC=rng.random((images, classes)) < (0.3 if classes > 1 else 0),
        paths=[""] * images,
        thresholds_C=np.full(classes, 0.5, np.float32),
        threshold_source="",
        model={"name": "m"},
        data={"name": "d", "split": "s"},
        failed=[],
    )
    written = write_plots(evaluation, tmp_path)
    assert {path.name for path in written} == PICTURES
    for path in written:
        with Image.open(path) as image:
            image.verify()
