"""Labelling on a Ray cluster: its machines decode and score, this process alone writes the results.

    cliplet label s3://bucket/photos --out labels --ray auto

The inputs go out in stretches of whole batches, the same batches that an undisturbed run on one machine would score.
Each worker holds one engine. A worker that dies is replaced and its stretch done again; a batch that comes twice
counts once. As the writing, and so the resuming, is that of any other run, a killed driver continues with the same
command, with or without Ray.

Inputs must be readable from every machine under the name that they have here (a shared file system, or URLs), and
so must a bundle; any other model is exported by each machine for itself. cliplet must be installed on all of them.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Container, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from cliplet.errors import ClipletError, EnvironmentError_
from cliplet.images import ImageRef
from cliplet.plan import Plan
from cliplet.remote_files import is_remote
from cliplet.tagger import exported_bundle, load_plan

from .label_scoring import ScoredBatch, scoring_of

if TYPE_CHECKING:
    from .label import LabelJob

log = logging.getLogger("cliplet")
# Times that a stretch, or the start of a worker, may end with the worker's death before the run ends.
MOST_DEATHS = 8
# Batches in a stretch: few, as a worker that dies loses one, and more where there would be too many stretches.
STRETCH_BATCHES = 8
MOST_STRETCHES = 20_000
# Batches that are asked for ahead where somebody in the cluster relays them.
AHEAD = 4
# For a cluster of our own: results are small, so it wants little shared memory.
STORE_BYTES = 256 << 20
# Seconds in which the threads of Ray Data should have ended.
THREADS_S = 10.0


@dataclass(frozen=True)
class _Task:
    """What every worker is told once.

    Attributes:
        attempts: the cluster's `_Attempts`, once there is one.
    """

    plan: Plan
    batch_size: int
    workers: int
    max_pixels: int
    attempts: Any = None


@dataclass(frozen=True)
class Workers:
    """How many engines a cluster runs, and what each is given."""

    count: int
    cpus: int
    gpus: int


@contextmanager
def scored_by_ray(
    job: LabelJob, chosen: Plan, images: Sequence[ImageRef], done: Container[str]
) -> Iterator[Iterator[ScoredBatch]]:
    """Context with the batches of all images that are not done, in order, as the workers of `job.ray` score them.

    Raises:
        EnvironmentError_: ray is not installed, the cluster cannot be reached, or it lacks what was asked for.
    """
    from .label import unfinished

    assert job.ray is not None
    size = job.batch_size or chosen.images_per_batch
    batches = list(unfinished([_from_anywhere(ref) for ref in images], size, done))
    with _cluster(job.ray):
        workers = planned_workers(_nodes(), chosen, job.ray_workers)
        # With one thread for each CPU that it was given, an engine leaves the others' alone.
        settings = replace(chosen.settings, threads=chosen.settings.threads or workers.cpus)
        plan = replace(chosen, settings=settings)
        if plan.bundle is None and plan.card is None and plan.runtime != "torch":
            plan = replace(plan, bundle=exported_bundle(chosen))  # once, not by all workers at the same time
        task = _Task(plan, size, job.workers or workers.cpus, job.max_pixels)
        # Ray Data cannot be driven through Ray Client, so there somebody in the cluster does it for us.
        results = _relayed_results if job.ray.startswith("ray://") else _results
        with closing(results(task, workers, batches)) as found:
            yield found


def planned_workers(nodes: Sequence[tuple[int, int]], chosen: Plan, asked: int) -> Workers:
    """How the CPUs and GPUs of nodes (of each so many) are shared out.

    On GPUs: one for each engine, and its share of a node's CPUs. On CPUs: `threads` of them for each, by default a
    node's, or less if more workers are asked for than there are nodes.

    Raises:
        EnvironmentError_: the cluster has not the room.
    """
    gpu = chosen.settings.device == "cuda"
    if gpu:
        shares = [n // gpus for n, gpus in nodes if gpus]
        cpus = max(1, min(shares, default=1))
        room = sum(min(gpus, n // cpus) for n, gpus in nodes)
    else:
        least = min((n for n, _ in nodes if n), default=0)
        per_node = -(-asked // max(1, len(nodes)))
        cpus = chosen.settings.threads or max(1, least // max(1, per_node))
        room = sum(n // cpus for n, _ in nodes)
    count = asked or room
    if not 0 < count <= room:
        each = f"a GPU and {cpus} CPUs" if gpu else f"{cpus} CPUs"
        raise EnvironmentError_(
            f"{max(1, count)} workers want {each} each; the cluster has room for {room}",
            "a cluster with room for all",
            "fewer --ray-workers, fewer --threads, or more machines in the cluster",
        )
    return Workers(count, cpus, 1 if gpu else 0)


def _from_anywhere(ref: ImageRef) -> ImageRef:
    """The same input with a file name that does not depend on the current folder."""
    return ref if is_remote(ref.file) else replace(ref, file=os.path.abspath(ref.file))


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    """Context connected to a Ray cluster, quietly; one of our own for the address `local`.

    Raises:
        EnvironmentError_: ray is not installed, or there is no cluster.
    """
    # Before the import, as ray reads them once: nothing is reported home, nothing is said but by us.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EnvironmentError_(
            f"--ray needs the library {error.name!r}, which is not installed",
            "Ray with its Data part",
            "pip install 'cliplet[ray]'",
        ) from error
    if ray.is_initialized():  # a program that has a cluster already
        with _quiet_data():
            yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        with _hushed():
            ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise EnvironmentError_(
            f"no Ray cluster at {address!r}: {_first_line(error)}",
            "local (a cluster of this machine alone), auto, HOST:PORT, or ray://HOST:PORT of one that runs",
            "start one with `ray start --head`, or use --ray local; one that asks for a token wants RAY_AUTH_MODE=token",
        ) from error
    # Ray prints what happens to its workers on stdout, which is for results; also while it ends.
    with redirect_stdout(_Noted()):
        try:
            with _quiet_data():
                yield
        finally:
            ray.shutdown()


class _Noted(io.TextIOBase):
    """A stream whose text goes to the log, for whoever wants to see it."""

    def write(self, text: str) -> int:
        if text.strip():
            log.debug("ray: %s", text.rstrip())
        return len(text)


@contextmanager
def _hushed() -> Iterator[None]:
    """Context in which nothing reaches stderr, not even from a library: Ray tells there that it will tell nothing."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Context in which Ray Data shows no bars and logs no plans."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        logger.setLevel(level)


def _nodes() -> list[tuple[int, int]]:
    """CPUs and GPUs of each node that is alive."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in resources]


def _results(
    task: _Task, workers: Workers, batches: Sequence[Sequence[ImageRef]]
) -> Generator[ScoredBatch, None, None]:
    """What came of each batch, in order.

    Raises:
        ClipletError: what the workers raised, such as a model that cannot be loaded.
        EnvironmentError_: workers died again and again, or the cluster is gone.
    """
    import ray.data
    import ray.exceptions

    stretch = max(STRETCH_BATCHES, -(-len(batches) // MOST_STRETCHES))
    items = [{"first": n, "batches": list(batches[n : n + stretch])} for n in range(0, len(batches), stretch)]
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    scored = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Worker,
        fn_constructor_args=(replace(task, attempts=_count_attempts()),),
        batch_size=1,
        concurrency=workers.count,
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
    )
    before = set(threading.enumerate())
    rows = iter(scored.iter_rows())
    expected = 0
    try:
        for row in rows:
            if row["error"] is not None:
                raise row["error"]
            if row["number"] < expected:
                continue  # of a stretch that was done twice
            assert row["number"] == expected, "Ray keeps the order, as it was told"
            expected += 1
            yield row["result"]
    except ray.exceptions.RayError as error:
        raise _cluster_failed(error) from error
    finally:
        del rows
        _wait_for_threads(before)


def _relayed_results(
    task: _Task, workers: Workers, batches: Sequence[Sequence[ImageRef]]
) -> Generator[ScoredBatch, None, None]:
    """The same through an actor in the cluster, a few batches ahead of the one that is waited for."""
    import ray
    import ray.exceptions

    try:
        relay = ray.remote(num_cpus=0)(_Relay).remote(task, workers, batches)
        asked = deque(relay.next.remote() for _ in range(AHEAD))
        while (found := ray.get(asked.popleft())) is not None:
            if isinstance(found, ClipletError):
                raise found
            asked.append(relay.next.remote())
            yield found
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise _cluster_failed(error) from error


class _Relay:
    """Drives Ray Data from within the cluster."""

    def __init__(self, task: _Task, workers: Workers, batches: Sequence[Sequence[ImageRef]]) -> None:
        self._results = _results(task, workers, batches)

    def next(self) -> ScoredBatch | ClipletError | None:
        try:
            return next(self._results, None)
        except ClipletError as error:
            return error


def _cluster_failed(error: BaseException) -> EnvironmentError_:
    return EnvironmentError_(
        f"the Ray cluster failed: {_first_line(getattr(error, 'cause', None) or error)}",
        "machines that stay; all that they finished is kept",
        "the same command continues",
    )


def _wait_for_threads(before: set[threading.Thread]) -> None:
    """Let the threads of Ray Data end: one that still asks for data after the goodbye takes this process with it."""
    deadline = monotonic() + THREADS_S
    for thread in set(threading.enumerate()) - before:
        # This one sleeps until there is something to fetch ahead, and nothing will be any more.
        if thread.name != "Prefetcher":
            thread.join(max(0.0, deadline - monotonic()))


def _count_attempts() -> Any:
    """An actor that counts how often work was begun: Ray begins what killed its worker again, for ever."""
    import ray

    class _Attempts:
        def __init__(self) -> None:
            self._begun: Counter[str] = Counter()

        def begin(self, what: str) -> int:
            self._begun[what] += 1
            return self._begun[what]

        def succeed(self, what: str) -> None:
            self._begun[what] = 0

    return ray.remote(num_cpus=0)(_Attempts).remote()


class _Worker:
    """One engine in the cluster. What it raises on purpose comes home as a row, not as Ray's exception."""

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._error: ClipletError | None = None
        try:
            self._begin("the start of a worker")
            self._tagger = load_plan(_here(task.plan))
            task.attempts.succeed.remote("the start of a worker")
        except ClipletError as error:
            self._error = error

    def __call__(self, stretch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        number, batches = int(stretch["first"][0]), stretch["batches"][0]
        try:
            if self._error is not None:
                raise self._error
            self._begin(f"the stretch from {batches[0][0].path} to {batches[-1][-1].path}")
            task = self._task
            scoring = scoring_of(
                self._tagger, batch_size=task.batch_size, workers=task.workers, max_pixels=task.max_pixels
            )
            for result in scoring.results(batches):
                yield _columns(number, result, None)
                number += 1
        except ClipletError as error:
            yield _columns(number, None, error)

    def _begin(self, what: str) -> None:
        """Raise `EnvironmentError_` if this has killed too many workers."""
        import ray

        if ray.get(self._task.attempts.begin.remote(what)) > MOST_DEATHS:
            raise EnvironmentError_(
                f"{what} has ended with the death of its worker {MOST_DEATHS} times",
                "workers that live: perhaps they lack memory, or one of these images brings the engine down",
                "label these images without --ray to see why; all that was finished is kept",
            )


def _here(plan: Plan) -> Plan:
    """The plan for this machine: a bundle that another one made for itself is made here, too."""
    made = plan.spec.bundle is None
    if made and plan.bundle is not None and not plan.bundle.folder.is_dir():
        return replace(plan, bundle=None, engine=None)
    return plan


def _columns(number: int, result: ScoredBatch | None, error: ClipletError | None) -> dict[str, Any]:
    def one(value: object) -> np.ndarray:
        column = np.empty(1, object)
        column[0] = value
        return column

    return {"number": np.array([number]), "result": one(result), "error": one(error)}


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
