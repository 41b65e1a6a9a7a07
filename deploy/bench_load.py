"""What else the machine does while something is measured, and what a GPU tells of its memory and energy.

Cores' worth of work by others are all busy time of the processors that this process may use, less its own. A server on
the same machine counts as another.
"""

from __future__ import annotations

import importlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cliplet.machine import usable_cores

# Columns of /proc/stat in which a processor was busy: user, nice, system, irq, softirq, steal.
BUSY_COLUMNS = (1, 2, 3, 6, 7, 8)
# Share of the usable cores that others may take before a measurement is marked.
MOST_BY_OTHERS = 0.1


@dataclass(frozen=True)
class Load:
    """What went on during a measurement.

    Attributes:
        own, others: cores' worth of processor time, of this process and of all others; None where the system does
            not tell.
        taken: of the cores that this process may use, how many others had; what they do on spare cores is left out.
    """

    own: float
    others: float | None
    taken: float | None

    @property
    def disturbed(self) -> bool:
        """Whether others took enough to bear on a measurement."""
        return self.taken is not None and self.taken > MOST_BY_OTHERS * usable_cores()


class LoadMeter:
    """Measures the load from its making to `read`."""

    def __init__(self) -> None:
        self._allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._began, self._own, self._busy = self._now()

    def read(self) -> Load:
        now, own, busy = self._now()
        elapsed = max(now - self._began, 1e-9)
        used = (own - self._own) / elapsed
        if busy is None or self._busy is None:
            return Load(used, None, None)
        others = max(0.0, (busy - self._busy) / elapsed - used)
        # With a quota below the processors that may be used, what others do on the rest takes nothing away.
        return Load(used, others, max(0.0, others - (len(self._allowed) - usable_cores())))

    def _now(self) -> tuple[float, float, float | None]:
        return time.perf_counter(), time.process_time(), _busy_seconds(self._allowed)


def _busy_seconds(processors: list[int], file: Path = Path("/proc/stat")) -> float | None:
    """Seconds that these processors were busy since the machine was started; None where the system does not tell."""
    if not processors or not file.exists():
        return None
    lines = {words[0]: words for words in map(str.split, file.read_text().splitlines()) if words}
    found = [lines[f"cpu{number}"] for number in processors if f"cpu{number}" in lines]
    ticks = sum(int(words[column]) for words in found for column in BUSY_COLUMNS if column < len(words))
    return ticks / os.sysconf("SC_CLK_TCK")


class GpuMeter:
    """Memory and energy of the GPU that this process uses, through NVML.

    Attributes:
        lacking: why there is none of both; empty where there is.
    """

    def __init__(self) -> None:
        self.lacking = ""
        try:
            self._nvml: Any = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._handle = self._own_handle()
            self._used_before = self._used()
        except ImportError:
            self.lacking = (
                "no device memory and no energy: pynvml is not installed (pip install nvidia-ml-py)"
            )
        except self._nvml.NVMLError as error:
            self.lacking = f"no device memory and no energy: NVML says {error}"

    def joules(self) -> float | None:
        """Energy that the GPU has used since its driver was loaded; None where it does not count."""
        if self.lacking:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError:
            return None

    def grown(self) -> int | None:
        """Bytes of the GPU's memory in use beyond those when this was made."""
        return None if self.lacking else max(0, self._used() - self._used_before)

    def _used(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _own_handle(self) -> Any:
        """NVML counts all GPUs, CUDA those that are visible."""
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
        if first.isdecimal():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(first))
        return self._nvml.nvmlDeviceGetHandleByUUID(first)
