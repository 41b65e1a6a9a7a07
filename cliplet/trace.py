"""When each thread did what, as a Chrome trace: what to look at where a pipeline is slower than its slowest part.

    with recording() as recorder:
        with span("decode"):
            ...
    write_chrome(Path("trace.json"), recorder.chrome("label"))

Chrome (chrome://tracing), Edge and https://ui.perfetto.dev open the file. While nothing is recorded, `span` and
`counter` cost a look at one variable.

The format: Trace Event Format, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Self

from cliplet.labels import write_atomically

# One recorder at a time; a recorder is for a whole process, whose threads all write into it.
_recorder: Recorder | None = None


class Recorder:
    """What the threads of this process did since it was made.

    Appending to a list is one step in CPython, so threads need no lock.
    """

    def __init__(self) -> None:
        self._began = perf_counter_ns()
        self._spans: list[tuple[str, int, int, int, dict[str, Any]]] = []
        self._counts: list[tuple[str, int, float]] = []
        self._threads: dict[int, str] = {}

    def add_span(self, name: str, began: int, ended: int, facts: dict[str, Any]) -> None:
        """Note what the calling thread did from `began` to `ended`, in nanoseconds of `perf_counter_ns`."""
        number = threading.get_native_id()
        self._threads.setdefault(number, threading.current_thread().name)
        self._spans.append((name, number, began, ended, facts))

    def add_count(self, name: str, value: float) -> None:
        """Note a value that changes over time."""
        self._counts.append((name, perf_counter_ns(), value))

    def seconds(self) -> dict[str, float]:
        """Time in all spans of each name, over all threads."""
        found: dict[str, float] = {}
        for name, _, began, ended, _ in self._spans:
            found[name] = found.get(name, 0.0) + (ended - began) / 1e9
        return found

    def chrome(self, process: str, number: int = 1) -> list[dict[str, Any]]:
        """The events of a Chrome trace, in which this process has a name and a number; times in microseconds."""
        named = [{"ph": "M", "name": "process_name", "pid": number, "args": {"name": process}}]
        # Threads of one pool lie beside each other.
        for order, (thread, name) in enumerate(sorted(self._threads.items(), key=lambda pair: pair[1])):
            for key, value in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": order})):
                named.append({"ph": "M", "name": key, "pid": number, "tid": thread, "args": value})
        spans = [
            {
                "ph": "X",
                "name": name,
                "pid": number,
                "tid": thread,
                "ts": (began - self._began) / 1e3,
                "dur": (ended - began) / 1e3,
                "args": facts,
            }
            for name, thread, began, ended, facts in self._spans
        ]
        counts = [
            {"ph": "C", "name": name, "pid": number, "ts": (at - self._began) / 1e3, "args": {name: value}}
            for name, at, value in self._counts
        ]
        return [*named, *spans, *counts]


class _Span:
    def __init__(self, recorder: Recorder, name: str, facts: dict[str, Any]) -> None:
        self._recorder, self._name, self._facts = recorder, name, facts

    def __enter__(self) -> Self:
        self._began = perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.add_span(self._name, self._began, perf_counter_ns(), self._facts)


class _Nothing:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


_NOTHING = _Nothing()


def span(name: str, **facts: Any) -> _Span | _Nothing:
    """Context whose time is recorded under `name` for the thread that runs it, if a trace is being recorded.

    Args:
        facts: what the trace shows beside it, as JSON: how many images, which shape.
    """
    recorder = _recorder
    return _NOTHING if recorder is None else _Span(recorder, name, facts)


def counter(name: str, value: float) -> None:
    """Record a value that changes over time, such as how much waits in a queue, if a trace is being recorded."""
    recorder = _recorder
    if recorder is not None:
        recorder.add_count(name, value)


@contextmanager
def recording() -> Iterator[Recorder]:
    """Context in which the spans and counters of all threads of this process are recorded."""
    global _recorder
    assert _recorder is None, "one recording at a time"
    _recorder = Recorder()
    try:
        yield _recorder
    finally:
        _recorder = None


def write_chrome(file: Path, events: Sequence[dict[str, Any]]) -> None:
    """Write events as a file that Chrome opens.

    Raises:
        EnvironmentError_: it cannot be written.
    """
    content = {"traceEvents": list(events), "displayTimeUnit": "ms"}
    write_atomically(file, json.dumps(content, separators=(",", ":")).encode())
