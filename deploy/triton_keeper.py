"""Runs a server and sees to it that nothing of it outlives its master: no process, no segment, no file.

    python -I -S triton_keeper.py JOB -- COMMAND…

JOB is a JSON object that `ServerProcess` makes. The master holds the other end of the pipe `lifeline`: when it closes,
because the master says so or was killed, the server is asked to stop, and after `patience_s` made to. The keeper adopts
whatever the server leaves behind (Triton's stubs) and ends that as well, whichever way the server died. Its exit status
is the server's, as a shell gives it.

This file runs alone, on the standard library, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SEGMENTS = Path("/dev/shm")


def main(arguments: list[str]) -> int:
    """Run the command to its end, or to the master's; returns its exit status."""
    job = json.loads(arguments[0])
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake = _wakened_by_children()

    def let_go(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.close(job["lifeline"])

    # The keeper is asked to stop through the lifeline, or as any program is.
    signal.signal(signal.SIGTERM, let_go)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # A connection is an open file, and the usual limit of 1024 is soon reached by who means ill.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    server = subprocess.Popen(arguments[2:], stdin=subprocess.DEVNULL, preexec_fn=prepare)
    # The master reads the pid from here, and the end of the logs from the end of their pipe, which is the server's.
    os.write(job["report"], f"{server.pid}\n".encode())
    os.close(job["report"])
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        _wait(server, job["lifeline"], wake)
        if server.poll() is None:
            _stop(server, job["patience_s"], wake)
    finally:
        end_children()
        clean(**job["left"])
    code = server.wait()
    return 128 - code if code < 0 else code


def _wakened_by_children() -> int:
    """A file that becomes readable when a child ends."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return read


def _wait(server: subprocess.Popen[bytes], lifeline: int, wake: int) -> None:
    """Until the server ended, or the master let go."""
    while server.poll() is None:
        try:
            ready, _, _ = select.select([lifeline, wake], [], [], 1.0)
        except OSError:
            return
        if lifeline in ready:
            return
        _drain(wake)
        _reap_adopted(server.pid)


def _stop(server: subprocess.Popen[bytes], patience_s: float, wake: int) -> None:
    server.terminate()
    end = time.monotonic() + patience_s
    while server.poll() is None and time.monotonic() < end:
        select.select([wake], [], [], 0.2)
        _drain(wake)
    if server.poll() is None:
        server.kill()
        server.wait()


def _drain(wake: int) -> None:
    with suppress(BlockingIOError):
        while os.read(wake, 4096):
            pass


def _reap_adopted(server: int) -> None:
    """Take leave of ended children that are not the server: its status is not ours to take here."""
    for pid in _children():
        if pid != server:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def end_children() -> None:
    """Kill all that is left of this process's children; what they leave behind becomes ours in turn."""
    while children := _children():
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    own, found = str(os.getpid()), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # pid (name) state parent …; a name may hold anything, even parentheses.
            if stat.read_text(errors="replace").rpartition(")")[2].split()[1] == own:
                found.append(int(stat.parent.name))
    return found


def clean(segments: str, paths: list[str], notes: list[str], secret: str) -> None:
    """Remove the shared-memory segments whose names begin with `segments`, files and folders, and a server's notes.

    A note that holds another secret is another server's by now, and stays.
    """
    for note in map(Path, notes):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(note.read_text(encoding="utf-8"))["secret"] == secret:
                note.unlink()
    for path in [*SEGMENTS.glob(f"{segments}*"), *map(Path, paths)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
