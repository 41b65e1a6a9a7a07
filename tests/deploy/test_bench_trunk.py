"""`cliplet bench` of trunks, which give embeddings: measured beside models that label, and never said to give labels."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from bench_found import phases, result, row
from rich.console import Console
from served import make_student, make_trunk
from towers import save_toy_trunk

from cliplet.contract import EMBEDDINGS
from cliplet.deploy import bench_embeddings
from cliplet.deploy.bench_compare import compare
from cliplet.deploy.bench_embeddings import embed_folder
from cliplet.deploy.bench_page import page
from cliplet.deploy.bench_plots import plots
from cliplet.deploy.bench_rows import BenchJob, rows_of
from cliplet.deploy.bench_summary import bench_record
from cliplet.deploy.bench_table import as_csv, show
from cliplet.deploy.bench_whole import measure_whole
from cliplet.errors import DataError, EnvironmentError_
from cliplet.images import ImageRef, decode_image, read_image
from cliplet.plan import Plan, TaggerSettings, make_plan
from cliplet.tagger import load_plan
from cliplet.train.embeddings import read_embeddings

WIDTH = 96


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trunk(tmp_path_factory.mktemp("bundles") / "trunk")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("bundles") / "student")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trunk as `cliplet train mlcd` writes it."""
    return save_toy_trunk(tmp_path_factory.mktemp("learned") / "learned")


def plan_of(model: Path, runtime: str) -> Plan:
    return make_plan(TaggerSettings(model=str(model), runtime=runtime, threads=1), features=True)


class Run(NamedTuple):
    """What a call of the command wrote."""

    stdout: str
    out: Path
    record: dict[str, Any]


@pytest.fixture(scope="module")
def run(trunk: Path, student: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One round of a trunk and of a classifier, one of six files being no image, and traced."""
    folder = tmp_path_factory.mktemp("bench")
    bad, out = folder / "bad.jpg", folder / "out"
    bad.write_bytes(b"no image")
    command = [
        *(sys.executable, "-m", "cliplet.cli", "bench", str(trunk), str(student), "--runtime", "onnx"),
        *("--batch-size", "2", "--rounds", "1", "--seconds", "0.05", "--limit", "6"),
        *("--images", str(bad), "--images", str(photos)),
        *("--out", str(out), "--trace", str(out / "trace.json")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return Run(done.stdout, out, json.loads((out / "bench.json").read_text()))


def test_a_trunk_has_all_its_numbers_beside_a_model_that_labels(run: Run) -> None:
    rows = run.record["rows"]
    assert list(rows) == ["trunk, onnx-fp32, batch 2", "student, onnx-fp32, batch 2"]
    trunk, student = rows.values()
    assert (trunk["gives"], trunk["classes"], trunk["embedding_width"]) == (EMBEDDINGS, None, WIDTH)
    assert (student["gives"], student["classes"], student["embedding_width"]) == ("labels", 4, None)
    assert (trunk["views"], trunk["views_per_image"], trunk["batch"], trunk["rounds"]) == ("1", 1, 2, 1)
    assert trunk["verdict"] == "equal" and trunk["parity"]["about"] == "neighbours"
    measured = {phase for phase, values in trunk["phases_ms_per_image"].items() if values}
    assert measured == {"read", "decode", "canvas", "engine", "record+write"}
    for quantity in ("images_per_s", "views_per_s", "ideal_images_per_s", "share_of_ideal", "peak_mb"):
        assert trunk[quantity]["min"] > 0, quantity
    assert trunk["share_of_limit"] > 0 and trunk["load_by_others"]["min"] >= 0
    assert 0 < trunk["error_rate"] < 0.5, "a file that is no image is an input that fails"


def test_the_trace_is_of_what_labels_and_the_trunk_says_why_it_has_none(run: Run) -> None:
    events = json.loads((run.out / "trace.json").read_text())["traceEvents"]
    shown = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert shown == ["student, onnx-fp32, batch 2"]
    trunk, student = run.record["rows"].values()
    assert any("no trace" in mark for mark in trunk["marks"])
    assert not any("no trace" in mark for mark in student["marks"])


def test_the_terminal_says_what_each_model_gives(run: Run) -> None:
    said = " ".join(run.stdout.split())
    assert "trunk: embeddings of 96 numbers, the whole image" in said
    assert "student: 4 classes, views 1 (1 an image)" in said
    assert "from files to tables, of a trunk from files to written embeddings" in said


# Rows.


def test_a_trunk_and_its_bundle_have_rows(trunk: Path, learned: Path) -> None:
    rows = rows_of(BenchJob(models=(str(trunk), str(learned)), runtimes=("onnx", "torch")))
    assert [made.engine for made in rows] == ["onnx-fp32", "torch-fp32"] * 2
    assert not any(made.why for made in rows)
    assert {made.gives for made in rows} == {EMBEDDINGS}
    every = rows_of(BenchJob(models=(str(trunk),), runtimes=("all",)))
    assert [made.engine for made in every] == ["onnx-fp32"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"views": "1+3x3"}, "--views 1+3x3 for"), ({"classes": "cat, dog, bird, boat"}, "--classes for")],
)
def test_what_only_labels_have_is_refused_and_the_others_go_on(
    asked: dict[str, Any], said: str, trunk: Path
) -> None:
    refused, other = rows_of(
        BenchJob(models=(str(trunk), "tiny"), runtimes=("onnx",), **{"classes": None, **asked})
    )
    assert said in refused.why and refused.gives == EMBEDDINGS and refused.fix
    assert not other.why


def test_embeddings_have_one_stream(trunk: Path, student: Path) -> None:
    rows = rows_of(BenchJob(models=(str(trunk), str(student)), runtimes=("onnx",), streams=(1, 2)))
    assert [bool(made.why) for made in rows] == [False, True, False, False]
    assert "--streams 2 for trunk" in rows[1].why and "one batch at a time" in rows[1].why


# From files to embeddings.


def test_the_original_is_measured_as_its_bundle_is(learned: Path, photos: Path) -> None:
    found = measure_whole(plan_of(learned, "torch"), photos, 2, 1, count=8)
    assert (found["images"], found["inputs"], found["failed"]) == (8, 8, 0)
    assert found["images_per_s"] == pytest.approx(8 / found["seconds"])


def test_what_is_written_are_the_engines_embeddings(trunk: Path, photos: Path, tmp_path: Path) -> None:
    plan = plan_of(trunk, "onnx")
    found = embed_folder(plan, photos, tmp_path / "embeddings", 4)
    assert (found["images"], found["inputs"], found["failed"]) == (24, 24, 0)
    written = read_embeddings(tmp_path / "embeddings")
    with load_plan(plan) as tagger:
        pictures = [decode_image(read_image(ImageRef(p, p)), **tagger.room) for p in written.paths[:4]]
        wanted = tagger.score(pictures)[EMBEDDINGS]
    assert wanted.std(axis=0).max() > 0.01, "embeddings alike would prove nothing"
    np.testing.assert_allclose(written.features_ND[:4], wanted, atol=1e-3)


def test_without_one_image_there_is_no_number(trunk: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="could be embedded"):
        measure_whole(plan_of(trunk, "onnx"), tmp_path, 2, 1, count=4)


def test_an_installation_without_a_writer_of_embeddings_says_so(
    trunk: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_embeddings, "entry_points", lambda **_: ())
    with pytest.raises(EnvironmentError_, match="names nothing that writes embeddings"):
        measure_whole(plan_of(trunk, "onnx"), photos, 2, 1, count=4)


# Words, from rounds that are made up.


def a_trunk(*rates: float, **fields: Any) -> Any:
    found = phases(parity={**phases()["parity"], "about": "neighbours"}, views_shown="1")
    found["facts"] |= {"classes": None, "embedding_width": WIDTH, "views": 1}
    return row(rates, model="trunk", gives=EMBEDDINGS, phases=[found] * len(rates), **fields)


def told(made: dict[str, Any]) -> str:
    """All that a terminal, a page and a spreadsheet say of a record."""
    console = Console(file=io.StringIO(), width=200)
    show(made, compare(made, made), console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    return " ".join(f"{printed} {page(made, {}, compare(made, made)).decode()}".split())


def test_nothing_says_labels_of_a_trunk() -> None:
    made = bench_record(result(a_trunk(20.0, 40.0)), "cliplet bench trunk")
    said = told(made)
    assert "label" not in said and "classes" not in said and "scores" not in said
    assert "How fast trunk embeds" in said and "images a second of embedding" in said
    assert (
        "cutting the image, encoder, and scaling to length 1, which are one graph and so have one number"
        in said
    )
    assert "equal neighbours" in said
    assert "rounds of embedding differ by 67%" in said
    assert [d.quantity for d in compare(made, made).differences] == ["embedding", "the engine alone"]
    (line,) = csv.DictReader(io.StringIO(as_csv(made).decode()))
    assert (line["gives"], line["classes"], line["embedding_width"]) == (EMBEDDINGS, "", "96")


def test_both_are_said_where_there_are_both() -> None:
    made = bench_record(result(row(), a_trunk(30.0, 30.0)), "cliplet bench tiny trunk")
    said = told(made)
    assert "How fast tiny, trunk labels or embeds" in said
    assert "equal labels or neighbours" in said
    assert "tiny: 3 classes, views 1+3x3 (10 an image)" in said
    assert list(plots(made)) in (["latency.png", "ratio.png"], [])


def test_a_record_of_before_there_were_trunks_is_compared() -> None:
    new = bench_record(result(row()), "cliplet bench tiny")
    old = json.loads(json.dumps(new))
    del old["rows"]["tiny, onnx-fp32, batch 2"]["gives"]
    assert compare(new, old).differences[0].quantity == "labelling"
