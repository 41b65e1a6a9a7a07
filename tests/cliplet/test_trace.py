"""The trace: what each thread did, in a form that Chrome opens, and nothing at all while nobody looks."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest

from cliplet.trace import counter, recording, span, write_chrome


def test_spans_lie_in_their_threads_one_within_the_other() -> None:
    with recording() as recorder:
        with ThreadPoolExecutor(2, "decode") as pool:
            gate = threading.Barrier(2)

            def work(number: int) -> None:
                gate.wait(60)
                with span("decode", image=number):
                    sleep(0.01)

            list(pool.map(work, range(2)))
        with span("batch"):
            with span("engine"):
                sleep(0.01)
    events = recorder.chrome("label", 7)
    spans = {(e["name"], e["args"].get("image")): e for e in events if e["ph"] == "X"}
    assert set(spans) == {("decode", 0), ("decode", 1), ("batch", None), ("engine", None)}
    assert all(e["pid"] == 7 for e in events)
    assert spans["decode", 0]["tid"] != spans["decode", 1]["tid"]
    outer, inner = spans["batch", None], spans["engine", None]
    assert outer["tid"] == inner["tid"]
    assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert inner["dur"] >= 9_000, "microseconds"
    named = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert named[spans["decode", 0]["tid"]].startswith("decode") and named[outer["tid"]] == "MainThread"
    assert recorder.seconds()["decode"] >= 0.018


def test_counters_are_kept_in_order() -> None:
    with recording() as recorder:
        for waiting in (1, 3, 2):
            counter("batches waiting", waiting)
    counts = [e for e in recorder.chrome("label") if e["ph"] == "C"]
    assert [e["args"]["batches waiting"] for e in counts] == [1, 3, 2]
    assert [e["ts"] for e in counts] == sorted(e["ts"] for e in counts)


def test_a_span_ends_when_its_work_fails() -> None:
    with recording() as recorder, pytest.raises(ValueError, match="broken"):
        with span("engine"):
            raise ValueError("broken")
    assert [e["name"] for e in recorder.chrome("label") if e["ph"] == "X"] == ["engine"]


def test_nothing_is_recorded_outside() -> None:
    assert span("engine") is span("decode"), "one object for all, which does nothing"
    counter("batches waiting", 1)
    with recording() as recorder:
        pass
    with span("engine"):
        pass
    assert [e["ph"] for e in recorder.chrome("label")] == ["M"]


def test_the_file_is_what_chrome_opens(tmp_path: Path) -> None:
    with recording() as recorder, span("engine", images=3):
        pass
    write_chrome(tmp_path / "trace.json", recorder.chrome("label"))
    content = json.loads((tmp_path / "trace.json").read_text())
    assert content["displayTimeUnit"] == "ms"
    (made,) = [e for e in content["traceEvents"] if e["ph"] == "X"]
    assert {"name", "ph", "pid", "tid", "ts", "dur", "args"} == set(made) and made["args"] == {"images": 3}
