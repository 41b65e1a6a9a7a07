"""A connection to a server: what it serves, and inferences that are tried again where that may help.

    with Connection(ServerAddress.parse("triton://127.0.0.1:8001"), ConnectionSettings()) as server:
        card = server.card()
        outputs = server.infer(card.graph, card.manifest.contract, feeds)

May be used by many threads at once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from time import monotonic, sleep
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from cliplet.contract import GraphContract, TensorSpec
from cliplet.errors import ClipletError, EnvironmentError_, ServerError, UsageError
from cliplet.server_address import ConnectionSettings, ServerAddress, read_state
from cliplet.serving import ModelCard
from cliplet.shared_segments import NoSharedMemory, Segment, SegmentPool, sweep
from cliplet.triton_errors import (
    CallFailed,
    DeadlineExpired,
    NoTurn,
    Patience,
    ServerAway,
    explained,
    is_gone,
)
from cliplet.triton_wire import Region, Request, open_wire

T = TypeVar("T")
log = logging.getLogger("cliplet")
# Of calls that any server answers at once.
QUICK_S = 5.0
# Silence in which one server cannot have ended and another one have started and loaded its models.
SURELY_SAME_S = 0.5


class Connection:
    """A server that answers, or will; a context manager that ends the connection.

    Attributes:
        shares_memory: tensors go through memory that both see.

    Raises:
        UsageError: shared memory was asked for and cannot be had.
    """

    def __init__(self, address: ServerAddress, settings: ConnectionSettings | None = None) -> None:
        self.address = address
        self.settings = settings or ConnectionSettings()
        self._wire = open_wire(address, self.settings)
        self._pool = SegmentPool(self._show, self._hide)
        self._turns = threading.BoundedSemaphore(self.settings.in_flight)
        self._known = KnownServer(address, self.settings)
        self._lock = threading.RLock()
        self._waits = True
        self._checking = False
        self.shares_memory = False
        if self.settings.shared_memory != "off":
            self._share_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_local(self) -> bool:
        """Whether the server was found to run on this machine, for this user."""
        return self._secret() is not None

    def close(self) -> None:
        """Give shared memory back and end the connection."""
        self._pool.close()
        self._wire.close()

    def stop_waiting(self) -> None:
        """Wait no longer for the server where it is away; calls that do end soon. A signal's handler may call it."""
        self._waits = False

    # What it serves

    def served(self) -> tuple[str, ...]:
        """Names of the bundles that it serves.

        Raises:
            ServerError: it does not answer.
            UsageError: it wants another token.
        """
        models = self._tried(lambda patience: self._wire.models(patience.left_s))
        cards = {model: self._known_card_text(model) for model in sorted(set(models))}
        return tuple(model for model, text in cards.items() if text is not None)

    def card(self, name: str | None = None) -> ModelCard:
        """What it tells of a bundle: of that name, of the address's, or of its only one.

        Raises:
            ServerError: it does not answer.
            UsageError: it serves no such bundle, or several and none was named.
            ArtifactError: it was started by another version.
        """
        name = name or self.address.name
        if name is None:
            served = self.served()
            if len(served) != 1:
                raise unnamed(self.address, served)
            (name,) = served
        if name not in self._known.cards:
            self._known.cards[name] = self._fetched_card(name)
        return self._known.cards[name]

    def _fetched_card(self, name: str) -> ModelCard:
        text = self._known_card_text(name)
        if text is None:
            raise not_served(self.address, name, self.served())
        return read_card(text, self.address, name)

    def _known_card_text(self, model: str) -> str | None:
        """The card in a model's configuration; None if there is none, or no such model."""
        try:
            return self._tried(lambda patience: self._wire.card(model, patience.left_s))
        except UsageError as error:
            if is_unknown(error):
                return None
            raise

    # Inference

    def infer(
        self,
        model: str,
        contract: GraphContract,
        feeds: Mapping[str, np.ndarray],
        more: tuple[TensorSpec, ...] = (),
        *,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> dict[str, np.ndarray]:
        """Outputs by name: those of the contract, and `more`. At most `in_flight` inferences are under way at a time.

        Args:
            deadline_s: in place of the connection's; waiting for a turn counts.
            priority: 1 goes before others; 0 leaves it to the server.

        Raises:
            DataError: the feeds or the answer do not fit the contract, or the server refuses them; an
                `ImageError` where it refuses an image.
            ServerError: it is away, busy, too slow, or its model failed.
            UsageError: it wants another token, or does not know the model.
        """
        request = checked_request(model, contract, feeds, more, priority)
        outputs = self._tried(lambda patience: self._infer_in_turn(request, patience), deadline_s)
        hold_answer(contract, feeds, more, outputs)
        return outputs

    def _infer_in_turn(self, request: Request, patience: Patience) -> dict[str, np.ndarray]:
        # Of one try alone: who pauses before the next one lets others go.
        if not self._turns.acquire(timeout=patience.left_s):
            raise NoTurn(self.settings.in_flight)
        try:
            return self._infer_once(request, patience)
        finally:
            self._turns.release()

    def _infer_once(self, request: Request, patience: Patience) -> dict[str, np.ndarray]:
        try:
            with self._regions(request.feeds) as regions:
                return self._wire.infer(replace(request, regions=regions), patience.left_s)
        except CallFailed as failed:
            if failed.code == "NOT_FOUND":
                # The server was started anew, and nobody noticed so far.
                self._known.doubted = True
                self._pool.server_forgot()
            if not failed.forgot_region:
                raise
        with self._regions(request.feeds) as regions:
            return self._wire.infer(replace(request, regions=regions), patience.left_s)

    # Trying again

    def _tried(self, call: Callable[[Patience], T], deadline_s: float | None = None) -> T:
        """What a call returns, tried until it does or patience ends."""
        patience = Patience(self.settings, deadline_s)
        while True:
            sent_at = self._known.now()
            try:
                found = call(patience)
            except CallFailed as failed:
                error = self._explained(failed, patience)
                if is_answer(error):
                    self._answered(sent_at)
                sleep(self._known.pause(patience, error, failed))
                if is_gone(error) and not self._waits:
                    raise error from failed
            else:
                self._answered(sent_at)
                return found

    def _explained(self, failed: CallFailed, patience: Patience) -> ClipletError:
        error = explained(failed, self.address, patience.deadline_s)
        if may_be_away(error, self.settings) and not self._is_alive():
            return away(error)
        return error

    def _is_alive(self) -> bool:
        try:
            self._wire.models(QUICK_S)
        except CallFailed:
            return False
        return True

    def _answered(self, sent_at: float) -> None:
        """After an absence: whether it is still the same server, as far as results go. Nobody goes on before."""
        with self._lock:
            missed = self._known.doubted
            if self._checking or not self._known.heard(sent_at):
                return
            # One that was only silent mostly is the same, and would keep what it is never told to forget.
            if missed:
                self._pool.server_forgot()
            self._checking = True
            try:
                for name in list(self._known.cards):
                    self._known.hold(name, self._fetched_card(name))
            except BaseException:
                self._known.doubted = True
                raise
            finally:
                self._checking = False

    # Shared memory

    def _share_memory(self) -> None:
        wanted = self.settings.shared_memory == "on"
        if not self.is_local:
            if wanted:
                raise UsageError(
                    f"--shared-memory on, but {self.address} is not known to be this user's server on this machine",
                    "a server that `cliplet serve` started here, for the same user and cache folder",
                    "leave --shared-memory out: tensors then go through the connection",
                )
            return
        self.shares_memory = True
        with suppress(CallFailed):
            sweep(self._hide)

    @contextmanager
    def _regions(self, feeds: Mapping[str, np.ndarray]) -> Iterator[Mapping[str, Region]]:
        """Context in which feeds lie in shared memory, if that is used; where each lies."""
        with ExitStack() as stack:
            regions: Mapping[str, Region] = {}
            if self.shares_memory and all(array.dtype != object for array in feeds.values()):
                try:
                    regions = stack.enter_context(self._pool.placed(feeds))
                except NoSharedMemory as error:
                    self._without_memory(error)
            yield regions

    def _without_memory(self, error: EnvironmentError_) -> None:
        if self.settings.shared_memory == "on":
            raise error
        with self._lock:
            first, self.shares_memory = self.shares_memory, False
        if first:
            log.warning("%s; tensors go through the connection instead, which is slower", error.happened)

    def _secret(self) -> str | None:
        state = read_state(self.address.port) if self.address.is_loopback else None
        return None if state is None else state.secret

    def _show(self, segment: Segment) -> None:
        secret = self._secret()
        if secret is None:
            raise CallFailed("UNAVAILABLE", "the server has left no note on this machine; it is gone")
        try:
            self._wire.register(segment.name, segment.key, segment.size, secret, QUICK_S)
        except CallFailed as failed:
            # The same server after a stall: no other segment ever has this name.
            if failed.code == "ALREADY_EXISTS" or "already in manager" in failed.message:
                return
            if failed.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                raise
            raise _CannotShow(f"{self.address} cannot see shared memory: {failed.message}") from failed

    def _hide(self, name: str) -> None:
        # A server that is gone has forgotten it anyway.
        with suppress(CallFailed):
            self._wire.unregister(name, self._secret() or "", QUICK_S)


class KnownServer:
    """What a connection, of threads or of asyncio, knows of its server, so that another one in its place is noticed.

    Attributes:
        cards: of the bundles that were asked for, as they were then.
        doubted: it may be another one by now; after its next answer, `cards` have to be compared with its own.
    """

    def __init__(
        self, address: ServerAddress, settings: ConnectionSettings, *, clock: Callable[[], float] = monotonic
    ) -> None:
        self.cards: dict[str, ModelCard] = {}
        self.doubted = False
        self._address, self._settings, self._clock = address, settings, clock
        self._lock = threading.Lock()
        self._heard_at = clock()
        self._away_since: float | None = None
        self._changed: str | None = None

    def pause(self, patience: Patience, error: ClipletError, failed: CallFailed) -> float:
        """Seconds until a failed call is tried again; raises `error` where it is not. Says once that it is away."""
        try:
            seconds = patience.pause(error)
        except ClipletError as final:
            raise final from failed
        if is_gone(error):
            self._missed(error)
        return seconds

    def now(self) -> float:
        return self._clock()

    def heard(self, sent_at: float) -> bool:
        """Note an answer; whether `cards` have to be compared before anybody goes on.

        Between two calls a server may be replaced without a call that fails, so that silence is a reason, too; one
        that takes its time for an answer is not silent.

        Args:
            sent_at: when it was asked, by `now`.

        Raises:
            ServerError: they were compared before, and differ.
        """
        if self._changed is not None:
            raise self._other(self._changed)
        with self._lock:
            now = self._clock()
            silent, self._heard_at = sent_at - self._heard_at > SURELY_SAME_S, now
            # Not after the comparison: what is missed during it is a reason to compare again.
            doubted, self.doubted = self.doubted or silent, False
            since = self._away_since
            if doubted:
                self._away_since = None
        if since is not None and doubted:
            log.info("%s answers again after %.0f s", self._address, now - since)
        return doubted

    def hold(self, name: str, card: ModelCard) -> None:
        """Raise `ServerError` if a bundle's card is not as it was."""
        if card.to_json() != self.cards[name].to_json():
            self._changed = name
            raise self._other(name)

    def _missed(self, error: ClipletError) -> None:
        with self._lock:
            first, self._away_since = self._away_since is None, self._away_since or self._clock()
            self.doubted = True
        if first and self._settings.wait_s:
            log.warning("%s; waiting for it, at most %.0f s", error.happened, self._settings.wait_s)

    def _other(self, name: str) -> ServerError:
        return ServerError(
            f"{self._address} came back with another bundle, engine or thresholds as {name!r}",
            "the one that this work began with",
            "serve that one again, and the same command continues",
        )


class _CannotShow(NoSharedMemory):
    """The server answers, but does not see this process's shared memory, as from within a container."""


def checked_request(
    model: str,
    contract: GraphContract,
    feeds: Mapping[str, np.ndarray],
    more: tuple[TensorSpec, ...],
    priority: int,
) -> Request:
    """A request for all outputs of a contract, and `more`; `DataError` if the feeds do not fit it."""
    contract.check_feeds(feeds)
    whole = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    return Request(model, whole, [spec.name for spec in (*contract.outputs, *more)], {}, priority)


def hold_answer(
    contract: GraphContract,
    feeds: Mapping[str, np.ndarray],
    more: tuple[TensorSpec, ...],
    outputs: Mapping[str, np.ndarray],
) -> None:
    """Raise `DataError` unless an answer is what was asked for."""
    GraphContract(contract.name, contract.inputs, (*contract.outputs, *more)).check_outputs(feeds, outputs)


def is_answer(error: ClipletError) -> bool:
    """Whether a failed call was answered all the same: with what is wrong with it, or that there is no room."""
    return not (isinstance(error, DeadlineExpired) or is_gone(error))


def may_be_away(error: ClipletError, settings: ConnectionSettings) -> bool:
    """Whether to look after a server that is late: of a machine that is gone nothing comes back, not even a refusal."""
    return isinstance(error, DeadlineExpired) and settings.wait_s > 0


def away(error: ClipletError) -> ServerAway:
    """The error of a server that proved to be away, not late."""
    return ServerAway(error.happened, error.expected, error.fix)


def is_unknown(error: ClipletError) -> bool:
    """Whether the server does not know the model that was asked for."""
    return isinstance(error.__cause__, CallFailed) and error.__cause__.code == "NOT_FOUND"


def read_card(text: str, address: ServerAddress, name: str) -> ModelCard:
    """A served bundle's card; `ArtifactError` if another version wrote it."""
    return ModelCard.from_json(text, f"{address}, model {name!r},")


def unnamed(address: ServerAddress, served: tuple[str, ...]) -> UsageError:
    """The error of an address without a name, of a server without just one bundle."""
    if not served:
        return UsageError(
            f"{address} serves no bundle", "a server that cliplet started", "cliplet serve BUNDLE"
        )
    return UsageError(
        f"{address} serves {len(served)} bundles: {', '.join(served)}",
        "the name of one of them",
        f"--model {address}/{served[0]}",
    )


def not_served(address: ServerAddress, name: str, served: tuple[str, ...]) -> UsageError:
    """The error of an address with a name that its server does not know."""
    others = ", ".join(served) or "none"
    return UsageError(f"{address} serves no bundle {name!r}", f"one of those that it serves: {others}")
