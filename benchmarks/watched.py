"""Runs a measurement in a process of its own and watches it: the memory of all its processes, and what others did."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from cliplet.deploy.bench_load import Load, LoadMeter
from cliplet.machine import usable_cores

# Seconds between two looks at the memory. To count the pages of several processes takes the kernel longer the more they
# have, so there is a rest of so many times what it took.
EVERY, RESTS = 0.25, 50


class MeasurementError(Exception):
    """A measurement ended without a result; the message is the last line that it wrote."""


@dataclass(frozen=True)
class Watched:
    """How a measurement ended.

    Attributes:
        found: the JSON that it wrote as its last line.
        peak_bytes: the most memory of the process and all it started, at one time: proportional set sizes, so that
            pages in several processes count once, or the first process's own high-water mark where that is larger.
        disturbed: whether other processes took enough of the cores to bear on it.
    """

    found: dict[str, Any]
    peak_bytes: int
    disturbed: bool


def watched(command: Sequence[str]) -> Watched:
    """Run `command` to its end, looking at its memory every now and then.

    Raises:
        MeasurementError: it failed, or its last line is no JSON object.
    """
    peak, meter, began, before = 0, LoadMeter(), perf_counter(), _seconds_of_children()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        try:
            due = 0.0
            while process.poll() is None:
                peak = max(peak, high_water_bytes(process.pid))
                if (looked := perf_counter()) >= due:
                    peak = max(peak, tree_bytes(process.pid))
                    due = perf_counter() + RESTS * (perf_counter() - looked)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(EVERY)
        finally:
            _end(process)
        load = meter.read()
        own = (_seconds_of_children() - before) / (perf_counter() - began)
        out.seek(0)
        errors.seek(0)
        said, complaints = out.read(), errors.read()
    found = _last_object(said)
    if process.returncode or found is None:
        lines = complaints.strip().splitlines() or [f"exit code {process.returncode}, and no word why"]
        raise MeasurementError(lines[-1])
    return Watched(found, peak, _disturbed(load, own))


def tree_bytes(pid: int) -> int:
    """Memory of a process and of all that it started, pages in several of them counted once.

    0 if it is gone or has started none: then its high-water mark says it better.
    """
    total = 0
    with suppress(psutil.Error):
        first = psutil.Process(pid)
        others = first.children(recursive=True)
        for process in (first, *others) if others else ():
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def high_water_bytes(pid: int) -> int:
    """The most memory that a process has had so far; 0 if it is gone."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _last_object(said: str) -> dict[str, Any] | None:
    lines = said.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a measurement that is still running, with all that it started: we were interrupted."""
    if process.poll() is not None:
        return
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    process.wait()


def _seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _disturbed(load: Load, measured: float) -> bool:
    """Whether others took too much; to the meter the measurement itself, with so many cores' worth, is another."""
    if load.others is None:
        return False
    others = max(0.0, load.others - measured)
    spare = len(os.sched_getaffinity(0)) - usable_cores()
    return Load(measured, others, max(0.0, others - spare)).disturbed
