"""perf_analyzer is asked as its version 2.60 wants to be asked, and its report is read as that version writes it."""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from running import is_alive, quick, repository_of, within
from served import make_student

from benchmarks.perf_analyzer import NOT_INSTALLED, Load, find, input_data, measure, read_report
from benchmarks.serve import parse
from cliplet.deploy.server import TritonServer
from cliplet.errors import DataError, EnvironmentError_
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world

VERSION = "Perf Analyzer Version 0.0.0 (commit 3a49a23)"
# What version 2.60.0 wrote of a small model; lines go by throughput, not by clients.
REPORT = """\
Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,\
Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency
4,307.989,6,1041,922,78,10494,353,2,12448,14205,15251,19201
3,310.066,6,1041,885,59,10648,314,2,11978,15243,16775,31386
"""
# Does what the real one does, for one request a line of its data: takes each tensor's bytes as they are, and stops with
# 99 at the first error.
STAND_IN = """\
    import argparse, base64, json, sys
    from pathlib import Path
    if sys.argv[1:] == ["--version"]:
        sys.exit(f"{VERSION}\\n")
    parser = argparse.ArgumentParser()
    for name in "-m -i -u -f -H --input-data --concurrency-range --max-trials --stability-percentage".split():
        parser.add_argument(name)
    parser.add_argument("--measurement-interval", type=int)
    parser.add_argument("--shared-memory", choices=["none", "system", "cuda"])
    asked = parser.parse_args()
    assert asked.i == "grpc" and asked.max_trials == "3" and asked.stability_percentage == "999", sys.argv
    assert asked.concurrency_range == "3:4:1" and asked.measurement_interval == 278, sys.argv
    from tritonclient.grpc import InferInput, InferenceServerClient
    from tritonclient.utils import InferenceServerException
    headers = dict([asked.H.split(":")]) if asked.H else {}
    with InferenceServerClient(asked.u) as client:
        try:
            if asked.shared_memory:
                client.unregister_system_shared_memory(headers=headers)
            for request in json.loads(Path(asked.input_data).read_text())["data"]:
                (name, tensor), = request.items()
                sent = InferInput(name, [1, *tensor["shape"]], "BYTES")
                sent._raw_content = base64.b64decode(tensor["content"]["b64"])
                assert client.infer(asked.m, [sent]).as_numpy("record") is not None
        except InferenceServerException as error:
            print(f"error: {error.message()}\\n", file=sys.stderr)
            sys.exit(99)
    Path(asked.f).write_text(REPORT)
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a served student."""
    folder = tmp_path_factory.mktemp("served")
    repository = repository_of(folder / "repository", student=make_student(folder / "student"))
    with TritonServer(repository, quick()) as server:
        server.wait_ready()
        yield f"triton://127.0.0.1:{server.ports.grpc}/student"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(scene_world("test-seen", seed=1), tmp_path_factory.mktemp("scenes"), 3).images


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., str]:
    """Makes a program of Python's lines."""

    def made(lines: str, name: str = "perf_analyzer") -> str:
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        head = f"#!{sys.executable}\nVERSION, REPORT = {VERSION!r}, {REPORT!r}\n"
        file.write_text(head + textwrap.dedent(lines))
        file.chmod(0o755)
        return str(file)

    return made


# Whether it is there


def test_it_is_found_on_the_path(program: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(STAND_IN)
    monkeypatch.setenv("PATH", str(Path(made).parent), prepend=os.pathsep)
    assert find() == (made, VERSION)


def test_where_it_is_not_installed_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    options = parse([])
    assert (options.perf_analyzer, options.perf_analyzer_is) == (None, NOT_INSTALLED)
    assert capsys.readouterr().out == f"perf_analyzer: {NOT_INSTALLED}\n"


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        # The launcher of the package, on a system that is too old: it ends with 0.
        (
            'print("/opt/x/bin/perf_analyzer: /lib/libc.so.6: version `GLIBC_2.38\' not found")',
            "cannot run: perf_analyzer: libc.so.6: version `GLIBC_2.38' not found",
        ),
        ("raise SystemExit(3)", "cannot run: --version says nothing and ends with 3"),
        ("print('placeholder 0.1.0')", "cannot run: placeholder 0.1.0"),
    ],
)
def test_one_that_cannot_run_says_why(
    lines: str, why: str, program: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    made = program(lines)
    assert find(made) == (None, why)
    with pytest.raises(SystemExit) as ended:
        parse(["--perf-analyzer", made])
    assert ended.value.code == 2 and why in capsys.readouterr().err


def test_a_file_that_is_no_program_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "perf_analyzer").write_bytes(b"\x7fELF")
    (tmp_path / "perf_analyzer").chmod(0o755)
    assert find(str(tmp_path / "perf_analyzer")) == (None, "cannot run: perf_analyzer: Exec format error")


# What it is asked, and what it answers


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_has_the_columns_of_our_own(
    shared: bool, program: Callable[..., str], url: str, images: Path
) -> None:
    found = measure(program(STAND_IN), Load(url, images, clients=4, seconds=1.0, shared_memory=shared))
    # Three requests of one image each, and the one that is sent to begin with.
    assert found.pop("server") == {
        "tagger": {"images_per_batch": 1.0, "queue_ms": 0.922, "compute_ms": pytest.approx(10.925)}
    }
    assert found == {
        "seconds": 1.0,
        "failed": {},
        "images_per_s": 307.989,
        "p50_ms": 12.448,
        "p90_ms": 14.205,
        "p95_ms": 15.251,
        "p99_ms": 19.201,
    }


def test_a_run_that_fails_says_the_error(program: Callable[..., str], url: str, tmp_path: Path) -> None:
    photos = write_scenes(scene_world("test-seen", seed=1), tmp_path / "scenes", 1).images
    (photos / "z.jpg").write_bytes(b"no image at all")
    with pytest.raises(
        EnvironmentError_, match="without a report: error: .*not an image that can be decoded"
    ):
        measure(program(STAND_IN), Load(url, photos, clients=4, seconds=1.0))


def test_a_run_without_a_report_says_why(program: Callable[..., str], url: str, images: Path) -> None:
    lines = "import sys\nprint('reading')\nprint('error: failed to get model')\nprint('bye')\nsys.exit(99)"
    with pytest.raises(EnvironmentError_, match="ended with 99 and without a report: error: failed to get"):
        measure(program(lines), Load(url, images, clients=4, seconds=1.0))


def test_a_run_that_does_not_end_is_ended_with_all_that_it_started(
    program: Callable[..., str], url: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.perf_analyzer.PATIENCE_S", 10)
    note = tmp_path / "pid"
    lines = (
        "import subprocess\nfrom pathlib import Path\nchild = subprocess.Popen(['sleep', '600'])\n"
        f"Path({str(note)!r}).write_text(str(child.pid))\nchild.wait()"
    )
    with pytest.raises(EnvironmentError_, match="did not end within"):
        measure(program(lines), Load(url, images, clients=4, seconds=0.5))
    pid = int(note.read_text())
    assert within(60, lambda: not is_alive(pid))


def test_its_data_are_tensors_with_lengths() -> None:
    ((name, tensor),) = input_data([{"image": np.array([[b"\xff\xd8abc"]], object)}])["data"][0].items()
    assert (name, tensor["shape"]) == ("image", [1])
    data = base64.b64decode(tensor["content"]["b64"])
    assert struct.unpack("<I", data[:4]) == (5,) and data[4:] == b"\xff\xd8abc"
    assert json.loads(json.dumps(tensor)) == tensor


def test_the_line_of_the_level_is_read() -> None:
    assert read_report(REPORT, 3)["images_per_s"] == 310.066
    assert read_report(REPORT, 4)["queue_ms"] == 0.922


@pytest.mark.parametrize(
    ("text", "clients"),
    [("", 4), (REPORT, 5), (REPORT.replace("p99", "p98"), 4), (REPORT.replace(",922,", ",,"), 4)],
    ids=["empty", "no such level", "no such column", "no number"],
)
def test_another_report_is_refused(text: str, clients: int) -> None:
    with pytest.raises(DataError, match="perf_analyzer's report"):
        read_report(text, clients)
