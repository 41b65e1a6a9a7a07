"""One HTML page of a benchmark that opens offline: environment, tables, plots, remarks; it holds no script."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cliplet.contract import EMBEDDINGS

from .bench_compare import Comparison
from .bench_plots import LACKING
from .bench_rows import LABELS, gives_of
from .bench_table import (
    GRAPHS,
    WORDS,
    about,
    columns_of,
    explained,
    kinds,
    limits_line,
    measured,
    number,
    phase_cells,
    phases_of,
    remarks,
    row_name,
)

TEMPLATE = Path(__file__).with_name("bench.html")
CAPTIONS = {
    "latency.png": "Up and to the left is better. Faint lines: to the right as far as the 99th percentile of the "
    "latency, up and down as far as the rounds differ.",
    "ratio.png": "Each row against the first of its model, in the same rounds; the line spans the rounds.",
}
# Pixels of a full bar, as the style has them.
BAR = 40
# What a model does, and what it and the original agree about.
VERBS = {LABELS: "labels", EMBEDDINGS: "embeds"}
AGREEMENTS = {LABELS: "labels", EMBEDDINGS: "neighbours"}
TONES = {"equal": "good", "source equal": "good", "original": "good", "none": "warn", "differs": "bad"}


def page(made: Mapping[str, Any], pictures: Mapping[str, bytes], comparison: Comparison | None) -> bytes:
    """The page of a record, with its plots inlined."""
    template = TEMPLATE.read_text(encoding="utf-8").replace("\r\n", "\n")
    (style,) = re.findall(r"<style>(.*?)</style>", template, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rows = measured(made)
    parts = {
        "title": f"How fast {escape(made['model'])} {' or '.join(VERBS[gives] for gives in kinds(made['rows'].values()))}",
        "what": f"{escape(made['what'])}; {escape(made['date'][:10])}",
        "facts": _facts(made),
        "body": "\n".join(
            [
                *(_of_model(model, rows) for model in dict.fromkeys(row["model"] for row in rows.values())),
                f'<p class="muted">{_with_code(explained(rows.values()))}</p>' if rows else "",
                _compared(comparison) if comparison is not None else "",
                _plots(pictures) if rows else "",
                _remarks(made),
                _parity(rows),
                _versions(made),
            ]
        ),
    }
    head = template.replace("'style-hash'", f"'sha256-{digest}'")
    # In one pass, so that a name that looks like a mark stays a name.
    filled = re.sub(r"<!-- cliplet: (\w+) -->", lambda found: parts[found[1]], head)
    return filled.encode(errors="backslashreplace")


def _facts(made: Mapping[str, Any]) -> str:
    where = made["machine"]
    cores = f"{where['cores']} cores" + (
        f", {where['memory_gib']} GiB of memory" if where["memory_gib"] else ""
    )
    threads = f", {made['threads']} threads" if made["threads"] else ""
    facts = [
        ("Processor", where["processor"], ""),
        ("Machine", f"{cores}, {where['system']}", ""),
        ("Instruction sets", ", ".join(where["flags"]) or "none that matter", ""),
        ("Images", made["images"], ""),
        ("Measured", f"{made['rounds']} rounds of {made['seconds']:g} s, on {made['device']}{threads}", ""),
        ("Commit", made["commit"], ""),
        ("Limits", limits_line(made).partition(": ")[2], "wide"),
    ]
    shown = [
        f'<div class="{kind}"><dt>{name}</dt><dd>{escape(str(text))}</dd></div>' for name, text, kind in facts
    ]
    command = f'<div class="wide"><dt>Command</dt><dd><code>{escape(made["command"])}</code></dd></div>'
    return "\n".join([*shown, command])


def _of_model(model: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    own = [row for row in rows.values() if row["model"] == model]
    first = own[0]
    shown = columns_of(own)
    body = []
    for row in own:
        cells = [_cell(heading, text(row), row) for heading, text in shown]
        body.append("".join(cells))
    head = [(heading or "remarks", heading in WORDS) for heading, _ in shown]
    work = f", {first['work']['gflop_per_view']:.2f} GFLOP a view" if first["work"] else ""
    names = phases_of(own)
    phases = [
        f'<th scope="row">{escape(row_name(row))}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in phase_cells(row, names))
        for row in own
    ]
    phase_head = [("each phase alone", True), *((name, False) for name in (*names, "sum", "together"))]
    note = (
        "Milliseconds an image, median of the rounds: reading, decoding, placing and writing on one thread, the engine "
        f"with all of its threads; engine: {GRAPHS[gives_of(first)]}, which are one graph."
    )
    return (
        f"<h2>{escape(model)} <small>{escape(about(first) + work)}</small></h2>"
        f"{_table(head, body)}{_table(phase_head, phases, note)}"
    )


def _cell(heading: str, text: str, row: Mapping[str, Any]) -> str:
    if heading == "engine":
        return f'<th scope="row">{escape(text)}</th>'
    if heading == "parity":
        return f'<td class="word"><span class="badge {TONES[text]}">{escape(text)}</span></td>'
    if heading == "":
        count = len(row["marks"])
        return (
            f'<td class="word">{f"""<span class="badge warn">{count} below</span>""" if count else ""}</td>'
        )
    if heading in ("of ideal", "of limit") and text != "–":
        share = row["share_of_ideal"]["median"] if heading == "of ideal" else row["share_of_limit"]
        width = round(BAR * min(share, 1))
        bar = f'<svg class="share" aria-hidden="true"><rect width="{width}" height="7"/></svg>'
        return f"<td>{bar}{escape(text)}</td>"
    return f'<td class="{"word" if heading in WORDS else ""}">{escape(text)}</td>'


def _table(head: Sequence[tuple[str, bool]], body: Iterable[str], caption: str = "") -> str:
    headings = "".join(
        f'<th scope="col" class="{"word" if word else ""}">{escape(text)}</th>' for text, word in head
    )
    lines = "\n".join(f"<tr>{cells}</tr>" for cells in body)
    below = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{below}<thead><tr>{headings}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def _plots(pictures: Mapping[str, bytes]) -> str:
    if not pictures:
        return f'<p class="muted">{escape(LACKING)}</p>'
    figures = [
        f'<figure><img alt="{escape(CAPTIONS[name])}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
        for name, data in pictures.items()
    ]
    return f'<h2>Pictures</h2><div class="pictures">{"".join(figures)}</div>'


def _compared(comparison: Comparison) -> str:
    tones = {"faster": "good", "slower": "bad"}
    body = [
        f'<th scope="row">{escape(d.row)}</th><td class="word">{escape(d.quantity)}</td><td>{number(d.old)}</td>'
        f"<td>{number(d.new)}</td><td>{d.ratio:.3f}</td><td>{d.low:.3f} to {d.high:.3f}</td>"
        f'<td class="word"><span class="badge {tones.get(d.verdict, "")}">{d.verdict}</span></td>'
        for d in comparison.differences
    ]
    head = [("row", True), ("images a second", True), ("before", False), ("now", False), ("ratio", False), ("95 % interval", False), ("", True)]  # fmt: skip
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    return f'<h2>Against the earlier record</h2>{_table(head, body)}<ul class="remarks">{notes}</ul>'


def _remarks(made: Mapping[str, Any]) -> str:
    found = remarks(made)
    if not found:
        return ""
    listed = "".join(f"<li><strong>{escape(name)}</strong>: {escape(text)}</li>" for name, text in found)
    return f'<h2>What to know beside the numbers</h2><ul class="remarks">{listed}</ul>'


def _parity(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """How each engine was compared with the original, once for each engine."""
    body = {}
    for row in rows.values():
        parity = row["parity"] or {}
        cells = [
            f'<th scope="row">{escape(row["model"])}, {escape(row["engine"])}</th>',
            f'<td class="word">{escape(str(parity.get("against", "–")))}</td>',
            f'<td class="word">{escape(str(parity.get("on", "–")))}</td>',
            *(f"<td>{_plain(parity.get(key), form)}</td>" for key, form in (("largest", ".2g"), ("cosine", ".5f"), ("agreement", ".2%"))),
            f'<td class="word"><span class="badge {TONES[row["verdict"]]}">{row["verdict"]}</span></td>',
        ]  # fmt: skip
        body[row["model"], row["engine"]] = "".join(cells)
    if not body:
        return ""
    agreed = " or ".join(AGREEMENTS[gives] for gives in kinds(rows.values()))
    head = [("engine", True), ("compared with", True), ("on", True), ("largest difference", False), ("least cosine", False), (f"equal {agreed}", False), ("verdict", True)]  # fmt: skip
    return f"<h2>Parity</h2>{_table(head, body.values())}"


def _with_code(text: str) -> str:
    """Text in which `this` is code."""
    return re.sub(r"`(.+?)`", r"<code>\1</code>", escape(text))


def _plain(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _versions(made: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    python = made["machine"]["python"]
    return f'<details><summary>Versions</summary><p class="muted">Python {escape(python)}, {escape(listed)}</p></details>'
