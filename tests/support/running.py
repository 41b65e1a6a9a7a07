"""Servers for tests: repositories of small bundles, and what is left of a server once it is gone."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from served import make_student, make_teacher

from cliplet.deploy.container import DASHBOARD, FOLDER
from cliplet.deploy.repository import ServeSettings, plan_served, write_repository
from cliplet.deploy.server import TritonServer
from cliplet.deploy.server_options import Ports, ServerOptions
from cliplet.server_address import ServerAddress, state_file

TOKEN = "open-sesame"
ANY_PORT = Ports(http=0, grpc=0, metrics=0)


def quick(**changes: Any) -> ServerOptions:
    """Options for a test: free ports, a short end, and models that may answer late on a machine that stands still."""
    return ServerOptions(
        **{"ports": ANY_PORT, "exit_timeout_s": 3, "deadline_s": 10.0, "ready_timeout_s": 180.0, **changes}
    )


def repository_of(folder: Path, **bundles: Path) -> Path:
    """A repository that serves each bundle under its name, with one thread an engine."""
    settings = ServeSettings(threads=1)
    served, _ = plan_served([(name, bundle) for name, bundle in bundles.items()], settings)
    return write_repository(served, folder, settings)


def dashboard_metrics() -> set[str]:
    """Names of the metrics that the dashboard asks for."""
    return set(re.findall(r"\bnv_\w+", (FOLDER / DASHBOARD).read_text(encoding="utf-8")))


def hang_while(model: Path, flag: Path) -> None:
    """Make a Python model of a repository hang in every inference as long as a file is there."""
    file = model / "1" / "model.py"
    # Its own file: what is in a repository may be a link.
    text = file.read_text()
    file.unlink()
    file.write_text(
        text + "\n\nimport pathlib as _pathlib\nimport time as _time\n_execute = TritonPythonModel.execute\n"
        f"def _hang(self, requests):\n    while _pathlib.Path({str(flag)!r}).exists():\n        _time.sleep(0.02)\n"
        "    return _execute(self, requests)\nTritonPythonModel.execute = _hang\n"
    )


def break_model(model: Path) -> None:
    """Make a Python model of a repository fail to load."""
    file = model / "1" / "model.py"
    file.unlink()
    file.write_text("raise ImportError('no module named lost')\n")


@dataclass(frozen=True)
class Site:
    """A server of two bundles, `teacher` and `student`, that asks for TOKEN."""

    bundles: dict[str, Path]
    repository: Path
    server: TritonServer

    def address(self, name: str | None = None, *, http: bool = False) -> str:
        ports = self.server.ports
        return str(ServerAddress("127.0.0.1", ports.http if http else ports.grpc, name, http))


@contextmanager
def two_served(folder: Path, hang: Path | None = None) -> Iterator[Site]:
    """Context with such a server, ready; the student's graph hangs as long as there is a file `hang`."""
    bundles = {"teacher": make_teacher(folder / "teacher"), "student": make_student(folder / "student")}
    repository = repository_of(folder / "repository", **bundles)
    if hang is not None:
        hang_while(repository / "student_classifier", hang)
    with TritonServer(repository, quick(token=TOKEN)) as server:
        server.wait_ready()
        yield Site(bundles, repository, server)


@dataclass(frozen=True)
class Traces:
    """What a running server has left on the machine: its processes, its segments' names, its notes."""

    pids: tuple[int, ...]
    segments: str
    notes: tuple[Path, ...]

    @classmethod
    def of(cls, server: int, ports: Ports) -> Traces:
        import psutil

        triton = psutil.Process(server)
        words = triton.cmdline()
        prefix = next(w for w in words if "shm-region-prefix-name" in w).rpartition("=")[2]
        notes = (state_file(ports.http), state_file(ports.grpc))
        own = (triton.ppid(), server, *(child.pid for child in triton.children(recursive=True)))
        found = cls(own, prefix, notes)
        assert len(own) > 2 and found.left(), "there must be something to miss later"
        return found

    def left(self) -> list[str]:
        """What is still there."""
        alive = [f"process {pid}" for pid in self.pids if is_alive(pid)]
        shared = [name for name in os.listdir("/dev/shm") if name.startswith(self.segments)]
        return alive + shared + [str(note) for note in self.notes if note.exists()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def within(seconds: float, holds: Callable[[], object]) -> bool:
    """Whether something comes true before so many seconds have passed."""
    end = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(found)


@contextmanager
def supervised(server: Any) -> Iterator[list[BaseException]]:
    """Context in which a server is watched in a thread; the list holds what the watch ended with."""
    import threading

    ended: list[BaseException] = []

    def watch() -> None:
        try:
            server.supervise()
        except Exception as error:  # noqa: BLE001 - looked at by the test
            ended.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield ended
    finally:
        server.request_stop()
        thread.join(60)
        assert not thread.is_alive()
