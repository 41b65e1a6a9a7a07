"""The verb `cliplet scenes`, and `cliplet train tiny`; each imports what it needs only when it runs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--out", type=FOLDER, required=True, help="Folder to write to; made where it is missing.")
@click.option("--count", default=1000, show_default=True, help="Number of scenes.")
@click.option("--seed", default=0, show_default=True, help="Another seed is another world.")
@click.option(
    "--part",
    type=click.Choice(["train", "test-seen", "test-unseen"]),
    default="train",
    show_default=True,
    help="test-seen: the training drawings in other scenes. test-unseen: only the held-out drawings.",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["voc", "coco"]),
    default="voc",
    show_default=True,
    help="Pascal VOC's folders and XML, or COCO's instances JSON.",
)
@click.option("--sprites", type=FOLDER, help="Your own cut-outs: a folder of CLASS/*.png with alpha.")
@click.option("--max-objects", default=5, show_default=True, help="Most objects in a scene.")
@click.option("--workers", default=2, show_default=True, help="Processes; the files do not depend on it.")
def scenes(
    out: Path,
    count: int,
    seed: int,
    part: str,
    layout: str,
    sprites: Path | None,
    max_objects: int,
    workers: int,
) -> None:
    """Write images of several known objects with exact truth, made from cut-out drawings.

    Writes JPEGs, their boxes (VOC or COCO), classes.txt and labels.csv. Scene i of a seed is always the same.
    """
    from cliplet.progress import ProgressBar
    from cliplet.scene_files import write_scenes
    from cliplet.scenes import scene_world

    world = scene_world(part, seed=seed, sprites=sprites, max_objects=max_objects)
    with ProgressBar("scenes", count, "scenes") as bar:
        done = write_scenes(world, out, count, layout=layout, workers=workers, progress=bar.advance)
    click.echo(
        f"{done.scenes:,} {part} scenes of {len(world.classes)} classes, {done.size / 1e6:.1f} MB, in {out}"
    )
    click.echo(f"next: cliplet label {done.images} --classes {out / 'classes.txt'} --out {out / 'labels'}")


@click.command()
@click.option("--out", type=FOLDER, required=True, help="Folder of the model; made where it is missing.")
@click.option("--seed", type=int, help="Of everything random.")
@click.option("--scenes", type=int, help="Scenes made for training.")
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option("--batch", type=int, help="Image-caption pairs in a step.")
@click.option("--evaluation-scenes", type=int, help="Scenes for each number measured.")
@click.option("--workers", type=int, help="Processes that make scenes.")
def tiny(out: Path, **overrides: int | None) -> None:
    """Train the embedded CLIP from scratch on captioned scenes (under 40 minutes on two cores).

    Writes an open_clip model folder of at most 10 MB with its recipe, metrics and README.
    """
    from cliplet.progress import ProgressBar

    from .recipes import tiny_clip
    from .tiny_clip import train_tiny

    chosen: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    recipe = replace(tiny_clip(), **chosen)
    units = {"scenes": "scenes", "train": "steps", "evaluation": "parts"}
    with ExitStack() as stack:
        bars: dict[str, ProgressBar] = {}

        def progress(stage: str, items: int, total: int) -> None:
            if stage not in bars:
                stack.close()
                bars[stage] = stack.enter_context(ProgressBar(stage, total, units[stage]))
            bars[stage].advance(items)

        report = train_tiny(recipe, out, progress)
    size = sum(path.stat().st_size for path in out.iterdir())
    seen, unseen = (report[part]["single_object_top1"] for part in ("test-seen", "test-unseen"))
    click.echo(
        f"zero-shot top-1: {seen:.1f} % on drawings it knows, {unseen:.1f} % on a drawing set it never saw"
    )
    click.echo(f"a CLIP of {size / 1e6:.1f} MB in {out}")
    click.echo(f"next: cliplet label IMAGES --model open_clip:local-dir:{out} --out labels")
