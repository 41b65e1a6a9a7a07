"""Each part of labelling or embedding alone, in the process that calls this.

Legend: B images of a batch, V views.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np

from cliplet.contract import TRUNK
from cliplet.errors import ClipletError, DataError
from cliplet.images import ImageError, ImageRef, Picture, decode_image, find_images, read_image
from cliplet.label_records import LabelRecord
from cliplet.labels import LabelStore
from cliplet.machine import peak_memory_bytes
from cliplet.plan import Plan
from cliplet.tagger import Tagger, load_plan
from cliplet.views import Preprocessing, place_on_canvas

from .bench_embeddings import EngineEmbedder, seconds_to_write
from .bench_load import GpuMeter, LoadMeter
from .label import PART_ROWS

# Batches that the engine meets in turn: enough that it cannot live from one.
BATCHES = 3
# Runs of a batch in a window of the warm-up; it is over when the medians of two windows in a row are this near.
WINDOW, STABLE = 3, 0.05
# Parts in which the measured time of an engine is cut, to see a drift.
PARTS = 4


@dataclass(frozen=True)
class Warmed:
    """How a warm-up ended: batches run, seconds, and whether two windows in a row agreed."""

    batches: int
    seconds: float
    stable: bool


def measure_phases(plan: Plan, images: Path, batch_size: int, seconds: float) -> dict[str, Any]:
    """Seconds an image of each phase alone, latencies of the engine, memory, energy and load.

    Args:
        images: a folder of files that can be decoded.
        batch_size: images in a batch; 0 is the plan's.
        seconds: of the engine's measurement; its warm-up gets half of it at most, other phases a quarter each.

    Raises:
        ClipletError: the model cannot be loaded, or the engine fails.
    """
    refs = [ref for ref in find_images([str(images)]).images if _decodes(ref)]
    if not refs:
        raise DataError(f"no image of {images} can be decoded", "images", "name others with --images")
    size = batch_size or plan.images_per_batch
    gpu = GpuMeter() if plan.settings.device != "cpu" else None
    began = perf_counter()
    with load_plan(plan) as tagger:
        loading = perf_counter() - began
        short = seconds / 4
        read, decode = _decoding(tagger, refs, short)
        batches = list(_batches(tagger, refs, size))
        canvas = _per_image(lambda batch: placed(plan, tagger.preprocessing, batch), batches, short)
        feeds = [placed(plan, tagger.preprocessing, batch) for batch in batches]
        copied, why_not = _to_device(feeds, plan.settings.device, short)
        engine = _engine(tagger, feeds, seconds, gpu)
        embedder = EngineEmbedder(tagger, size) if plan.contract is TRUNK else None
        if embedder is None:
            write = _writing(tagger, batches, short)
        else:
            write = seconds_to_write(embedder, refs, batches[0], short)
        facts = {
            "runtime": tagger.runner.runtime,
            "device": tagger.runner.device,
            "precision": tagger.runner.precision,
            "batch": size,
            "views": int(np.prod(feeds[0]["boxes"].shape[1:-1])),
            "classes": None if embedder else len(tagger.classes),
            "embedding_width": embedder.width if embedder else None,
            "canvas": list(feeds[0]["image"].shape[1:3]),
            "load_s": loading,
        }
        notes = [note for note in (why_not, gpu.lacking if gpu else "") if note]
    return {
        "facts": facts,
        "seconds_per_image": {
            "read": read,
            "decode": decode,
            "canvas": canvas,
            "to_device": copied,
            "engine": engine["seconds_per_image"],
            "record+write": write,
        },
        "engine": engine,
        "peak_bytes": peak_memory_bytes(),
        "device_bytes": engine.pop("device_bytes"),
        "notes": notes,
    }


def warm_up(step: Callable[[], object], limit_s: float) -> Warmed:
    """Run `step` until two windows of runs take the same time, or until `limit_s` seconds are over.

    A window is one run where runs are long; two windows there are at least.
    """
    began = perf_counter()
    step()
    window = WINDOW if perf_counter() - began < limit_s / (2 * WINDOW) else 1
    medians: list[float] = []
    while True:
        times = []
        for _ in range(window):
            start = perf_counter()
            step()
            times.append(perf_counter() - start)
        medians.append(median(times))
        elapsed = perf_counter() - began
        stable = len(medians) > 1 and abs(medians[-1] / medians[-2] - 1) < STABLE
        if stable or (elapsed >= limit_s and len(medians) > 1):
            return Warmed(1 + len(medians) * window, elapsed, stable)


def placed(plan: Plan, fed: Preprocessing, pictures: Sequence[Picture]) -> dict[str, np.ndarray]:
    """What a plan's engine is fed for a batch of decoded images."""
    pixels, sizes = [p.pixels for p in pictures], [(p.width, p.height) for p in pictures]
    return plan.contract.of_views(place_on_canvas(pixels, plan.views, fed, None, sizes))


def _engine(
    tagger: Tagger, feeds: Sequence[dict[str, np.ndarray]], seconds: float, gpu: GpuMeter | None
) -> dict[str, Any]:
    turns = cycle(feeds)
    warmed = warm_up(lambda: tagger.runner.infer(next(turns)), seconds / 2)
    meter, cpu, energy = LoadMeter(), process_time(), gpu.joules() if gpu else None
    latencies: list[float] = []
    images = [0]
    began = perf_counter()
    while (elapsed := perf_counter() - began) < seconds or len(latencies) < PARTS:
        batch = next(turns)
        start = perf_counter()
        tagger.runner.infer(batch)
        latencies.append(perf_counter() - start)
        images.append(images[-1] + len(batch["image"]))
    elapsed = perf_counter() - began
    load, used = meter.read(), gpu.joules() if gpu else None
    done = images[-1]
    return {
        "seconds_per_image": elapsed / done,
        "core_seconds_per_image": (process_time() - cpu) / done,
        "latencies_s": latencies,
        "parts_images_per_s": _parts(latencies, images),
        "warm_up": asdict(warmed),
        "joules_per_image": None if energy is None or used is None else (used - energy) / done,
        "device_bytes": gpu.grown() if gpu else None,
        "load": asdict(load) | {"disturbed": load.disturbed},
    }


def _parts(latencies: Sequence[float], images: Sequence[int]) -> list[float]:
    """Images a second in each of PARTS stretches of a measurement."""
    cuts = [round(i * len(latencies) / PARTS) for i in range(PARTS + 1)]
    return [
        (images[end] - images[begin]) / sum(latencies[begin:end])
        for begin, end in zip(cuts[:-1], cuts[1:], strict=True)
    ]


def _decodes(ref: ImageRef) -> bool:
    """Whether an input has pixels; `label` counts the others as errors."""
    try:
        decode_image(read_image(ref), fit=1)
    except ImageError:
        return False
    return True


def _decoding(tagger: Tagger, refs: Sequence[ImageRef], seconds: float) -> tuple[float, float]:
    """Seconds to read and to decode an image, on one thread."""
    reading: list[float] = []
    decoding: list[float] = []
    began = perf_counter()
    for ref in cycle(refs):
        start = perf_counter()
        data = read_image(ref)
        middle = perf_counter()
        decode_image(data, **tagger.room)
        reading.append(middle - start)
        decoding.append(perf_counter() - middle)
        if len(reading) >= min(len(refs), 8) and perf_counter() - began >= seconds:
            break
    # The mean, since images differ in size and all of them have to be decoded.
    return float(np.mean(reading)), float(np.mean(decoding))


def _batches(tagger: Tagger, refs: Sequence[ImageRef], size: int) -> Iterator[list[Picture]]:
    """A few full batches of decoded images; where there are too few, they come again."""
    few = list(islice(cycle(refs), BATCHES * size))
    known: dict[str, Picture] = {}
    for start in range(0, len(few), size):
        chosen = few[start : start + size]
        for ref in chosen:
            if ref.path not in known:
                known[ref.path] = decode_image(read_image(ref), **tagger.room)
        yield [known[ref.path] for ref in chosen]


def _per_image(
    work: Callable[[Sequence[Picture]], object], batches: Sequence[Sequence[Picture]], seconds: float
) -> float:
    """The median over batches of seconds an image."""
    found: list[float] = []
    began = perf_counter()
    for batch in cycle(batches):
        start = perf_counter()
        work(batch)
        found.append((perf_counter() - start) / len(batch))
        if len(found) >= len(batches) and perf_counter() - began >= seconds:
            return median(found)
    raise AssertionError("no batches")


def _to_device(
    feeds: Sequence[dict[str, np.ndarray]], device: str, seconds: float
) -> tuple[float | None, str]:
    """Seconds an image to copy batches from page-locked memory to the GPU; without one, why there are none."""
    if device == "cpu":
        return None, ""
    try:
        from cliplet.cuda import Cuda, CudaFailure

        cuda = Cuda()
    except ClipletError as error:
        return None, f"no time of host to device: {error.happened}"
    canvas = feeds[0]["image"]
    try:
        source, array = cuda.pinned_memory(canvas.nbytes)
        target, stream = cuda.device_memory(canvas.nbytes), cuda.stream()
        array[:] = canvas.reshape(-1)
        found: list[float] = []
        began = perf_counter()
        while len(found) < WINDOW or perf_counter() - began < seconds:
            start = perf_counter()
            cuda.copy_to_device(target, source, canvas.nbytes, stream)
            cuda.synchronize(stream)
            found.append((perf_counter() - start) / len(canvas))
        cuda.destroy_stream(stream)
        cuda.free_device_memory(target)
        cuda.free_pinned_memory(source)
    except CudaFailure as error:
        return None, f"no time of host to device: {error}"
    return median(found), ""


def _writing(tagger: Tagger, batches: Sequence[Sequence[Picture]], seconds: float) -> float:
    """Seconds to make the row of an image and to write it, in parts of as many rows as `label` writes."""
    pictures = [picture for batch in batches for picture in batch]
    scores_C = np.linspace(0, 1, len(tagger.classes), dtype=np.float32)

    def rows() -> list[LabelRecord]:
        named = enumerate(islice(cycle(pictures), PART_ROWS))
        return [tagger.record(f"image-{i:06d}.jpg", picture, scores_C, 0.0) for i, picture in named]

    with tempfile.TemporaryDirectory(prefix="cliplet-bench-") as folder:
        with LabelStore(Path(folder)) as store:
            store.begin({"schema": 1, "fingerprint": {}, "classes": list(tagger.classes)}, overwrite=True)
            found: list[float] = []
            began = perf_counter()
            while not found or perf_counter() - began < seconds:
                start = perf_counter()
                store.write_part(rows())
                found.append((perf_counter() - start) / PART_ROWS)
    return median(found)
