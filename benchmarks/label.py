"""How fast images are scored: cliplet's graph in onnxruntime against a plain open_clip loop, in one run.

    make bench
    python -m benchmarks.label --photos FOLDER --rounds 3

The loop is what a user writes first: Pillow opens and crops, open_clip's own transform prepares each view,
the eager float32 model scores the views of one image at a time. Both get the same images, weights, classes and
views; each measurement is a process of its own, and the two take turns, so that a drift of the machine meets
both. Weights are random: they change no time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.records import spread, write_record
from cliplet.artifact import cache_folder
from cliplet.images import decode_image
from cliplet.machine import peak_memory_bytes
from cliplet.plan import TaggerSettings
from cliplet.scene_files import write_scenes
from cliplet.scenes import scene_world
from cliplet.tagger import load
from cliplet.views import Views

ARCHITECTURE = "ViT-B-32"
CLASSES = "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,bird,cat,dog,horse,sheep,cow,bottle,chair,sofa"
WARM_UP = 2
CONTENDERS = ("open_clip loop", "cliplet onnxruntime")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of images (default: scenes made for this run)")
    parser.add_argument("--photos-are", default="", help="what the record says of them")
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--views", default="1+3x3")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        worker = {CONTENDERS[0]: time_open_clip_loop, CONTENDERS[1]: time_cliplet}[options.worker]
        seconds, images = worker(
            _paths(options.photos, options.limit), Views.parse(options.views), options.in_memory
        )
        peak_mb = (peak_memory_bytes() or 0) / 1e6
        print(json.dumps({"seconds": seconds, "images": images, "peak_mb": peak_mb}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if options.photos is None:
            options.photos = write_scenes(
                scene_world("test-seen", seed=1), Path(folder), options.limit
            ).images
            options.photos_are = f"{options.limit} scenes of the scene world, 320 x 240"
        compare(options)
    return 0


def compare(options: argparse.Namespace) -> None:
    """Let both take turns, print the table and write the record."""
    random_weights(ARCHITECTURE)
    views = Views.parse(options.views).count
    peak, per_view = matrix_product_peak(), gflop_per_view()
    print(
        f"this machine's float32 matrix product: {peak:.0f} GFLOP/s; one view takes {per_view:.1f} GFLOP",
        flush=True,
    )
    measured: dict[str, dict[str, list[float]]] = {}
    for round_number in range(options.rounds):
        for contender in CONTENDERS if round_number % 2 == 0 else reversed(CONTENDERS):
            for decoded in ("with decode", "without decode"):
                found = _in_process(options, contender, decoded == "without decode")
                rates = measured.setdefault(f"{contender}, {decoded}", {"images_per_s": [], "peak_mb": []})
                rates["images_per_s"].append(found["images"] / found["seconds"])
                rates["peak_mb"].append(found["peak_mb"])
                print(f"{contender}, {decoded}: {rates['images_per_s'][-1]:.2f} images/s", flush=True)
    rows = {
        name: {
            "images_per_s": spread(r["images_per_s"]),
            "views_per_s": spread([views * v for v in r["images_per_s"]]),
            "peak_mb": spread(r["peak_mb"]),
            "share_of_peak": per_view * views * spread(r["images_per_s"])["median"] / peak,
        }
        for name, r in measured.items()
    }
    ratios = {
        decoded: spread(
            [
                ours / theirs
                for ours, theirs in zip(
                    measured[f"{CONTENDERS[1]}, {decoded}"]["images_per_s"],
                    measured[f"{CONTENDERS[0]}, {decoded}"]["images_per_s"],
                    strict=True,
                )
            ]
        )
        for decoded in ("with decode", "without decode")
    }
    record = write_record(
        f"label_{ARCHITECTURE}_{options.views}_fp32",
        {
            "what": "images scored per second, cliplet's graph in onnxruntime against a plain open_clip loop",
            "model": f"{ARCHITECTURE}, random weights",
            "images": options.photos_are or f"{options.limit} images",
            "views": options.views,
            "rounds": options.rounds,
            "matrix_product_gflop_per_s": peak,
            "encoder_gflop_per_view": per_view,
            "rows": rows,
            "ratio_cliplet_to_loop": ratios,
        },
    )
    for decoded, ratio in ratios.items():
        print(f"ratio {decoded}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    print(f"wrote {record}")


def random_weights(architecture: str) -> Path:
    """Random weights of an open_clip architecture, made once, in the cache folder; they change no time."""
    path = cache_folder() / "benchmarks" / f"{architecture}.safetensors"
    if not path.exists():
        import open_clip
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = open_clip.create_model(architecture).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def matrix_product_peak(side: int = 2048, tries: int = 10) -> float:
    """Best rate in GFLOP/s of a float32 product of square matrices: what no encoder can pass on this machine."""
    import torch

    left, right = torch.randn(side, side), torch.randn(side, side)
    seconds = []
    for _ in range(tries):
        began = perf_counter()
        left @ right
        seconds.append(perf_counter() - began)
    return 2 * side**3 / min(seconds) / 1e9


def gflop_per_view() -> float:
    """Arithmetic of the image tower for one view, in GFLOP (a multiplication and an addition are two)."""
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = open_clip.create_model(ARCHITECTURE, pretrained=str(random_weights(ARCHITECTURE))).eval()
    # The fused inference path is one opaque operator to the counter.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() / 1e9


def time_open_clip_loop(paths: Sequence[Path], views: Views, in_memory: bool) -> tuple[float, int]:
    """Seconds of the plain loop, from files or from decoded images to the scores of every view."""
    import open_clip
    import torch
    from PIL import Image

    model, _, transform = open_clip.create_model_and_transforms(
        ARCHITECTURE, pretrained=str(random_weights(ARCHITECTURE))
    )
    model = model.eval()
    tokens = open_clip.get_tokenizer(ARCHITECTURE)([f"a photo of a {name}" for name in CLASSES.split(",")])

    def open_image(path: Path) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    with torch.inference_mode():
        text = model.encode_text(tokens, normalize=True)

        def score(image: Image.Image) -> None:
            cells = [image]
            for n in views.grids:
                w, h = image.size
                boxes = [
                    (w * j // n, h * i // n, w * (j + 1) // n, h * (i + 1) // n)
                    for i in range(n)
                    for j in range(n)
                ]
                cells += [image.crop(box) for box in boxes]
            batch = torch.stack([transform(cell) for cell in cells])
            features = model.encode_image(batch, normalize=True)
            (model.logit_scale.exp() * features @ text.T).softmax(dim=-1).amax(dim=0).numpy()

        if in_memory:
            return _timed(score, [open_image(path) for path in paths])
        return _timed(lambda path: score(open_image(path)), paths)


def time_cliplet(paths: Sequence[Path], views: Views, in_memory: bool) -> tuple[float, int]:
    """Seconds of the exported graph: `label` from files to tables, or the engine alone on decoded images."""
    from cliplet.deploy.label import LabelJob, label

    settings = TaggerSettings(
        model=f"open_clip:{ARCHITECTURE}/{random_weights(ARCHITECTURE)}", classes=CLASSES, views=str(views)
    )
    if not in_memory:
        with tempfile.TemporaryDirectory() as folder:
            job = LabelJob(
                sources=tuple(map(str, paths)), out=Path(folder) / "out", tagger=settings, quiet=True
            )
            result = label(job)
            return result.seconds, result.labelled
    with load(settings.model, classes=CLASSES, views=str(views)) as tagger:
        pictures = [decode_image(path.read_bytes(), **tagger.room) for path in paths]
        step = tagger.plan.images_per_batch
        batches = [pictures[i : i + step] for i in range(0, len(pictures), step)]
        seconds, _ = _timed(lambda batch: tagger.score(batch), batches)
        return seconds, len(pictures)


def _timed(work: Callable[[Any], object], items: Sequence[Any]) -> tuple[float, int]:
    for item in items[:WARM_UP]:
        work(item)
    began = perf_counter()
    for item in items:
        work(item)
    return perf_counter() - began, len(items)


def _paths(photos: Path, limit: int) -> list[Path]:
    found = sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:limit]
    if not found:
        sys.exit(f"no images in {photos}")
    return found


def _in_process(options: argparse.Namespace, contender: str, in_memory: bool) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.label",
        "--worker",
        contender,
        "--photos",
        str(options.photos),
    ]
    command += [
        "--limit",
        str(options.limit),
        "--views",
        options.views,
        *(["--in-memory"] if in_memory else []),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
