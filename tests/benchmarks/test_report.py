"""The page of measurements is what the records say, and a record says where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.report import README, TRAINING, report, with_training_table


def test_the_page_is_generated_from_the_records() -> None:
    assert README.read_text() == report(), "run: python -m benchmarks.report"


def test_the_page_about_training_shows_the_latest_comparison() -> None:
    text = TRAINING.read_text()
    assert with_training_table(text) == text, "run: python -m benchmarks.report"
    assert "| ccd |" in text


@pytest.mark.parametrize("path", sorted(records.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_a_record_says_what_where_how_and_when(path: Path) -> None:
    record = json.loads(path.read_text())
    for field in (
        "name",
        "what",
        "date",
        "commit",
        "command",
        "machine",
        "versions",
        "model",
        "images",
        "rows",
    ):
        assert record[field], field
    assert record["machine"]["cores"] > 0


def test_a_record_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    first, second = records.write_record("a", {"rows": 1}), records.write_record("a", {"rows": 2})
    assert first != second
    assert json.loads(first.read_text())["rows"] == 1


def test_a_spread_keeps_every_repetition() -> None:
    assert records.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}
