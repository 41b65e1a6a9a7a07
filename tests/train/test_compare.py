"""`cliplet train compare`: the table's arithmetic, runs that fail, runs that are not repeated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cliplet.errors import DataError, UsageError
from cliplet.train import compare as comparing
from cliplet.train.classifier_recipe import METHODS
from cliplet.train.compare import CompareOptions, compare, compared_recipes, markdown, run_folder, summarised
from cliplet.train.paper import REPORTED, reported
from cliplet.train.recipes import scenes_ccd

SMALL = {
    "train_scenes": 40,
    "eval_scenes": 20,
    "image_size": 64,
    "region_size": 64,
    "epochs": 1,
    "warmup_epochs": 0,
    "batch": 10,
    "precision": "fp32",
    "bias_guard": "one",
}
OPTIONS = CompareOptions(names=("an", "ccd"), seeds=2, threads=1, overrides=SMALL, quiet=True)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """Two rows with two seeds each, and their folder."""
    out = tmp_path_factory.mktemp("compare")
    return out, compare("scenes", out, OPTIONS)


def test_every_row_has_each_seed(compared: tuple[Path, dict]) -> None:
    _, result = compared
    assert list(result["rows"]) == ["ccd", "an"]
    for row in result["rows"].values():
        assert len(set(row["map"]["all"])) == 2
        assert row["map"]["mean"] == pytest.approx(sum(row["map"]["all"]) / 2)
        assert row["map"]["deviation"] > 0
    assert set(result["teacher"]) == {"teacher, views 1", "teacher, views 1+3x3"}


def test_what_is_written(compared: tuple[Path, dict]) -> None:
    out, result = compared
    assert json.loads((out / "compare.json").read_text()) == result
    assert (out / "compare.md").read_text() == markdown(result)
    assert Image.open(out / "compare.png").width > 500


def test_a_second_call_trains_nothing(compared: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    out, result = compared
    monkeypatch.setattr("cliplet.train.train_classifier._train", lambda *_: pytest.fail("trained again"))
    assert compare("scenes", out, OPTIONS) == result


def test_a_run_that_fails_does_not_stop_the_others(
    compared: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = compared
    real = comparing.train_classifier

    def sometimes(recipe, folder, options):  # type: ignore[no-untyped-def]
        if recipe.method == "an_ls":
            raise DataError("the disk melted")
        return real(recipe, folder, options)

    monkeypatch.setattr(comparing, "train_classifier", sometimes)
    with pytest.raises(DataError, match=r"2 of 6 runs failed; the first: an_ls, seed 0: the disk melted"):
        compare("scenes", out, replace(OPTIONS, names=("an", "an_ls", "ccd")))
    rows = json.loads((out / "compare.json").read_text())["rows"]
    assert rows["an_ls"]["map"] is None
    assert len(rows["ccd"]["map"]["all"]) == 2


def test_an_unknown_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no row 'adn'"):
        compare("scenes", tmp_path, CompareOptions(names=("adn",)))
    assert not list(tmp_path.iterdir())


def test_rows_differ_from_ccd_in_what_they_say() -> None:
    rows = compared_recipes("scenes")
    assert set(METHODS) < set(rows)
    assert "ccd_released" in rows
    assert "ccd_released" not in compared_recipes("coco14")
    assert rows["ccd"] == scenes_ccd()
    assert rows["label update"] == replace(scenes_ccd(), debias=False, consistency=0.0)
    assert len({json.dumps(recipe.to_json()) for recipe in rows.values()}) == len(rows)
    folders = {run_folder(Path("out"), name, 0) for name in rows}
    assert len(folders) == len(rows)


def test_mean_deviation_and_order_of_the_table() -> None:
    def report(value: float) -> dict:
        history = [{"seconds": 1.0, "label_map": 5.0}, {"seconds": 2.0, "label_map": 7.0}]
        return {"measured": {"map": value, "last_map": value - 1}, "labels": {}, "history": history}

    chosen = {name: scenes_ccd() for name in ("an", "ccd")}
    reports = {"an": {0: report(50.0)}, "ccd": {0: report(60.0), 1: report(64.0), 2: report(65.0)}}
    result = summarised("scenes", chosen, reports, {"teacher, views 1": 40.0})
    assert result["rows"]["ccd"]["map"]["deviation"] == pytest.approx(7**0.5)
    assert result["rows"]["ccd"]["seconds"] == [3.0, 3.0, 3.0]
    lines = markdown(result).splitlines()[2:]
    assert lines == [
        "| teacher, views 1 | 40.0 | | | |",
        "| ccd | 63.0 ± 2.6 | 62.0 ± 2.6 | 7.0 ± 0.0 | 90.1 |",
        "| an | 50.0 | 49.0 | 7.0 | 85.5 |",
    ]


@pytest.mark.parametrize(
    ("data", "name", "value"),
    [
        ("voc12", "ccd", 90.1),
        ("coco14", "cdul", 69.2),
        ("nus", "role", 43.2),
        ("scenes", "label update", 88.7),
        ("coco14", "label update", None),
        ("voc07", "epr", None),
    ],
)
def test_reported_numbers(data: str, name: str, value: float | None) -> None:
    assert reported(data, name) == value
    assert all(set(table) <= set(METHODS) for table in REPORTED.values())
