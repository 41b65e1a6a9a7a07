"""The comparison of all training methods on the scene world, as a record.

    python -m benchmarks.train_compare --out runs/compare --jobs 2

is `cliplet train compare --data scenes` (hours on two cores; it continues where it was stopped) and
then one record of its table. mAP does not depend on the machine's speed; the seconds of a run do.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import write_record
from cliplet.train.compare import CompareOptions, compare, markdown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rows", default="", help="rows separated by | (default: all)")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = tuple(name for name in options.rows.split("|") if name)
    result = compare("scenes", options.out, CompareOptions(names, options.seeds, options.jobs, threads=1))
    recipe = next(iter(result["rows"].values()))["recipe"]
    record = write_record(
        "train-compare_scenes_bf16",
        {
            "what": "mAP of every training method and of CCD with parts changed, over seeds",
            "model": f"{recipe['trunk']} that starts from {recipe['teacher']}'s own, {recipe['image_size']} px",
            "images": f"{recipe['train_scenes']:,} scenes to learn from, {recipe['eval_scenes']:,} others to measure",
            "jobs": options.jobs,
            **{key: result[key] for key in ("data", "teacher", "rows")},
        },
    )
    print(markdown(result))
    print(f"wrote {record}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
