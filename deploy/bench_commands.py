"""The verb `bench`: options in, functions called, results told."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from cliplet.errors import INTERRUPTED, EnvironmentError_, UsageError, explained_os_errors
from cliplet.plan import DEVICES

if TYPE_CHECKING:
    from .bench_compare import Comparison

RECORD, CSV, PAGE = "bench.json", "bench.csv", "report.html"
FILE = click.Path(path_type=Path, dir_okay=False)


def _listed(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise click.BadParameter("nothing is named.")
    return words


def _numbers(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _listed(context, parameter, text))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers.") from error


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--runtime", default="auto", show_default=True, callback=_listed, help="One or more, by commas: onnx, openvino, tensorrt, tensorrt_rtx, torch; or all: every engine that a bundle holds.")  # fmt: skip
@click.option("--precision", default="fp32", show_default=True, callback=_listed, help="One or more, by commas: fp32, fp16, bf16, int8; or all.")  # fmt: skip
@click.option("--batch-size", default="0", callback=_numbers, help="Images in a batch, one or more by commas (0: by the number of views).")  # fmt: skip
@click.option("--streams", default="1", callback=_numbers, help="Batches at a time that `label` has in an engine on the CPU, one or more by commas.")  # fmt: skip
@click.option("--images", multiple=True, help="Images to label or embed: a folder, glob, list or archive. Default: scenes made for the run.")  # fmt: skip
@click.option("--limit", type=int, default=256, show_default=True, help="How many of them; they are taken again and again where more are needed.")  # fmt: skip
@click.option("--classes", help="Class file, or names separated by commas. Default: the model's own.")
@click.option(
    "--views", help="Where to look: 1, 1+2x2, 1+3x3, … Default: 1+3x3, or 1 for a classifier or a trunk."
)
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True, help="Refused, never replaced, if it cannot be used.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of the engine (0: one a core).")  # fmt: skip
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Of each engine in each round, and about as long again for all parts together.")  # fmt: skip
@click.option("--rounds", type=int, default=3, show_default=True, help="How often all rows take turns.")
@click.option("--unverified", is_flag=True, help="Also measure engines without a parity verdict or with a bad one, and mark them.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help=f"Folder for {RECORD}, {CSV}, {PAGE} and the plots.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the benchmark that --out holds.")
@click.option("--compare", type=FILE, help=f"An earlier {RECORD}: what has changed, and whether it is more than noise.")  # fmt: skip
@click.option("--trace", type=FILE, help="Write what the threads of `label` do as a Chrome trace (chrome://tracing).")  # fmt: skip
@click.option("--slo-p99-ms", type=float, help="Exit with 4 if a row's 99th percentile of the engine's latency of a batch is above, or if a row cannot be measured.")  # fmt: skip
@click.option("--min-throughput", type=float, help="Exit with 4 if a row labels or embeds fewer images a second, or cannot be measured.")  # fmt: skip
@click.option("--max-error-rate", type=float, help="Exit with 4 if a larger share of a row's images failed, or if a row cannot be measured.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, envvar="CLIPLET_BENCH_JSON", help="Print the record as JSON.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress and no table.")
def bench(
    models: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    trace: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Measure how fast MODELS label or embed, beside this machine's limits and with the proof that they compute the same.

    MODELS are tiny, open_clip models, bundles, classifiers, trunks (which give embeddings) or triton://…. Each row is
    a model on a runtime in a precision with a size of batch; every measurement is a process of its own, and all rows
    take turns. A row that cannot be measured says why. Ctrl-C keeps what was measured. The token of a server and the
    certificates that its own is signed by come from $CLIPLET_TOKEN and $CLIPLET_CA.
    """
    from cliplet.record import shown

    from .bench import run_bench
    from .bench_compare import compare, earlier_record, hold_comparable, hold_objectives
    from .bench_rows import BenchJob, rows_of
    from .bench_summary import bench_record
    from .bench_table import measured

    earlier = earlier_record(options["compare"]) if options["compare"] else None
    if out is not None and (out / RECORD).exists() and not overwrite:
        raise UsageError(
            f"{out} holds a benchmark already", "a new folder", "pass --overwrite, or another --out"
        )
    job = BenchJob(
        models=models,
        runtimes=options["runtime"],
        precisions=options["precision"],
        batch_sizes=options["batch_size"],
        streams=options["streams"],
        trace=trace is not None,
        **{k: options[k] for k in ("images", "limit", "classes", "views", "device", "threads", "seconds", "rounds", "unverified")},
    )  # fmt: skip
    progress = Console(stderr=True, quiet=quiet, highlight=False, markup=False)
    say = partial(progress.print, soft_wrap=True)
    rows = rows_of(job, say)
    planned = [row.name for row in rows if not row.why]
    if earlier and planned:
        hold_comparable(planned, earlier)
    result = run_bench(job, say, rows)
    made = bench_record(result, shlex.join(["cliplet", "bench", *shown(_arguments())]))
    pictures = _write(out, made) if out is not None else {}
    comparison = compare(made, earlier) if earlier and measured(made) else None
    if out is not None and comparison is not None:
        _write_page(out, made, pictures, comparison)
    events = result.trace_events()
    if trace is not None:
        _write_trace(trace, events)
    _tell(made, comparison, out, trace, is_traced=bool(events), as_json=as_json, quiet=quiet)
    if result.interrupted:
        return INTERRUPTED
    hold_objectives(made, *(options[name] for name in ("slo_p99_ms", "min_throughput", "max_error_rate")))
    if not measured(made):
        raise _nothing(made)
    if earlier:
        hold_comparable(measured(made), earlier)
    return 0


def _arguments() -> Sequence[str]:
    """What followed the verb on the command line."""
    given = sys.argv[1:]
    return given[given.index("bench") + 1 :] if "bench" in given else given


def _write(out: Path, made: Mapping[str, Any]) -> dict[str, bytes]:
    """Write all files of a benchmark, and return its plots by name; the page does not compare yet."""
    from cliplet.labels import write_atomically
    from cliplet.record import json_bytes

    from .bench_plots import plots
    from .bench_table import as_csv

    with explained_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    # The record first: what comes after can be made from it again.
    write_atomically(out / RECORD, json_bytes(made))
    pictures = plots(made)
    for name, data in {**pictures, CSV: as_csv(made)}.items():
        write_atomically(out / name, data)
    _write_page(out, made, pictures, None)
    return pictures


def _write_page(
    out: Path, made: Mapping[str, Any], pictures: Mapping[str, bytes], comparison: Comparison | None
) -> None:
    from cliplet.labels import write_atomically

    from .bench_page import page

    write_atomically(out / PAGE, page(made, pictures, comparison))


def _write_trace(file: Path, events: Sequence[dict[str, Any]]) -> None:
    from cliplet.trace import write_chrome

    with explained_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_chrome(file, events)


def _tell(
    made: Mapping[str, Any],
    comparison: Comparison | None,
    out: Path | None,
    trace: Path | None,
    *,
    is_traced: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from cliplet.record import json_bytes

    from .bench_plots import LACKING, plots
    from .bench_table import show

    if as_json:
        click.echo(json_bytes(made), nl=False)
        return
    if quiet:
        return
    show(made, comparison, Console())
    if out is not None:
        if not (out / "latency.png").exists() and not plots(made):
            click.echo(LACKING)
        click.echo(f"wrote {out}: {RECORD}, {CSV}, {PAGE}")
        click.echo(f"open {(out / PAGE).resolve().as_uri()}")
    if trace is not None:
        opened = "open it in chrome://tracing or https://ui.perfetto.dev"
        click.echo(f"wrote {trace}: {opened if is_traced else 'nothing in it, since no row has a trace'}")


def _nothing(made: Mapping[str, Any]) -> EnvironmentError_:
    reasons = "; ".join(f"{name}: {row['why']}" for name, row in made["rows"].items())
    fixes = [row["fix"] for row in made["rows"].values() if row.get("fix")]
    return EnvironmentError_(f"nothing could be measured: {reasons}", "one row at least", (fixes or [""])[0])
