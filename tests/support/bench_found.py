"""What a benchmark's workers find, made up: rounds, rows and a whole result, to test all that is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cliplet.deploy.bench import BenchResult
from cliplet.deploy.bench_rows import BenchJob, Row
from cliplet.plan import TaggerSettings

QUIET = {"own": 1.0, "others": 0.0, "taken": 0.0, "disturbed": False}
LOADED = {"own": 1.0, "others": 1.5, "taken": 1.5, "disturbed": True}
EQUAL = {
    "passed": True,
    "against": "eager fp32",
    "on": "32 scenes",
    "largest": 2e-6,
    "cosine": 1.0,
    "agreement": 1.0,
}
LIMITS = {"by": "torch 9", "gop_per_s": {"fp32": 100.0}, "gb_per_s": 20.0, "notes": [], "disturbed": False}


def phases(engine: float = 0.02, **changes: Any) -> dict[str, Any]:
    """One round of the phases: `engine` seconds an image, batches of two, ten views."""
    seconds = {"read": 0.001, "decode": 0.008, "canvas": 0.0, "to_device": None, "record+write": 0.001}
    found: dict[str, Any] = {
        "facts": {
            "runtime": "onnxruntime 9",
            "device": "cpu",
            "precision": "fp32",
            "batch": 2,
            "views": 10,
            "classes": 3,
            "canvas": [256, 320],
            "load_s": 0.5,
        },
        "seconds_per_image": {**seconds, "engine": engine},
        "engine": {
            "core_seconds_per_image": 2 * engine,
            "latencies_s": [2 * engine] * 100,
            "parts_images_per_s": [1 / engine] * 4,
            "warm_up": {"batches": 6, "seconds": 0.1, "stable": True},
            "joules_per_image": None,
            "load": QUIET,
        },
        "peak_bytes": 150_000_000,
        "device_bytes": None,
        "notes": [],
        "parity": EQUAL,
        "views_shown": "1+3x3",
        "work": {"gflop_per_view": 0.1, "parameters": 1000.0},
    }
    for name, value in changes.items():
        (found["engine"] if name in found["engine"] else found)[name] = value
    return found


def whole(images_per_s: float = 30.0, **changes: Any) -> dict[str, Any]:
    """One round of `label`."""
    found = {
        "images": 60,
        "inputs": 60,
        "failed": 0,
        "seconds": 60 / images_per_s,
        "images_per_s": images_per_s,
        "peak_bytes": 200_000_000,
        "load": QUIET,
    }
    return {**found, **changes}


def row(
    rates: Sequence[float] = (30.0, 33.0), runtime: str = "onnx", model: str = "tiny", **fields: Any
) -> Row:
    """A row whose rounds labelled so many images a second."""
    made = Row(TaggerSettings(model=model), 2, 1, runtime, "fp32")
    made.wholes = [whole(rate) for rate in rates]
    made.phases = [phases() for _ in rates]
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def result(*rows: Row, **fields: Any) -> BenchResult:
    """What a run of these rows ends with."""
    job = BenchJob(models=tuple(dict.fromkeys(r.settings.model for r in rows)), rounds=2)
    settled: dict[str, Any] = {"limits": LIMITS, "images": "64 scenes", "interrupted": False, **fields}
    return BenchResult(job, rows, **settled)
