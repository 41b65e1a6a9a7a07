"""A benchmark's record: shares, verdicts and marks from rounds whose numbers are known."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from bench_found import LOADED, phases, result, row, whole
from rich.console import Console

from cliplet.deploy import bench as running
from cliplet.deploy import bench_plots
from cliplet.deploy.bench import ideal_rate
from cliplet.deploy.bench_summary import bench_record
from cliplet.deploy.bench_table import as_csv, number, show


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "usable_cores", lambda: 2)


def record_of(*rows: Any, **fields: Any) -> dict[str, Any]:
    return bench_record(result(*rows, **fields), "cliplet bench tiny")


def test_a_row_in_numbers() -> None:
    made = record_of(row())["rows"]["tiny, onnx-fp32, batch 2"]
    assert made["images_per_s"] == {"median": 31.5, "min": 30.0, "max": 33.0, "all": [30.0, 33.0]}
    assert made["engine_images_per_s"]["median"] == pytest.approx(50)
    assert made["views_per_s"]["median"] == pytest.approx(500)
    # Two cores; an image takes 10 ms of one of them, and the engine both for 20 ms: 2 / (0.010 + 2 x 0.020) = 40.
    assert made["ideal_images_per_s"]["median"] == pytest.approx(40)
    assert made["share_of_ideal"]["median"] == pytest.approx(31.5 / 40)
    assert made["share_of_engine"]["median"] == pytest.approx(31.5 / 50)
    # 100 GOP/s over 0.1 GOP a view; the weights are too few to bear on it.
    assert made["limit"] == {"views_per_s": pytest.approx(1000), "by": "arithmetic"}
    assert made["share_of_limit"] == pytest.approx(0.5)
    assert made["latency_ms"] == {
        "p50": pytest.approx(40),
        "p90": pytest.approx(40),
        "p95": pytest.approx(40),
        "p99": pytest.approx(40),
        "batches": 200,
    }
    assert made["phases_ms_per_image"]["decode"]["median"] == pytest.approx(8)
    assert made["phases_ms_per_image"]["to_device"] is None
    assert made["peak_mb"]["median"] == 200 and made["engine_peak_mb"]["median"] == 150
    assert made["verdict"] == "equal" and made["marks"] == [] and made["error_rate"] == 0


def test_an_ideal_on_a_gpu_is_the_slower_of_the_two() -> None:
    found = phases(engine=0.001)
    found["facts"]["device"] = "cuda"
    assert ideal_rate(found, threads=0) == pytest.approx(200), "two cores that take 10 ms an image"
    found["seconds_per_image"]["engine"] = 0.1
    assert ideal_rate(found, threads=0) == pytest.approx(10)


def test_ratios_are_of_the_same_round_and_the_same_model() -> None:
    rows = record_of(
        row((10.0, 40.0)),
        row((20.0, 40.0), "openvino"),
        row((5.0,), "openvino", "other"),
        row((1.0, 1.0), "torch"),
    )["rows"]
    assert rows["tiny, openvino-fp32, batch 2"]["ratio_to_first"]["all"] == [2.0, 1.0]
    assert rows["other, openvino-fp32, batch 2"]["ratio_to_first"]["all"] == [1.0]
    assert rows["tiny, torch-fp32, batch 2"]["ratio_to_first"]["all"] == [0.1, 0.025]


@pytest.mark.parametrize(
    ("fields", "marked"),
    [
        (
            {"phases": [phases(load=LOADED), phases()]},
            "machine under load: others took up to 1.5 cores (round 1)",
        ),
        (
            {"wholes": [whole(), whole(load=LOADED)]},
            "machine under load: others took up to 1.5 cores (round 2)",
        ),
        ({"wholes": [whole(20.0), whole(40.0)]}, "rounds of labelling differ by 67%"),
        ({"phases": [phases(0.02), phases(0.03)]}, "rounds of the engine differ by 40%"),
        ({"phases": [phases(parity=None)] * 2}, "unverified: no verdict"),
        ({"phases": [phases(parity={"passed": False})] * 2}, "unverified: it disagrees"),
        ({"phases": [phases(warm_up={"stable": False}), phases()]}, "not stable after its warm-up"),
        (
            {"phases": [phases(parts_images_per_s=[100.0, 90.0, 85.0, 80.0]), phases()]},
            "the engine's speed drifted by 20% within a round",
        ),
        ({"phases": [phases(latencies_s=[0.04] * 9)] * 2}, "p99 of only 18 batches"),
        ({"phases": [phases(notes=["no energy"])] * 2}, "no energy"),
        ({"phases": [phases(0.005), phases(0.005)]}, "beyond the machine's limits"),
        ({"why": "the server went away", "broken": 1}, "stopped after round 2: the server went away"),
    ],
)
def test_what_has_to_be_known_is_marked(fields: dict[str, Any], marked: str) -> None:
    (made,) = record_of(row((30.0, 30.0), **fields))["rows"].values()
    assert [mark for mark in made["marks"] if mark.startswith(marked)], made["marks"]


def test_failed_images_and_broken_rounds_are_errors() -> None:
    (made,) = record_of(row(wholes=[whole(failed=6), whole()]))["rows"].values()
    assert made["error_rate"] == pytest.approx(6 / 120)
    (made,) = record_of(row(broken=1, why="gone"))["rows"].values()
    assert made["error_rate"] == pytest.approx(60 / 180), "two rounds went well, one was lost"


def test_a_row_without_rounds_says_why() -> None:
    refused = row((), why="--runtime tensorrt with --device cpu", fix="--device cuda")
    cut = row((), "openvino")
    made = record_of(refused, cut, interrupted=True)
    first, second = made["rows"].values()
    assert first["why"] == "--runtime tensorrt with --device cpu" and "images_per_s" not in first
    assert second["why"] == "interrupted before its first round"
    console = Console(file=io.StringIO(), width=60)
    show(made, None, console)
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "--runtime tensorrt with --device cpu → --device cuda" in text
    assert "was interrupted" in text


def test_without_limits_there_is_no_share_of_them() -> None:
    (made,) = record_of(row(), limits={})["rows"].values()
    assert made["limit"] is None and made["share_of_limit"] is None


def test_a_table_is_never_cut_off() -> None:
    console = Console(file=io.StringIO(), width=40)
    show(record_of(row(), row((60.0, 66.0), "openvino")), None, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text and "openvino-fp32" in text
    told = " ".join(text.split())
    assert (
        "cutting the views, encoder, scores and their aggregation, which are one graph and so have one number"
        in told
    )
    (line,) = [line for line in text.splitlines() if "onnx-fp32" in line and "equal" in line]
    assert line.split()[:7] == ["onnx-fp32", "fp32", "2", "31.5", "5%", "1.00", "79%"]


def test_the_csv_has_a_line_for_every_row() -> None:
    made = record_of(row(), row((), "torch", why="no verdict"))
    lines = list(csv.DictReader(io.StringIO(as_csv(made).decode())))
    assert [line["row"] for line in lines] == list(made["rows"])
    assert float(lines[0]["images_per_s_median"]) == 31.5
    assert float(lines[0]["latency_p99_ms"]) == pytest.approx(40)
    assert float(lines[0]["decode_ms_per_image"]) == pytest.approx(8)
    assert lines[1]["why"] == "no verdict" and lines[1]["images_per_s_median"] == ""


def test_the_record_is_json_with_all_that_a_record_holds() -> None:
    made = json.loads(json.dumps(record_of(row())))
    fields = ("name", "what", "date", "commit", "command", "machine", "versions", "model", "images", "rows")
    assert all(made[field] for field in fields)


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (0.01234, "0.0123"), (7.0, "7")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_plots_are_pngs_and_without_matplotlib_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    made = record_of(row(), row((60.0, 66.0), "openvino"), row((5.0,), "triton", "other"))
    pictures = bench_plots.plots(made)
    assert list(pictures) == ["latency.png", "ratio.png"]
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    assert bench_plots.plots(record_of(row((), why="no"))) == {}
    monkeypatch.setattr(bench_plots, "find_spec", lambda _: None)
    assert bench_plots.plots(made) == {}
