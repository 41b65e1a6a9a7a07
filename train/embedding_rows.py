"""Rows of an embedding file looked at in stretches: whether they are sound, which are the same, a sample in memory.

Legend: N rows of the file, D width, n rows of those that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cliplet.errors import DataError, EnvironmentError_
from cliplet.machine import memory_bytes

STRETCH = 16_384  # rows that are converted to float32 at once
# How far a row's length may be from 1: half precision moves it by less than 0.0005.
LENGTH_TOLERANCE = 1e-2
NAMED = 3  # rows of each kind of trouble


def stretches(indices_n: np.ndarray) -> Iterator[np.ndarray]:
    """Pieces of `indices_n` that are small enough to be converted at once."""
    for start in range(0, len(indices_n), STRETCH):
        yield indices_n[start : start + STRETCH]


def hashes_of_sound_rows(
    features_ND: np.ndarray, indices_n: np.ndarray, paths: Sequence[str] | None = None
) -> np.ndarray:
    """A hash uint64 [n] of each of the rows, equal for rows that are equal bit by bit.

    Two of 10 million different rows collide with a probability of 3 in a million.

    Args:
        paths: of all N, for the error's message.

    Raises:
        DataError: rows that are not finite, of length 0 or of another length than 1.
    """
    bad: dict[str, list[int]] = {"not finite": [], "of length 0": [], "of another length than 1": []}
    hashes = []
    hashed = _row_hash(features_ND)
    for indices in stretches(indices_n):
        rows_nD = np.ascontiguousarray(features_ND[indices])
        hashes.append(hashed(rows_nD))
        length_n = np.linalg.norm(rows_nD.astype(np.float32), axis=1)
        finite_n = np.isfinite(length_n)
        wrong = {
            "not finite": ~finite_n,
            "of length 0": length_n == 0,
            "of another length than 1": finite_n & (length_n > 0) & (abs(length_n - 1) > LENGTH_TOLERANCE),
        }
        for kind, which in wrong.items():
            bad[kind] += indices[which].tolist()
    if any(bad.values()):
        told = [_told(kind, rows, paths) for kind, rows in bad.items() if rows]
        raise DataError("; ".join(told), "finite rows of length 1", "embed the images anew with --overwrite")
    return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)


def in_memory(features_ND: np.ndarray, indices_n: np.ndarray, mend: str = "") -> np.ndarray:
    """Those rows as float32 [n, D].

    Raises:
        EnvironmentError_: they do not fit into memory; `mend` says what makes them fewer.
    """
    needed = 4 * len(indices_n) * features_ND.shape[1]
    known = memory_bytes()
    if known is not None:
        room = min(known[1], known[2] or known[1])
        if needed > room:
            raise EnvironmentError_(
                f"{len(indices_n)} embeddings take {needed / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free",
                "memory for a sample of the embeddings",
                mend,
            )
    rows_nD = np.empty((len(indices_n), features_ND.shape[1]), np.float32)
    for start, indices in zip(range(0, len(indices_n), STRETCH), stretches(indices_n), strict=True):
        rows_nD[start : start + len(indices)] = features_ND[indices]
    return rows_nD


def _row_hash(features_ND: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Multilinear hashing: a row's 16-bit words times random odd numbers, summed modulo 2^64."""
    words = features_ND.shape[1] * features_ND.dtype.itemsize // 2
    factors = np.random.default_rng(0).integers(0, 2**64, words, np.uint64) | np.uint64(1)

    def hashed(rows_nD: np.ndarray) -> np.ndarray:
        found: np.ndarray = rows_nD.view(np.uint16).astype(np.uint64) @ factors
        return found

    return hashed


def _told(kind: str, rows: Sequence[int], paths: Sequence[str] | None) -> str:
    names = [paths[row] if paths is not None else f"row {row}" for row in rows[:NAMED]]
    more = ", …" if len(rows) > NAMED else ""
    return f"{len(rows)} embedding{'s' if len(rows) != 1 else ''} {kind}: {', '.join(names)}{more}"
