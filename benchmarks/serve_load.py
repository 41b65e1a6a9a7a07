"""Load on a served model from one process: closed loop (N clients, each waits for its answer) or open loop (a rate).

    python -m benchmarks.serve_load triton://127.0.0.1:8001/NAME --images FOLDER --clients 4 --seconds 8

Prints one JSON object: the latency of every request that was answered inside the measured window, what failed, and
what Triton's own statistics say of the same window.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from benchmarks.serve_calls import TRANSPORTS, Caller
from cliplet.errors import ClipletError

# Requests that an open loop may have under way; beyond them it does not wait but counts what it could not send.
MOST_IN_FLIGHT = 256
WARM_UP_SECONDS = 2.0


@dataclass
class Window:
    """What happened from `begin` to `end` (seconds of the monotonic clock); requests outside do not count."""

    begin: float
    end: float
    latencies_s: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def time(self, call: Callable[[int], None], number: int, due: float | None = None) -> None:
        """Make one call and note it; its latency begins when it was `due`, so that a late start is not forgiven."""
        began = monotonic() if due is None else due
        reason = None
        try:
            call(number)
        except ClipletError as error:
            reason = error.happened[:80]
        ended = monotonic()
        with self._lock:
            if not self.begin <= ended < self.end:
                return
            if reason is None:
                self.latencies_s.append(ended - began)
            else:
                self.failed[reason] += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.end - self.begin,
            "latencies_ms": [1e3 * value for value in self.latencies_s],
            "failed": dict(self.failed),
        }


def closed_loop(call: Callable[[int], None], clients: int, window: Window) -> None:
    """Every client asks again as soon as it has its answer."""

    def client(first: int) -> None:
        number = first
        while monotonic() < window.end:
            window.time(call, number)
            number += clients

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def open_loop(call: Callable[[int], None], rate: float, window: Window) -> None:
    """Requests arrive at `rate` a second, independently of each other (a Poisson process with a fixed seed)."""
    arrivals = _arrivals(rate)
    under_way = threading.Semaphore(MOST_IN_FLIGHT)

    def one(number: int, due: float) -> None:
        try:
            window.time(call, number, due)
        finally:
            under_way.release()

    due, number = monotonic(), 0
    with ThreadPoolExecutor(MOST_IN_FLIGHT) as pool:
        while (due := due + next(arrivals)) < window.end:
            sleep(max(0.0, due - monotonic()))
            if under_way.acquire(blocking=False):
                pool.submit(one, number, due)
            elif due >= window.begin:
                window.failed["not sent: too many under way"] += 1
            number += 1


def _arrivals(rate: float) -> Iterator[float]:
    chance = random.Random(2026)
    while True:
        yield chance.expovariate(rate)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="triton://HOST:PORT/NAME")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--transport", choices=TRANSPORTS, default="bytes")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args(argv)
    with Caller(options.model, options.transport, options.images) as caller:
        caller.call(0)
        begin = monotonic() + WARM_UP_SECONDS
        window = Window(begin, begin + options.seconds)
        before: list[dict[str, Any]] = []
        timer = threading.Timer(WARM_UP_SECONDS, lambda: before.append(caller.statistics()))
        timer.start()
        if options.rate:
            open_loop(caller.call, options.rate, window)
        else:
            closed_loop(caller.call, options.clients, window)
        timer.join()
        print(json.dumps({**window.to_json(), "server": caller.spent(before[0], caller.statistics())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
