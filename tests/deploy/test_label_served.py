"""`cliplet label --model triton://…`: the rows of the local bundle, whatever becomes of the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Cli, picture
from PIL import Image
from running import hang_while, quick
from served import make_student, make_teacher

from cliplet.deploy import label as labelling
from cliplet.deploy.label_scoring import FileScoring
from cliplet.deploy.repository import ServeSettings, plan_served, write_repository
from cliplet.deploy.server import TritonServer
from cliplet.deploy.server_options import Ports
from cliplet.errors import EnvironmentError_, ServerError
from cliplet.label_records import LabelRecord
from cliplet.labels import read_errors, read_labels
from cliplet.plan import TaggerSettings
from cliplet.server_address import ConnectionSettings, ServerAddress
from cliplet.triton_program import server_folder
from cliplet.triton_wire import GrpcWire

pytestmark = pytest.mark.skipif(not server_folder().is_dir(), reason="the embedded server is not installed")

# The server takes no larger image; a client that does scores it through the raw graph.
SERVED_PIXELS = 30_000


@dataclass
class Site:
    """Two bundles, and the server that has them, which a test may kill and start again."""

    bundles: dict[str, Path]
    repository: Path
    server: TritonServer
    hang: Path

    def model(self, name: str, *, http: bool = False) -> str:
        ports = self.server.ports
        return str(ServerAddress("127.0.0.1", ports.http if http else ports.grpc, name, http))

    def kill(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.stop()

    def start(self) -> None:
        """Start it at the same ports as before."""
        ports = Ports(http=self.server.ports.http, grpc=self.server.ports.grpc, metrics=0)
        self.server = TritonServer(self.repository, quick(ports=ports))
        self.server.start()
        self.server.wait_ready()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    bundles = {"teacher": make_teacher(folder / "teacher"), "student": make_student(folder / "student")}
    settings = ServeSettings(threads=1, max_pixels=SERVED_PIXELS)
    served, _ = plan_served(list(bundles.items()), settings)
    repository = write_repository(served, folder / "repository", settings)
    hang_while(repository / "student_classifier", folder / "hang")
    found = Site(bundles, repository, TritonServer(repository, quick()), folder / "hang")
    found.server.start()
    try:
        found.server.wait_ready()
        yield found
    finally:
        found.server.stop()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 good images, one of them too large for the server, and five that are none."""
    folder = tmp_path_factory.mktemp("inputs")
    for i in range(22):
        size = (40 + 37 * i % 130, 50 + 53 * i % 120)
        Image.fromarray(picture(*size, seed=i)).save(folder / f"{i:03d}.jpg", quality=90)
    whole = (folder / "000.jpg").read_bytes()
    Image.fromarray(picture(300, 200, seed=99)).save(folder / "large.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"no image at all")
    (folder / "short.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    Image.new("L", (2000, 2000)).save(folder / "bomb.png")
    return folder


def job(model: str, inputs: Path, out: Path, **more: Any) -> labelling.LabelJob:
    names = TaggerSettings.__dataclass_fields__
    tagger = {name: more.pop(name) for name in list(more) if name in names}
    settings = TaggerSettings(model=model, **tagger)
    return labelling.LabelJob(
        sources=(str(inputs),),
        out=out,
        tagger=settings,
        quiet=True,
        **{"max_pixels": 100_000, "batch_size": 4, **more},
    )


def rows(out: Path) -> dict[str, LabelRecord]:
    """All rows by path; a path that has two is an error."""
    found: dict[str, LabelRecord] = {}
    for row in read_labels(out):
        assert row.path not in found
        found[row.path] = row
    return found


def hold_equal(out: Path, expected: Path) -> None:
    found, wanted = rows(out), rows(expected)
    assert sorted(found) == sorted(wanted)
    for path, row in wanted.items():
        other = found[path]
        assert (other.labels, other.width, other.height) == (row.labels, row.width, row.height)
        np.testing.assert_allclose(other.scores, row.scores, atol=1e-3)
    assert read_errors(out) == read_errors(expected)


def local(site: Site, name: str, inputs: Path, out: Path, **more: Any) -> Path:
    """The labels of the bundle itself."""
    labelling.label(job(str(site.bundles[name]), inputs, out, runtime="onnx", **more))
    return out


def before_call(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something just before the n-th inference, while the others wait."""
    infer, lock, calls = GrpcWire.infer, threading.Lock(), iter(range(1, 1 << 30))

    def counted(self: GrpcWire, *given: Any) -> Any:
        with lock:
            if next(calls) == number:
                action()
        return infer(self, *given)

    monkeypatch.setattr(GrpcWire, "infer", counted)


@pytest.mark.parametrize("shared_memory", ["on", "off"])
@pytest.mark.parametrize("http", [False, True])
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_rows_and_errors_are_those_of_the_bundle(
    site: Site, inputs: Path, tmp_path: Path, name: str, http: bool, shared_memory: str
) -> None:
    connection = ConnectionSettings(shared_memory=shared_memory)
    expected = local(site, name, inputs, tmp_path / "local")
    labelling.label(job(site.model(name, http=http), inputs, tmp_path / "out", connection=connection))
    hold_equal(tmp_path / "out", expected)
    reasons = {Path(e.path).name: (e.stage, e.reason) for e in read_errors(tmp_path / "out")}
    assert len(rows(tmp_path / "out")) == 23
    assert reasons["gone.jpg"] == ("read", "No such file or directory")
    assert reasons["empty.jpg"] == ("decode", "zero bytes")
    assert "4,000,000 pixels, at most 100,000" in reasons["bomb.png"][1]


@pytest.mark.parametrize("more", [{"views": "1+2x2"}, {"threshold": 0.05}, {"max_pixels": 9000}])
def test_files_are_sent_whatever_else_was_asked_for(
    site: Site, inputs: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    connection = ConnectionSettings(shared_memory="off", in_flight=3)
    expected = local(site, "teacher", inputs, tmp_path / "local", **more)
    labelling.label(job(site.model("teacher"), inputs, tmp_path / "out", connection=connection, **more))
    hold_equal(tmp_path / "out", expected)


def test_a_run_goes_on_from_the_bundle_to_its_server(site: Site, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = sorted(inputs.glob("0*.jpg"))[:8]
    (tmp_path / "list.txt").write_text("\n".join(map(str, first)))
    listed = tmp_path / "list.txt"
    labelling.label(job(str(site.bundles["student"]), listed, out, runtime="onnx", limit=5))
    for http in (False, True):
        result = labelling.label(job(site.model("student", http=http), listed, out, limit=7 + http))
    assert (result.labelled, result.scored_now) == (8, 1)
    assert len({row.model for row in rows(out).values()}) == 3


def test_few_files_are_on_their_way_at_a_time(
    site: Site, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more are begun than the rows that were taken make room for."""
    now, most, lock, begun = 0, 0, threading.Lock(), 0
    scored = FileScoring._scored

    def counted(self: FileScoring, ref: Any) -> Any:
        nonlocal now, most, begun
        with lock:
            now, begun = now + 1, begun + 1
            most = max(most, now)
        found = scored(self, ref)
        with lock:
            now -= 1
        return found

    monkeypatch.setattr(FileScoring, "_scored", counted)
    connection = ConnectionSettings(shared_memory="off", in_flight=2)
    labelling.label(job(site.model("student"), inputs, tmp_path / "out", connection=connection))
    assert most == 2
    assert begun == 28


@pytest.mark.parametrize("shared_memory", ["on", "off"])
def test_a_server_that_is_killed_and_comes_back_costs_nothing(
    site: Site,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    shared_memory: str,
) -> None:
    expected = local(site, "teacher", inputs, tmp_path / "local")
    came_back = threading.Thread(target=site.start)

    def kill() -> None:
        site.kill()
        came_back.start()

    before_call(3, kill, monkeypatch)
    connection = ConnectionSettings(shared_memory=shared_memory, wait_s=120)
    with caplog.at_level("INFO", "cliplet"):
        result = labelling.label(job(site.model("teacher"), inputs, tmp_path / "out", connection=connection))
    came_back.join()
    assert (result.labelled, result.failed, result.interrupted) == (23, 5, False)
    hold_equal(tmp_path / "out", expected)
    said = " ".join(record.message for record in caplog.records)
    assert "waiting for it, at most 120 s" in said
    assert "answers again after" in said


def test_a_server_that_stays_away_ends_the_run_and_the_same_command_continues(
    site: Site, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = local(site, "teacher", inputs, tmp_path / "local")
    out = tmp_path / "out"
    connection = ConnectionSettings(shared_memory="off", wait_s=0.5, retries=0, in_flight=2)
    again = job(site.model("teacher"), inputs, out, connection=connection)
    with monkeypatch.context() as patch:
        before_call(12, site.kill, patch)
        try:
            with pytest.raises(ServerError, match="does not answer"):
                labelling.label(again)
        finally:
            site.start()
    saved = rows(out)
    assert 4 <= len(saved) < 12
    assert all(Path(e.path).name.partition(".")[0] in ("bomb", "empty", "gone") for e in read_errors(out))
    result = labelling.label(again)
    assert result.scored_now == 23 - len(saved)
    hold_equal(out, expected)
    kept = rows(out)
    assert all(np.array_equal(kept[path].scores, row.scores) for path, row in saved.items())


def test_workers_are_for_what_is_decoded_here(
    site: Site, inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far, here = ConnectionSettings(shared_memory="off"), ConnectionSettings(shared_memory="on")
    labelling.label(job(site.model("student"), inputs, tmp_path / "far", connection=far, workers=2))
    assert "--workers 2 has no effect: triton://" in caplog.text
    caplog.clear()
    result = labelling.label(job(site.model("student"), inputs, tmp_path / "out", connection=here, workers=2))
    assert result.labelled == 23
    # Views that the server does not look at are placed here.
    other = job(site.model("teacher"), inputs, tmp_path / "views", connection=far, workers=2, views="1+2x2")
    assert labelling.label(other).labelled == 23
    assert "--workers" not in caplog.text


def test_ctrl_c_does_not_wait_for_a_server_that_is_away(site: Site, inputs: Path, tmp_path: Path) -> None:
    arguments = [
        "label",
        inputs,
        "--model",
        site.model("student"),
        "--out",
        tmp_path / "out",
        "--batch-size",
        "1",
    ]
    # Some calls are answered; the others go out when the server has been killed.
    gone = tmp_path / "gone"
    code = (
        "import itertools, pathlib, sys, time\n"
        "from cliplet.triton_wire import GrpcWire\n"
        "infer, calls = GrpcWire.infer, itertools.count()\n"
        "def slow(*given):\n"
        "    if next(calls) >= 4:\n"
        "        print('asked', file=sys.stderr, flush=True)\n"
        f"        while not pathlib.Path({str(gone)!r}).exists(): time.sleep(0.05)\n"
        "    return infer(*given)\n"
        "GrpcWire.infer = slow\n"
        "from cliplet.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments), "--in-flight", "2", "--shared-memory", "off"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any("asked" in line for line in process.stderr)
        site.kill()
        gone.touch()
        assert any("waiting for it, at most 300 s" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 130
        assert "interrupted, all work saved" in out
    finally:
        process.kill()
        process.wait()
        site.start()


def test_a_model_that_hangs_ends_the_run_with_a_reason(
    site: Site, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer = GrpcWire.infer
    this = job(
        site.model("student"),
        inputs,
        tmp_path / "out",
        connection=ConnectionSettings(shared_memory="off", wait_s=60),
        batch_size=1,
    )
    site.hang.touch()
    try:
        # Of what hangs alone: a busy machine may need longer for an honest answer, such as the card.
        with monkeypatch.context() as patch:
            patch.setattr(GrpcWire, "infer", lambda self, request, timeout_s: infer(self, request, 0.5))
            with pytest.raises(EnvironmentError_, match=r"8 images in a row: .* no answer within"):
                labelling.label(this)
    finally:
        site.hang.unlink()
    # Nothing was recorded about images that are not to blame.
    assert [e for e in read_errors(tmp_path / "out") if e.stage == "infer"] == []
    result = labelling.label(this)
    assert (result.labelled, result.failed) == (23, 5)


def test_an_image_that_hangs_the_model_is_an_error_of_its_own(
    site: Site, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer, slow = GrpcWire.infer, (inputs / "007.jpg").read_bytes()

    def late(self: GrpcWire, request: Any, timeout_s: float) -> Any:
        if request.feeds["image"].dtype == object and request.feeds["image"][0, 0] == slow:
            timeout_s = 1e-5
        return infer(self, request, timeout_s)

    monkeypatch.setattr(GrpcWire, "infer", late)
    connection = ConnectionSettings(shared_memory="off", wait_s=60)
    labelling.label(job(site.model("teacher"), inputs, tmp_path / "out", connection=connection))
    (error,) = [e for e in read_errors(tmp_path / "out") if e.stage == "infer"]
    assert Path(error.path).name == "007.jpg"
    assert "no answer within" in error.reason


def test_the_command_line(site: Site, inputs: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    done = cli("label", inputs, "--model", site.model("student"), "--out", out, "--in-flight", "2")
    assert done.returncode == 0, done.stderr
    assert "24 of 28 inputs labelled, 4 failed" in done.stdout
    done = cli("label", inputs, "--model", site.model("student"), "--out", out, "--dry-run")
    assert "triton" in done.stdout
    done = cli("gallery", out)
    assert done.returncode == 0, done.stderr
    done = cli("label", inputs, "--model", site.model("student"), "--deadline", "0")
    assert done.returncode == 2
    assert "--deadline 0" in done.stderr
    done = cli(
        "label", inputs, "--model", "triton://127.0.0.1:9/x", "--retries", "0", "--out", tmp_path / "no"
    )
    assert done.returncode == 1
    assert "does not answer" in done.stderr
    assert not (tmp_path / "no").exists()
