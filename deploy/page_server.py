"""A web application in a thread of its own, beside whatever else its process does."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aiohttp import web

from cliplet.errors import EnvironmentError_

from .page_guard import GUARD, HEADERS

# How long a connection may take for the head of a request, or do nothing between two.
IDLE_S = 15.0
# How long what was refused may go on arriving, so that its sender comes to read why.
LINGER_S = 2.0
# More connections than this are told to come back: each costs a file descriptor of a process that has other work.
CONNECTIONS = 256


@dataclass(frozen=True)
class RunningPage:
    """A page that answers.

    Attributes:
        port: where it listens; the one that was found where 0 was asked for.
        url: what to open on this machine. A token stands in its fragment, which browsers keep to themselves.
    """

    host: str
    port: int
    url: str


@contextmanager
def run_page(app: web.Application, host: str, port: int) -> Iterator[RunningPage]:
    """Context in which `app` answers at `host`:`port`, in a thread of its own; port 0 takes a free one.

    Raises:
        EnvironmentError_: it cannot listen there.
    """
    started: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    app[GUARD].listens_at = host

    def work() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            try:
                runner.run(_serve(app, host, port, started.put, stop))
            except Exception as error:  # noqa: BLE001 - raised by the thread that waits for the start
                started.put(error)

    thread = threading.Thread(target=work, name="page", daemon=True)
    thread.start()
    found = started.get()
    if isinstance(found, Exception):
        thread.join()
        raise _explained(found, host, port) from found
    try:
        yield RunningPage(host, found, _url(host, found, app[GUARD].token))
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _serve(
    app: web.Application, host: str, port: int, started: Callable[[int], None], stop: asyncio.Event
) -> None:
    runner = web.AppRunner(
        app,
        # Who went away waits no longer, and nobody works for him.
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=IDLE_S,
        lingering_time=LINGER_S,
        shutdown_timeout=LINGER_S,
    )
    await runner.setup()
    try:
        serve = runner.server
        assert serve is not None

        def connection() -> asyncio.BaseProtocol:
            return _TurnedAway() if len(serve.connections) >= CONNECTIONS else serve()

        loop = asyncio.get_running_loop()
        listening = await loop.create_server(connection, host, port, backlog=CONNECTIONS)
        try:
            started(listening.sockets[0].getsockname()[1])
            await stop.wait()
        finally:
            listening.close()
    finally:
        await runner.cleanup()


class _TurnedAway(asyncio.Protocol):
    """What a connection too many meets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        body = json.dumps({"error": {"happened": "too many connections", "expected": "", "fix": "come back"}})
        head = {**HEADERS, "Content-Type": "application/json", "Content-Length": len(body)}
        head |= {"Retry-After": 1, "Connection": "close"}
        lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in head.items())]
        transport.write("\r\n".join([*lines, "", body]).encode())
        transport.close()


def _explained(error: Exception, host: str, port: int) -> Exception:
    if not isinstance(error, OSError):
        return error
    why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return EnvironmentError_(
        f"the page cannot listen at {host}:{port}: {why.lower()}",
        "an address of this machine with a free port",
        "--page-port 0 takes a free one",
    )


def _url(host: str, port: int, token: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host
    else:
        name = "127.0.0.1" if address.is_unspecified else f"[{host}]" if address.version == 6 else host
    return f"http://{name}:{port}/" + (f"#token={token}" if token else "")
