"""`cliplet train RECIPE` as a user meets it: from nothing to a classifier, again, stopped, asked wrongly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Cli
from runs import TOY, TOY_ARGUMENTS, ending, toy_scenes, trained

from cliplet.cli import main
from cliplet.lock import lock_folder
from cliplet.train.classifier_recipe import ClassifierRecipe
from cliplet.train.recipes import scenes_ccd, voc12_ccd_released, with_method
from cliplet.train.train_commands import tell_report

TRAIN = ("train", "scenes_ccd")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run from nothing by the command line, and how it ended."""
    out = tmp_path_factory.mktemp("made") / "run"
    command = [sys.executable, "-m", "cliplet.cli", *TRAIN, "--out", str(out), *TOY_ARGUMENTS]
    return out, subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_scenes(tmp_path_factory.mktemp("data"))


def test_run_from_nothing_tells_its_story(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, ended = made
    assert ended.returncode == 0, ended.stderr
    told = ended.stdout
    assert "36 images learned from, 4 held out, fp32 on cpu" in told
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"] == TOY.to_json()
    assert f"mAP {report['measured']['map']:.1f} on 16 images of scenes test-seen" in told
    rows = [line.split() for line in told.splitlines() if line.strip()[:1] in "*123"]
    table = [row for row in rows if row and row[0].lstrip("*") in "123" and "." in row[1]]
    assert [row[0].lstrip("*") for row in table] == ["1", "2", "3"]
    assert [row[0].startswith("*") for row in table].index(True) == report["chosen_epoch"]
    assert [row[1] for row in table] == [f"{r['loss']:.4f}" for r in report["history"]]
    assert "bias taken from the mean" in " ".join(told.split())
    assert f"next: cliplet eval {out / 'classifier'}" in told.replace("\n", "")
    names = {p.name for p in out.iterdir()} - {".lock"}
    assert names == {"scenes", "banks", "run.json", "checkpoint", "classifier", "report.json", "tensorboard"}


def test_doubts_are_told(
    made: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation images without a part in the mAP, and a threshold walk that found nothing."""
    out, _ = made
    report = json.loads((out / "report.json").read_text())
    tell_report(report, out, out / "scenes")
    assert "on 16 images of scenes test-seen" in (plain := capsys.readouterr().out)
    assert "unreadable" not in plain and "no threshold" not in plain
    report["measured"]["unreadable"] = {"a.jpg": "decode: no image", "b.jpg": "read: gone"}
    report["history"][1] |= {"threshold_found": False, "threshold": 0.107}
    tell_report(report, out, out / "scenes")
    told = capsys.readouterr().out
    assert "on 14 images of scenes test-seen" in told
    assert (
        "2 images of the evaluation split unreadable, so without a part in the mAP, such as a.jpg: decode: no image"
        in told
    )
    assert "epoch 2 found no threshold with 5 to 7 classes an image: the walk ended at 0.107" in told


@pytest.mark.parametrize("name", ["train", "compare", "recipe"])
def test_help_names_what_there_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"train": [], "compare": ["compare"], "recipe": ["coco17_ccd"]}[name]
    assert main(["train", *arguments, "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    wanted = {
        "train": ["coco17_ccd", "ccd_ccd", "voc12_ccd_released"],
        "compare": ["coco17", "--teacher-runtime", "ccd, released floor"],
        "recipe": ["-m cliplet.cli train coco17_ccd --device cuda", "--teacher-runtime"],
    }[name]
    assert all(word in told for word in wanted)
    assert "ccd_ll_cp" not in told


def test_again_as_json_gives_the_report_at_once(
    made: tuple[Path, subprocess.CompletedProcess[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cliplet.train.train_classifier._train", pytest.fail)
    assert main([*TRAIN, "--out", str(made[0]), *TOY_ARGUMENTS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((made[0] / "report.json").read_text())


def test_only_the_first_process_speaks(
    made: tuple[Path, subprocess.CompletedProcess[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cliplet.train.world.is_first_process", lambda: False)
    assert main([*TRAIN, "--out", str(made[0]), *TOY_ARGUMENTS]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--seed", "1"], 2, "differs in seed (0 then, 1 now)"),
        (["--set", "blend=0.5"], 2, "differs in blend (0.2 then, 0.5 now)"),
        (["--set", "blned=0.5"], 2, "fix: --set blend=VALUE"),
        (["--set", "epochs=few"], 2, "a value that is a int"),
        (["--set", "blend"], 2, "NAME=VALUE"),
        (["--set", "debias=perhaps"], 2, "a value that is a bool"),
        (["--set", "method=magic"], 2, "method 'magic' in a recipe"),
        (["--seed", "-1"], 2, "seed is -1"),
        (["--precision", "fp16"], 2, "fix: --precision bf16"),
        (["--device", "tpu"], 2, "'tpu' is not one of"),
        (["--classes", "cat"], 1, "that is not in the vocabulary"),
    ],
)
def test_what_is_refused(
    more: list[str],
    code: int,
    message: str,
    made: tuple[Path, subprocess.CompletedProcess[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (made[0] / "report.json").stat().st_mtime_ns
    assert main([*TRAIN, "--out", str(made[0]), *TOY_ARGUMENTS, *more]) == code
    assert message in capsys.readouterr().err
    assert (made[0] / "report.json").stat().st_mtime_ns == before


def test_unknown_recipe_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "scene_ccd", "--out", "x"]) == 2
    assert "fix: cliplet train scenes_ccd" in capsys.readouterr().err


def test_second_run_in_a_folder_is_refused(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock_folder(tmp_path)
    assert main([*TRAIN, "--root", str(scenes), "--out", str(tmp_path), *TOY_ARGUMENTS]) == 2
    assert "another run is writing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "recipe"),
    [
        ("scenes_ccd", TOY_ARGUMENTS, TOY),
        ("scenes_ll_r", [], with_method(scenes_ccd(), "ll_r")),
        ("voc12_ccd_released", [], voc12_ccd_released()),
        ("voc12_ccd_released", ["--learning-rate", "0.1", "--set", "learning_rate=1", "--set", "debias=no"],
         replace(voc12_ccd_released(), learning_rate=0.1, debias=False)),
        ("scenes_cdul", ["--teacher", "x", "--batch-size", "8", "--set", "eval_split="],
         replace(with_method(scenes_ccd(), "cdul"), teacher="x", batch=8, eval_split="")),
    ],
)  # fmt: skip
def test_show_prints_the_complete_recipe_and_does_nothing(
    name: str,
    arguments: list[str],
    recipe: ClassifierRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", name, "--out", str(tmp_path / "run"), *arguments, "--show"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe.to_json()
    assert not (tmp_path / "run").exists()


def test_quiet_run_prints_nothing_at_all(scenes: Path, tmp_path: Path, cli: Cli) -> None:
    """Neither do the libraries, in the precision that is the default."""
    arguments = [*TOY_ARGUMENTS, "--epochs", "1", "--precision", "bf16", "--set", "method=an"]
    ended = cli(*TRAIN, "--root", scenes, "--out", tmp_path, *arguments, "--quiet")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert json.loads((tmp_path / "report.json").read_text())["precision"] == "bf16"


def test_interrupted_run_says_so_and_goes_on(scenes: Path, tmp_path: Path) -> None:
    """Ctrl-C, with real signals; what it ends with is that of a run which nobody disturbed."""
    out = tmp_path / "stopped"
    changed = ["--set", "method=an", "--epochs", 12]
    command = [*TRAIN, "--root", scenes, "--out", out, *TOY_ARGUMENTS, *changed, "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cliplet.cli", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint" / "checkpoint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said.strip()) == (130, "interrupted")
    assert not (out / "report.json").exists()
    for folder in (out, tmp_path / "whole"):
        trained(replace(TOY, method="an", epochs=12), folder, scenes, banks=out / "banks")
    assert ending(out) == ending(tmp_path / "whole")


def test_folder_of_images_by_the_command_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "teacher_normalisation=imagenet",
        "trunk=test_resnet",
        "trunk_weights=teacher",
        "image_size=64",
    ]
    arguments = [f"--set={s}" for s in (*settings, "region_size=96", "mean_classes=1")]
    command = ["train", "folder_ccd", "--root", str(photos), "--out", str(tmp_path), *arguments]
    common = [
        "--teacher",
        "tiny",
        "--batch-size",
        "8",
        "--epochs",
        "3",
        "--precision",
        "fp32",
        "--threads",
        "1",
    ]
    assert main([*command, *common]) == 2
    assert "--classes" in capsys.readouterr().err
    assert main([*command, *common, "--classes", "dog,cat,car"]) == 0
    told = capsys.readouterr().out
    assert "22 images learned from, 2 held out" in told
    assert "chosen: epoch" not in told
    assert (tmp_path / "classifier" / "classifier.json").exists()
