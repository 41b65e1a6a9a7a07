"""Work in several processes, in order, with the same results for any number of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def mapped(make: Callable[[int], T], starts: range, workers: int) -> Iterator[T]:
    """`make` of every start, in order; in this process if there is one worker or one start."""
    if workers <= 1 or len(starts) == 1:
        yield from map(make, starts)
        return
    # Spawned, not forked: the parent may hold the threads of a numerical library.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(make, starts)
