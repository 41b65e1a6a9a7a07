"""Thresholds on disk: for all classes or for each, never for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cliplet.errors import ArtifactError
from cliplet.thresholds import Thresholds, read_entries, read_thresholds, thresholds_from_json

NAMES = ("cat", "Dog")


@pytest.mark.parametrize(
    ("entry", "values", "source"),
    [
        ({"value": 0.4, "how": "by hand"}, (0.4, 0.4), "0.4, calibrated with the model: by hand"),
        ({"value": 0}, (0.0, 0.0), "0.0, calibrated with the model: it does not say how"),
        (
            {"values": {"dog": 0.25, "cat": 1}, "how": "F1"},
            (1.0, 0.25),
            "0.25 to 1 by class, calibrated with the model: F1",
        ),
    ],
)
def test_an_entry(entry: dict[str, object], values: tuple[float, ...], source: str) -> None:
    assert thresholds_from_json(entry, NAMES, "it") == Thresholds(values, source)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"values": {"cat": 0.1}}, "other classes: 'dog' stands on one side"),
        ({"values": {"cat": 0.1, "dog": 0.1, "bird": 0.1}}, "other classes: 'bird'"),
        ({"values": {"cat": 0.1, "dog": 1.5}}, "1.5 for a threshold"),
        ({"values": {"cat": 0.1, "dog": True}}, "true for a threshold"),
        ({"values": {"cat": 0.1, "dog": None}}, "null for a threshold"),
        ({"value": "0.3"}, '"0.3" for a threshold'),
        ({"value": float("nan")}, "NaN for a threshold"),
        ({"how": "?"}, "null for a threshold"),
        ({}, "null for a threshold"),
    ],
)
def test_what_is_no_entry(entry: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "thresholds.json"
    file.write_text(json.dumps(entry))
    with pytest.raises(ArtifactError, match=message):
        read_thresholds(file, NAMES)


@pytest.mark.parametrize("content", [None, "{", "\udcff"])
def test_a_file_that_cannot_be_read(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "thresholds.json"
    if content is not None:
        file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError, match="cannot read .*thresholds.json"):
        read_thresholds(file, NAMES)


@pytest.mark.parametrize("content", ["[0.1, 0.2]", "0.3", "null", '"cat"'])
def test_a_file_that_holds_no_entries(content: str, tmp_path: Path) -> None:
    file = tmp_path / "thresholds.json"
    file.write_text(content)
    for read in (read_entries, lambda path: read_thresholds(path, NAMES)):
        with pytest.raises(ArtifactError, match="thresholds.json holds") as caught:
            read(file)
        assert content in caught.value.happened
        assert caught.value.fix == "cliplet calibrate MODEL writes one"


def test_entries_by_view_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "thresholds.json"
    file.write_text(json.dumps({"1": {"value": 0.1}, "1+2x2": {"value": 0.2}}))
    assert read_entries(file) == {"1": {"value": 0.1}, "1+2x2": {"value": 0.2}}
