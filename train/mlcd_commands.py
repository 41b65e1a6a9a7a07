"""The verb `cliplet train mlcd`: a trunk from a folder of images that nobody has labelled."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Column, Table

from cliplet.errors import UsageError

from .mlcd_recipe import LOSSES, MlcdRecipe, mlcd_recipe
from .report_lines import tell_lost

FOLDER = click.Path(path_type=Path, file_okay=False)
DEFAULT = mlcd_recipe("mlcd")
# Flags that stand for a field of the recipe; every other field goes through --set.
FIELD_FLAGS = (
    "teacher",
    "clusters",
    "positives",
    "trunk",
    "epochs",
    "batch",
    "image_size",
    "learning_rate",
    "negative_rate",
    "seed",
    "precision",
)
# Flags of another name than their field's.
FLAG_NAMES = {"batch": "--batch-size"}
ROWS = 10  # of the history that are shown


def _flag(*names: str, field: str, told: str, kind: Any = int) -> Any:
    default = getattr(DEFAULT, field)
    return click.option(*names, field, type=kind, help=f"{told} [default: {default}]")


@click.command()
@click.option(
    "--data",
    "sources",
    multiple=True,
    metavar="FOLDER",
    help="The images: a folder, a list, an archive or a pattern, as `cliplet label` takes them; may be repeated. "
    "[required, but for --show]",
)
@click.option(
    "--out",
    type=FOLDER,
    help="Folder of the results; the same command continues there. [required, but for --show]",
)
@_flag(
    "--teacher",
    field="teacher",
    kind=str,
    told="Whose embeddings are clustered: a CLIP (of photographs open_clip:ViT-B-32/laion2b_s34b_b79k, since tiny "
    "knows drawn scenes only), mlcd:FOLDER (a vision tower or a trunk), or the folder of a trunk or a classifier.",
)
@_flag("--clusters", field="clusters", told="Number of clusters; 0 is one for every 20 images.")
@_flag("--positives", field="positives", told="Nearest clusters of an image that are its labels.")
@_flag(
    "--trunk",
    field="trunk",
    kind=str,
    told="What learns: a timm model, or open_clip:ARCHITECTURE (features only, starts no student).",
)
@_flag("--epochs", field="epochs", told="Passes over the images.")
@_flag("--batch-size", field="batch", told="Images a step over all processes.")
@_flag("--image-size", field="image_size", told="Side of the trunk's input.")
@_flag("--learning-rate", field="learning_rate", kind=float, told="Largest of the run.")
@_flag(
    "--negative-rate",
    field="negative_rate",
    kind=float,
    told="Share of the other clusters drawn at each step.",
)
@click.option(
    "--loss", type=click.Choice(list(LOSSES)), default="mlcd", show_default=True, help="What is minimised."
)
@_flag("--seed", field="seed", told="Of everything random.")
@_flag(
    "--precision",
    field="precision",
    kind=click.Choice(["fp32", "bf16", "fp16"]),
    told="What it computes in; read back.",
)
@click.option(
    "--embeddings",
    type=FOLDER,
    help="Folder of the teacher's embeddings, to share them between runs; --overwrite leaves it alone. "
    "Default: in --out.",
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="A setting of the recipe that has no option of its own; --show lists them.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Refused, never replaced, if it cannot be used.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Threads that decode, for embeddings and for training (0: one a core).",
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of torch on the CPU (0: its own choice).",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Forget what an earlier run left in --out; embeddings there that fit and are sound are kept, and images "
    "that failed are tried again.",
)
@click.option("--show", is_flag=True, help="Print the complete recipe and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def mlcd(
    out: Path | None, loss: str, settings: tuple[str, ...], show: bool, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Train a trunk on images without labels by multi-label cluster discrimination (MLCD, An et al. 2024).

    A teacher's embeddings of the images are clustered, and the trunk learns to tell each image's nearest clusters
    from the others. Writes OUT/trunk, which starts a classifier: `cliplet train folder_ccd --trunk mlcd:OUT/trunk`.
    A labels.csv beside the images, if there is one, only tells how pure the clusters are.
    A killed run continues. Of several GPUs all are used by: torchrun --nproc-per-node N -m cliplet.cli train mlcd …
    """
    from .train_commands import parsed_settings

    _refuse_flags_in(settings)
    asked = {name: options[name] for name in FIELD_FLAGS if options[name] is not None}
    recipe = replace(mlcd_recipe(loss), **{**parsed_settings(settings, MlcdRecipe), **asked})
    if show:
        click.echo(json.dumps(recipe.to_json(), indent=2))
        return
    if out is None:
        raise UsageError(
            "no folder for the results was named", "--out FOLDER; --show needs none", "--out runs/trunk"
        )
    from cliplet.listing import find_images

    from .cluster_truth import truth_beside
    from .loop import RunOptions
    from .mlcd import MlcdOptions, train_mlcd
    from .world import is_first_process

    images = find_images(options["sources"]).images
    how = MlcdOptions(
        embeddings=options["embeddings"],
        device=options["device"],
        threads=options["threads"],
        overwrite=options["overwrite"],
        run=RunOptions(workers=options["workers"], quiet=options["quiet"]),
        truth_NC=truth_beside(options["sources"], images),
    )
    report = train_mlcd(recipe, images, out, how)
    if not is_first_process():
        return
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    elif not options["quiet"]:
        tell_report(report, out, options["sources"][0])


def _refuse_flags_in(settings: tuple[str, ...]) -> None:
    """Raise `UsageError` for a field that has a flag: of two values one would be passed over without a word."""
    for setting in settings:
        name, _, value = setting.partition("=")
        if name in ("loss", *FIELD_FLAGS):
            flag = FLAG_NAMES.get(name, f"--{name.replace('_', '-')}")
            raise UsageError(f"--set {setting}", f"{flag}, the option for it", f"{flag} {value or 'VALUE'}")


def tell_report(report: Mapping[str, Any], out: Path, source: str) -> None:
    """Say what was learned from, how the clusters are, how the epochs went, and what to do next."""
    images, clusters = report["images"], report["clusters"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{images['learned']:,} images learned from in {clusters['count']:,} clusters, {report['precision']} on "
        f"{report['device']}"
    )
    tell_lost(console, images["unreadable"], report["skipped"])
    sizes = clusters["sizes"]
    console.print(
        f"clusters of {sizes['smallest']:,} to {sizes['largest']:,} images, mean cosine to the nearest centre "
        f"{clusters['similarity'][0]:.3f}, {clusters['reseeded']:,} empty ones re-seeded"
    )
    if clusters["duplicates"]:
        console.print(f"duplicates among the images (the very same embedding): {clusters['duplicates']:,}")
    quality = clusters.get("quality", {})
    if quality.get("labelled_images"):
        console.print(_quality_line(quality), markup=False)
    console.print(_epochs(report["history"]))
    trunk = out / "trunk"
    console.print(f"a trunk in {trunk}, the whole report in {out / 'report.json'}")
    console.print("\n".join(_next_commands(report["recipe"]["trunk"], out, source)), markup=False)


def _quality_line(quality: Mapping[str, Any]) -> str:
    """What is told of clusters whose images have labels; a single positive leaves no conflict to speak of."""
    conflict = "" if quality["conflict"] is None else f"conflict {quality['conflict']:.1%}, "
    return (
        f"against the labels of {quality['labelled_images']:,} images: purity {quality['purity']:.1%}, {conflict}"
        f"normalised mutual information {quality['nmi']:.2f}"
    )


def _next_commands(name: str, out: Path, source: str) -> list[str]:
    """What may follow; a tower of open_clip's starts no student, whose feature maps timm's models alone give."""
    trunk, features = shlex.quote(str(out / "trunk")), shlex.quote(f"{out}-features")
    student = (
        f"cliplet train folder_ccd --root {shlex.quote(source)} --classes FILE --trunk mlcd:{trunk} --out "
    )
    lines = [] if name.startswith("open_clip:") else [student + shlex.quote(f"{out}-ccd")]
    lines += [
        f"cliplet export {trunk} --out {features} && cliplet verify {features}",
        f"cliplet train probe {trunk} --data folder --root LABELLED_FOLDER --out {shlex.quote(f'{out}-probe')}",
    ]
    return [f"{'next: ' if not number else '      '}{line}" for number, line in enumerate(lines)]


def _epochs(history: list[dict[str, Any]]) -> Table:
    """About ten rows of the history, the first and the last among them."""
    columns = ["epoch", "loss", "images/s", "seconds"]
    table = Table(*(Column(c, justify="right") for c in columns), box=box.SIMPLE_HEAD)
    every = -(-len(history) // ROWS)
    for row in history:
        if row["epoch"] % every == 0 or row is history[-1]:
            cells = [f"{row['loss']:.4f}", f"{row['images_per_second']:,.0f}", f"{row['seconds']:,.0f}"]
            table.add_row(str(row["epoch"] + 1), *cells)
    return table
