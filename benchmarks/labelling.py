"""How near `cliplet label` comes to what its machine can do, and which stage keeps it from that.

    python -m benchmarks.labelling --photos FOLDER --photos-are "128 photographs" --rounds 3

Every phase is measured alone and `label` as a whole, by `cliplet bench`, once with one batch at a time in the engine,
by all of its threads, and once with two, each by half of them: then no thread waits for the others at the end of a
layer, but two batches compete for the caches. Encoders have random weights, which change no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import bundle_of
from benchmarks.photos import add_photo_options, photos_of
from benchmarks.records import write_record
from cliplet.deploy.bench import merged_limits, run_bench
from cliplet.deploy.bench_rows import BenchJob
from cliplet.deploy.bench_summary import bench_record

# Model: runtime and precision of the engine, and how it is to compare. The teacher hides its decoder behind its
# encoder; the student is so fast that decoding counts, and the cores are what both share.
MODELS = {
    "student": ("openvino", "int8", "share_of_ideal"),
    "ViT-B-32": ("openvino", "bf16", "share_of_engine"),
}
AIM = 0.9
STREAMS = {1: "one batch at a time", 2: "two batches at a time"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_photo_options(parser)
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of each engine, and about as long of `label`"
    )
    parser.add_argument(
        "--before",
        nargs="*",
        default=[],
        metavar="MODEL=RECORD",
        help="what `cliplet bench` of an earlier version wrote of the model on this machine, shown beside",
    )
    options = parser.parse_args(argv)
    before = {
        name: json.loads(Path(file).read_text())
        for name, file in (given.split("=", 1) for given in options.before)
    }
    with photos_of(options):
        found = {name: measure(name, options) for name in options.models.split(",")}
    limits: dict[str, Any] = {}
    for model in found.values():
        limits = merged_limits(limits, model.pop("limits"))
    record = write_record(
        "labelling",
        {
            "what": "images labelled per second, each phase alone and all together",
            "model": ", ".join(f"{name} ({'-'.join(MODELS[name][:2])})" for name in found),
            "images": options.photos_are,
            "rounds": options.rounds,
            "aim": AIM,
            "limits": limits,
            "rows": found,
            "before": {
                name: {"commit": old["commit"], "date": old["date"], **next(iter(old["rows"].values()))}
                for name, old in before.items()
            },
        },
    )
    print(f"wrote {record}")
    return 0


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of one model, by how many batches its engine has at a time, and the machine's limits."""
    runtime, precision, aimed_at = MODELS[name]
    bundle = bundle_of(name, options.photos, ((runtime, precision),)).folder
    result = run_bench(
        BenchJob(
            models=(str(bundle),),
            runtimes=(runtime,),
            precisions=(precision,),
            streams=tuple(STREAMS),
            images=(str(options.photos),),
            seconds=options.seconds,
            rounds=options.rounds,
        ),
        lambda line: print(line, flush=True),
    )
    if result.interrupted:
        raise KeyboardInterrupt
    rows = bench_record(result, "")["rows"].values()
    return {
        "aimed_at": aimed_at,
        "limits": result.limits,
        "rows": dict(zip(STREAMS.values(), rows, strict=True)),
    }


if __name__ == "__main__":
    sys.exit(main())
