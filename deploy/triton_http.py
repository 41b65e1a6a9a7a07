"""The few calls that the one who runs a server makes of it, over HTTP and with nothing but the standard library.

Clients use `deploy/client.py`. Here every call has a deadline and a connection of its own, so that calls may be made
from any thread and a server that hangs holds nobody up.
"""

from __future__ import annotations

import http.client
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cliplet.serving import TRITON_TYPES

# For questions that a server answers at once, unless its machine stands still.
PATIENCE_S = 20.0


class CallError(Exception):
    """A call was not answered as it should be.

    Attributes:
        status: of HTTP; 0 if there was no answer at all.
        reason: what the server said.
        late: whether the deadline passed without an answer.
    """

    def __init__(self, status: int, reason: str, *, late: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.late = late


@dataclass(frozen=True)
class TritonHttp:
    """A server's HTTP port.

    Attributes:
        headers: sent with each call, such as the token.
    """

    host: str
    port: int
    headers: Mapping[str, str] = field(default_factory=dict)

    def name(self, timeout_s: float = 1.0) -> str | None:
        """What the server that listens there calls itself; None if it gives no answer."""
        try:
            return str(self.call("GET", "/v2", timeout_s=timeout_s)["name"])
        except (CallError, ValueError, LookupError, TypeError):
            return None

    def index(self) -> dict[str, str]:
        """Every model in the repository: an empty text if it is loaded, or why it is not."""
        rows = self.call("POST", "/v2/repository/index")
        found: dict[str, str] = {}
        for row in rows:
            good = row.get("state") == "READY"
            said = row.get("reason") or f"it is {row.get('state', 'not loaded').lower()}"
            # A model has a row for each version; one that serves is enough.
            found[row["name"]] = "" if good else found.get(row["name"], said)
        return found

    def config(self, model: str) -> dict[str, Any]:
        """The model's configuration, as Triton completed it."""
        return dict(self.call("GET", f"/v2/models/{model}/config"))

    def executions(self, model: str, timeout_s: float = 5.0) -> int:
        """Batches that a model has computed so far, with or without success."""
        stats = self.call("GET", f"/v2/models/{model}/stats", timeout_s=timeout_s)["model_stats"]
        return sum(int(row["execution_count"]) for row in stats)

    def infer(
        self, model: str, feeds: Mapping[str, np.ndarray], outputs: Iterable[str], timeout_s: float
    ) -> None:
        """One inference ahead of all others that wait; raises `CallError` unless it comes out well."""
        blobs = {name: _encoded(array) for name, array in feeds.items()}
        request = {
            "inputs": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": TRITON_TYPES[array.dtype.name],
                    "parameters": {"binary_data_size": len(blobs[name])},
                }
                for name, array in feeds.items()
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
            # Given up by the server, too: else the checks of a model that hangs would pile up in its queue.
            "parameters": {"priority": 1, "timeout": int(timeout_s * 1e6)},
        }
        head = json.dumps(request).encode()
        length = {"Inference-Header-Content-Length": str(len(head))}
        path = f"/v2/models/{model}/infer"
        self._call("POST", path, b"".join([head, *blobs.values()]), length, timeout_s)

    def call(self, method: str, path: str, *, timeout_s: float = PATIENCE_S) -> Any:
        """The JSON that a path answers, or None where the answer is empty."""
        answer = self._call(method, path, b"", {}, timeout_s)
        return json.loads(answer) if answer else None

    def _call(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> bytes:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=max(timeout_s, 0.001))
        try:
            connection.request(method, path, body, {**self.headers, **headers})
            answer = connection.getresponse()
            said = answer.read()
        except TimeoutError as error:
            raise CallError(0, f"no answer within {timeout_s:.3g} s", late=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise CallError(0, f"no answer: {getattr(error, 'strerror', None) or error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise CallError(answer.status, _reason(said))
        return said


def _encoded(array: np.ndarray) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    return b"".join(struct.pack("<I", len(item)) + item for item in array.ravel())


def _reason(said: bytes) -> str:
    text = said.decode(errors="replace").strip()
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text[:300] or "an empty answer"
