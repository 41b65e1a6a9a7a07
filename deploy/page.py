"""A page to try a server with, and the few routes it lives on; it says of its server whether it is ready.

    app = make_app(backend, PageOptions(token="…"))
    with run_page(app, "127.0.0.1", PAGE_PORT) as page:     # in a thread of its own
        print(page.url)

    GET  /              the page: one file that loads nothing from elsewhere
    GET  /api/models    what gives labels: classes, thresholds, views, engine; and how large an image may be
    POST /api/tag       ?model=NAME&detail=1, the body an encoded image (or a form with one): labels, scores, where
    GET  /api/sample    ?number=7: a drawn scene of known objects, as a PNG
    GET  /healthz       200 as long as the process lives
    GET  /readyz        200 if every model answered a tiny inference just now, else 503 and the reason for each

Nothing here reads a file that a request names, and no image is kept.

Legend: C classes, V views, h x w cells of a class activation map (CAM).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from aiohttp import web
from PIL import Image

from cliplet.errors import ClipletError, UsageError
from cliplet.scenes import SceneWorld, scene_world
from cliplet.serving import ImageRecord, ModelCard

from .health import Health
from .page_guard import BUFFERED_BODIES, GUARD, Gate, Guard, Refusal, in_one_form, only_allowed
from .page_server import RunningPage, run_page

__all__ = ["Backend", "PageOptions", "RunningPage", "Tagging", "make_app", "run_page"]

TEMPLATE = Path(__file__).with_name("page.html")
# The gallery's colours, type and tiles, said once; the page adds its own to them.
STYLE_MARK = "/* cliplet: the style of gallery.html */"
HEALTH_PATH = "/healthz"
READY_PATH = "/readyz"
SAMPLES = 10_000
PLACES = 4  # digits of what is drawn over an image


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What the page takes on.

    Attributes:
        token: what callers of `/api/` have to know; see `Guard`.
        host_names: names of this machine that requests may use beside the usual ones.
        max_bytes: of one image.
        in_flight: images that are labelled at once; `queue` more may wait, others are told to come back.
        timeout_s: the longest that one image may take, its time in the queue included.
        ready_s: the longest that a readiness check may take; the backend's own deadline is shorter and says more.
        ready_for_s: for how long one check answers for all who ask.
    """

    token: str = ""
    host_names: tuple[str, ...] = ()
    max_bytes: int = 32 << 20
    in_flight: int = 4
    queue: int = 32
    timeout_s: float = 30.0
    ready_s: float = 10.0
    ready_for_s: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("max_bytes", 1), ("in_flight", 1), ("queue", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}", f"{least} or more")


@dataclass(frozen=True)
class Tagging:
    """What a model says of one image.

    Attributes:
        scores_C: of every class.
        view_probs_VC: of a CLIP's views, if asked for.
        cam_Chw: of a classifier, if asked for.
    """

    record: ImageRecord
    scores_C: np.ndarray
    view_probs_VC: np.ndarray | None = None
    cam_Chw: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "width": self.record.width,
            "height": self.record.height,
            "labels": [dict(label) for label in self.record.labels],
            "scores": [float(score) for score in self.scores_C],
            "boxes": [list(box) for box in self.record.boxes],
            "view_probs": _rounded(self.view_probs_VC),
            "cam": _rounded(self.cam_Chw),
        }


class Backend(Protocol):
    """Who labels; every method is called in the event loop of the page."""

    async def models(self) -> Sequence[ModelCard]:
        """What is served and gives labels.

        Raises:
            ClipletError: the server cannot be asked.
        """

    async def tag(self, model: str, image: bytes, detail: bool) -> Tagging:
        """What `model` says of an encoded image; `detail` asks for where it saw it, too.

        Raises:
            ImageError: it is no image that can be decoded.
            EnvironmentError_: the server cannot be reached or cannot take it now.
        """

    async def ready(self) -> Health:
        """Whether every model answers a tiny inference just now."""

    async def close(self) -> None:
        """Let go of the connection."""


def make_app(backend: Backend, options: PageOptions | None = None) -> web.Application:
    """The application; what it is run by calls `backend.close` at its end."""
    options = options or PageOptions()
    app = web.Application(middlewares=[in_one_form, only_allowed], client_max_size=options.max_bytes)
    app[GUARD] = Guard(token=options.token, host_names=options.host_names)
    routes = _Routes(backend, options)

    async def close(_: web.Application) -> None:
        await backend.close()

    app.on_cleanup.append(close)
    app.add_routes(
        [
            web.get("/", routes.page),
            web.get("/api/models", routes.models),
            web.post("/api/tag", routes.tag),
            web.get("/api/sample", routes.sample),
            web.get(HEALTH_PATH, routes.alive),
            web.get(READY_PATH, routes.ready),
        ]
    )
    return app


class _Routes:
    def __init__(self, backend: Backend, options: PageOptions) -> None:
        self._backend = backend
        self._options = options
        self._gate = Gate(options.in_flight, options.queue, BUFFERED_BODIES * options.max_bytes)
        self._ready = _Shared(self._check_ready, options.ready_for_s)

    async def page(self, _: web.Request) -> web.Response:
        text, policy = page_html()
        return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": policy})

    async def models(self, _: web.Request) -> web.Response:
        cards = await self._in_time(self._backend.models())
        limits = {"bytes": self._options.max_bytes, "in_flight": self._options.in_flight}
        return web.json_response({"models": [_described(card) for card in cards], "limits": limits})

    async def tag(self, request: web.Request) -> web.Response:
        model = await self._model(request.query.get("model", ""))
        detail = request.query.get("detail", "0") not in ("", "0", "false")
        async with self._gate.body_of(request) as image:
            found = await self._in_time(self._tag(model, image, detail))
        return web.json_response(found.to_json())

    async def sample(self, request: web.Request) -> web.Response:
        given = request.query.get("number", "0")
        if not re.fullmatch("[0-9]{1,4}", given):
            raise UsageError(f"sample {given[:20]!r}", f"a number below {SAMPLES:,}", "/api/sample?number=7")
        async with self._gate.turn():
            png = await asyncio.to_thread(_sample, int(given))
        named = {"Content-Disposition": f'inline; filename="scene-{int(given)}.png"'}
        return web.Response(body=png, content_type="image/png", headers=named)

    async def alive(self, _: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def ready(self, request: web.Request) -> web.Response:
        """Reasons name models and may quote a log: with a token, they are for those who know it."""
        health: Health = await self._ready.get()
        body: dict[str, Any] = {"ready": health.ok}
        if request.app[GUARD].knows_token(request):
            body["models"] = {
                m.model: {"ok": m.ok, "busy": m.busy, "seconds": round(m.seconds, PLACES), "reason": m.reason}
                for m in health.models
            }
        return web.json_response(body, status=200 if health.ok else 503)

    async def _check_ready(self) -> Health:
        limit = self._options.ready_s
        try:
            async with asyncio.timeout(limit):
                return await self._backend.ready()
        except TimeoutError:
            return Health.down(["server"], f"no answer within {limit:g} s")
        except ClipletError as error:
            return Health.down(["server"], error.happened)

    async def _model(self, name: str) -> str:
        served = [card.name for card in await self._in_time(self._backend.models())]
        if name in served:
            return name
        if not name and len(served) == 1:
            return served[0]
        if not served:
            raise Refusal(
                404,
                "no model here gives labels",
                "a CLIP or a classifier; embeddings of a trunk are for programs",
                "Client(…).embed(image) of cliplet.deploy.client",
            )
        raise Refusal(
            404 if name else 400,
            f"no model {name[:80]!r} gives labels here"
            if name
            else f"{len(served)} models give labels, and none is named",
            f"one of {', '.join(served)}",
            f"/api/tag?model={served[0]}",
        )

    async def _tag(self, model: str, image: bytes, detail: bool) -> Tagging:
        async with self._gate.turn():
            return await self._backend.tag(model, image, detail)

    async def _in_time(self, work: Awaitable[Any]) -> Any:
        limit = self._options.timeout_s
        try:
            return await asyncio.wait_for(work, limit)
        except TimeoutError:
            raise Refusal(
                504,
                f"the model did not answer within {limit:g} s",
                "an answer",
                "ask again, or look at /readyz",
            ) from None


class _Shared:
    """One answer for all who ask at the same time or shortly after."""

    def __init__(self, find: Callable[[], Awaitable[Any]], seconds: float) -> None:
        self._find = find
        self._seconds = seconds
        self._lock = asyncio.Lock()
        self._found: Any = None
        self._until = float("-inf")

    async def get(self) -> Any:
        loop = asyncio.get_running_loop()
        async with self._lock:
            if loop.time() >= self._until:
                self._found = await self._find()
                self._until = loop.time() + self._seconds
            return self._found


@cache
def page_html() -> tuple[str, str]:
    """The page, and the Content-Security-Policy that lets it run its one script and talk to its own server alone."""
    text = TEMPLATE.read_text(encoding="utf-8")
    shared = _element(TEMPLATE.with_name("gallery.html").read_text(encoding="utf-8"), "style")
    text = text.replace(STYLE_MARK, shared)
    style, script = (_digest(_element(text, tag)) for tag in ("style", "script"))
    policy = (
        f"default-src 'none'; style-src '{style}'; script-src '{script}'; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _element(html: str, tag: str) -> str:
    (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return str(body)


def _digest(body: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()


def _described(card: ModelCard) -> dict[str, Any]:
    names = ("name", "views", "threshold_source", "runtime", "precision", "device", "max_pixels")
    return {
        **{name: getattr(card, name) for name in names},
        "kind": card.manifest.kind,
        "model": card.manifest.model,
        "classes": list(card.manifest.vocabulary.names),
        "thresholds": list(card.thresholds),
    }


def _rounded(values: np.ndarray | None) -> Any:
    return None if values is None else np.round(values.astype(np.float64), PLACES).tolist()


@cache
def _world() -> SceneWorld:
    # The part whose drawings nothing was trained on.
    return scene_world("test-unseen")


def _sample(number: int) -> bytes:
    png = io.BytesIO()
    Image.fromarray(_world().scene(number).image).save(png, "PNG")
    return png.getvalue()
