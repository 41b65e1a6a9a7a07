"""The demo from the command line: scenes, labels, numbers and a gallery."""

from __future__ import annotations

from pathlib import Path

from helpers import Cli

from cliplet.labels import read_labels


def test_the_demo_measures_and_shows(cli: Cli, tmp_path: Path) -> None:
    done = cli("demo", "--out", tmp_path / "demo", "--count", 24, "--quiet", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    measured = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [(row[1].strip(), row[3].strip()) for row in measured] == [
        ("1", "12"),
        ("1", "12"),
        ("1+3x3", "12"),
        ("1+3x3", "12"),
    ]
    whole, views = (sum(float(row[4]) for row in measured[i : i + 2]) / 2 for i in (0, 2))
    assert views > whole, "looking closer helps this model"
    assert "gallery.html" in done.stdout
    page = (tmp_path / "demo" / "gallery.html").read_text()
    assert "test-seen_000000.jpg" in page
    assert "test-unseen_000000.jpg" in page
    assert len(list(read_labels(tmp_path / "demo" / "labels-1+3x3"))) == 24


def test_the_same_seed_makes_the_same_demo(cli: Cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert cli("demo", "--out", tmp_path / name, "--count", 4, "--quiet").returncode == 0
    scores = [
        {Path(r.path).name: r.scores.tobytes() for r in read_labels(tmp_path / name / "labels-1")}
        for name in ("a", "b")
    ]
    assert scores[0] == scores[1]
