"""Addresses of servers, how to talk to them, and the note that a server leaves on its machine."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliplet.errors import EnvironmentError_, UsageError
from cliplet.server_address import (
    ConnectionSettings,
    ServerAddress,
    ServerState,
    read_state,
    state_file,
    write_state,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("triton://host", ServerAddress("host", 8001)),
        ("triton://host/", ServerAddress("host", 8001)),
        ("triton://host:9/pets", ServerAddress("host", 9, "pets")),
        ("triton+grpc://host:9/pets", ServerAddress("host", 9, "pets")),
        ("triton+http://host/pets", ServerAddress("host", 8000, "pets", http=True)),
        ("triton+https://host:443/p%20q", ServerAddress("host", 443, "p q", http=True, tls=True)),
        ("triton+grpcs://10.0.0.1/a.b-c", ServerAddress("10.0.0.1", 8001, "a.b-c", tls=True)),
        ("triton://[::1]:8001/x", ServerAddress("::1", 8001, "x")),
    ],
)
def test_an_address(text: str, expected: ServerAddress) -> None:
    assert ServerAddress.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("triton:/host", "no scheme"),
        ("http://host", "no scheme"),
        ("triton+ftp://host", "no scheme"),
        ("triton://", "no host"),
        ("triton:///pets", "no host"),
        ("triton://host:port", "Port could not be cast"),
        ("triton://host:70000", "Port out of range"),
        ("triton://host:0/x", "no such port"),
        ("triton://host/a/b", "no such port or name"),
        ("triton://user:secret@host/a", "--token"),
        ("triton://host/a?b=c", "more than"),
        ("triton://[::1", "Invalid IPv6"),
    ],
)
def test_what_is_no_address(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        ServerAddress.parse(text)


@given(
    host=st.sampled_from(["localhost", "10.1.2.3", "::1", "a-b.example.org"]),
    port=st.integers(1, 65535),
    name=st.none() | st.text("abcXYZ019_.- ü", min_size=1).filter(lambda n: n.strip("/") == n),
    http=st.booleans(),
    tls=st.booleans(),
)
def test_an_address_survives_being_written(
    host: str, port: int, name: str | None, http: bool, tls: bool
) -> None:
    address = ServerAddress(host, port, name, http, tls)
    assert ServerAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "fields",
    [
        {"deadline_s": 0},
        {"deadline_s": float("nan")},
        {"deadline_s": float("inf")},
        {"retries": -1},
        {"wait_s": -0.1},
        {"in_flight": 0},
        {"shared_memory": "maybe"},
        {"token": "two words"},
        {"token": "line\nbreak"},
        {"ca": Path("/no/such/file")},
    ],
)
def test_settings_that_cannot_be(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ConnectionSettings(**fields)  # type: ignore[arg-type]


def test_the_token_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPLET_TOKEN", "open-sesame")
    settings = ConnectionSettings()
    assert settings.headers() == {"authorization": "Bearer open-sesame"}
    assert ConnectionSettings(token="other").headers("x-") == {"x-authorization": "Bearer other"}
    assert "sesame" not in repr(settings)
    monkeypatch.delenv("CLIPLET_TOKEN")
    assert ConnectionSettings().headers() == {}


def test_the_note_of_a_server_is_for_its_user_alone() -> None:
    state = ServerState(os.getpid(), "hush", {"http": 8000, "grpc": 8001, "metrics": 8002})
    write_state(state)
    assert read_state(8000) == read_state(8001) == state
    assert read_state(8002) is None
    for port in (8000, 8001):
        assert stat.S_IMODE(state_file(port).stat().st_mode) == 0o600
    assert stat.S_IMODE(state_file(8000).parent.stat().st_mode) == 0o700
    assert "hush" not in repr(state)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": "x", "secret": "s", "ports": {}}'])
def test_a_note_that_cannot_be_read_is_none(text: str) -> None:
    write_state(ServerState(os.getpid(), "hush", {"grpc": 8001}))
    state_file(8001).write_text(text)
    assert read_state(8001) is None


def test_a_note_that_others_can_read_proves_nothing() -> None:
    write_state(ServerState(os.getpid(), "hush", {"grpc": 8001}))
    state_file(8001).chmod(0o644)
    assert read_state(8001) is None


def test_the_note_of_a_server_that_is_gone_counts_no_more() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_state(ServerState(ended.pid, "hush", {"grpc": 8001}))
    assert read_state(8001) is None


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentError_, match="cannot write"):
        write_state(ServerState(os.getpid(), "hush", {"grpc": 8001}))
