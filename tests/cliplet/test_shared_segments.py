"""Shared memory: laid out, enlarged, given back, and swept where its maker was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from cliplet import shared_segments
from cliplet.shared_segments import FOLDER, NoSharedMemory, Segment, SegmentPool, sweep

FEEDS = {
    "image": np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8),
    "boxes": np.random.default_rng(1).random((2, 4, 4), np.float32),
}


class Server:
    """Notes what it is shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.hidden: list[str] = []

    def show(self, segment: Segment) -> None:
        assert (FOLDER / segment.name).stat().st_size == segment.size
        self.shown.append(segment.name)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def pool(server: Server) -> Iterator[SegmentPool]:
    found = SegmentPool(server.show, server.hidden.append)
    yield found
    found.close()


def test_a_server_reads_what_was_fed(pool: SegmentPool) -> None:
    with pool.placed(FEEDS) as regions:
        for name, array in FEEDS.items():
            data = (FOLDER / regions[name].name).read_bytes()
            part = data[regions[name].offset : regions[name].offset + regions[name].size]
            assert part == array.tobytes()
        assert regions["boxes"].offset % shared_segments.ALIGNMENT == 0


def test_one_segment_serves_one_request_after_another(pool: SegmentPool, server: Server) -> None:
    for _ in range(3):
        with pool.placed(FEEDS):
            pass
    assert len(server.shown) == 1
    with pool.placed(FEEDS) as first, pool.placed(FEEDS) as second:
        assert first["image"].name != second["image"].name
    assert len(server.shown) == 2


def test_a_larger_request_replaces_the_segment(pool: SegmentPool, server: Server) -> None:
    with pool.placed(FEEDS):
        pass
    with pool.placed({"image": np.zeros(3 << 20, np.uint8)}) as regions:
        assert (FOLDER / regions["image"].name).stat().st_size == 3 << 20
    assert server.hidden == server.shown[:1]
    assert not (FOLDER / server.shown[0]).exists()


def test_all_is_given_back(pool: SegmentPool, server: Server) -> None:
    with pool.placed(FEEDS), pool.placed(FEEDS):
        pass
    pool.close()
    assert sorted(server.hidden) == sorted(server.shown)
    assert not any((FOLDER / name).exists() for name in server.shown)


def test_a_server_that_was_started_anew_is_shown_it_again(pool: SegmentPool, server: Server) -> None:
    with pool.placed(FEEDS):
        pass
    pool.server_forgot()
    with pool.placed(FEEDS):
        pass
    assert server.shown[0] == server.shown[1]


def test_a_full_folder_is_noticed_before_it_is_written(
    pool: SegmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_segments, "STEP", 1 << 50)
    before = set(os.listdir(FOLDER))
    with pytest.raises(NoSharedMemory, match="is full"), pool.placed(FEEDS):
        pass
    assert not [name for name in set(os.listdir(FOLDER)) - before if f"-{os.getpid()}-" in name]


def test_only_what_killed_processes_left_is_swept(pool: SegmentPool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests' clients sweep at the same time; they leave a prefix of its own alone.
    prefix = f"cliplet-swept-in-{os.getpid()}-"
    monkeypatch.setattr(shared_segments, "PREFIX", prefix)
    code = (
        f"import os, signal; from cliplet import shared_segments; shared_segments.PREFIX = {prefix!r};"
        "s = shared_segments.Segment(10);"
        "print(s.name, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = killed.stdout.strip()
    assert (FOLDER / left).exists()
    with pool.placed(FEEDS) as regions:
        hidden: list[str] = []
        sweep(hidden.append)
        assert left in hidden
        assert not (FOLDER / left).exists()
        assert (FOLDER / regions["image"].name).exists()
        assert regions["image"].name not in hidden


def test_a_process_that_ends_with_an_error_leaves_nothing() -> None:
    code = (
        "from cliplet.shared_segments import Segment; s = Segment(10);"
        "print(s.name, flush=True); raise SystemExit(3)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    assert not (FOLDER / ended.stdout.strip()).exists()


def test_a_forked_child_leaves_its_parents_memory_alone() -> None:
    segment = Segment(10)
    child = os.fork()
    if child == 0:
        segment.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert (FOLDER / segment.name).exists()
    segment.close()
    assert not (FOLDER / segment.name).exists()
