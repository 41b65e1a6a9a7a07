"""How fast models label or embed on this machine, each row beside its limits, its spread and its proof.

    run_bench(BenchJob(models=("tiny",), runtimes=("onnx", "openvino")))

A row is a model on a runtime in a precision with a size of batch and a number of streams. Every measurement is a
process of its own, and in every round all rows take turns, forwards and backwards, so that a drift of the machine
meets all. What cannot be measured says why; the rest goes on.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cliplet.errors import INTERRUPTED, DataError
from cliplet.images import ImageError, find_images, read_image
from cliplet.machine import usable_cores
from cliplet.record import shown
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world

from .bench_rows import LABELS, BenchJob, Row, rows_of

SCENES = 64
WORKER = (sys.executable, "-m", "cliplet.deploy.bench_worker")
# Of `TaggerSettings`, what a job sets.
SETTINGS = ("model", "classes", "views", "runtime", "precision", "device", "threads")
# Seconds that a measurement may take beyond what it should, before it is held to hang: loading a large model included.
PATIENCE = 600.0
# Of each measurement of the limits, at most; and their size where a run is a quick look.
LIMIT_SECONDS = 0.5
UNTRACED = "no trace: what embeds images records none"


@dataclass(frozen=True)
class BenchResult:
    """What was measured, in the order that was asked for."""

    job: BenchJob
    rows: tuple[Row, ...]
    limits: dict[str, Any]
    images: str
    interrupted: bool

    def trace_events(self) -> list[dict[str, Any]]:
        """Events of a Chrome trace: one process for each row that was traced."""
        events: list[dict[str, Any]] = []
        for number, row in enumerate(self.rows, start=1):
            for event in row.traced.get("trace", []):
                named = event.get("name") == "process_name"
                events.append({**event, "pid": number, **({"args": {"name": row.name}} if named else {})})
        return events


def run_bench(
    job: BenchJob, say: Callable[[str], object] = lambda _: None, rows: Sequence[Row] | None = None
) -> BenchResult:
    """Everything that `job` asks for; what was measured before Ctrl-C or SIGTERM is kept.

    Args:
        say: told of each measurement in a line.
        rows: those of `rows_of(job)`, from who has looked at them before.

    Raises:
        UsageError, DataError: the images cannot be had.
    """
    rows = rows_of(job, say) if rows is None else rows
    limits: dict[str, Any] = {}
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="cliplet-bench-") as folder:
        images = Path(folder) / "images"
        described = _stage(job, images)
        bench = _Bench(job, images, say)
        try:
            with _terminable():
                for row in rows:
                    if row.why:
                        say(f"{row.name}: {row.why}")
                for number in range(job.rounds if not all(row.why for row in rows) else 0):
                    limits = merged_limits(limits, bench.limits(rows))
                    for row in rows if number % 2 == 0 else rows[::-1]:
                        bench.measure(row, number)
                for row in rows if job.trace else ():
                    bench.record_trace(row)
        except KeyboardInterrupt:
            interrupted = True
    return BenchResult(job, tuple(rows), limits, described, interrupted)


@dataclass(frozen=True)
class _Bench:
    job: BenchJob
    images: Path
    say: Callable[[str], object]

    def limits(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The machine's limits in the precisions of the rows; empty where they could not be measured."""
        # No CPU of today multiplies in fp16 without being told twice; engines read back what they do instead.
        asked = {"fp32", *(row.precision for row in rows)} - ({"fp16"} if self.job.device == "cpu" else set())
        seconds = min(LIMIT_SECONDS, self.job.seconds)
        found = machine_limits(sorted(asked), self.job.device, self.job.threads, seconds)
        if "why" in found:
            self.say(f"the machine's limits are not known: {found['why']}")
            return {}
        rates = ", ".join(f"{p} {rate:.0f} GOP/s" for p, rate in found["gop_per_s"].items())
        self.say(f"limits: {rates}; memory {found['gb_per_s']:.1f} GB/s")
        return found

    def measure(self, row: Row, number: int) -> None:
        """One round of one row."""
        if row.why:
            return
        phases = _in_process(
            {
                **self._task(row, "phases"),
                "seconds": self.job.seconds,
                "unverified": self.job.unverified,
                "count_work": number == 0,
            }
        )
        whole = phases if "why" in phases else self._whole(row, phases, traced=False)
        if "why" in whole:
            row.stop(whole)
            self.say(f"round {number + 1} of {self.job.rounds}: {row.name}: {row.why}")
            return
        row.phases.append(phases)
        row.wholes.append(whole)
        alone = phases["facts"]["views"] / phases["seconds_per_image"]["engine"]
        self.say(
            f"round {number + 1} of {self.job.rounds}: {row.name}: {whole['images_per_s']:.1f} images/s, "
            f"the engine alone {alone:.0f} views/s"
        )

    def record_trace(self, row: Row) -> None:
        """One more run of `label`, for its trace alone."""
        if not row.phases or row.why:
            return
        if row.gives == LABELS:
            found = self._whole(row, row.phases[-1], traced=True)
            row.traced = {} if "why" in found else found
            self.say(f"trace: {row.name}{': ' + found['why'] if 'why' in found else ''}")
        else:
            row.notes.append(UNTRACED)
            self.say(f"trace: {row.name}: {UNTRACED}")

    def _whole(self, row: Row, phases: dict[str, Any], traced: bool) -> dict[str, Any]:
        count = round(self.job.seconds * ideal_rate(phases, self.job.threads))
        return _in_process({**self._task(row, "whole"), "count": count, "traced": traced}, self.job.seconds)

    def _task(self, row: Row, part: str) -> dict[str, Any]:
        return {
            "part": part,
            "settings": {name: getattr(row.settings, name) for name in SETTINGS},
            "images": str(self.images),
            "batch_size": row.batch_size,
            "streams": row.streams,
        }


def machine_limits(
    precisions: Sequence[str], device: str = "cpu", threads: int = 0, seconds: float = LIMIT_SECONDS
) -> dict[str, Any]:
    """The machine's limits, as `bench_limits.limits` measures them, in a process of their own; `why` if it failed."""
    return _in_process(
        {
            "part": "limits",
            "precisions": list(precisions),
            "device": device,
            "threads": threads,
            "seconds": seconds,
            "scale": 1.0 if seconds == LIMIT_SECONDS else 0.25,
        }
    )


def merged_limits(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measurements of each limit: what disturbs can only lower them."""
    if not one or not other:
        return one or other
    rates = {
        name: max(one["gop_per_s"].get(name, 0.0), other["gop_per_s"].get(name, 0.0))
        for name in {**one["gop_per_s"], **other["gop_per_s"]}
    }
    return {
        "by": one["by"],
        "gop_per_s": rates,
        "gb_per_s": max(one["gb_per_s"], other["gb_per_s"]),
        "notes": list(dict.fromkeys([*one["notes"], *other["notes"]])),
        "disturbed": one["disturbed"] and other["disturbed"],
    }


def ideal_rate(phases: dict[str, Any], threads: int) -> float:
    """Images a second if every core were busy all the time: cores / (core-seconds of all phases).

    The engine's are its time alone times its threads, on a CPU; on another device it works beside the cores, and the
    slower of the two is what counts.
    """
    cores, seconds = usable_cores(), phases["seconds_per_image"]
    host = sum(seconds[name] for name in ("read", "decode", "canvas", "record+write"))
    if phases["facts"]["device"] == "cpu":
        return float(cores / (host + seconds["engine"] * min(threads or cores, cores)))
    return float(min(cores / host, 1 / seconds["engine"]))


def _stage(job: BenchJob, folder: Path) -> str:
    """Copy the images into a folder of the run, so that all rows read the same files; what they are, in words."""
    folder.mkdir()
    if not job.images:
        count = min(job.limit, SCENES)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            for file in write_scenes(scene_world("test-seen", seed=1), Path(made), count).images.iterdir():
                file.rename(folder / file.name)
        return f"{count} scenes of the scene world, 320 x 240"
    refs = find_images(job.images).images[: job.limit]
    for number, ref in enumerate(refs):
        try:
            data = read_image(ref)
        except ImageError:
            data = b""
        # A file that cannot be read stays in the count, as an input that fails.
        (folder / f"{number:06d}{Path(ref.member or ref.file).suffix or '.jpg'}").write_bytes(data)
    if not refs:
        raise DataError(f"no images in {', '.join(job.images)}", "images")
    return f"{len(refs)} images of {', '.join(shown(job.images))}"


def _in_process(task: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
    """What `cliplet.deploy.bench_worker` finds; `why` where it found nothing.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    try:
        done = subprocess.run(
            WORKER,
            input=json.dumps(task),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=PATIENCE + 20 * seconds,
        )
    except subprocess.TimeoutExpired as error:
        return {"why": f"no answer within {error.timeout:.0f} s", "fix": "is the server still there?"}
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        ended = (
            f"was killed by {signal.Signals(-done.returncode).name} (SIGKILL: most likely no memory was left)"
            if done.returncode < 0
            else f"ended with exit code {done.returncode}"
        )
        return {"why": f"the process that measured it {ended}", "fix": "a smaller --batch-size"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def _terminable() -> Iterator[None]:
    """Context in which SIGTERM interrupts as Ctrl-C does."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
