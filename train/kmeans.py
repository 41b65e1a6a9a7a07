"""K-means by faiss, an iteration at a time, so that a kill costs one; and the nearest centres of many rows.

faiss re-seeds an empty cluster by splitting a large one, and says how often. Up to some number of centres they are
compared with every row; beyond it, an inverted index over the centres looks at the most promising cells only, and
how often that finds the true nearest is measured.

Faiss and torch bring an OpenMP each; in one process both were found to work, in either order of import. Faiss is
imported where it is used, so that nothing else waits for it.

Legend: N rows, K centres, D width, L nearest, n rows of a search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from cliplet.machine import usable_cores

# Rows of the sample on which an inverted index is measured; brute force over them is quick even for many centres.
RECALL_ROWS = 256
RECALL_WANTED = 0.95
# Cells of an inverted index that are looked at during training.
TRAINING_PROBES = 32


@dataclass(frozen=True)
class Iteration:
    """One iteration.

    Attributes:
        objective: before centres moved: mean cosine to the own centre, or mean squared distance if not spherical.
        reseeded: clusters that were empty.
        seconds, search_seconds: of it all, and of finding the nearest centres.
    """

    objective: float
    reseeded: int
    seconds: float
    search_seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class KMeans:
    """What an iteration works on.

    Attributes:
        clusters: K.
        seed: of the first centres, which are rows drawn at random.
        spherical: centres are scaled to length 1 and compared by cosine; otherwise by distance.
        exact_up_to: centres from which on an inverted index replaces brute force.
    """

    clusters: int
    seed: int
    spherical: bool
    exact_up_to: int

    def iterate(self, rows_ND: np.ndarray, centres_KD: np.ndarray | None) -> tuple[np.ndarray, Iteration]:
        """The next centres float32 [K, D] of rows float32 [N, D], N >= K; the first ones without centres."""
        import faiss

        faiss.omp_set_num_threads(usable_cores())
        count, width = rows_ND.shape
        began = perf_counter()
        clustering = faiss.Clustering(width, self.clusters)
        clustering.niter, clustering.seed, clustering.spherical = 1, self.seed, self.spherical
        clustering.min_points_per_centroid = 1
        # The rows are a sample already.
        clustering.max_points_per_centroid = count // self.clusters + 1
        clustering.check_input_data_for_NaNs = False
        if centres_KD is not None:
            faiss.copy_array_to_vector(np.ravel(centres_KD), clustering.centroids)
        clustering.train(rows_ND, self._empty_index(width))
        stats: Any = clustering.iteration_stats
        told = stats.at(0)
        found = faiss.vector_to_array(clustering.centroids).reshape(self.clusters, width)
        # As many rows as centres are centres themselves, and faiss does not look any further.
        objective = float(self.spherical) if count == self.clusters else told.obj / count
        seconds = perf_counter() - began
        return found, Iteration(objective, int(told.nsplit), seconds, told.time_search)

    def _empty_index(self, width: int) -> Any:
        import faiss

        metric = faiss.METRIC_INNER_PRODUCT if self.spherical else faiss.METRIC_L2
        if self.clusters <= self.exact_up_to:
            return faiss.IndexFlat(width, metric)
        return _inverted(self.clusters, width, metric)


class NearestCentres:
    """The L nearest centres of rows by cosine.

    Args:
        centres_KD: float32 [K, D], unit rows.
        exact_up_to: as of `KMeans`.

    Attributes:
        recall: share of the true L nearest that it finds, measured on a sample by `tune`; 1 for brute force.
        probes, cells: of the inverted index; 0 for brute force.
    """

    def __init__(self, centres_KD: np.ndarray, exact_up_to: int) -> None:
        import faiss

        faiss.omp_set_num_threads(usable_cores())
        self._centres_KD = np.ascontiguousarray(centres_KD, np.float32)
        clusters, width = self._centres_KD.shape
        self.recall, self.probes, self.cells = 1.0, 0, 0
        if clusters <= exact_up_to:
            self._index: Any = faiss.IndexFlatIP(width)
        else:
            self._index = _inverted(clusters, width, faiss.METRIC_INNER_PRODUCT)
            self._index.train(self._centres_KD)
            self.probes, self.cells = self._index.nprobe, self._index.nlist
        self._index.add(self._centres_KD)

    def measure(self, sample_nD: np.ndarray, nearest: int) -> float:
        """Share of the true L nearest of a sample float32 [n, D] that are found."""
        _, true_nL = self._by_brute_force(sample_nD, nearest)
        _, found_nL = self._index.search(sample_nD, nearest)
        return float((found_nL[:, :, None] == true_nL[:, None, :]).any(axis=2).mean())

    def tune(self, sample_nD: np.ndarray, nearest: int) -> None:
        """Let the index look at more cells until it finds `RECALL_WANTED` of the L nearest of a sample."""
        while self.cells:
            self.recall = self.measure(sample_nD, nearest)
            if self.recall >= RECALL_WANTED or self.probes >= self.cells:
                return
            self.probes = self._index.nprobe = min(2 * self.probes, self.cells)

    def search(self, rows_nD: np.ndarray, nearest: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines float32 [n, L] and centres int64 [n, L], nearest first, of rows float32 [n, D]."""
        similarity_nL, nearest_nL = self._index.search(rows_nD, nearest)
        # Cells that were looked at may hold fewer centres than are wanted.
        short = np.flatnonzero((nearest_nL < 0).any(axis=1))
        if len(short):
            similarity_nL[short], nearest_nL[short] = self._by_brute_force(rows_nD[short], nearest)
        return similarity_nL, nearest_nL

    def _by_brute_force(self, rows_nD: np.ndarray, nearest: int) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        metric = faiss.METRIC_INNER_PRODUCT
        found: tuple[np.ndarray, np.ndarray] = faiss.knn(rows_nD, self._centres_KD, nearest, metric=metric)
        return found


def train_kmeans(
    settings: KMeans,
    rows_ND: np.ndarray,
    iterations: int,
    begun: tuple[np.ndarray | None, list[Iteration]],
    after: Callable[[np.ndarray, list[Iteration]], None],
) -> tuple[np.ndarray, list[Iteration]]:
    """Centres float32 [K, D] and what each iteration was like.

    Args:
        begun: centres and iterations of a run that is continued.
        after: is called after each iteration.
    """
    centres_KD, done = begun[0], list(begun[1])
    while len(done) < iterations or centres_KD is None:
        centres_KD, told = settings.iterate(rows_ND, centres_KD)
        done.append(told)
        after(centres_KD, done)
    return centres_KD, done


def _inverted(clusters: int, width: int, metric: int) -> Any:
    """An untrained inverted index with a number of cells at which both of its steps cost about the same."""
    import faiss

    flat = faiss.IndexFlat(width, metric)
    cells = max(1, round(4 * clusters**0.5))
    index = faiss.IndexIVFFlat(flat, width, min(cells, clusters), metric)
    index.cp.min_points_per_centroid = 1
    index.cp.spherical = metric == faiss.METRIC_INNER_PRODUCT
    index.nprobe = min(TRAINING_PROBES, index.nlist)
    return index
