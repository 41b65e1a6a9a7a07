"""A real server: ready when it really is, honest when it is not, and gone without a trace."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
from running import (
    Traces,
    break_model,
    hang_while,
    is_alive,
    quick,
    repository_of,
    supervised,
    within,
)

from cliplet.deploy import server as server_module
from cliplet.deploy.server import Stopped, TritonServer
from cliplet.deploy.server_options import Ports, free_ports
from cliplet.deploy.stubs import failing_stubs, stubs_of
from cliplet.deploy.triton_http import CallError, TritonHttp
from cliplet.errors import EnvironmentError_, UsageError
from cliplet.server_address import ServerState, read_state, state_file
from cliplet.triton_program import FOLDER_VARIABLE, server_folder

pytestmark = pytest.mark.skipif(not server_folder().is_dir(), reason="the embedded server is not installed")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from served import make_student, make_teacher

    folder = tmp_path_factory.mktemp("bundles")
    return {"teacher": make_teacher(folder / "teacher"), "student": make_student(folder / "student")}


@pytest.fixture(scope="module")
def repository(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository_of(tmp_path_factory.mktemp("both") / "repository", **bundles)


@pytest.fixture
def student(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A repository of the student alone, for the test to spoil."""
    return repository_of(tmp_path / "repository", student=bundles["student"])


@pytest.fixture(scope="module")
def running(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, quick(token="open-sesame")) as server:
        server.wait_ready()
        yield server


# A machine may stand still for seconds; what comes at all comes before that.
SOON_S, RESTARTED_S = 30, 90


def pid_of(server: TritonServer, model: str) -> int:
    return next(pid for pid, name in stubs_of(server.pid).items() if name == model)


def stop(stub: int) -> None:
    """Stop a process, and return once it stands still."""
    os.kill(stub, signal.SIGSTOP)
    assert within(SOON_S, lambda: failing_stubs({stub: "it"}))


# Well


def test_every_model_answered(running: TritonServer) -> None:
    models = ["student", "student_classifier", "teacher", "teacher_snippets", "teacher_text"]
    assert sorted(running.models) == models and running.refused == {}
    health = running.health()
    assert health.ok and all(0 < m.seconds < SOON_S for m in health.models)
    assert running.health(max_age_s=60) is running.health(max_age_s=60)
    assert running.health() is not health


def test_the_note_is_for_its_user_alone(running: TritonServer) -> None:
    for port in (running.ports.http, running.ports.grpc):
        assert stat.S_IMODE(state_file(port).stat().st_mode) == 0o600
        state = read_state(port)
        assert state is not None and (state.pid, state.secret) == (running.pid, running.secret)
        assert state.ports == vars(running.ports)


@pytest.mark.parametrize(
    ("headers", "path", "allowed"),
    [
        ({}, "/v2/health/live", True),
        ({}, "/v2/models/student/config", False),
        ({}, "/v2/systemsharedmemory/status", False),
        ({"authorization": "Bearer wrong"}, "/v2/models/student/config", False),
        ({"authorization": "Bearer open-sesame"}, "/v2/models/student/config", True),
        ({"authorization": "Bearer open-sesame"}, "/v2/systemsharedmemory/status", False),
        ({"authorization": "Bearer open-sesame"}, "/v2/logging", False),
        ({"authorization": "Bearer open-sesame"}, "/v2/trace/setting", False),
        ({"cliplet-secret": "wrong"}, "/v2/logging", False),
    ],
)
def test_closed_doors(headers: dict[str, str], path: str, allowed: bool, running: TritonServer) -> None:
    caller = TritonHttp("127.0.0.1", running.ports.http, headers)
    if allowed:
        caller.call("GET", path, timeout_s=SOON_S)
    else:
        with pytest.raises(CallError, match="restricted"):
            caller.call("GET", path, timeout_s=SOON_S)


def test_the_secret_opens_them(running: TritonServer) -> None:
    running.http.call("GET", "/v2/systemsharedmemory/status", timeout_s=SOON_S)
    with pytest.raises(CallError, match=r"not enabled|explicit|not allowed|polling"):
        running.http.call("POST", "/v2/repository/models/student/unload", timeout_s=SOON_S)


def test_grpc_has_the_same_doors(running: TritonServer) -> None:
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    with grpc.InferenceServerClient(f"127.0.0.1:{running.ports.grpc}") as client:
        token = {"triton-grpc-protocol-authorization": "Bearer open-sesame"}
        assert client.get_model_config("student", headers=token).config.name == "student"
        for call, headers in (
            (lambda headers: client.get_model_config("student", headers=headers), {}),
            (lambda headers: client.get_system_shared_memory_status(headers=headers), token),
            (lambda headers: client.get_log_settings(headers=headers), token),
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                call(headers)
        secret = {"triton-grpc-protocol-cliplet-secret": running.secret}
        client.get_system_shared_memory_status(headers=secret)


def test_only_this_machine_is_listened_to(running: TritonServer) -> None:
    psutil = pytest.importorskip("psutil")
    listening = {
        c.laddr for c in psutil.Process(running.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN
    }
    assert {addr.port for addr in listening} >= set(vars(running.ports).values())
    assert {addr.ip.removeprefix("::ffff:") for addr in listening} == {"127.0.0.1"}


# Ports


def test_a_taken_port_is_named_before_the_start(repository: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = TritonServer(repository, quick(ports=Ports(http=0, grpc=port, metrics=0)))
        with pytest.raises(UsageError, match=f"port {port} is taken") as caught:
            server.start()
        assert "--grpc-port" in caught.value.fix and server.pid == 0


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_a_port_that_is_lost_in_a_race(name: str, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program takes the port after it was looked at."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))

        def free_then_taken(options: object) -> Ports:
            other.listen()
            found = free_ports(quick())
            return Ports(**{**vars(found), name: other.getsockname()[1]})

        monkeypatch.setattr(server_module, "free_ports", free_then_taken)
        with TritonServer(student, quick()) as server:
            with pytest.raises(UsageError, match=f"port {other.getsockname()[1]} is taken") as caught:
                server.wait_ready()
            assert f"--{name}-port" in caught.value.fix


@pytest.mark.parametrize(
    ("ports", "message"),
    [({"http": 9000, "grpc": 9000}, "two ports are the same"), ({"http": 70000}, "70000")],
)
def test_ports_that_cannot_be(ports: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Ports(**ports)


def test_an_address_of_another_machine(repository: Path) -> None:
    with pytest.raises(UsageError, match="--host 192.0.2.1"):
        TritonServer(repository, quick(host="192.0.2.1")).start()


@pytest.mark.parametrize("token", ["", "two words", "tab\t", "grüße", "\u2713", "\x7f"])
def test_a_token_that_no_client_could_send(token: str) -> None:
    with pytest.raises(UsageError, match="the token") as told:
        quick(token=token)
    assert "openssl rand" in told.value.fix and (not token or token not in str(told.value))


def test_without_the_server_nothing_is_started(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(EnvironmentError_, match="not installed"):
        TritonServer(repository, quick()).start()


# Faults of a model


def test_a_stopped_process_is_unready_until_it_goes_on(running: TritonServer) -> None:
    stub = pid_of(running, "teacher_snippets")
    stop(stub)
    try:
        reasons = running.health().reasons
        assert sorted(reasons) == ["teacher", "teacher_snippets"], "the other bundle works"
        assert f"its process {stub} is stopped" in reasons["teacher_snippets"], "it was not asked"
    finally:
        os.kill(stub, signal.SIGCONT)
    assert within(SOON_S, lambda: running.health().ok)


def test_a_stopped_process_that_met_a_request_leads_to_a_restart(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton answers that request with an error, and aborts when the process goes on."""
    monkeypatch.setattr(server_module, "CHECK_EVERY_S", 0.2)
    with TritonServer(student, quick(restart=True, backoff_s=0.1, unhealthy_s=60)) as server:
        server.wait_ready()
        stub = pid_of(server, "student_classifier")
        with supervised(server) as ended:
            stop(stub)
            probe = next(p for p in server._probes if p.model == "student_classifier")
            assert probe.feeds is not None
            with pytest.raises(CallError, match="not healthy"):
                server.http.infer(probe.model, probe.feeds(), probe.outputs, SOON_S)
            assert not server.health().ok and server.restarts == 0
            os.kill(stub, signal.SIGCONT)
            assert within(RESTARTED_S, lambda: server.health().ok)
            assert ended == []


def test_a_hanging_model_is_unready_until_it_goes_on(student: Path, tmp_path: Path) -> None:
    """The process lives and Triton finds nothing wrong, but no inference ends."""
    flag = tmp_path / "hang"
    hang_while(student / "student_classifier", flag)
    with TritonServer(student, quick(deadline_s=1.0)) as server:
        assert server.wait_ready().ok
        flag.touch()
        began = monotonic()
        health = server.health()
        assert monotonic() - began < SOON_S, "it ends while the model still hangs"
        assert "no answer within the deadline of 1 s" in health.reasons["student_classifier"]
        ready = "/v2/models/student_classifier/ready"
        assert server.http.call("GET", ready, timeout_s=SOON_S) is None, "Triton thinks so"
        flag.unlink()
        assert within(SOON_S, lambda: server.health().ok)
        traces = Traces.of(server.pid, server.ports)
    assert traces.left() == []
    server.stop()


def test_a_killed_process_is_unready_for_good_without_restart(student: Path) -> None:
    with TritonServer(student, quick()) as server:
        server.wait_ready()
        stub = pid_of(server, "student_classifier")
        os.kill(stub, signal.SIGKILL)
        assert within(SOON_S, lambda: not server.health().ok)
        assert f"its process {stub} died" in server.health().reasons["student_classifier"]
        with supervised(server) as ended:
            assert not within(1.5, lambda: ended) and not server.health().ok
            assert server.is_running and server.restarts == 0


def test_a_killed_process_leads_to_a_restart(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "CHECK_EVERY_S", 0.2)
    with TritonServer(student, quick(restart=True, backoff_s=0.1)) as server:
        server.wait_ready()
        with supervised(server) as ended:
            os.kill(pid_of(server, "student_classifier"), signal.SIGKILL)
            assert within(RESTARTED_S, lambda: server.restarts == 1 and server.health().ok)
            assert ended == []


def test_a_model_that_does_not_load_leaves_the_others(bundles: dict[str, Path], tmp_path: Path) -> None:
    repository = repository_of(tmp_path / "repository", **bundles)
    break_model(repository / "student_classifier")
    with TritonServer(repository, quick()) as server:
        assert server.wait_ready().ok
        assert sorted(server.models) == ["teacher", "teacher_snippets", "teacher_text"]
        assert "no module named lost" in server.refused["student_classifier"]
        assert "student_classifier" in server.refused["student"]


def test_no_model_that_loads(student: Path) -> None:
    for model in student.iterdir():
        break_model(model)
    with (
        TritonServer(student, quick()) as server,
        pytest.raises(EnvironmentError_, match="no model serves.*lost"),
    ):
        server.wait_ready()


def test_ready_timeout_names_the_model(student: Path, tmp_path: Path) -> None:
    flag = tmp_path / "hang"
    hang_while(student / "student", flag)
    with TritonServer(student, quick(deadline_s=0.5, exit_timeout_s=0)) as server:
        # Loading takes as long as it takes; then too little time is left for a model that hangs.
        server.wait_ready()
        server.options = replace(server.options, ready_timeout_s=8.0)
        flag.touch()
        with pytest.raises(EnvironmentError_, match=r"not ready within 8 s: .*student: no answer"):
            server.wait_ready()


def test_a_request_to_stop_ends_the_wait(student: Path) -> None:
    with TritonServer(student, quick()) as server:
        server.request_stop()
        with pytest.raises(Stopped):
            server.wait_ready()


# Faults of the server


def test_a_killed_server_is_told_and_leaves_nothing(student: Path) -> None:
    with TritonServer(student, quick()) as server:
        server.wait_ready()
        traces = Traces.of(server.pid, server.ports)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(EnvironmentError_, match="killed by signal 9") as caught:
            server.supervise()
        assert "--restart" in caught.value.fix
        assert traces.left() == []
        assert not server.health().ok


def test_a_killed_server_comes_back(student: Path) -> None:
    with TritonServer(student, quick(restart=True, backoff_s=0.1)) as server:
        server.wait_ready()
        traces, ports, secret = Traces.of(server.pid, server.ports), server.ports, server.secret
        with supervised(server):
            os.kill(server.pid, signal.SIGKILL)
            assert within(RESTARTED_S, lambda: server.restarts == 1 and server.health().ok)
            assert (server.ports, server.secret) == (ports, secret)
            state = read_state(ports.grpc)
            assert state is not None and state.pid == server.pid
            assert not any(is_alive(pid) for pid in traces.pids)


def test_a_model_lost_at_a_restart_is_named(
    bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The others serve on, and the server is not started again and again for those that are lost."""
    monkeypatch.setattr(server_module, "CHECK_EVERY_S", 0.2)
    repository = repository_of(tmp_path / "repository", **bundles)
    with TritonServer(repository, quick(restart=True, backoff_s=0.1, unhealthy_s=0.0)) as server:
        assert server.wait_ready().ok
        break_model(repository / "teacher_snippets")
        shutil.rmtree(repository / "teacher_text")
        with supervised(server) as ended:
            os.kill(server.pid, signal.SIGKILL)
            assert within(RESTARTED_S, lambda: "the server is ready again, without" in caplog.text)
            reasons = server.health().reasons
            assert sorted(reasons) == ["teacher", "teacher_snippets", "teacher_text"]
            assert "no module named lost" in reasons["teacher_snippets"]
            assert "no longer in" in reasons["teacher_text"] and "teacher_snippets" in reasons["teacher"]
            assert all(f"model {model} was lost" in caplog.text for model in reasons)
            assert sorted(server.models) == ["student", "student_classifier"]
            assert not within(1.5, lambda: ended or server.restarts > 1)


def test_a_start_that_fails_once_is_tried_again(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "CHECK_EVERY_S", 0.2)
    with TritonServer(student, quick(restart=True, backoff_s=0.1)) as server:
        server.wait_ready()
        failures = [EnvironmentError_("no space left", "room", "free some")]

        def write_state(state: ServerState) -> None:
            if failures:
                raise failures.pop()

        monkeypatch.setattr(server_module, "write_state", write_state)
        with supervised(server) as ended:
            os.kill(server.pid, signal.SIGKILL)
            assert within(RESTARTED_S, lambda: server.restarts == 2 and server.health().ok)
            assert ended == [] and failures == []


def fails_to_write(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def more_than_a_process_takes(*_: object) -> dict[str, str]:
    return {"LONG": "x" * 2**20}


@pytest.mark.parametrize(
    ("name", "instead", "message"),
    [
        ("build_backends", fails_to_write, "no space left"),
        ("server_environment", more_than_a_process_takes, "process could not be started: .*too long"),
    ],
)
def test_a_start_that_fails_early_leaves_nothing(
    name: str, instead: object, message: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, name, instead)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(EnvironmentError_, match=message):
        TritonServer(student, quick()).start()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_it_gives_up(student: Path) -> None:
    options = quick(restart=True, backoff_s=0.05, most_failures=2)
    with TritonServer(student, options) as server:
        server.wait_ready()
        shutil.rmtree(student / "student")
        shutil.rmtree(student / "student_classifier")
        with supervised(server) as ended:
            os.kill(server.pid, signal.SIGKILL)
            assert within(RESTARTED_S, lambda: ended)
        assert isinstance(ended[0], EnvironmentError_) and "failed 3 times in a row" in str(ended[0])


def test_a_repository_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        TritonServer(tmp_path / "nowhere", quick()).start()


# Gone


def test_stopped_models_do_not_outlive_it(student: Path) -> None:
    with TritonServer(student, quick(exit_timeout_s=0)) as server:
        server.wait_ready()
        traces = Traces.of(server.pid, server.ports)
        stop(pid_of(server, "student_classifier"))
    assert traces.left() == []


def test_a_killed_keeper_takes_the_server_along(student: Path) -> None:
    psutil = pytest.importorskip("psutil")
    with TritonServer(student, quick()) as server:
        server.wait_ready()
        traces = Traces.of(server.pid, server.ports)
        psutil.Process(server.pid).parent().kill()
        assert within(SOON_S, lambda: not server.is_running)
    assert within(SOON_S, lambda: traces.left() == [])


def test_a_killed_master_leaves_nothing(student: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from cliplet.deploy.server import TritonServer; "
        "from cliplet.deploy.server_options import Ports, ServerOptions; "
        "server = TritonServer(Path(sys.argv[1]), ServerOptions(ports=Ports(http=0, grpc=0, metrics=0), exit_timeout_s=3)); "
        "server.start(); server.wait_ready(); "
        "print(server.pid, *vars(server.ports).values(), flush=True); time.sleep(600)"
    )
    master = subprocess.Popen([sys.executable, "-c", code, str(student)], stdout=subprocess.PIPE, text=True)
    try:
        assert master.stdout is not None
        pid, http, grpc, metrics = map(int, master.stdout.readline().split())
        traces = Traces.of(pid, Ports(http=http, grpc=grpc, metrics=metrics))
    finally:
        master.kill()
        master.communicate()
    assert within(SOON_S, lambda: traces.left() == []), traces.left()
