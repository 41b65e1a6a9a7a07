"""`cliplet bench triton://…` against a real server, beside the bundle that it serves, and when it goes away."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import Cli
from running import TOKEN, quick, repository_of
from served import make_student

from cliplet.deploy.bench import run_bench
from cliplet.deploy.bench_compare import hold_objectives
from cliplet.deploy.bench_rows import BenchJob
from cliplet.deploy.bench_summary import bench_record
from cliplet.deploy.server import TritonServer
from cliplet.errors import ObjectiveError
from cliplet.triton_program import server_folder

pytestmark = pytest.mark.skipif(not server_folder().is_dir(), reason="the embedded server is not installed")


@dataclass(frozen=True)
class Site:
    """A student's bundle, and the server that has it and asks for TOKEN."""

    bundle: Path
    server: TritonServer

    @property
    def model(self) -> str:
        return f"triton://127.0.0.1:{self.server.ports.grpc}/student"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    bundle = make_student(tmp_path / "student")
    with TritonServer(repository_of(tmp_path / "repository", student=bundle), quick(token=TOKEN)) as server:
        server.wait_ready()
        yield Site(bundle, server)


def test_a_served_model_is_measured_beside_its_bundle(site: Site, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("bench", site.model, site.bundle, "--runtime", "onnx", "--batch-size", "2", "--limit", "6")
    rounds = ("--rounds", "1", "--seconds", "0.2")
    done = cli(*words, *rounds, "--out", out, CLIPLET_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    served, local = json.loads((out / "bench.json").read_text())["rows"].values()
    assert (served["model"], served["engine"], served["streams"]) == (site.model, "triton-fp32", None)
    assert (served["views"], served["classes"], served["error_rate"]) == (local["views"], 4, 0)
    for row in (served, local):
        assert row["images_per_s"]["min"] > 0 and row["latency_ms"]["p99"] > 0
    assert served["share_of_limit"] is None, "the server may be another machine, with other limits"


def test_a_token_is_missed_with_the_variable_that_holds_it(site: Site, cli: Cli) -> None:
    refused = cli("bench", site.model, "--limit", "2", CLIPLET_TOKEN="another")
    assert refused.returncode == 1 and "nothing could be measured" in refused.stderr, refused.stderr
    assert "CLIPLET_TOKEN" in refused.stderr
    missed = cli("bench", site.model, "--limit", "2", "--min-throughput", "1", CLIPLET_TOKEN="another")
    assert missed.returncode == 4 and "not measured" in missed.stderr, missed.stderr
    asked = cli("bench", "--help").stdout
    assert "$CLIPLET_TOKEN" in asked and "$CLIPLET_CA" in asked


def test_a_server_that_goes_away_between_two_rounds_keeps_what_was_measured(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPLET_TOKEN", TOKEN)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        # The last row of round 1 is the first of round 2, and the server's comes after it.
        if line.startswith("round 1 of 2: student"):
            os.kill(site.server.pid, signal.SIGKILL)

    job = BenchJob(
        models=(site.model, str(site.bundle)),
        runtimes=("onnx",),
        batch_sizes=(2,),
        limit=6,
        seconds=0.2,
        rounds=2,
    )
    found = run_bench(job, say)
    served, local = found.rows
    assert (len(served.wholes), len(local.wholes)) == (1, 2)
    assert served.why.startswith(f"{site.model} does not answer") and served.broken == 1 and not local.why
    assert said[-1].startswith(f"round 2 of 2: {served.name}: {site.model} does not answer")
    made = bench_record(found, "cliplet bench")
    row = made["rows"][served.name]
    assert row["rounds"] == 1 and row["error_rate"] == 0.5
    assert any(mark.startswith("stopped after round 1: ") for mark in row["marks"])
    with pytest.raises(ObjectiveError, match="50.0% failed"):
        hold_objectives(made, None, None, 0.1)
