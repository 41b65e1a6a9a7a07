"""A connection, of threads or of asyncio, whose server dies, stalls or cuts an answer off, without a server."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import pytest
from fake_backend import card

from cliplet import triton_calls
from cliplet.contract import GraphContract, TensorSpec
from cliplet.errors import ServerError
from cliplet.server_address import ConnectionSettings, ServerAddress
from cliplet.serving import ModelCard
from cliplet.triton_async import AsyncConnection
from cliplet.triton_calls import Connection, KnownServer
from cliplet.triton_errors import CallFailed, DeadlineExpired, ModelFailed, Patience, ServerAway
from cliplet.triton_wire import HttpWire, Request

LATE = CallFailed("DEADLINE_EXCEEDED", "Deadline Exceeded")
GONE = CallFailed("UNAVAILABLE", "connection refused")
HERE = ServerAddress("127.0.0.1", 8001, "pets")
# Seconds that a busy machine may need for what takes none.
LONG_S = 60.0
DEAD = CallFailed("INTERNAL", "Stub process 'pets_0_0' is not healthy.")
X = TensorSpec("x", "float32", ("N", 1))
Y = TensorSpec("y", "float32", ("N", 1))
DOUBLE = GraphContract("double", (X,), (Y,))
FEEDS = {"x": np.ones((1, 1), np.float32)}


class FakeWire:
    """A server that answers as it is told: an error for some calls, then results.

    Attributes:
        told: the card of its bundle.
        alive: whether it says which models it has.
        open: calls wait while it is not set.
        running, most: calls that are under way, and the most that ever were.
    """

    def __init__(
        self, failures: list[CallFailed] | None = None, registered: CallFailed | None = None
    ) -> None:
        self._failures, self._registered = failures or [], registered
        self._lock = threading.Lock()
        self.registrations = self.cards = self.running = self.most = 0
        self.told = card("pets")
        self.alive = True
        self.open = threading.Event()
        self.open.set()

    def infer(self, request: Request, timeout_s: float) -> dict[str, np.ndarray]:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            assert self.open.wait(LONG_S)
            if self._failures:
                raise self._failures.pop(0)
            return {"y": request.feeds["x"] * 2}
        finally:
            with self._lock:
                self.running -= 1

    def models(self, timeout_s: float) -> list[str]:
        if not self.alive:
            raise GONE
        return ["pets"]

    def card(self, model: str, timeout_s: float) -> str | None:
        self.cards += 1
        return self.told.to_json()

    def register(self, *given: Any) -> None:
        self.registrations += 1
        if self._registered is not None:
            raise self._registered

    def unregister(self, *given: Any) -> None:
        pass

    def close(self) -> None:
        pass


class Server(Protocol):
    """A connection of either kind, to call from threads."""

    def infer(self, deadline_s: float | None = None) -> Any: ...

    def card(self) -> ModelCard: ...


class OfThreads:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.card = connection.card

    def infer(self, deadline_s: float | None = None) -> Any:
        return self._connection.infer("pets", DOUBLE, FEEDS, deadline_s=deadline_s)["y"]


class OfAsyncio:
    def __init__(self, connection: AsyncConnection, loop: asyncio.AbstractEventLoop) -> None:
        self._connection, self._loop = connection, loop

    def infer(self, deadline_s: float | None = None) -> Any:
        return self._done(self._connection.infer("pets", DOUBLE, FEEDS, deadline_s=deadline_s))["y"]

    def card(self) -> ModelCard:
        return self._done(self._connection.card())

    def _done(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LONG_S)


Connect = Callable[..., Server]


def connected(wire: FakeWire, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Connection:
    monkeypatch.setattr(triton_calls, "open_wire", lambda *given: wire)
    monkeypatch.setattr(triton_calls, "sleep", lambda seconds: None)
    return Connection(HERE, ConnectionSettings(**{"shared_memory": "off", **settings}))


@contextmanager
def looping() -> Iterator[asyncio.AbstractEventLoop]:
    """Context with an event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(params=["threads", "asyncio"])
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Makes a connection to a fake server, which pauses for no time."""
    if request.param == "threads":
        yield lambda wire, **settings: OfThreads(connected(wire, monkeypatch, **settings))
        return
    whole = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: whole(0))
    for method, asked in (("_infer_once", "infer"), ("_models", "models"), ("_card_text", "card")):

        async def called(self: Any, *given: Any, asked: str = asked) -> Any:
            return await asyncio.to_thread(getattr(self.wire, asked), *given)

        monkeypatch.setattr(AsyncConnection, method, called)

    with looping() as loop:

        def opened(wire: FakeWire, **settings: Any) -> Server:
            monkeypatch.setattr(AsyncConnection, "_opened", lambda self: (None, None))
            connection = AsyncConnection(HERE, ConnectionSettings(**settings))
            connection.wire = wire  # type: ignore[attr-defined]
            return OfAsyncio(connection, loop)

        yield opened


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that comes true."""
    end = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


# Turns


def test_only_so_many_calls_are_under_way(connect: Connect) -> None:
    wire = FakeWire()
    wire.open.clear()
    server = connect(wire, in_flight=2)
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(server.infer) for _ in range(10)]
        until(lambda: wire.running == 2)
        time.sleep(0.2)  # in which others would begin, if they could
        wire.open.set()
        assert [one.result() for one in asked] == [2] * 10
    assert wire.most == 2


def test_waiting_for_a_turn_counts(connect: Connect) -> None:
    wire = FakeWire()
    wire.open.clear()
    server = connect(wire, in_flight=1)
    with ThreadPoolExecutor(1) as pool:
        first: Future[Any] = pool.submit(server.infer)
        until(lambda: wire.running == 1)
        with pytest.raises(DeadlineExpired, match=r"no turn within 0.1 s: at most 1 may be under way"):
            server.infer(deadline_s=0.1)
        wire.open.set()
        assert first.result() == 2
    assert server.infer() == 2
    assert wire.most == 1


def test_who_pauses_lets_others_go(monkeypatch: pytest.MonkeyPatch) -> None:
    server = connected(FakeWire([GONE, DEAD]), monkeypatch, in_flight=1, deadline_s=LONG_S)
    between: list[Any] = []
    monkeypatch.setattr(
        triton_calls, "sleep", lambda seconds: between.append(server.infer("pets", DOUBLE, FEEDS)["y"])
    )
    # The second call is made in the pause of the first, and the third in the pause of the second.
    assert server.infer("pets", DOUBLE, FEEDS)["y"] == 2
    assert between == [2, 2]


def test_a_call_that_failed_gives_its_turn_back(connect: Connect) -> None:
    server = connect(FakeWire([CallFailed("INTERNAL", "broken")] * 3), in_flight=1, deadline_s=LONG_S)
    for _ in range(3):
        with pytest.raises(ModelFailed):
            server.infer()
    assert server.infer() == 2


# Absence


def test_a_model_that_has_died_is_waited_for_and_told_once(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "cliplet"):
        assert connect(FakeWire([DEAD] * 20), retries=1, wait_s=LONG_S).infer() == 2
    waiting, back = [record.getMessage() for record in caplog.records]
    assert "has died: Stub process 'pets_0_0' is not healthy.; waiting for it, at most 60 s" in waiting
    assert "answers again after" in back


def test_without_waiting_a_dead_model_is_soon_an_error(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelFailed, match="has died"):
        connect(FakeWire([DEAD] * 20), retries=2).infer()
    assert caplog.records == []


def test_of_a_machine_that_is_gone_nothing_comes_back(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    wire = FakeWire([LATE] * 3)
    wire.alive = False
    assert connect(wire, wait_s=LONG_S).infer() == 2
    (waiting,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "no answer within 60 s; waiting for it" in waiting


def test_a_server_that_lives_is_late_and_not_away(connect: Connect) -> None:
    with pytest.raises(DeadlineExpired):
        connect(FakeWire([LATE] * 3), wait_s=LONG_S).infer()
    silent = FakeWire([LATE] * 3)
    silent.alive = False
    with pytest.raises(DeadlineExpired):
        connect(silent).infer()


@pytest.mark.parametrize("failures", [[GONE], []])
def test_another_bundle_is_refused_for_good(
    connect: Connect, failures: list[CallFailed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not a call failed while it took the other one's place."""
    wire = FakeWire()
    server = connect(wire, wait_s=LONG_S)
    assert server.card().to_json() == wire.told.to_json()
    assert server.infer() == 2
    wire._failures += failures
    wire.told = card("pets", classes=("other",))
    monkeypatch.setattr(triton_calls, "SURELY_SAME_S", 1e9 if failures else -1)
    for _ in range(2):
        with pytest.raises(ServerError, match="came back with another bundle"):
            server.infer()


def test_a_server_that_comes_back_as_it_was_is_gone_on_with(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_calls, "SURELY_SAME_S", 1e9)
    wire = FakeWire()
    server = connect(wire, wait_s=LONG_S)
    assert server.card() == server.card()
    wire._failures += [GONE] * 2
    assert (server.infer(), server.infer(), wire.cards) == (2, 2, 2)


def test_a_comparison_that_fails_is_made_later(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_calls, "SURELY_SAME_S", 1e9)
    wire, told = FakeWire(), FakeWire.card
    server = connect(wire, retries=0)
    server.card()

    def breaks(self: FakeWire, *given: Any) -> str | None:
        monkeypatch.setattr(FakeWire, "card", told)
        self.told = card("pets", classes=("other",))
        raise GONE

    monkeypatch.setattr(FakeWire, "card", breaks)
    wire._failures.append(CallFailed("NOT_FOUND", "unknown model"))
    with pytest.raises(ServerAway):
        server.infer()
    with pytest.raises(ServerError, match="came back with another bundle"):
        server.infer()


def test_silence_and_failures_are_reasons_for_doubt() -> None:
    now = 100.0
    known = KnownServer(HERE, ConnectionSettings(), clock=lambda: now)
    now += 0.4
    assert not known.heard(now)
    now += 0.4
    assert not known.heard(now)
    now += 0.6
    assert known.heard(now) and not known.heard(now)
    sent_at = now + 0.1
    now += 5
    assert not known.heard(sent_at), "it took its time"
    known.pause(Patience(ConnectionSettings()), ServerAway("gone"), GONE)
    assert known.heard(now) and not known.heard(now)


def test_ctrl_c_does_not_wait_for_a_dead_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(FakeWire([DEAD] * 20), monkeypatch, wait_s=60) as server:
        server.stop_waiting()
        with pytest.raises(ServerError, match="has died"):
            server.infer("pets", DOUBLE, FEEDS)


# Shared memory


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


# HTTP


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
        thread.join(LONG_S)


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
        assert wire.models(LONG_S) == []
        assert wire.models(LONG_S) == []
        wire.close()


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(answer(b"{", 99), "in the middle of an answer"), (b"gibberish\r\n\r\n", "does not speak HTTP")],
)
def test_an_answer_that_breaks_off_on_a_new_connection_is_a_failed_call(broken: bytes, reason: str) -> None:
    with listening([[broken]]) as port:
        wire = HttpWire(ServerAddress("127.0.0.1", port, None, True), ConnectionSettings())
        with pytest.raises(CallFailed, match=reason) as failed:
            wire.models(LONG_S)
        assert failed.value.code == "UNAVAILABLE"


@pytest.mark.parametrize("whole", [0, len(answer(b"", 9999))])
def test_an_answer_that_drips_meets_the_deadline(whole: int) -> None:
    """Each piece comes soon after the one before, of the head or of the body."""
    text = answer(b" " * 9999)
    given_up = threading.Event()

    def drip(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer, suppress(OSError):
            peer.recv(65536)
            peer.sendall(text[:whole])
            for at in range(whole, len(text)):
                if given_up.wait(0.02):
                    return
                peer.sendall(text[at : at + 1])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,), daemon=True)
        thread.start()
        wire = HttpWire(
            ServerAddress("127.0.0.1", listener.getsockname()[1], None, True), ConnectionSettings()
        )
        began = time.monotonic()
        with pytest.raises(CallFailed) as failed:
            wire.models(0.3)
        assert failed.value.code == "DEADLINE_EXCEEDED"
        assert time.monotonic() - began < LONG_S  # the whole answer takes 200 s
        given_up.set()
        thread.join(LONG_S)


def test_a_second_exchange_has_the_time_that_the_first_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[float] = []

    def exchange(self: HttpWire, connection: Any, method: str, path: str, body: bytes, *given: Any) -> Any:
        ends.append(given[-1])
        if len(ends) == 1:
            raise ConnectionResetError
        return b'{"model_stats": []}', {}

    monkeypatch.setattr(HttpWire, "_exchange", exchange)
    wire = HttpWire(ServerAddress("127.0.0.1", 9, None, True), ConnectionSettings())
    wire._idle.append(wire._connection())
    assert wire.models(5) == []
    assert len(ends) == 2 and ends[0] == ends[1]


def test_an_answer_after_which_the_connection_ends_is_read() -> None:
    ended = NONE.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    with listening([[ended], [ended]]) as port:
        wire = HttpWire(ServerAddress("127.0.0.1", port, None, True), ConnectionSettings())
        assert wire.models(LONG_S) == wire.models(LONG_S) == []
        wire.close()
