"""Every method and every part of CCD on one data set, over several seeds: one table, one plot, resumable.

    OUT/scenes/, OUT/banks/      shared by all runs
    OUT/runs/NAME-seedK/         one training run each
    OUT/compare.json, .md, .png  the results

Legend: N images, C classes.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import statistics
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cliplet.artifact import library_versions
from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.labels import write_atomically
from cliplet.progress import ProgressBar
from cliplet.pseudo_labels import cdul_labels

from .classifier_recipe import METHODS, ClassifierRecipe
from .compare_plot import comparison_plot
from .feed import PixelCache
from .loop import RunOptions
from .measuring import evaluation_map
from .paper import reported
from .recipes import classifier_recipe, classifier_recipes, with_method
from .run_data import DataOptions, run_data
from .teacher_labels import PassOptions, teacher_labels
from .train_classifier import TrainOptions, train_classifier
from .world import launched

log = logging.getLogger("cliplet")
CACHE_BYTES = 2 << 30  # of decoded images in each process; what does not fit is decoded again
# Parts of CCD taken away, and its mends undone, one at a time.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no part of CCD": {"label_update": False, "debias": False, "consistency": 0.0},
    "label update": {"debias": False, "consistency": 0.0},
    "label update + debias": {"consistency": 0.0},
    "label update + consistency": {"debias": False},
    "ccd, 3x3 snippets in the first labels": {"views": "1+3x3"},
    "ccd, ImageNet normalisation": {"teacher_normalisation": "imagenet"},
    "ccd, first-to-last-pixel boxes": {"box_rule": "first_last", "crop_shape": "stretched"},
    "ccd, softmax scale 20": {"softmax_scale": 20.0},
    "ccd, two label updates": {"updates": 2},
    "ccd, walked threshold": {"threshold_search": "walk", "mean_classes": 4.0},
    "ccd, unsure images weigh 0.1": {"unsure_weight": 0.1},
}


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and how it is carried out.

    Attributes:
        names: rows, see `compared_recipes`; empty is all.
        seeds: each row is trained with seeds 0 … seeds - 1.
        jobs: runs at a time; threads: of each.
    """

    names: tuple[str, ...] = ()
    seeds: int = 3
    jobs: int = 1
    threads: int = 0
    workers: int = 1
    data: DataOptions = DataOptions()
    device: str = "cpu"
    overrides: Mapping[str, Any] | None = None
    quiet: bool = False


def compared_recipes(data: str) -> dict[str, ClassifierRecipe]:
    """The rows of the comparison on a data set: methods, ablations of CCD, the public code's CCD where known."""
    base = classifier_recipe(f"{data}_ccd")
    rows = {method: with_method(base, method) for method in METHODS}
    rows |= {name: replace(base, **changed) for name, changed in ABLATIONS.items()}
    released = f"{data}_ccd_released"
    if released in classifier_recipes():
        rows["ccd_released"] = classifier_recipe(released)
    return rows


def compare(data: str, out: Path, options: CompareOptions) -> dict[str, Any]:
    """The comparison, after writing it to `out`; runs that are done there are not repeated.

    Raises:
        UsageError: no such row.
        DataError: a run failed; the others were finished first.
    """
    rows = compared_recipes(data)
    unknown = [name for name in options.names if name not in rows]
    if unknown:
        raise UsageError(f"no row {', '.join(map(repr, unknown))}", f"some of: {', '.join(rows)}")
    chosen = {
        name: replace(recipe, **(options.overrides or {}))
        for name, recipe in rows.items()
        if not options.names or name in options.names
    }
    teachers = _teacher_rows(chosen, out, options)
    jobs = [
        (name, seed, replace(recipe, seed=seed))
        for seed in range(options.seeds)
        for name, recipe in chosen.items()
    ]
    reports: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in chosen}
    failed = []
    with ProgressBar("runs", len(jobs), "runs", quiet=options.quiet) as bar:
        for name, seed, outcome in _outcomes(jobs, out, options):
            if isinstance(outcome, str):
                failed.append(f"{name}, seed {seed}: {outcome}")
                log.warning("failed: %s", failed[-1])
            else:
                reports[name][seed] = outcome
            bar.advance(1)
    result = summarised(data, chosen, reports, teachers)
    write_comparison(result, out)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(jobs)} runs failed; the first: {failed[0]}",
            "all runs to end; the table holds the others",
            "mend the cause, then the same command does only what is missing",
        )
    return result


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Where a row's run lies."""
    plain = "".join(c if c.isalnum() or c == "_" else "-" for c in name).replace("--", "-")
    return out / "runs" / f"{plain}-seed{seed}"


def _outcomes(
    jobs: Sequence[tuple[str, int, ClassifierRecipe]], out: Path, options: CompareOptions
) -> Iterator[tuple[str, int, dict[str, Any] | str]]:
    """Each run's report, or why it failed, as they end."""
    if options.jobs == 1:
        for name, seed, recipe in jobs:
            yield name, seed, _run(recipe, run_folder(out, name, seed), out, options)
        return
    # Spawned, not forked: the parent holds the threads of numerical libraries.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        under_way = {
            pool.submit(_run, recipe, run_folder(out, name, seed), out, options): (name, seed)
            for name, seed, recipe in jobs
        }
        for future in as_completed(under_way):
            yield *under_way[future], future.result()


_cache: PixelCache | None = None  # of this process, for all runs that it carries out


def _run(recipe: ClassifierRecipe, folder: Path, out: Path, options: CompareOptions) -> dict[str, Any] | str:
    global _cache
    _cache = _cache or PixelCache(CACHE_BYTES)
    train = TrainOptions(
        data=shared_data(options, out),
        banks=out / "banks",
        device=options.device,
        threads=options.threads,
        run=RunOptions(workers=options.workers, cache=_cache, evaluate_epochs=False, quiet=True),
    )
    try:
        return train_classifier(recipe, folder, train)
    except ClipletError as error:
        return str(error).replace("\n", "; ")
    except Exception as error:  # noqa: BLE001  one run's fault must not end the others
        log.debug("%s", traceback.format_exc())
        return f"{type(error).__name__}: {error}"


def shared_data(options: CompareOptions, out: Path) -> DataOptions:
    """The data of all runs: what was named, or the scenes that are made once in `out`."""
    return options.data if options.data.root else replace(options.data, root=out / "scenes")


def _teacher_rows(
    chosen: Mapping[str, ClassifierRecipe], out: Path, options: CompareOptions
) -> dict[str, float]:
    """The teacher's own mAP on the evaluation split, with the whole image and with what CDUL looks at."""
    recipe = next(iter(chosen.values()))
    base = replace(with_method(recipe, "ccd"), scoring="batched", teacher_size=0, teacher_normalisation="own")
    fabric = launched("fp32", options.device, out)
    _, evaluation = run_data(base, out, options.data, fabric, options.quiet)
    if evaluation is None:
        return {}
    passes = PassOptions(out / "banks", options.workers, options.quiet)
    found = {}
    for views in ("1", "1+3x3"):
        taught = teacher_labels(replace(base, views=views), evaluation, fabric, passes)
        scores_NC = np.where(taught.done_N[:, None], cdul_labels(taught.probs_NVC), np.nan)
        found[f"teacher, views {views}"] = evaluation_map(scores_NC, evaluation)
    return found


def summarised(
    data: str,
    chosen: Mapping[str, ClassifierRecipe],
    reports: Mapping[str, Mapping[int, Mapping[str, Any]]],
    teachers: Mapping[str, float],
) -> dict[str, Any]:
    """The comparison as JSON: for each row its mAPs, mean and deviation, and what the papers report."""
    rows = {}
    for name, recipe in chosen.items():
        by_seed = reports[name]
        maps = [by_seed[seed]["measured"]["map"] for seed in sorted(by_seed)]
        last = [by_seed[seed]["measured"]["last_map"] for seed in sorted(by_seed)]
        labels = [_label_map(by_seed[seed]) for seed in sorted(by_seed)]
        rows[name] = {
            "recipe": recipe.to_json(),
            "map": _spread(maps),
            "last_map": _spread(last),
            "label_map": _spread([value for value in labels if value is not None]),
            "reported": reported(data, name),
            "seconds": [sum(r["seconds"] for r in by_seed[s]["history"]) for s in sorted(by_seed)],
        }
    return {"data": data, "teacher": dict(teachers), "rows": rows, "versions": library_versions()}


def _label_map(report: Mapping[str, Any]) -> float | None:
    """mAP of the labels that were learned from last."""
    updated = [row["label_map"] for row in report["history"] if "label_map" in row]
    value: float | None = updated[-1] if updated else report["labels"].get("label_map")
    return value


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "all": list(values)}


def write_comparison(result: Mapping[str, Any], out: Path) -> None:
    """Write compare.json, compare.md and compare.png to `out`."""
    write_atomically(out / "compare.json", json.dumps(result, indent=2).encode())
    write_atomically(out / "compare.md", markdown(result).encode())
    comparison_plot(result, out / "compare.png")


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table, best first within methods and within ablations."""
    where = "VOC12" if result["data"] in ("scenes", "folder") else result["data"].upper()
    lines = [
        f"| row | mAP | last epoch | labels learned from | reported, {where} |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {value:.1f} | | | |" for name, value in result["teacher"].items()]
    ordered = sorted(result["rows"].items(), key=lambda item: -(item[1]["map"] or {"mean": -1})["mean"])
    for name, row in ordered:
        paper = "" if row["reported"] is None else f"{row['reported']:.1f}"
        cells = [_shown(row[key]) for key in ("map", "last_map", "label_map")]
        lines.append(f"| {name} | {' | '.join(cells)} | {paper} |")
    return "\n".join(lines) + "\n"


def _shown(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return ""
    if spread["deviation"] is None:
        return f"{spread['mean']:.1f}"
    return f"{spread['mean']:.1f} ± {spread['deviation']:.1f}"
