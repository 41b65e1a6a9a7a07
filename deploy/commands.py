"""The verbs `label`, `gallery`, `doctor` and `demo`: options in, functions called, results told.

Everything heavy is imported inside a command, so that `--help` is quick.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from cliplet.errors import INTERRUPTED
from cliplet.plan import DEVICES, PRECISIONS, RUNTIMES
from cliplet.server_address import SHARED_MEMORY, ConnectionSettings

from .label_extras import (
    extra_options,
    label_with_extras,
    plan_extras,
    take_extras,
    tell_partition,
    tell_written,
    written_facts,
)

if TYPE_CHECKING:
    from cliplet.label_writers import Written

    from .demo import DemoResult
    from .label import DryRun, LabelJob, LabelResult

C = TypeVar("C", bound=Callable[..., Any])
# Classes that the summary of a run names.
MOST_CLASSES = 12
MOST_REASONS = 8


def tagger_options(command: C) -> C:
    """The options that name a model and how it looks; the same for every verb that scores images."""
    options = [
        click.option("--model", default="tiny", show_default=True, help="tiny, open_clip:ARCH/PRETRAINED, open_clip:ARCH/PATH, the folder of a bundle or a classifier, or triton://HOST:PORT/NAME of a server."),
        click.option("--classes", help="Class file (one `name: synonym, synonym` a line), or names separated by commas. Default: the model's own."),
        click.option("--prompts", help="Prompt set (photo, ensemble7, ccd, plain), or templates with {} separated by |."),
        click.option("--views", help="Where to look: 1, 1+2x2, 1+3x3, 1+2x2+3x3+4x4, … Default: 1+3x3, or 1 for a classifier."),
        click.option("--aggregate", type=click.Choice(["cdul", "max", "mean"]), help="How the views' probabilities become one score. Default: cdul, or the bundle's. Not for a classifier."),
        click.option("--zeta", type=float, help="cdul: local maximum where it reaches this, local minimum elsewhere. Default: 0. Not for a classifier."),
        click.option("--threshold", type=float, help="Score from which on a class is a label. Default: the model's own."),
        click.option("--runtime", type=click.Choice(RUNTIMES), default="auto", show_default=True, help="auto: the fastest that is installed and, for a bundle, in it. torch: the eager reference."),
        click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of the encoder. Refused, never replaced, if it cannot be had."),
        click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True, help="Refused, never replaced, if it cannot be used."),
        click.option("--threads", type=int, default=0, help="Threads of the engine (0: one a core)."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def connection_options(command: C) -> C:
    """The options that say how to talk to the server of a model `triton://…`: the fields of `ConnectionSettings`."""
    options = [
        click.option("--token", envvar="CLIPLET_TOKEN", help="Of the server. Better given as $CLIPLET_TOKEN: others see command lines."),
        click.option("--ca", type=click.Path(path_type=Path), envvar="CLIPLET_CA", help="Certificates (PEM) that the server's own is signed by. Default: the system's."),
        click.option("--deadline", type=float, help="Seconds that a server has for an answer. Default: 60."),
        click.option("--retries", type=int, help="Further tries after a failure that may pass. Default: 4."),
        click.option("--wait-for-server", type=float, default=300.0, show_default=True, help="Seconds to wait for a server that has gone away in the middle of the work."),
        click.option("--in-flight", type=int, help="Most requests at a time to a server. Default: 8."),
        click.option("--shared-memory", type=click.Choice(SHARED_MEMORY), help="Tensors go to a server on this machine through memory that both see. Default: auto, where that is possible."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def take_connection(options: dict[str, Any]) -> ConnectionSettings:
    """What the connection options ask for; they are taken out of `options`."""
    names = {"deadline": "deadline_s", "wait_for_server": "wait_s"}
    flags = ("token", "ca", "deadline", "retries", "wait_for_server", "in_flight", "shared_memory")
    given = {names.get(flag, flag): options.pop(flag) for flag in flags}
    return ConnectionSettings(**{name: value for name, value in given.items() if value is not None})


@click.command()
@click.argument("sources", nargs=-1, required=True)
@tagger_options
@connection_options
@extra_options
@click.option("--out", type=click.Path(path_type=Path), default=Path("labels"), show_default=True)
@click.option("--batch-size", type=int, default=0, help="Images in a batch (0: by the number of views).")
@click.option(
    "--workers",
    type=int,
    default=0,
    help="Threads that decode (0: one a core). Without effect where a server decodes itself.",
)
@click.option(
    "--streams",
    type=int,
    default=1,
    show_default=True,
    help="Batches at a time in an engine on the CPU. `cliplet bench --streams 1,2` tells whether more help.",
)
@click.option("--limit", type=int, help="Label only the first so many inputs.")
@click.option(
    "--max-pixels", type=int, default=178_956_970, show_default=True, help="Larger images are errors."
)
@click.option("--retry-failed", is_flag=True, help="Try the inputs in errors.parquet again.")
@click.option("--overwrite", is_flag=True, help="Forget what --out holds.")
@click.option("--max-error-rate", type=float, help="Exit with 4 if a larger share of the inputs failed.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@click.option(
    "--json", "as_json", is_flag=True, envvar="CLIPLET_LABEL_JSON", help="Print the result as JSON."
)
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def label(sources: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any) -> int:
    """Label the images in SOURCES: folders, globs, files, text lists (*.txt), tar shards, or URLs of these.

    Every input ends in one row of OUT/labels/part-*.parquet or one row of OUT/errors.parquet. The same command
    continues a run that was stopped or killed.
    """
    from cliplet.plan import TaggerSettings

    from . import label as labelling

    names = {f.name for f in fields(TaggerSettings)}
    connection = take_connection(options)
    extras = take_extras(options)
    settings = TaggerSettings(**{k: v for k, v in options.items() if k in names}, connection=connection)
    job = labelling.LabelJob(
        sources=sources, tagger=settings, **{k: v for k, v in options.items() if k not in names}
    )
    if dry_run:
        _tell_dry_run(plan_extras(job, extras), as_json)
        return 0
    divided, written = label_with_extras(job, extras)
    result = divided.whole
    if result is None:
        assert extras.division is not None and divided.own is not None
        tell_partition(job, extras.division, divided, as_json)
        return INTERRUPTED if divided.own.interrupted else 0
    _tell_result(job, result, as_json, written)
    if result.interrupted:
        return INTERRUPTED
    labelling.hold_objective(job, result)
    return 0


@click.command()
@click.argument("labels", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="The page to write. Default: LABELS/gallery.html."
)
@click.option("--limit", type=int, default=1000, show_default=True, help="Most images on the page.")
@click.option(
    "--thumb", type=int, default=256, show_default=True, help="Longest side of a thumbnail in pixels."
)
@click.option("--title", default="", help="Heading of the page.")
def gallery(labels: Path, out: Path | None, limit: int, thumb: int, title: str) -> int:
    """Make one HTML page of the images in LABELS that opens offline, with a live threshold.

    LABELS is a folder that `cliplet label` wrote, with a model of this machine or through a server (triton://) alike.
    """
    from .gallery import GalleryOptions, write_gallery

    summary = write_gallery(
        labels, out or labels / "gallery.html", GalleryOptions(limit=limit, thumb=thumb, title=title)
    )
    click.echo(f"wrote {summary.file} ({summary.bytes / 1e6:.1f} MB): {summary.statement}")
    if summary.errors:
        click.echo(f"{summary.errors:,} inputs without labels are listed with their reasons")
    if summary.without_thumbnail:
        click.echo(f"{summary.without_thumbnail:,} images could not be read any more and have no thumbnail")
    click.echo(f"open {summary.file.resolve().as_uri()}")
    return 0


@click.command()
@click.option("--deep", is_flag=True, help="Also import torch and look for GPUs through it (slow).")
@click.option(
    "--json", "as_json", is_flag=True, envvar="CLIPLET_DOCTOR_JSON", help="Print the findings as JSON."
)
def doctor(deep: bool, as_json: bool) -> int:
    """Say what this machine can do, and what to install for the rest.

    Exit code 0 if images can be labelled here, 1 if not.
    """
    from cliplet import doctor as examination

    findings = examination.examine(deep=deep)
    if as_json:
        click.echo(examination.as_json(findings))
    else:
        Console().print(examination.report(findings))
    return 0 if examination.can_label(findings) else 1


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--count", type=click.IntRange(min=2), default=300, show_default=True, help="Scenes to make.")
@click.option("--seed", type=int, default=2026, show_default=True, help="Another seed makes other scenes.")
@click.option("--quiet", is_flag=True, help="No progress.")
def demo(out: Path, count: int, seed: int, quiet: bool) -> int:
    """Make scenes whose contents are known, label them with the embedded CLIP, measure, show a gallery."""
    from . import demo as demonstration

    _tell_demo(demonstration.demo(out, count, seed, quiet=quiet))
    return 0


def _tell_dry_run(run: DryRun, as_json: bool) -> None:
    facts = {
        "inputs": run.inputs,
        "settled": run.settled,
        "duplicates": run.listing.duplicates,
        "ignored": run.listing.ignored,
        "model": str(run.plan.spec),
        "classes": len(run.plan.vocabulary.names),
        "views": str(run.plan.views),
        "threshold": _span(run.plan.thresholds),
        "threshold_source": run.plan.threshold_source,
        "runtime": run.plan.runtime,
        "precision": run.plan.settings.precision,
        "images_per_batch": run.images_per_batch,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    click.echo("dry run: nothing was loaded, nothing was written")
    for name, value in facts.items():
        click.echo(f"  {name:<17} {value}")
    for ref in run.listing.images[: min(3, run.inputs)]:
        click.echo(f"  input             {ref.path}")


def _span(values: Sequence[float]) -> float | str:
    """The one value, or from which to which."""
    low, high = min(values), max(values)
    return low if low == high else f"{low:.3g} to {high:.3g}"


def _tell_result(job: LabelJob, result: LabelResult, as_json: bool, written: Sequence[Written] = ()) -> None:
    from .summary import summarise

    if job.quiet and not as_json:
        return
    summary = summarise(job.out)
    if as_json:
        facts: dict[str, Any] = {"result": vars(result), "summary": vars(summary), "out": str(job.out)}
        if written:
            facts["written"] = written_facts(written)
        click.echo(json.dumps(facts, indent=2))
        return
    say = click.echo
    speed = (
        f", {result.scored_now / result.seconds:.1f} images/s" if result.scored_now and result.seconds else ""
    )
    state = "interrupted, all work saved: " if result.interrupted else ""
    say(f"{state}{result.labelled:,} of {result.inputs:,} inputs labelled, {result.failed:,} failed{speed}")
    say(f"threshold: {result.threshold_source}")
    counts = sorted(summary.per_class.items(), key=lambda pair: -pair[1])
    tagged = [f"{name} {count:,}" for name, count in counts if count]
    if tagged:
        more = f", and {len(tagged) - MOST_CLASSES} more classes" if len(tagged) > MOST_CLASSES else ""
        say(f"labels: {', '.join(tagged[:MOST_CLASSES])}{more}; {summary.untagged:,} images without any")
    elif summary.images:
        low, middle, high = summary.best_scores
        say("nothing was tagged: no score reached its threshold")
        say(
            f"  best scores of the images: 10 % below {low:.3f}, half below {middle:.3f}, 90 % below {high:.3f}"
        )
        for share, threshold in summary.threshold_to_tag.items():
            # Rounded down, so that the images at the border are tagged.
            say(f"  --threshold {int(threshold * 1e4) / 1e4} --overwrite would tag {share:.0%} of them")
    for reason, number in list(summary.errors.items())[:MOST_REASONS]:
        say(f"  {number:,} x {reason}")
    files = [*job.out.glob("labels/*.parquet"), *job.out.glob("errors.parquet")]
    say(f"wrote {job.out} ({sum(f.stat().st_size for f in files) / 1e6:.2f} MB in {len(files)} tables)")
    tell_written(written)
    if result.interrupted:
        say("next: the same command continues")
    else:
        say(f"next: cliplet gallery {job.out}")


def _tell_demo(result: DemoResult) -> None:
    names = {"test-seen": "drawings that training knew", "test-unseen": "a drawing set it never saw"}
    table = Table("views", "scenes", "images", "mAP", "F1 of the labels", "images/s")
    for m in result.measured:
        run = result.runs[m.views]
        table.add_row(
            m.views,
            names[m.part],
            str(m.images),
            f"{m.mean_average_precision:.1f}",
            f"{m.micro_f1:.1f}",
            f"{run.scored_now / run.seconds:.0f}",
        )
    console = Console()
    console.print(table)
    console.print(
        "mAP: mean over classes of the all-points average precision, in percent, against the known truth"
    )
    file = result.gallery.file
    console.print(f"gallery: {file} ({result.gallery.bytes / 1e6:.1f} MB)", soft_wrap=True)
    console.print(f"open {file.resolve().as_uri()}", soft_wrap=True)
    console.print(
        "next: cliplet label YOUR_PHOTOS --model open_clip:ViT-B-32/laion2b_s34b_b79k --classes 'cat,dog,…'",
        soft_wrap=True,
    )
