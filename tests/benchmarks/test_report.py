"""The page of measurements is what the records say, and a record says where it came from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records
from benchmarks.chapters import labelling
from benchmarks.chapters.telling import in_brackets, marks_of, spread_of, verdict
from benchmarks.report import CHAPTERS, README, TRAINING, Kind, report, with_training_table


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


# Which records the book shows, and what it says of them.


def record_of(file: str, rows: str = "a", **fields: Any) -> dict[str, Any]:
    return {"file": file, "date": "2026-11-23", "rows": dict.fromkeys(rows, {}), **fields}


@pytest.mark.parametrize(
    ("given", "shown", "others"),
    [
        ([record_of("old", rounds=3), record_of("new", rounds=1)], ["old"], ["new"]),
        ([record_of("1", rounds=2), record_of("2", rounds=2)], ["2"], ["1"]),
        ([record_of("1", date="2026-11-24"), record_of("2")], ["1"], ["2"]),
        ([record_of("both", before={"a": {}}), record_of("new", rounds=5)], ["both"], ["new"]),
        ([record_of("old", "ab", rounds=3), record_of("new", "bc", rounds=1)], ["old", "new"], []),
    ],
)
def test_the_book_shows_the_record_with_the_most_rounds_and_names_the_others(
    given: list[dict[str, Any]], shown: list[str], others: list[str]
) -> None:
    found = Kind.of(given)
    assert [record["file"] for record in found.shown] == shown
    assert [record["file"] for record in found.others] == others


def test_every_record_is_in_the_book() -> None:
    text = README.read_text()
    for path in records.RESULTS.glob("*.json"):
        assert f"(results/{path.name})" in text, path.name


def index() -> list[list[str]]:
    lines = report().partition("| record |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_index_leaves_no_cell_empty() -> None:
    assert index() and all(all(cells) and len(cells) == 6 for cells in index())
    assert any(cells[2] == "not measured" for cells in index())


def test_a_limit_that_a_row_passed_is_a_lower_bound() -> None:
    (cells,) = [cells for cells in index() if "labelling_2cores_20261123-2.json" in cells[0]]
    assert "fp32 167 GOP/s, bf16 at least 211 GOP/s, int8 880 GOP/s" in cells[2]


def spread(*values: float) -> dict[str, Any]:
    return records.spread(values)


def test_one_round_has_no_spread() -> None:
    shown = "{:.1f}".format
    assert spread_of(spread(1.0, 2.0), shown) == "1.0 to 2.0" and spread_of(spread(1.0), shown) == "–"
    assert in_brackets(spread(1.0, 2.0), shown) == " (1.0 to 2.0)" and in_brackets(spread(1.0), shown) == ""


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ((0.95, 0.92), "met in every round"),
        ((0.95, 0.93, 0.8), "met by the median, not by the lowest, 80%"),
        ((0.95,), "met, in the only round"),
        ((0.85, 0.95, 0.8), "missed"),
    ],
)
def test_an_aim_is_met_by_rounds(rounds: tuple[float, ...], said: str) -> None:
    assert verdict(spread(*rounds), 0.9, "{:.0%}".format) == said


def test_marks_stand_below_their_table() -> None:
    assert marks_of({"a": {"marks": ["x", "y"]}, "b": {"marks": []}, "c": {}}) == ["- a: x; y", ""]
    assert marks_of({"a": {"marks": []}}) == []
    record = json.loads((records.RESULTS / "labelling_2cores_20261123-2.json").read_text())
    text = labelling.chapter(record)
    assert "two batches at a time: p99 of only 6 batches; beyond the machine's limits" in text
    assert text.count("(aim 90%: met, in the only round)") == 2 and "| 147.8 | – |" in text


def test_every_kind_of_record_has_a_chapter() -> None:
    for path in records.RESULTS.glob("*.json"):
        kind = Kind.of([json.loads(path.read_text()) | {"file": path.name}])
        assert len([chapter for chapter in CHAPTERS if chapter.holds(kind)]) == 1, path.name


def test_a_spread_keeps_every_repetition() -> None:
    assert records.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}
