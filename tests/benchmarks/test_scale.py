"""How cost grows: slopes are those of the numbers, every point is measured in its turn, and the chapter reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records, scale, scale_label
from benchmarks.chapters.scale import chapter
from cliplet.errors import UsageError
from cliplet.listing import find_images
from cliplet.views import Views

QUICK_LIMITS = {"by": "a test", "gop_per_s": {"fp32": 200.0}, "gb_per_s": 10.0, "notes": []}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where records of these tests go; the machine is not measured for them."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("cliplet.deploy.bench.machine_limits", lambda *_: QUICK_LIMITS)
    return tmp_path / "results"


def told(**options: Any) -> dict[str, Any]:
    """A run that costs what is expected: 2 ms a view, on the axis of canvases 1 us a pixel more, and 50 MB."""
    if "export" in options:
        names = Path(options["classes"]).read_text().splitlines()
        assert len(set(names)) == len(names)
        return {"text_s": 0.001 * len(names), "export_s": 3.0, "peak_mb": 900.0, "disturbed": False}
    files = find_images([str(options["images"])]).images[: options.get("limit")]
    width, height = map(int, Path(options["images"]).name.split("-")[0].split("x"))
    views = Views.parse(options.get("views", "1")).count
    model = str(options.get("model", "bundle-20"))
    engine_ms = 2.0 * views + (views == 26) * 0.001 * width * height
    return {
        "images": len(files),
        "seconds": len(files) * engine_ms / 1000,
        "call_s": len(files) * engine_ms / 1000,
        "peak_mb": 50.0,
        "disk_bytes": len(files) * int(model.rsplit("-", 1)[1]) * 4,
        "stages_ms": {
            "engine": engine_ms,
            "decode": 1e-5 * width * height,
            "write": 0.2,
            "wait for decode": 0.1,
        },
        "first_batch_s": 0.3,
        "disturbed": False,
    }


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, results: Path) -> Callable[..., dict[str, Any]]:
    """The record of a run whose processes are stood in for."""
    monkeypatch.setattr(scale, "in_process", told)
    monkeypatch.setattr(scale, "DIFFERENT_IMAGES", 3)

    def call(*arguments: str) -> dict[str, Any]:
        assert scale.main(list(arguments)) == 0
        (file,) = results.glob("*.json")
        assert file.with_suffix(".svg").stat().st_size > 1000
        found: dict[str, Any] = json.loads(file.read_text()) | {"file": file.name}
        return found

    return call


def test_what_grows_as_expected_is_read_so(run: Callable[..., dict[str, Any]]) -> None:
    record = run("--most", "1000", "--limit", "4", "--rounds", "2")
    assert record["name"] == "scale"
    measured = {
        f"{name} {key}": slope["measured"]
        for name, axis in record["rows"].items()
        for key, slope in axis["slopes"].items()
    }
    assert measured["images seconds"] == pytest.approx(1)
    assert measured["images peak_mb"] == pytest.approx(0, abs=1e-9)
    assert measured["classes disk_bytes"] == pytest.approx(1)
    assert measured["classes text_s"] == pytest.approx(1)
    assert measured["canvas resize_ms"] == pytest.approx(2, abs=0.02)
    text = chapter(record)
    assert "slopes are as expected (within 0.15)." in text
    assert "each image more takes 0 bytes of memory" in text
    assert f"results/{Path(record['file']).stem}.svg" in text
    assert "| 1,000 | " in text


def test_what_grows_otherwise_is_named(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower(**options: Any) -> dict[str, Any]:
        found = told(**options)
        return found | {"call_s": found["call_s"] ** 2, "peak_mb": 50 + 0.5 * found["images"]}

    monkeypatch.setattr(scale, "in_process", slower)
    record = run("--axes", "images", "--most", "1000", "--rounds", "1")
    assert record["name"] == "scale_images"
    text = chapter(record)
    assert "whole run, s against images (2.00, not 1)" in text
    assert "peak memory, MB against images (0.74, not 0)" in text
    assert "each image more takes 500000 bytes of memory" in text


def test_points_take_turns_and_long_ones_are_measured_once(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]

    def slow(**options: Any) -> dict[str, Any]:
        if options.get("workers") == 8:
            clock[0] += 2 * scale.LONG_S
        return told(**options)

    monkeypatch.setattr(scale, "in_process", slow)
    monkeypatch.setattr(scale, "perf_counter", lambda: clock[0])
    record = run("--axes", "workers", "--limit", "1", "--rounds", "2")
    points = record["rows"]["workers"]["points"]
    assert {n: len(point["images_per_s"]["all"]) for n, point in points.items()} == {
        "1": 2,
        "2": 2,
        "4": 2,
        "8": 1,
    }
    shown = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    assert shown == [f"workers {n}" for n in (1, 2, 4, 8, 4, 2, 1)]


def test_a_single_point_has_no_slope(run: Callable[..., dict[str, Any]]) -> None:
    record = run("--axes", "images", "--most", "100", "--rounds", "1")
    assert {slope["measured"] for slope in record["rows"]["images"]["slopes"].values()} == {None}
    assert "slopes" not in chapter(record).splitlines()[-1]


def test_points_that_others_disturbed_are_marked(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(**options: Any) -> dict[str, Any]:
        return told(**options) | {"disturbed": options.get("workers") == 4}

    monkeypatch.setattr(scale, "in_process", busy)
    text = chapter(run("--axes", "workers", "--limit", "4", "--rounds", "1"))
    assert "\n| 4\\* | " in text and "\n| 8 | " in text
    assert "other processes took part of the cores" in text


def test_axes_measured_before_an_interruption_are_kept(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, results: Path
) -> None:
    def stopped(**options: Any) -> dict[str, Any]:
        if "export" in options:
            raise KeyboardInterrupt
        return told(**options)

    monkeypatch.setattr(scale, "in_process", stopped)
    assert scale.main(["--axes", "classes", "--rounds", "1"]) == 130
    assert not results.exists()
    assert scale.main(["--axes", "views,classes", "--limit", "4", "--rounds", "1"]) == 130
    (file,) = results.glob("*.json")
    assert json.loads(file.read_text())["rows"].keys() == {"views"}


def test_an_unknown_axis_is_refused(capsys: pytest.CaptureFixture[str], results: Path) -> None:
    with pytest.raises(SystemExit):
        scale.main(["--axes", "images,colours"])
    assert "no axis colours; there are images, views" in capsys.readouterr().err
    assert not results.exists()


def test_runs_are_told_as_they_went(
    toy_clip: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*arguments: str) -> dict[str, Any]:
        assert scale_label.main(arguments) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    bundle = str(tmp_path / "bundle")
    toy = f"open_clip:local-dir:{toy_clip}"
    built = printed("--export", "--model", toy, "--classes", "cat,dog,bus", "--out", bundle)
    assert 0 < built["text_s"] < built["export_s"]
    assert built["peak_mb"] > 1

    common = ("--images", str(photos), "--model", bundle, "--out", str(tmp_path / "labels"))
    found = printed(*common, "--limit", "5", "--views", "1+2x2", "--traced")
    assert found["images"] == 5
    assert 0 < found["seconds"] <= found["call_s"]
    assert 0 < found["first_batch_s"] <= found["call_s"]
    assert {"read", "decode", "engine", "write"} <= found["stages_ms"].keys()
    assert found["disk_bytes"] > 0
    again = printed(*common, "--limit", "5", "--views", "1+2x2")
    assert again["images"] == 5 and again["seconds"] == 0
    with pytest.raises(UsageError, match="holds the labels of another job"):
        scale_label.main([*common, "--views", "1"])
