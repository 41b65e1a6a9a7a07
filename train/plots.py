"""Pictures of an evaluation, legible from 2 to about 100 classes: PNG files, made without a screen.

    average_precision.png    a bar for each class, best first
    precision_recall.png     a small curve for each class, worst first, with the point of its threshold
    calibration.png          how often scores come true, and how many there are
    confusion.png            which class is seen where another one is
    co_occurrence.png        which classes come together, in truth and in the tags

Legend: C classes, B bins.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from cliplet.labels import write_atomically
from cliplet.metrics import co_occurrence, precision_recall_curve

if TYPE_CHECKING:
    from .evaluate import Evaluation

INK, GREY, PALE = "#22303c", "#8996a3", "#e9edf1"
BLUE, ORANGE = "#2a6f97", "#d1602d"
SHARES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#bcd9e8", BLUE, "#0b2b3d"], bad=PALE)
DPI = 120
# From here on a cell of a matrix is too small for a number in it.
MOST_NUMBERED = 24
# Keeps a number readable where a line passes behind it.
BEHIND_TEXT: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_plots(evaluation: Evaluation, out: Path) -> list[Path]:
    """Paths of the pictures, written to a folder that exists."""
    from matplotlib import rc_context

    makers = {
        "average_precision.png": average_precision_bars,
        "precision_recall.png": precision_recall_curves,
        "calibration.png": calibration_curve,
        "confusion.png": confusion_map,
        "co_occurrence.png": co_occurrence_maps,
    }
    for name, make in makers.items():
        with rc_context(STYLE):
            picture = io.BytesIO()
            make(evaluation).savefig(picture, format="png", dpi=DPI)
        write_atomically(out / name, picture.getvalue())
    return [out / name for name in makers]


def average_precision_bars(evaluation: Evaluation) -> Figure:
    """A bar for each class, best first, with its number of positives."""
    order = np.argsort(-evaluation.average_precision_C, kind="stable")
    percent = (100 * evaluation.average_precision_C[order]).tolist()
    positives = evaluation.truth_NC.sum(0)[order].tolist()
    figure = Figure((7, 1.4 + 0.19 * len(order)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(order))
    axes.barh(places, percent, color=BLUE, height=0.72)
    for place, (value, count) in enumerate(zip(percent, positives, strict=True)):
        axes.text(value + 0.8, place, f"{value:.1f}", va="center", fontsize=8, bbox=BEHIND_TEXT)
        axes.text(118, place, f"{count:,}", va="center", ha="right", fontsize=8, color=GREY)
    axes.text(118, -1.1, "positives", ha="right", fontsize=8, color=GREY)
    mean = evaluation.mean_average_precision
    axes.axvline(mean, color=ORANGE, linewidth=1.2)
    axes.set_yticks(places, [evaluation.names[c] for c in order])
    axes.set(xlim=(0, 119), ylim=(len(order) - 0.4, -1.7), xlabel="average precision, percent")
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"mAP {mean:.1f} % over {len(order)} classes (orange line)", loc="left")
    _subtitle(figure, evaluation)
    return figure


def precision_recall_curves(evaluation: Evaluation) -> Figure:
    """A small curve for each class, lowest average precision first; the point is its threshold."""
    order = np.argsort(evaluation.average_precision_C, kind="stable")
    columns = min(len(order), max(3, int(np.ceil(np.sqrt(1.4 * len(order))))))
    rows = -(-len(order) // columns)
    figure = Figure((max(4.4, 1.45 * columns + 0.6), 1.55 * rows + 1.1), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place < len(order):
            _precision_recall_panel(axes, evaluation, int(order[place]))
            axes.tick_params(labelbottom=place + columns >= len(order))
        else:
            axes.set_visible(False)
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    total = evaluation.overall
    figure.suptitle(
        f"mAP {evaluation.mean_average_precision:.1f} %, lowest AP first\nat the thresholds (points) "
        f"CF1 {100 * total.CF1:.1f} %, OF1 {100 * total.OF1:.1f} %",
        fontsize=10,
    )
    return figure


def _precision_recall_panel(axes: Axes, evaluation: Evaluation, c: int) -> None:
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.06), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.set_xticklabels(["0", ".5", "1"], fontsize=7)
    axes.set_yticklabels(["0", ".5", "1"], fontsize=7)
    axes.grid(color=PALE, linewidth=0.8)
    name = evaluation.names[c]
    short = name if len(name) <= 15 else name[:14] + "…"
    axes.set_title(f"{short}  {100 * evaluation.average_precision_C[c]:.1f}", fontsize=8, pad=3)
    if not evaluation.truth_NC[:, c].any():
        axes.text(0.5, 0.5, "no positives", ha="center", fontsize=7, color=GREY)
        return
    curve = precision_recall_curve(evaluation.scores_NC[:, c], evaluation.truth_NC[:, c])
    recall, precision = np.r_[0, curve.recall_K], np.r_[curve.precision_K[0], curve.precision_K]
    axes.fill_between(recall, precision, step="pre", color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(recall, precision, color=BLUE, linewidth=1.1, drawstyle="steps-pre")
    if evaluation.tagged_NC[:, c].any():
        point = (evaluation.by_class.recall_C[c], evaluation.by_class.precision_C[c])
        axes.plot(*point, "o", color=ORANGE, markersize=4, clip_on=False)


def calibration_curve(evaluation: Evaluation) -> Figure:
    """How often scores come true, above how many scores there are."""
    found = evaluation.reliability
    figure = Figure((5.4, 6.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    some = found.pairs_B > 0
    upper.vlines(found.score_B[some], found.score_B[some], found.share_B[some], color=ORANGE, linewidth=1.5)
    upper.plot(found.score_B[some], found.share_B[some], "o-", color=BLUE, markersize=4, linewidth=1.2)
    upper.text(0.04, 0.93, "scores too low", color=GREY, fontsize=8)
    upper.text(0.96, 0.05, "scores too high", color=GREY, fontsize=8, ha="right")
    upper.set(ylabel="share that is true", xlim=(0, 1), ylim=(0, 1))
    upper.xaxis.set_major_formatter(PercentFormatter(1))
    upper.yaxis.set_major_formatter(PercentFormatter(1))
    edges = np.linspace(0, 1, len(found.pairs_B) + 1)
    lower.bar(edges[:-1], found.pairs_B, np.diff(edges), align="edge", color=BLUE, edgecolor="white")
    lower.set(yscale="log", xlabel="score", ylabel="image-class pairs", ylim=(0.7, None))
    error = 100 * found.expected_calibration_error
    upper.set_title(f"expected calibration error {error:.2f} %", loc="left")
    _subtitle(figure, evaluation)
    return figure


def confusion_map(evaluation: Evaluation) -> Figure:
    """Which class is seen where another one is: `metrics.confusion`, without shares of very few images."""
    worst = evaluation.confusions[0] if evaluation.confusions else None
    figure = _matrix_figure(len(evaluation.names), 1)
    axes = figure.subplots()
    few_CC = evaluation.confusable_CC < evaluation.fewest_images
    image = _matrix(axes, np.where(few_CC, np.nan, evaluation.confusion_CC), evaluation.names)
    _colour_bar(figure, image, [axes])
    axes.set(ylabel="the image holds", xlabel="and is falsely tagged")
    most = (
        f"{worst.tagged} beside {worst.present}, {worst.share:.0%} of {worst.images:,}" if worst else "none"
    )
    figure.suptitle(
        "Of the images with the class of the row and without that of the column,\n"
        f"the share falsely tagged with it (grey: fewer than {evaluation.fewest_images} images)\nmost: {most}",
        fontsize=9,
    )
    return figure


def co_occurrence_maps(evaluation: Evaluation) -> Figure:
    """Which classes come together in truth and in the tags: the share of the row's images that hold the column's."""
    figure = _matrix_figure(len(evaluation.names), 2)
    panels = figure.subplots(1, 2)
    sides = {"truth": evaluation.truth_NC, "tags": evaluation.tagged_NC}
    shares = [_shared(present_NC) for present_NC in sides.values()]
    top = max(_top(share_CC) for share_CC in shares)
    for axes, (side, present_NC), share_CC in zip(panels, sides.items(), shares, strict=True):
        image = _matrix(axes, share_CC, evaluation.names, top)
        axes.set_title(f"{side}: {present_NC.sum(1).mean():.2f} classes an image")
        axes.set(ylabel="of the images with", xlabel="the share that has")
    _colour_bar(figure, image, list(panels))
    return figure


def _shared(present_NC: np.ndarray) -> np.ndarray:
    counts_CC = co_occurrence(present_NC).astype(np.float64)
    holding_C = counts_CC.diagonal().copy()
    np.fill_diagonal(counts_CC, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(holding_C[:, None] > 0, counts_CC / holding_C[:, None], np.nan))


def _matrix_figure(classes: int, panels: int) -> Figure:
    side = max(4.6, 1.7 + (0.32 if classes <= MOST_NUMBERED else 0.165) * classes)
    return Figure((panels * side + 0.9, side + 0.8), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))


def _top(share_CC: np.ndarray) -> float:
    """The end of the colour scale."""
    finite = share_CC[np.isfinite(share_CC)]
    return max(float(finite.max()), 0.05) if finite.size else 1.0


def _matrix(axes: Axes, share_CC: np.ndarray, names: Sequence[str], top: float | None = None) -> AxesImage:
    top = top or _top(share_CC)
    image = axes.imshow(share_CC, cmap=SHARES, vmin=0, vmax=top)
    size = 8 if len(names) <= MOST_NUMBERED else 7
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=PALE, linewidth=0.5)
    axes.tick_params(which="both", length=0)
    if len(names) <= MOST_NUMBERED:
        for i, j in np.argwhere(np.isfinite(share_CC) & (share_CC >= 0.005)).tolist():
            colour = "white" if share_CC[i, j] > 0.55 * top else INK
            axes.text(j, i, f"{100 * share_CC[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    return image


def _colour_bar(figure: Figure, image: AxesImage, panels: list[Axes]) -> None:
    figure.colorbar(image, ax=panels, format=PercentFormatter(1), shrink=0.6, aspect=30, pad=0.02)


def _subtitle(figure: Figure, evaluation: Evaluation) -> None:
    where = f"{evaluation.data['name']} {evaluation.data['split']}"
    figure.suptitle(
        f"{evaluation.model['name']} on {where}, {len(evaluation.paths):,} images",
        fontsize=8,
        color=GREY,
        x=0.99,
        ha="right",
    )
