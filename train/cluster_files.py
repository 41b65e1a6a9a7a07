"""Clusters of a collection and their files.

    FOLDER/clusters.json     provenance, what was measured
    FOLDER/centres.npy       float32 [K, D], unit rows
    FOLDER/nearest.npy       int32 [N, L], nearest first; -1 for images without an embedding
    FOLDER/similarity.npy    float32 [N, L], cosines to these
    FOLDER/sizes.npy         int64 [K], images to which the cluster is the nearest

clusters.json is written last and removed first: where it is, all is there. Until then the folder holds the centres of
a run that may be continued.

Legend: N images, D width of an embedding, K clusters, L positives of an image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cliplet.artifact import library_versions
from cliplet.errors import ArtifactError, DataError, UsageError, explained_os_errors
from cliplet.labels import write_atomically

SCHEMA = 1
DESCRIPTION = "clusters.json"
ARRAYS = ("centres_KD", "nearest_NL", "similarity_NL", "sizes_K")
PROGRESS = "kmeans"  # stem of what an unfinished run keeps
MEND = "cluster anew with --overwrite"


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of N images.

    Attributes:
        centres_KD: float32 [K, D], unit rows.
        nearest_NL: int32 [N, L], nearest first; -1 for images without an embedding.
        similarity_NL: float32 [N, L], cosines to these; 0 for images without an embedding.
        sizes_K: int64 [K], images to which the cluster is the nearest.
        reseeded: how often, in all iterations, a cluster was empty and was given half of a large one.
        stats: what was measured, ready for JSON:
            images, distinct, duplicates: images with an embedding; how many of these are bitwise different, and
                the rest.
            sample: images that k-means saw.
            iterations: of each, `cliplet.train.kmeans.Iteration`.
            resumed_after: iterations that an earlier run had made.
            similarity: mean cosine to the nearest centre, the second, and so on to the L-th.
            sizes: smallest, median and largest cluster; `empty`, those to which no image is nearest in the end.
            assignment: `exact`, or else the inverted index's `recall` of the true L nearest, measured on `rows`
                images against brute force; `training_recall` of the true nearest, as it is set in training.
            seconds: of k-means in this run, and of assigning all images.
    """

    centres_KD: np.ndarray
    nearest_NL: np.ndarray
    similarity_NL: np.ndarray
    sizes_K: np.ndarray
    reseeded: int
    stats: Mapping[str, Any]


def write_clusters(folder: Path, clusters: Clusters, provenance: Mapping[str, Any]) -> None:
    """Replace the clusters in `folder`, and what an unfinished run kept there.

    Args:
        provenance: what the clusters depend on, ready for JSON: that of the embeddings, and the settings.

    Raises:
        EnvironmentError_: the folder cannot be written.
    """
    with explained_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).unlink(missing_ok=True)
        for name in ARRAYS:
            _write_array(folder / _file_of(name), getattr(clusters, name))
    described = {
        "schema": SCHEMA,
        "provenance": dict(provenance),
        "reseeded": clusters.reseeded,
        "stats": dict(clusters.stats),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
    write_atomically(folder / DESCRIPTION, json.dumps(described, indent=2).encode())
    with explained_os_errors(folder):
        for file in folder.glob(f"{PROGRESS}*"):
            file.unlink()


def read_clusters(folder: Path, provenance: Mapping[str, Any] | None = None) -> Clusters | None:
    """The clusters that `write_clusters` finished, their arrays mapped; None if there are none yet.

    Args:
        provenance: as it was given to `write_clusters`; None takes any.

    Raises:
        UsageError: they were made from other embeddings or with other settings.
        DataError: a file is missing, cut off, or does not fit the others.
        ArtifactError: a version with another layout wrote them.
    """
    file = folder / DESCRIPTION
    if not file.exists():
        return None
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        if described["schema"] != SCHEMA:
            raise ArtifactError(f"{file} has schema {described['schema']}", f"schema {SCHEMA}", MEND)
        _refuse_other(folder, described["provenance"], provenance)
        arrays = {name: np.load(folder / _file_of(name), mmap_mode="r") for name in ARRAYS}
        found = Clusters(**arrays, reseeded=described["reseeded"], stats=described["stats"])
        if len(found.centres_KD) != len(found.sizes_K) or found.nearest_NL.shape != found.similarity_NL.shape:
            raise ValueError("its arrays are of different lengths")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the clusters in {folder}: {error}", "whole files", MEND) from error
    return found


def _refuse_other(folder: Path, then: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> None:
    if wanted is None:
        return
    now = json.loads(json.dumps(dict(wanted)))
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if changed:
        raise UsageError(
            f"{folder} holds other clusters, which differ in {', '.join(changed)}",
            "the same embeddings and settings",
            "choose another --out, or cluster anew with --overwrite",
        )


def _file_of(name: str) -> str:
    return f"{name.partition('_')[0]}.npy"


def _write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all; unlike `np.save`, with the reason if the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    array = np.ascontiguousarray(array)
    with open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
