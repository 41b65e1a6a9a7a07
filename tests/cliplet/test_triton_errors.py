"""What a failed call means, and how often it is tried."""

from __future__ import annotations

import pytest

from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.images import ImageError
from cliplet.server_address import ConnectionSettings, ServerAddress
from cliplet.triton_errors import (
    CallFailed,
    DeadlineExpired,
    ModelFailed,
    Patience,
    ServerAway,
    ServerBusy,
    explained,
    is_passing,
)

HERE = ServerAddress("127.0.0.1", 8001, "pets")
AWAY = ServerAway("away")
BUSY = ServerBusy("busy")
DEAD = ModelFailed("a model has died: Stub process 'pets_0_0' is not healthy.")


@pytest.mark.parametrize(
    ("code", "message", "kind", "passing"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses; last error: refused", ServerAway, True),
        ("UNAVAILABLE", "Socket closed", ServerAway, True),
        ("UNAVAILABLE", "Server is stopping, scheduler for model has stopped", ServerAway, True),
        ("UNAVAILABLE", "[request id: 7] Exceeds maximum queue size", ServerBusy, True),
        ("UNAVAILABLE", "Request timeout expired", DeadlineExpired, False),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExpired, False),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x'", UsageError, False),
        ("UNAUTHENTICATED", "This API is restricted, expecting header 'x'", UsageError, False),
        ("UNAVAILABLE", "Tls handshake failed: CERTIFICATE_VERIFY_FAILED", UsageError, False),
        ("UNAVAILABLE", "Ssl handshake failed: SSL_ERROR_SSL: WRONG_VERSION_NUMBER", UsageError, False),
        ("UNAVAILABLE", "Peer name pets is not in peer certificate", UsageError, False),
        ("UNAVAILABLE", "Ssl handshake failed: SSL_ERROR_SYSCALL: Connection reset", ServerAway, True),
        ("UNAVAILABLE", "Handshake read failed", ServerAway, True),
        ("NOT_FOUND", "Request for unknown model: 'x' is not found", UsageError, False),
        ("INVALID_ARGUMENT", "unexpected shape for input", DataError, False),
        ("INVALID_ARGUMENT", "[request id: <id_unknown>] decode: zero bytes", ImageError, False),
        ("INVALID_ARGUMENT", "image 2 of 3: decode: zero bytes", ImageError, False),
        ("INTERNAL", "Stub process 'pets_0_0' is not healthy.", ModelFailed, True),
        ("INTERNAL", "something broke", ModelFailed, False),
        ("", "", ModelFailed, False),
    ],
)
def test_what_a_failure_means(code: str, message: str, kind: type[ClipletError], passing: bool) -> None:
    error = explained(CallFailed(code, message), HERE, 3.0)
    assert type(error) is kind
    assert is_passing(error) == passing


def test_an_image_error_has_stage_and_reason() -> None:
    error = explained(CallFailed("INVALID_ARGUMENT", "decode: zero bytes"), HERE, 3.0)
    assert isinstance(error, ImageError)
    assert (error.stage, error.reason) == ("decode", "zero bytes")


def test_a_message_is_cut_to_its_essence() -> None:
    error = explained(CallFailed("UNAVAILABLE", "all failed; last error: a\x00\nb " + 1000 * "x"), HERE, 3.0)
    assert error.happened.startswith("triton://127.0.0.1:8001/pets does not answer: a b x")
    assert len(error.happened) < 400


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pauses(
    settings: ConnectionSettings, error: ClipletError, *, seconds_each: float = 0.0, most: int = 100
) -> list[float]:
    """The pauses between tries that all fail after so many seconds."""
    clock = Clock()
    patience = Patience(settings, clock=clock, chance=lambda: 0.5)
    found = []
    for _ in range(most):
        clock.now += seconds_each
        try:
            found.append(patience.pause(error))
        except ClipletError as final:
            assert final is error
            break
        clock.now += found[-1]
    return found


def test_pauses_double_up_to_a_limit() -> None:
    assert pauses(ConnectionSettings(retries=7), AWAY) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])


def test_what_will_not_pass_is_not_tried_again() -> None:
    for error in (DataError("no"), UsageError("no"), DeadlineExpired("late"), ModelFailed("broke")):
        assert pauses(ConnectionSettings(), error) == []


def test_no_retries() -> None:
    assert pauses(ConnectionSettings(retries=0), AWAY) == []


def test_the_deadline_ends_retries() -> None:
    found = pauses(ConnectionSettings(retries=100, deadline_s=3.0), BUSY, seconds_each=0.5)
    assert found == pytest.approx(
        [0.1, 0.2, 0.4]
    )  # 0.5 + 0.1 + 0.5 + 0.2 + 0.5 + 0.4 + 0.5, and 0.8 is too much


@pytest.mark.parametrize("error", [AWAY, BUSY, DEAD])
def test_a_server_that_is_away_is_waited_for_beyond_deadline_and_retries(error: ClipletError) -> None:
    settings = ConnectionSettings(retries=1, deadline_s=1.0, wait_s=30.0)
    found = pauses(settings, error)
    assert 30 <= sum(found) <= 34


def test_each_try_has_its_own_deadline_while_one_waits() -> None:
    clock = Clock()
    patience = Patience(ConnectionSettings(deadline_s=5.0, wait_s=60.0), clock=clock, chance=lambda: 0.5)
    clock.now += 4
    clock.now += patience.pause(AWAY)
    assert patience.left_s == pytest.approx(5.0)


def test_clients_do_not_come_back_all_at_once() -> None:
    first = {Patience(ConnectionSettings()).pause(AWAY) for _ in range(20)}
    assert len(first) == 20
    assert 0.05 <= min(first) <= max(first) <= 0.15
