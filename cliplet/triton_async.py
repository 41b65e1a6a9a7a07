"""A connection to a server for asyncio: the same calls, patience and errors as `cliplet.triton_calls`.

Tensors go through the connection: what is asked for from asyncio is mostly encoded images.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from cliplet.contract import GraphContract, TensorSpec
from cliplet.errors import ClipletError
from cliplet.server_address import ConnectionSettings, ServerAddress
from cliplet.serving import CARD_KEY, ModelCard
from cliplet.triton_calls import checked_request, hold_answer, not_served, unnamed
from cliplet.triton_errors import HTTP_CODES, CallFailed, Patience, explained
from cliplet.triton_wire import Request, failed_by_grpc, grpc_channel, tls_context

T = TypeVar("T")


class AsyncConnection:
    """A server that answers, or will. Nothing is sent before the first call."""

    def __init__(self, address: ServerAddress, settings: ConnectionSettings | None = None) -> None:
        self.address = address
        self.settings = settings or ConnectionSettings()
        self._headers = self.settings.headers(address.headers_prefix)
        self._module, self._client = self._opened()

    async def close(self) -> None:
        """End the connection."""
        await self._client.close()

    async def served(self) -> tuple[str, ...]:
        """Names of the bundles that it serves; see `Connection.served`."""
        found = await self._tried(lambda s: self._called("get_inference_statistics", s))
        rows = found["model_stats"] if self.address.http else [{"name": r.name} for r in found.model_stats]
        names = sorted({str(row["name"]) for row in rows})
        return tuple([name for name in names if await self._card_text(name) is not None])

    async def card(self, name: str | None = None) -> ModelCard:
        """What it tells of a bundle; see `Connection.card`."""
        name = name or self.address.name
        if name is None:
            served = await self.served()
            if len(served) != 1:
                raise unnamed(self.address, served)
            (name,) = served
        text = await self._card_text(name)
        if text is None:
            raise not_served(self.address, name, await self.served())
        return ModelCard.from_json(text, f"{self.address}, model {name!r},")

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
        found = await self._tried(lambda seconds: self._inferred(request, seconds), deadline_s)
        hold_answer(contract, feeds, more, found)
        return found

    async def _inferred(self, request: Request, timeout_s: float) -> dict[str, np.ndarray]:
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

    async def _card_text(self, model: str) -> str | None:
        """The card in a model's configuration; None if there is none, or no such model."""
        try:
            found = await self._tried(lambda seconds: self._called("get_model_config", seconds, model))
        except ClipletError as error:
            if isinstance(error.__cause__, CallFailed) and error.__cause__.code == "NOT_FOUND":
                return None
            raise
        if self.address.http:
            text = found.get("parameters", {}).get(CARD_KEY, {}).get("string_value")
        else:
            parameters = found.config.parameters
            text = parameters[CARD_KEY].string_value if CARD_KEY in parameters else None
        return None if text is None else str(text)

    async def _tried(self, call: Callable[[float], Awaitable[T]], deadline_s: float | None = None) -> T:
        """What a call returns, tried until it does or patience ends."""
        patience = Patience(self.settings, deadline_s)
        while True:
            try:
                return await call(patience.left_s)
            except CallFailed as failed:
                error = explained(failed, self.address, patience.deadline_s)
                try:
                    pause = patience.pause(error)
                except ClipletError as final:
                    raise final from failed
            await asyncio.sleep(pause)

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
                conn_limit=settings.in_flight,
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
