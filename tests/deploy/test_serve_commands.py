"""`cliplet serve` as a user meets it: addresses when all is ready, one clear error when not, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from helpers import Cli, picture
from PIL import Image
from running import Traces, is_alive, within

from cliplet.cli import main
from cliplet.deploy.repository import ServeSettings, plan_served
from cliplet.deploy.serve import Running, ServeJob
from cliplet.deploy.serve_commands import _job, _tell, start
from cliplet.deploy.server import TritonServer
from cliplet.deploy.server_options import Ports, ServerOptions
from cliplet.deploy.stubs import failing_stubs, stubs_of
from cliplet.errors import EnvironmentError_, UsageError
from cliplet.server_address import TOKEN_VARIABLE, read_state
from cliplet.triton_program import FOLDER_VARIABLE, server_folder

needs_server = pytest.mark.skipif(not server_folder().is_dir(), reason="the embedded server is not installed")
FREE = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--page-port", "0", "--threads", "1", "--exit-timeout", "3")  # fmt: skip
# A machine may stand still for seconds; what comes at all comes before that.
SOON_S = 90


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from served import make_student, make_teacher

    folder = tmp_path_factory.mktemp("bundles")
    return {"teacher": make_teacher(folder / "teacher"), "student": make_student(folder / "student")}


@contextmanager
def started(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Context with a server's process and the addresses that it told; it is killed at the end if it still runs."""
    command = [sys.executable, "-m", "cliplet.cli", "serve", *map(str, arguments), *FREE, "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def traces_of(told: dict[str, Any]) -> Traces:
    ports = {
        name: int(told[name].rpartition(":")[2].partition("/")[0]) for name in ("http", "grpc", "metrics")
    }
    return Traces.of(told["pid"], Ports(**ports))


def asked(url: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(url, body, {k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=SOON_S) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def status_of(url: str, **headers: str) -> int:
    """Of the answer; 0 where nobody listens."""
    try:
        return asked(url, **headers)[0]
    except OSError:
        return 0


def well(page: str, model: str) -> bool:
    """What the page says of a model."""
    return bool(asked(f"{page}/readyz")[1]["models"].get(model, {}).get("ok"))


@needs_server
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_it_and_nothing_is_left(
    number: signal.Signals, code: int, bundles: dict[str, Path], tmp_path: Path
) -> None:
    with started(f"pets={bundles['student']}", TMPDIR=str(tmp_path)) as (process, told):
        assert list(told["models"]) == ["pets"] and told["refused"] == {}
        traces = traces_of(told)
        process.send_signal(number)
        assert process.wait(SOON_S) == code
    assert traces.left() == [] and list(tmp_path.glob("cliplet-*")) == []


@needs_server
def test_it_serves_and_tells_when_it_does_not(bundles: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    Image.fromarray(picture(90, 70)).save(file)
    with started(f"pets={bundles['teacher']}", bundles["student"]) as (process, told):
        assert sorted(told["models"]) == ["pets", "student"]
        page = told["page"].rstrip("/")
        status, answer = asked(f"{page}/api/tag?model=pets", file.read_bytes())
        assert status == 200 and (answer["width"], answer["height"]) == (90, 70)
        assert within(SOON_S, lambda: asked(f"{page}/readyz")[0] == 200)
        stub = next(pid for pid, model in stubs_of(told["pid"]).items() if model == "student_classifier")
        os.kill(stub, signal.SIGSTOP)
        try:
            assert within(SOON_S, lambda: failing_stubs({stub: "it"}))
            assert within(SOON_S, lambda: well(page, "pets") and not well(page, "student_classifier"))
            assert asked(f"{page}/readyz")[0] == 503 and asked(f"{page}/healthz")[0] == 200
        finally:
            os.kill(stub, signal.SIGCONT)
        assert within(SOON_S, lambda: asked(f"{page}/readyz")[0] == 200)

        # Without --restart a server that died is the end.
        traces = traces_of(told)
        os.kill(told["pid"], signal.SIGKILL)
        assert process.wait(SOON_S) == 1
        assert process.stderr is not None
        said = process.stderr.read()
    assert "killed by signal 9" in said and "--restart" in said and "Traceback" not in said
    assert traces.left() == []


@needs_server
def test_a_killed_command_leaves_nothing(bundles: dict[str, Path]) -> None:
    with started(bundles["student"], "--no-page") as (process, told):
        assert told["page"] is None
        traces = traces_of(told)
        process.kill()
        assert within(SOON_S, lambda: traces.left() == []), traces.left()


@needs_server
def test_with_restart_it_comes_back_where_it_was(bundles: dict[str, Path]) -> None:
    with started(bundles["student"], "--restart", "--token", "open-sesame") as (process, told):
        traces = traces_of(told)
        page = told["page"].partition("#")[0].rstrip("/")
        port = int(told["grpc"].rpartition(":")[2])
        os.kill(told["pid"], signal.SIGKILL)
        assert within(SOON_S, lambda: (note := read_state(port)) and note.pid != told["pid"])
        assert not any(is_alive(pid) for pid in traces.pids)
        config = f"{told['http']}/v2/models/student/config"
        assert within(SOON_S, lambda: status_of(config, authorization="Bearer open-sesame") == 200)
        assert status_of(config) == 403
        assert within(SOON_S, lambda: status_of(f"{page}/readyz") == 200)
        process.terminate()
        assert process.wait(SOON_S) == 0


@needs_server
def test_an_interrupt_before_it_is_ready(bundles: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cliplet.cli", "serve", str(bundles["teacher"]), *FREE]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        # Its folder is there as soon as Triton is about to start.
        assert within(SOON_S, lambda: list(tmp_path.glob("cliplet-triton-*")))
        process.terminate()
        assert process.wait(SOON_S) == 0
    finally:
        process.kill()
        out, said = process.communicate()
    assert "Traceback" not in said and list(tmp_path.glob("cliplet-*")) == []


@needs_server
def test_a_bundle_that_was_changed(bundles: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    from shutil import copytree

    broken = Path(copytree(bundles["student"], tmp_path / "broken"))
    with (broken / "model.onnx").open("ab") as file:
        file.write(b"!")
    done = cli("serve", bundles["student"], broken, *FREE)
    assert done.returncode == 1 and "cannot serve broken" in done.stderr and "has changed" in done.stderr
    with started(bundles["student"], broken, "--skip-broken", "--no-page") as (process, told):
        assert list(told["models"]) == ["student"] and "has changed" in told["refused"]["broken"]
        process.terminate()
        assert process.wait(SOON_S) == 0


@needs_server
def test_an_original_is_exported_first(cli: Cli) -> None:
    """The first try is one command."""
    with started("tiny", "--classes", "cat,dog", "--views", "1", "--runtime", "onnx", "--no-page") as (
        process,
        told,
    ):
        assert list(told["models"]) == ["tiny"]
        process.terminate()
        assert process.wait(SOON_S) == 0


@needs_server
@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (["nowhere"], {}, 2, "unknown model 'nowhere'"),
        (["pets="], {}, 2, "names no bundle"),
        ([], {}, 2, "Missing argument"),
        (["STUDENT", "STUDENT"], {}, 2, "would both be served"),
        (["STUDENT", "--http-port", "7777", "--grpc-port", "7777"], {}, 2, "two ports are the same"),
        (["STUDENT"], {FOLDER_VARIABLE: "/nowhere"}, 1, "not installed"),
        (["STUDENT", "--max-queue", "0"], {}, 2, "--max-queue"),
    ],
)
def test_refused(
    arguments: list[str],
    environment: dict[str, str],
    code: int,
    message: str,
    bundles: dict[str, Path],
    cli: Cli,
) -> None:
    words = [str(bundles["student"]) if word == "STUDENT" else word for word in arguments]
    done = cli("serve", *words, **environment)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


@needs_server
def test_a_token_may_come_from_the_environment(bundles: dict[str, Path], cli: Cli) -> None:
    done = cli("serve", bundles["student"], CLIPLET_TOKEN="two words")
    assert done.returncode == 2 and "token" in done.stderr
    done = cli("serve", bundles["student"], CLIPLET_SERVE_MAX_QUEUE="none")
    assert done.returncode == 2 and "'none' is not a valid integer" in done.stderr


def wheel_in(folder: Path) -> Path:
    wheel = folder / "cliplet-9-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    return wheel


def job_of(*words: str) -> ServeJob:
    given = start.make_context("start", [str(word) for word in words]).params
    return _job(given.pop("bundles"), given)


def test_memory_for_answers_takes_a_number_and_swallows_no_bundle() -> None:
    job = job_of("--cache", "64", "pets")
    assert (list(job.bundles), job.options.cache_bytes, job.settings.cache) == (["pets"], 64 << 20, True)
    assert not job_of("pets").settings.cache and not job_of("--cache", "0", "pets").settings.cache
    with pytest.raises(click.UsageError, match="'pets' is not"):
        job_of("--cache", "pets")


def test_hosts_are_addresses_and_the_page_knows_more_names() -> None:
    job = job_of("--host", "localhost", "--page-host", "a.example", "--page-host", "b.example", "pets")
    assert job.options.host == "127.0.0.1" and tuple(job.page_hosts) == ("a.example", "b.example")
    with pytest.raises(UsageError, match="--host ::1") as told:
        job_of("--host", "::1", "pets")
    assert "127.0.0.1" in told.value.fix and "0.0.0.0" in told.value.fix


@pytest.mark.parametrize(("terminal", "as_json"), [(True, False), (False, False), (True, True)])
def test_the_token_is_told_to_a_terminal_alone(
    terminal: bool, as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ServerOptions(token="sesame")
    running = Running(TritonServer(Path("repository"), options), (), {}, "http://127.0.0.1:1/#token=sesame")
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    _tell(running, ServeJob(bundles=[], options=options), as_json)
    told = capsys.readouterr().out
    assert "http://127.0.0.1:1/" in told and ("sesame" in told) == (terminal and not as_json)


def test_what_a_container_is_not_given_is_told(
    bundles: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, _ = plan_served([("pets", bundles["student"])], ServeSettings())
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    for options, note in (
        (ServerOptions(deadline_s=7.0, unhealthy_s=9.0), "unhealthy_s"),
        (ServerOptions(token="sesame"), f"export {TOKEN_VARIABLE} first"),
        (ServerOptions(deadline_s=7.0), ""),
    ):
        job = ServeJob(bundles=[], options=options, page_hosts=["a.example"])
        _tell(Running(TritonServer(Path("repository"), options), tuple(served), {}, ""), job, False)
        told = capsys.readouterr().out
        (command,) = (line for line in told.splitlines() if "docker run" in line)
        assert "--page-host a.example" in command and ("--deadline 7.0" in command) == (
            options.deadline_s == 7
        )
        assert ("not carried over:" in told) == bool(note) and note in told and "sesame" not in told


def test_a_temporary_repository_is_not_named_as_one_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_, match="no model serves") as told:
        TritonServer(tmp_path)._hold_some_serve()
    assert str(tmp_path) not in told.value.fix and "--repository FOLDER" in told.value.fix


def test_files_and_check(bundles: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "server"
    assert main(["serve", "files", f"pets={bundles['student']}", "--out", str(out)]) == 2
    assert "python -m build --wheel" in capfd.readouterr().err and not out.exists()
    words = ["--out", str(out), "--wheel", str(wheel_in(tmp_path))]
    assert main(["serve", "files", f"pets={bundles['student']}", *words]) == 0
    told = capfd.readouterr().out
    for name in ("repository", "Dockerfile", "compose.yaml", "kubernetes.yaml", "grafana.json"):
        assert (out / name).exists() and str(out / name) in told
    assert "docker build" in told and "docker run" in told
    assert main(["serve", "check", "--container", str(out / "repository")]) == 0
    (out / "repository" / "pets" / "labels.txt").unlink()
    assert main(["serve", "check", "--container", str(out / "repository")]) == 1
    assert "labels.txt" in capfd.readouterr().out


@needs_server
def test_check_knows_what_this_machine_has(
    bundles: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "server"
    words = ["--out", str(out), "--wheel", str(wheel_in(tmp_path))]
    assert main(["serve", "files", f"pets={bundles['student']}", *words]) == 0
    assert main(["serve", "check", str(out / "repository")]) == 1
    assert "onnxruntime" in capfd.readouterr().out


def test_help_names_the_other_two(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "cliplet serve check FOLDER" in told and "--restart" in told
