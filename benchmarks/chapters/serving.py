"""The chapter about serving."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chapters.telling import in_brackets, spread_of, verdict
from benchmarks.serve import CLIENTS, IN_PROCESS, SOME_CLIENTS, THEIRS, UNBATCHED, bytes_row

# Images a second of encoded files, against the same bundle in process: of a teacher, and of a small student.
AIMS = {"ViT-B-32": 0.90, "student": 0.70}


def chapter(record: dict[str, Any]) -> str:
    """Throughput and latencies of every way to ask a server, and what is lost on the way to it."""
    lines = [
        "Clients, server and engine share the machine's cores. Batch, queue and compute are Triton's own statistics, of "
        "the model that was asked; latencies are those that clients saw.\n",
        f"![latency against throughput](results/{Path(record['file']).with_suffix('.svg').name})\n",
    ]
    if "perf_analyzer" in record:
        lines.append(f"perf_analyzer, Triton's own load generator: {record['perf_analyzer']}.\n")
    for name, model in record["rows"].items():
        alone = model[IN_PROCESS]["images_per_s"]
        lines += [
            f"**{name}**, {model['bundle']}; in this process {alone['median']:.1f} images/s"
            f"{in_brackets(alone, '{:.1f}'.format)}\n",
            "| | images/s | ratio | spread | p50 | p90 | p95 | p99 | batch | queue | compute | failed |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(_row(row, found) for row, found in model["closed"].items()),
            *(_row(f"open loop, {found['share']:.0%} of the best", found) for found in model["open"]),
            "",
            *(f"Not measured: {row}: {why}\n" for row, why in model.get("lost", {}).items()),
        ]
    return "\n".join([*lines, "\n\n".join(_reading(n, model) for n, model in record["rows"].items())])


def _row(name: str, found: dict[str, Any]) -> str:
    rate, ratio = found["images_per_s"], found["ratio_to_in_process"]
    shown = [found[f"p{p}_ms"] for p in (50, 90, 95, 99)]
    latencies = " | ".join(f"{value['median']:.0f} ms" if value else "" for value in shown)
    # Of every round: the tagger's statistics where it was asked, else the graph's.
    asked = [
        max(run.values(), key=lambda model: model["queue_ms"] + model["compute_ms"])
        for run in found["server"]
    ]
    batch, queue, compute = (
        median(model[key] for model in asked) for key in ("images_per_batch", "queue_ms", "compute_ms")
    )
    return (
        f"| {name.replace(' 1 clients', ' 1 client')} | {rate['median']:.1f} | **{ratio['median']:.2f}** | "
        f"{spread_of(ratio, '{:.2f}'.format)} | {latencies} | {batch:.1f} | {queue:.0f} ms | {compute:.0f} ms | "
        f"{found['failed']} |"
    )


def _reading(name: str, model: dict[str, Any]) -> str:
    rows = model["closed"]
    ratios = {n: rows[bytes_row(n)]["ratio_to_in_process"] for n in CLIENTS}
    best = max(ratios, key=lambda n: ratios[n]["median"])
    said = [
        f"{name}: encoded files reach at best {ratios[best]['median']:.2f} of the rate in process, with "
        f"{_clients(best)}{_aimed(name, ratios[best])}; one client alone, for whom nothing is decoded ahead or "
        f"batched, {ratios[1]['median']:.2f}.",
        _ways(rows),
        _batching(rows),
        *_theirs(rows),
    ]
    return " ".join(said)


def _clients(count: int) -> str:
    return "one client" if count == 1 else f"{count} clients"


def _aimed(name: str, ratio: dict[str, Any]) -> str:
    if name not in AIMS:
        return ""
    aim = AIMS[name]
    return f" (aim {aim:.2f}: {verdict(ratio, aim, '{:.2f}'.format)})"


def _ways(rows: dict[str, Any]) -> str:
    tensors, shared = (
        _times(rows[f"{way}, {SOME_CLIENTS} clients"], rows[bytes_row(SOME_CLIENTS)])
        for way in ("tensors", "shared memory")
    )
    if len(tensors) < 2:
        meaning = "one round cannot tell that from chance"
    elif min(tensors) > 1:
        meaning = "decoding in the server costs the difference"
    else:
        meaning = "what decoding in the server costs is lost in the spread"
    return (
        f"With {_clients(SOME_CLIENTS)}, raw tensors bring {_told(tensors)} times the images of encoded files, and "
        f"tensors in shared memory {_told(shared)} times: {meaning}."
    )


def _times(row: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """How many times the images of another row, in each round."""
    pairs = zip(row["images_per_s"]["all"], other["images_per_s"]["all"], strict=True)
    return [one / beside if beside else inf for one, beside in pairs]


def _told(ratios: list[float]) -> str:
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{median(ratios):.2f}{spread}"


def _batching(rows: dict[str, Any]) -> str:
    most = CLIENTS[-1]
    batched = rows[bytes_row(most)]["ratio_to_in_process"]["median"]
    single = rows[UNBATCHED]["ratio_to_in_process"]["median"]
    return f"Without dynamic batching {_clients(most)} get {single:.2f} in place of {batched:.2f}."


def _theirs(rows: dict[str, Any]) -> Iterator[str]:
    pairs = [(rows[bytes_row(n)], rows.get(f"{THEIRS}, {bytes_row(n)}")) for n in CLIENTS]
    ratios = [median(_times(other, own)) for own, other in pairs if other]
    if ratios:
        yield (
            f"perf_analyzer counts {min(ratios):.2f} to {max(ratios):.2f} times the images of our own clients, at the "
            "same numbers of them."
        )
