"""What perf_analyzer, the load generator of Triton's own makers, measures of a served model, where a machine has it.

It asks over gRPC, in a closed loop, with the same encoded files as our own clients, and gives the same columns:
images a second and latencies as it counts them, queue and compute as it reads them from Triton's statistics. The mean
batch is of its whole run. Times in its report are microseconds, here milliseconds.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve_calls import Caller
from cliplet.errors import DataError, EnvironmentError_
from cliplet.server_address import GRPC_HEADER_PREFIX, SECRET_HEADER, read_state

PROGRAM = "perf_analyzer"
NOT_INSTALLED = "not installed"
PERCENTILES = (50, 90, 95, 99)
COMPUTE = ("Server Compute Input", "Server Compute Infer", "Server Compute Output")
# It reports the mean of three windows in a row that differ by less than a limit, each a fifth longer than asked. A
# limit that all windows keep makes every run equally long.
WINDOWS, LONGER, ANY_DIFFERENCE = 3, 1.2, 999
# Beyond what it measures: connecting, reading images, and the requests under way when it ends.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Load:
    """One measurement.

    Attributes:
        images: folder of the files to send.
        clients: each waits for its answer before it asks again.
        seconds: to measure; the warm-up takes as long again.
        shared_memory: files go through memory that both see; the server has to be one of this user's.
    """

    url: str
    images: Path
    clients: int
    seconds: float
    shared_memory: bool = False


def find(program: str | None = None) -> tuple[str | None, str]:
    """The program to call, None if there is none that runs; and what it says of its version, or why there is none.

    Args:
        program: a name or a path; by default `perf_analyzer` on the PATH.
    """
    path = shutil.which(program or PROGRAM)
    if path is None:
        return None, NOT_INSTALLED
    try:
        code, said = _ran([path, "--version"], 30.0)
    except EnvironmentError_ as error:
        return None, f"cannot run: {_without_folders(error.happened)}"
    # The launcher of its package ends with 0 whatever happens to the program: only what is said counts.
    version = re.search(r"Perf Analyzer Version \S.*", said)
    if version:
        return path, version[0]
    why = next(_lines(said), f"--version says nothing and ends with {code}")
    return None, f"cannot run: {_without_folders(why)}"


def measure(program: str, load: Load) -> dict[str, Any]:
    """What the program says of a load: a run as `benchmarks.serve` takes it.

    Raises:
        EnvironmentError_: it ended without a report.
        DataError: its report is not as expected.
    """
    with Caller(load.url, "bytes", load.images) as caller, tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder) / "images.json", Path(folder) / "report.csv"
        data.write_text(json.dumps(input_data(caller.feeds)))
        before = caller.statistics()
        words = command(load, caller.model, caller.connection.address.netloc, data, report)
        code, said = _ran([program, *words], 2 * load.seconds + PATIENCE_S)
        if not report.exists():
            raise EnvironmentError_(
                f"perf_analyzer ended with {code} and without a report: {_without_folders(_reason(said))}",
                "a report",
                "more --seconds, or run without it",
            )
        found = read_report(report.read_text(), load.clients)
        batch = caller.spent(before, caller.statistics())["tagger"]["images_per_batch"]
    spent = {part: found.pop(part) for part in ("queue_ms", "compute_ms")}
    # It gives up at the first request that fails, so where there is a report none did.
    return {
        "seconds": load.seconds,
        "failed": {},
        **found,
        "server": {"tagger": {"images_per_batch": batch, **spent}},
    }


def command(load: Load, model: str, address: str, data: Path, report: Path) -> list[str]:
    """The arguments of one measurement."""
    # The level below is the warm-up: the wanted one then begins with requests under way, as it goes on.
    levels = f"{max(load.clients - 1, 1)}:{load.clients}:1"
    words = ["-m", model, "-i", "grpc", "-u", address, "--input-data", str(data), "-f", str(report)]
    words += ["--concurrency-range", levels, "--max-trials", str(WINDOWS)]
    words += ["--stability-percentage", str(ANY_DIFFERENCE)]
    words += ["--measurement-interval", str(round(1e3 * load.seconds / WINDOWS / LONGER))]
    if load.shared_memory:
        state = read_state(int(address.rpartition(":")[2]))
        assert state is not None, "the server runs on this machine"
        secret = f"{GRPC_HEADER_PREFIX}{SECRET_HEADER}:{state.secret}"
        words += ["--shared-memory", "system", "-H", secret]
    return words


def input_data(feeds: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Requests of one row each as perf_analyzer reads them: `{"data": [{NAME: {"content": {"b64": …}, "shape": …}}]}`.

    Args:
        feeds: tensors of bytes, [1, …]; each element is sent with its length before it, in four bytes.
    """
    return {
        "data": [
            {
                name: {
                    "content": {"b64": base64.b64encode(_serialized(tensor)).decode()},
                    "shape": list(tensor.shape[1:]),
                }
                for name, tensor in feed.items()
            }
            for feed in feeds
        ]
    }


def _serialized(tensor: np.ndarray) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in tensor.ravel())


def read_report(text: str, clients: int) -> dict[str, float]:
    """Images a second and milliseconds of a level, from the report (CSV, a line a level) that `-f` writes.

    Raises:
        DataError: it lacks the level or a column.
    """
    for line in csv.DictReader(text.splitlines()):
        try:
            if int(line["Concurrency"]) != clients:
                continue
            return {
                "images_per_s": float(line["Inferences/Second"]),
                **{f"p{p}_ms": float(line[f"p{p} latency"]) / 1e3 for p in PERCENTILES},
                "queue_ms": float(line["Server Queue"]) / 1e3,
                "compute_ms": sum(float(line[part]) for part in COMPUTE) / 1e3,
            }
        except (KeyError, TypeError, ValueError) as error:
            raise _unknown(f"perf_analyzer's report cannot be read: {error!r}") from error
    raise _unknown(f"perf_analyzer's report has no line of {clients} clients")


def _unknown(happened: str) -> DataError:
    return DataError(happened, "the columns of perf_analyzer 2.60", "pip install perf-analyzer==2.60.0")


def _ran(words: Sequence[str], seconds: float) -> tuple[int, str]:
    """How a program ended and what it said; it and all that it started are gone afterwards."""
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise EnvironmentError_(
            f"{words[0]}: {error.strerror}", "a program", "choose another one: --perf-analyzer"
        ) from error
    try:
        said, _ = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise EnvironmentError_(
            f"{words[0]} did not end within {seconds:.0f} s", "an end", "run it by hand to see why"
        ) from error
    return process.returncode, said


def _reason(said: str) -> str:
    lines = ["it says nothing", *_lines(said)]
    return next((line for line in lines if "error" in line.lower()), lines[-1])


def _lines(text: str) -> Iterator[str]:
    return (stripped for line in text.splitlines() if (stripped := line.strip()))


def _without_folders(text: str) -> str:
    return re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-])", "", text)[:160]
