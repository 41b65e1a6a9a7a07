"""From inputs to rows, batch by batch and in order: on this machine's engine, or through a server.

A tagger that computes here, or on a server that shares memory with us, is given pixels: images are decoded in threads
while the batch before is scored. A server elsewhere is given the encoded files, one a request and several at a time,
and decodes them itself. Rows are the same either way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np

from cliplet.errors import ClipletError, ServerError
from cliplet.images import ImageError, ImageRef, Picture, decode_image, read_image
from cliplet.label_records import ErrorRecord, LabelRecord
from cliplet.runners.triton_runner import TritonRunner
from cliplet.serving import TAGGER, ImageRecord
from cliplet.shared_segments import NoSharedMemory
from cliplet.tagger import Tagger
from cliplet.trace import counter, span
from cliplet.triton_errors import DeadlineExpired, ModelFailed, is_passing

Batch = Sequence[ImageRef]


@dataclass(frozen=True)
class Refusal:
    """An image that the engine did not score.

    Attributes:
        error: what to record of it, if it proves to be the image's own fault.
        by_server: a server was too slow or failed, which mostly is the server's fault.
    """

    error: ErrorRecord
    by_server: bool


@dataclass(frozen=True)
class ScoredBatch:
    """What became of the images of one batch; each stands in one of the lists.

    Attributes:
        rows: those that were scored.
        refused: those that the engine did not score, perhaps through its own fault.
        failed: those that could not be read or decoded.
    """

    rows: list[LabelRecord] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    failed: list[ErrorRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows) + len(self.refused) + len(self.failed)

    def __add__(self, other: ScoredBatch) -> ScoredBatch:
        return ScoredBatch(self.rows + other.rows, self.refused + other.refused, self.failed + other.failed)


class Scoring(Protocol):
    """A way from inputs to rows."""

    def results(self, batches: Iterable[Batch]) -> Generator[ScoredBatch, None, None]:
        """What came of each batch, in order; a few batches are on their way at any time.

        Raises:
            ServerError: the server is away or its model has died, and was waited for in vain.
        """
        ...

    def stop_waiting(self) -> None:
        """Wait no longer for a server that is away. A signal's handler may call it."""
        ...


def scoring_of(tagger: Tagger, *, batch_size: int, workers: int, max_pixels: int) -> Scoring:
    """The way that suits a tagger.

    Args:
        batch_size: of most batches.
        workers: threads that decode.
        max_pixels: larger images are refused.
    """
    runner = tagger.runner
    if not isinstance(runner, TritonRunner):
        return PixelScoring(tagger, batch_size, workers, max_pixels)
    own_views = str(tagger.plan.views) == runner.card.views
    if runner.connection.shares_memory or not own_views:
        return PixelScoring(tagger, batch_size, workers, max_pixels, runner)
    return FileScoring(tagger, batch_size, max_pixels, runner)


@dataclass(frozen=True)
class PixelScoring:
    """Decodes here and hands pixels to the tagger.

    Attributes:
        runner: where they are scored on a server.
    """

    tagger: Tagger
    batch_size: int
    workers: int
    max_pixels: int
    runner: TritonRunner | None = None

    def results(self, batches: Iterable[Batch]) -> Generator[ScoredBatch, None, None]:
        at_once = self.tagger.runner.concurrency
        decoders = ThreadPoolExecutor(self.workers, "decode")
        engines = ThreadPoolExecutor(at_once, "engine")

        def begin(batch: Batch) -> Callable[[], ScoredBatch]:
            loading = [decoders.submit(load, ref, self.tagger, self.max_pixels) for ref in batch]

            def finish() -> ScoredBatch:
                with span("wait for decode"):
                    loaded = [future.result() for future in loading]
                return score_loaded(self.tagger, loaded)

            return engines.submit(finish).result

        try:
            yield from _in_order(begin, batches, at_once + -(-2 * self.workers // self.batch_size))
        finally:
            self.stop_waiting()
            decoders.shutdown(cancel_futures=True)
            engines.shutdown(cancel_futures=True)

    def stop_waiting(self) -> None:
        if self.runner is not None:
            self.runner.connection.stop_waiting()


@dataclass(frozen=True)
class FileScoring:
    """Sends encoded files to a server's tagger."""

    tagger: Tagger
    batch_size: int
    max_pixels: int
    runner: TritonRunner

    def results(self, batches: Iterable[Batch]) -> Generator[ScoredBatch, None, None]:
        senders = ThreadPoolExecutor(self.runner.concurrency, "send")

        def begin(batch: Batch) -> Callable[[], ScoredBatch]:
            asked = [senders.submit(self._scored, ref) for ref in batch]
            return lambda: sum((future.result() for future in asked), ScoredBatch())

        try:
            yield from _in_order(begin, batches, 1 + -(-2 * self.runner.concurrency // self.batch_size))
        finally:
            self.stop_waiting()
            senders.shutdown(cancel_futures=True)

    def stop_waiting(self) -> None:
        self.runner.connection.stop_waiting()

    def _scored(self, ref: ImageRef) -> ScoredBatch:
        """What the server makes of one file. What it does not take is looked at here, to be refused as always."""
        try:
            data = read_image(ref)
        except ImageError as error:
            return _unread(ref, error)
        began = perf_counter()
        try:
            found = self.runner.connection.infer(
                self.runner.card.name, TAGGER, {"image": np.array([[data]], object)}
            )
        except ImageError:
            return score_loaded(self.tagger, [self._decoded(ref, data)])
        except ClipletError as error:
            return _refused(ref, error)
        seconds = perf_counter() - began
        record = ImageRecord.from_json(found["record"][0, 0])
        if record.width * record.height > self.max_pixels:
            return score_loaded(self.tagger, [self._decoded(ref, data)])
        picture = Picture(np.empty((0, 0, 3), np.uint8), record.width, record.height)
        return ScoredBatch([self.tagger.record(ref.path, picture, found["scores"][0], seconds)])

    def _decoded(self, ref: ImageRef, data: bytes) -> Loaded:
        return _loaded(ref, data, self.tagger, self.max_pixels)


@dataclass(frozen=True)
class Loaded:
    """One input of a batch: its picture, or why there is none."""

    ref: ImageRef
    picture: Picture | None
    error: ImageError | None = None


def load(ref: ImageRef, tagger: Tagger, max_pixels: int) -> Loaded:
    """An input, read and decoded as a tagger wants it, or why it cannot be."""
    try:
        with span("read"):
            data = read_image(ref)
    except ImageError as error:
        return Loaded(ref, None, error)
    return _loaded(ref, data, tagger, max_pixels)


def score_loaded(tagger: Tagger, batch: Sequence[Loaded]) -> ScoredBatch:
    """Rows of a batch. If the engine refuses it, each image is tried alone to find the culprit.

    Raises:
        ServerError: the server is away, or its model has died; no image is to blame.
    """
    unread = [_unread(one.ref, one.error) for one in batch if one.error is not None]
    pictures = [(one.ref, one.picture) for one in batch if one.picture is not None]
    return sum(unread, _scored(tagger, pictures))


def _loaded(ref: ImageRef, data: bytes, tagger: Tagger, max_pixels: int) -> Loaded:
    try:
        with span("decode"):
            return Loaded(ref, decode_image(data, **tagger.room, max_pixels=max_pixels))
    except ImageError as error:
        return Loaded(ref, None, error)


def _scored(tagger: Tagger, batch: Sequence[tuple[ImageRef, Picture]]) -> ScoredBatch:
    if not batch:
        return ScoredBatch()
    began = perf_counter()
    try:
        with span("engine", images=len(batch)):
            scores_BC = tagger.score([picture for _, picture in batch])["scores"]
    except ClipletError as error:
        if len(batch) == 1 or _is_no_fault_of_images(error):
            return _refused(batch[0][0], error)
        return sum((_scored(tagger, [one]) for one in batch), ScoredBatch())
    seconds = (perf_counter() - began) / len(batch)
    return ScoredBatch(
        [
            tagger.record(ref.path, picture, scores_C, seconds)
            for (ref, picture), scores_C in zip(batch, scores_BC, strict=True)
        ]
    )


def _unread(ref: ImageRef, error: ImageError) -> ScoredBatch:
    return ScoredBatch(failed=[ErrorRecord(ref.path, error.stage, error.reason)])


def _refused(ref: ImageRef, error: ClipletError) -> ScoredBatch:
    """The refusal of one input; raises `error` where it says nothing about any input."""
    if _is_no_fault_of_images(error):
        raise error
    record = ErrorRecord(ref.path, "infer", error.happened)
    return ScoredBatch(refused=[Refusal(record, isinstance(error, ServerError))])


def _is_no_fault_of_images(error: ClipletError) -> bool:
    """Whether a server is away or busy, its model dead, or no memory left to share with it.

    A server that is too slow, or fails, may be so due to an image.
    """
    if isinstance(error, DeadlineExpired | ModelFailed):
        return is_passing(error)
    return isinstance(error, ServerError | NoSharedMemory)


def _in_order(
    begin: Callable[[Batch], Callable[[], ScoredBatch]], batches: Iterable[Batch], ahead: int
) -> Iterator[ScoredBatch]:
    """What came of each batch, in order, with at most so many begun beyond the one that is waited for."""
    waiting: deque[Callable[[], ScoredBatch]] = deque()
    for batch in batches:
        waiting.append(begin(batch))
        counter("batches waiting", len(waiting))
        if len(waiting) > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()
