"""The machine as far as it bears on speed: cores, memory, instruction sets, and the limits set on this process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

# Instruction sets that change the speed of an encoder, by their names in /proc/cpuinfo.
CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI (int8)",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
}


def usable_cores() -> int:
    """Cores this process may really use: its affinity, or less where its control group has a quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def memory_bytes() -> tuple[int, int, float | None] | None:
    """All memory, what is available of it, and the limit that control groups set; None where it is not known."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = (line.split(":") for line in info.read_text().splitlines())
    sizes = {name: int(value.split()[0]) * 1024 for name, value in lines}
    limit = min(_cgroup_values("memory", "memory.max", "memory.limit_in_bytes"), default=None)
    return sizes["MemTotal"], sizes["MemAvailable"], limit


def peak_memory_bytes() -> int | None:
    """The most memory that this process has had in use so far; None where it is not known.

    Not getrusage's figure, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def cpu_flags() -> set[str] | None:
    """Instruction sets as the kernel names them; None where it does not."""
    info = Path("/proc/cpuinfo")
    match = (
        re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    )
    return set(match[1].split()) if match else None


def cpu_quota() -> float | None:
    """Cores' worth of time that control groups leave this process; None if they set no limit."""
    return min(_cgroup_values("cpu", "cpu.max", "cpu.cfs_quota_us"), default=None)


def _cgroup_values(controller: str, name_v2: str, name_v1: str) -> Iterator[float]:
    """The limits that control groups of version 2 or 1 set on this process, its own group and all above."""
    membership = Path("/proc/self/cgroup")
    root = Path("/sys/fs/cgroup")
    for line in membership.read_text().splitlines() if membership.exists() else []:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, name = root, name_v2
        elif controller in controllers.split(","):
            base, name = root / controller, name_v1
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            yield from _limit(folder / name)


def _limit(file: Path) -> Iterator[float]:
    """The number that a control group's file sets as a limit, if it does; a quota as a share of its period."""
    try:
        words = file.read_text().split()
    except OSError:
        return
    if file.name == "cpu.cfs_quota_us":
        words.append(file.with_name("cpu.cfs_period_us").read_text())
    if not words or words[0] in ("max", "-1"):
        return
    yield float(words[0]) / float(words[1]) if len(words) > 1 else float(words[0])
