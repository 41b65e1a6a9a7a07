"""One writer at a time: the second is refused or waits, and a lock never outlives its process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cliplet.errors import EnvironmentError_, UsageError
from cliplet.lock import lock_folder

HOLDER = """
import sys
from pathlib import Path
from cliplet.lock import lock_folder
lock_folder(Path(sys.argv[1]))
sys.stdout.write("held\\n")
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the lock of `tmp_path` until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_until_the_first_gives_the_lock_back(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path / "made" / "for it")
    with pytest.raises(UsageError, match="another run is writing"):
        lock_folder(tmp_path / "made" / "for it")
    os.close(lock_folder(tmp_path / "another"))
    os.close(lock)
    os.close(lock_folder(tmp_path / "made" / "for it"))


def test_a_process_that_is_killed_gives_its_lock_back(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UsageError, match="wait for it to end"):
        lock_folder(tmp_path)
    holder.kill()
    holder.wait()
    os.close(lock_folder(tmp_path))


def test_one_who_waits_gets_the_lock_when_it_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    got = threading.Event()

    def wait() -> None:
        lock = lock_folder(tmp_path, wait=True)
        got.set()
        os.close(lock)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not got.wait(0.3), "it must wait as long as the other lives"
    holder.kill()
    assert got.wait(60)
    waiting.join()


def test_a_refused_lock_leaves_no_file_open(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(UsageError):
            lock_folder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(lock)


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_, match="cannot write"):
        lock_folder(tmp_path / "file" / "below")


def test_a_file_system_without_locks_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("cliplet.lock.fcntl.flock", without)
    with pytest.raises(EnvironmentError_, match="cannot lock .*Function not implemented"):
        lock_folder(tmp_path)
