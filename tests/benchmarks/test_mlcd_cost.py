"""What clusters cost: every point is measured in a process of its own, and the chapter tells what the record says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import mlcd_cost, records
from benchmarks.chapters.mlcd_cost import chapter
from benchmarks.mlcd_cost_parts import made_embeddings


def spread(value: float) -> dict[str, Any]:
    return {"median": value, "min": value - 1, "max": value + 1, "all": [value - 1, value + 1]}


def made_record() -> dict[str, Any]:
    def clusters(count: int, rate: float, recall: float) -> dict[str, Any]:
        names = ("sample", "iteration_s", "assigned_per_s", "peak_mb")
        return {
            "clusters": count,
            "rows_per_s": spread(rate),
            "recall": spread(recall),
            "disturbed": 0,
            **{name: spread(7.0) for name in names},
        }

    def loss(count: int, rate: float, seconds: float, grown: float) -> dict[str, Any]:
        found = {"step_s": spread(seconds), "grown_mb": spread(grown), "stated_mb": spread(200.0)}
        return {"clusters": count, "rate": rate, "disturbed": 0, **found}

    def training(count: int, rate: float, images: float) -> dict[str, Any]:
        row = {"clusters": count, "rate": rate, "precision": "bf16", "disturbed": 1}
        return {**row, "images_per_s": spread(images), "peak_mb": spread(900.0)}

    rows = {
        "clusters": [clusters(100, 5000.0, 1.0), clusters(100_000, 50.0, 0.96)],
        "loss": [
            loss(100_000, 0.01, 0.1, 100),
            loss(100_000, 0.1, 0.2, 250),
            loss(100_000, 1.0, 0.8, 100),
        ],
        "training": [
            training(100, 0.1, 80.0),
            training(100, 1.0, 80.0),
            training(100_000, 0.1, 60.0),
            training(100_000, 1.0, 20.0),
        ],
    }
    return {"rounds": 2, "batch": 128, "positives": 8, "rows": rows}


def test_the_chapter_reads_its_tables() -> None:
    told = chapter(made_record())
    assert "| 100,000 | 10% | 0.2000 | 0.25 | 250 | 200 |" in told
    assert "| 100,000 | 10% | 60.0 | 59.0 to 61.0 | 900 |" in told
    assert "1,000 times as many clusters make k-means 100 times as slow a row." in told
    assert (
        "From 100,000 clusters on an inverted index looks for the nearest, and finds 96.0% of them." in told
    )
    assert "4.0 times as fast with 10% of the negatives, 8.0 times as fast with 1%" in told
    assert "reads 75% of the images a second that it reads at 100 clusters; with all of them 25%." in told
    assert "Other processes disturbed 4 of the measurements." in told
    assert "Memory grew beyond what was stated for 100,000 at 10%" in told


def test_made_embeddings_are_unit_rows_in_groups() -> None:
    rows = made_embeddings(300, 64).astype(np.float32)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1.0, abs=2e-3)
    assert len(np.unique(rows, axis=0)) == 300


def test_a_run_measures_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    limits = {"by": "a test", "gop_per_s": {"fp32": 200.0}, "gb_per_s": 10.0, "notes": []}
    monkeypatch.setattr("cliplet.deploy.bench.machine_limits", lambda *_: limits)
    small = ["--most", "100", "--rows", "2000", "--images", "16", "--rounds", "1"]
    assert mlcd_cost.main([*small, "--only", "cost"]) == 0
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert [row["rate"] for row in record["rows"]["loss"]] == list(mlcd_cost.RATES)
    assert all(row["step_s"]["median"] > 0 for row in record["rows"]["loss"])
    (found,) = record["rows"]["clusters"]
    assert (found["sample"]["median"], found["recall"]["median"]) == (2000, 1.0)
    assert {row["precision"] for row in record["rows"]["training"]} == {"bf16"}
    assert all(row["images_per_s"]["median"] > 0 for row in record["rows"]["training"])
    assert "| 100 | 2,000 |" in chapter(record)


def test_memory_of_a_process_falls_with_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    limits = {"by": "a test", "gop_per_s": {"fp32": 200.0}, "gb_per_s": 10.0, "notes": []}
    monkeypatch.setattr("cliplet.deploy.bench.machine_limits", lambda *_: limits)
    monkeypatch.setattr(mlcd_cost, "WORLDS", (1, 2))
    assert mlcd_cost.main(["--only", "ranks", "--most", "20000", "--rounds", "1"]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("mlcd-ranks_")
    record = json.loads(file.read_text())
    one, two = record["rows"]["ranks"]
    assert (one["world"], two["world"], one["clusters"]) == (1, 2, 20_000)
    assert two["stated_mb"]["median"] < 0.7 * one["stated_mb"]["median"]
    # Torch's own comes on top of what is stated, the more so with gloo.
    assert two["grown_mb"]["median"] < one["grown_mb"]["median"]
    assert one["grown_mb"]["median"] > 0.8 * one["stated_mb"]["median"]
    assert record["environment"] == {"MALLOC_MMAP_THRESHOLD_": "65536"}
