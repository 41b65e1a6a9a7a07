"""The verb `cliplet train`: a recipe's name trains a classifier; others stand beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Column, Table

from cliplet.plan import RUNTIMES

from .classifier_recipe import METHODS, ClassifierRecipe
from .commands import tiny
from .compare_rows import MENDS_ON_REQUEST
from .mlcd_commands import mlcd
from .probe_commands import probe
from .recipes import classifier_recipe, classifier_recipes, data_sets
from .report_lines import tell_lost

FOLDER = click.Path(path_type=Path, file_okay=False)
C = TypeVar("C", bound=Callable[..., Any])
# Flags that stand for a field of the recipe; every other field goes through --set.
FIELD_FLAGS = ("seed", "epochs", "batch", "learning_rate", "precision", "teacher", "trunk")


class Recipes(click.Group):
    """The group `train`: every recipe of a classifier is a subcommand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        shown = (n for n in classifier_recipes() if n.endswith(("_ccd", "_ccd_released")))
        return [*super().list_commands(ctx), *shown]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        return own if own is not None or cmd_name not in classifier_recipes() else recipe_command(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            classifier_recipe(args[0])  # raises what names the closest recipe
        return super().resolve_command(ctx, args)


def run_options(command: C) -> C:
    """The options of everything that trains: where the images are, on what it runs."""
    options = [
        click.option("--out", type=FOLDER, required=True, help="Folder of the results; the same command continues there."),
        click.option("--root", type=click.Path(path_type=Path), help="The data set's folder. Default: scenes are made for the recipes of the scene world."),
        click.option("--classes", help="Class file, or names separated by commas. Default: the data set's own."),
        click.option("--no-count-check", is_flag=True, help="Take a public data set with another number of images than the official one."),
        click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="Any other setting of the recipe; --show lists them."),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Refused, never replaced, if it cannot be used."),
        click.option("--teacher-runtime", type=click.Choice(RUNTIMES), help="Engine of the teacher, where it scores in batches. Default: onnx, or torch where the recipe feeds it another normalisation than its own."),
        click.option("--workers", type=click.IntRange(min=0), default=2, show_default=True, help="Threads that decode."),
        click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="Of torch on the CPU (0: its own choice)."),
        click.option("--quiet", is_flag=True, help="No progress and no summary."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def recipe_command(name: str) -> click.Command:
    """The subcommand of one recipe."""
    recipe = classifier_recipe(name)

    @click.command(name=name, help=_help(name, recipe), short_help=_short_help(name, recipe))
    @run_options
    @click.option("--seed", type=int, help=f"Of everything random. [default: {recipe.seed}]")
    @click.option("--epochs", type=int, help=f"Passes over the images. [default: {recipe.epochs}]")
    @click.option(
        "--batch-size", "batch", type=int, help=f"Images a step over all processes. [default: {recipe.batch}]"
    )
    @click.option("--learning-rate", type=float, help=f"Of the trunk. [default: {recipe.learning_rate}]")
    @click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16", "fp16"]),
        help=f"What it computes in; read back. [default: {recipe.precision}]",
    )
    @click.option("--teacher", help=f"Which CLIP labels. [default: {recipe.teacher}]")
    @click.option(
        "--trunk",
        help="A timm model, or mlcd:FOLDER with the weights it brings: what `train mlcd` learned, or a vision tower. "
        f"[default: {recipe.trunk}]",
    )
    @click.option(
        "--banks",
        type=FOLDER,
        help="Folder of the teacher's answers, to share them between runs. Default: in --out.",
    )
    @click.option("--overwrite", is_flag=True, help="Forget what an earlier run left in --out.")
    @click.option("--show", is_flag=True, help="Print the complete recipe and stop.")
    @click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
    def command(
        out: Path, show: bool, as_json: bool, quiet: bool, settings: tuple[str, ...], **options: Any
    ) -> None:
        asked = {key: options[key] for key in FIELD_FLAGS if options[key] is not None}
        chosen = replace(recipe, **{**_brought(options["trunk"]), **parsed_settings(settings), **asked})
        if show:
            click.echo(json.dumps(chosen.to_json(), indent=2))
            return
        from .train_classifier import train_classifier
        from .world import is_first_process

        report = train_classifier(chosen, out, _train_options(options, quiet))
        if not is_first_process():
            return
        if as_json:
            click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        elif not quiet:
            tell_report(report, out, options["root"] or out / "scenes")

    return command


def _brought(trunk: str | None) -> dict[str, str]:
    """What a trunk that was asked for decides besides: a folder brings its weights."""
    return {"trunk_weights": "pretrained"} if trunk is not None and trunk.startswith("mlcd:") else {}


def _help(name: str, recipe: ClassifierRecipe) -> str:
    return (
        f"Train a {recipe.trunk} on {recipe.dataset}: {METHODS[recipe.method]}.\n\n"
        f"{recipe.teacher} labels the images. Writes OUT/classifier, OUT/report.json and curves for TensorBoard; "
        "a killed run continues. Of several GPUs all are used by: torchrun --nproc-per-node N -m cliplet.cli "
        f"train {name} --device cuda …"
    )


def _short_help(name: str, recipe: ClassifierRecipe) -> str:
    if name.endswith("released"):
        return "CCD as the public code runs it, its oddities included."
    others = f"; also {recipe.dataset}_an, _ll_r, …" if recipe.method == "ccd" else ""
    return f"{recipe.method.upper()} on {recipe.dataset}{others}"


def parsed_settings(settings: tuple[str, ...], recipe: type[Any] = ClassifierRecipe) -> dict[str, Any]:
    """Fields of a kind of recipe from NAME=VALUE.

    Raises:
        UsageError: no such field, or a value of another type.
    """
    import difflib

    from cliplet.errors import UsageError

    kinds = {f.name: type(f.default) for f in fields(recipe) if f.name != "dataset"}
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if name not in kinds or not equals:
            close = difflib.get_close_matches(name, kinds, 1)
            raise UsageError(
                f"--set {setting}",
                f"NAME=VALUE with one of {', '.join(sorted(kinds))}",
                f"--set {close[0] if close else 'seed'}=VALUE",
            )
        try:
            found[name] = _value(kinds[name], text)
        except ValueError as error:
            raise UsageError(f"--set {setting}", f"a value that is a {kinds[name].__name__}") from error
    return found


def _value(kind: type, text: str) -> Any:
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    return kind(text)


def _data_options(options: Mapping[str, Any]) -> Any:
    from cliplet.vocabulary import read_vocabulary

    from .run_data import DataOptions

    vocabulary = None if options["classes"] is None else read_vocabulary(options["classes"])
    return DataOptions(options["root"], vocabulary, not options["no_count_check"])


def _train_options(options: Mapping[str, Any], quiet: bool) -> Any:
    from .loop import RunOptions
    from .train_classifier import TrainOptions

    return TrainOptions(
        data=_data_options(options),
        banks=options["banks"],
        device=options["device"],
        threads=options["threads"],
        teacher_runtime=options["teacher_runtime"],
        overwrite=options["overwrite"],
        run=RunOptions(workers=options["workers"], quiet=quiet),
    )


def tell_report(report: Mapping[str, Any], out: Path, root: Path) -> None:
    """Say what was learned from, how the epochs went, what was chosen, and what to do next."""
    images, recipe = report["images"], report["recipe"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{images['learned']:,} images learned from, {images['held_out']:,} held out, {report['precision']} on "
        f"{report['device']}"
    )
    measured = report["measured"]
    not_evaluated = measured.get("unreadable", {})
    tell_lost(console, images["unreadable"], report["skipped"], not_evaluated)
    for line in _doubts(report):
        console.print(line, style="yellow")
    console.print(_epochs(report))
    if measured:
        evaluation = report["evaluation"]
        console.print(
            f"mAP {measured['map']:.1f} on {evaluation['images'] - len(not_evaluated):,} images of "
            f"{evaluation['name']} {evaluation['split']} (last epoch {measured['last_map']:.1f}); "
            f"chosen: epoch {report['chosen_epoch'] + 1}"
        )
    console.print(f"a classifier in {out / 'classifier'}, the whole report in {out / 'report.json'}")
    console.print(f"next: cliplet eval {out / 'classifier'} --data {recipe['dataset']} --root {root}")


def _doubts(report: Mapping[str, Any]) -> list[str]:
    """What went otherwise than the method means it to, a line each."""
    recipe, bias = report["recipe"], report["labels"].get("bias", {})
    unsure = [name for name, found in bias.items() if not found["sure_images"]]
    lines = []
    if unsure:
        lines.append(f"no image is surely of {', '.join(unsure)}: bias taken from the {recipe['bias_guard']}")
    low = recipe["mean_classes"]
    return lines + [
        f"epoch {row['epoch'] + 1} found no threshold with {low:g} to {low + 2:g} classes an image: "
        f"the walk ended at {row['threshold']:.3f}"
        for row in report["history"]
        if not row.get("threshold_found", True)
    ]


def _epochs(report: Mapping[str, Any]) -> Table:
    columns = ["epoch", "loss", "held-out mAP", "mAP", "labels' mAP", "regions an image", "seconds"]
    keys = ["loss", "held_out_map", "eval_map", "label_map", "regions_per_image", "seconds"]
    digits = [4, 1, 1, 1, 1, 0]
    table = Table(*(Column(c, justify="right") for c in columns), box=box.SIMPLE_HEAD)
    for row in report["history"]:
        cells = [f"{row[k]:.{d}f}" if k in row else "" for k, d in zip(keys, digits, strict=True)]
        chosen = "*" if row["epoch"] == report["chosen_epoch"] else ""
        table.add_row(f"{chosen}{row['epoch'] + 1}", *cells)
    return table


@click.group(cls=Recipes)
def train() -> None:
    """Train a classifier from images without labels, by a recipe: `cliplet train scenes_ccd --out runs/scenes`.

    Recipes are named DATASET_METHOD; data sets: scenes, voc12, voc07, coco14, coco17, nus, folder, and ccd for the
    arrays that CCD's public code reads; methods: ccd, cdul, an, an_ls, wan, epr, role, durand, ll_r,
    ll_ct, ll_cp, asl, and with true labels bce, bce_ls.
    """


train.add_command(tiny)
train.add_command(mlcd)
train.add_command(probe)


@train.command()
@run_options
@click.option(
    "--data",
    type=click.Choice(data_sets()),
    required=True,
    help="Which data set's recipes. folder: with --set eval_split=all and a labels.csv beside the images.",
)
@click.option(
    "--rows", help=f"Only these rows, separated by `|`. Default: all but: {' | '.join(MENDS_ON_REQUEST)}."
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each row.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
def compare(
    data: str, out: Path, rows: str | None, settings: tuple[str, ...], quiet: bool, **options: Any
) -> None:
    """Train every method and every part of CCD with several seeds; a table, a plot, the papers' numbers beside.

    Runs that are done are not repeated, so a stopped comparison continues.
    """
    from .compare import CompareOptions, markdown
    from .compare import compare as compare_rows

    chosen = CompareOptions(
        names=tuple(r.strip() for r in rows.split("|")) if rows else (),
        seeds=options["seeds"],
        jobs=options["jobs"],
        threads=options["threads"],
        workers=options["workers"],
        data=_data_options(options),
        device=options["device"],
        teacher_runtime=options["teacher_runtime"],
        overrides=parsed_settings(settings),
        quiet=quiet,
    )
    result = compare_rows(data, out, chosen)
    if not quiet:
        click.echo(markdown(result))
        click.echo(f"written: {out / 'compare.md'}, compare.json, compare.png")


@train.command(name="import")
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", type=FOLDER, required=True, help="Folder of the classifier.")
@click.option(
    "--classes", help="Class file, or names separated by commas. Default: those of the checkpoint's data set."
)
def import_checkpoint(checkpoint: Path, out: Path, classes: str | None) -> None:
    """Turn a CHECKPOINT of the public CCD code (bestccd.pt) into a classifier with the same outputs.

    Only tensors are read: a file that would run code is refused.
    """
    from cliplet.vocabulary import read_vocabulary

    from .import_ccd import import_ccd

    folder = import_ccd(checkpoint, out, None if classes is None else read_vocabulary(classes))
    click.echo(f"a classifier in {folder}")
    click.echo(f"next: cliplet eval {folder} --data voc12 --root VOCdevkit")
