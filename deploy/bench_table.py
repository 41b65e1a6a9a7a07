"""The tables of a benchmark's record: the same columns for a terminal, a page and a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cliplet.contract import EMBEDDINGS

from .bench_compare import Comparison
from .bench_rows import LABELS, gives_of
from .bench_summary import PHASES

Row = Mapping[str, Any]

# Heading and text of each column of the main table.
COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("engine", lambda r: f"{r['engine']}"),
    ("really", lambda r: r["precision_read"]),
    ("batch", lambda r: str(r["batch"])),
    ("streams", lambda r: str(r["streams"] or "–")),
    ("images/s", lambda r: number(r["images_per_s"]["median"])),
    ("± rounds", lambda r: f"{relative(r['images_per_s']):.0%}" if r["rounds"] > 1 else "–"),
    ("ratio", lambda r: f"{r['ratio_to_first']['median']:.2f}"),
    ("of ideal", lambda r: f"{r['share_of_ideal']['median']:.0%}"),
    ("engine views/s", lambda r: number(r["views_per_s"]["median"])),
    ("of limit", lambda r: "–" if r["share_of_limit"] is None else f"{r['share_of_limit']:.0%}"),
    ("p50 ms", lambda r: number(r["latency_ms"]["p50"])),
    ("p99 ms", lambda r: number(r["latency_ms"]["p99"])),
    ("peak MB", lambda r: number(r["peak_mb"]["median"])),
    ("GPU MB", lambda r: "–" if r["device_mb"] is None else number(r["device_mb"])),
    ("J/image", lambda r: "–" if r["joules_per_image"] is None else number(r["joules_per_image"])),
    ("parity", lambda r: r["verdict"]),
    ("", lambda r: "!" if r["marks"] else ""),
)
# Columns that say nothing where no GPU runs.
OF_GPU = ("GPU MB", "J/image")
WORDS = ("engine", "really", "parity", "")
TOGETHER = {LABELS: "`cliplet label` from files to tables", EMBEDDINGS: "from files to written embeddings"}
# What a model's graph does beside the encoder.
GRAPHS = {
    LABELS: "cutting the views, encoder, scores and their aggregation",
    EMBEDDINGS: "cutting the image, encoder, and scaling to length 1",
}
EXPLAINED = (
    "images/s: {}. of ideal: of all cores busy all the time with the phases below. "
    "engine: decoded batches, nothing else: {}, which are one graph and so have one number. "
    "of limit: of the roofline, the smaller of matrix products and memory in the same run. p50, p99: latency of a batch in the engine."
)


def row_name(row: Row) -> str:
    """A row of a table whose heading names the model."""
    streams = f", streams {row['streams']}" if (row["streams"] or 1) > 1 else ""
    return f"{row['engine']}, batch {row['batch']}{streams}"


def number(value: float) -> str:
    """Three digits that count, at least."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def relative(values: Mapping[str, Any]) -> float:
    """Half of what the rounds differ by, as a share of their median."""
    return float((values["max"] - values["min"]) / values["median"] / 2)


def measured(made: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of a record that hold numbers."""
    return {name: row for name, row in made["rows"].items() if "images_per_s" in row}


def kinds(rows: Iterable[Row]) -> list[str]:
    """What some of the rows give: LABELS, EMBEDDINGS, or both."""
    given = {gives_of(row) for row in rows}
    return [gives for gives in TOGETHER if gives in given]


def explained(rows: Iterable[Row]) -> str:
    """What the columns of the rows' tables mean."""
    given = kinds(rows)
    return EXPLAINED.format(
        *(", of a trunk ".join(told[gives] for gives in given) for told in (TOGETHER, GRAPHS))
    )


def about(row: Row) -> str:
    """What a row's model looks at and gives."""
    if gives_of(row) == EMBEDDINGS:
        return f"embeddings of {row['embedding_width']} numbers, the whole image"
    return f"{row['classes']} classes, views {row['views']} ({row['views_per_image']} an image)"


def columns_of(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """The columns that some row has something to say in."""
    silent = () if any(row["device_read"] != "cpu" for row in rows) else OF_GPU
    if not any((row["streams"] or 1) > 1 for row in rows):
        silent = (*silent, "streams")
    return [column for column in COLUMNS if column[0] not in silent]


def phases_of(rows: Sequence[Row]) -> list[str]:
    """The phases that some row has."""
    return [name for name in PHASES if any(row["phases_ms_per_image"][name] for row in rows)]


def phase_cells(row: Row, phases: Sequence[str]) -> list[str]:
    """Milliseconds an image in each phase alone; their sum; together with all cores."""
    found = [row["phases_ms_per_image"][name] for name in phases]
    total = sum(values["median"] for values in found if values)
    cells = [number(values["median"]) if values else "–" for values in found]
    return [*cells, number(total), number(1000 / row["images_per_s"]["median"])]


def remarks(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows and text of all that has to be known beside the numbers: marks, and why rows have none."""
    found = [(name, "; ".join(row["marks"])) for name, row in measured(made).items() if row["marks"]]
    lacking: dict[str, list[str]] = {}
    for name, row in made["rows"].items():
        if "images_per_s" not in row:
            fix = f" → {row['fix']}" if row.get("fix") else ""
            lacking.setdefault(f"not measured: {row['why']}{fix}", []).append(name)
    found += [("; ".join(names), reason) for reason, names in lacking.items()]
    if made["interrupted"]:
        found.append(("the run", "was interrupted: rows have fewer rounds than were asked for"))
    limits = made["limits"]
    if limits.get("disturbed"):
        found.append(("the limits", "others were at work in every round: they may be higher"))
    return found + [("the limits", note) for note in limits.get("notes", [])]


def show(made: Mapping[str, Any], comparison: Comparison | None, console: Console) -> None:
    """Print a record's tables; wider than the terminal where they have to be."""
    for model in dict.fromkeys(row["model"] for row in measured(made).values()):
        for table in _of_model(model, [row for row in measured(made).values() if row["model"] == model]):
            _print_whole(table, console)
    if measured(made):
        console.print(Text(explained(measured(made).values()), style="dim"))
    console.print(Text(limits_line(made)))
    if comparison is not None:
        _print_whole(_compared(comparison), console)
        for note in comparison.notes:
            console.print(Text(f"! {note}", style="yellow"))
    for name, remark in remarks(made):
        console.print(f"[yellow]![/] [bold]{escape(name)}[/]: {escape(remark)}", highlight=False)


def _print_whole(table: Table, console: Console) -> None:
    """A terminal that is too narrow breaks the lines; numbers that are cut off would help nobody."""
    wanted = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    wide = Console(file=console.file, width=max(wanted, console.width), force_terminal=console.is_terminal)
    wide.print(table)


def limits_line(made: Mapping[str, Any]) -> str:
    """What the machine can do at most, in a sentence."""
    limits = made["limits"]
    if not limits or not limits["gop_per_s"]:
        return "limits of this machine: not measured"
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in limits["gop_per_s"].items())
    return (
        f"limits of this machine in the same run: matrix products in 10^9 operations/s: {rates} ({limits['by']}); "
        f"memory {limits['gb_per_s']:.1f} GB/s read and written"
    )


def as_csv(made: Mapping[str, Any]) -> bytes:
    """One line a row, one column a number; rows that were not measured say why."""
    plain = ("model", "engine", "runtime", "precision", "runtime_read", "precision_read", "device_read", "batch", "streams", "views", "views_per_image", "gives", "classes", "embedding_width", "verdict", "share_of_limit", "device_mb", "joules_per_image", "error_rate", "rounds")  # fmt: skip
    spreads = ("images_per_s", "engine_images_per_s", "views_per_s", "share_of_ideal", "share_of_engine", "ratio_to_first", "peak_mb", "engine_peak_mb", "load_s", "load_by_others")  # fmt: skip
    lines = []
    for name, row in made["rows"].items():
        line = {"row": name, **{key: row.get(key) for key in plain}}
        for key in spreads:
            values = row.get(key) or {}
            line |= {f"{key}_{part}": values.get(part) for part in ("median", "min", "max")}
        line |= {
            f"latency_{key}_ms": value for key, value in row.get("latency_ms", {}).items() if key != "batches"
        }
        for key, values in row.get("phases_ms_per_image", {}).items():
            line[f"{key}_ms_per_image"] = values["median"] if values else None
        lines.append({**line, "marks": "; ".join(row.get("marks", [])), "why": row.get("why", "")})
    text = io.StringIO()
    # Rows that were not measured have fewer columns.
    names = max((list(line) for line in lines), key=len)
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()


def _of_model(model: str, rows: Sequence[Row]) -> tuple[Table, Table]:
    shown = columns_of(rows)
    main = Table(
        box=box.SIMPLE_HEAD, title=_heading(model, rows[0]), title_justify="left", title_style="bold"
    )
    for heading, _ in shown:
        main.add_column(heading, justify="left" if heading in WORDS else "right", no_wrap=True)
    for row in rows:
        main.add_row(*(escape(text(row)) for _, text in shown))
    names = phases_of(rows)
    phases = Table(box=box.SIMPLE_HEAD)
    phases.add_column("ms an image, alone", no_wrap=True)
    for name in (*names, "sum", "together"):
        phases.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        phases.add_row(escape(row_name(row)), *phase_cells(row, names))
    return main, phases


def _heading(model: str, row: Row) -> Text:
    return Text(f"{model}: {about(row)}")


def _compared(comparison: Comparison) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title="against the earlier record", title_justify="left", title_style="bold"
    )
    for heading in ("row", "what", "before", "now", "ratio", "95 %", "verdict"):
        table.add_column(heading, justify="left" if heading in ("row", "what", "verdict") else "right")
    for d in comparison.differences:
        cells = (
            d.row,
            d.quantity,
            number(d.old),
            number(d.new),
            f"{d.ratio:.3f}",
            f"{d.low:.3f} to {d.high:.3f}",
        )
        table.add_row(*map(escape, cells), d.verdict)
    return table
