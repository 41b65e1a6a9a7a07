"""Triton's two protocols behind one face: arrays in, arrays out, and `CallFailed` in Triton's words.

Both may be called from many threads at once. tritonclient builds and reads the messages; its HTTP client is no help
to threads, so HTTP itself is done with the standard library here.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

from cliplet.server_address import SECRET_HEADER, ConnectionSettings, ServerAddress
from cliplet.serving import CARD_KEY, TRITON_TYPES
from cliplet.triton_errors import HTTP_CODES, CallFailed


@dataclass(frozen=True)
class Region:
    """Where in shared memory that the server knows as `name` a tensor lies, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Request:
    """One inference.

    Attributes:
        outputs: what is asked for.
        regions: of the feeds that lie in shared memory.
        priority: 1 goes before 2; 0 leaves it to the server.
    """

    model: str
    feeds: Mapping[str, np.ndarray]
    outputs: Sequence[str]
    regions: Mapping[str, Region]
    priority: int = 0

    def inputs(self, client: ModuleType) -> list[Any]:
        """The tensors as a client of tritonclient (`grpc` or `http`) takes them."""
        found = []
        for name, array in self.feeds.items():
            tensor = client.InferInput(name, list(array.shape), TRITON_TYPES[array.dtype.name])
            region = self.regions.get(name)
            if region is None:
                tensor.set_data_from_numpy(array)
            else:
                tensor.set_shared_memory(region.name, region.size, offset=region.offset)
            found.append(tensor)
        return found

    def wanted(self, client: ModuleType) -> list[Any]:
        """The outputs as a client of tritonclient takes them."""
        return [client.InferRequestedOutput(name) for name in self.outputs]

    def arrays(self, result: Any) -> dict[str, np.ndarray]:
        """The outputs in an answer, which may lack one."""
        return {name: array for name in self.outputs if (array := result.as_numpy(name)) is not None}


class Wire(Protocol):
    """A server by one of its protocols; every call ends within `timeout_s`, or raises `CallFailed`."""

    def infer(self, request: Request, timeout_s: float) -> dict[str, np.ndarray]:
        """Outputs by name."""
        ...

    def models(self, timeout_s: float) -> list[str]:
        """Names of all models that are loaded."""
        ...

    def card(self, model: str, timeout_s: float) -> str | None:
        """The card in a model's configuration; None if there is none."""
        ...

    def register(self, name: str, key: str, size: int, secret: str, timeout_s: float) -> None:
        """Let the server see a segment of shared memory."""
        ...

    def unregister(self, name: str, secret: str, timeout_s: float) -> None:
        """Let the server forget a segment; one that it does not know is no error."""
        ...

    def close(self) -> None:
        """End the connections."""
        ...


def open_wire(address: ServerAddress, settings: ConnectionSettings) -> Wire:
    """The protocol that an address asks for; nothing is sent yet."""
    return HttpWire(address, settings) if address.http else GrpcWire(address, settings)


def grpc_channel(settings: ConnectionSettings) -> list[tuple[str, int]]:
    """Options of a gRPC channel: messages of any size, and a server that comes back is soon seen to be back."""
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # A channel of its own: by default one that failed is shared with whoever calls the same address.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", max(1000, int(settings.deadline_s * 1000))),
    ]


def failed_by_grpc(error: Any) -> CallFailed:
    """What tritonclient raised for a gRPC call."""
    return CallFailed(str(error.status() or "").removeprefix("StatusCode."), str(error.message()))


def tls_context(settings: ConnectionSettings) -> ssl.SSLContext:
    """How the certificate of a server that speaks HTTPS is checked."""
    return ssl.create_default_context(cafile=None if settings.ca is None else str(settings.ca))


class GrpcWire:
    """A server by gRPC."""

    def __init__(self, address: ServerAddress, settings: ConnectionSettings) -> None:
        import tritonclient.grpc as client

        self._module = client
        self._headers = settings.headers(address.headers_prefix)
        self._prefix = address.headers_prefix
        self._client = client.InferenceServerClient(
            address.netloc,
            ssl=address.tls,
            root_certificates=None if settings.ca is None else str(settings.ca),
            channel_args=grpc_channel(settings),
        )

    def infer(self, request: Request, timeout_s: float) -> dict[str, np.ndarray]:
        result = self._call(
            "infer",
            timeout_s,
            request.model,
            request.inputs(self._module),
            outputs=request.wanted(self._module),
            priority=request.priority,
            timeout=int(timeout_s * 1e6),
        )
        return request.arrays(result)

    def models(self, timeout_s: float) -> list[str]:
        # The index of the repository is closed to clients; statistics name the same models.
        return [row.name for row in self._call("get_inference_statistics", timeout_s).model_stats]

    def card(self, model: str, timeout_s: float) -> str | None:
        parameters = self._call("get_model_config", timeout_s, model).config.parameters
        return str(parameters[CARD_KEY].string_value) if CARD_KEY in parameters else None

    def register(self, name: str, key: str, size: int, secret: str, timeout_s: float) -> None:
        self._call("register_system_shared_memory", timeout_s, name, key, size, secret=secret)

    def unregister(self, name: str, secret: str, timeout_s: float) -> None:
        self._call("unregister_system_shared_memory", timeout_s, name, secret=secret)

    def close(self) -> None:
        self._client.close()

    def _call(self, method: str, timeout_s: float, *given: Any, secret: str = "", **named: Any) -> Any:
        own = {f"{self._prefix}{SECRET_HEADER}": secret} if secret else {}
        try:
            return getattr(self._client, method)(
                *given, headers={**self._headers, **own}, client_timeout=timeout_s, **named
            )
        except self._module.InferenceServerException as error:
            raise failed_by_grpc(error) from error


class HttpWire:
    """A server by HTTP; connections are kept and used by one thread at a time.

    A call may take longer than its time in one case: while a connection is made. The system looks a host's name up
    for as long as it likes, and each address of the name is given all the time.
    """

    def __init__(self, address: ServerAddress, settings: ConnectionSettings) -> None:
        import tritonclient.http as client

        self._module = client
        self._address = address
        self._headers = settings.headers()
        self._tls = tls_context(settings) if address.tls else None
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def infer(self, request: Request, timeout_s: float) -> dict[str, np.ndarray]:
        body, json_size = self._module.InferenceServerClient.generate_request_body(
            request.inputs(self._module),
            outputs=request.wanted(self._module),
            priority=request.priority,
            timeout=int(timeout_s * 1e6),
        )
        length = {} if json_size is None else {"Inference-Header-Content-Length": str(json_size)}
        path = f"/v2/models/{quote(request.model, safe='')}/infer"
        answer, headers = self._send("POST", path, body, length, timeout_s)
        size = headers.get("Inference-Header-Content-Length")
        try:
            result = self._module.InferenceServerClient.parse_response_body(
                answer, header_length=None if size is None else int(size)
            )
            return request.arrays(result)
        except (ValueError, KeyError, TypeError) as error:
            raise CallFailed("INTERNAL", f"an answer that cannot be read: {error}") from error

    def models(self, timeout_s: float) -> list[str]:
        return [row["name"] for row in self._json("GET", "/v2/models/stats", timeout_s)["model_stats"]]

    def card(self, model: str, timeout_s: float) -> str | None:
        config = self._json("GET", f"/v2/models/{quote(model, safe='')}/config", timeout_s)
        text = config.get("parameters", {}).get(CARD_KEY, {}).get("string_value")
        return None if text is None else str(text)

    def register(self, name: str, key: str, size: int, secret: str, timeout_s: float) -> None:
        body = json.dumps({"key": key, "offset": 0, "byte_size": size}).encode()
        path = f"/v2/systemsharedmemory/region/{quote(name, safe='')}/register"
        self._send("POST", path, body, {SECRET_HEADER: secret}, timeout_s)

    def unregister(self, name: str, secret: str, timeout_s: float) -> None:
        path = f"/v2/systemsharedmemory/region/{quote(name, safe='')}/unregister"
        self._send("POST", path, b"", {SECRET_HEADER: secret}, timeout_s)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _json(self, method: str, path: str, timeout_s: float) -> Any:
        answer, _ = self._send(method, path, b"", {}, timeout_s)
        try:
            return json.loads(answer)
        except ValueError as error:
            raise CallFailed("INTERNAL", f"an answer that is no JSON: {error}") from error

    def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[bytes, http.client.HTTPMessage]:
        """Body and headers of an answer of status 200."""
        until = monotonic() + timeout_s
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        if kept is not None:
            # One that was kept may be closed by now, or its server another one; a new one will tell.
            with suppress(ConnectionError, http.client.HTTPException):
                return self._exchange(kept, method, path, body, headers, until)
        try:
            return self._exchange(self._connection(), method, path, body, headers, until)
        except ConnectionError as error:
            raise CallFailed("UNAVAILABLE", str(error) or type(error).__name__) from error
        except http.client.IncompleteRead as error:
            raise CallFailed("UNAVAILABLE", "the connection ended in the middle of an answer") from error
        except http.client.HTTPException as error:
            raise CallFailed("UNAVAILABLE", "who listens there does not speak HTTP as Triton does") from error

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        until: float,
    ) -> tuple[bytes, http.client.HTTPMessage]:
        """What a connection answers before a point in time, by `monotonic`."""
        connection.response_class = partial(_TimedResponse, until=until)  # type: ignore[assignment]
        try:
            if connection.sock is None:
                connection.timeout = _left_s(until)
                connection.connect()
            connection.sock.settimeout(_left_s(until))
            connection.request(method, path, body, {**self._headers, **headers})
            answer = connection.getresponse()
            said = answer.read()
        except (ConnectionError, http.client.HTTPException):
            connection.close()
            raise
        except TimeoutError as error:
            connection.close()
            raise CallFailed("DEADLINE_EXCEEDED", str(error)) from error
        except OSError as error:
            connection.close()
            raise CallFailed("UNAVAILABLE", str(error)) from error
        with self._lock:
            self._idle.append(connection)
        if answer.status != 200:
            raise CallFailed(HTTP_CODES.get(answer.status, "INTERNAL"), _said(said, answer.status))
        return said, answer.headers

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._address.host, self._address.port
        if self._tls is None:
            return http.client.HTTPConnection(host, port)
        return http.client.HTTPSConnection(host, port, context=self._tls)


class _TimedResponse(http.client.HTTPResponse):
    """An answer that has to be whole at a point in time: a socket's own limit begins anew with every piece."""

    def __init__(self, sock: socket.socket, *, until: float, **named: Any) -> None:
        super().__init__(sock, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(sock, until))


class _TimedReader(io.RawIOBase):
    """What a socket receives before a point in time."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._sock, self._until = sock, until
        # Keeps the socket open after its connection was closed, as it is where the server ends it with its answer.
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left_s(self._until))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left_s(until: float) -> float:
    """Seconds that are left; raises `TimeoutError` where there are none."""
    seconds = until - monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def _said(body: bytes, status: int) -> str:
    """What the server said of an error, in JSON or in plain words."""
    text = body.decode(errors="replace").strip()
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text or f"HTTP status {status}"
