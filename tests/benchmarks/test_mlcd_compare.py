"""The comparison of trunks: real runs make its record, finished ones are not made again, the chapter tells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import mlcd_compare, records
from benchmarks.chapters.mlcd import chapter
from benchmarks.mlcd_compare import LEARNED, NOTHING, SINGLES, UNTRAINED


def spread(mean: float) -> dict[str, Any]:
    return {"mean": mean, "deviation": 0.5, "all": [mean - 0.5, mean + 0.5]}


def row(linear: float) -> dict[str, Any]:
    return dict.fromkeys(("linear", "linear_11_point", "knn", "retrieval"), spread(linear))


def made_record() -> dict[str, Any]:
    rows = {UNTRAINED: row(15.0), "MLCD": row(25.0), "MLC": row(26.0), "UNICOM-style": row(20.0)}
    students = {NOTHING: spread(40.0), SINGLES: spread(44.0), LEARNED: spread(47.5)}
    base = {"loss": "mlcd", "negative_rate": 0.1}
    return {"epochs": 8, "batch": 32, "base": base, "seeds": 2, "rows": rows, "students": students}


def test_the_chapter_says_where_the_order_is_not_the_papers() -> None:
    told = chapter(made_record())
    assert "8 epochs in batches of 32, 2 seeds" in told
    assert "otherwise: loss mlcd, negative rate 0.1." in told
    assert "| MLCD | 25.0 ± 0.5 |" in told
    assert f"MLC is the best with 26.0; {UNTRAINED} have 15.0." in told
    assert "The order here is MLC > MLCD > UNICOM-style; the paper's is" in told
    assert "A CCD student that starts from MLCD has +7.5 mAP over one that starts from nothing." in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "MLCD|another"], "no rows ['another']"),
        (["--rows", "MLC"], "students start from the row MLCD"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        mlcd_compare.main(arguments)
    assert said in capsys.readouterr().err


def test_a_run_writes_its_record_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    limits = {"by": "a test", "gop_per_s": {"fp32": 200.0}, "gb_per_s": 10.0, "notes": []}
    monkeypatch.setattr("cliplet.deploy.bench.machine_limits", lambda *_: limits)
    monkeypatch.setattr(mlcd_compare, "SCENES", {"train": 96, "test-seen": 48})
    monkeypatch.setattr(mlcd_compare, "CLUSTERS", 12)
    monkeypatch.setattr(mlcd_compare, "SIDE", 32)
    words = [
        "--out",
        str(tmp_path / "runs"),
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--rows",
        "MLCD",
        "--no-students",
    ]
    assert mlcd_compare.main([*words, "--jobs", "1"]) == 0
    (file,) = (tmp_path / "results").iterdir()
    record = json.loads(file.read_text())
    assert list(record["rows"]) == [UNTRAINED, "MLCD"]
    assert all(0 < found["linear"]["mean"] < 100 for found in record["rows"].values())
    assert all(0 < found["clusters"]["purity"]["mean"] <= 1 for found in record["rows"].values())
    trained = tmp_path / "runs" / "runs" / "MLCD-0" / "mlcd" / "report.json"
    before = trained.stat().st_mtime_ns
    assert mlcd_compare.main([*words, "--jobs", "1"]) == 0
    assert trained.stat().st_mtime_ns == before
    again = json.loads(max((tmp_path / "results").iterdir()).read_text())
    assert again["rows"] == record["rows"]
