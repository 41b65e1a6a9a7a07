"""Labels a collection of any size: every input ends in one row of labels or one row of errors.

    cliplet label photos --classes classes.txt --out labels

Images are decoded in threads while the engine scores the batch before; at most a few batches are in memory.
A batch is always the same stretch of the sorted inputs, whatever was finished before, so a run that was
killed and started again ends with the very scores of an undisturbed one.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

from cliplet.artifact import library_versions
from cliplet.errors import DataError, EnvironmentError_, ObjectiveError, ServerError, UsageError
from cliplet.images import MAX_PIXELS, ImageRef
from cliplet.labels import RUN_SCHEMA_VERSION, ErrorRecord, LabelRecord, LabelStore
from cliplet.listing import Listing, find_images
from cliplet.machine import usable_cores
from cliplet.partition_folders import refuse_divided
from cliplet.plan import Plan, TaggerSettings, make_plan
from cliplet.progress import ProgressBar
from cliplet.remote_files import is_remote
from cliplet.tagger import Tagger, load_plan
from cliplet.trace import span

from .label_scoring import FileScoring, Refusal, ScoredBatch, Scoring, scoring_of

log = logging.getLogger("cliplet")

# A part is written when it has this many rows, or when this much time has passed: what a kill can cost.
PART_ROWS = 2048
PART_SCORES = 8_000_000  # nor with more scores, which are what takes memory where classes are many
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
        workers: threads that decode; 0 means one a core. None where a server decodes itself.
        streams: batches that an engine on the CPU scores at the same time, each by its share of the threads.
        limit: label only so many inputs, the first ones.
        max_pixels: images with more are not decoded (decompression bombs).
        retry_failed: try the inputs in errors.parquet again.
        overwrite: forget what the folder holds, even of another job.
        ray: address of a Ray cluster whose machines do the work, or `local`; see `cliplet.deploy.ray_label`.
        ray_workers: engines in that cluster; 0 means as many as it has room for.
        max_error_rate: share of failed inputs above which the run ends with exit code 4.
    """

    sources: tuple[str, ...]
    out: Path
    tagger: TaggerSettings = field(default_factory=TaggerSettings)
    batch_size: int = 0
    workers: int = 0
    streams: int = 1
    limit: int | None = None
    max_pixels: int = MAX_PIXELS
    retry_failed: bool = False
    overwrite: bool = False
    max_error_rate: float | None = None
    ray: str | None = None
    ray_workers: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--batch-size", self.batch_size, 0),
            ("--workers", self.workers, 0),
            ("--streams", self.streams, 1),
            ("--ray-workers", self.ray_workers, 0),
            ("--limit", 1 if self.limit is None else self.limit, 1),
            ("--max-pixels", self.max_pixels, 1),
        ):
            if value < least:
                raise UsageError(f"{flag} {value}", f"a whole number from {least} on")
        if self.ray is None and self.ray_workers:
            raise UsageError(
                f"--ray-workers {self.ray_workers} without --ray",
                "the cluster that they work in",
                f"--ray local --ray-workers {self.ray_workers}",
            )
        if self.ray is not None and self.streams > 1:
            raise UsageError(
                f"--streams {self.streams} with --ray",
                "one of them: each worker of a cluster scores one batch at a time",
                "--ray-workers says how many work at the same time",
            )
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
    refuse_divided(job.out)
    chosen = make_plan(job.tagger)
    listing = find_images(job.sources)
    images = listing.images[: job.limit]
    store = LabelStore(job.out)
    settled = 0
    if store.has_rows() and not job.overwrite:
        store.refuse_other_job(fingerprint(job, chosen))
        progress = _Progress.read(store, retry_failed=job.retry_failed)
        settled = sum(ref.path in progress for ref in images)
    return DryRun(listing, len(images), settled, chosen, job.batch_size or chosen.images_per_batch)


def label(job: LabelJob) -> LabelResult:
    """Label all inputs of `job`, continuing where an earlier run of the same job stopped.

    Ctrl-C or SIGTERM ends it after the batch in hand with all work saved; a second one ends it at once.

    Raises:
        UsageError: the folder holds another job, or another run is writing it.
        DataError: no images, or no usable class names.
        EnvironmentError_: the output cannot be written, or the engine fails on every image; of a server's engine,
            also on the last ones. What was labelled before is kept.
        ServerError: the model's server is away, or its model dead, for longer than the job waits. Likewise.
    """
    refuse_divided(job.out)
    chosen = make_plan(job.tagger)
    images = find_images(job.sources).images[: job.limit]
    with LabelStore(job.out) as store:
        return label_images(job, store, chosen, images, run_description(job, chosen))


def label_images(
    job: LabelJob, store: LabelStore, chosen: Plan, images: Sequence[ImageRef], run: dict[str, Any]
) -> LabelResult:
    """Label these images into a store, whatever the job's sources name; `run` is what its run.json shall hold."""
    store.begin(run, overwrite=job.overwrite)
    progress = _Progress.read(store, retry_failed=job.retry_failed)
    before = len(progress.labelled)
    seconds, interrupted = 0.0, False
    if not all(ref.path in progress for ref in images):
        with _scored(job, chosen, images, progress) as scoring:
            begun = monotonic()
            try:
                interrupted = _label_all(job, scoring, images, progress)
            finally:
                progress.flush()
            seconds = monotonic() - begun
    else:
        progress.flush()
    return LabelResult(
        inputs=len(images),
        labelled=sum(ref.path in progress.labelled for ref in images),
        failed=sum(ref.path in progress.failed for ref in images),
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


@dataclass(frozen=True)
class _Scoring:
    """Batches on their way, and how to give up waiting for a server that is away."""

    batches: Iterator[ScoredBatch]
    stop_waiting: Callable[[], None] = lambda: None


@contextmanager
def _scored(
    job: LabelJob, chosen: Plan, images: Sequence[ImageRef], done: Container[str]
) -> Iterator[_Scoring]:
    """Context with the batches of all images that are not done, in order, from wherever they are scored."""
    if job.ray is not None:
        from .ray_label import scored_by_ray

        with scored_by_ray(job, chosen, images, done) as batches:
            yield _Scoring(batches)
        return
    with load_plan(chosen, job.streams) as tagger:
        _refuse_other_streams(job, tagger)
        size = job.batch_size or chosen.images_per_batch
        workers = job.workers or usable_cores()
        scoring = scoring_of(tagger, batch_size=size, workers=workers, max_pixels=job.max_pixels)
        _tell_idle_workers(job, scoring)
        with closing(scoring.results(unfinished(images, size, done))) as batches:
            yield _Scoring(batches, scoring.stop_waiting)


def _refuse_other_streams(job: LabelJob, tagger: Tagger) -> None:
    found = tagger.runner.concurrency
    if job.streams > 1 and found != job.streams:
        raise UsageError(
            f"--streams {job.streams}, but {tagger.runner.runtime} on {tagger.runner.device} takes {found}",
            "as many as an engine on the CPU has threads; of a server, --in-flight is what counts",
            "leave --streams out",
        )


def _tell_idle_workers(job: LabelJob, scoring: Scoring) -> None:
    if job.workers and isinstance(scoring, FileScoring):
        log.warning(
            "--workers %d has no effect: %s decodes the images itself; --in-flight is what counts",
            job.workers,
            job.tagger.model,
        )


def unfinished(images: Sequence[ImageRef], batch_size: int, done: Container[str]) -> Iterator[list[ImageRef]]:
    """The batches of all images, in order, without those that are done."""
    for start in range(0, len(images), batch_size):
        refs = [ref for ref in images[start : start + batch_size] if ref.path not in done]
        if refs:
            yield refs


def _label_all(job: LabelJob, scoring: _Scoring, images: Sequence[ImageRef], progress: _Progress) -> bool:
    """Label what is not settled yet; whether it was interrupted.

    An image that the engine refuses is an error of its own only once one of a later batch passes: an engine that
    refuses everything is broken, and its inputs are not to blame. At the end of the job nothing comes later; then an
    engine of our own is trusted, and a server that was too slow or failed is not.
    """
    done = sum(ref.path in progress for ref in images)
    suspects: list[Refusal] = []
    in_a_row = 0
    with (
        _interruption(scoring.stop_waiting) as stop,
        ProgressBar("labelling", len(images), done=done, quiet=job.quiet) as bar,
    ):
        for batch in _heeding(stop, scoring.batches):
            if batch.rows:
                progress.add(batch.rows, [refusal.error for refusal in suspects])
                suspects, in_a_row = [], 0
            else:
                in_a_row += len(batch.refused)
            suspects += batch.refused
            progress.add([], batch.failed)
            if in_a_row >= ENGINE_REFUSALS:
                raise _broken_engine(f"{in_a_row} images in a row", suspects)
            bar.advance(len(batch))
    if stop.is_set:
        return True
    progress.add([], [refusal.error for refusal in suspects if not refusal.by_server])
    if doubtful := [refusal for refusal in suspects if refusal.by_server]:
        raise _broken_engine(f"{len(doubtful)} of the last images", doubtful)
    return False


def _broken_engine(which: str, refusals: Sequence[Refusal]) -> EnvironmentError_:
    return EnvironmentError_(
        f"the engine refused {which}: {refusals[-1].error.reason}",
        "an engine that works; nothing was recorded about these images",
        "mend it (`cliplet doctor` looks at it), then the same command continues",
    )


def _heeding(stop: _Stop, batches: Iterator[ScoredBatch]) -> Iterator[ScoredBatch]:
    """Batches until the run is stopped. That a server was away by then is no error any more."""
    try:
        for batch in batches:
            yield batch
            if stop.is_set:
                return
    except ServerError:
        if not stop.is_set:
            raise


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

    def __contains__(self, path: object) -> bool:
        """Whether this input needs no more work."""
        return path in self.labelled or path in self._settled

    @property
    def failed(self) -> Container[str]:
        """Paths of the inputs with an error."""
        return self._errors.keys()

    @property
    def errors(self) -> list[ErrorRecord]:
        return sorted(self._errors.values(), key=lambda e: e.path)

    def add(self, rows: Sequence[LabelRecord], errors: Sequence[ErrorRecord]) -> None:
        self._waiting.extend(rows)
        for row in rows:
            self._errors.pop(row.path, None)
        self._errors.update((e.path, e) for e in errors)
        if self._is_full or monotonic() - self._flushed >= PART_SECONDS:
            self.flush()

    @property
    def _is_full(self) -> bool:
        rows = len(self._waiting)
        return rows >= PART_ROWS or rows > 0 and rows * self._waiting[0].scores.size >= PART_SCORES

    def flush(self) -> None:
        """Write what waits: first the rows, then the errors."""
        with span("write", rows=len(self._waiting)):
            if self._waiting:
                self._store.write_part(self._waiting)
                self.labelled.update(row.path for row in self._waiting)
            self._store.write_errors(self.errors)
        self._waiting, self._flushed = [], monotonic()


@dataclass
class _Stop:
    is_set: bool = False


@contextmanager
def _interruption(heard: Callable[[], None]) -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM set a flag once, and call `heard`; the second one interrupts. Only a main thread hears them."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_set:
            raise KeyboardInterrupt(signal.Signals(number).name)
        stop.is_set = True
        heard()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fingerprint(job: LabelJob, chosen: Plan) -> dict[str, Any]:
    """What must be equal for a run to continue another: rows name inputs as they were spelled."""
    relative = any(not os.path.isabs(source) and not is_remote(source) for source in job.sources)
    where = {"inputs": list(job.sources), "cwd": os.getcwd() if relative else None}
    return {**where, **chosen.fingerprint()}


def run_description(job: LabelJob, chosen: Plan) -> dict[str, Any]:
    """What run.json says of a job."""
    return {
        "schema": RUN_SCHEMA_VERSION,
        "fingerprint": fingerprint(job, chosen),
        "model": str(chosen.spec),
        "classes": list(chosen.vocabulary.names),
        "thresholds": list(chosen.thresholds),
        "threshold_source": chosen.threshold_source,
        "views": str(chosen.views),
        "cwd": os.getcwd(),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
