"""One measurement in a process of its own: a task as JSON on standard input, what was found as the last line of output.

    echo '{"part": "limits", "precisions": ["fp32"], "device": "cpu"}' | python -m cliplet.deploy.bench_worker

A process of its own has its own peak of memory, its own threads, and takes no other down when it dies.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cliplet.artifact import MODEL_FILE, Bundle, Engine
from cliplet.errors import INTERRUPTED, ClipletError, UsageError
from cliplet.images import Picture
from cliplet.plan import Plan, TaggerSettings, make_plan
from cliplet.tagger import exported_bundle

from .bench_limits import encoder_work, limits
from .bench_load import LoadMeter
from .bench_phases import measure_phases, placed
from .bench_rows import ORIGINAL, reason_of
from .bench_whole import measure_whole

# What is said of a number without a verdict.
UNVERIFIED = "pass --unverified to measure it all the same; the row is marked"


def main() -> int:
    """Do the task; 0 also where it failed for a reason that is known, which is then what was found."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cliplet").setLevel(logging.INFO)
    task = json.loads(sys.stdin.read())
    try:
        found = measure(task)
    except ClipletError as error:
        found = {"why": reason_of(error), "fix": error.fix}
    except ImportError as error:
        found = {"why": f"the library {error.name!r} is not installed", "fix": "cliplet doctor"}
    except MemoryError:
        found = {"why": "not enough memory", "fix": "a smaller --batch-size"}
    except KeyboardInterrupt:
        return INTERRUPTED
    # What libraries print must not be taken for it.
    sys.stdout.write(f"\n{json.dumps(found)}\n")
    return 0


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """What a task finds: `limits`, `phases` or `whole`.

    Raises:
        ClipletError: the model cannot be loaded or run, or has no verdict and `unverified` is not set.
    """
    if task["part"] == "limits":
        meter = LoadMeter()
        found = limits(task["precisions"], task["device"], task["threads"], task["seconds"], task["scale"])
        return {**found, "disturbed": meter.read().disturbed}
    plan = make_plan(TaggerSettings(**task["settings"]), features=True)
    images = Path(task["images"])
    if task["part"] == "whole":
        return measure_whole(
            plan, images, task["batch_size"], task["streams"], task["count"], traced=task["traced"]
        )
    parity = hold_verdict(plan, task["unverified"])
    found = measure_phases(plan, images, task["batch_size"], task["seconds"])
    return {
        **found,
        "parity": parity,
        "views_shown": str(plan.views),
        "work": _work(plan) if task["count_work"] else None,
    }


def hold_verdict(plan: Plan, unverified: bool) -> dict[str, Any] | None:
    """How the engine that will run was compared with the original; None if it was not, and that is allowed.

    Raises:
        UsageError: it was not compared or disagrees, and `unverified` is not set.
    """
    if plan.runtime == "torch" and (plan.settings.precision, plan.settings.device) == ("fp32", "cpu"):
        return {"passed": True, "against": ORIGINAL}
    engine = _engine(plan)
    parity = dict(engine.parity) if engine is not None else None
    if unverified or (parity is not None and parity.get("passed")):
        return parity
    if parity is None:
        raise UsageError(
            "no parity verdict: nothing says that it computes what the original does", "", UNVERIFIED
        )
    reasons = "; ".join(parity.get("breaches", ())) or "no reason given"
    raise UsageError(f"it disagrees with the original: {reasons}", "", UNVERIFIED)


def _engine(plan: Plan) -> Engine | None:
    """The engine that will run, with its verdict; what is not in the cache yet is exported first."""
    if plan.engine is not None:
        return plan.engine
    bundle = _bundle(plan)
    return None if bundle is None else bundle.manifest.engines[0]


def _bundle(plan: Plan) -> Bundle | None:
    """The bundle on this machine that will run; None for the eager model and for a server's."""
    if plan.bundle is not None or plan.runtime in ("torch", "triton"):
        return plan.bundle
    return exported_bundle(plan)


def _work(plan: Plan) -> dict[str, float] | None:
    """Arithmetic and parameters of the encoder, counted in the bundle's float32 graph; None where there is none."""
    bundle = _bundle(plan)
    if bundle is None or not (bundle.folder / MODEL_FILE).exists():
        return None
    fed = bundle.manifest.preprocessing
    black = np.zeros((fed.size, fed.size, 3), np.uint8)
    return encoder_work(bundle.folder / MODEL_FILE, placed(plan, fed, [Picture(black, fed.size, fed.size)]))


if __name__ == "__main__":
    sys.exit(main())
