"""Two pictures of a benchmark: throughput against latency, and each row's ratio to the first of its model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from .bench_rows import LABELS
from .bench_table import kinds, measured, number, row_name

INK, GREY, LINE = "#1f2328", "#5d636b", "#e4e1da"
# One for each runtime, told apart also by those who see fewer colours (Okabe and Ito 2008).
COLOURS = {
    "onnx": "#0072B2",
    "openvino": "#009E73",
    "tensorrt": "#D55E00",
    "tensorrt_rtx": "#E69F00",
    "torch": "#56616B",
    "triton": "#CC79A7",
}
MARKERS = {"fp32": "o-", "fp16": "s--", "bf16": "D-.", "int8": "^:"}
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
DPI = 150
LACKING = "no plots: matplotlib is not installed (pip install 'cliplet[train]')"


def plots(made: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name; none without matplotlib, see `LACKING`, or where nothing was measured."""
    rows = list(measured(made).values())
    if not rows or find_spec("matplotlib") is None:
        return {}
    from matplotlib import rc_context

    found = {}
    for name, make in (("latency.png", _latency), ("ratio.png", _ratio)):
        with rc_context(STYLE):
            picture = io.BytesIO()
            make(rows).savefig(picture, format="png", dpi=DPI)
        found[name] = picture.getvalue()
    return found


def _latency(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The engine's views a second against the latency of a batch; batches of one engine are joined."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure((6.6 if len(models) == 1 else 9.6, 3.9), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        own = [row for row in rows if row["model"] == model]
        for engine in dict.fromkeys(row["engine"] for row in own):
            points = sorted((row for row in own if row["engine"] == engine), key=lambda row: row["batch"])
            _draw_engine(axes, engine, points)
        axes.set(xscale="log", yscale="log", xlabel="latency of a batch, ms (dot: p50, line: to p99)")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
            axis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.margins(0.22)
        axes.grid(color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_title(model, loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8.5, title="number: images in a batch", title_fontsize=8.5)
    panels[0].set_ylabel("views a second, engine alone")
    return figure


def _draw_engine(axes: Any, engine: str, points: Sequence[Mapping[str, Any]]) -> None:
    colour = COLOURS.get(points[0]["runtime"], GREY)
    middles = [row["latency_ms"]["p50"] for row in points]
    rates = [row["views_per_s"]["median"] for row in points]
    axes.plot(middles, rates, MARKERS[points[0]["precision"]], color=colour, linewidth=1.1, label=engine)
    for row, middle, rate in zip(points, middles, rates, strict=True):
        axes.plot([middle, row["latency_ms"]["p99"]], [rate, rate], color=colour, linewidth=2, alpha=0.35)
        low, high = row["views_per_s"]["min"], row["views_per_s"]["max"]
        axes.plot([middle, middle], [low, high], color=colour, linewidth=2, alpha=0.35)
        note = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": 8, "color": GREY}
        axes.annotate(str(row["batch"]), (middle, rate), **note)


def _ratio(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A bar for each row: images a second over those of the first row of its model; whiskers span the rounds."""
    from matplotlib.figure import Figure

    figure = Figure((7.4, 1.1 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    several = len({row["model"] for row in rows}) > 1
    for place, row in enumerate(rows):
        ratio = row["ratio_to_first"]
        axes.barh(place, ratio["median"], color=COLOURS.get(row["runtime"], GREY), height=0.62)
        axes.plot([ratio["min"], ratio["max"]], [place, place], color=INK, linewidth=1.4)
        text = f"{ratio['median']:.2f}  ({number(row['images_per_s']['median'])} images/s)"
        axes.annotate(
            text, (ratio["max"], place), (6, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    names = [f"{row['model']}, " * several + row_name(row) for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.35 * max(row["ratio_to_first"]["max"] for row in rows))
    axes.axvline(1, color=GREY, linewidth=0.9, linestyle=":")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"images a second{_together(rows)}, relative to the first row of the model")
    return figure


def _together(rows: Sequence[Mapping[str, Any]]) -> str:
    """By what images are taken; there is no room for more than one answer."""
    return " of cliplet label" if kinds(rows) == [LABELS] else ""
