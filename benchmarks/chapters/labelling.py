"""The chapter about `cliplet label` as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.chapters.telling import marks_of, spread_of, verdict
from benchmarks.labelling import STREAMS

PHASES = ("read", "decode", "canvas", "engine", "record+write")
MEANT = {
    "share_of_engine": "of the engine's own speed",
    "share_of_ideal": "of all cores busy with nothing but the phases",
}


def chapter(record: dict[str, Any]) -> str:
    """For each model: the phases alone, and `label` with one batch at a time in the engine and with two."""
    lines = [
        "Phases are milliseconds an image, alone: reading to writing on one thread, the engine on all. `of ideal` is "
        "`label` against cores ÷ (core-seconds of all phases), `of engine` against the engine alone on decoded "
        "images.\n"
    ]
    before = record.get("before", {})
    for name, model in record["rows"].items():
        first = next(iter(model["rows"].values()))
        rows = dict(model["rows"])
        if name in before:
            rows[f"before, at `{before[name]['commit']}`"] = before[name]
        lines += [
            f"**{name}**, {first['engine']}, batch {first['batch']}, {_views(first['views_per_image'])} an image\n",
            f"| `label` with | images/s | spread | of ideal | of engine | peak memory | {' | '.join(PHASES)} |",
            "|---|---|---|---|---|---|" + "---|" * len(PHASES),
            *(_row(kind, row) for kind, row in rows.items()),
            "",
            *marks_of(rows),
        ]
    return "\n".join([*lines, " ".join(_reading(record))])


def _views(count: int) -> str:
    return "1 view" if count == 1 else f"{count} views"


def _row(kind: str, row: dict[str, Any]) -> str:
    rate = row["images_per_s"]
    phases = (f"{row['phases_ms_per_image'][name]['median']:.2f}" for name in PHASES)
    return (
        f"| {kind} | {rate['median']:.1f} | {spread_of(rate, '{:.1f}'.format)} | "
        f"**{row['share_of_ideal']['median']:.0%}** | **{row['share_of_engine']['median']:.0%}** | "
        f"{row['peak_mb']['median']:.0f} MB | {' | '.join(phases)} |"
    )


def _reading(record: dict[str, Any]) -> Iterator[str]:
    for name, model in record["rows"].items():
        now, two = (model["rows"][how] for how in STREAMS.values())
        share, aim = now[model["aimed_at"]], record["aim"]
        gain = two["ratio_to_first"]["median"]
        phases = {phase: now["phases_ms_per_image"][phase]["median"] for phase in PHASES if phase != "engine"}
        slowest = max(phases, key=lambda phase: phases[phase])
        yield (
            f"{name}: labelling reaches {share['median']:.0%} {MEANT[model['aimed_at']]} "
            f"(aim {aim:.0%}: {verdict(share, aim, '{:.0%}'.format)}); "
            f"two batches at a time label {gain:.2f} times as fast. Beside the engine, the most costly phase is {slowest} "
            f"with {phases[slowest]:.2f} ms an image."
        )
        if old := record.get("before", {}).get(name):
            times = now["images_per_s"]["median"] / old["images_per_s"]["median"]
            yield (
                f"It labels {times:.2f} times as many images a second as at `{old['commit']}`, measured in a run of its "
                "own."
            )
