"""Differences with their uncertainty, and objectives: against numbers that are known, and a second way to count."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_found import result, row

from cliplet.deploy.bench_compare import (
    bootstrap_ratio,
    compare,
    earlier_record,
    hold_comparable,
    hold_objectives,
)
from cliplet.deploy.bench_summary import bench_record
from cliplet.errors import DataError, ObjectiveError


def record_of(*rates: float, **fields: Any) -> dict[str, Any]:
    return bench_record(result(row(rates, **fields)), "cliplet bench tiny")


def every_resample(values: list[float]) -> np.ndarray:
    """The median of each of the n^n resamples: what random ones estimate."""
    return np.median(list(itertools.product(values, repeat=len(values))), axis=1)


def test_the_bootstrap_agrees_with_all_resamples() -> None:
    new, old = [10.0, 11.0, 12.0, 9.0], [5.0, 5.5, 5.2, 4.8]
    ratios = np.divide.outer(every_resample(new), every_resample(old)).ravel()
    low, high = np.percentile(ratios, [2.5, 97.5])
    found = bootstrap_ratio(new, old)
    assert found == pytest.approx((low, high), rel=0.02)
    assert found == bootstrap_ratio(new, old), "the same numbers give the same interval"


@pytest.mark.parametrize(
    ("new", "old", "verdict"),
    [
        ((20.0, 21.0, 20.5), (10.0, 10.5, 10.2), "faster"),
        ((10.0, 10.5, 10.2), (20.0, 21.0, 20.5), "slower"),
        ((10.0, 12.0, 11.0), (10.5, 11.5, 11.0), "within noise"),
        ((20.0,), (10.0,), "one round: no telling"),
    ],
)
def test_a_difference_is_called_what_it_is(
    new: tuple[float, ...], old: tuple[float, ...], verdict: str
) -> None:
    found = compare(record_of(*new), record_of(*old))
    labelling = found.differences[0]
    assert (labelling.row, labelling.quantity) == ("tiny, onnx-fp32, batch 2", "labelling")
    assert labelling.verdict == verdict
    assert labelling.ratio == pytest.approx(np.median(new) / np.median(old))
    assert labelling.low <= labelling.ratio <= labelling.high
    assert any("fewer than 5 rounds" in note for note in found.notes)


def test_what_else_differs_is_said() -> None:
    old = record_of(10.0, 11.0)
    old["machine"] = {**old["machine"], "cores": 64}
    old["rows"]["gone, onnx-fp32"] = copy.deepcopy(old["rows"]["tiny, onnx-fp32, batch 2"])
    old["rows"]["tiny, onnx-fp32, batch 2"]["views"] = "1"
    notes = " ".join(compare(record_of(10.0, 11.0), old).notes)
    assert "machine was" in notes and "views were 1, are 1+3x3" in notes and "gone, onnx-fp32" in notes


def test_records_without_a_row_in_common_cannot_be_compared() -> None:
    old = record_of(10.0, runtime="openvino")
    with pytest.raises(DataError, match="the earlier record measured tiny, openvino-fp32, batch 2") as caught:
        hold_comparable(["tiny, onnx-fp32, batch 2"], old)
    assert caught.value.expected == "one of tiny, onnx-fp32, batch 2"
    hold_comparable(["other", "tiny, openvino-fp32, batch 2"], old)
    found = compare(record_of(10.0), old)
    assert not found.differences and "no row was measured in both records" in found.notes


def test_a_row_that_was_not_measured_before_is_none_in_common() -> None:
    old = record_of(why="no verdict")
    with pytest.raises(DataError, match="the earlier record measured none"):
        hold_comparable(old["rows"], old)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "it has no rows"),
        ([], "it has no rows"),
        ({"a": 3}, "a row of it has no rounds"),
        ({"a": {"images_per_s": 3.0}}, "a row of it has no rounds"),
        ({"a": {"images_per_s": {"all": []}}}, "a row of it has no rounds"),
        ({"a": {"images_per_s": {"all": [0.0]}}}, "a row of it has no rounds"),
        ({"a": {"engine_images_per_s": {"all": ["3"]}}}, "a row of it has no rounds"),
    ],
)
def test_an_earlier_record_of_another_shape_is_refused(rows: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps({"name": "bench", **({} if rows is None else {"rows": rows})}))
    with pytest.raises(DataError, match=f"cannot be compared with: {said}") as caught:
        earlier_record(file)
    assert "--out" in caught.value.fix


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    made = bench_record(result(row(), row((), "torch", why="no")), "cliplet bench tiny")
    (tmp_path / "old.json").write_text(json.dumps(made))
    assert compare(made, earlier_record(tmp_path / "old.json")).differences[0].ratio == 1


@pytest.mark.parametrize(
    ("asked", "missed"),
    [
        ((40.5, 31.0, 0.0), None),
        ((39.0, None, None), "p99 40.00 ms"),
        ((None, 32.0, None), "31.50 images/s"),
        ((None, None, 0.0), None),
    ],
)
def test_objectives_are_held_or_missed(
    asked: tuple[float | None, float | None, float | None], missed: str | None
) -> None:
    made = record_of(30.0, 33.0)
    if missed is None:
        hold_objectives(made, *asked)
        return
    with pytest.raises(ObjectiveError, match=missed) as caught:
        hold_objectives(made, *asked)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("asked", [(40.5, None, None), (None, 31.0, None), (None, None, 0.0)])
def test_a_row_that_was_not_measured_misses_every_objective(
    asked: tuple[float | None, float | None, float | None],
) -> None:
    made = bench_record(result(row(), row((), "tensorrt", why="no GPU")), "cliplet bench tiny")
    with pytest.raises(ObjectiveError, match="^tiny, tensorrt-fp32, batch 2: not measured: no GPU\n"):
        hold_objectives(made, *asked)
    hold_objectives(made, None, None, None)


def test_a_server_that_went_away_misses_the_error_rate() -> None:
    with pytest.raises(ObjectiveError, match="33.3% failed"):
        hold_objectives(record_of(30.0, 30.0, broken=1, why="it went away"), None, None, 0.1)
