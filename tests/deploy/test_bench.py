"""`cliplet bench`: every row is measured, refused or explained; nothing that was measured is lost."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bench_found import phases, result, row, whole
from browser import open_chromium
from click.testing import CliRunner, Result
from helpers import Cli

from cliplet.artifact import Bundle, BundleJob
from cliplet.deploy import bench as running
from cliplet.deploy import bench_compare
from cliplet.deploy.bench import BenchResult, run_bench
from cliplet.deploy.bench_commands import bench
from cliplet.deploy.bench_compare import compare
from cliplet.deploy.bench_page import page
from cliplet.deploy.bench_plots import plots
from cliplet.deploy.bench_rows import BenchJob, rows_of
from cliplet.deploy.bench_summary import bench_record
from cliplet.deploy.bench_worker import hold_verdict
from cliplet.errors import DataError, UsageError
from cliplet.plan import TaggerSettings, make_plan

LITTLE = ("--seconds", "0.1", "--views", "1+2x2", "--limit", "6")


@pytest.fixture(scope="module")
def bundle(toy_clip: Path) -> Bundle:
    """A bundle of the toy CLIP with one engine."""
    from cliplet.export.bundle import cached_bundle

    plan = make_plan(
        TaggerSettings(model=f"open_clip:local-dir:{toy_clip}", classes="cat, dog", runtime="onnx")
    )
    return cached_bundle(BundleJob(plan.spec, plan.vocabulary, plan.aggregation, plan.calibrated))


class Run(NamedTuple):
    """How a call of the command ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str
    out: Path
    record: dict[str, Any]


@pytest.fixture(scope="module")
def run(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two rounds of a row and of one that cannot be had, with an objective that nothing meets."""
    out = tmp_path_factory.mktemp("bench") / "out"
    command = [
        *(sys.executable, "-m", "cliplet.cli", "bench", str(bundle.folder), "--runtime", "onnx,tensorrt"),
        *(
            "--batch-size",
            "2",
            "--rounds",
            "2",
            *LITTLE,
            "--out",
            str(out),
            "--trace",
            str(out / "trace.json"),
        ),
        *("--slo-p99-ms", "0.000001"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (out / "bench.json").exists(), done.stderr
    return Run(done.returncode, done.stdout, done.stderr, out, json.loads((out / "bench.json").read_text()))


def names(bundle: Bundle, *engines: str) -> list[str]:
    return [f"{bundle.folder.name}, {engine}" for engine in engines]


def test_every_row_has_all_its_numbers(run: Run, bundle: Bundle) -> None:
    rows = run.record["rows"]
    assert list(rows) == names(bundle, "onnx-fp32, batch 2", "tensorrt-fp32, batch 2")
    made, refused = rows.values()
    assert (made["batch"], made["views"], made["views_per_image"], made["rounds"]) == (2, "1+2x2", 5, 2)
    assert made["precision_read"] == "fp32" and made["verdict"] == "equal" and made["parity"]["passed"]
    latency = made["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p95"] <= latency["p99"]
    measured = {phase for phase, values in made["phases_ms_per_image"].items() if values}
    assert measured == {"read", "decode", "canvas", "engine", "record+write"}
    for quantity in ("images_per_s", "views_per_s", "ideal_images_per_s", "share_of_ideal", "peak_mb"):
        assert made[quantity]["min"] > 0 and len(made[quantity]["all"]) == 2, quantity
    assert made["share_of_limit"] > 0 and made["limit"]["by"] in ("arithmetic", "memory")
    assert made["error_rate"] == 0 and made["load_by_others"]["min"] >= 0
    assert "--runtime tensorrt with --device cpu" in refused["why"]


def test_a_missed_objective_ends_with_4_after_all_was_written(run: Run) -> None:
    assert run.code == 4, run.stderr
    assert "error:" in run.stderr and "p99" in run.stderr and "at most 1e-06 ms" in run.stderr
    assert "tensorrt-fp32, batch 2: not measured" in run.stderr
    assert {"bench.json", "bench.csv", "report.html", "trace.json"} <= {
        file.name for file in run.out.iterdir()
    }


def test_the_terminal_names_rows_limits_and_reasons(run: Run) -> None:
    assert "onnx-fp32" in run.stdout and "limits of this machine" in run.stdout
    assert "--runtime tensorrt with --device cpu" in " ".join(run.stdout.split())
    assert "round 2 of 2" in run.stderr


def test_the_record_names_no_folder_of_this_machine(run: Run, bundle: Bundle) -> None:
    assert run.record["command"].startswith(f"cliplet bench {bundle.folder.name} --runtime onnx,tensorrt")
    assert str(bundle.folder.parent) not in json.dumps(run.record)


def test_the_csv_agrees_with_the_record(run: Run) -> None:
    lines = {line["row"]: line for line in csv.DictReader((run.out / "bench.csv").open())}
    assert list(lines) == list(run.record["rows"])
    for name, made in run.record["rows"].items():
        if "images_per_s" in made:
            assert float(lines[name]["images_per_s_median"]) == made["images_per_s"]["median"]


def test_the_trace_has_a_process_for_each_row_that_ran(run: Run, bundle: Bundle) -> None:
    events = json.loads((run.out / "trace.json").read_text())["traceEvents"]
    shown = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert shown == names(bundle, "onnx-fp32, batch 2")


def test_the_trace_shows_what_the_threads_of_label_do(run: Run) -> None:
    events = json.loads((run.out / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {"decode", "engine", "write"} <= {event["name"] for event in spans}
    decoders = {event["tid"] for event in spans if event["name"] == "decode"}
    engines = {event["tid"] for event in spans if event["name"] == "engine"}
    assert decoders and engines and not decoders & engines


def test_a_second_run_compares_itself_and_never_overwrites(
    run: Run, bundle: Bundle, cli: Cli, tmp_path: Path
) -> None:
    refused = cli("bench", bundle.folder, "--out", run.out)
    assert refused.returncode == 2 and "holds a benchmark already" in refused.stderr
    earlier = run.out / "bench.json"
    done = cli(
        *("bench", bundle.folder, "--runtime", "all", "--batch-size", "2", "--streams", "1,2"),
        *("--rounds", "1", *LITTLE),
        *("--compare", earlier, "--out", tmp_path / "new"),
    )
    assert done.returncode == 0, done.stderr
    assert "against the earlier record" in done.stdout and "one round: no telling" in done.stdout
    made = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert list(made["rows"]) == names(bundle, "onnx-fp32, batch 2", "onnx-fp32, batch 2, streams 2"), (
        "all: every engine that the bundle holds"
    )
    assert [row["streams"] for row in made["rows"].values()] == [1, 2]


def test_when_nothing_can_be_measured_the_exit_code_is_1(bundle: Bundle, cli: Cli) -> None:
    done = cli("bench", bundle.folder, "--runtime", "tensorrt", "--limit", "2")
    assert done.returncode == 1
    assert "nothing could be measured" in done.stderr and "fix: --device cuda" in done.stderr


def test_an_interrupted_run_keeps_what_was_measured(bundle: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cliplet.cli", "bench", str(bundle.folder), "--runtime", "onnx"]
    command += [*LITTLE, "--rounds", "500", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round 1 of 500"):
            process.send_signal(signal.SIGINT)
            break
    assert process.wait(60) == 130
    made = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert made["interrupted"]
    assert 1 <= made["rows"][names(bundle, "onnx-fp32")[0]]["rounds"] < 500
    assert "was interrupted" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--runtime", "onnxx"), "--runtime onnxx"),
        (("--precision", "fp31"), "--precision fp31"),
        (("--batch-size", "1,x"), "not a list of whole numbers"),
        (("--batch-size", "-1"), "--batch-size -1"),
        (("--streams", "0"), "--streams 0"),
        (("--seconds", "0"), "--seconds 0"),
        (("--rounds", "0"), "--rounds 0"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, str], said: str, cli: Cli) -> None:
    done = cli("bench", "tiny", *arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_a_file_that_is_no_record_cannot_be_compared(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"name": "engines"}')
    done = cli("bench", "tiny", "--compare", tmp_path / "old.json")
    assert done.returncode == 1 and "no record 'bench'" in done.stderr


@pytest.mark.parametrize(
    ("old", "said"),
    [
        ({}, "cannot be compared with: it has no rows"),
        (
            {"rows": {"tiny, torch-fp32": {"images_per_s": {"all": [1.0]}}}},
            "no row can be compared: the earlier record measured tiny, torch-fp32",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_measured(
    old: dict[str, Any], said: str, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"name": "bench", **old}))
    done = cli(
        "bench", "tiny", "--runtime", "onnx", "--compare", tmp_path / "old.json", "--out", tmp_path / "out"
    )
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert "limits" not in done.stderr and not (tmp_path / "out").exists()


# Rows and verdicts.


def test_all_is_every_engine_that_can_be_had(bundle: Bundle) -> None:
    def engines(**fields: Any) -> list[str]:
        return [made.engine for made in rows_of(BenchJob(**fields))]

    assert engines(models=(str(bundle.folder),), runtimes=("all",)) == ["onnx-fp32"]
    assert "onnx-fp16" in engines(models=("tiny",), runtimes=("onnx",), precisions=("all",))
    assert not [
        name for name in engines(models=("tiny",), runtimes=("all",)) if "int8" in name or "tensorrt" in name
    ]
    assert engines(models=("tiny", "tiny"), runtimes=("onnx", "torch")) == ["onnx-fp32", "torch-fp32"]


def test_a_model_that_is_none_has_a_row_that_says_so(tmp_path: Path) -> None:
    (first, second) = rows_of(BenchJob(models=(str(tmp_path), "tiny"), runtimes=("onnx",)))
    assert "neither a bundle nor a classifier" in first.why and not second.why


@pytest.mark.parametrize(
    ("models", "called"),
    [
        (("/first/bundle", "/second/bundle", "/third"), ["first/bundle", "second/bundle", "third"]),
        (("/a/x/bundle", "/b/x/bundle"), ["x/bundle", "x/bundle #2"]),
        (("out/bundle", "/far/out/bundle"), ["out/bundle", "bundle"]),
        (
            ("open_clip:local-dir:/first/clip", "open_clip:local-dir:/second/clip"),
            ["open_clip:local-dir:first/clip", "open_clip:local-dir:second/clip"],
        ),
    ],
)
def test_models_that_end_alike_are_told_apart(models: tuple[str, ...], called: list[str]) -> None:
    rows = rows_of(BenchJob(models=models, runtimes=("onnx",)))
    assert [made.model for made in rows] == called
    assert len({made.name for made in rows}) == len(models)
    made = bench_record(BenchResult(BenchJob(models=models), tuple(rows), {}, "", False), "")
    assert list(made["rows"]) == [row.name for row in rows], "none overwrites another"


def test_two_bundles_of_one_name_are_both_measured(
    told: Callable[[str], None], bundle: Bundle, tmp_path: Path
) -> None:
    told("")
    models = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        models.append(str(shutil.copytree(bundle.folder, tmp_path / name / "copy")))
    made = measured(models=tuple(models), runtimes=("onnx",), rounds=1)
    record = bench_record(made, "")
    assert list(record["rows"]) == ["first/copy, onnx-fp32", "second/copy, onnx-fp32"]
    assert all("images_per_s" in row for row in record["rows"].values())
    assert [row["model"] for row in record["rows"].values()] == ["first/copy", "second/copy"]


def test_a_row_that_is_asked_for_twice_is_measured_once(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "same").symlink_to(bundle.folder)
    models = (str(bundle.folder), f"{bundle.folder}/", str(tmp_path / "same"))
    said: list[str] = []
    (only,) = rows_of(BenchJob(models=models, runtimes=("auto", "onnx")), said.append)
    assert only.name == f"{bundle.folder.name}, onnx-fp32"
    assert said == [f"{only.name}: asked for twice, since auto is onnx here; it is measured once"]


def test_no_number_without_a_verdict(bundle: Bundle, tmp_path: Path) -> None:
    plan = make_plan(TaggerSettings(model=str(bundle.folder), runtime="onnx"))
    assert (hold_verdict(plan, False) or {})["passed"]
    for parity, said in (({}, "disagrees"), ({"passed": False, "breaches": ["far off"]}, "far off")):
        assert plan.engine is not None
        plan.engine.parity.clear()  # type: ignore[attr-defined]
        plan.engine.parity.update(parity)  # type: ignore[attr-defined]
        with pytest.raises(UsageError, match=said):
            hold_verdict(plan, False)
        assert hold_verdict(plan, True) == parity
    eager = make_plan(TaggerSettings(model="tiny", runtime="torch"))
    assert (hold_verdict(eager, False) or {})["against"] == "itself"
    lower = make_plan(TaggerSettings(model="tiny", runtime="torch", precision="bf16"))
    with pytest.raises(UsageError, match="no parity verdict"):
        hold_verdict(lower, False)
    assert hold_verdict(lower, True) is None


# Workers that are told what to find.


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Sets what workers do with a `task` of a `name` in the n-th of `calls`; they write their names to `calls`."""

    def set_work(body: str) -> None:
        script = tmp_path / "worker.py"
        found = json.dumps({"phases": phases(), "whole": whole(), "limits": LIMITS_FOUND})
        script.write_text(
            "import json, os, signal, sys\n"
            "task = json.loads(sys.stdin.read())\n"
            f"log = {str(tmp_path / 'calls')!r}\n"
            "name = ' '.join([task['part'], *([task['settings']['runtime']] if 'settings' in task else [])])\n"
            "open(log, 'a').write(name + '\\n')\n"
            "calls = open(log).read().splitlines().count(name)\n"
            f"found = json.loads({found!r})[task['part']]\n"
            f"{body}\n"
            "print(json.dumps(found))\n"
        )
        monkeypatch.setattr(running, "WORKER", (sys.executable, str(script)))

    return set_work


LIMITS_FOUND = {"by": "torch", "gop_per_s": {"fp32": 9.0}, "gb_per_s": 9.0, "notes": [], "disturbed": False}


def measured(**fields: Any) -> BenchResult:
    return run_bench(BenchJob(limit=2, **{"models": ("tiny",), "runtimes": ("onnx", "torch"), **fields}))


def test_rows_take_turns_forwards_and_backwards(told: Callable[[str], None], tmp_path: Path) -> None:
    told("")
    assert [len(made.phases) for made in measured(rounds=2).rows] == [2, 2]
    calls = (tmp_path / "calls").read_text().splitlines()
    there, back = ["phases onnx", "whole onnx"], ["phases torch", "whole torch"]
    assert calls == ["limits", *there, *back, "limits", *back, *there]


@pytest.mark.parametrize(
    ("body", "why", "rounds"),
    [
        ("if name == 'phases onnx': found = {'why': 'not installed'}", "not installed", 0),
        ("if name == 'whole onnx' and calls == 2: found = {'why': 'the server went away'}", "went away", 1),
        ("if name == 'phases onnx': os.kill(os.getpid(), signal.SIGKILL)", "no memory was left", 0),
        ("if name == 'phases onnx' and calls == 2: sys.exit(3)", "exit code 3", 1),
    ],
)
def test_a_row_that_breaks_says_why_and_the_rest_goes_on(
    body: str, why: str, rounds: int, told: Callable[[str], None]
) -> None:
    told(body)
    broken, other = measured(rounds=3).rows
    assert why in broken.why and len(broken.phases) == rounds
    assert broken.broken == (1 if rounds else 0)
    assert len(other.phases) == 3 and not other.why


def compared(folder: Path, *runtimes: str) -> Result:
    """A run of the command with workers that are told what to find, compared with a record of tiny on onnx."""
    old = {"name": "bench", "rows": {"tiny, onnx-fp32": {"images_per_s": {"all": [1.0]}}}}
    (folder / "old.json").write_text(json.dumps(old))
    options = ["tiny", "--runtime", ",".join(runtimes), "--rounds", "1", "--limit", "2"]
    return CliRunner().invoke(
        bench, [*options, "--out", str(folder / "out"), "--compare", str(folder / "old.json")]
    )


def test_what_was_measured_is_written_before_it_is_compared(
    told: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told("")

    def fail(*_: object) -> None:
        raise DataError("it fails", "", "")

    monkeypatch.setattr(bench_compare, "compare", fail)
    assert isinstance(compared(tmp_path, "onnx").exception, DataError)
    assert {"bench.json", "bench.csv", "report.html"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_a_row_to_compare_with_that_breaks_is_an_error_after_all_was_written(
    told: Callable[[str], None], tmp_path: Path
) -> None:
    told("if name == 'phases onnx': found = {'why': 'out of luck'}")
    done = compared(tmp_path, "onnx", "torch")
    assert isinstance(done.exception, DataError) and "no row can be compared" in str(done.exception)
    made = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert made["rows"]["tiny, torch-fp32"]["rounds"] == 1
    assert "no row was measured in both records" in (tmp_path / "out" / "report.html").read_text()


def test_limits_are_the_best_of_all_rounds(told: Callable[[str], None]) -> None:
    told("if name == 'limits': found['gop_per_s']['fp32'] *= calls; found['disturbed'] = calls == 1")
    found = measured(rounds=3).limits
    assert found["gop_per_s"]["fp32"] == 27 and not found["disturbed"]


def test_images_that_cannot_be_decoded_stay_in_the_count(
    told: Callable[[str], None], tmp_path: Path, photos: Path
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    told("found = dict(found, files=sorted(os.listdir(task['images']))) if 'images' in task else found")
    made = measured(rounds=1, runtimes=("onnx",), images=(str(tmp_path / "bad.jpg"), str(photos)))
    assert made.images == "2 images of bad.jpg, " + photos.name
    assert made.rows[0].wholes[0]["files"] == ["000000.jpg", "000001.jpg"]


# The page.

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_chromium() as browser:
        yield browser


def a_page(folder: Path) -> Path:
    """A page with everything on it, of a model with a hostile name."""
    found = result(
        row((30.0, 33.0), model=HOSTILE),
        row((60.0, 66.0), "openvino", HOSTILE),
        row((), "tensorrt", HOSTILE, why=f"no {HOSTILE}"),
        images=f"64 images of {HOSTILE}",
    )
    made = bench_record(found, f"cliplet bench '{HOSTILE}' <!-- cliplet: body -->")
    file = folder / "report.html"
    file.write_bytes(page(made, plots(made), compare(made, made)))
    return file


@pytest.mark.browser
def test_the_page_opens_offline_and_names_are_only_text(chromium: Any, tmp_path: Path) -> None:
    file = a_page(tmp_path)
    context = chromium.new_context(offline=True, viewport={"width": 1300, "height": 900})
    opened = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("dialog", lambda dialog: complaints.append(dialog.message))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(file.as_uri())
    text = opened.locator("body").inner_text()
    assert not complaints and all(url.startswith(("file:", "data:")) for url in requests)
    assert opened.locator("script").count() == 0
    assert f"How fast {HOSTILE} labels" in text and f"no {HOSTILE}" in text
    assert f"64 images of {HOSTILE}" in text
    assert "<!-- cliplet: body -->" in text, "the command is text, too"
    widths = opened.locator("figure img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(widths) == 2 and all(widths)
    assert opened.locator("tbody tr", has_text="onnx-fp32").first.inner_text().split("\t")[:4] == [
        *("onnx-fp32", "fp32", "2", "31.5")
    ]
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.set_viewport_size({"width": 420, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "on a telephone, too"
    context.close()


def test_the_page_without_plots_says_so() -> None:
    made = bench_record(result(row()), "cliplet bench tiny")
    assert "matplotlib is not installed" in page(made, {}, None).decode()
