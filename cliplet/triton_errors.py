"""What a failed call to a server means, and whether it is worth another try.

Triton tells failures apart by a code and a sentence; some codes stand for several things, so the sentence decides.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from time import monotonic

from cliplet.errors import ClipletError, DataError, ServerError, UsageError
from cliplet.images import ImageError
from cliplet.server_address import TOKEN_VARIABLE, ConnectionSettings, ServerAddress
from cliplet.serving import parse_image_problem

# Seconds before the second try; doubled with each further one.
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
# Of HTTP, as gRPC calls them.
HTTP_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    429: "UNAVAILABLE",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_QUEUE_FULL = re.compile("exceeds maximum queue size", re.IGNORECASE)
_IN_QUEUE_TOO_LONG = re.compile("timeout expired", re.IGNORECASE)
_CLOSED_DOOR = re.compile("is restricted, expecting header", re.IGNORECASE)
# A handshake alone may also break off because the server is just stopping.
_UNTRUSTED = re.compile("certificate|wrong.version.number|hostname verification", re.IGNORECASE)
# A Python model whose process died. Triton never starts another one: whoever supervises the server has to.
_STUB = re.compile("stub process|failed to (increase|lock|create) .*(shared memory|stub)", re.IGNORECASE)
_REQUEST_ID = re.compile(r"^\[request id: [^\]]*\]\s*")
_FORGOTTEN_REGION = re.compile(
    "unable to find shared memory region|shared memory region .*not", re.IGNORECASE
)


class CallFailed(Exception):
    """A call that was not answered as it should be, in Triton's words.

    Attributes:
        code: such as `UNAVAILABLE`, as gRPC names them.
        message: of the server, or of the system.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = _REQUEST_ID.sub("", message)

    @property
    def forgot_region(self) -> bool:
        """Whether the server does not know the shared memory that the call named: it is another one by now."""
        return _FORGOTTEN_REGION.search(self.message) is not None


class NoTurn(CallFailed):
    """A call that was never sent, as others were under way for as long as it had time."""

    def __init__(self, in_flight: int) -> None:
        super().__init__("DEADLINE_EXCEEDED", f"at most {in_flight} may be under way")


class ServerAway(ServerError):
    """Nobody answers there, or one who is just stopping or starting."""


class ServerBusy(ServerError):
    """The server refused the request because too many are waiting."""


class DeadlineExpired(ServerError):
    """There was no answer within the deadline."""


class ModelFailed(ServerError):
    """The server answers, but its model failed."""


def explained(failed: CallFailed, address: ServerAddress, deadline_s: float) -> ClipletError:
    """What to raise for a failed call: a `ServerError`, or what is wrong with the request."""
    code, message = failed.code, failed.message
    said = _essence(message)
    if _CLOSED_DOOR.search(message) or code == "UNAUTHENTICATED":
        return UsageError(
            f"{address} refuses the call: {said}",
            "the token that the server was started with",
            f"export {TOKEN_VARIABLE}=…",
        )
    if isinstance(failed, NoTurn):
        return DeadlineExpired(
            f"a request to {address} got no turn within {deadline_s:.3g} s: {said}",
            "fewer requests that wait",
            "send more at a time (in_flight, --in-flight), or allow more time with --deadline",
        )
    if code == "DEADLINE_EXCEEDED" or _IN_QUEUE_TOO_LONG.search(message):
        return DeadlineExpired(
            f"{address} gave no answer within {deadline_s:.3g} s",
            "a server that is not overloaded",
            "look at its /readyz and its log, or allow more time with --deadline",
        )
    if _QUEUE_FULL.search(message):
        return ServerBusy(
            f"{address} is busy: {said}",
            "room in its queue",
            "send fewer requests at a time (--in-flight), or serve with a larger --max-queue",
        )
    parts = parse_image_problem(message)
    if parts is not None:
        return ImageError(*parts)
    if code == "UNAVAILABLE":
        return _away(address, said)
    if code == "NOT_FOUND":
        return UsageError(f"{address}: {said}", "a model that it serves")
    if code in ("INVALID_ARGUMENT", "OUT_OF_RANGE", "UNIMPLEMENTED"):
        return DataError(f"{address} refused the request: {said}", "tensors as its model takes them")
    if _STUB.search(message):
        return ModelFailed(
            f"a model of {address} has died: {said}", "a model that computes", "look at the server's log"
        )
    return ModelFailed(f"{address} failed: {said}", "a model that computes", "look at the server's log")


def _away(address: ServerAddress, said: str) -> ClipletError:
    if _UNTRUSTED.search(said):
        return UsageError(
            f"no trusted connection to {address}: {said}",
            "a server with TLS whose certificate is trusted and names this host",
            "--ca FILE with the certificate, or triton:// for a server without TLS",
        )
    return ServerAway(
        f"{address} does not answer: {said}",
        "a running server (gRPC has port 8001, HTTP 8000)",
        "cliplet serve BUNDLE",
    )


def _essence(message: str) -> str:
    """The sentence that says it, without what libraries put around it."""
    text = "".join(c if c.isprintable() else " " for c in message)
    text = " ".join(text.split())
    text = text.rpartition("last error: ")[2] or text
    return text if len(text) <= 300 else text[:299] + "…"


def is_passing(error: ClipletError) -> bool:
    """Whether the same call may succeed a moment later."""
    return isinstance(error, ServerBusy) or is_gone(error)


def is_gone(error: ClipletError) -> bool:
    """Whether nobody computes there for now: the server is away, or its model has died."""
    return isinstance(error, ServerAway) or (
        isinstance(error, ModelFailed) and _STUB.search(error.happened) is not None
    )


class Patience:
    """How long one call is tried: pauses between tries, until retries, deadline and waiting are used up.

    While a server is away, its queue is full or its model has died, and `wait_s` is not used up, neither tries nor
    seconds count: a call that was cut off is asked anew.

    Args:
        clock, chance: for tests: seconds that only grow, and a number in 0..1.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        deadline_s: float | None = None,
        *,
        clock: Callable[[], float] = monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.deadline_s = settings.deadline_s if deadline_s is None else deadline_s
        self._settings, self._clock, self._chance = settings, clock, chance
        self._tries = 0
        self._begun = clock()
        self._waiting_since: float | None = None

    @property
    def left_s(self) -> float:
        """Seconds that are left to this try."""
        return max(1e-3, self._begun + self.deadline_s - self._clock())

    def pause(self, error: ClipletError) -> float:
        """Seconds to let pass before the next try; raises `error` where there is none."""
        if not is_passing(error):
            raise error
        seconds = min(FIRST_PAUSE_S * 2.0 ** min(self._tries, 10), LONGEST_PAUSE_S) * (0.5 + self._chance())
        self._tries += 1
        if self._may_wait():
            self._begun = self._clock() + seconds
            return seconds
        if self._tries > self._settings.retries or seconds >= self.left_s:
            raise error
        return seconds

    def _may_wait(self) -> bool:
        now = self._clock()
        if self._waiting_since is None:
            self._waiting_since = now
        return now - self._waiting_since < self._settings.wait_s
