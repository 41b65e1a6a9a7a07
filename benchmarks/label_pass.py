"""How fast a data set gets its pseudo-labels: cliplet's batched pass against the public code's one-by-one way.

    python -m benchmarks.label_pass --limit 64 --rounds 3

The public way is `cliplet.train.released_teacher`: batch 1, the whole image squashed to 640 x 640, each crop
enlarged to 640, eager float32. The batched pass cuts the encoder's own squares and scores crops of many images
together. Both get the same files, weights, classes and crops (0 to 8 an image, 4 in the mean, as CAM boxes on
640 pixels have them), and start from the files; each measurement is a process of its own, and the two take turns.
How many pixels an encoder sees differs between them, so a third contender tells the two causes apart: the public
way at the batched pass's own size. Weights are random but for `tiny`: they change no time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.models import CLASSES, random_weights
from benchmarks.records import spread, write_record
from cliplet.images import ImageRef, Picture, decode_image, find_images, read_image
from cliplet.machine import peak_memory_bytes
from cliplet.model_spec import parse_model_spec
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world
from cliplet.train.label_bank import LabelBank
from cliplet.train.label_pass import open_teacher, provenance, score_images
from cliplet.train.released_teacher import RELEASED_SIZE, ReleasedTeacher
from cliplet.vocabulary import read_vocabulary

BATCHED, PUBLIC, PUBLIC_SMALL = "batched", "one by one at 640", "one by one at the encoder's size"
CONTENDERS = (PUBLIC, PUBLIC_SMALL, BATCHED)
WARM_UP = 2  # images, which are scored again in the measurement
EXPECTED_RATIO = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of images (default: scenes made for this run)")
    parser.add_argument("--photos-are", default="", help="what the record says of them")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["tiny", "RN50"], help="tiny, or CLIP ResNets by name")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        (model,) = options.models
        print(json.dumps(measure(options.worker, model, options.photos, options.limit)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if options.photos is None:
            world = scene_world("test-seen", seed=1)
            options.photos = write_scenes(world, Path(folder), options.limit).images
            options.photos_are = f"{options.limit} scenes of the scene world, 320 x 240"
        for model in options.models:
            compare(options, model)
    return 0


def compare(options: argparse.Namespace, model: str) -> None:
    """Let all take turns, print the ratios and write the record."""
    named(model)
    rates: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    peaks: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    views = 0
    for round_number in range(options.rounds):
        for contender in CONTENDERS if round_number % 2 == 0 else reversed(CONTENDERS):
            found = _in_process(options, contender, model)
            views = int(found["views"])
            rates[contender].append(found["images"] / found["seconds"])
            peaks[contender].append(found["peak_mb"])
            print(f"{model}, {contender}: {rates[contender][-1]:.2f} images/s", flush=True)
    ratios = {
        contender: spread(
            [ours / theirs for ours, theirs in zip(rates[BATCHED], rates[contender], strict=True)]
        )
        for contender in (PUBLIC, PUBLIC_SMALL)
    }
    record = write_record(
        f"label-pass_{model}_fp32",
        {
            "what": "images that get their pseudo-labels per second, global pass and pass over crops together",
            "model": model if model == "tiny" else f"{model}, random weights",
            "images": options.photos_are or f"{options.limit} images",
            "views_per_image": views / options.limit,
            "rounds": options.rounds,
            "rows": {
                contender: {"images_per_s": spread(rates[contender]), "peak_mb": spread(peaks[contender])}
                for contender in CONTENDERS
            },
            "ratio_batched_to": ratios,
            "expected_ratio": EXPECTED_RATIO,
        },
    )
    for contender, ratio in ratios.items():
        print(
            f"{model}, batched to {contender}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    print(f"wrote {record}")


def measure(contender: str, model: str, photos: Path, limit: int) -> dict[str, float]:
    """Seconds of both passes over the images, from files to probabilities."""
    images = find_images([str(photos)]).images[:limit]
    if contender == BATCHED:
        seconds, views = batched(model, images)
    else:
        seconds, views = one_by_one(model, images, RELEASED_SIZE if contender == PUBLIC else None)
    return {
        "seconds": seconds,
        "images": len(images),
        "views": views,
        "peak_mb": (peak_memory_bytes() or 0) / 1e6,
    }


def crops(rows: np.ndarray, pictures: Sequence[Picture]) -> list[np.ndarray]:
    """Regions of each image, float32 [r, 4] in shares of its sides, from its place in the list alone.

    At least a quarter of a side, as the public code's margin of 80 of 640 pixels makes them.
    """
    found = []
    for row, _ in zip(rows, pictures, strict=True):
        rng = np.random.default_rng(int(row))
        count = int(row) % 9
        sides = rng.uniform(0.25, 0.6, (count, 2))
        corners = rng.uniform(0, 1, (count, 2)) * (1 - sides)
        found.append(np.concatenate([corners, corners + sides], axis=1).astype(np.float32))
    return found


def batched(model: str, images: Sequence[ImageRef]) -> tuple[float, int]:
    """Seconds and views of cliplet's passes: whole images into one bank, crops into another."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_teacher(named(model), read_vocabulary(CLASSES), views="1") as tagger,
    ):

        def passes(name: str, some: Sequence[ImageRef]) -> tuple[float, int]:
            seconds, views = 0.0, 0
            for kind, boxes in (("whole", None), ("crops", crops)):
                with LabelBank.open(
                    Path(folder) / name / kind,
                    paths=[ref.path for ref in some],
                    classes=tagger.classes,
                    views=1,
                    provenance=provenance(tagger),
                ) as bank:
                    report = score_images(tagger, some, bank, boxes=boxes)
                seconds, views = seconds + report.seconds, views + report.views
            return seconds, views

        passes("warm-up", images[:WARM_UP])
        return passes("measured", images)


def one_by_one(model: str, images: Sequence[ImageRef], size: int | None) -> tuple[float, int]:
    """Seconds and views of the public way, every file read once for the whole image and once for its crops."""
    from cliplet.teacher import load_teacher

    clip = load_teacher(parse_model_spec(named(model)))
    teacher = ReleasedTeacher(clip, read_vocabulary(CLASSES), size=size or clip.preprocessing.size)

    def squashed(ref: ImageRef) -> np.ndarray:
        return teacher.squashed(decode_image(read_image(ref), fit=RELEASED_SIZE).pixels)

    def passes(some: Sequence[ImageRef]) -> int:
        views = 0
        for ref in some:
            teacher.probs_whole(squashed(ref))
            views += 1
        for row, ref in enumerate(some):
            pixels = squashed(ref)
            (shares,) = crops(np.array([row]), [Picture(pixels, teacher.size, teacher.size)])
            for x0, y0, x1, y1 in (shares * teacher.size).astype(int).tolist():
                teacher.probs_crop(pixels, (x0, y0, x1, y1))
                views += 1
        return views

    passes(images[:WARM_UP])
    began = perf_counter()
    views = passes(images)
    return perf_counter() - began, views


def named(model: str) -> str:
    """The model as cliplet names it; CLIP architectures get random weights."""
    return model if model == "tiny" else f"open_clip:{model}/{random_weights(model)}"


def _in_process(options: argparse.Namespace, contender: str, model: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.label_pass", "--worker", contender, "--models", model]
    command += ["--photos", str(options.photos), "--limit", str(options.limit)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
