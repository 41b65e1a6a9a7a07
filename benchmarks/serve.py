"""How fast a served bundle answers, against the same bundle in this process, in one run.

    make bench
    python -m benchmarks.serve --photos FOLDER --photos-are "128 photographs" --full

The baseline decodes in threads and scores full batches, as `cliplet label` does without a server. Rows take turns, so
that a drift of the machine meets all; clients are one process beside the server and share its cores. Large encoders
have random weights, which change no time. Where perf_analyzer is installed, it measures the closed loop once more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import perf_analyzer
from benchmarks.engines import bundle_of
from benchmarks.perf_analyzer import PERCENTILES
from benchmarks.photos import add_photo_options, photos_of
from benchmarks.records import spread, write_record
from cliplet.errors import ClipletError
from cliplet.images import Picture, decode_image
from cliplet.machine import usable_cores
from cliplet.plan import TaggerSettings, make_plan
from cliplet.tagger import load_plan

# Model, runtime and precision: a teacher of ten views an image, and a student that is faster than its transport.
MODELS = {"ViT-B-32": ("openvino", "bf16"), "student": ("openvino", "int8")}
CLIENTS = (1, 2, 4, 8, 16)
# Clients of the rows that compare ways to send an image.
SOME_CLIENTS = 8
# Rounds, seconds of a measurement, and rates of the open loop as shares of the best that the closed loop reached. The
# short run takes about four minutes on two cores, the full one a quarter of an hour.
SHORT: dict[str, Any] = {"rounds": 1, "seconds": 3.0, "shares": (0.5, 0.8, 1.0)}
FULL: dict[str, Any] = {"rounds": 3, "seconds": 5.0, "shares": (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1)}
IN_PROCESS = "in this process"
UNBATCHED = "bytes, 16 clients, no batching"
THEIRS = "perf_analyzer"
SERVED = "bench"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with photos_of(options):
        found = {name: compare(name, options) for name in options.models.split(",")}
    record = write_record(
        "serve",
        {
            "what": "images a second and latencies of served bundles, against the same bundle in one process",
            "model": ", ".join(f"{name} ({'-'.join(MODELS[name])})" for name in found),
            "images": options.photos_are,
            "rounds": options.rounds,
            "seconds": options.seconds,
            "perf_analyzer": options.perf_analyzer_is,
            "rows": found,
        },
    )
    plot(found, record.with_suffix(".svg"))
    print(f"wrote {record}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """What to measure; `perf_analyzer` is the program to call or None, `perf_analyzer_is` what the record says of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_photo_options(parser)
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument(
        "--full", action="store_true", help=f"as if with {_told(FULL)}; without it {_told(SHORT)}"
    )
    parser.add_argument("--rounds", type=int, help="in which all rows take turns")
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument(
        "--shares",
        type=_shares,
        help="rates of the open loop against the best of the closed one, such as 0.5,1",
    )
    parser.add_argument(
        "--perf-analyzer",
        metavar="PROGRAM",
        help="where it is (default: on the PATH; if not there, without it)",
    )
    options = parser.parse_args(argv)
    for name, value in (FULL if options.full else SHORT).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    asked = options.perf_analyzer
    options.perf_analyzer, options.perf_analyzer_is = perf_analyzer.find(asked)
    if asked and options.perf_analyzer is None:
        parser.error(f"--perf-analyzer {asked}: {options.perf_analyzer_is}")
    print(f"perf_analyzer: {options.perf_analyzer_is}", flush=True)
    return options


def _told(settings: dict[str, Any]) -> str:
    return f"--rounds {settings['rounds']} --seconds {settings['seconds']:g} --shares {','.join(map(str, settings['shares']))}"


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(share) for share in text.split(",") if share)


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Let all rows of one model take turns; the table of it, ratios against the same round's baseline."""
    bundle = bundle_of(name, options.photos, (MODELS[name],)).folder
    rows = _closed_rows(options)
    closed: dict[str, list[dict[str, Any]]] = {row: [] for row in (*rows, UNBATCHED)}
    opened: dict[float, list[dict[str, Any]]] = {share: [] for share in options.shares}
    baseline: list[float] = []
    lost: dict[str, str] = {}
    for number in range(options.rounds):
        baseline.append(in_process(name, bundle, options))
        print(f"{name}, {IN_PROCESS}: {baseline[-1]:.1f} images/s", flush=True)
        with serving(name, bundle) as url:
            for row in rows if number % 2 == 0 else reversed(rows):
                try:
                    closed[row].append(rows[row](url))
                except ClipletError as error:
                    lost[row] = error.happened
                    print(f"{name}, {row}: {error.happened}", flush=True)
                else:
                    print(f"{name}, {row}: {closed[row][-1]['images_per_s']:.1f} images/s", flush=True)
            best = max(closed[bytes_row(n)][number]["images_per_s"] for n in CLIENTS)
            for share, runs in opened.items():
                runs.append(loaded(url, options, "--rate", f"{share * best:.3f}"))
        with serving(name, bundle, max_batch_size=1) as url:
            closed[UNBATCHED].append(loaded(url, options, "--clients", "16"))
    return {
        "bundle": "-".join(MODELS[name]),
        IN_PROCESS: {"images_per_s": spread(baseline)},
        # A row that was lost in one round has no turn in it to be compared with.
        "closed": {row: _row(runs, baseline) for row, runs in closed.items() if row not in lost},
        "open": [{"share": share, **_row(runs, baseline)} for share, runs in opened.items()],
        **({"lost": lost} if lost else {}),
    }


def bytes_row(clients: int) -> str:
    """The name of the row of encoded files."""
    return f"bytes, {clients} clients"


def _closed_rows(options: argparse.Namespace) -> dict[str, Callable[[str], dict[str, Any]]]:
    """How each row of the closed loop is measured at a server's address."""

    def own(transport: str, clients: int) -> Callable[[str], dict[str, Any]]:
        return lambda url: loaded(url, options, "--transport", transport, "--clients", str(clients))

    def theirs(clients: int, shared: bool = False) -> Callable[[str], dict[str, Any]]:
        return lambda url: perf_analyzer.measure(
            options.perf_analyzer,
            perf_analyzer.Load(url, options.photos, clients, options.seconds, shared),
        )

    rows = {bytes_row(n): own("bytes", n) for n in CLIENTS}
    rows |= {f"{way}, {SOME_CLIENTS} clients": own(way, SOME_CLIENTS) for way in ("tensors", "shared memory")}
    if options.perf_analyzer is not None:
        rows |= {f"{THEIRS}, {bytes_row(n)}": theirs(n) for n in CLIENTS}
        rows[f"{THEIRS}, {bytes_row(SOME_CLIENTS)}, shared memory"] = theirs(SOME_CLIENTS, shared=True)
    return rows


def in_process(name: str, bundle: Path, options: argparse.Namespace) -> float:
    """Images a second of decoding in threads beside scoring in full batches."""
    runtime, precision = MODELS[name]
    plan = make_plan(TaggerSettings(model=str(bundle), runtime=runtime, precision=precision))
    paths = sorted(p for p in options.photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    encoded = [path.read_bytes() for path in paths[:64]]
    size = plan.images_per_batch
    with load_plan(plan) as tagger, ThreadPoolExecutor(usable_cores()) as pool:
        waiting: deque[list[Future[Picture]]] = deque()

        def ask(turn: int) -> None:
            chosen = [encoded[(turn * size + n) % len(encoded)] for n in range(size)]
            waiting.append([pool.submit(decode_image, data, **tagger.room) for data in chosen])

        for turn in range(2):
            ask(turn)
        # The first batch of each canvas is the slowest; two seconds see most of them.
        turn, done, began, counts = 2, 0, perf_counter(), False
        while not counts or perf_counter() - began < options.seconds:
            ask(turn)
            tagger.score([future.result() for future in waiting.popleft()])
            turn, done = turn + 1, done + size
            if not counts and perf_counter() - began > 2.0:
                counts, done, began = True, 0, perf_counter()
        return done / (perf_counter() - began)


@contextmanager
def serving(name: str, bundle: Path, **settings: Any) -> Iterator[str]:
    """Context in which a bundle is served on this machine; its address."""
    from cliplet.deploy.repository import ServeSettings, plan_served, write_repository
    from cliplet.deploy.server import TritonServer
    from cliplet.deploy.server_options import Ports, ServerOptions

    runtime, precision = MODELS[name]
    chosen = ServeSettings(runtime=runtime, precision=precision, **settings)
    with tempfile.TemporaryDirectory() as folder:
        served, _ = plan_served([(SERVED, bundle)], chosen)
        repository = write_repository(served, Path(folder) / "repository", chosen)
        with TritonServer(repository, ServerOptions(ports=Ports(http=0, grpc=0, metrics=0))) as server:
            server.wait_ready()
            yield f"triton://127.0.0.1:{server.ports.grpc}/{SERVED}"


def loaded(url: str, options: argparse.Namespace, *how: str) -> dict[str, Any]:
    """What a load generator in a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.serve_load", url, "--images", str(options.photos)]
    command += ["--seconds", str(options.seconds), *how]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    latencies = found.pop("latencies_ms")
    return {
        **found,
        "answered": len(latencies),
        "images_per_s": len(latencies) / found["seconds"],
        **{f"p{p}_ms": float(np.percentile(latencies, p)) if latencies else None for p in PERCENTILES},
    }


def _row(runs: Sequence[dict[str, Any]], baseline: Sequence[float]) -> dict[str, Any]:
    ratios = [run["images_per_s"] / own for run, own in zip(runs, baseline, strict=True)]
    found = {
        "images_per_s": spread([run["images_per_s"] for run in runs]),
        "ratio_to_in_process": spread(ratios),
        "failed": sum(sum(run["failed"].values()) for run in runs),
        "server": [run["server"] for run in runs],
    }
    for p in PERCENTILES:
        values = [run[f"p{p}_ms"] for run in runs if run[f"p{p}_ms"] is not None]
        found[f"p{p}_ms"] = spread(values) if values else None
    return found


def plot(found: dict[str, Any], file: Path) -> None:
    """Latency against throughput, relative to the best of the closed loop: one curve each for p50 and p99."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "cliplet"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(5.2 * len(found), 3.8), squeeze=False)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        best = rows[IN_PROCESS]["images_per_s"]["median"]
        closed = [rows["closed"][bytes_row(n)] for n in CLIENTS]
        theirs = [row for n in CLIENTS if (row := rows["closed"].get(f"{THEIRS}, {bytes_row(n)}"))]
        kinds = (("closed loop", closed, "o-"), ("open loop", rows["open"], "s--"), (THEIRS, theirs, "^:"))
        for (how, runs, style), (p, colour) in product(kinds, ((50, "tab:blue"), (99, "tab:red"))):
            points = [
                (row["images_per_s"]["median"] / best, row[f"p{p}_ms"]["median"])
                for row in runs
                if row[f"p{p}_ms"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=f"p{p}, {how}", markersize=4)
        axis.set(title=f"{name}, {rows['bundle']}", yscale="log", xlabel="throughput / in this process")
        axis.set_ylabel("latency, ms")
        axis.axvline(1.0, color="grey", linewidth=0.8)
        axis.grid(True, which="both", linewidth=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
