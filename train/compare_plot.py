"""The comparison as one picture: a dot a seed, a tick at the mean, the teacher as a line."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from cliplet.labels import write_atomically

from .classifier_recipe import METHODS, WITH_TRUTH
from .plots import BLUE, DPI, GREY, INK, ORANGE, STYLE


def comparison_plot(result: Mapping[str, Any], file: Path) -> None:
    """Write the picture of a comparison as PNG."""
    with rc_context(STYLE):
        figure = _figure(result)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=DPI)
    write_atomically(file, picture.getvalue())


def _figure(result: Mapping[str, Any]) -> Figure:
    rows = {name: row["map"] for name, row in result["rows"].items() if row["map"]}
    # Worst first, because the axis counts from below; the parts of CCD stand under the methods.
    order = sorted(rows, key=lambda name: (name in METHODS, rows[name]["mean"]))
    figure = Figure((7.5, 1.3 + 0.26 * len(order)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(order):
        colour = GREY if name in WITH_TRUTH else ORANGE if name.startswith("ccd") else BLUE
        values = rows[name]["all"]
        axes.plot(
            values, [place] * len(values), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0
        )
        axes.plot(rows[name]["mean"], place, "|", color=INK, markersize=13, markeredgewidth=1.6)
        axes.annotate(
            f"{rows[name]['mean']:.1f}",
            (max(values), place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    for (name, value), style in zip(result["teacher"].items(), ("--", ":"), strict=False):
        axes.axvline(value, color=GREY, linestyle=style, linewidth=1, label=f"{name}: {value:.1f}", zorder=0)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.margins(x=0.08)
    axes.set_xlabel("mAP in percent on the evaluation split")
    axes.grid(axis="x", color="#e9edf1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    if result["teacher"]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8)
    return figure
