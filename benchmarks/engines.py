"""How fast every engine of an export scores decoded images, against the eager model one crop at a time, in one run.

    make bench
    python -m benchmarks.engines --photos FOLDER --photos-are "128 photographs" --rounds 3

The first row does as the public CCD code does: the eager float32 model is shown one crop after another (cut by
cliplet's own module; `benchmarks.peers` has a loop of open_clip's own parts). All rows score the same decoded images
with the same weights; each measurement is a process of its own, and the rows take turns, so that a
drift of the machine meets all. Large encoders have random weights, which change no time; their agreement says that
an engine computes the same thing, not how good labels are. TensorRT-RTX engines are built for a GPU that is not here;
of them the record holds verdicts without a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.models import CLASSES, random_weights
from benchmarks.photos import add_photo_options, photos_of
from benchmarks.records import PRECISIONS, spread, write_record
from cliplet.artifact import Bundle, BundleJob, Engine, cache_folder
from cliplet.contract import CLASSIFIER
from cliplet.deploy.bench import machine_limits
from cliplet.images import decode_image
from cliplet.machine import peak_memory_bytes
from cliplet.plan import TaggerSettings, make_plan
from cliplet.runners import Runner, open_runner
from cliplet.views import Views, place_on_canvas

ONE_CROP, BATCHED = "eager fp32, one crop at a time", "eager fp32, batched"
MODELS = ("ViT-B-32", "RN50", "tiny", "student")
STUDENT, STUDENT_SIDE = "resnet18", 224
VIEWS = "1+3x3"
ENGINES = (
    ("onnx", "fp32"),
    ("onnx", "fp16"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
# What a GPU adds: the eager model's own ways to be faster, and the float32 graph in onnxruntime.
GPU_EAGER: dict[str, dict[str, Any]] = {
    "eager fp16, GPU": {"precision": "fp16"},
    "eager fp16, GPU, torch.compile": {"precision": "fp16", "compiled": True},
    "eager fp16, GPU, CUDA graphs": {"precision": "fp16", "cuda_graphs": True},
}
GPU_ONNX = "onnx-fp32, GPU"
GPU_ENGINES = (("tensorrt", "fp16"),)
# What is built ahead of time, where there is no GPU: these for such a one.
AHEAD, AHEAD_FOR = (("tensorrt_rtx", "fp32"), ("tensorrt_rtx", "fp16")), "sm89"
# Images in a batch: of ten views each, or seen as a whole by a student.
TEACHER_BATCH, STUDENT_BATCH = 3, 32
SECONDS = 4.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_photo_options(parser)
    parser.add_argument("--models", default=",".join(MODELS), help="some of ViT-B-32, RN50, tiny, student")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.row:
        print(json.dumps(measure(options.bundle, options.row, options.photos)))
        return 0
    with photos_of(options):
        limits = machine_limits(PRECISIONS)
        if has_gpu():
            on_gpu = machine_limits(("fp32", "fp16"), "cuda")
            limits["gop_per_s"] |= {f"{name} cuda": rate for name, rate in on_gpu["gop_per_s"].items()}
        peaks = limits["gop_per_s"]
        print("matrix products: " + ", ".join(f"{p} {v:.0f} GOP/s" for p, v in peaks.items()), flush=True)
        found = {name: compare(name, options, peaks) for name in options.models.split(",")}
    record = write_record(
        "engines",
        {
            "what": "views scored per second by every engine of an export, against one crop at a time",
            "model": f"{options.models.replace(',', ', ')}; all but tiny with random weights",
            "images": options.photos_are,
            "rounds": options.rounds,
            "limits": limits,
            "rows": found,
        },
    )
    print(f"wrote {record}")
    return 0


def compare(name: str, options: argparse.Namespace, peaks: dict[str, float]) -> dict[str, Any]:
    """Let all rows of one model take turns; the table of it."""
    bundle = bundle_of(name, options.photos)
    engines = {engine.name: engine for engine in bundle.manifest.engines if not is_ahead(engine)}
    rows = [ONE_CROP, BATCHED, *((*GPU_EAGER, GPU_ONNX) if has_gpu() else ()), *engines]
    measured: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    for number in range(options.rounds):
        for row in rows if number % 2 == 0 else reversed(rows):
            measured[row].append(_in_process(bundle.folder, row, options.photos))
            print(f"{name}, {row}: {measured[row][-1]['views_per_s']:.1f} views/s", flush=True)
    work = gflop_per_view(bundle)
    table = {}
    for row, runs in measured.items():
        rates = [run["views_per_s"] for run in runs]
        precision, on_gpu = runs[0]["precision"], runs[0]["device"] != "cpu"
        ratios = [
            run["views_per_s"] / first["views_per_s"]
            for run, first in zip(runs, measured[ONE_CROP], strict=True)
        ]
        table[row] = {
            "views_per_s": spread(rates),
            "ratio_to_first": spread(ratios),
            "precision_read": precision,
            "share_of_peak": work * spread(rates)["median"] / peaks[precision + " cuda" * on_gpu],
            "peak_mb": spread([run["peak_mb"] for run in runs]),
            "batch": runs[0]["batch"],
            **({"parity": dict(engines[row].parity)} if row in engines else {}),
        }
    return {
        "kind": bundle.manifest.kind,
        "gflop_per_view": work,
        "views_per_image": _views(bundle).count,
        "rows": table,
        "verdicts": {} if has_gpu() else verdicts(bundle.manifest.engines),
    }


def is_ahead(engine: Engine) -> bool:
    """Whether an engine was built for a GPU that is not here, and the graph it was built from was compared."""
    return "of" in engine.parity


def verdicts(engines: Sequence[Engine]) -> dict[str, dict[str, Any]]:
    """What is known of each engine built ahead of time, by its name; why there is none where there is none."""
    found = {engine.name: _verdict(engine) for engine in engines if is_ahead(engine)}
    missing = {f"{runtime}-{precision}-{AHEAD_FOR}" for runtime, precision in AHEAD} - found.keys()
    return found | {name: {"verdict": "not built: not installed"} for name in sorted(missing)}


def _verdict(engine: Engine) -> dict[str, Any]:
    agrees = "agrees" if engine.parity["passed"] else "differs"
    return {
        "verdict": f"built, inspected, source {agrees}",
        "precision_read": engine.precision_read,
        "read_from": engine.details["read_from"],
        "version": engine.details["version"],
        "parity": dict(engine.parity),
    }


def default_engines() -> tuple[tuple[str, str], ...]:
    """What a bundle of this benchmark holds: more where a GPU, or what builds for one, is here."""
    if has_gpu():
        return (*ENGINES, *GPU_ENGINES)
    return (*ENGINES, *(AHEAD if find_spec("tensorrt_rtx") else ()))


def bundle_of(name: str, photos: Path, engines: Sequence[tuple[str, str]] | None = None) -> Bundle:
    """The bundle of a model with these engines, whatever the comparison says; built once, in the cache folder.

    Args:
        engines: (runtime, precision) pairs; by default all that this benchmark compares.
    """
    from cliplet.export.bundle import BuildOptions, build_bundle

    classes = None if name == "tiny" else CLASSES
    plan = make_plan(TaggerSettings(model=_model(name), classes=None if name == "student" else classes))
    wanted = default_engines() if engines is None else (*engines, *(GPU_ENGINES if has_gpu() else ()))
    job = BundleJob(plan.spec, plan.vocabulary, plan.aggregation, plan.calibrated, wanted)
    listed = hashlib.sha256("\n".join(sorted(p.name for p in photos.rglob("*"))).encode()).hexdigest()[:8]
    folder = cache_folder() / "benchmarks" / f"engines-{job.cached_folder().name}-{listed}"
    if folder.exists():
        return Bundle.load(folder)
    sources = (str(photos),)
    options = BuildOptions(
        images=sources,
        count=8,
        calibration=sources,
        calibration_count=64,
        target=AHEAD_FOR if set(AHEAD) & set(wanted) else None,
        keep_all=True,
    )
    return build_bundle(job, folder, options)


def _model(name: str) -> str:
    if name == "tiny":
        return name
    return str(random_student()) if name == "student" else f"open_clip:{name}/{random_weights(name)}"


def random_student() -> Path:
    """A small classifier with random weights, made once, in the cache folder."""
    import torch

    from cliplet.classifier import Classifier, ClassifierConfig, save_classifier
    from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
    from cliplet.vocabulary import read_vocabulary

    folder = cache_folder() / "benchmarks" / f"{STUDENT}-{STUDENT_SIDE}"
    if not folder.exists():
        torch.manual_seed(0)
        fed = Preprocessing(STUDENT_SIDE, IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")
        config = ClassifierConfig(trunk=STUDENT, boost=3.0, preprocessing=fed)
        save_classifier(folder, Classifier(config, read_vocabulary(CLASSES)))
    return folder


def measure(folder: Path, row: str, photos: Path) -> dict[str, Any]:
    """Views a second of one row, alone in this process; also its peak memory and the precision that it really has."""
    bundle = Bundle.load(folder)
    batches = list(_batches(bundle, photos))
    with _opened(bundle, row) as runner:
        score = _one_at_a_time(runner) if row == ONE_CROP else runner.infer
        score(batches[0])
        done, began, turn = 0, perf_counter(), 0
        while perf_counter() - began < SECONDS or turn < 2:
            feeds = batches[turn % len(batches)]
            score(feeds)
            done += int(np.prod(feeds["boxes"].shape[:-1]))
            turn += 1
        seconds = perf_counter() - began
        precision, device = runner.precision, runner.device
    return {
        "views_per_s": done / seconds,
        "peak_mb": (peak_memory_bytes() or 0) / 1e6,
        # An engine in mixed precision names them all; the lowest is what its arithmetic is measured against.
        "precision": next(p for p in ("int8", "bf16", "fp16", "fp32") if p in precision),
        "device": device,
        "batch": len(batches[0]["image"]),
    }


def _opened(bundle: Bundle, row: str) -> Runner:
    manifest = bundle.manifest
    if row in (ONE_CROP, BATCHED, *GPU_EAGER):
        from cliplet.export.originals import load_original
        from cliplet.model_spec import parse_model_spec
        from cliplet.runners.torch_runner import TorchRunner
        from cliplet.views import Aggregation

        spec = parse_model_spec(manifest.model)
        job = BundleJob(spec, manifest.vocabulary, Aggregation(**manifest.aggregation), manifest.thresholds)
        device = "cuda" if row in GPU_EAGER else "cpu"
        return TorchRunner(load_original(job).eager, manifest.contract, device, **GPU_EAGER.get(row, {}))
    name = "onnx-fp32" if row == GPU_ONNX else row
    engine = next(engine for engine in manifest.engines if engine.name == name)
    return open_runner(
        engine.runtime,
        bundle.folder / engine.file,
        manifest.contract,
        precision=engine.precision,
        device="cuda" if row == GPU_ONNX or engine.device != "cpu" else "cpu",
    )


def has_gpu() -> bool:
    """Whether torch finds a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def _one_at_a_time(runner: Runner) -> Callable[[dict[str, np.ndarray]], None]:
    def score(feeds: dict[str, np.ndarray]) -> None:
        for image, boxes in zip(feeds["image"], feeds["boxes"], strict=True):
            if boxes.ndim == 1:
                runner.infer({"image": image[None], "boxes": boxes[None]})
                continue
            for box in boxes:
                runner.infer({"image": image[None], "boxes": box[None, None]})

    return score


def _views(bundle: Bundle) -> Views:
    return Views.parse("1" if bundle.manifest.contract is CLASSIFIER else VIEWS)


def _batches(bundle: Bundle, photos: Path) -> Iterator[dict[str, np.ndarray]]:
    fed, views = bundle.manifest.preprocessing, _views(bundle)
    size = STUDENT_BATCH if bundle.manifest.contract is CLASSIFIER else TEACHER_BATCH
    paths = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[: 3 * size]
    pictures = [decode_image(path.read_bytes(), **views.room(fed)) for path in paths]
    for start in range(0, len(pictures), size):
        chosen = pictures[start : start + size]
        feeds = place_on_canvas([p.pixels for p in chosen], views, fed)
        yield bundle.manifest.contract.of_views(feeds)


def gflop_per_view(bundle: Bundle) -> float:
    """Arithmetic of the encoder for one view, in GFLOP (a multiplication and an addition are two)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cliplet.classifier import load_classifier
    from cliplet.model_spec import parse_model_spec
    from cliplet.teacher import load_teacher

    manifest = bundle.manifest
    spec = parse_model_spec(manifest.model)
    encoder = load_classifier(spec.classifier) if spec.classifier else load_teacher(spec).clip.visual
    counter = FlopCounterMode(display=False)
    # The counter does not know the fused attention that torch takes otherwise.
    torch.backends.mha.set_fastpath_enabled(False)
    with counter, torch.no_grad():
        encoder(torch.zeros(1, 3, manifest.preprocessing.size, manifest.preprocessing.size))
    return counter.get_total_flops() / 1e9


def _in_process(folder: Path, row: str, photos: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.engines",
        "--bundle",
        str(folder),
        "--row",
        row,
        "--photos",
        str(photos),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
