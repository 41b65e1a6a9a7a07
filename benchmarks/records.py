"""Where the records of the benchmarks lie, and how one is added; what a record holds stands in `cliplet.record`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from cliplet import record
from cliplet.record import machine, spread

__all__ = ["RESULTS", "machine", "spread", "write_record"]

RESULTS = Path(__file__).parent / "results"
# Whose products of matrices are measured with each record, in torch.
PRECISIONS = ("fp32", "bf16", "int8")


def write_record(name: str, what: dict[str, Any]) -> Path:
    """Write one record as `results/<name>_<cores>cores_<date>.json`, with a counter if that is taken.

    The machine's limits are measured for it, in a process of their own, unless `what` holds `limits`.
    """
    from cliplet.deploy.bench import machine_limits

    program = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}"]
    command = shlex.join([*program, *record.shown(sys.argv[1:])])
    limits = {} if "limits" in what else {"limits": machine_limits(PRECISIONS)}
    return record.write_record(RESULTS, record.record(name, command, limits | what))
