"""`cliplet train mlcd` as a user meets it: from a folder to a trunk, killed, by two processes, asked wrongly."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlcd_toys import STEPS, TOY, TOY_ARGUMENTS, ending, toy_photos, trained
from runs import TOY_ARGUMENTS as CCD_ARGUMENTS
from runs import killed_runs, run_of_two

from cliplet.checkpoint import load_arrays
from cliplet.classifier import load_classifier
from cliplet.cli import main
from cliplet.listing import find_images
from cliplet.train.cluster_truth import truth_beside
from cliplet.train.mlcd_commands import FIELD_FLAGS, mlcd, tell_report
from cliplet.train.mlcd_recipe import mlcd_recipe
from cliplet.trunk_files import is_trunk_folder

MLCD = ("train", "mlcd")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_photos(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, by the command line."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main([*MLCD, "--data", str(photos), "--out", str(out), *TOY_ARGUMENTS, "--quiet"]) == 0
    return out


def test_a_run_tells_its_story(
    photos: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shared = ["--embeddings", str(finished / "embeddings")]
    assert main([*MLCD, "--data", str(photos), "--out", str(out), *TOY_ARGUMENTS, *shared]) == 0
    told = capsys.readouterr().out
    assert "60 images learned from in 12 clusters, fp32 on cpu" in told
    history = json.loads((out / "report.json").read_text())["history"]
    rows = [line.split()[:2] for line in told.splitlines() if line.strip()[:1] in ("1", "2")]
    assert rows == [[str(row["epoch"] + 1), f"{row['loss']:.4f}"] for row in history]
    assert f"--trunk mlcd:{out / 'trunk'}" in told and f"cliplet train probe {out / 'trunk'}" in told
    assert f"cliplet export {out / 'trunk'} --out {out}-features && cliplet verify {out}-features" in told
    quality = json.loads((out / "report.json").read_text())["clusters"]["quality"]
    assert quality["labelled_images"] == 60 and 0 < quality["purity"] <= 1
    assert (
        f"the labels of 60 images: purity {quality['purity']:.1%}, conflict {quality['conflict']:.1%}" in told
    )
    assert "duplicates" not in told
    assert ending(out) == ending(finished)
    names = {p.name for p in out.iterdir()} - {".lock"}
    assert names == {"clusters", "run.json", "checkpoint", "trunk", "report.json", "tensorboard"}


def test_a_tower_of_open_clip_has_no_student_next(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((finished / "report.json").read_text())
    report["recipe"]["trunk"] = "open_clip:ViT-S-32-alt"
    report["clusters"]["duplicates"] = 3
    tell_report(report, tmp_path / "my run", "photos")
    told = capsys.readouterr().out
    assert "folder_ccd" not in told and f"next: cliplet export '{tmp_path / 'my run' / 'trunk'}'" in told
    assert "duplicates among the images (the very same embedding): 3" in told


def test_the_command_is_the_function(finished: Path, photos: Path, tmp_path: Path) -> None:
    assert json.loads((finished / "report.json").read_text())["recipe"] == TOY.to_json()
    trained(TOY, photos, tmp_path)
    assert ending(tmp_path) == ending(finished)


def test_again_as_json_gives_the_report_at_once(
    finished: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cliplet.train.mlcd._train", pytest.fail)
    assert main([*MLCD, "--data", str(photos), "--out", str(finished), *TOY_ARGUMENTS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((finished / "report.json").read_text())


def test_a_killed_run_ends_with_the_same_weights(finished: Path, photos: Path, tmp_path: Path) -> None:
    """Killed while it embeds, clusters and trains, between and within epochs; a checkpoint every second step."""
    moments = [
        ("cliplet.train.embeddings:EmbeddingFile.write", 1),
        ("cliplet.train.mlcd:write_clusters", 1),
        ("cliplet.train.mlcd_loop:train_step", 4),
        ("cliplet.train.mlcd_loop:save_run_state", 2),
        ("cliplet.train.mlcd_loop:train_step", 4),
        ("cliplet.train.mlcd:save_trunk", 1),
    ]
    arguments = [*MLCD, "--data", photos, "--out", tmp_path, *TOY_ARGUMENTS, "--quiet"]
    assert killed_runs(moments, *arguments) == [-signal.SIGKILL] * len(moments)
    assert not is_trunk_folder(tmp_path / "trunk")
    assert main([str(a) for a in arguments]) == 0
    assert ending(tmp_path) == ending(finished)


def of_two(photos: Path, out: Path, moments: list[tuple[str, int]]) -> subprocess.CompletedProcess[str]:
    arguments = [*MLCD, "--data", photos, "--out", out, *TOY_ARGUMENTS, "--set", "neck=none"]
    return run_of_two(out, moments, *arguments, "--trunk", "test_vit", "--epochs", "1")


def test_two_processes_learn_what_one_does(photos: Path, finished: Path, tmp_path: Path) -> None:
    """Without batch norms, whose statistics are each process's own; also after a kill, and gone on with by one."""
    recipe = replace(TOY, trunk="test_vit", neck="none", epochs=1)
    trained(recipe, photos, tmp_path / "one", embeddings=finished / "embeddings")
    two = tmp_path / "two"
    two.mkdir()
    killed = of_two(photos, two, [("cliplet.train.mlcd_loop:train_step", STEPS)])
    assert killed.returncode != 0 and not (two / "trunk").exists()
    single = Path(shutil.copytree(two, tmp_path / "single"))
    ended = of_two(photos, two, [])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("a trunk in") == 1
    trained(recipe, photos, single)
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two", "single")]
    assert [report["processes"] for report in reports] == [1, 2, 1]
    losses = [report["history"][0]["loss"] for report in reports]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)
    names = ("one", "two", "single")
    states = [load_arrays(tmp_path / name / "checkpoint", "checkpoint")[0] for name in names]
    for other in states[1:]:
        assert other["array.centres"].shape == (12, 64)
        # AdamW steps by nearly the same whatever a gradient's size; the mean that it keeps of it shows that.
        for name in ("array.exp_avg", "optimizer.0.exp_avg", "optimizer.5.exp_avg"):
            difference = np.linalg.norm(other[name] - states[0][name])
            assert difference < 0.02 * np.linalg.norm(states[0][name]), name


def test_the_trunk_starts_a_classifier(finished: Path, tmp_path: Path) -> None:
    out, trunk = tmp_path / "ccd", tmp_path / "trunk"
    shutil.copytree(finished / "trunk", trunk)
    told = [
        *("train", "scenes_ccd"),
        "--out",
        str(out),
        *CCD_ARGUMENTS,
        "--trunk",
        f"mlcd:{trunk}",
        "--quiet",
    ]
    assert main([*told, "--epochs", "2"]) == 0
    run = json.loads((out / "run.json").read_text())
    assert run["recipe"]["trunk_weights"] == "pretrained"
    assert run["trunk"] == json.loads((trunk / "trunk.json").read_text())["sha256"]
    shutil.rmtree(trunk)
    assert load_classifier(out / "classifier").config.trunk == "test_resnet"


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--seed", "1"], 2, "differs in seed (0 then, 1 now)"),
        (["--set", "scael=1"], 2, "fix: --set scale=VALUE"),
        (["--set", "boost=1"], 2, "NAME=VALUE with one of angle, batch"),
        (["--loss", "magic"], 2, "'magic' is not one of"),
        (["--positives", "12"], 1, "60 images in 12 clusters, of which 12"),
        (["--trunk", "resnet_of_none"], 2, "no trunk 'resnet_of_none'"),
        (["--trunk", "mlcd:nowhere"], 2, "no trunk 'mlcd:nowhere'"),
        (["--teacher", "nowhere"], 2, "nowhere"),
        (["--precision", "fp16"], 2, "fix: --precision bf16"),
        (["--negative-rate", "0"], 2, "negative_rate 0.0"),
        (["--set", "loss=unicom"], 2, "fix: --loss unicom"),
        (["--set", "batch=0"], 2, "fix: --batch-size 0"),
    ],
)
def test_what_is_refused(
    more: list[str], code: int, message: str, finished: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*MLCD, "--data", str(photos), "--out", str(finished), *TOY_ARGUMENTS, *more]) == code
    assert message in capsys.readouterr().err


def test_every_field_with_a_flag_is_refused_by_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {word for option in mlcd.params for word in option.opts}
    for field in ("loss", *FIELD_FLAGS):
        assert main([*MLCD, "--show", "--set", f"{field}=7"]) == 2
        fix = capsys.readouterr().err.rpartition("fix: ")[2].split()
        assert fix[0] in flags and fix[1] == "7"


def test_labels_beside_the_images_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the folder or above it; rows of other images, and images without a row, do no harm."""
    places = [tmp_path / "all" / "photos", tmp_path / "all" / "photos" / "more"]
    for place in places:
        place.mkdir(parents=True)
        for name in ("a.jpg", "b.jpg"):
            (place / name).write_bytes(b"")
    (places[1] / "c.jpg").write_bytes(b"")
    images = find_images([str(places[0])]).images
    assert truth_beside([str(places[0])], images) is None
    rows = "file,classes\nphotos/a.jpg,cat;dog\nb.jpg,cat\nc.jpg, dog\ngone.jpg,bird\nphotos/b.jpg,\n"
    (tmp_path / "all" / "labels.csv").write_text(rows)
    for source in (places[0], places[0] / "*.jpg"):
        truth = truth_beside([str(source)], images)
        assert truth is not None
        found = {
            str(Path(i.path).relative_to(places[0])): t for i, t in zip(images, truth.tolist(), strict=True)
        }
        # A name that two images have names neither.
        assert found["a.jpg"] == [True, True] and found["more/c.jpg"] == [False, True]
        assert not any(found["b.jpg"] + found["more/b.jpg"] + found["more/a.jpg"])
    # A path is meant before a name, and the nearest file counts.
    (places[0] / "labels.csv").write_text("file,classes\na.jpg,cat\nmore/a.jpg,dog\n")
    truth = truth_beside([str(places[0])], images)
    assert truth is not None and sorted(truth[truth.any(1)].tolist()) == [[False, True], [True, False]]
    (places[0] / "labels.csv").write_text("name;label\n")
    assert truth_beside([str(places[0])], images) is None
    assert "labels.csv, whose columns are not file,classes" in caplog.text


def test_images_have_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MLCD, "--out", str(tmp_path / "run")]) == 2
    assert "no images were named" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MLCD, "--show", "--loss", "unicom", "--set", "scale=64"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {**mlcd_recipe("unicom").to_json(), "scale": 64} and shown["angle"] == 0.3
    assert main([*MLCD, "--data", str(tmp_path)]) == 2
    assert "fix: --out runs/trunk" in capsys.readouterr().err


def test_help_tells_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MLCD, "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "cluster discrimination" in told and "[default: resnet18]" in told
    assert main(["train", "--help"]) == 0
    assert "mlcd" in capsys.readouterr().out
