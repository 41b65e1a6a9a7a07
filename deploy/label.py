"""Labels a collection of any size: every input ends in one row of labels or one row of errors.

    cliplet label photos --classes classes.txt --out labels

Images are decoded in threads while the engine scores the batch before; at most a few batches are in memory.
A batch is always the same stretch of the sorted inputs, whatever was finished before, so a run that was
killed and started again ends with the very scores of an undisturbed one.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, perf_counter
from types import FrameType
from typing import Any

from cliplet.artifact import library_versions
from cliplet.errors import ClipletError, DataError, EnvironmentError_, ObjectiveError, UsageError
from cliplet.images import MAX_PIXELS, ImageError, ImageRef, Picture, decode_image, read_image
from cliplet.labels import RUN_SCHEMA_VERSION, ErrorRecord, LabelRecord, LabelStore
from cliplet.listing import Listing, find_images
from cliplet.machine import usable_cores
from cliplet.plan import Plan, TaggerSettings, make_plan
from cliplet.progress import ProgressBar
from cliplet.tagger import Tagger, load_plan

# A part is written when it has this many rows, or when this much time has passed: what a kill can cost.
PART_ROWS = 2048
PART_SECONDS = 10.0
# Images that the engine refuses one after the other before the engine itself is held to be broken.
ENGINE_REFUSALS = 8


@dataclass(frozen=True, kw_only=True)
class LabelJob:
    """One call of `cliplet label`.

    Attributes:
        sources: folders, globs, files, text lists, tar shards.
        out: folder of the results.
        batch_size: images in a batch; 0 chooses by the number of views. Memory grows with it.
        workers: threads that decode; 0 means one a core.
        limit: label only so many inputs, the first ones.
        max_pixels: images with more are not decoded (decompression bombs).
        retry_failed: try the inputs in errors.parquet again.
        overwrite: forget what the folder holds, even of another job.
        max_error_rate: share of failed inputs above which the run ends with exit code 4.
    """

    sources: tuple[str, ...]
    out: Path
    tagger: TaggerSettings = field(default_factory=TaggerSettings)
    batch_size: int = 0
    workers: int = 0
    limit: int | None = None
    max_pixels: int = MAX_PIXELS
    retry_failed: bool = False
    overwrite: bool = False
    max_error_rate: float | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--batch-size", self.batch_size, 0),
            ("--workers", self.workers, 0),
            ("--limit", 1 if self.limit is None else self.limit, 1),
            ("--max-pixels", self.max_pixels, 1),
        ):
            if value < least:
                raise UsageError(f"{flag} {value}", f"a whole number from {least} on")
        if self.max_error_rate is not None and not 0 <= self.max_error_rate <= 1:
            raise UsageError(
                f"--max-error-rate {self.max_error_rate}", "a share from 0 to 1", "--max-error-rate 0.05"
            )


@dataclass(frozen=True)
class LabelResult:
    """How a run ended.

    Attributes:
        inputs: how many inputs the job has.
        labelled, failed: rows in the two tables now; `interrupted` runs have fewer rows than inputs.
        scored_now: images that this run scored, in `seconds` from the first batch to the last row.
        threshold_source: where the thresholds came from.
    """

    inputs: int
    labelled: int
    failed: int
    scored_now: int
    seconds: float
    interrupted: bool
    threshold_source: str


@dataclass(frozen=True)
class DryRun:
    """What a run would do, found without loading a model or writing a file."""

    listing: Listing
    inputs: int
    settled: int
    plan: Plan
    images_per_batch: int


def dry_run(job: LabelJob) -> DryRun:
    """What `label` would do for `job`: how many inputs, how many of them an earlier run has settled.

    Raises what `label` would raise for its options, its sources and an output folder of another job.
    """
    chosen = make_plan(job.tagger)
    listing = find_images(job.sources)
    images = listing.images[: job.limit]
    store = LabelStore(job.out)
    settled = 0
    if store.has_rows() and not job.overwrite:
        store.refuse_other_job(_fingerprint(job, chosen))
        progress = _Progress.read(store, retry_failed=job.retry_failed)
        settled = sum(ref.path in progress for ref in images)
    return DryRun(listing, len(images), settled, chosen, job.batch_size or chosen.images_per_batch)


def label(job: LabelJob) -> LabelResult:
    """Label all inputs of `job`, continuing where an earlier run of the same job stopped.

    Ctrl-C or SIGTERM ends it after the batch in hand with all work saved; a second one ends it at once.

    Raises:
        UsageError: the folder holds another job, or another run is writing it.
        DataError: no images, or no usable class names.
        EnvironmentError_: the output cannot be written, or the engine fails on every image. What was labelled
            before is kept.
    """
    chosen = make_plan(job.tagger)
    images = find_images(job.sources).images[: job.limit]
    with LabelStore(job.out) as store:
        store.begin(_run_description(job, chosen), overwrite=job.overwrite)
        progress = _Progress.read(store, retry_failed=job.retry_failed)
        before = len(progress.labelled)
        seconds, interrupted = 0.0, False
        if not all(ref.path in progress for ref in images):
            with load_plan(chosen) as tagger:
                begun = monotonic()
                try:
                    interrupted = _label_all(job, tagger, images, progress)
                finally:
                    progress.flush()
                seconds = monotonic() - begun
        else:
            progress.flush()
    wanted = {ref.path for ref in images}
    return LabelResult(
        inputs=len(images),
        labelled=len(progress.labelled & wanted),
        failed=sum(e.path in wanted for e in progress.errors),
        scored_now=len(progress.labelled) - before,
        seconds=seconds,
        interrupted=interrupted,
        threshold_source=chosen.threshold_source,
    )


def hold_objective(job: LabelJob, result: LabelResult) -> None:
    """Raise if too many inputs failed; every row is written all the same.

    Raises:
        ObjectiveError: a larger share than `max_error_rate`.
        DataError: all of them.
    """
    rate = result.failed / max(result.inputs, 1)
    if job.max_error_rate is not None and rate > job.max_error_rate:
        raise ObjectiveError(
            f"{result.failed:,} of {result.inputs:,} inputs failed ({rate:.1%}); {result.labelled:,} are labelled",
            f"at most {job.max_error_rate:.1%} (--max-error-rate)",
            f"read {job.out / 'errors.parquet'}, mend the files, then run again with --retry-failed",
        )
    if result.failed == result.inputs:
        raise DataError(
            f"none of {result.inputs:,} inputs could be labelled; the reasons are in {job.out / 'errors.parquet'}",
            "images",
            "mend them, then run again with --retry-failed",
        )


def _label_all(job: LabelJob, tagger: Tagger, images: Sequence[ImageRef], progress: _Progress) -> bool:
    """Label what is not settled yet; whether it was interrupted.

    An image that the engine refuses is an error of its own only once another one passes after it: an engine
    that refuses everything is broken, and its inputs are not to blame.
    """
    done = sum(ref.path in progress for ref in images)
    suspects: list[ErrorRecord] = []
    with (
        _interruption() as stop,
        ProgressBar("labelling", len(images), done=done, quiet=job.quiet) as bar,
    ):
        for batch in _batches(job, tagger, images, progress):
            rows, refused = _score(tagger, [loaded for loaded in batch if loaded.picture is not None])
            suspects += refused
            if rows:
                progress.add(rows, suspects)
                suspects = []
            progress.add([], [loaded.error for loaded in batch if loaded.error is not None])
            if len(suspects) >= ENGINE_REFUSALS:
                raise EnvironmentError_(
                    f"the engine refused {len(suspects)} images in a row: {suspects[-1].reason}",
                    "an engine that works; nothing was recorded about these images",
                    "mend it (`cliplet doctor` looks at it), then the same command continues",
                )
            bar.advance(len(batch))
            if stop.is_set:
                return True
    progress.add([], suspects)
    return False


class _Progress:
    """Rows and errors of a store: those on the disk and those waiting to be written."""

    def __init__(self, store: LabelStore, labelled: set[str], errors: list[ErrorRecord], retry: bool) -> None:
        self._store = store
        self.labelled = labelled
        self._errors = {e.path: e for e in errors}
        self._settled = set() if retry else set(self._errors)
        self._waiting: list[LabelRecord] = []
        self._flushed = monotonic()

    @classmethod
    def read(cls, store: LabelStore, *, retry_failed: bool) -> _Progress:
        labelled = store.labelled_paths()
        return cls(store, labelled, store.errors(labelled), retry_failed)

    def __contains__(self, path: str) -> bool:
        """Whether this input needs no more work."""
        return path in self.labelled or path in self._settled

    @property
    def errors(self) -> list[ErrorRecord]:
        return sorted(self._errors.values(), key=lambda e: e.path)

    def add(self, rows: Sequence[LabelRecord], errors: Sequence[ErrorRecord]) -> None:
        self._waiting.extend(rows)
        for row in rows:
            self._errors.pop(row.path, None)
        self._errors.update((e.path, e) for e in errors)
        if len(self._waiting) >= PART_ROWS or monotonic() - self._flushed >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits: first the rows, then the errors."""
        if self._waiting:
            self._store.write_part(self._waiting)
            self.labelled.update(row.path for row in self._waiting)
        self._store.write_errors(self.errors)
        self._waiting, self._flushed = [], monotonic()


@dataclass(frozen=True)
class _Loaded:
    """One input of a batch: its picture, or why there is none."""

    ref: ImageRef
    picture: Picture | None
    error: ErrorRecord | None


def _load(ref: ImageRef, room: Mapping[str, int], max_pixels: int) -> _Loaded:
    try:
        return _Loaded(ref, decode_image(read_image(ref), **room, max_pixels=max_pixels), None)
    except ImageError as error:
        return _Loaded(ref, None, ErrorRecord(ref.path, error.stage, error.reason))


def _batches(
    job: LabelJob, tagger: Tagger, images: Sequence[ImageRef], done: _Progress
) -> Iterator[list[_Loaded]]:
    """Decoded batches of unfinished inputs in order, a few of them ahead of the engine."""
    size = job.batch_size or tagger.plan.images_per_batch
    workers = job.workers or usable_cores()
    ahead = 1 + -(-2 * workers // size)
    waiting: deque[list[Future[_Loaded]]] = deque()
    pool = ThreadPoolExecutor(workers, "decode")
    try:
        for start in range(0, len(images), size):
            refs = [ref for ref in images[start : start + size] if ref.path not in done]
            if refs:
                waiting.append([pool.submit(_load, ref, tagger.room, job.max_pixels) for ref in refs])
            if len(waiting) > ahead:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _score(tagger: Tagger, batch: Sequence[_Loaded]) -> tuple[list[LabelRecord], list[ErrorRecord]]:
    """Rows of a decoded batch. If the engine refuses it, each image is tried alone to find the culprit."""
    if not batch:
        return [], []
    try:
        return _rows(tagger, batch), []
    except ClipletError as error:
        if len(batch) == 1:
            return [], [ErrorRecord(batch[0].ref.path, "infer", error.happened)]
    alone = [_score(tagger, [loaded]) for loaded in batch]
    return [row for rows, _ in alone for row in rows], [error for _, errors in alone for error in errors]


def _rows(tagger: Tagger, batch: Sequence[_Loaded]) -> list[LabelRecord]:
    pictures = [loaded.picture for loaded in batch if loaded.picture is not None]
    began = perf_counter()
    scores_BC = tagger.score(pictures)["scores"]
    seconds = (perf_counter() - began) / len(pictures)
    return [
        tagger.record(loaded.ref.path, picture, scores_C, seconds)
        for loaded, picture, scores_C in zip(batch, pictures, scores_BC, strict=True)
    ]


@dataclass
class _Stop:
    is_set: bool = False


@contextmanager
def _interruption() -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM set a flag once; the second one interrupts. Only a main thread hears them."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_set:
            raise KeyboardInterrupt(signal.Signals(number).name)
        stop.is_set = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fingerprint(job: LabelJob, chosen: Plan) -> dict[str, Any]:
    """What must be equal for a run to continue another: rows name inputs as they were spelled."""
    relative = any(not os.path.isabs(source) for source in job.sources)
    where = {"inputs": list(job.sources), "cwd": os.getcwd() if relative else None}
    return {**where, **chosen.fingerprint()}


def _run_description(job: LabelJob, chosen: Plan) -> dict[str, Any]:
    return {
        "schema": RUN_SCHEMA_VERSION,
        "fingerprint": _fingerprint(job, chosen),
        "model": str(chosen.spec),
        "classes": list(chosen.vocabulary.names),
        "thresholds": list(chosen.thresholds),
        "threshold_source": chosen.threshold_source,
        "views": str(chosen.views),
        "cwd": os.getcwd(),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
