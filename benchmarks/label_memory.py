"""Whether `label`'s memory grows with the collection: peak memory for 1,000 and for 10,000 images.

python -m benchmarks.label_memory
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import write_record
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world

WORKER = (
    "import sys\n"
    "from cliplet.cli import main\n"
    "from cliplet.machine import peak_memory_bytes\n"
    "code = main(sys.argv[1:])\n"
    "print((peak_memory_bytes() or 0) / 1e6)\n"
    "sys.exit(code)"
)
DIFFERENT_IMAGES = 500


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", default="1000,10000")
    parser.add_argument("--views", default="1")
    options = parser.parse_args(argv)
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = write_scenes(scene_world("test-seen", seed=1), folder / "scenes", DIFFERENT_IMAGES).images
        label(made, folder / "warm", options.views)
        for count in map(int, options.counts.split(",")):
            images = linked(made, folder / f"images-{count}", count)
            rows[str(count)] = label(images, folder / f"out-{count}", options.views)
            print(f"{count} images: peak {rows[str(count)]['peak_mb']:.0f} MB", flush=True)
    record = write_record(
        f"label-memory_tiny_{options.views}_fp32",
        {
            "what": "peak memory of `cliplet label` against the number of images",
            "model": "tiny, onnxruntime fp32",
            "images": f"scenes of 320 x 240, {DIFFERENT_IMAGES} different ones under many names",
            "views": options.views,
            "rows": rows,
        },
    )
    print(f"wrote {record}")
    return 0


def linked(made: Path, folder: Path, count: int) -> Path:
    """A folder with `count` names for the images in `made`."""
    folder.mkdir()
    sources = sorted(made.iterdir())
    for i in range(count):
        os.link(sources[i % len(sources)], folder / f"{i:06d}.jpg")
    return folder


def label(images: Path, out: Path, views: str) -> dict[str, float]:
    """Peak memory and rate of one labelling process."""
    command = [
        sys.executable,
        "-c",
        WORKER,
        "label",
        str(images),
        "--views",
        views,
        "--out",
        str(out),
        "--json",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told, peak = done.stdout.rstrip().rsplit("\n", 1)
    result = json.loads(told)["result"]
    return {"peak_mb": float(peak), "images_per_s": result["labelled"] / result["seconds"]}


if __name__ == "__main__":
    sys.exit(main())
