"""How a server is to be run, and the Triton command line that follows from it."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from cliplet.errors import UsageError
from cliplet.server_address import (
    GRPC_PORT,
    HTTP_PORT,
    METRICS_PORT,
    SECRET_HEADER,
    TOKEN_HEADER,
    TOKEN_VARIABLE,
    ConnectionSettings,
)
from cliplet.triton_program import TritonProgram

LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
# What a stranger must not call: they change the server, or reach into its memory.
PRIVATE_APIS = "shared-memory,model-repository,logging,trace"
# What a token is asked for, where there is one.
TOKEN_APIS = "inference,metadata,model-config,statistics"


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where a server listens; 0 is one that is free."""

    http: int = HTTP_PORT
    grpc: int = GRPC_PORT
    metrics: int = METRICS_PORT

    def __post_init__(self) -> None:
        given = [port for port in vars(self).values() if port]
        if len(set(given)) < len(given):
            raise UsageError(
                "two ports are the same: " + ", ".join(f"--{k}-port {v}" for k, v in vars(self).items()),
                "three different ports",
                "--http-port 0 --grpc-port 0 --metrics-port 0 takes free ones",
            )
        for port in given:
            if not 0 < port < 65536:
                raise UsageError(
                    f"port {port}", "a number from 0 (any free one) to 65535", "--http-port 8000"
                )


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server is to be run.

    Attributes:
        host: the IPv4 address to listen at; a name given for it is looked up here.
        token: asked of every client as `authorization: Bearer TOKEN`; None asks for none.
        tls_cert, tls_key: PEM files for gRPC. HTTP has no TLS in Triton, so it then stays on this machine.
        cache_bytes: of the response cache; 0 for none.
        take_turns: graphs that name a common resource compute one at a time. Several bundles then do not fight for
            the cores, but one that hangs holds up all others.
        http_threads: that handle HTTP requests.
        log_verbose: 0, or Triton's level of verbosity.
        ready_timeout_s: until every model has answered.
        exit_timeout_s: that requests in flight get when the server is stopped.
        deadline_s: for the tiny inferences that tell whether a model works.
        restart: start the server again when it dies, or when one of its models has for good.
        backoff_s: before it is started again; doubled with each failure in a row.
        most_failures: in a row, before it is given up.
        unhealthy_s: that a model may go without an answer before the server is started again.
    """

    host: str = LOOPBACK
    ports: Ports = Ports()
    token: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    cache_bytes: int = 0
    take_turns: bool = False
    http_threads: int = 8
    log_verbose: int = 0
    ready_timeout_s: float = 120.0
    exit_timeout_s: int = 10
    deadline_s: float = 5.0
    restart: bool = False
    backoff_s: float = 1.0
    most_failures: int = 5
    unhealthy_s: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", _ipv4(self.host))
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError(
                "only one of --tls-cert and --tls-key", "both or neither", "name the certificate and its key"
            )
        for file in (self.tls_cert, self.tls_key):
            if file is not None and not file.is_file():
                raise UsageError(f"no file {file}", "a PEM file", "check the path")
        if self.token is not None:
            _hold_sendable(self.token)

    @property
    def http_host(self) -> str:
        """Where HTTP and the metrics listen."""
        return LOOPBACK if self.tls_cert else self.host

    @property
    def own_host(self) -> str:
        """Where this machine itself reaches HTTP."""
        return LOOPBACK if self.http_host == EVERYWHERE else self.http_host


def free_ports(options: ServerOptions) -> Ports:
    """The ports, all of them free a moment ago, with a real one in place of each 0.

    Raises:
        UsageError: one is taken, or the address is none of this machine's.
    """
    hosts = {"http": options.http_host, "grpc": options.host, "metrics": options.http_host}
    held: list[socket.socket] = []
    found: dict[str, int] = {}
    try:
        # All are held until the last is found, so that no two are the same.
        for name, port in sorted(vars(options.ports).items(), key=lambda pair: -pair[1]):
            held.append(_bound(hosts[name], port, name))
            found[name] = held[-1].getsockname()[1]
    finally:
        for sock in held:
            sock.close()
    return replace(options.ports, **found)


def port_taken(port: int, name: str) -> UsageError:
    """The error of a port that another program listens at."""
    return UsageError(
        f"port {port} is taken: another program listens there",
        f"a free port for {name}",
        f"--{name}-port 0 takes a free one, --{name}-port PORT another one",
    )


def _hold_sendable(token: str) -> None:
    """Raise `UsageError` if a client would refuse to send this token."""
    try:
        ConnectionSettings(token=token, ca=None)
    except UsageError as error:
        raise UsageError(
            "the token is empty, or holds a space or a letter that a header cannot carry",
            "printable ASCII without spaces",
            f"export {TOKEN_VARIABLE}=$(openssl rand -hex 32)",
        ) from error


def _ipv4(host: str) -> str:
    """The dotted address of a host: Triton's HTTP takes no names and no IPv6."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--host {host}: no IPv4 address, and Triton listens at no other",
            "an IPv4 address of this machine, or a name that has one",
            f"--host {LOOPBACK} for this machine alone, --host {EVERYWHERE} for all who reach it",
        ) from error


def _bound(host: str, port: int, name: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # A port whose last connections are still winding down is free.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        # Binding may succeed where another program bound, too, and has yet to listen.
        sock.listen(1)
    except PermissionError as error:
        sock.close()
        raise UsageError(
            f"port {port} needs the rights of root", "a port from 1024 on", f"--{name}-port 0"
        ) from error
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise UsageError(
                f"--host {host}: {error.strerror}", "an address of this machine", "--host 127.0.0.1"
            ) from error
        raise port_taken(port, name) from error
    return sock


def command_line(
    program: TritonProgram,
    repository: Path,
    options: ServerOptions,
    ports: Ports,
    *,
    backends: Path | None,
    name: str,
    secret: str,
) -> list[str]:
    """The words that start Triton.

    Args:
        backends: of an embedded server; None for the server's own.
        name: of this server alone; the names of its shared-memory segments begin with it.
        secret: what the private APIs ask for.
    """
    restricted = [f"{PRIVATE_APIS}:{SECRET_HEADER}={secret}"]
    if options.token is not None:
        restricted.append(f"{TOKEN_APIS}:{TOKEN_HEADER}=Bearer {options.token}")
    settings: dict[str, object] = {
        "model-repository": repository,
        "model-control-mode": "none",
        # A model that does not load leaves the others served; readiness is found out by inference.
        "exit-on-error": "false",
        "strict-readiness": "false",
        "http-address": options.http_host,
        "http-port": ports.http,
        "http-thread-count": options.http_threads,
        "grpc-address": options.host,
        "grpc-port": ports.grpc,
        "metrics-address": options.http_host,
        "metrics-port": ports.metrics,
        "exit-timeout-secs": options.exit_timeout_s,
        "log-verbose": options.log_verbose,
        "rate-limit": "execution_count" if options.take_turns else "off",
        "backend-config": f"python,shm-region-prefix-name={name}-",
        "id": name,
    }
    if options.cache_bytes:
        settings["cache-config"] = f"local,size={options.cache_bytes}"
    if options.tls_cert:
        settings |= {
            "grpc-use-ssl": "true",
            "grpc-server-cert": options.tls_cert,
            "grpc-server-key": options.tls_key,
        }
    if backends is not None:
        settings |= {"backend-directory": backends, "cache-directory": program.home / "caches"}
    words = [f"--{name}={value}" for name, value in settings.items()]
    for rule in restricted:
        words += [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]
    return [str(program.binary), *words]
