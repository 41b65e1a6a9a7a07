"""Records: where a measurement came from, without the folders of the machine, never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cliplet.errors import DataError
from cliplet.record import read_record, record, shown, spread, write_record


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("/home/me/photos", "photos"),
        ("../photos", "photos"),
        ("~/photos", "photos"),
        ("--out=/tmp/x/out", "--out=out"),
        ("photos/here", "photos/here"),
        ("open_clip:ViT-B-32//data/w.safetensors", "open_clip:ViT-B-32/w.safetensors"),
        ("open_clip:local-dir:/data/clip", "open_clip:local-dir:clip"),
        ("--model=open_clip:RN50//data/w.pt", "--model=open_clip:RN50/w.pt"),
        ("open_clip:ViT-B-32/laion2b", "open_clip:ViT-B-32/laion2b"),
        ("triton://localhost:8001/pets", "triton://localhost:8001/pets"),
        ("--rounds", "--rounds"),
    ],
)
def test_folders_of_the_machine_are_not_shown(argument: str, named: str) -> None:
    assert shown([argument]) == [named]


def test_a_record_says_where_it_came_from_and_is_read_again(tmp_path: Path) -> None:
    made = record("bench", "cliplet bench tiny", {"rows": {"a": 1}})
    assert made["commit"] and made["machine"]["cores"] > 0 and "numpy" in made["versions"]
    file = write_record(tmp_path, made)
    assert read_record(file, "bench") == made


def test_a_record_is_never_overwritten_even_if_one_between_is_gone(tmp_path: Path) -> None:
    files = [write_record(tmp_path, record("a", "x", {"rows": i})) for i in range(3)]
    files[0].unlink()
    fourth = write_record(tmp_path, record("a", "x", {"rows": 3}))
    assert [json.loads(file.read_text())["rows"] for file in (*files[1:], fourth)] == [1, 2, 3]


@pytest.mark.parametrize("text", ["", "[]", '{"name": "engines"}', "{"])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match="record"):
        read_record(tmp_path / "r.json", "bench")


def test_a_spread_keeps_every_repetition() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}
