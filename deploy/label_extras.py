"""What `cliplet label` offers beyond one process and one table: partitions, Ray, files for other programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cliplet.errors import UsageError

if TYPE_CHECKING:
    from cliplet.label_writers import Written

    from .label import DryRun, LabelJob, LabelResult
    from .partitions import DividedResult, Division

C = TypeVar("C", bound=Callable[..., Any])
XMP_STYLE = "basename"
# Reasons that are told for side-cars that were left alone.
MOST_REASONS = 8


def extra_options(command: C) -> C:
    """The options that `take_extras` takes, and those of a LabelJob about Ray."""
    options = [
        click.option("--partitions", type=int, help="Divide the inputs among so many runs with the same --out. Without --partition: join what they made."),
        click.option("--partition", type=int, help="Label this one of them, from 0. The last to finish joins all."),
        click.option("--ray", help="Label on a Ray cluster: local (start one here), auto, HOST:PORT or ray://HOST:PORT."),
        click.option("--ray-workers", type=int, default=0, help="Engines in the cluster (0: as many as it has room for). On GPUs one each."),
        click.option("--write", "formats", envvar="CLIPLET_LABEL_WRITE", multiple=True, help="Also write csv, jsonl, coco into --out, or xmp side-cars beside the images. A list with commas, or several times."),
        click.option("--xmp-style", help="Of --write xmp. basename: a.xmp (Adobe), the default. full: a.jpg.xmp (darktable, digiKam)."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Extras:
    """What the options ask for.

    Attributes:
        division: which partition; None for an undivided job.
        formats: of files for other programs.
        xmp_style: how side-cars are named, if they are among them.
    """

    division: Division | None
    formats: tuple[str, ...]
    xmp_style: str


def take_extras(options: dict[str, Any]) -> Extras:
    """What the options ask for; they are taken out of `options`.

    Raises:
        UsageError: they contradict each other, or name what is not known.
    """
    from cliplet.label_writers import check_xmp_style, parse_formats

    from .partitions import Division

    of, index = options.pop("partitions"), options.pop("partition")
    if of is None and index is not None:
        raise UsageError(
            f"--partition {index} without --partitions",
            "how many there are",
            f"--partitions N --partition {index}",
        )
    formats = parse_formats(",".join(options.pop("formats")))
    style: str | None = options.pop("xmp_style")
    if style is not None and "xmp" not in formats:
        raise UsageError(
            f"--xmp-style {style} without --write xmp",
            "side-cars to name so",
            f"--write {','.join((*formats, 'xmp'))} --xmp-style {style}",
        )
    division = None if of is None else Division(of, index)
    return Extras(division, formats, check_xmp_style(style or XMP_STYLE))


def plan_extras(job: LabelJob, extras: Extras) -> DryRun:
    """What a run would do."""
    from .label import dry_run
    from .partitions import dry_run_divided

    return dry_run(job) if extras.division is None else dry_run_divided(job, extras.division)


def label_with_extras(job: LabelJob, extras: Extras) -> tuple[DividedResult, list[Written]]:
    """Label, and write what else was asked for as soon as all inputs are settled."""
    from cliplet.label_writers import write_labels

    from .label import label
    from .partitions import DividedResult, label_divided

    if extras.division is None:
        whole = label(job)
        result = DividedResult(whole, whole)
    else:
        result = label_divided(job, extras.division)
    if result.whole is None or result.whole.interrupted:
        return result, []
    return result, write_labels(job.out, extras.formats, xmp_style=extras.xmp_style)


def tell_partition(job: LabelJob, division: Division, result: DividedResult, as_json: bool) -> None:
    """Say how a partition ended while others are missing."""
    from cliplet.partition_folders import named

    own = result.own
    assert own is not None
    if as_json:
        facts = {"partition": division.index, "partitions": division.of, "result": vars(own)}
        click.echo(json.dumps({**facts, "missing": list(result.missing), "out": str(job.out)}, indent=2))
    elif not job.quiet:
        state = "interrupted, all work saved: " if own.interrupted else ""
        click.echo(f"{state}partition {division.index} of {division.of}: {_counts(own)}")
        if own.interrupted:
            click.echo("next: the same command continues")
        else:
            click.echo(f"not finished yet ({len(result.missing):,}): {named(list(result.missing))}")
            click.echo("next: those, in any order; the last one joins all")


def tell_written(written: Sequence[Written]) -> None:
    """Say what was written for other programs, and what could not be."""
    for one in written:
        if one.file is not None:
            click.echo(f"wrote {one.file} ({one.file.stat().st_size / 1e6:.2f} MB, {one.rows:,} images)")
            continue
        click.echo(f"side-cars: {one.rows:,} hold their image's labels, {one.changed:,} of them written now")
        for reason, count in one.skipped.items():
            click.echo(f"  {count:,} without: {reason}")
        reasons = Counter(reason for _, reason in one.failures)
        for reason, count in reasons.most_common(MOST_REASONS):
            example = next(sidecar for sidecar, why in one.failures if why == reason)
            click.echo(f"  {count:,} not touched: {reason}; such as {example}")


def written_facts(written: Sequence[Written]) -> list[dict[str, Any]]:
    """The same for a program."""
    return [{**vars(one), "file": str(one.file) if one.file else None} for one in written]


def _counts(result: LabelResult) -> str:
    return f"{result.labelled:,} of {result.inputs:,} inputs labelled, {result.failed:,} failed"
