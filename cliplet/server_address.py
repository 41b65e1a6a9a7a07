"""Where a server is and how to talk to it: `triton://HOST:PORT/NAME`, and what only its own machine knows of it.

triton://HOST:PORT/NAME          gRPC, port 8001 unless one is given
triton+grpcs://HOST:PORT/NAME    gRPC within TLS
triton+http://HOST:PORT/NAME     HTTP, port 8000 unless one is given
triton+https://HOST:PORT/NAME    HTTP within TLS

NAME is that of a served bundle; without it the server's only one is meant.

A server that cliplet started leaves a note in the cache folder, for its own user alone: the secret that opens what
is closed to everybody else (shared memory, above all). Who can read it is on the server's machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from cliplet.errors import UsageError, explained_os_errors

SCHEME = "triton"
# Of Triton itself; and of the page beside it.
HTTP_PORT = 8000
GRPC_PORT = 8001
METRICS_PORT = 8002
PAGE_PORT = 8080
# (HTTP, TLS) of each scheme.
_SCHEMES = {
    "triton": (False, False),
    "triton+grpc": (False, False),
    "triton+grpcs": (False, True),
    "triton+http": (True, False),
    "triton+https": (True, True),
}
_FORM = "triton://HOST:PORT/NAME, or triton+grpcs://, triton+http://, triton+https://"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# The headers that Triton compares with what it was started with. Of gRPC calls it looks for names of its own making.
SECRET_HEADER = "cliplet-secret"
TOKEN_HEADER = "authorization"
GRPC_HEADER_PREFIX = "triton-grpc-protocol-"
TOKEN_VARIABLE = "CLIPLET_TOKEN"
CA_VARIABLE = "CLIPLET_CA"
SHARED_MEMORY = ("auto", "on", "off")


@dataclass(frozen=True)
class ServerAddress:
    """A server, and perhaps the bundle that is meant.

    Attributes:
        name: of the served bundle; None leaves it to the server, which then has to have only one.
        http: HTTP in place of gRPC.
        tls: encrypted.
    """

    host: str
    port: int
    name: str | None = None
    http: bool = False
    tls: bool = False

    @classmethod
    def parse(cls, text: str) -> ServerAddress:
        """The address that `text` spells.

        Raises:
            UsageError: it spells none.
        """
        scheme, _, _ = text.partition("://")
        if scheme not in _SCHEMES:
            raise _no_address(text, f"{scheme!r} is no scheme of a server")
        http, tls = _SCHEMES[scheme]
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise _no_address(text, str(error)) from error
        if parts.username or parts.password or parts.query or parts.fragment:
            raise _no_address(text, "it holds more than a host, a port and a name; a token goes into --token")
        name = unquote(parts.path).strip("/")
        if not parts.hostname or "/" in name or port == 0:
            raise _no_address(text, "no host" if not parts.hostname else "no such port or name")
        return cls(parts.hostname, port or (HTTP_PORT if http else GRPC_PORT), name or None, http, tls)

    def __str__(self) -> str:
        scheme = next(text for text, kind in _SCHEMES.items() if kind == (self.http, self.tls))
        name = f"/{quote(self.name)}" if self.name else ""
        return f"{scheme}://{self.netloc}{name}"

    @staticmethod
    def is_meant(text: str) -> bool:
        """Whether a text wants to be an address, good or bad."""
        return text.startswith((f"{SCHEME}://", f"{SCHEME}+"))

    @property
    def netloc(self) -> str:
        """Host and port as Triton's clients take them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it can only be a server on this machine, or what was tunnelled to here."""
        return self.host in _LOOPBACK

    @property
    def headers_prefix(self) -> str:
        """What Triton puts before the names of headers that open its doors."""
        return "" if self.http else GRPC_HEADER_PREFIX


@dataclass(frozen=True, kw_only=True)
class ConnectionSettings:
    """How to talk to a server.

    Attributes:
        token: what the server was given as --token; by default $CLIPLET_TOKEN.
        ca: file with the certificates (PEM) that the server's own is signed by; by default $CLIPLET_CA, or those
            that the system trusts.
        deadline_s: seconds from asking to the answer, all tries and the wait for a turn together. What comes on top
            of them, where that is needed: looking a host's name up, the 5 s that showing memory to a server and
            checking on one that is late may take, and comparing a server that was away with the one before.
        retries: further tries after one that failed for a reason that may pass.
        wait_s: seconds to wait beyond that for a server that has gone away in the middle of the work.
        in_flight: most inferences at a time, of all threads or tasks that share the connection; others wait their
            turn.
        shared_memory: pass tensors to a server on this machine through memory that both see: `on`, `off`, or
            `auto`: where it is possible.
    """

    token: str | None = field(default_factory=lambda: os.environ.get(TOKEN_VARIABLE) or None, repr=False)
    ca: Path | None = field(
        default_factory=lambda: Path(os.environ[CA_VARIABLE]) if os.environ.get(CA_VARIABLE) else None
    )
    deadline_s: float = 60.0
    retries: int = 4
    wait_s: float = 0.0
    in_flight: int = 8
    shared_memory: str = "auto"

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--deadline", self.deadline_s, 1e-3),
            ("--retries", self.retries, 0),
            ("--wait-for-server", self.wait_s, 0),
            ("--in-flight", self.in_flight, 1),
        ):
            # Written so that a NaN is refused, too.
            if not least <= value < float("inf"):
                raise UsageError(f"{flag} {value}", f"a number from {least} on")
        if self.shared_memory not in SHARED_MEMORY:
            raise UsageError(f"--shared-memory {self.shared_memory}", f"one of {', '.join(SHARED_MEMORY)}")
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise UsageError(
                "the token holds a space or a letter that a header cannot carry",
                "printable ASCII without spaces",
                f"mend --token or ${TOKEN_VARIABLE}",
            )
        if self.ca is not None and not self.ca.is_file():
            raise UsageError(f"no file {self.ca}", "the certificates that the server's own is signed by")

    def headers(self, prefix: str = "") -> dict[str, str]:
        """The header of every call."""
        return {f"{prefix}{TOKEN_HEADER}": f"Bearer {self.token}"} if self.token else {}


@dataclass(frozen=True)
class ServerState:
    """What a running server's own machine knows of it.

    Attributes:
        ports: `http`, `grpc`, `metrics`, … and their numbers.
    """

    pid: int
    secret: str = field(repr=False)
    ports: Mapping[str, int]


def state_file(port: int) -> Path:
    """Where the server that listens on a port leaves its note."""
    # Here, because a bundle's manifest names models, and a model may be named by an address.
    from cliplet.artifact import cache_folder

    return cache_folder() / "servers" / f"{port}.json"


def write_state(state: ServerState) -> None:
    """Leave the note of a server, for its user alone, under each port that a client may know it by.

    Raises:
        EnvironmentError_: the cache folder cannot be written.
    """
    for port in _known_by(state):
        file = state_file(port)
        with explained_os_errors(file, "set CLIPLET_CACHE to a folder that can be written"):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = file.with_name(f".{file.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as stream:
                json.dump({**asdict(state), "ports": dict(state.ports)}, stream)
            os.replace(temporary, file)


def read_state(port: int) -> ServerState | None:
    """The note of the server that listens on a port of this machine; None if its user is another or it is gone."""
    try:
        file = state_file(port)
        # What others could have written is no proof of anything.
        about = file.stat()
        if about.st_uid != os.getuid() or about.st_mode & 0o077:
            return None
        data = json.loads(file.read_text(encoding="utf-8"))
        state = ServerState(int(data["pid"]), str(data["secret"]), {**data["ports"]})
        os.kill(state.pid, 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state


def _known_by(state: ServerState) -> list[int]:
    return [state.ports[kind] for kind in ("http", "grpc") if kind in state.ports]


def _no_address(text: str, reason: str) -> UsageError:
    return UsageError(
        f"{text!r} is not the address of a server: {reason}", _FORM, "--model triton://127.0.0.1:8001"
    )
