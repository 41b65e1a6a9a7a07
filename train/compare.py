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
from lightning_fabric import Fabric

from cliplet.artifact import library_versions
from cliplet.datasets import Dataset
from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.labels import write_atomically
from cliplet.progress import ProgressBar
from cliplet.pseudo_labels import cdul_labels

from .classifier_recipe import WITH_TRUTH, ClassifierRecipe
from .compare_plot import comparison_plot
from .compare_rows import MENDS_ON_REQUEST, compared_recipes
from .feed import PixelCache
from .loop import RunOptions
from .measuring import evaluation_map
from .paper import reported, reported_table
from .recipes import classifier_recipe, with_method
from .run_data import DataOptions, run_data
from .teacher_labels import PassOptions, teacher_labels
from .train_classifier import TrainOptions, train_classifier
from .world import launched

log = logging.getLogger("cliplet")
CACHE_BYTES = 2 << 30  # of decoded images in each process; what does not fit is decoded again


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and how it is carried out.

    Attributes:
        names: rows, see `compare_rows`; empty is all but those of `MENDS_ON_REQUEST`.
        seeds: each row is trained with seeds 0 … seeds - 1.
        jobs: runs at a time; threads: of each.
        teacher_runtime: see `cliplet.train.teacher_labels.PassOptions`; for the rows that leave the choice.
    """

    names: tuple[str, ...] = ()
    seeds: int = 3
    jobs: int = 1
    threads: int = 0
    workers: int = 1
    data: DataOptions = DataOptions()
    device: str = "cpu"
    teacher_runtime: str | None = None
    overrides: Mapping[str, Any] | None = None
    quiet: bool = False


def compare(data: str, out: Path, options: CompareOptions) -> dict[str, Any]:
    """The comparison, after writing it to `out`; runs that are done there are not repeated.

    Raises:
        UsageError: no such row, or nothing to measure by.
        DataError: a run failed; the others were finished first.
    """
    chosen = chosen_recipes(data, options)
    base = with_method(replace(classifier_recipe(f"{data}_ccd"), **(options.overrides or {})), "ccd")
    fabric = launched("fp32", options.device, out)
    learned, evaluation = run_data(base, out, options.data, fabric, options.quiet)
    if evaluation is None:
        raise _nothing_to_measure_by(base)
    if learned.truth_NC is None:
        chosen = _without_truth(chosen, options)
    teachers = _teacher_rows(base, evaluation, fabric, out, options)
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
    table = reported_table(data, len(evaluation.vocabulary.names), len(evaluation.images))
    result = summarised(data, chosen, reports, teachers, table)
    write_comparison(result, out)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(jobs)} runs failed; the first: {failed[0]}",
            "all runs to end; the table holds the others",
            "mend the cause, then the same command does only what is missing",
        )
    return result


def chosen_recipes(data: str, options: CompareOptions) -> dict[str, ClassifierRecipe]:
    """The rows that the options name, with their overrides.

    Raises:
        UsageError: no such row, or no split to measure on.
    """
    rows = compared_recipes(data)
    unknown = [name for name in options.names if name not in rows]
    if unknown:
        raise UsageError(f"no row {', '.join(map(repr, unknown))}", f"some of: {', '.join(rows)}")
    names = options.names or [name for name in rows if name not in MENDS_ON_REQUEST]
    chosen = {
        name: replace(recipe, **(options.overrides or {})) for name, recipe in rows.items() if name in names
    }
    for recipe in chosen.values():
        if not recipe.eval_split:
            raise _nothing_to_measure_by(recipe)
    return chosen


def _nothing_to_measure_by(recipe: ClassifierRecipe) -> UsageError:
    split = (
        f"its split {recipe.eval_split} has no labels"
        if recipe.eval_split
        else "its recipes have no eval_split"
    )
    mend = "--set eval_split=all, with a labels.csv beside the images"
    return UsageError(
        f"a comparison on {recipe.dataset} has nothing to measure by: {split}",
        "labelled images to evaluate on",
        mend if recipe.dataset == "folder" else "--set eval_split=SPLIT, one with labels",
    )


def _without_truth(
    chosen: Mapping[str, ClassifierRecipe], options: CompareOptions
) -> dict[str, ClassifierRecipe]:
    """The rows that need no labels of the training images.

    Raises:
        UsageError: a row that does was asked for by its name.
    """
    impossible = [name for name, recipe in chosen.items() if recipe.method in WITH_TRUTH]
    if options.names and impossible:
        raise UsageError(
            f"the rows {', '.join(impossible)} learn from true labels, and the training images have none",
            "rows that need none",
            "leave them out of --rows",
        )
    return {name: recipe for name, recipe in chosen.items() if name not in impossible}


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
    # The public code's normalisation, and its way to score one by one, run in torch only.
    free = recipe.scoring == "batched" and recipe.teacher_normalisation == "own"
    train = TrainOptions(
        data=shared_data(options, out),
        banks=out / "banks",
        device=options.device,
        threads=options.threads,
        teacher_runtime=options.teacher_runtime if free else None,
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
    recipe: ClassifierRecipe, evaluation: Dataset, fabric: Fabric, out: Path, options: CompareOptions
) -> dict[str, float]:
    """The teacher's own mAP on the evaluation split, with the whole image and with what CDUL looks at."""
    base = replace(recipe, scoring="batched", teacher_size=0, teacher_normalisation="own")
    passes = PassOptions(out / "banks", options.workers, options.quiet, options.teacher_runtime)
    found = {}
    for views in ("1", "1+3x3"):
        taught = teacher_labels(replace(base, views=views), evaluation, fabric, passes)
        if taught.errors:
            log.warning(
                "%d evaluation images unreadable, so without a part in any mAP, such as %s: %s",
                len(taught.errors),
                taught.errors[0].path,
                taught.errors[0].reason,
            )
        scores_NC = np.where(taught.done_N[:, None], cdul_labels(taught.probs_NVC), np.nan)
        found[f"teacher, views {views}"] = evaluation_map(scores_NC, evaluation)
    return found


def summarised(
    data: str,
    chosen: Mapping[str, ClassifierRecipe],
    reports: Mapping[str, Mapping[int, Mapping[str, Any]]],
    teachers: Mapping[str, float],
    table: str | None,
) -> dict[str, Any]:
    """The comparison as JSON: for each row its mAPs, mean and deviation, and what the papers report.

    Args:
        table: of the papers' numbers, see `paper.reported_table`.
    """
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
            "unreadable": max((len(by_seed[seed]["measured"]["unreadable"]) for seed in by_seed), default=0),
            "reported": reported(table, name),
            "seconds": [sum(r["seconds"] for r in by_seed[s]["history"]) for s in sorted(by_seed)],
        }
    return {
        "data": data,
        "reported_on": table,
        "teacher": dict(teachers),
        "rows": rows,
        "versions": library_versions(),
    }


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
    """The comparison as a Markdown table, best first.

    A row that lost evaluation images says how many. Records of the scene world have no `reported_on`.
    """
    table = result.get("reported_on", "voc12")
    reports = "reported" if table is None else f"reported, {table.upper()}"
    lines = [
        f"| row | mAP | last epoch | labels learned from | {reports} |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {value:.1f} | | | |" for name, value in result["teacher"].items()]
    ordered = sorted(result["rows"].items(), key=lambda item: -(item[1]["map"] or {"mean": -1})["mean"])
    for name, row in ordered:
        paper = "" if row["reported"] is None else f"{row['reported']:.1f}"
        cells = [_shown(row[key]) for key in ("map", "last_map", "label_map")]
        if row.get("unreadable"):
            cells[0] += f" ({row['unreadable']:,} images unreadable)"
        lines.append(f"| {name} | {' | '.join(cells)} | {paper} |")
    return "\n".join(lines) + "\n"


def _shown(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return ""
    if spread["deviation"] is None:
        return f"{spread['mean']:.1f}"
    return f"{spread['mean']:.1f} ± {spread['deviation']:.1f}"
