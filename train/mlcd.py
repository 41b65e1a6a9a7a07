"""One run from unlabelled images to a trained trunk; `cliplet train mlcd` is this.

    OUT/embeddings/    where the teacher sees every image
    OUT/clusters/      the clusters, and the nearest ones of every image
    OUT/run.json       the recipe, the images: what a later call must agree with to continue
    OUT/checkpoint/    where the run stands
    OUT/trunk/         the trunk, for `--trunk mlcd:OUT/trunk`
    OUT/report.json    what was measured; OUT/tensorboard/ the curves

The first process embeds and clusters, then all of them train.

Legend: N images, L clusters that are an image's labels, C classes.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from cliplet.artifact import library_versions
from cliplet.errors import ArtifactError, ClipletError, DataError, UsageError
from cliplet.labels import write_atomically
from cliplet.listing import ImageRef
from cliplet.lock import lock_folder
from cliplet.machine import usable_cores
from cliplet.scenes import PARTS
from cliplet.tower_files import CLIP_MEAN, CLIP_STD
from cliplet.trunk_files import (
    OPEN_CLIP,
    TrunkConfig,
    holds_whole_trunk,
    new_trunk,
    save_trunk,
    trunk_details,
    trunk_width,
)
from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

from . import bank_files
from .class_centres import ClassCentres, memory_per_rank
from .cluster_quality import cluster_quality
from .clusters import Clusters, ClusterSettings, cluster, read_clusters, write_clusters
from .collection import collection_table, differences, facts_of
from .embedder import teacher_embedder
from .embedding_rows import hashes_of_sound_rows
from .embeddings import EMBEDDINGS, Embeddings, EmbedOptions, embed_images, read_embeddings
from .feed import SMALLEST_BATCH
from .loop import RunOptions
from .mlcd_loop import (
    Learner,
    TrunkLearning,
    learn,
    new_neck,
    read_back_precision,
    set_gradient_checkpointing,
)
from .mlcd_recipe import MlcdRecipe
from .run_folder import begin_run, clear_run
from .run_state import has_run_state
from .trunk_weights import pretrained_weights
from .world import launched

log = logging.getLogger("cliplet")

# How long the other processes wait for the first one to embed and cluster a large collection.
PATIENCE = timedelta(days=30)
# Files of `cliplet scenes`, the only images that the teacher `tiny` has ever seen.
MADE_SCENE = re.compile(rf"({'|'.join(PARTS)})_\d{{6}}\.jpg")


@dataclass(frozen=True)
class MlcdOptions:
    """How a run is carried out; nothing here changes what it ends with.

    Attributes:
        embeddings: folder of the embeddings, by default in the run's own; `overwrite` never forgets another.
        threads: of torch on the CPU; 0 leaves torch's choice.
        overwrite: forget what an earlier run left in the folder; embeddings of its own that fit and are sound are
            kept, and images that failed are tried again.
        run: of its `workers`, 0 means one a core.
        truth_NC: [N, C], above 0 where an image has the class; only to say how pure the clusters are.
    """

    embeddings: Path | None = None
    device: str = "cpu"
    threads: int = 0
    overwrite: bool = False
    run: RunOptions = RunOptions()
    truth_NC: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class _Collection:
    """The images of a run, where the teacher sees them, and how they are divided."""

    images: Sequence[ImageRef]
    embeddings: Embeddings
    clusters: Clusters


def train_mlcd(
    recipe: MlcdRecipe, images: Sequence[ImageRef], out: Path, options: MlcdOptions
) -> dict[str, Any]:
    """What was measured, after leaving in `out` a trained trunk; continues a run that was stopped there.

    A run that has ended is not repeated; if its trunk is gone, it is written again from the checkpoint.

    Raises:
        UsageError: `out` holds another run or the embeddings of another collection, or another process is writing it.
        DataError: too few images can be read, or a loss is not finite.
        EnvironmentError_: weights or a device are missing.
    """
    threads = options.threads or torch.get_num_threads()
    workers = options.run.workers or usable_cores()
    options = replace(options, run=replace(options.run, workers=workers))
    recipe.clusters_of(len(images))
    fabric = launched(recipe.precision, options.device, out)
    lock = lock_folder(out) if fabric.is_global_zero else None
    try:
        _refuse_small_batches(recipe, fabric)
        learner, config = new_learner(recipe)
        if fabric.is_global_zero and options.overwrite:
            clear_run(out, ("clusters", "checkpoint", "trunk", "tensorboard"))
        if fabric.is_global_zero:
            _refuse_other_run(recipe, images, out, options.embeddings or out / "embeddings")
        embeddings = _embedded(recipe, images, out, options, fabric)
        told = {"images": embeddings.provenance["images"]}
        finished = begin_run(recipe, [told], out, fabric.is_global_zero)
        whole = holds_whole_trunk(out / "trunk")
        fabric.barrier()
        if finished and whole:
            return finished
        if finished:
            _refuse_lost_checkpoint(out)
        clusters = _clustered(recipe, embeddings, out, options, fabric)
        collection = _Collection(images, embeddings, clusters)
        # Embedding and clustering have had their own number, and it decides how sums are rounded.
        torch.set_num_threads(threads)
        return _train(recipe, learner, config, collection, out, options, fabric)
    finally:
        if lock is not None:
            os.close(lock)


def _refuse_other_run(recipe: MlcdRecipe, images: Sequence[ImageRef], out: Path, embeddings: Path) -> None:
    """Raise `UsageError` if `out` holds another run, before hours go into embeddings; which files differ, if known."""
    if not (out / "run.json").exists():
        return
    table = collection_table(images)
    try:
        begin_run(recipe, [{"images": facts_of(table)}], out, writes=False)
    except UsageError as error:
        known = (embeddings / EMBEDDINGS.description).exists()
        changed = differences(bank_files.read_images(embeddings, EMBEDDINGS), table) if known else []
        if not changed:
            raise
        happened = f"{error.happened}: {'; '.join(changed)}"
        raise UsageError(happened, error.expected, error.fix) from error


def _refuse_lost_checkpoint(out: Path) -> None:
    if not has_run_state(out / "checkpoint"):
        raise UsageError(
            f"the run in {out} has ended, but {out / 'trunk'} and {out / 'checkpoint'} are gone or damaged",
            "its trunk, or the checkpoint that it can be written from again",
            "train it again with --overwrite; embeddings that fit are kept",
        )


def _refuse_small_batches(recipe: MlcdRecipe, fabric: Fabric) -> None:
    least = SMALLEST_BATCH * fabric.world_size
    if recipe.batch < least:
        raise UsageError(
            f"batches of {recipe.batch} for {fabric.world_size} processes",
            f"{SMALLEST_BATCH} images of each batch for every process",
            f"--batch-size {least}",
        )


def new_learner(recipe: MlcdRecipe) -> tuple[Learner, TrunkConfig]:
    """The recipe's trunk before its first step, with its neck, and the trunk's configuration.

    Raises:
        UsageError: no such trunk, or not with these settings.
        EnvironmentError_: the pretrained weights have to be downloaded and cannot be.
    """
    torch.manual_seed(recipe.seed)
    trunk = new_trunk(recipe.trunk, recipe.image_size)
    if recipe.trunk_weights == "pretrained":
        _set_pretrained(trunk, recipe.trunk)
    if recipe.gradient_checkpointing:
        set_gradient_checkpointing(trunk, recipe.trunk)
    of_clip = recipe.trunk.startswith(OPEN_CLIP)
    mean, std = (CLIP_MEAN, CLIP_STD) if of_clip else (IMAGENET_MEAN, IMAGENET_STD)
    fed = Preprocessing(recipe.image_size, mean, std, "bilinear", "squash")
    width = trunk_width(trunk, recipe.image_size)
    config = TrunkConfig(trunk=recipe.trunk, preprocessing=fed, width=width)
    return Learner(trunk, new_neck(recipe.neck, width), mean, std), config


def _set_pretrained(trunk: nn.Module, name: str) -> None:
    if name.startswith(OPEN_CLIP):
        raise UsageError(
            f"pretrained weights for the trunk {name}",
            "a timm model: timm has most of open_clip's towers under its own names",
            "--set trunk_weights=random",
        )
    trunk.load_state_dict(pretrained_weights(name))


def _embedded(
    recipe: MlcdRecipe, images: Sequence[ImageRef], out: Path, options: MlcdOptions, fabric: Fabric
) -> Embeddings:
    folder = options.embeddings or out / "embeddings"
    # A folder of their own may serve other runs, and is not this one's to forget.
    anew = options.overwrite and options.embeddings is None

    def embed() -> None:
        _warn_of_tiny(recipe.teacher, images)
        embedder = teacher_embedder(recipe.teacher, options.device, options.threads)
        how = EmbedOptions(workers=options.run.workers, quiet=options.run.quiet, retry_failed=anew)
        try:
            found = embed_images(images, folder, embedder, how)
            if anew:
                hashes_of_sound_rows(found.features_ND, np.flatnonzero(found.done_N), found.paths)
        except (UsageError, DataError, ArtifactError) as error:
            # Other errors have nothing to do with what the folder holds.
            if not anew or "overwrite" not in error.fix:
                raise
            log.info("the images are embedded anew: %s", error.happened)
            embed_images(images, folder, embedder, replace(how, overwrite=True))

    with _mend_of_shared(options.embeddings):
        _first_alone(fabric, embed)
        return read_embeddings(folder)


def _warn_of_tiny(teacher: str, images: Sequence[ImageRef]) -> None:
    others = [ref.path for ref in images if not MADE_SCENE.fullmatch(os.path.basename(ref.path))]
    if teacher == "tiny" and others:
        log.warning(
            "the teacher tiny knows drawn scenes only, and %d images are none, such as %s: for photographs use "
            "--teacher open_clip:ViT-B-32/laion2b_s34b_b79k",
            len(others),
            others[0],
        )


@contextmanager
def _mend_of_shared(folder: Path | None) -> Iterator[None]:
    """Context in which an error that embedding anew would mend says how, of a folder that --overwrite leaves alone."""
    try:
        yield
    except ClipletError as error:
        if folder is not None and "overwrite" in error.fix:
            fix = f"remove {folder}, or name another --embeddings: --overwrite leaves it alone, as other runs may use it"
            raise type(error)(error.happened, error.expected, fix) from error
        raise


def _clustered(
    recipe: MlcdRecipe, embeddings: Embeddings, out: Path, options: MlcdOptions, fabric: Fabric
) -> Clusters:
    count = recipe.clusters_of(int(embeddings.done_N.sum()))
    settings = ClusterSettings(
        clusters=count,
        positives=recipe.loss_settings().used_positives,
        iterations=recipe.cluster_iterations,
        seed=recipe.seed,
        sample_per_cluster=recipe.sample_per_cluster,
    )
    folder = out / "clusters"
    provenance = {"embeddings": dict(embeddings.provenance), "settings": settings.to_json()}

    def divide() -> None:
        if read_clusters(folder, provenance) is not None:
            return
        with _mend_of_shared(options.embeddings):
            found = cluster(
                embeddings.features_ND,
                embeddings.done_N,
                settings,
                options.run.quiet,
                paths=embeddings.paths,
                kept=folder,
            )
        write_clusters(folder, found, provenance)

    _first_alone(fabric, divide)
    clusters = read_clusters(folder, provenance)
    assert clusters is not None
    return clusters


def _first_alone(fabric: Fabric, work: Callable[[], None]) -> None:
    """Let the first process work while the others wait; if it dies, so do they."""
    if fabric.world_size == 1:
        work()
        return
    # Of its own, since operations of the training's group give up after minutes.
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    if fabric.is_global_zero:
        work()
    torch.distributed.barrier(group)


def _train(
    recipe: MlcdRecipe,
    learner: Learner,
    config: TrunkConfig,
    collection: _Collection,
    out: Path,
    options: MlcdOptions,
    fabric: Fabric,
) -> dict[str, Any]:
    embeddings, clusters = collection.embeddings, collection.clusters
    done = np.flatnonzero(embeddings.done_N)
    kept = [collection.images[i] for i in done.tolist()]
    loss, count = recipe.loss_settings(), len(clusters.centres_KD)
    centres = ClassCentres(count, config.width, loss, recipe.seed)
    labels_NL = clusters.nearest_NL[done]
    learning = TrunkLearning(
        recipe, fabric, learner, centres, kept, labels_NL, out / "checkpoint", options.run
    )
    learning.resume()
    precision = read_back_precision(learning)
    learn(learning)
    each = -(-recipe.batch // fabric.world_size)
    memory = memory_per_rank(
        count, config.width, each, loss.used_positives, fabric.world_size, loss.negative_rate
    )
    unreadable = {e.path: f"{e.stage}: {e.reason}" for e in embeddings.failed}
    if fabric.is_global_zero:
        details = {"recipe": recipe.to_json(), "images": len(kept), "made_with": library_versions()}
        save_trunk(out / "trunk", learner.trunk, config, details)
        told = {"count": count, "reseeded": clusters.reseeded, **clusters.stats}
        if options.truth_NC is not None:
            told["quality"] = cluster_quality(clusters.nearest_NL, options.truth_NC, count)
        report = {
            "recipe": recipe.to_json(),
            "embeddings": dict(embeddings.provenance),
            "images": {"learned": len(kept), "unreadable": unreadable},
            "clusters": told,
            "skipped": learning.progress.skipped,
            "precision": precision,
            "device": str(fabric.device),
            "processes": fabric.world_size,
            "centres_bytes_per_process": memory,
            "history": learning.progress.history,
            "trunk": {"sha256": trunk_details(out / "trunk")["sha256"], "width": config.width},
            "versions": library_versions(),
        }
        write_atomically(out / "report.json", json.dumps(report, indent=2).encode())
    fabric.barrier()
    return json.loads((out / "report.json").read_text(encoding="utf-8"))
