"""One measurement of `benchmarks.mlcd_cost`, in the process that runs this: a task as JSON, what was found as the last line.

Legend: N images, K clusters, D width, B images of a batch, L positives of an image.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from cliplet.machine import peak_memory_bytes

# Groups that the made embeddings lie in, and the noise about each: cosines of 0.8 within a group and 0 between them.
GROUPS, NOISE = 2000, 0.5
WARM_UP = 2
RANKS_PATIENCE_S = 900  # for several processes on few cores


def main() -> int:
    """Do the task."""
    task = json.loads(sys.argv[1])
    parts: dict[str, Callable[..., dict[str, Any]]]
    parts = {"clusters": clusters, "loss": loss, "training": training, "ranks": ranks}
    print(json.dumps(parts[task.pop("part")](**task)))
    return 0


def clusters(clusters: int, rows: int, width: int, iterations: int) -> dict[str, Any]:
    """K-means of float16 embeddings [N, D], and the nearest centres of all of them.

    Of its iterations the first also draws the first centres; the median of the others is told.
    """
    from cliplet.train.clusters import ClusterSettings, cluster

    features_ND = made_embeddings(rows, width)
    found = cluster(
        features_ND, np.ones(rows, bool), ClusterSettings(clusters, iterations=iterations), quiet=True
    )
    stats = found.stats
    iteration = median(told["seconds"] for told in stats["iterations"][1:])
    return {
        "sample": stats["sample"],
        "iteration_s": iteration,
        "rows_per_s": stats["sample"] / iteration,
        "assigned_per_s": rows / stats["seconds"]["assignment"],
        "recall": stats["assignment"].get("recall", 1.0),
        "reseeded": found.reseeded,
        "peak_mb": (peak_memory_bytes() or 0) / 1e6,
    }


def made_embeddings(rows: int, width: int) -> np.ndarray:
    """Unit rows float16 [N, D] that lie in groups."""
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((GROUPS, width), np.float32)
    found = np.empty((rows, width), np.float16)
    for start in range(0, rows, 10_000):
        part = found[start : start + 10_000]
        drawn = groups[rng.integers(GROUPS, size=len(part))]
        noisy = drawn + NOISE * rng.standard_normal(drawn.shape, np.float32)
        part[:] = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
    return found


def loss(clusters: int, rate: float, width: int, batch: int, positives: int, steps: int) -> dict[str, Any]:
    """Steps of the class centres alone, float32: loss, gradients of features and centres, AdamW."""
    import torch

    from cliplet.train.class_centres import ClassCentres, memory_per_rank
    from cliplet.train.cluster_losses import LossSettings

    settings = LossSettings(negative_rate=rate, positives=positives)
    stated = memory_per_rank(clusters, width, batch, positives, 1, rate)
    generator = torch.Generator().manual_seed(0)
    before = peak_memory_bytes() or 0
    centres = ClassCentres(clusters, width, settings)
    optimizer = torch.optim.AdamW(centres.parameters(), lr=1e-3)
    seconds = []
    for step in range(WARM_UP + steps):
        features = torch.randn(batch, width, generator=generator).requires_grad_()
        labels = torch.randint(clusters, (batch, positives), generator=generator)
        began = perf_counter()
        centres(features, labels, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(perf_counter() - began)
    return {
        "step_s": median(seconds[WARM_UP:]),
        "grown_mb": ((peak_memory_bytes() or 0) - before) / 1e6,
        "stated_mb": stated / 1e6,
    }


def ranks(
    clusters: int, world: int, rate: float, width: int, batch: int, positives: int, steps: int
) -> dict[str, Any]:
    """By how much the memory of a process grows where so many hold the centres together (gloo): the largest of them.

    Beside it what `memory_per_rank` states, which counts arrays alone: the growth has torch's own in it, too.

    Args:
        batch: images of a step over all processes.
    """
    import multiprocessing

    from cliplet.train.class_centres import memory_per_rank

    each = -(-batch // world)
    task = {"clusters": clusters, "rate": rate, "width": width, "batch": each, "positives": positives}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        with context.Pool(world, maxtasksperchild=1) as pool:
            jobs = [pool.apply_async(_rank, (r, world, meeting, steps, task)) for r in range(world)]
            grown = [job.get(RANKS_PATIENCE_S) for job in jobs]
    stated = memory_per_rank(clusters, width, each, positives, world, rate)
    return {"stated_mb": stated / 1e6, "grown_mb": max(grown) / 1e6}


def _rank(rank: int, world: int, meeting: str, steps: int, task: dict[str, Any]) -> int:
    """Bytes by which this process's memory grew in some steps of its share of the centres."""
    import torch
    from torch import distributed

    from cliplet.train.class_centres import ClassCentres
    from cliplet.train.cluster_losses import LossSettings

    # Two cores for all: more threads would wait for each other, and each has memory of its own.
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    settings = LossSettings(negative_rate=task["rate"], positives=task["positives"])
    generator = torch.Generator().manual_seed(rank)
    before = peak_memory_bytes() or 0
    centres = ClassCentres(task["clusters"], task["width"], settings)
    optimizer = torch.optim.AdamW(centres.parameters(), lr=1e-3, foreach=False)
    for step in range(steps):
        features = torch.randn(task["batch"], task["width"], generator=generator).requires_grad_()
        labels = torch.randint(task["clusters"], (task["batch"], task["positives"]), generator=generator)
        centres(features, labels, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    grown = (peak_memory_bytes() or 0) - before
    distributed.barrier()
    distributed.destroy_process_group()
    return grown


def training(clusters: int, rate: float, images: str, trunk: str, side: int, batch: int) -> dict[str, Any]:
    """An epoch of `cliplet train mlcd` over the images of a folder, whose clusters are drawn at random."""
    from cliplet.listing import find_images
    from cliplet.train.class_centres import ClassCentres
    from cliplet.train.loop import RunOptions
    from cliplet.train.mlcd import new_learner
    from cliplet.train.mlcd_loop import TrunkLearning, learn, read_back_precision
    from cliplet.train.mlcd_recipe import MlcdRecipe
    from cliplet.train.world import launched

    listed = find_images([images]).images
    recipe = MlcdRecipe(
        trunk=trunk, image_size=side, batch=batch, epochs=1, clusters=clusters, negative_rate=rate
    )
    learner, config = new_learner(recipe)
    centres = ClassCentres(clusters, config.width, recipe.loss_settings())
    labels = np.random.default_rng(0).integers(clusters, size=(len(listed), recipe.positives))
    with tempfile.TemporaryDirectory() as folder:
        fabric = launched(recipe.precision, "cpu", Path(folder))
        learning = TrunkLearning(
            recipe,
            fabric,
            learner,
            centres,
            listed,
            labels.astype(np.int32),
            Path(folder) / "checkpoint",
            RunOptions(quiet=True),
        )
        precision = read_back_precision(learning)
        learn(learning)
    return {
        "images_per_s": learning.progress.history[0]["images_per_second"],
        "precision": precision,
        "width": config.width,
        "peak_mb": (peak_memory_bytes() or 0) / 1e6,
    }


if __name__ == "__main__":
    sys.exit(main())
