"""All parts together: `cliplet label` itself, from files to written tables, in the process that calls this.

Of a trunk, which gives no labels, from files to written embeddings.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from cliplet.contract import TRUNK
from cliplet.errors import DataError
from cliplet.machine import peak_memory_bytes
from cliplet.plan import Plan
from cliplet.trace import recording

from .bench_embeddings import embed_folder
from .bench_load import LoadMeter
from .label import LabelJob, label

# Images of one measurement at most, and batches at least.
MOST_IMAGES, LEAST_BATCHES = 20_000, 4


def measure_whole(
    plan: Plan, images: Path, batch_size: int, streams: int, count: int, *, traced: bool = False
) -> dict[str, Any]:
    """Images a second from files to what is written of them, with the peak memory of this process.

    Args:
        batch_size, streams: as in `LabelJob`; of a trunk, batches are embedded one at a time.
        count: images to label or embed; the files of the folder are named again and again until they are so many.
        traced: also `trace`, the events of a Chrome trace; a trunk has none.
    """
    size = batch_size or plan.images_per_batch
    wanted = min(max(count, LEAST_BATCHES * size), MOST_IMAGES)
    with tempfile.TemporaryDirectory(prefix="cliplet-bench-") as name:
        folder = Path(name)
        files = sorted(file for file in images.iterdir() if file.is_file())
        name_again(files, folder / "images", wanted)
        meter = LoadMeter()
        if plan.contract is TRUNK:
            found = embed_folder(plan, folder / "images", folder / "embeddings", size)
        else:
            job = LabelJob(
                sources=(str(folder / "images"),),
                out=folder / "labels",
                tagger=plan.settings,
                batch_size=batch_size,
                streams=streams,
                quiet=True,
            )
            found = _traced(job) if traced else _labelled(job)
        load = meter.read()
    return {
        **found,
        "images_per_s": found["images"] / found["seconds"],
        "peak_bytes": peak_memory_bytes(),
        "load": asdict(load) | {"disturbed": load.disturbed},
    }


def _traced(job: LabelJob) -> dict[str, Any]:
    """What `_labelled` finds, with what the threads did meanwhile."""
    with recording() as recorder:
        found = _labelled(job)
    return {**found, "trace": recorder.chrome("cliplet label"), "busy_s": recorder.seconds()}


def _labelled(job: LabelJob) -> dict[str, Any]:
    """How many images `label` labelled, how many failed, and the seconds from the first batch to the last row.

    Raises:
        DataError: none could be labelled.
        KeyboardInterrupt: it was interrupted.
    """
    result = label(job)
    if result.interrupted:
        raise KeyboardInterrupt
    if not result.scored_now:
        raise DataError(
            f"none of {result.inputs} images could be labelled", "images, and an engine that works"
        )
    return {
        "inputs": result.inputs,
        "images": result.scored_now,
        "failed": result.failed,
        "seconds": result.seconds,
    }


def name_again(files: Sequence[Path], folder: Path, count: int) -> None:
    """Make a folder that names the files again and again, until it names `count`."""
    folder.mkdir()
    for number, file in enumerate(islice(cycle(files), count)):
        target = folder / f"{number:06d}{file.suffix}"
        with suppress(OSError):
            os.link(file, target)
            continue
        target.symlink_to(file.resolve())
