"""The chapter about how cost grows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.chapters.telling import spread_of

# How far a slope may be from the expected one and still be called so.
TOLERANCE = 0.15
MARK = "\\*"
SHOWN = ("ms_per_image", "peak_mb")


def chapter(record: dict[str, Any]) -> str:
    """A picture, a table an axis, and the slopes beside those that are expected."""
    picture = Path(record["file"]).with_suffix(".svg").name
    lines = [
        "Stages are summed over threads. Slopes are those between logarithms: 1 where doubling one doubles the other.\n",
        f"![cost against images, views, classes, canvas and threads](results/{picture})\n",
    ]
    for name, axis in record["rows"].items():
        lines += [f"**{name}**\n", *_table(axis), ""]
    if any(
        point["disturbed"]["max"] for axis in record["rows"].values() for point in axis["points"].values()
    ):
        lines.append(f"{MARK} other processes took part of the cores in a round.\n")
    return "\n".join([*lines, *_slopes(record["rows"]), "", " ".join(_reading(record["rows"]))])


def _table(axis: Mapping[str, Any]) -> Iterator[str]:
    others = {key: title for key, title in axis["titles"].items() if key not in SHOWN}
    heads = [axis["axis"], "images/s", "spread", "ms an image", "peak memory, MB", *others.values()]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for value, point in axis["points"].items():
        rate = point["images_per_s"]
        cells = [
            f"{int(value):,}{MARK * bool(point['disturbed']['max'])}",
            _number(rate["median"]),
            spread_of(rate, _number),
            *(_number(point[key]["median"]) if key in point else "" for key in (*SHOWN, *others)),
        ]
        yield f"| {' | '.join(cells)} |"


def _slopes(rows: Mapping[str, Any]) -> Iterator[str]:
    yield "| slope of | against | from | to | measured | expected |"
    yield "|---|---|---|---|---|---|"
    for axis in rows.values():
        for key, slope in axis["slopes"].items():
            if slope["measured"] is not None:
                least, most = min(slope["over"]), max(slope["over"])
                yield (
                    f"| {axis['titles'][key]} | {axis['axis']} | {least:,} | {most:,} | {slope['measured']:.2f} | "
                    f"{_expected(slope)} |"
                )


def _reading(rows: Mapping[str, Any]) -> Iterator[str]:
    if "images" in rows and len(rows["images"]["points"]) > 1:
        yield _read_images(rows["images"]["points"])
    if "classes" in rows:
        classes, point = list(rows["classes"]["points"].items())[-1]
        yield (
            f"{int(classes):,} classes take {_number(point['text_s']['median'])} s to embed, {point['peak_mb']['median']:.0f} MB "
            f"to label with, and {_number(point['disk_bytes']['median'] / 1000)} kB on the disk for an image."
        )
    known = [
        (axis, axis["titles"][key], slope)
        for axis in rows.values()
        for key, slope in axis["slopes"].items()
        if slope["measured"] is not None
    ]
    off = [
        f"{title} against {axis['axis']} ({slope['measured']:.2f}, not {_expected(slope)})"
        for axis, title, slope in known
        if not _holds(slope)
    ]
    if known:
        told = f"{len(known) - len(off)} of {len(known)} slopes are as expected (within {TOLERANCE})"
        yield f"{told}{'; not ' * bool(off)}{'; '.join(off)}."


def _read_images(points: Mapping[str, Any]) -> str:
    (fewer, before), (more, last) = list(points.items())[-2:]
    grown = 1e6 * (last["peak_mb"]["median"] - before["peak_mb"]["median"]) / (int(more) - int(fewer))
    return (
        f"With {int(more):,} images labelling runs at {_share(last, before)} of the rate with {int(fewer):,}, its first "
        f"batch is scored after {_number(last['first_batch_s']['median'])} s, the same command again ends after "
        f"{_number(last['again_s']['median'])} s, and each image more takes {grown:.0f} bytes of memory."
    )


def _share(last: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    return f"{last['images_per_s']['median'] / before['images_per_s']['median']:.0%}"


def _holds(slope: Mapping[str, Any]) -> bool:
    beyond = float(slope["measured"] - slope["expected"])
    return beyond <= TOLERANCE and (slope["at_most"] or beyond >= -TOLERANCE)


def _expected(slope: Mapping[str, Any]) -> str:
    return f"{'at most ' if slope['at_most'] else ''}{slope['expected']:g}"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
