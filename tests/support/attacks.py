"""A server under attack: requests as no client library would send them, and proof that it took no harm."""

from __future__ import annotations

import http.client
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from helpers import picture
from PIL import Image
from running import within
from tritonclient.grpc import service_pb2

from cliplet.deploy.server import TritonServer
from cliplet.deploy.stubs import stubs_of
from cliplet.serving import ImageRecord

SERVICE = "/inference.GRPCInferenceService/"
PROTOCOLS = ("http", "grpc")


class Answer(NamedTuple):
    """What came back; over gRPC the status is 200 or 400."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Tensor(NamedTuple):
    """An input as it is sent; `size` is what the request says of its bytes, if not the truth."""

    name: str
    datatype: str
    shape: Sequence[Any]
    data: bytes
    size: int | None = None


@dataclass(frozen=True)
class Target:
    """A running server with its page.

    Attributes:
        flag: as long as this file is there, the student's graph hangs.
        wanted: for each model the labels of `good_image`.
    """

    server: TritonServer
    page: int
    flag: Path
    wanted: Mapping[str, Sequence[str]]

    @property
    def pids(self) -> dict[int, str]:
        return {self.server.pid: "server", **stubs_of(self.server.pid)}

    def port(self, name: str) -> int:
        return self.page if name == "page" else int(getattr(self.server.ports, name))

    # HTTP

    def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        port: str = "http",
        timeout_s: float = 30,
        **headers: str,
    ) -> Answer:
        """The path goes out as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port(port), timeout=timeout_s)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return Answer(answer.status, answer.read(), dict(answer.getheaders()))
        finally:
            connection.close()

    def raw(self, data: bytes, port: str = "http", timeout_s: float = 10, *, farewell: bool = True) -> bytes:
        """What a port says to bytes; with a farewell it knows that nothing more will come."""
        said = b""
        with self.connected(port, timeout_s) as client, suppress(OSError):
            client.sendall(data)
            if farewell:
                client.shutdown(socket.SHUT_WR)
            while more := client.recv(65536):
                said += more
        return said

    def connected(self, port: str, timeout_s: float = 10) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port(port)), timeout_s)

    @contextmanager
    def held(self, port: str, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
        """Context in which so many connections are open, each of which has sent `first`."""
        with ExitStack() as stack:
            clients = []
            for _ in range(count):
                clients.append(stack.enter_context(self.connected(port)))
                if first:
                    clients[-1].sendall(first)
            yield clients

    # Inference

    def infer(
        self, protocol: str, model: str, *tensors: Tensor, timeout_s: float = 30, **headers: str
    ) -> Answer:
        if protocol == "http":
            head, body = http_request(*tensors)
            more = {"Inference_Header_Content_Length": str(head), **headers}
            return self.call("POST", f"/v2/models/{model}/infer", body, timeout_s=timeout_s, **more)
        metadata = tuple((name.lower(), value) for name, value in headers.items())
        message = grpc_request(model, *tensors).SerializeToString()
        return self.grpc("ModelInfer", message, timeout_s, metadata)

    def grpc(self, method: str, message: bytes, timeout_s: float = 30, metadata: Any = ()) -> Answer:
        """The answer to bytes that need be no message."""
        try:
            return Answer(200, self.grpc_call(method)(message, timeout=timeout_s, metadata=metadata), {})
        except grpc.RpcError as error:
            return Answer(400, f"{error.code().name}: {error.details()}".encode(), {})

    def grpc_call(self, method: str) -> Any:
        return self._channel.unary_unary(SERVICE + method)

    @cached_property
    def _channel(self) -> grpc.Channel:
        return grpc.insecure_channel(
            f"127.0.0.1:{self.server.ports.grpc}",
            options=[("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
        )

    # Harm

    def labels(self, protocol: str, model: str, **headers: str) -> list[str]:
        """What a model says of the good image."""
        answer = self.infer(protocol, model, image_tensor(good_image()), **headers)
        assert answer.status == 200, answer.body
        if protocol == "http":
            (record,) = (o["data"][0] for o in answer.json["outputs"] if o["name"] == "record")
        else:
            message = service_pb2.ModelInferResponse.FromString(answer.body)
            place = [output.name for output in message.outputs].index("record")
            record = message.raw_output_contents[place][4:].decode()
        return [label["name"] for label in ImageRecord.from_json(record).labels]

    def hold_unharmed(self, pids: Mapping[int, str]) -> None:
        """Fail unless the same processes label well over both protocols, and the page says that all are ready."""
        for model, wanted in self.wanted.items():
            for protocol in PROTOCOLS:
                assert self.labels(protocol, model) == list(wanted), (model, protocol)
        # The page may still be letting go of connections.
        assert within(60, lambda: self.call("GET", "/readyz", port="page").status == 200)
        assert self.pids == pids


def http_request(*tensors: Tensor) -> tuple[int, bytes]:
    """Length of the JSON at its head, and the body."""
    rows = [
        {
            "name": t.name,
            "datatype": t.datatype,
            "shape": list(t.shape),
            "parameters": {"binary_data_size": len(t.data) if t.size is None else t.size},
        }
        for t in tensors
    ]
    head = json.dumps({"inputs": rows}).encode()
    return len(head), b"".join([head, *(t.data for t in tensors)])


def grpc_request(model: str, *tensors: Tensor) -> Any:
    """A message; what cannot stand in one raises `ValueError` or `TypeError`."""
    message = service_pb2.ModelInferRequest(model_name=model)
    for t in tensors:
        message.inputs.add(name=t.name, datatype=t.datatype, shape=t.shape)
        message.raw_input_contents.append(t.data)
    return message


def good_image() -> bytes:
    return encoded(picture(100, 80, 1))


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def strings(*items: bytes) -> bytes:
    """Triton's binary form of BYTES."""
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def image_tensor(*images: bytes) -> Tensor:
    return Tensor("image", "BYTES", (len(images), 1), strings(*images))


def array_tensor(name: str, array: np.ndarray) -> Tensor:
    kind = {"u": "UINT8", "f": "FP32", "i": "INT64"}[array.dtype.kind]
    return Tensor(name, kind, array.shape, array.tobytes())


def png(width: int, height: int, *more: tuple[bytes, bytes], rows: int | None = None) -> bytes:
    """A black PNG with further chunks, written without a picture in memory; `rows` are those that it really holds."""
    packer = zlib.compressobj(9)
    row = bytes(3 * width + 1)
    pixels = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *more, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def resident_mib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 >> 20
