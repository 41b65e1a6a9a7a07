"""Records of measurements: what, where, how, when and at which commit, one JSON file each, never overwritten."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from cliplet.machine import CPU_FLAGS, cpu_flags, memory_bytes, usable_cores

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("cliplet", "numpy", "pillow", "simplejpeg", "torch", "open_clip_torch", "timm", "onnxruntime")


def machine() -> dict[str, Any]:
    """The machine as far as it bears on speed."""
    memory = memory_bytes()
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return {
        "processor": named[1].strip() if named else platform.machine(),
        "cores": usable_cores(),
        "flags": [flag for flag in CPU_FLAGS if flag in (cpu_flags() or ())],
        "memory_gib": round(memory[0] / 2**30, 1) if memory else None,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that is measured, marked when the tree differs from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=False
        ).stdout

    return git("rev-parse", "--short=12", "HEAD").strip() + (
        "+changes" if git("status", "--porcelain", "-uno") else ""
    )


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of repeated measurements, and all of them."""
    return {"median": median(values), "min": min(values), "max": max(values), "all": list(values)}


def write_record(name: str, what: dict[str, Any]) -> Path:
    """Write one record as `results/<name>_<cores>cores_<date>.json`, with a counter if that is taken."""
    RESULTS.mkdir(exist_ok=True)
    now = datetime.now(UTC)
    where = machine()
    record = {
        "name": name,
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *_shown(sys.argv[1:])]),
        "machine": where,
        "versions": {library: version(library) for library in LIBRARIES},
        **what,
    }
    stem = f"{name}_{where['cores']}cores_{now:%Y%m%d}"
    taken = len(list(RESULTS.glob(f"{stem}*.json")))
    path = RESULTS / (f"{stem}-{taken + 1}.json" if taken else f"{stem}.json")
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def _shown(arguments: Sequence[str]) -> list[str]:
    """Arguments without the folders of the machine that they name."""
    return [Path(a).name if a.startswith("/") else a for a in arguments]
