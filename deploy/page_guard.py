"""What a page served over HTTP needs around its routes: who may ask, how much, how fast, and answers in one form.

    app = web.Application(middlewares=[in_one_form, only_allowed])
    app[GUARD] = Guard(token="", host_names=())

A refusal is JSON with the parts of every cliplet error: what happened, what was expected, the step that mends it.
A page on this machine is reachable from every web site that its user visits, so a request must name a host that no
foreign domain can point here (DNS rebinding), and a POST must not come from a page of another origin. With a token
neither matters: a browser does not send one by itself.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web

from cliplet.errors import ClipletError, DataError, EnvironmentError_, UsageError
from cliplet.images import ImageError
from cliplet.triton_errors import DeadlineExpired, is_passing

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HEADERS = {
    "Server": "cliplet",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# A body has this long for free, and then has to have come at this rate: a slow line passes, a dripping one does not.
GRACE_S = 5.0
SLOWEST_BYTES_S = 16 * 1024
# Bodies that are held at once, in the largest that one may be.
BUFFERED_BODIES = 8
_CHUNK = 1 << 16
# Names that cannot be bought: a foreign domain is never one of them.
_OWN_SUFFIXES = (".localhost", ".local", ".internal", ".svc", ".svc.cluster.local")


class Refusal(Exception):
    """A request is answered with an error status."""

    def __init__(
        self, status: int, happened: str, expected: str = "", fix: str = "", **headers: str | float
    ) -> None:
        super().__init__(happened)
        self.status = status
        self.body = {"happened": happened, "expected": expected, "fix": fix}
        self.headers = {name.replace("_", "-").title(): str(value) for name, value in headers.items()}

    def response(self) -> web.Response:
        return web.json_response({"error": self.body}, status=self.status, headers=self.headers)


@dataclass(kw_only=True)
class Guard:
    """Who may ask.

    Attributes:
        token: what `authorization: Bearer TOKEN` has to name on `/api/`; empty lets everyone in.
        host_names: names of this machine that requests may use beside the usual ones.
        listens_at: the address the page listens at.
    """

    token: str = ""
    host_names: tuple[str, ...] = ()
    listens_at: str = "127.0.0.1"

    def check(self, request: web.Request) -> None:
        """Raise `Refusal` unless the request may be answered."""
        if request.path.startswith("/api/") and not self.knows_token(request):
            raise Refusal(
                401,
                "this server wants a token",
                "a header `authorization: Bearer TOKEN`",
                "open the page with #token=TOKEN at the end of its address",
                www_authenticate="Bearer",
            )
        if self.token:
            return
        self._check_host(request)
        if request.method not in ("GET", "HEAD"):
            self._check_origin(request)

    def knows_token(self, request: web.Request) -> bool:
        """Whether the request carries the token, or none is wanted."""
        if not self.token:
            return True
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode())

    def _check_host(self, request: web.Request) -> None:
        name = _host_name(request.headers.get("Host", ""))
        if name in self.host_names or self._is_own(name):
            return
        raise Refusal(
            421,
            f"the request was sent to the host {name!r}",
            "a name that only this machine has, such as localhost or its address",
            "open the address that `cliplet serve` printed, or serve with --page-host NAME or a --token",
        )

    def _is_own(self, name: str) -> bool:
        if name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return not is_loopback(self.listens_at) and _is_private_name(name)
        return address.is_loopback or not is_loopback(self.listens_at)

    def _check_origin(self, request: web.Request) -> None:
        origin = request.headers.get("Origin")
        site = request.headers.get("Sec-Fetch-Site", "same-origin")
        same = origin is None or urlsplit(origin).netloc == request.headers.get("Host")
        if not same or site not in ("same-origin", "none"):
            raise Refusal(
                403,
                f"the request came from a page of {origin or 'another site'}",
                "one from this server's own page, or from a program",
                "ask from a program, or serve with a --token",
            )


GUARD = web.AppKey("guard", Guard)


class Gate:
    """How much is done at once: `in_flight` calls, and at most `queue` more that wait."""

    def __init__(self, in_flight: int, queue: int, buffered_bytes: int) -> None:
        self._running = asyncio.Semaphore(in_flight)
        self._places = in_flight + queue
        self._inside = 0
        self._room = buffered_bytes

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Context that begins when it is this call's turn.

        Raises:
            Refusal: too many wait already.
        """
        self.check_room()
        self._inside += 1
        try:
            async with self._running:
                yield
        finally:
            self._inside -= 1

    def check_room(self, more_bytes: int = 0) -> None:
        """Raise `Refusal` if another request, or more bytes of one, cannot be taken."""
        if self._inside >= self._places:
            raise _busy(f"{self._inside} images are being labelled or wait")
        if more_bytes > self._room:
            raise _busy("as many images are being received as there is memory for")

    @asynccontextmanager
    async def body_of(self, request: web.Request) -> AsyncIterator[bytes]:
        """Context with the image in a request: its body, or the first file of a form; its room is free again after.

        Raises:
            Refusal: it is too large, comes too slowly, or holds no file.
        """
        limit = request.client_max_size
        if (request.content_length or 0) > limit + 4096 * request.content_type.startswith("multipart/"):
            raise _too_large(limit)
        self.check_room(request.content_length or 0)
        data = bytearray()
        try:
            async for chunk in _at_a_fair_rate(_chunks(request)):
                if len(data) + len(chunk) > limit:
                    raise _too_large(limit)
                self.check_room(len(chunk))
                self._room -= len(chunk)
                data += chunk
            yield bytes(data)
        finally:
            self._room += len(data)


@web.middleware
async def in_one_form(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every answer with the headers of `HEADERS`, every error as JSON."""
    try:
        response = await handler(request)
    except Refusal as refusal:
        response = refusal.response()
    except ClipletError as error:
        response = _of_cliplet(error).response()
    except web.HTTPException as error:
        response = _of_http(error, request).response()
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:  # noqa: BLE001 - what went wrong is for the log, not for who asked
        log.exception("%s %s", request.method, request.path)
        response = Refusal(500, "the server failed to answer", "an answer", "see its log").response()
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


@web.middleware
async def only_allowed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Only what the application's guard lets in."""
    request.app[GUARD].check(request)
    return await handler(request)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _busy(happened: str) -> Refusal:
    return Refusal(503, happened, "fewer at once", "ask again in a second", retry_after=1)


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413,
        f"the image has more than {limit:,} bytes",
        f"at most {limit:,} bytes",
        "send a smaller image",
    )


def _of_cliplet(error: ClipletError) -> Refusal:
    kinds: Mapping[type[ClipletError], int] = {
        UsageError: 400,
        DataError: 422,
        EnvironmentError_: 503,
        DeadlineExpired: 504,
        ClipletError: 503 if is_passing(error) else 502,
    }
    status = next(status for kind, status in kinds.items() if isinstance(error, kind))
    refusal = Refusal(status, error.happened, error.expected, error.fix)
    if isinstance(error, ImageError):
        refusal.body |= {"stage": error.stage, "expected": error.expected or "a whole image"}
    if status == 503:
        refusal.headers["Retry-After"] = "1"
    return refusal


def _of_http(error: web.HTTPException, request: web.Request) -> Refusal:
    expected = {
        404: "/, /api/models, /api/tag, /healthz or /readyz",
        405: "POST /api/tag; GET for the others",
    }
    refusal = Refusal(
        error.status, f"{request.method} {request.path}: {error.reason}", expected.get(error.status, "")
    )
    if "Allow" in error.headers:
        refusal.headers["Allow"] = error.headers["Allow"]
    return refusal


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_private_name(name: str) -> bool:
    return bool(name) and ("." not in name or name.endswith(_OWN_SUFFIXES))


async def _at_a_fair_rate(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + GRACE_S
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Refusal(
                408,
                "the image comes too slowly",
                f"{SLOWEST_BYTES_S:,} bytes a second",
                "ask again over a better line",
                connection="close",
            ) from None
        deadline += len(chunk) / SLOWEST_BYTES_S
        yield chunk


async def _chunks(request: web.Request) -> AsyncIterator[bytes]:
    if not request.content_type.startswith("multipart/"):
        async for chunk in request.content.iter_chunked(_CHUNK):
            yield chunk
        return
    try:
        async for part in await request.multipart():
            if getattr(part, "filename", None) is not None or getattr(part, "name", None) == "image":
                while chunk := await part.read_chunk(_CHUNK):  # type: ignore[union-attr]
                    yield chunk
                return
    except (ValueError, AttributeError) as error:
        raise Refusal(
            400, f"the form cannot be read: {error}", "multipart/form-data", "curl -F image=@a.jpg"
        ) from error
    raise Refusal(400, "the form holds no file", "one file, in a field `image`", "curl -F image=@a.jpg")
