"""The verbs `cliplet eval` and `cliplet calibrate`; everything heavy is imported when they run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from rich import box
from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from cliplet.datasets import Dataset

    from .evaluate import Evaluation
    from .threshold_entry import Calibration

C = TypeVar("C", bound=Callable[..., Any])
# Options of `calibrate` that only some of its methods use; those of pseudo-labels are checked with the settings.
METHODS_OF_OPTION = {
    "pseudo_threshold": ("pseudo-f1",),
    "folds": ("f1", "pseudo-f1"),
    "min_positives": ("f1", "pseudo-f1"),
    "seed": ("f1", "pseudo-f1"),
}
KINDS = ("voc07", "voc12", "coco14", "coco17", "nus", "ccd", "scenes", "folder")
# Tables with more classes show the lowest and the highest of them.
MOST_CLASSES = 24
LOWEST, HIGHEST = 12, 4
MOST_NAMED = 5
FILE = click.Path(path_type=Path, dir_okay=False)


def data_options(verb: str) -> Callable[[C], C]:
    """The options of a verb that name a data set and say how its images are scored."""
    options = [
        click.argument("model"),
        click.option("--data", type=click.Choice(KINDS), required=True, help="What kind of data set it is."),
        click.option("--root", type=click.Path(path_type=Path), required=True, help="The data set's folder, or the one that contains it."),
        click.option("--split", help="Part of the data set. Default: the usual one for this verb, which is printed."),
        click.option("--classes", help="Class file, or names separated by commas. Default: the data set's own, or the model's."),
        click.option("--difficult", type=click.Choice(["negative", "positive"]), default="negative", show_default=True, help="Pascal VOC: what a class with only difficult objects is."),
        click.option("--no-count-check", is_flag=True, help="Take a public data set with another number of images than the official one."),
        click.option("--limit", type=click.IntRange(min=1), help="Only the first so many images."),
        click.option("--views", help="Where a CLIP or a bundle looks: 1, 1+2x2, 1+3x3, … Default: 1+3x3."),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Refused, never replaced, if it cannot be used."),
        click.option("--batch-size", type=int, default=0, help="Images in a batch (0: by the model)."),
        click.option("--workers", type=int, default=0, help="Threads that decode (0: one a core)."),
        click.option("--json", "as_json", is_flag=True, envvar=f"CLIPLET_{verb}_JSON", help="Print the result as JSON."),
        click.option("--quiet", is_flag=True, help="No progress and no summary."),
    ]  # fmt: skip

    def decorate(command: C) -> C:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.command(name="eval")
@data_options("EVAL")
@click.option(
    "--thresholds", type=FILE, help="A file that `cliplet calibrate` wrote. Default: the model's own."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("eval"),
    show_default=True,
    help="Folder of the results; made where it is missing, its results replaced.",
)
def evaluate(model: str, out: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure MODEL on labelled images: mAP, F1, calibration, confusions, with pictures.

    MODEL is the folder of a classifier, a bundle or labels that `cliplet label` stored, a bundle on a server
    (triton://HOST:PORT/NAME), or a CLIP (tiny, open_clip:ARCH/PRETRAINED, …), which is asked about the classes of the
    data.
    """
    from . import evaluate as evaluation
    from .scoring import ScoringOptions, score_dataset

    data = _open(model, options, for_training=False)
    chosen = {k: options[k] for k in ("views", "device", "batch_size", "workers", "thresholds")}
    scored = score_dataset(model, data, ScoringOptions(**chosen, quiet=quiet))
    found = evaluation.evaluate(scored, data)
    written = evaluation.write_evaluation(found, out)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    elif not quiet:
        _tell_evaluation(found, data, written)


@click.command()
@data_options("CALIBRATE")
@click.option(
    "--method",
    type=click.Choice(["f1", "pseudo-f1", "expected-count"]),
    default="f1",
    show_default=True,
    help="f1: best F1 of each class on labels. pseudo-f1: on pseudo-labels. expected-count: as many tags as "
    "the probabilities add up to; needs no labels.",
)
@click.option(
    "--pseudo",
    type=click.Path(path_type=Path, exists=True),
    help="Pseudo-labels: a folder of `cliplet label`, or a .npy or .npz array [images, classes].",
)
@click.option(
    "--pseudo-threshold",
    type=float,
    default=0.5,
    show_default=True,
    help="pseudo-f1: from which value on an entry of an array is a label.",
)
@click.option(
    "--mean-per-image", type=float, help="expected-count: known mean number of classes in an image."
)
@click.option(
    "--folds", type=int, default=5, show_default=True, help="f1, pseudo-f1: of the cross-validation."
)
@click.option(
    "--min-positives",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="f1, pseudo-f1: classes with fewer positives get the global threshold.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="f1, pseudo-f1: of the folds.")
@click.option(
    "--out", type=FILE, help="File to write. Default: thresholds.json of a classifier, a bundle's manifest."
)
def calibrate(model: str, out: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Find the score of each class from which on MODEL should tag it, and store it with the model.

    Use images that the model will not be measured on: the split is the training one unless --split says
    otherwise. The F1 that is reported is of images that had no part in their thresholds.
    """
    from . import threshold_entry
    from .scoring import ScoringOptions, score_dataset

    _refuse_unused(options["method"])
    names = ("method", "pseudo", "pseudo_threshold", "mean_per_image", "folds", "min_positives", "seed")
    settings = threshold_entry.CalibrationSettings(**{name: options[name] for name in names})
    place = threshold_entry.place_of_entry(model, out)
    data = _open(model, options, for_training=True)
    chosen = {k: options[k] for k in ("views", "device", "batch_size", "workers")}
    scoring = ScoringOptions(**chosen, quiet=quiet)
    scored = score_dataset(model, data, scoring)
    found = threshold_entry.calibrate(scored, data, settings, scoring)
    threshold_entry.store_entry(found.entry, place)
    if as_json:
        click.echo(json.dumps(found.entry, indent=2, ensure_ascii=False))
    elif not quiet:
        _tell_calibration(found, model, place, out)


def _refuse_unused(method: str) -> None:
    """Raise `UsageError` if the command line has an option that the method does not use."""
    from cliplet.errors import UsageError

    context = click.get_current_context()
    for name, methods in METHODS_OF_OPTION.items():
        given = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if given and method not in methods:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"--method {method} with {option}, which it does not use",
                f"that option for --method {' or '.join(methods)} only",
                f"leave {option} out",
            )


def _open(model: str, options: dict[str, Any], *, for_training: bool) -> Dataset:
    """The data set; images without a class file beside them are asked about the model's own classes."""
    from cliplet.datasets import SPLITS, open_dataset
    from cliplet.vocabulary import read_vocabulary

    from .scoring import own_vocabulary

    kind, root, limit = options["data"], options["root"], options["limit"]
    vocabulary = None
    if options["classes"] is not None:
        vocabulary = read_vocabulary(options["classes"])
    elif kind == "folder" and not (root / "classes.txt").is_file():
        vocabulary = own_vocabulary(model)
    usual = SPLITS[kind][0] if for_training else SPLITS[kind][:2][-1]
    data = open_dataset(
        kind,
        root,
        options["split"] or usual,
        vocabulary=vocabulary,
        difficult=options["difficult"],
        check_counts=not options["no_count_check"],
    )
    return data if limit is None else data.subset(range(min(limit, len(data.images))))


def _tell_evaluation(found: Evaluation, data: Dataset, written: list[Path]) -> None:
    console = Console()
    facts = found.to_json()
    say = _teller(console)
    say(f"{facts['model']['name']} on {data.name} {data.split}: {facts['images']:,} images")
    for note in data.notes:
        say(f"  {note}")
    console.print(_class_table(facts))
    say(f"mAP {facts['mAP']:.2f} %   ECE {facts['ECE']:.2f} %")
    say(
        f"CF1 {facts['CF1']:.2f} % (CP {facts['CP']:.2f}, CR {facts['CR']:.2f})   "
        f"OF1 {facts['OF1']:.2f} % (OP {facts['OP']:.2f}, OR {facts['OR']:.2f})"
    )
    say(f"at the thresholds: {facts['thresholds']}")
    mean = facts["labels_per_image"]
    say(f"classes in an image: {mean['truth']:.2f} in truth, {mean['tagged']:.2f} tagged")
    if facts["classes_without_positives"]:
        say(f"no positives, so AP 0: {_some(facts['classes_without_positives'])}")
    if facts["model"]["classes_not_in_the_data"]:
        say(f"not counted, since the data lacks them: {_some(facts['model']['classes_not_in_the_data'])}")
    if found.failed:
        say(f"images that failed and are left out: {len(found.failed):,}")
        for path, reason in found.failed[:MOST_NAMED]:
            say(f"  {path}: {reason}")
        if len(found.failed) > MOST_NAMED:
            say(f"  and {len(found.failed) - MOST_NAMED:,} more, all named in {written[0]}")
    say(f"wrote {written[0].parent}: {', '.join(path.name for path in written)}")
    if "not calibrated" in facts["thresholds"]:
        say(f"next: cliplet calibrate {facts['model']['name']} --data {data.name} --root …")
    else:
        say(f"next: look at {written[0].parent}/*.png")


def _class_table(facts: dict[str, Any]) -> Table:
    ranked = sorted(facts["classes"].items(), key=lambda pair: -pair[1]["AP"])
    numbers = ("AP", "precision", "recall", "F1", "threshold", "positives", "tagged")
    table = Table(
        Column("class", no_wrap=True),
        *_right(*numbers),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    left_out = len(ranked) - HIGHEST - LOWEST if len(ranked) > MOST_CLASSES else 0
    for place, (name, values) in enumerate(ranked):
        if left_out and place == HIGHEST:
            table.add_row(f"… {left_out} more", *[""] * 7)
        if left_out and HIGHEST <= place < HIGHEST + left_out:
            continue
        shares = [f"{values[key]:.1f}" for key in ("AP", "precision", "recall", "F1")]
        counts = [f"{values[key]:,}" for key in ("positives", "tagged")]
        table.add_row(name, *shares, f"{values['threshold']:.3g}", *counts)
    return table


def _tell_calibration(found: Calibration, model: str, place: Path, out: Path | None) -> None:
    console = Console()
    say = _teller(console)
    values = list(found.entry["values"].values())
    say(f"thresholds of {len(values)} classes, {min(values):.3g} to {max(values):.3g}: {found.entry['how']}")
    failed = found.entry["on"]["images_failed"]
    if failed:
        say(f"images that failed and had no part in this: {failed:,}; `cliplet eval` names them")
    if found.by_class and found.by_global and found.in_sample:
        table = Table("", *_right("CF1", "OF1"), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        rows = {
            "a threshold for each class, on held-out images": found.by_class,
            "one threshold for all, on held-out images": found.by_global,
            "a threshold for each class, on the same images": found.in_sample,
        }
        for name, quality in rows.items():
            table.add_row(name, f"{100 * quality.CF1:.2f}", f"{100 * quality.OF1:.2f}")
        console.print(table)
        if found.by_global.OF1 >= found.by_class.OF1 and found.by_global.CF1 >= found.by_class.CF1:
            say(f"one threshold for all, {found.entry['global']['value']}, does as well on held-out images")
    if found.few:
        say(f"too few positives, so the global threshold: {_some(list(found.few))}")
    say(f"wrote {place}")
    use = f" --thresholds {out}" if out else ""
    say(f"next: cliplet eval {model} --data … --root …{use}, on images that had no part in this")


def _right(*headers: str) -> list[Column]:
    return [Column(header, justify="right") for header in headers]


def _teller(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_CLASSES} more" if len(names) > MOST_CLASSES else ""
    return ", ".join(names[:MOST_CLASSES]) + more
