"""The server beside the page, as the page asks it: what it serves, what it says of an image, whether it is well."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cliplet.errors import EnvironmentError_
from cliplet.server_address import ConnectionSettings, ServerAddress
from cliplet.serving import CAM, TAGGER, VIEW_PROBS, ImageRecord, ModelCard, tagger_extras
from cliplet.triton_calls import Connection

from .health import Health, card_of
from .page import Tagging
from .triton_http import CallError

if TYPE_CHECKING:
    from .server import TritonServer

# The watch over the server and the page ask the same; one answer does for both, if it is no older than this.
SHARED_S = 1.0


class TritonBackend:
    """A server that is started or will be; see `cliplet.deploy.page.Backend`.

    Args:
        in_flight: threads that wait for answers; the page has no more images than that on the way.
        timeout_s: for the answer to one image.
    """

    def __init__(self, server: TritonServer, in_flight: int = 4, timeout_s: float = 30.0) -> None:
        self._server = server
        self._timeout_s = timeout_s
        self._in_flight = in_flight
        self._pool = ThreadPoolExecutor(in_flight, "page")
        self._cards: dict[str, ModelCard] = {}
        self._outputs: dict[str, set[str]] = {}

    async def models(self) -> Sequence[ModelCard]:
        return await asyncio.to_thread(self._models)

    async def tag(self, model: str, image: bytes, detail: bool) -> Tagging:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._tag, model, image, detail)

    async def ready(self) -> Health:
        return await asyncio.to_thread(self._server.health, SHARED_S)

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if "_connection" in vars(self):
            self._connection.close()

    @cached_property
    def _connection(self) -> Connection:
        """Made at the first image: the ports are known when the server has started."""
        options, ports = self._server.options, self._server.ports
        # Within TLS a server knows itself by another name than the loopback's; HTTP then stays on this machine.
        http = options.tls_cert is not None
        address = ServerAddress(options.own_host, ports.http if http else ports.grpc, http=http)
        # Who waits at the page is told at once, and the page itself asks again.
        settings = ConnectionSettings(
            token=options.token,
            ca=None,
            deadline_s=self._timeout_s,
            retries=0,
            shared_memory="off",
            in_flight=self._in_flight,
        )
        return Connection(address, settings)

    def _models(self) -> list[ModelCard]:
        for model in self._server.models:
            if model in self._cards or model in self._server.refused:
                continue
            try:
                config = self._server.http.config(model)
            except CallError as error:
                raise EnvironmentError_(
                    f"the server does not say what it serves: {error.reason}", "an answer", "look at /readyz"
                ) from error
            if (found := card_of(config)) is not None:
                self._outputs[model] = {output["name"] for output in config["output"]}
                self._cards[model] = found
        # A trunk gives embeddings, which nobody wants to look at.
        return [
            card
            for name, card in self._cards.items()
            if name not in self._server.refused and card.front is TAGGER
        ]

    def _tag(self, model: str, image: bytes, detail: bool) -> Tagging:
        (wanted,) = TAGGER.inputs
        (extra,) = tagger_extras(self._cards[model].manifest.kind)
        feeds = {wanted.name: np.array([[image]], object)}
        # A server that keeps its answers does not tell where; the labels are as good.
        offered = detail and extra.name in self._outputs[model]
        found = self._connection.infer(model, TAGGER, feeds, (extra,) if offered else ())
        record = found["record"][0, 0]
        view_probs, cam = found.get(VIEW_PROBS.name), found.get(CAM.name)
        return Tagging(
            ImageRecord.from_json(record),
            found["scores"][0],
            None if view_probs is None else view_probs[0],
            None if cam is None else cam[0],
        )
