"""The verbs `export`, `verify` and `inspect`: options in, functions called, results told."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Table

from cliplet.engine_sidecar import Profile, shown_bounds
from cliplet.errors import UsageError, explained_os_errors
from cliplet.model_spec import MANIFEST_NAME
from cliplet.plan import OFFERED, PRECISIONS

if TYPE_CHECKING:
    from cliplet.artifact import Bundle

    from .bundle import BuildOptions

C = TypeVar("C", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path, file_okay=False)
# `engine` names the precision that was asked for.
COLUMNS = ("engine", "really", "largest", "cosine", "labels", "mAP", "ms", "views/s", "verdict")
WORDS = ("engine", "really", "verdict")
CALIBRATION_COUNT = 128
# Options without a meaning for engines that were not asked for.
OF_TENSORRT = ("target", "batch", "views", "canvas")
OF_INT8 = ("calibration", "calibration_count")
# A narrower terminal breaks the lines; numbers that are cut off would help nobody.
LEAST_WIDTH = 112


class Row(NamedTuple):
    """One engine in the table: precision really used, agreement, latency of a batch, throughput."""

    engine: str
    really: str
    parity: Mapping[str, Any]
    speed: Mapping[str, Any]
    note: str = ""


def comparison_options(command: C) -> C:
    """The options that say on which images engines are compared."""
    options = [
        click.option("--images", multiple=True, help="Images to compare on: a folder, glob, list or archive. Default: scenes made for it."),
        click.option("--count", type=click.IntRange(min=1), default=32, show_default=True, help="How many of them."),
        click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of the engines (0: one a core)."),
        click.option("--quiet", is_flag=True, help="No table."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _listed(_context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    """Words given by commas, by repetition, or both."""
    words = tuple(word.strip() for value in values for word in value.split(",") if word.strip())
    known = tuple(OFFERED) if parameter.name == "runtime" else PRECISIONS
    for word in words:
        if word not in known:
            raise click.BadParameter(f"{word!r} is not one of {', '.join(known)}.")
    return tuple(dict.fromkeys(words))


def engine_options(command: C) -> C:
    """The options that say which engines a bundle shall hold."""
    options = [
        click.option("--classes", help="Class file, or names separated by commas. Default: the model's own. For a bundle: its new vocabulary."),
        click.option("--prompts", help="Prompt set (photo, ensemble7, ccd, plain), or templates with {} separated by |."),
        click.option("--aggregate", type=click.Choice(["cdul", "max", "mean"]), help="How views become one score. Default: cdul."),
        click.option("--zeta", type=float, help="cdul: local maximum where it reaches this. Default: 0."),
        click.option("--runtime", multiple=True, callback=_listed, help=f"One or more of {', '.join(OFFERED)}. Default: onnx, and openvino where it is installed."),
        click.option("--precision", multiple=True, callback=_listed, help=f"One or more of {', '.join(PRECISIONS)}. Default: fp32."),
        click.option("--calibration", multiple=True, help="Images that INT8 is calibrated on. Default: scenes, which suit tiny."),
        click.option("--calibration-count", type=click.IntRange(min=1), help=f"How many of them. Default: {CALIBRATION_COUNT}."),
        click.option("--target", help="GPU that TensorRT builds for, such as sm89. Default: the one in this machine."),
        click.option("--batch", help=f"Images in a batch that TensorRT builds for: least, usual, most. Default: {shown_bounds(Profile.batch)}."),
        click.option("--views", help=f"Views of an image that TensorRT builds for. Default: {shown_bounds(Profile.views)}."),
        click.option("--canvas", help="Sides of the canvas, in pixels, that TensorRT builds for. Default: all that images may have."),
        click.option("--text/--no-text", default=False, help="Also the text tower, to exchange the vocabulary without the original."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("model")
@click.option("--out", type=FOLDER, required=True, help="Folder of the bundle; made here.")
@engine_options
@comparison_options
@click.option("--overwrite", is_flag=True, help="Replace what --out holds, once the new bundle is whole.")
@click.option(
    "--json", "as_json", is_flag=True, envvar="CLIPLET_EXPORT_JSON", help="Print the engines as JSON."
)
def export(model: str, out: Path, as_json: bool, quiet: bool, overwrite: bool, **options: Any) -> None:
    """Turn MODEL into a bundle in OUT whose every engine was proven to agree with it.

    MODEL is tiny, an open_clip model, the folder of a classifier that was trained, or a bundle, whose vocabulary is
    exchanged without tracing (--classes). The folder of a trunk that was trained, or mlcd:FOLDER, a vision tower of
    transformers', gives unit embeddings in place of labels. Every engine is compared with the eager float32 model on real images,
    through decoding and resizing; if one differs by more than its precision allows, nothing is kept (exit code 3).
    """
    from .bundle import BuildOptions

    build = BuildOptions(
        images=options["images"],
        count=options["count"],
        calibration=options["calibration"],
        calibration_count=options["calibration_count"] or CALIBRATION_COUNT,
        target=options["target"],
        profile=Profile.parse(options["batch"], options["views"], options["canvas"]),
        own_canvas=options["canvas"] is not None,
        text=options["text"],
        threads=options["threads"],
    )
    with _replacing(out, overwrite) as folder:
        bundle = _built(model, folder, build, options)
    bundle = replace(bundle, folder=out)
    if as_json:
        facts = bundle.manifest.to_json()
        click.echo(json.dumps({k: facts[k] for k in ("engines", "dropped")}, indent=2))
    elif not quiet:
        _tell_bundle(bundle)


@contextmanager
def _replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """Context with the folder to build in: `out`, or one beside it that takes its place at the end."""
    if not out.exists() or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        yield out
        return
    if not overwrite:
        raise UsageError(
            f"{out} exists", "a folder that does not exist yet", "choose another --out, or --overwrite"
        )
    if out.is_symlink() or not (out / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{out} is no bundle",
            "a bundle to overwrite: nothing else is ever deleted",
            "choose another --out",
        )
    with explained_os_errors(out):
        place = Path(tempfile.mkdtemp(prefix=f".{out.resolve().name}-", dir=out.resolve().parent))
    try:
        yield place / "new"
        with explained_os_errors(out):
            # The old one is only moved away until the new one is in its place.
            out.rename(place / "old")
            (place / "new").rename(out)
    finally:
        if not out.exists() and (place / "old").exists():
            (place / "old").rename(out)
        shutil.rmtree(place, ignore_errors=True)


def _built(model: str, folder: Path, build: BuildOptions, options: Mapping[str, Any]) -> Bundle:
    from cliplet.artifact import BundleJob
    from cliplet.plan import TaggerSettings, make_plan, usable_runtimes

    from .bundle import build_bundle, engines_for

    chosen = {k: options[k] for k in ("classes", "prompts", "aggregate", "zeta")}
    if (Path(model) / MANIFEST_NAME).is_file():
        return _exchanged(Path(model), folder, build, options)
    runtimes = options["runtime"] or tuple(r for r in ("onnx", "openvino") if r in usable_runtimes("cpu"))
    engines = engines_for(runtimes, options["precision"] or ("fp32",))
    _refuse_without_effect(engines, options)
    plan = make_plan(TaggerSettings(model=model, **chosen), features=True)
    if options["views"] is not None and not plan.contract.takes_views:
        raise UsageError(
            f"--views {options['views']} for {model}: a {plan.contract.name} looks at the whole image alone",
            "a CLIP, which looks at several views",
            "leave --views out",
        )
    job = BundleJob(plan.spec, plan.vocabulary, plan.aggregation, plan.calibrated, engines)
    return build_bundle(job, folder, build)


def _refuse_without_effect(engines: Sequence[tuple[str, str]], options: Mapping[str, Any]) -> None:
    """Raise `UsageError` if an option was given that none of the engines asked for heeds."""
    if not any(runtime.startswith("tensorrt") for runtime, _ in engines) and (
        given := _given(options, OF_TENSORRT)
    ):
        raise UsageError(
            f"{' and '.join(given)} without a TensorRT engine to build",
            "tensorrt or tensorrt_rtx in --runtime: other engines take any size on any machine",
            f"--runtime tensorrt_rtx, or leave {' and '.join(given)} out",
        )
    if not any(precision == "int8" for _, precision in engines) and (given := _given(options, OF_INT8)):
        raise UsageError(
            f"{' and '.join(given)} without an INT8 engine to calibrate",
            "int8 in --precision: nothing else is calibrated",
            f"--precision fp32,int8, or leave {' and '.join(given)} out",
        )


def _given(options: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of the options that were given, as they are written on a command line."""
    return [f"--{name.replace('_', '-')}" for name in names if options[name] not in (None, (), False)]


def _exchanged(source: Path, folder: Path, build: BuildOptions, options: Mapping[str, Any]) -> Bundle:
    from cliplet.artifact import Bundle
    from cliplet.vocabulary import prompt_set, read_vocabulary

    from .vocabulary_exchange import exchange_vocabulary

    of_originals = (
        "aggregate",
        "zeta",
        "runtime",
        "precision",
        *OF_INT8,
        *OF_TENSORRT,
        "text",
    )
    given = _given(options, of_originals)
    if options["classes"] is None or given:
        raise UsageError(
            f"{source} is a bundle" + (f", and {', '.join(given)} would need its original" if given else ""),
            "--classes, and --prompts if you like: only the vocabulary of a bundle can be exchanged",
            f"cliplet export {source} --classes classes.txt --out NEW",
        )
    bundle = Bundle.load(source)
    prompts = prompt_set(options["prompts"]) if options["prompts"] else bundle.manifest.vocabulary.prompts
    return exchange_vocabulary(bundle, read_vocabulary(options["classes"], prompts), folder, build)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", help="The original, where it lies elsewhere than the bundle says.")
@comparison_options
@click.option(
    "--reproduce",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a script that repeats the comparison of the worst engine.",
)
@click.option(
    "--json", "as_json", is_flag=True, envvar="CLIPLET_VERIFY_JSON", help="Print the result as JSON."
)
def verify(
    bundle: Path, model: str | None, reproduce: Path | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Compare every engine of BUNDLE, and its text tower, with the original again, on this machine; exit code 3 if one differs."""
    from cliplet.artifact import Bundle

    from . import verification
    from .bundle import BuildOptions

    build = BuildOptions(images=options["images"], count=options["count"], threads=options["threads"])
    loaded = Bundle.load(bundle)
    rows = verification.verify(loaded, build, model)
    if as_json:
        click.echo(verification.as_json(rows))
    elif not quiet:
        console = Console()
        _tell_engines(
            [
                Row(
                    row.name,
                    row.precision_read,
                    row.parity,
                    row.speed,
                    f"not run: {row.not_run}" if row.not_run else "",
                )
                for row in rows
            ],
            console,
        )
        compared = next(row.parity["on"] for row in rows if row.parity)
        console.print(f"compared with {loaded.manifest.model} on {compared}", soft_wrap=True)
    if reproduce is not None:
        compared_engines = [(row.parity["largest"], row.engine) for row in rows if row.parity and row.engine]
        _, worst = max(compared_engines, key=lambda found: found[0])
        verification.write_reproduction(reproduce, loaded, worst, build, model)
        click.echo(f"wrote {reproduce}; python {reproduce} repeats it for {worst.name}", err=True)
    verification.hold(rows)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--json", "as_json", is_flag=True, envvar="CLIPLET_INSPECT_JSON", help="Print the facts as JSON."
)
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH is: a bundle, a graph, an engine, a classifier, a trunk, or a folder of labels."""
    from . import inspection

    facts = inspection.inspect(path)
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        for line in inspection.lines(facts):
            click.echo(line)


def _tell_engines(rows: Sequence[Row], console: Console) -> None:
    """One line for each engine; what has no numbers, or was not kept, has a reason below."""
    console.width = max(console.width, LEAST_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # A text tower's rows have no labels: its column stays empty.
    about = {row.parity.get("about", "labels") for row in rows if row.parity and _agreement(row)}
    for name in COLUMNS:
        # Of a trunk there are no labels that could agree.
        name = "/".join(sorted(about)) if name == "labels" and about else name
        table.add_column(name, justify="left" if name in WORDS else "right", no_wrap=True)
    for row in rows:
        table.add_row(row.engine, row.really, *_numbers(row), _verdict(row))
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.engine}: {row.note}", soft_wrap=True)


def _numbers(row: Row) -> list[str]:
    parity, speed = row.parity, row.speed
    if not parity:
        return [""] * (len(COLUMNS) - len(WORDS))
    truth = parity["map_engine"]
    return [
        f"{parity['largest']:.2g}",
        f"{parity['cosine']:.5f}",
        _agreement(row),
        "" if truth is None else f"{truth:.1f} {truth - parity['map_original']:+.2f}",
        f"{speed['ms_per_batch']:.0f}" if speed else "",
        f"{speed['views_per_s']:.1f}" if speed else "",
    ]


def _agreement(row: Row) -> str:
    """The share of equal labels, or of neighbours; "" of a text tower."""
    share = row.parity["agreement"]
    return "" if share is None else f"{share:.1%}"


def _verdict(row: Row) -> str:
    if row.note or not row.parity:
        return row.note.partition(":")[0]
    passed = "agrees" if row.parity["passed"] else "differs"
    return f"source {passed}" if "of" in row.parity else passed


def _tell_bundle(bundle: Bundle) -> None:
    manifest = bundle.manifest
    rows = [Row(e.name, e.precision_read, e.parity, e.details.get("speed", {})) for e in manifest.engines]
    rows += [
        Row(
            dropped["engine"],
            dropped.get("precision_read", ""),
            dropped.get("parity", {}),
            dropped.get("details", {}).get("speed", {}),
            f"not kept: {dropped['why']}",
        )
        for dropped in manifest.dropped
    ]
    console = Console()
    _tell_engines(rows, console)
    for engine in manifest.engines:
        if "calibration_images" in engine.details:
            reached, on = engine.details["calibration_images"], engine.details["calibrated_on"]
            console.print(f"{engine.name}: {reached} images reached the calibrator, of {on}", soft_wrap=True)
    size = sum((bundle.folder / name).stat().st_size for name in manifest.files)
    first = manifest.engines[0]
    shape = first.details.get("speed", {})
    if shape:
        console.print(
            f"compared with {first.parity['against']} on {first.parity['on']}; "
            f"speed of {shape['batch']} images x {shape['views']} views, indicative",
            soft_wrap=True,
        )
    names = manifest.vocabulary.names
    gives = f"{len(names)} classes" if names else "embeddings"
    console.print(f"wrote {bundle.folder} ({size / 1e6:.1f} MB, {manifest.kind}, {gives})", soft_wrap=True)
    label, verify = f"cliplet label PHOTOS --model {bundle.folder}", f"cliplet verify {bundle.folder}"
    console.print(f"next: {label if names else verify}", soft_wrap=True)
