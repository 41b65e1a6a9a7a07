"""A connection whose server dies, stalls or cuts an answer off, without a server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from cliplet import triton_calls
from cliplet.contract import GraphContract, TensorSpec
from cliplet.errors import ServerError
from cliplet.server_address import ConnectionSettings, ServerAddress
from cliplet.triton_calls import Connection
from cliplet.triton_errors import CallFailed, ModelFailed
from cliplet.triton_wire import HttpWire, Request

DEAD = CallFailed("INTERNAL", "Stub process 'pets_0_0' is not healthy.")
X = TensorSpec("x", "float32", ("N", 1))
Y = TensorSpec("y", "float32", ("N", 1))
DOUBLE = GraphContract("double", (X,), (Y,))
FEEDS = {"x": np.ones((1, 1), np.float32)}


class FakeWire:
    """A server that answers as it is told: an error for some calls, then results."""

    def __init__(self, failures: list[CallFailed], registered: CallFailed | None = None) -> None:
        self._failures, self._registered = failures, registered
        self.registrations = 0

    def infer(self, request: Request, timeout_s: float) -> dict[str, np.ndarray]:
        if self._failures:
            raise self._failures.pop(0)
        return {"y": request.feeds["x"] * 2}

    def register(self, *given: Any) -> None:
        self.registrations += 1
        if self._registered is not None:
            raise self._registered

    def unregister(self, *given: Any) -> None:
        pass

    def close(self) -> None:
        pass


def connected(wire: FakeWire, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Connection:
    monkeypatch.setattr(triton_calls, "open_wire", lambda *given: wire)
    monkeypatch.setattr(triton_calls, "sleep", lambda seconds: None)
    return Connection(
        ServerAddress("127.0.0.1", 8001), ConnectionSettings(**{"shared_memory": "off", **settings})
    )


def test_a_model_that_has_died_is_waited_for_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wire = FakeWire([DEAD] * 20)
    with (
        caplog.at_level("INFO", "cliplet"),
        connected(wire, monkeypatch, retries=1, wait_s=60) as server,
    ):
        assert server.infer("pets", DOUBLE, FEEDS)["y"] == 2
    waiting, back = [record.getMessage() for record in caplog.records]
    assert "has died: Stub process 'pets_0_0' is not healthy.; waiting for it, at most 60 s" in waiting
    assert "answers again after" in back


def test_without_waiting_a_dead_model_is_soon_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        connected(FakeWire([DEAD] * 20), monkeypatch, retries=2) as server,
        pytest.raises(ModelFailed, match="has died"),
    ):
        server.infer("pets", DOUBLE, FEEDS)


def test_ctrl_c_does_not_wait_for_a_dead_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(FakeWire([DEAD] * 20), monkeypatch, wait_s=60) as server:
        server.stop_waiting()
        with pytest.raises(ServerError, match="has died"):
            server.infer("pets", DOUBLE, FEEDS)


@pytest.mark.parametrize(
    "said",
    [
        CallFailed("ALREADY_EXISTS", "no"),
        CallFailed("INTERNAL", "shared memory region 'cliplet-1-a' already in manager"),
    ],
)
def test_memory_that_the_server_knows_already_is_shown(
    said: CallFailed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "_secret", lambda self: "secret")
    wire = FakeWire([], said)
    with connected(wire, monkeypatch, shared_memory="on") as server:
        assert server.infer("pets", DOUBLE, FEEDS)["y"] == 2
        assert server.shares_memory
    assert wire.registrations == 1


@contextmanager
def listening(answers: list[list[bytes]]) -> Iterator[int]:
    """Context with a port where each connection is given so many answers, and is then closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for connection in answers:
                peer, _ = listener.accept()
                with peer:
                    for answer in connection:
                        peer.recv(65536)
                        peer.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(5)


def answer(body: bytes, length: int | None = None) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (
        len(body) if length is None else length,
        body,
    )


NONE = answer(b'{"model_stats": []}')


@pytest.mark.parametrize("broken", [answer(b"{", 99), b"gibberish\r\n\r\n", b""])
def test_an_answer_that_breaks_off_on_a_kept_connection_is_asked_for_anew(broken: bytes) -> None:
    with listening([[NONE, broken], [NONE]]) as port:
        wire = HttpWire(ServerAddress("127.0.0.1", port, None, True), ConnectionSettings())
        assert wire.models(5) == []
        assert wire.models(5) == []
        wire.close()


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(answer(b"{", 99), "in the middle of an answer"), (b"gibberish\r\n\r\n", "does not speak HTTP")],
)
def test_an_answer_that_breaks_off_on_a_new_connection_is_a_failed_call(broken: bytes, reason: str) -> None:
    with listening([[broken]]) as port:
        wire = HttpWire(ServerAddress("127.0.0.1", port, None, True), ConnectionSettings())
        with pytest.raises(CallFailed, match=reason) as failed:
            wire.models(5)
        assert failed.value.code == "UNAVAILABLE"
