"""Clusters of a collection's embeddings, and the L nearest of each image.

MLCD (An et al., ECCV 2024, section 3.1) clusters the embeddings of a CLIP once, with k-means, and takes the 8 nearest
of a million centres as an image's positives.

Legend: N images, D width of an embedding, K clusters, L positives of an image, n images of a stretch or sample.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import numpy as np

from cliplet.checkpoint import load_arrays, save_arrays
from cliplet.errors import ArtifactError, DataError, UsageError
from cliplet.progress import ProgressBar

from .cluster_files import PROGRESS
from .cluster_files import Clusters as Clusters
from .cluster_files import read_clusters as read_clusters
from .cluster_files import write_clusters as write_clusters
from .embedding_rows import hashes_of_sound_rows, in_memory, stretches
from .kmeans import RECALL_ROWS, Iteration, KMeans, NearestCentres, train_kmeans

log = logging.getLogger("cliplet")

# Below this many images a cluster tells one image from its neighbours, and little else.
FEW_IMAGES = 2


@dataclass(frozen=True)
class ClusterSettings:
    """How to cluster.

    Attributes:
        clusters: K.
        positives: L, the nearest centres that are kept of each image.
        iterations: of k-means.
        seed: of the sample and of the first centres.
        spherical: centres are means scaled to length 1, rows are assigned by cosine. Otherwise k-means goes by
            distance and centres are plain means; they are scaled at the end, and the L nearest found by cosine all
            the same. (The paper does not say which.)
        sample_per_cluster: K-means sees at most so many images for each cluster, drawn at random.
        exact_up_to: clusters from which on images are assigned through an inverted index instead of brute force.
    """

    clusters: int
    positives: int = 8
    iterations: int = 20
    seed: int = 0
    spherical: bool = True
    sample_per_cluster: int = 256
    exact_up_to: int = 20_000

    def __post_init__(self) -> None:
        least = {"clusters": 1, "positives": 1, "iterations": 1, "sample_per_cluster": 1, "exact_up_to": 0}
        low = [
            f"{name} {getattr(self, name)}" for name, value in least.items() if getattr(self, name) < value
        ]
        if low:
            raise UsageError(f"clustering with {', '.join(low)}", "1 or more of each")
        if self.positives > self.clusters:
            raise UsageError(
                f"{self.positives} positives an image of {self.clusters} clusters",
                "at most as many as clusters",
                f"--positives {self.clusters}",
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cluster(
    features_ND: np.ndarray,
    done_N: np.ndarray,
    settings: ClusterSettings,
    quiet: bool = False,
    *,
    paths: Sequence[str] | None = None,
    kept: Path | None = None,
    save_every_s: float = 60.0,
) -> Clusters:
    """Clusters of the images that are done.

    Args:
        features_ND: float16 or float32 [N, D], unit rows where done; may be mapped: they are read in chunks, but
            for the sample of k-means, which is held in memory.
        done_N: bool [N].
        paths: of the images, for error messages.
        kept: folder for the centres of unfinished runs, which the same call continues: the one that is later given
            to `write_clusters`.
        save_every_s: seconds between two times at which they are written.

    Raises:
        DataError: fewer images, or fewer distinct ones, than clusters; rows that are not finite or not of length 1.
        EnvironmentError_: not enough memory for the sample, or `kept` cannot be written.
    """
    done = np.flatnonzero(done_N)
    _refuse_few(len(done), settings.clusters, f"{len(done)} images with an embedding")
    hashes_n = hashes_of_sound_rows(features_ND, done, paths)
    distinct = len(np.unique(hashes_n))
    _refuse_few(distinct, settings.clusters, f"{distinct} different embeddings among {len(done)} images")
    if len(done) < FEW_IMAGES * settings.clusters:
        log.warning("%d clusters for %d images: most will hold a single one", settings.clusters, len(done))
    progress = _Progress(kept, _run_key(settings, hashes_n), save_every_s, settings.iterations, quiet)
    began = perf_counter()
    sample_n = _sampled(done, settings)
    centres_KD, iterations = _trained(settings, features_ND, sample_n, progress)
    trained = perf_counter()
    nearest_NL, similarity_NL, assignment = _assigned(features_ND, done, centres_KD, settings, quiet)
    sizes_K = np.bincount(nearest_NL[done, 0], minlength=settings.clusters)
    stats: dict[str, Any] = {
        "images": len(done),
        "distinct": distinct,
        "duplicates": len(done) - distinct,
        "sample": len(sample_n),
        "iterations": [told.to_json() for told in iterations],
        "resumed_after": progress.resumed_after,
        "similarity": [float(mean) for mean in similarity_NL[done].mean(axis=0, dtype=np.float64)],
        "sizes": _sizes(sizes_K),
        "assignment": assignment,
        "seconds": {"kmeans": trained - began, "assignment": perf_counter() - trained},
    }
    reseeded = sum(told.reseeded for told in iterations)
    return Clusters(centres_KD, nearest_NL, similarity_NL, sizes_K, reseeded, stats)


class _Progress:
    """The centres of an unfinished run, on disk now and then, and a bar.

    Attributes:
        resumed_after: iterations that were found there.
    """

    def __init__(self, folder: Path | None, key: str, every_s: float, iterations: int, quiet: bool) -> None:
        self._folder, self._key, self._every_s = folder, key, every_s
        self._iterations, self._quiet = iterations, quiet
        self._saved = monotonic()
        self.resumed_after = 0

    def begun(self) -> tuple[np.ndarray | None, list[Iteration]]:
        """Centres and iterations to go on from."""
        if self._folder is None or not (self._folder / f"{PROGRESS}.json").exists():
            return None, []
        try:
            arrays, details = load_arrays(self._folder, PROGRESS)
            if details["key"] != self._key:
                log.info("%s holds the beginning of other clusters, which is forgotten", self._folder)
                return None, []
            done = [Iteration(**told) for told in details["iterations"]]
            centres_KD = arrays["centres"]
        except (ArtifactError, KeyError, TypeError) as error:
            log.warning("clustering starts anew, since what was kept of it is damaged: %s", error)
            return None, []
        self.resumed_after = len(done)
        return centres_KD, done

    def bar(self) -> ProgressBar:
        return ProgressBar(
            "clustering", self._iterations, "iterations", done=self.resumed_after, quiet=self._quiet
        )

    def save(self, centres_KD: np.ndarray, done: list[Iteration]) -> None:
        """Keep them, unless it is too soon or they are the last."""
        if self._folder is None or len(done) >= self._iterations or monotonic() - self._saved < self._every_s:
            return
        told = {"key": self._key, "iterations": [iteration.to_json() for iteration in done]}
        save_arrays(self._folder, PROGRESS, {"centres": centres_KD}, told)
        self._saved = monotonic()


def _trained(
    settings: ClusterSettings, features_ND: np.ndarray, sample_n: np.ndarray, progress: _Progress
) -> tuple[np.ndarray, list[Iteration]]:
    """Centres float32 [K, D], unit rows, and what each iteration was like."""
    fewer = max(settings.sample_per_cluster // 2, 1)
    rows_nD = in_memory(features_ND, sample_n, f"set sample_per_cluster to {fewer} or less")
    kmeans = KMeans(settings.clusters, settings.seed, settings.spherical, settings.exact_up_to)
    begun = progress.begun()
    with progress.bar() as bar:

        def after(centres_KD: np.ndarray, done: list[Iteration]) -> None:
            progress.save(centres_KD, done)
            bar.advance(1)

        centres_KD, iterations = train_kmeans(kmeans, rows_nD, settings.iterations, begun, after)
    lengths_K1 = np.linalg.norm(centres_KD, axis=1, keepdims=True)
    return centres_KD / np.maximum(lengths_K1, np.finfo(np.float32).tiny), iterations


def _assigned(
    features_ND: np.ndarray, done: np.ndarray, centres_KD: np.ndarray, settings: ClusterSettings, quiet: bool
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Nearest int32 and cosines float32 [N, L] of all images, and how exact they are."""
    shape = (len(features_ND), settings.positives)
    nearest_NL, similarity_NL = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    index = NearestCentres(centres_KD, settings.exact_up_to)
    assignment: dict[str, Any] = {"exact": not index.cells}
    if index.cells:
        rows = in_memory(features_ND, done[:: max(1, len(done) // RECALL_ROWS)])
        assignment["training_recall"] = index.measure(rows, 1) if settings.spherical else None
        index.tune(rows, settings.positives)
        assignment |= {
            "recall": index.recall,
            "rows": len(rows),
            "probes": index.probes,
            "cells": index.cells,
        }
    with ProgressBar("nearest clusters", len(done), quiet=quiet) as bar:
        for indices in stretches(done):
            rows_nD = features_ND[indices].astype(np.float32)
            similarity_NL[indices], nearest_NL[indices] = index.search(rows_nD, settings.positives)
            bar.advance(len(indices))
    return nearest_NL, similarity_NL, assignment


def _sampled(done: np.ndarray, settings: ClusterSettings) -> np.ndarray:
    """The images that k-means sees, ascending."""
    most = settings.clusters * settings.sample_per_cluster
    if len(done) <= most:
        return done
    return np.sort(np.random.default_rng(settings.seed).choice(done, most, replace=False))


def _sizes(sizes_K: np.ndarray) -> dict[str, float]:
    return {
        "smallest": int(sizes_K.min()),
        "median": float(np.median(sizes_K)),
        "largest": int(sizes_K.max()),
        "empty": int((sizes_K == 0).sum()),
    }


def _run_key(settings: ClusterSettings, hashes_n: np.ndarray) -> str:
    """What tells a run of k-means from all others."""
    told = json.dumps(settings.to_json(), sort_keys=True).encode()
    return hashlib.sha256(told + hashes_n.tobytes()).hexdigest()


def _refuse_few(found: int, clusters: int, told: str) -> None:
    if found < clusters:
        raise DataError(
            f"{told}, for {clusters} clusters",
            "at least as many as clusters, better twenty times as many",
            f"--clusters {found}, the most that fit" if found else "images that can be embedded",
        )
