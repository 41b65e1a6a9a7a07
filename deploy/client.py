"""Ask a server for labels or embeddings, from a thread or from asyncio.

    with Client("triton://127.0.0.1:8001/pets") as client:
        tagged = client.tag("cat.jpg")
        tagged.labels[0].name, tagged.labels[0].score

    async with AsyncClient("triton+http://127.0.0.1:8000/pets") as client:
        async for tagged in client.tag_many(paths):
            ...

Of a trunk, `embed` and `embed_many` give embeddings in the place of labels.

An image is a path, the bytes of a file (JPEG, PNG, …), an array uint8 [h, w, 3] RGB, or a Pillow image. Files are sent
as they are; the server decodes them.

Legend: V views, C classes, h x w cells of a class activation map (CAM), D width of an embedding.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import numpy as np

from cliplet.contract import EMBEDDINGS, GraphContract, TensorSpec
from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.images import ImageRef, read_image
from cliplet.server_address import ConnectionSettings, ServerAddress
from cliplet.serving import EMBEDDER, TAGGER, ImageRecord, ModelCard, tagger_extras
from cliplet.triton_async import AsyncConnection
from cliplet.triton_calls import Connection

if TYPE_CHECKING:
    from PIL import Image

    AnyImage = str | os.PathLike[str] | bytes | np.ndarray | Image.Image

T = TypeVar("T")


@dataclass(frozen=True)
class Label:
    """One label of an image: its score reached the threshold."""

    name: str
    score: float
    threshold: float


@dataclass(frozen=True)
class Tagged:
    """What a server says of an image.

    Attributes:
        labels: best first.
        scores: float32 [C], in the order of `Client.classes`.
        record: size of the image in pixels, and the boxes of its views.
        view_probs: float32 [V, C] of each view, if details were asked for and the model is a CLIP.
        cam: float32 [C, h, w], if details were asked for and the model is a classifier.
    """

    labels: tuple[Label, ...]
    scores: np.ndarray
    record: ImageRecord
    view_probs: np.ndarray | None = None
    cam: np.ndarray | None = None


@dataclass(frozen=True)
class _Asking(Generic[T]):
    """The part of a request that all images share, and how its answers are read.

    Attributes:
        verb: what is asked of the model, as the method is called.
    """

    verb: str
    contract: GraphContract
    read: Callable[[Mapping[str, np.ndarray]], T]
    detail: bool = False
    deadline_s: float | None = None
    priority: int = 0

    def more(self, card: ModelCard) -> tuple[TensorSpec, ...]:
        """The outputs to ask for beside the contract's; `UsageError` if the model is of the other kind."""
        if card.front is not self.contract:
            gives, other = ("labels", "tag") if card.front is TAGGER else ("embeddings", "embed")
            raise UsageError(
                f"{self.verb} of {card.name}, which gives {gives}",
                f"a call of `{other}`",
                f"client.{other}(image)",
            )
        return tagger_extras(card.manifest.kind) if self.detail else ()


def _tagging(detail: bool, deadline_s: float | None, priority: int) -> _Asking[Tagged]:
    return _Asking("tag", TAGGER, _tagged, detail, deadline_s, priority)


def _embedding(deadline_s: float | None, priority: int) -> _Asking[np.ndarray]:
    return _Asking("embed", EMBEDDER, lambda found: found[EMBEDDINGS][0], False, deadline_s, priority)


class Client:
    """A server's bundle to call from threads, as many as you like; a context manager that ends the connection.

    Args:
        address: `triton://HOST:PORT/NAME`; see `cliplet.server_address`. A server's only bundle needs no NAME.
        settings: the fields of `ConnectionSettings`: token, ca, deadline_s, retries, wait_s, in_flight.
            However many threads call, at most `in_flight` images are asked for at a time; the others wait, and
            their deadline goes on.

    Raises:
        UsageError: the address is none, the server has no such bundle or wants another token.
        ServerError: it does not answer.
    """

    def __init__(self, address: str | ServerAddress, **settings: Any) -> None:
        self._connection = Connection(_parsed(address), _settings(settings))
        try:
            self.card = self._connection.card()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of every score vector."""
        return self.card.manifest.vocabulary.names

    def tag(
        self, image: AnyImage, *, detail: bool = False, deadline_s: float | None = None, priority: int = 0
    ) -> Tagged:
        """Labels and scores of an image.

        Args:
            detail: also the scores of each view, or a classifier's CAM.
            deadline_s: seconds until the answer, in place of the client's.
            priority: 1 goes before 2, the usual one.

        Raises:
            ImageError: it cannot be read or decoded.
            ServerError: the server is away, busy, too slow, or its model failed.
        """
        return self._answer(image, _tagging(detail, deadline_s, priority))

    def embed(self, image: AnyImage, *, deadline_s: float | None = None, priority: int = 0) -> np.ndarray:
        """What a trunk makes of an image: float32 [D], of length 1. Arguments and errors are those of `tag`."""
        return self._answer(image, _embedding(deadline_s, priority))

    def tag_many(
        self,
        images: Iterable[AnyImage],
        *,
        detail: bool = False,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> Iterator[Tagged | ClipletError]:
        """For each image, in order, what `tag` returns or would raise; up to `in_flight` are asked for at a time.

        Images are taken from the iterable only as fast as answers are taken from this one.
        """
        return self._many(images, _tagging(detail, deadline_s, priority))

    def embed_many(
        self, images: Iterable[AnyImage], *, deadline_s: float | None = None, priority: int = 0
    ) -> Iterator[np.ndarray | ClipletError]:
        """For each image, in order, what `embed` returns or would raise; see `tag_many`."""
        return self._many(images, _embedding(deadline_s, priority))

    def _many(self, images: Iterable[AnyImage], asking: _Asking[T]) -> Iterator[T | ClipletError]:
        at_once = self._connection.settings.in_flight
        waiting: deque[Future[T | ClipletError]] = deque()
        pool = ThreadPoolExecutor(at_once, "ask")
        try:
            for image in images:
                waiting.append(pool.submit(self._tried, image, asking))
                if len(waiting) >= at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _tried(self, image: AnyImage, asking: _Asking[T]) -> T | ClipletError:
        try:
            return self._answer(image, asking)
        except ClipletError as error:
            return error

    def _answer(self, image: AnyImage, asking: _Asking[T]) -> T:
        more = asking.more(self.card)
        found = self._connection.infer(
            self.card.name,
            asking.contract,
            _feeds(image),
            more,
            deadline_s=asking.deadline_s,
            priority=asking.priority,
        )
        return asking.read(found)


class AsyncClient:
    """The same for asyncio; an asynchronous context manager. See `Client`."""

    card: ModelCard

    def __init__(self, address: str | ServerAddress, **settings: Any) -> None:
        self._address = _parsed(address)
        self._settings = _settings(settings)
        self._connection: AsyncConnection | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> None:
        """Ask the server for its card; `async with` does this.

        Raises:
            UsageError: the server has no such bundle or wants another token.
            ServerError: it does not answer.
        """
        if self._connection is None:
            self._connection = AsyncConnection(self._address, self._settings)
        try:
            self.card = await self._connection.card()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of every score vector."""
        return self.card.manifest.vocabulary.names

    async def served(self) -> tuple[str, ...]:
        """Names of the bundles that the server has."""
        return await self._connected().served()

    async def tag(
        self, image: AnyImage, *, detail: bool = False, deadline_s: float | None = None, priority: int = 0
    ) -> Tagged:
        """Labels and scores of an image; see `Client.tag`."""
        return await self._answer(image, _tagging(detail, deadline_s, priority))

    async def embed(
        self, image: AnyImage, *, deadline_s: float | None = None, priority: int = 0
    ) -> np.ndarray:
        """What a trunk makes of an image; see `Client.embed`."""
        return await self._answer(image, _embedding(deadline_s, priority))

    def tag_many(
        self,
        images: Iterable[AnyImage] | AsyncIterable[AnyImage],
        *,
        detail: bool = False,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> AsyncIterator[Tagged | ClipletError]:
        """For each image, in order, what `tag` returns or would raise; see `Client.tag_many`."""
        return self._many(images, _tagging(detail, deadline_s, priority))

    def embed_many(
        self,
        images: Iterable[AnyImage] | AsyncIterable[AnyImage],
        *,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> AsyncIterator[np.ndarray | ClipletError]:
        """For each image, in order, what `embed` returns or would raise; see `Client.tag_many`."""
        return self._many(images, _embedding(deadline_s, priority))

    async def _many(
        self, images: Iterable[AnyImage] | AsyncIterable[AnyImage], asking: _Asking[T]
    ) -> AsyncIterator[T | ClipletError]:
        waiting: deque[asyncio.Task[T | ClipletError]] = deque()
        try:
            async for image in _each(images):
                answering = self._tried(image, asking)
                waiting.append(asyncio.create_task(answering))
                if len(waiting) >= self._settings.in_flight:
                    yield await waiting.popleft()
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()

    async def _tried(self, image: AnyImage, asking: _Asking[T]) -> T | ClipletError:
        try:
            return await self._answer(image, asking)
        except ClipletError as error:
            return error

    async def _answer(self, image: AnyImage, asking: _Asking[T]) -> T:
        connection = self._connected()
        more = asking.more(self.card)
        # Reading a file, or encoding an array, would hold all others up.
        feeds = await asyncio.to_thread(_feeds, image)
        found = await connection.infer(
            self.card.name,
            asking.contract,
            feeds,
            more,
            deadline_s=asking.deadline_s,
            priority=asking.priority,
        )
        return asking.read(found)

    def _connected(self) -> AsyncConnection:
        assert self._connection is not None, "async with AsyncClient(…) as client"
        return self._connection


def _parsed(address: str | ServerAddress) -> ServerAddress:
    return ServerAddress.parse(address) if isinstance(address, str) else address


def _settings(given: dict[str, Any]) -> ConnectionSettings:
    """The fields of `ConnectionSettings`; encoded images do not go through shared memory."""
    if isinstance(given.get("ca"), str):
        given = {**given, "ca": Path(given["ca"])}
    return replace(ConnectionSettings(**given), shared_memory="off")


def _feeds(image: AnyImage) -> dict[str, np.ndarray]:
    data = np.empty((1, 1), object)
    data[0, 0] = _encoded(image)
    return {TAGGER.inputs[0].name: data}


def _encoded(image: AnyImage) -> bytes:
    """The bytes of an image's file."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        return read_image(ImageRef(path, path))
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise DataError(f"an image of {image.dtype} {list(image.shape)}", "uint8 [height, width, 3], RGB")
        image = Image.fromarray(image)
    file = io.BytesIO()
    # PNG loses nothing, and at this level it is quick. What it cannot hold (CMYK, …) is shown as RGB anyway.
    fitting = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
    fitting.save(file, "PNG", compress_level=1, exif=image.getexif())
    return file.getvalue()


def _tagged(found: Mapping[str, np.ndarray]) -> Tagged:
    record = ImageRecord.from_json(found["record"][0, 0])
    labels = tuple(Label(row["name"], row["score"], row["threshold"]) for row in record.labels)
    extras = {name: found[name][0] for name in ("view_probs", "cam") if name in found}
    return Tagged(labels, found["scores"][0], record, **extras)


async def _each(images: Iterable[AnyImage] | AsyncIterable[AnyImage]) -> AsyncIterator[AnyImage]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    else:
        for image in images:
            yield image
