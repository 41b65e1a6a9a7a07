"""What a server leaves behind is removed, and what is another's stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cliplet.deploy.triton_keeper import clean
from cliplet.server_address import ServerState, read_state, state_file, write_state

PORTS = {"http": 8000, "grpc": 8001}


@pytest.fixture
def notes() -> list[str]:
    return [str(state_file(port)) for port in PORTS.values()]


def test_its_own_notes_files_and_folders_go(notes: list[str], tmp_path: Path) -> None:
    write_state(ServerState(os.getpid(), "hush", PORTS))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    paths = [str(tmp_path / name) for name in ("folder", "nothing")]
    clean("cliplet-no-such-segment", paths, notes, "hush")
    assert not (tmp_path / "folder").exists()
    assert not list(state_file(8000).parent.iterdir())


def test_the_note_of_its_successor_stays(notes: list[str]) -> None:
    write_state(ServerState(os.getpid(), "first", PORTS))
    second = ServerState(os.getpid(), "second", {"grpc": 8001})
    write_state(second)
    clean("cliplet-no-such-segment", [], notes, "first")
    assert read_state(8001) == second and read_state(8000) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff"])
def test_a_note_that_cannot_be_read_stays(text: str, notes: list[str]) -> None:
    Path(notes[0]).parent.mkdir(parents=True, exist_ok=True)
    Path(notes[0]).write_text(text, encoding="latin-1")
    clean("cliplet-no-such-segment", [], notes, "hush")
    assert Path(notes[0]).exists()
