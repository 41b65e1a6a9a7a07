"""`cliplet train probe` as a user meets it: every kind of encoder, again, on one split, asked wrongly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import picture
from PIL import Image
from sklearn.metrics import average_precision_score
from towers import save_toy_tower

from cliplet.classifier import Classifier, ClassifierConfig, save_classifier
from cliplet.datasets import open_dataset
from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.lock import lock_folder
from cliplet.model_spec import parse_model_spec
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world
from cliplet.teacher import load_teacher
from cliplet.train.embeddings import read_embeddings
from cliplet.train.probe_commands import probe
from cliplet.train.probe_measures import MEASURES
from cliplet.trunk_files import TrunkConfig, new_trunk, save_trunk
from cliplet.views import Preprocessing
from cliplet.vocabulary import ClassName, Vocabulary

QUICK = ("--threads", "1", "--workers", "1")
FED = Preprocessing(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bilinear", "squash")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of both parts, with labels."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    for part, count in (("train", 60), ("test-seen", 40)):
        write_scenes(scene_world(part, seed=3), folder, count, workers=1)
    return folder


@pytest.fixture
def ask(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """ask(model, "--quiet") runs the verb on the scenes, in tmp_path/out, and gives what it printed."""

    def asked(model: object, *more: object, data: str = "scenes", root: Path | None = None) -> str:
        arguments = [
            model,
            "--data",
            data,
            "--root",
            root or scenes,
            "--out",
            tmp_path / "out",
            *QUICK,
            *more,
        ]
        probe.main([str(a) for a in arguments], standalone_mode=False)
        return capsys.readouterr().out

    return asked


@pytest.fixture
def clip(toy_clip: Path) -> str:
    return f"open_clip:local-dir:{toy_clip}"


def test_a_clip_is_measured_in_every_way(
    ask: Callable[..., str], clip: str, scenes: Path, tmp_path: Path
) -> None:
    told = ask(clip)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    measured = report["measured"]
    assert tuple(measured) == MEASURES
    assert "32 features: learned from 60 images of scenes train, measured on 40 of test-seen" in told
    lines = [line.split() for line in told.splitlines()]
    for row, found in (
        ("linear probe", measured["linear"]),
        ("k-NN, k = 20", measured["knn"]["20"]),
        ("zero-shot, softmax", measured["zero-shot"]["softmax"]),
    ):
        assert [*row.split(), f"{found['mAP']:.2f}", f"{found['mAP_11_point']:.2f}"] in lines
    assert f"R@5 {measured['retrieval']['recall_at_5']:.2f}" in told
    assert f"L2 strength {measured['linear']['strength']:.3g}" in told
    assert "wrote" in told and str(tmp_path / "out" / "report.json") in told.replace("\n", "")
    left_out = report["classes"]["left_out"]
    assert f"{len(left_out)} classes left out of every mean" in told or not left_out
    # Its features through scikit-learn, and its text tower by hand.
    data = open_dataset("scenes", scenes, "test-seen")
    features = np.asarray(read_embeddings(tmp_path / "out" / "embeddings" / "test-seen").features_ND)
    assert features.dtype == np.float32
    teacher = load_teacher(parse_model_spec(clip))
    cosines = features @ teacher.text_matrix(data.vocabulary).numpy().T
    probabilities = torch.from_numpy(teacher.scale * cosines).softmax(1).numpy()
    for name, scores in (("cosine", cosines), ("softmax", probabilities)):
        for class_name, value in measured["zero-shot"][name]["AP"].items():
            c = data.vocabulary.names.index(class_name)
            assert data.truth_NC is not None
            theirs = 100 * average_precision_score(data.truth_NC[:, c], scores[:, c])
            assert value == pytest.approx(theirs, abs=0.5), (name, class_name)


def test_again_finds_the_features_and_the_same_numbers(
    ask: Callable[..., str], clip: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = json.loads(ask(clip, "--json"))
    assert first == json.loads((tmp_path / "out" / "report.json").read_text())
    monkeypatch.setattr("cliplet.train.embedder.TorchEmbedder.embed", pytest.fail)
    again = json.loads(ask(clip, "--json"))
    assert again["measured"] == first["measured"]
    other = json.loads(ask(clip, "--json", "--seed", "1", "--measures", "linear", "--features", "unit"))
    assert list(other["measured"]) == ["linear"]
    assert other["measured"]["linear"]["swept"] != first["measured"]["linear"]["swept"]
    assert other["settings"]["features"] == other["measured"]["linear"]["features"] == "unit"
    assert ask(clip, "--quiet") == ""


def test_a_clip_with_sigmoids_has_cosines_only(ask: Callable[..., str], toy_siglip: Path) -> None:
    found = json.loads(ask(f"open_clip:local-dir:{toy_siglip}", "--json", "--measures", "zero-shot"))
    assert list(found["measured"]["zero-shot"]) == ["cosine"]


def tower(folder: Path) -> str:
    return f"mlcd:{save_toy_tower(folder)}"


def trunk(folder: Path) -> str:
    save_trunk(
        folder, new_trunk("test_resnet", 32), TrunkConfig(trunk="test_resnet", preprocessing=FED, width=96)
    )
    return str(folder)


def classifier(folder: Path) -> str:
    config = ClassifierConfig(trunk="test_resnet", boost=3.0, preprocessing=FED)
    save_classifier(folder, Classifier(config, Vocabulary((ClassName("cat"), ClassName("dog")))))
    return str(folder)


@pytest.mark.parametrize("make", [tower, trunk, lambda folder: f"mlcd:{trunk(folder)}", classifier])
def test_encoders_without_a_text_tower(
    make: Callable[[Path], str], ask: Callable[..., str], tmp_path: Path
) -> None:
    model = make(tmp_path / "model")
    with pytest.raises(UsageError, match="has no text tower.*LiT") as refused:
        ask(model, "--measures", "knn,zero-shot")
    assert refused.value.fix == "--measures knn"
    assert not (tmp_path / "out").exists()
    found = json.loads(ask(model, "--json"))
    assert list(found["measured"]) == ["linear", "knn", "retrieval"]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Thirty images of one's own, bright or dark or neither; the last one is damaged."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = ["file,classes"]
    for i in range(30):
        pixels = picture(40, 40, i) // 4 + (160 if i % 3 == 0 else 0)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{'bright' if i % 3 == 0 else 'dark' if i % 3 == 1 else ''}")
    (folder / "29.png").write_text("I am no image")
    (folder / "labels.csv").write_text("\n".join(rows))
    (folder / "classes.txt").write_text("bright\ndark\nunseen\n")
    return folder


def test_one_split_is_divided_and_a_damaged_image_named(
    ask: Callable[..., str], clip: str, mine: Path, tmp_path: Path
) -> None:
    told = ask(clip, "--eval-share", "0.4", "--held-out", "0.3", data="folder", root=mine)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    images = report["images"]
    assert (images["train"], images["evaluation"]) == (17, 12)
    assert list(images["failed"]) == [str(mine / "29.png")]
    assert "1 images without features, such as" in told and "29.png" in told
    assert report["classes"]["left_out"] == {"unseen": "no positive in training"}
    assert "1 classes left out of every mean: unseen (no positive in training)" in told
    assert "no more than 10 neighbours of 17 training images" in told
    assert report["measured"]["linear"]["AP"]["bright"] == 100
    paths = {report["data"][role]["paths_sha256"] for role in ("train", "evaluation")}
    assert len(paths) == 2
    other = json.loads(
        ask(clip, "--seed", "1", "--measures", "retrieval", "--json", data="folder", root=mine)
    )
    assert other["data"]["train"]["paths_sha256"] not in paths


def unlabelled(mine: Path, _: Path) -> dict[str, Any]:
    (mine / "labels.csv").unlink()
    return {}


def grown(mine: Path, _: Path) -> dict[str, Any]:
    Image.fromarray(picture(30, 30, 99)).save(mine / "30.png")
    with (mine / "labels.csv").open("a") as file:
        file.write("\n30.png,dark")
    return {}


def nameless(mine: Path, _: Path) -> dict[str, Any]:
    rows = (mine / "labels.csv").read_text().splitlines()
    (mine / "labels.csv").write_text("\n".join([rows[0], *(row.split(",")[0] + "," for row in rows[1:])]))
    return {}


def locked(_: Path, out: Path) -> dict[str, Any]:
    return {"lock": lock_folder(out)}


@pytest.mark.parametrize(
    ("change", "more", "error", "message"),
    [
        (unlabelled, (), UsageError, "have no labels"),
        (nameless, (), DataError, "none of 3 classes can be measured; bright: no positive in training"),
        (grown, (), UsageError, "30.png"),
        (locked, (), UsageError, "another run is writing"),
        (None, ("--measures", "knn,colour"), UsageError, "no measure is called 'colour'"),
        (None, ("--held-out", "1.5"), UsageError, "held_out 1.5"),
        (None, ("--eval-split", "val"), UsageError, "folder has no split 'val'"),
    ],
)
def test_refusals(
    change: Callable[[Path, Path], dict[str, Any]] | None,
    more: tuple[str, ...],
    error: type[ClipletError],
    message: str,
    ask: Callable[..., str],
    clip: str,
    mine: Path,
    tmp_path: Path,
) -> None:
    if change is grown:
        ask(clip, "--quiet", "--measures", "knn", data="folder", root=mine)
    held = change(mine, tmp_path / "out") if change else {}
    try:
        with pytest.raises(error, match=message):
            ask(clip, *more, "--quiet", data="folder", root=mine)
    finally:
        if "lock" in held:
            os.close(held["lock"])
    if change is grown:
        ask(clip, "--quiet", "--measures", "knn", "--overwrite", data="folder", root=mine)


def test_another_encoder_does_not_take_over_the_features(
    ask: Callable[..., str], clip: str, tmp_path: Path
) -> None:
    ask(clip, "--quiet", "--measures", "knn")
    with pytest.raises(UsageError, match="holds other embeddings"):
        ask(tower(tmp_path / "tower"), "--quiet", "--measures", "knn")


def test_the_help_names_every_measure() -> None:
    (option,) = [p for p in probe.params if p.name == "measures"]
    assert all(name in option.help for name in MEASURES)  # type: ignore[attr-defined]
