"""Records of measurements: what, where, how, when and at which commit, one JSON file each, never overwritten."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from cliplet import __version__
from cliplet.errors import DataError
from cliplet.labels import write_atomically
from cliplet.machine import CPU_FLAGS, cpu_flags, memory_bytes, usable_cores

# Libraries whose version may change a measurement.
LIBRARIES = (
    "cliplet",
    "numpy",
    "pillow",
    "simplejpeg",
    "torch",
    "open_clip_torch",
    "timm",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt_rtx_cu13",
    "tritonclient",
)


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
    """The commit that is measured, marked when the tree differs from it; the release where there is no repository."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, check=False, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip()

    # A package that was installed into a folder of someone else's repository is not measured at their commit.
    if not git("ls-files", "cliplet/__init__.py"):
        return f"release {__version__}"
    return git("rev-parse", "--short=12", "HEAD") + (
        "+changes" if git("status", "--porcelain", "-uno") else ""
    )


def installed_versions() -> dict[str, str]:
    """Versions of those of LIBRARIES that are installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of repeated measurements, and all of them."""
    return {"median": median(values), "min": min(values), "max": max(values), "all": list(values)}


def record(name: str, command: str, what: Mapping[str, Any]) -> dict[str, Any]:
    """What a record holds: `what` was measured, with the machine, the commit, the command and the time of the call.

    Args:
        command: how it was called; the folders of this machine are left out of it, see `shown`.
    """
    return {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command,
        "machine": machine(),
        "versions": installed_versions(),
        **what,
    }


def write_record(folder: Path, made: Mapping[str, Any]) -> Path:
    """The file `<name>_<cores>cores_<date>.json` that was written to `folder`, with a counter if that is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    day = datetime.fromisoformat(made["date"]).strftime("%Y%m%d")
    stem = f"{made['name']}_{made['machine']['cores']}cores_{day}"
    path, counter = folder / f"{stem}.json", 1
    while path.exists():
        counter += 1
        path = folder / f"{stem}-{counter}.json"
    write_atomically(path, json_bytes(made))
    return path


def json_bytes(made: Mapping[str, Any]) -> bytes:
    """A record as a file holds it."""
    return (json.dumps(made, indent=2) + "\n").encode()


def read_record(file: Path, name: str) -> dict[str, Any]:
    """The record of that name in a file.

    Raises:
        DataError: it cannot be read, or is another kind of record.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the record {file}: {error}", f"a record {name!r} in JSON", "check the path"
        ) from error
    if not isinstance(found, dict) or found.get("name") != name:
        kind = found.get("name") if isinstance(found, dict) else type(found).__name__
        raise DataError(f"{file} is no record {name!r} but {kind!r}", f"what `cliplet {name}` wrote")
    return found


def shown(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command without the folders of the machine that they name."""
    return [_without_folder(argument) for argument in arguments]


def _without_folder(argument: str) -> str:
    """`/home/me/photos` as `photos`, also after `--out=` and `open_clip:ViT-B-32/`."""
    found = re.fullmatch(r"((?:--[^=]+=)?(?:open_clip:[^/]*[/:])?)((?:/|\.\.|~).*)", argument, re.DOTALL)
    return f"{found[1]}{Path(found[2]).name}" if found else argument
