"""One `label` run in a process of its own, for `benchmarks.scale`: its rate, stages, memory, and what it left on disk.

    python -m benchmarks.scale_label --images FOLDER --out FOLDER --views 1+3x3 --limit 200 --traced
    python -m benchmarks.scale_label --export --classes classes.txt --out BUNDLE

The second builds a bundle of a model for other classes. Each prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

from cliplet.deploy.label import LabelJob, label
from cliplet.machine import peak_memory_bytes
from cliplet.plan import TaggerSettings, make_plan
from cliplet.trace import recording

# Images that an export is compared with its original on: enough to pass, few enough not to be what is measured.
COMPARED = 4


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="where the labels, or the bundle, shall be")
    parser.add_argument("--images", help="folder of images")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--views", default="1")
    parser.add_argument("--workers", type=int, default=0, help="threads that decode; 0 is one a core")
    parser.add_argument("--limit", type=int, help="label only so many, the first ones")
    parser.add_argument("--traced", action="store_true", help="also tell what each stage took")
    parser.add_argument("--export", action="store_true", help="build a bundle of the model instead")
    parser.add_argument("--classes", help="the classes of that bundle")
    options = parser.parse_args(argv)
    found = exported(options) if options.export else labelled(options)
    print(json.dumps(found | {"peak_mb": (peak_memory_bytes() or 0) / 1e6}))
    return 0


def labelled(options: argparse.Namespace) -> dict[str, Any]:
    """What one run of `label` took: the loop over its images, all of the call, and the bytes of its tables.

    A traced run also has milliseconds an image of each stage, summed over threads, and when its first batch was scored.
    """
    job = LabelJob(
        sources=(options.images,),
        out=Path(options.out),
        tagger=TaggerSettings(model=options.model, views=options.views),
        workers=options.workers,
        limit=options.limit,
        quiet=True,
    )
    with recording() if options.traced else nullcontext() as recorder:
        began = perf_counter()
        result = label(job)
        call_s = perf_counter() - began
    found = {
        "images": result.labelled,
        "seconds": result.seconds,
        "call_s": call_s,
        "disk_bytes": sum(part.stat().st_size for part in (job.out / "labels").glob("*.parquet")),
    }
    if recorder is None or not result.scored_now:
        return found
    scored = [
        e["ts"] + e["dur"] for e in recorder.chrome("label") if e["ph"] == "X" and e["name"] == "engine"
    ]
    stages = {name: 1000 * total / result.scored_now for name, total in recorder.seconds().items()}
    return found | {"stages_ms": stages, "first_batch_s": min(scored) / 1e6}


def exported(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the embeddings of a class list's sentences, and of all of the export."""
    from unittest.mock import patch

    from cliplet.artifact import BundleJob
    from cliplet.export.bundle import BuildOptions, build_bundle
    from cliplet.teacher import Teacher
    from cliplet.vocabulary import Vocabulary

    embed, text_s = Teacher.text_matrix, list[float]()

    def text_matrix(self: Teacher, vocabulary: Vocabulary) -> Any:
        began = perf_counter()
        rows = embed(self, vocabulary)
        text_s.append(perf_counter() - began)
        return rows

    plan = make_plan(TaggerSettings(model=options.model, classes=options.classes))
    job = BundleJob(plan.spec, plan.vocabulary, plan.aggregation, plan.calibrated, ((plan.runtime, "fp32"),))
    # Embedded once, and timed where that happens: for many classes it is most of an export.
    with patch.object(Teacher, "text_matrix", text_matrix):
        began = perf_counter()
        build_bundle(job, Path(options.out), BuildOptions(count=COMPARED))
        export_s = perf_counter() - began
    return {"text_s": sum(text_s), "export_s": export_s}


if __name__ == "__main__":
    sys.exit(main())
