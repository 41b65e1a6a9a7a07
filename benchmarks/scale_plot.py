"""The picture of `benchmarks.scale`: a panel an axis, what was measured, and the slope that was expected, dashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

COLUMNS = 2
# Told apart also by those who see fewer colours (Okabe and Ito 2008), and by their markers.
LOOKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "^"), ("#56616B", "v"))
GREY, LINE = "#5d636b", "#e4e1da"
NOTE = "dashed: the expected slope, over the points that the measured one is taken from; bars: all rounds"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cliplet",
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plot(rows: Mapping[str, Any], file: Path) -> None:
    """Write the picture; the suffix of `file` says in which format."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        width, height = min(COLUMNS, len(rows)), -(-len(rows) // COLUMNS)
        figure = Figure((5.4 * width, 4.1 * height), layout="constrained")
        panels = list(figure.subplots(height, width, squeeze=False).flat)
        for panel, found in zip(panels, rows.values(), strict=False):
            _draw(panel, found)
        for unused in panels[len(rows) :]:
            unused.remove()
        figure.suptitle(NOTE, x=0.02, ha="left", fontsize=9, color=GREY)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _draw(panel: Any, found: Mapping[str, Any]) -> None:
    drawn: list[float] = []
    shown = [key for key in found["slopes"] if any(key in point for point in found["points"].values())]
    for (colour, marker), key in zip(LOOKS, shown, strict=False):
        points = {int(value): point[key] for value, point in found["points"].items() if key in point}
        # What is a difference may be less than nothing.
        known = {value: y for value, y in points.items() if y["min"] > 0}
        middles, least, most = ([y[which] for y in known.values()] for which in ("median", "min", "max"))
        panel.plot(list(known), middles, color=colour, linewidth=0.8, alpha=0.4)
        panel.plot(list(known), middles, marker, color=colour, markersize=4.5, label=found["titles"][key])
        panel.vlines(list(known), least, most, color=colour, linewidth=3, alpha=0.35)
        drawn += [*least, *most]
        slope = found["slopes"][key]
        over = {value: points[value]["median"] for value in slope["over"]}
        if len(over) > 1:
            level = mean(log(y) - slope["expected"] * log(value) for value, y in over.items())
            line = [exp(level + slope["expected"] * log(value)) for value in over]
            panel.plot(list(over), line, "--", color=colour, linewidth=1.3)
    panel.set(xscale="log", yscale="log", xlabel=found["axis"], ylim=_limits(drawn))
    _mark(panel, [int(value) for value in found["points"]])
    panel.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2)


def _limits(drawn: Sequence[float]) -> tuple[float, float]:
    """Room for all that is drawn, and at least a decade, so that a flat line looks flat."""
    middle, half = log(min(drawn) * max(drawn)) / 2, log(max(drawn) / min(drawn)) / 2
    room = max(half + log(1.3), log(10) / 2)
    return exp(middle - room), exp(middle + room)


def _mark(panel: Any, values: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = panel.get_ylim()
    panel.xaxis.set_major_locator(FixedLocator(values))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.xaxis.set_minor_locator(NullLocator())
    # Few decades need marks inside them.
    inside = (1, 2, 5) if high / low < 200 else (1,)
    panel.yaxis.set_major_locator(LogLocator(subs=inside, numticks=12))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(color=LINE, linewidth=0.7)
    panel.set_axisbelow(True)
