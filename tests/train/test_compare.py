"""`cliplet train compare`: the table's arithmetic, runs that fail, runs that are not repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from PIL import Image

from cliplet.errors import DataError, UsageError
from cliplet.train import compare as comparing
from cliplet.train.classifier_recipe import METHODS
from cliplet.train.compare import CompareOptions, chosen_recipes, compare, markdown, run_folder, summarised
from cliplet.train.compare_rows import MENDS, MENDS_ON_REQUEST, compared_recipes
from cliplet.train.paper import REPORTED, reported, reported_table
from cliplet.train.recipes import scenes_ccd, scenes_ccd_released, voc12_ccd_released
from cliplet.train.run_data import DataOptions
from cliplet.vocabulary import ClassName, Vocabulary

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
    assert rows["ccd, first-to-last-pixel corners"] == replace(scenes_ccd(), box_rule="first_last")
    assert rows["ccd, stretched crops"] == replace(scenes_ccd(), crop_shape="stretched")
    assert {rows[name].softmax_scale for name in rows if "softmax" in name} == {100, 8.7}
    assert {r.softmax_scale for n, r in compared_recipes("voc12").items() if "softmax" in n} == {20}
    assert rows["label update"] == replace(scenes_ccd(), debias=False, consistency=0.0)
    assert len({json.dumps(recipe.to_json()) for recipe in rows.values()}) == len(rows)
    folders = {run_folder(Path("out"), name, 0) for name in rows}
    assert len(folders) == len(rows)


def test_every_mend_is_a_field_that_goes_back_to_the_released_value() -> None:
    for data, released in (("scenes", scenes_ccd_released()), ("coco14", voc12_ccd_released())):
        rows = compared_recipes(data)
        for name, undone in (MENDS | MENDS_ON_REQUEST).items():
            changed = {f for f, value in rows[name].to_json().items() if value != rows["ccd"].to_json()[f]}
            assert changed == set(undone)
            assert all(getattr(rows[name], field) == getattr(released, field) for field in undone)


def test_rows_on_request_are_trained_where_they_are_named() -> None:
    assert chosen_recipes("scenes", CompareOptions()).keys() == compared_recipes("scenes").keys() - set(
        MENDS_ON_REQUEST
    )
    assert list(chosen_recipes("scenes", CompareOptions(names=("ccd, released floor",)))) == [
        "ccd, released floor"
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [({}, "have no eval_split"), ({"eval_split": "all"}, "its split all has no labels")],
)
def test_a_folder_without_anything_to_measure_by_is_refused_at_the_start(
    overrides: dict[str, str], said: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "teacher_labels", pytest.fail)
    monkeypatch.setattr(comparing, "train_classifier", pytest.fail)
    data = DataOptions(root=photos, vocabulary=Vocabulary((ClassName("cat"), ClassName("dog"))))
    with pytest.raises(UsageError, match=said) as caught:
        compare("folder", tmp_path, replace(OPTIONS, data=data, overrides=overrides))
    assert caught.value.fix == "--set eval_split=all, with a labels.csv beside the images"


def test_rows_that_learn_from_true_labels_need_them(
    compared: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = compared
    original = comparing.run_data

    def unlabelled(*given):  # type: ignore[no-untyped-def]
        data, evaluation = original(*given)
        return replace(data, truth_NC=None), evaluation

    monkeypatch.setattr(comparing, "run_data", unlabelled)
    with pytest.raises(UsageError, match="the rows bce learn from true labels"):
        compare("scenes", out, replace(OPTIONS, names=("an", "bce")))
    asked: list[str] = []
    monkeypatch.setattr(comparing, "_outcomes", lambda jobs, *_: asked.extend(job[0] for job in jobs) or [])
    monkeypatch.setattr(comparing, "write_comparison", lambda *_: None)
    compare("scenes", out, replace(OPTIONS, names=()))
    assert "ccd" in asked and "bce" not in asked and "bce_ls" not in asked


def test_an_engine_is_chosen_for_the_teachers_that_leave_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str | None] = {}
    monkeypatch.setattr(
        comparing, "train_classifier", lambda r, _, o: asked.update({r.scoring: o.teacher_runtime})
    )
    for recipe in (scenes_ccd(), scenes_ccd_released()):
        comparing._run(recipe, tmp_path, tmp_path, replace(OPTIONS, teacher_runtime="openvino"))
    assert asked == {"batched": "openvino", "one_by_one": None}


def test_mean_deviation_and_order_of_the_table() -> None:
    def report(value: float, lost: Mapping[str, str] = MappingProxyType({})) -> dict:
        history = [{"seconds": 1.0, "label_map": 5.0}, {"seconds": 2.0, "label_map": 7.0}]
        measured = {"map": value, "last_map": value - 1, "unreadable": lost}
        return {"measured": measured, "labels": {}, "history": history}

    chosen = {name: scenes_ccd() for name in ("an", "ccd")}
    reports = {
        "an": {0: report(50.0, {"a.jpg": "decode: no image"})},
        "ccd": {0: report(60.0), 1: report(64.0), 2: report(65.0)},
    }
    result = summarised("scenes", chosen, reports, {"teacher, views 1": 40.0}, "voc12")
    assert result["rows"]["ccd"]["map"]["deviation"] == pytest.approx(7**0.5)
    assert result["rows"]["ccd"]["seconds"] == [3.0, 3.0, 3.0]
    head, _, *lines = markdown(result).splitlines()
    assert head.endswith("| reported, VOC12 |")
    assert lines == [
        "| teacher, views 1 | 40.0 | | | |",
        "| ccd | 63.0 ± 2.6 | 62.0 ± 2.6 | 7.0 ± 0.0 | 90.1 |",
        "| an | 50.0 (1 images unreadable) | 49.0 | 7.0 | 85.5 |",
    ]
    without = summarised("nus", chosen, reports, {}, None)
    assert {row["reported"] for row in without["rows"].values()} == {None}
    assert markdown(without).splitlines()[0].endswith("| reported |")


@pytest.mark.parametrize(
    ("kind", "classes", "images", "name", "value"),
    [
        ("voc12", 20, 5_823, "ccd", 90.1),
        ("coco14", 80, 40_137, "cdul", 69.2),
        ("coco17", 80, 4_952, "cdul", None),
        ("scenes", 16, 2_000, "label update", 88.7),
        ("coco14", 80, 40_137, "label update", None),
        ("voc07", 20, 4_952, "epr", None),
        # NUS-WIDE is not one data set: the papers' numbers are those of the arrays.
        ("nus", 81, 107_859, "role", None),
        ("ccd", 81, 60_260, "role", 43.2),
        ("ccd", 20, 4_952, "ccd", 91.0),
        ("ccd", 20, 5_823, "label update", 88.7),
        ("ccd", 81, 1_000, "ccd", None),
        ("ccd", 7, 100, "ccd", None),
    ],
)
def test_reported_numbers(kind: str, classes: int, images: int, name: str, value: float | None) -> None:
    assert reported(reported_table(kind, classes, images), name) == value
    assert all(set(table) <= set(METHODS) for table in REPORTED.values())
