"""A connection to a server for asyncio: the same calls, turns, patience and errors as `cliplet.triton_calls`.

Tensors go through the connection: what is asked for from asyncio is mostly encoded images. Who will wait no longer
cancels the task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np

from cliplet.contract import GraphContract, TensorSpec
from cliplet.errors import ClipletError, UsageError
from cliplet.server_address import ConnectionSettings, ServerAddress
from cliplet.serving import CARD_KEY, ModelCard
from cliplet.triton_calls import (
    QUICK_S,
    KnownServer,
    away,
    checked_request,
    hold_answer,
    is_answer,
    is_unknown,
    may_be_away,
    not_served,
    read_card,
    unnamed,
)
from cliplet.triton_errors import HTTP_CODES, CallFailed, NoTurn, Patience, explained
from cliplet.triton_wire import Request, failed_by_grpc, grpc_channel, tls_context

T = TypeVar("T")


class AsyncConnection:
    """A server that answers, or will. Nothing is sent before the first call."""

    def __init__(self, address: ServerAddress, settings: ConnectionSettings | None = None) -> None:
        self.address = address
        self.settings = settings or ConnectionSettings()
        self._headers = self.settings.headers(address.headers_prefix)
        self._turns = asyncio.BoundedSemaphore(self.settings.in_flight)
        self._known = KnownServer(address, self.settings)
        self._lock = asyncio.Lock()
        self._checking: asyncio.Task[Any] | None = None
        self._module, self._client = self._opened()

    async def close(self) -> None:
        """End the connection."""
        await self._client.close()

    async def served(self) -> tuple[str, ...]:
        """Names of the bundles that it serves; see `Connection.served`."""
        names = await self._tried(lambda patience: self._models(patience.left_s))
        return tuple([name for name in names if await self._known_card_text(name) is not None])

    async def card(self, name: str | None = None) -> ModelCard:
        """What it tells of a bundle; see `Connection.card`."""
        name = name or self.address.name
        if name is None:
            served = await self.served()
            if len(served) != 1:
                raise unnamed(self.address, served)
            (name,) = served
        if name not in self._known.cards:
            self._known.cards[name] = await self._fetched_card(name)
        return self._known.cards[name]

    async def _fetched_card(self, name: str) -> ModelCard:
        text = await self._known_card_text(name)
        if text is None:
            raise not_served(self.address, name, await self.served())
        return read_card(text, self.address, name)

    async def _known_card_text(self, model: str) -> str | None:
        """The card in a model's configuration; None if there is none, or no such model."""
        try:
            return await self._tried(lambda patience: self._card_text(model, patience.left_s))
        except UsageError as error:
            if is_unknown(error):
                return None
            raise

    async def infer(
        self,
        model: str,
        contract: GraphContract,
        feeds: Mapping[str, np.ndarray],
        more: tuple[TensorSpec, ...] = (),
        *,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> dict[str, np.ndarray]:
        """Outputs by name; see `Connection.infer`."""
        request = checked_request(model, contract, feeds, more, priority)
        found = await self._tried(lambda patience: self._inferred(request, patience), deadline_s)
        hold_answer(contract, feeds, more, found)
        return found

    async def _inferred(self, request: Request, patience: Patience) -> dict[str, np.ndarray]:
        async with self._turn(patience):
            try:
                return await self._infer_once(request, patience.left_s)
            except CallFailed as failed:
                # Else the server was started anew, and nobody noticed so far.
                self._known.doubted |= failed.code == "NOT_FOUND"
                raise

    @asynccontextmanager
    async def _turn(self, patience: Patience) -> AsyncIterator[None]:
        """Context of one try: who pauses before the next one lets others go."""
        try:
            async with asyncio.timeout(patience.left_s):
                await self._turns.acquire()
        except TimeoutError as error:
            raise NoTurn(self.settings.in_flight) from error
        try:
            yield
        finally:
            self._turns.release()

    # Trying again

    async def _tried(self, call: Callable[[Patience], Awaitable[T]], deadline_s: float | None = None) -> T:
        """What a call returns, tried until it does or patience ends."""
        patience = Patience(self.settings, deadline_s)
        while True:
            sent_at = self._known.now()
            try:
                found = await call(patience)
            except CallFailed as failed:
                error = await self._explained(failed, patience)
                if is_answer(error):
                    await self._answered(sent_at)
                await asyncio.sleep(self._known.pause(patience, error, failed))
            else:
                await self._answered(sent_at)
                return found

    async def _explained(self, failed: CallFailed, patience: Patience) -> ClipletError:
        error = explained(failed, self.address, patience.deadline_s)
        if may_be_away(error, self.settings) and not await self._is_alive():
            return away(error)
        return error

    async def _is_alive(self) -> bool:
        try:
            await self._models(QUICK_S)
        except CallFailed:
            return False
        return True

    async def _answered(self, sent_at: float) -> None:
        """See `Connection._answered`."""
        if self._checking is asyncio.current_task():
            return
        async with self._lock:
            if not self._known.heard(sent_at):
                return
            self._checking = asyncio.current_task()
            try:
                for name in list(self._known.cards):
                    self._known.hold(name, await self._fetched_card(name))
            except BaseException:
                self._known.doubted = True
                raise
            finally:
                self._checking = None

    # Of each protocol; these raise `CallFailed`

    async def _infer_once(self, request: Request, timeout_s: float) -> dict[str, np.ndarray]:
        result = await self._called(
            "infer",
            timeout_s,
            request.model,
            request.inputs(self._module),
            outputs=request.wanted(self._module),
            priority=request.priority,
            timeout=int(timeout_s * 1e6),
        )
        return request.arrays(result)

    async def _models(self, timeout_s: float) -> list[str]:
        """Names of all models that are loaded."""
        found = await self._called("get_inference_statistics", timeout_s)
        rows = found["model_stats"] if self.address.http else [{"name": r.name} for r in found.model_stats]
        return sorted({str(row["name"]) for row in rows})

    async def _card_text(self, model: str, timeout_s: float) -> str | None:
        """The card in a model's configuration; None if there is none."""
        found = await self._called("get_model_config", timeout_s, model)
        if self.address.http:
            text = found.get("parameters", {}).get(CARD_KEY, {}).get("string_value")
        else:
            parameters = found.config.parameters
            text = parameters[CARD_KEY].string_value if CARD_KEY in parameters else None
        return None if text is None else str(text)

    async def _called(self, method: str, timeout_s: float, *given: Any, **named: Any) -> Any:
        own = {} if self.address.http else {"client_timeout": timeout_s}
        import aiohttp

        try:
            return await asyncio.wait_for(
                getattr(self._client, method)(*given, headers=dict(self._headers), **own, **named),
                # gRPC tells the server, too, when time is up; this is for what does not.
                timeout_s + (0 if self.address.http else 1),
            )
        except TimeoutError as error:
            raise CallFailed("DEADLINE_EXCEEDED", str(error)) from error
        except self._module.InferenceServerException as error:
            raise self._failed(error) from error
        except (aiohttp.ClientError, OSError) as error:
            raise CallFailed("UNAVAILABLE", str(error) or type(error).__name__) from error

    def _failed(self, error: Any) -> CallFailed:
        if not self.address.http:
            return failed_by_grpc(error)
        status = str(error.status() or "")
        return CallFailed(
            HTTP_CODES.get(int(status) if status.isdigit() else 0, "INTERNAL"), str(error.message())
        )

    def _opened(self) -> tuple[Any, Any]:
        """The module of tritonclient that speaks this protocol, and its client."""
        address, settings = self.address, self.settings
        if address.http:
            import tritonclient.http.aio as http

            tls = tls_context(settings) if address.tls else None
            return http, http.InferenceServerClient(
                address.netloc,
                # Inferences wait for their turn; whether the server lives is asked beside them.
                conn_limit=0,
                # Each call has its own limit.
                conn_timeout=0,
                ssl=address.tls,
                ssl_context=tls,
            )
        import tritonclient.grpc.aio as grpc

        return grpc, grpc.InferenceServerClient(
            address.netloc,
            ssl=address.tls,
            root_certificates=None if settings.ca is None else str(settings.ca),
            channel_args=grpc_channel(settings),
        )
