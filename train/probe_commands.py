"""The verb `cliplet train probe`; everything heavy is imported when it runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Column, Table

from .eval_commands import HIGHEST, KINDS, LOWEST, MOST_CLASSES

if TYPE_CHECKING:
    from cliplet.datasets import Dataset


C = TypeVar("C", bound=Callable[..., Any])


def probe_options(command: C) -> C:
    """The options of the verb."""
    options = [
        click.argument("model"),
        click.option("--data", type=click.Choice(KINDS), required=True, help="What kind of data set it is."),
        click.option("--root", type=click.Path(path_type=Path), required=True, help="The data set's folder, or the one that contains it."),
        click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("probe"), show_default=True, help="Folder of the features and the report; the same command finds the features again."),
        click.option("--train-split", help="What the probes learn from. Default: the usual one, which is printed."),
        click.option("--eval-split", help="What they are measured on. Where both are one split, a random part of it."),
        click.option("--classes", help="Class file, or names separated by commas. Default: the data set's own."),
        click.option("--difficult", type=click.Choice(["negative", "positive"]), default="negative", show_default=True, help="Pascal VOC: what a class with only difficult objects is."),
        click.option("--no-count-check", is_flag=True, help="Take a public data set with another number of images than the official one."),
        click.option("--limit", type=click.IntRange(min=2), help="Only the first so many images of each split."),
        click.option("--measures", help="Of linear, knn, retrieval, zero-shot, separated by commas. Default: all that MODEL is capable of."),
        click.option("--features", type=click.Choice(["standardised", "unit"]), default="standardised", show_default=True, help="Linear probe: columns with mean 0 and deviation 1, or rows of length 1 as they are."),
        click.option("--held-out", type=float, default=0.2, show_default=True, help="Linear probe: share of the training images that choose the L2 strength."),
        click.option("--eval-share", "evaluation_share", type=float, default=0.5, show_default=True, help="Share of the images that is measured on, where both splits are one."),
        click.option("--queries", type=click.IntRange(min=1), default=10_000, show_default=True, help="Retrieval: images at most that are asked about."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of everything random."),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Refused, never replaced, if it cannot be used."),
        click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="Of torch on the CPU (0: one a core)."),
        click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Threads that decode (0: one a core)."),
        click.option("--batch-size", "batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images that are embedded at once."),
        click.option("--overwrite", is_flag=True, help="Forget the features that an earlier run left in --out."),
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
        click.option("--quiet", is_flag=True, help="No progress and no summary."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@probe_options
def probe(model: str, out: Path, measures: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure the features of a frozen encoder on labelled images: linear probe, k-NN, retrieval, zero-shot.

    MODEL is a CLIP (tiny, open_clip:ARCH/PRETRAINED), a vision tower of transformers (mlcd:FOLDER), a trunk that
    `cliplet train mlcd` trained, or a classifier's folder, whose trunk is measured. Nothing of it learns; the linear
    probe does, from the training split.
    """
    from .probe import probe as probe_encoder
    from .probe_measures import ProbeOptions

    names = ("features", "held_out", "evaluation_share", "queries", "seed", "device", "threads", "workers")
    chosen = ProbeOptions(
        measures=tuple(name.strip() for name in measures.split(",")) if measures else (),
        **{name: options[name] for name in (*names, "batch", "overwrite")},
        quiet=quiet,
    )
    train, evaluation = _open(options)
    report = probe_encoder(model, train, evaluation, out, chosen)
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    elif not quiet:
        tell_probe(model, report, out)


def _open(options: Mapping[str, Any]) -> tuple[Dataset, Dataset | None]:
    """Both splits; None for evaluation where it would be the very same."""
    from cliplet.datasets import SPLITS, open_dataset
    from cliplet.vocabulary import read_vocabulary

    kind, limit = options["data"], options["limit"]
    vocabulary = None if options["classes"] is None else read_vocabulary(options["classes"])

    def opened(split: str) -> Dataset:
        data = open_dataset(
            kind,
            options["root"],
            split,
            vocabulary=vocabulary,
            difficult=options["difficult"],
            check_counts=not options["no_count_check"],
        )
        return data if limit is None else data.subset(range(min(limit, len(data.images))))

    learned = options["train_split"] or SPLITS[kind][0]
    measured = options["eval_split"] or SPLITS[kind][:2][-1]
    return opened(learned), None if measured == learned else opened(measured)


def tell_probe(model: str, report: Mapping[str, Any], out: Path) -> None:
    """Say what was measured on what, what could not be, and where it is written."""
    console = Console(highlight=False, soft_wrap=True)
    say = partial(console.print, markup=False)
    data, images = report["data"], report["images"]
    say(
        f"{model}, {report['model']['width']:,} features: learned from {images['train']:,} images of "
        f"{data['train']['name']} {data['train']['split']}, measured on {images['evaluation']:,} of "
        f"{data['evaluation']['split']}"
    )
    if images["failed"]:
        path, reason = next(iter(images["failed"].items()))
        say(f"{len(images['failed']):,} images without features, such as {path}: {reason}")
    console.print(_quality_table(report))
    found = report["measured"]
    if "retrieval" in found:
        say(_retrieval_line(found["retrieval"]))
    if "linear" in found:
        chosen = found["linear"]
        say(
            f"linear probe: {chosen['loss']}, {chosen['features']} features, L2 strength {chosen['strength']:.3g}, "
            f"chosen by {chosen['chosen_by']} on {chosen['held_out_images']:,} held-out images"
        )
        console.print(_class_table(chosen))
    left_out = report["classes"]["left_out"]
    if left_out:
        named = [f"{name} ({reason})" for name, reason in list(left_out.items())[:MOST_CLASSES]]
        more = f" and {len(left_out) - MOST_CLASSES} more" if len(left_out) > MOST_CLASSES else ""
        say(f"{len(left_out)} classes left out of every mean: {', '.join(named)}{more}")
    for note in report["notes"]:
        say(note)
    say(f"wrote {out / 'report.json'}; the features are in {out / 'embeddings'}")
    say(f"next: cliplet train probe OTHER --data {data['train']['name']} --root … --out …, to compare")


def _retrieval_line(found: Mapping[str, Any]) -> str:
    recalls = "   ".join(f"R@{k} {found[f'recall_at_{k}']:.2f}" for k in (1, 5, 10))
    return (
        f"retrieval: {recalls}   mAP@R {found['mAP_at_R']:.2f} %   ({found['queries']:,} images looked for others with "
        f"a label in common among {found['gallery']:,}; {found['without_match']:,} have none, "
        f"{found['duplicate_pairs_left_out']:,} pairs of duplicates left out)"
    )


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    found = report["measured"]
    if "linear" in found:
        yield "linear probe", found["linear"]
    for k, quality in found.get("knn", {}).items():
        yield f"k-NN, k = {k}", quality
    for scores, quality in found.get("zero-shot", {}).items():
        yield f"zero-shot, {scores}", quality
    yield "chance", report["chance"]


def _quality_table(report: Mapping[str, Any]) -> Table:
    rows = list(_rows(report))
    columns = {"mAP": "mAP", "mAP_11_point": "11-point mAP", "top_1": "top-1"}
    shown = {key: title for key, title in columns.items() if any(key in quality for _, quality in rows)}
    table = Table("", *(Column(title, justify="right") for title in shown.values()), box=box.SIMPLE_HEAD)
    for name, quality in rows:
        table.add_row(name, *(f"{quality[key]:.2f}" if key in quality else "" for key in shown))
    return table


def _class_table(linear: Mapping[str, Any]) -> Table:
    """Classes of the linear probe from the best to the worst; of many, the ends."""
    ranked = sorted(linear["AP"].items(), key=lambda pair: -pair[1])
    table = Table("class", *(Column(t, justify="right") for t in ("AP", "11-point AP")), box=box.SIMPLE_HEAD)
    left_out = len(ranked) - HIGHEST - LOWEST if len(ranked) > MOST_CLASSES else 0
    for place, (name, value) in enumerate(ranked):
        if left_out and place == HIGHEST:
            table.add_row(f"… {left_out} more", "", "")
        if not left_out or not HIGHEST <= place < HIGHEST + left_out:
            table.add_row(name, f"{value:.1f}", f"{linear['AP_11_point'][name]:.1f}")
    return table
