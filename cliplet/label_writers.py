"""Labels for other programs: CSV, JSON Lines, COCO and XMP side-cars, written from a finished folder of labels.

    write_labels(Path("labels"), ["csv", "xmp"], xmp_style="full")

    LABELS/labels.csv         for a spreadsheet: one line an input; of those that failed, the reason
    LABELS/labels.jsonl       for programs: the same, one object a line
    LABELS/labels.coco.json   for tools that read COCO's annotations
    photo.xmp, photo.jpg.xmp  beside the images, for photo managers: see `cliplet.xmp_sidecar`

All of them are derived: they are written anew each time, part by part, so that memory does not grow with the
collection, and each takes its place only when it is whole. Side-cars are others' files, and merged.
"""

from __future__ import annotations

import csv
import errno
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from cliplet.archives import archive_of
from cliplet.errors import DataError, EnvironmentError_, UsageError
from cliplet.labels import (
    LabelRecord,
    read_errors,
    read_labelled_paths,
    read_labels,
    read_run,
    replaced_text,
    write_atomically,
)
from cliplet.listing import system_name
from cliplet.lock import lock_folder
from cliplet.remote_files import is_remote, local_path, located
from cliplet.xmp_sidecar import merged

XMP_STYLES = ("basename", "full")
# A side-car that is larger is none.
MAX_SIDECAR_BYTES = 64 << 20


@dataclass
class Written:
    """What one writer did.

    Attributes:
        format: its name.
        file: what it wrote; None for side-cars.
        rows: images in the file, or side-cars that hold their image's labels now.
        changed: side-cars that were written; the others were as they should be.
        skipped: why images have no side-car though nothing failed, and how many.
        failures: side-cars that were left as they are, and why.
    """

    format: str
    file: Path | None = None
    rows: int = 0
    changed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)


def parse_formats(text: str) -> tuple[str, ...]:
    """The formats that a list separated by commas names, each once.

    Raises:
        UsageError: one is not known.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FORMATS:
            raise UsageError(
                f"--write {name}", f"some of {', '.join(FORMATS)}", f"--write {','.join(FORMATS)}"
            )
    return tuple(dict.fromkeys(names))


def check_xmp_style(style: str) -> str:
    """The style, if there is one of that name.

    Raises:
        UsageError: there is none.
    """
    if style not in XMP_STYLES:
        raise UsageError(f"--xmp-style {style}", f"one of {', '.join(XMP_STYLES)}", "--xmp-style basename")
    return style


def write_labels(folder: Path, formats: Sequence[str], *, xmp_style: str = "basename") -> list[Written]:
    """Write a folder's labels in each of the formats `csv`, `jsonl`, `coco` and `xmp`.

    Whoever writes the folder just then is waited for.

    Args:
        xmp_style: `basename` for `a.xmp` beside `a.jpg`, as Adobe's programs do; `full` for `a.jpg.xmp`, as
            darktable and digiKam do.

    Raises:
        UsageError: an unknown format or style.
        DataError: the folder holds no labels.
        EnvironmentError_: a file cannot be written. A side-car that alone cannot be written is among `failures`.
    """
    formats = parse_formats(",".join(formats))
    check_xmp_style(xmp_style)
    read_run(folder)  # so that a folder without labels gets no lock
    # Of two partitions that end together both may find all joined.
    lock = lock_folder(folder, wait=True)
    try:
        run = read_run(folder)
        return [
            write_xmp(folder, run, xmp_style) if name == "xmp" else TABLES[name](folder, run)
            for name in formats
        ]
    finally:
        os.close(lock)


def write_csv(folder: Path, run: dict[str, Any]) -> Written:
    """LABELS/labels.csv: `path, width, height, labels, error`, then the score of each class as `score:NAME`.

    Labels are joined with `|`, best first; a `|` inside a name is written as `\\|`. An input without labels
    because it failed has its stage and reason in `error`, and no scores. It is UTF-8 with a byte order mark,
    by which Excel knows it; a relative path that a spreadsheet would take for a formula begins with `./`.
    """
    classes: list[str] = run["classes"]
    written = Written("csv", folder / "labels.csv")

    def write(stream: TextIO) -> None:
        table = csv.writer(stream)
        table.writerow(["path", "width", "height", "labels", "error", *(f"score:{name}" for name in classes)])
        for row in read_labels(folder):
            names = "|".join(name.replace("\\", "\\\\").replace("|", "\\|") for name in row.labels)
            scores = [str(score) for score in row.scores]
            table.writerow([_no_formula(row.path), row.width, row.height, names, "", *scores])
            written.rows += 1
        for error in read_errors(folder):
            table.writerow(
                [_no_formula(error.path), "", "", "", f"{error.stage}: {error.reason}", *[""] * len(classes)]
            )

    _write_text(folder / "labels.csv", write, encoding="utf-8-sig", newline="")
    return written


def write_jsonl(folder: Path, run: dict[str, Any]) -> Written:
    """LABELS/labels.jsonl: `{"path", "width", "height", "labels", "scores", "model"}`, or `{"path", "error"}`.

    `labels` are names, best first; `scores` has every class by name; `error` has `stage` and `reason`.
    """
    classes: list[str] = run["classes"]
    written = Written("jsonl", folder / "labels.jsonl")

    def write(stream: TextIO) -> None:
        for row in read_labels(folder):
            facts = {
                "path": row.path,
                "width": row.width,
                "height": row.height,
                "labels": list(row.labels),
                "scores": dict(zip(classes, _numbers(row), strict=True)),
                "model": row.model,
            }
            stream.write(_json(facts) + "\n")
            written.rows += 1
        for error in read_errors(folder):
            facts = {"path": error.path, "error": {"stage": error.stage, "reason": error.reason}}
            stream.write(_json(facts) + "\n")

    _write_text(folder / "labels.jsonl", write)
    return written


def write_coco(folder: Path, run: dict[str, Any]) -> Written:
    """LABELS/labels.coco.json: `images`, `categories`, and one annotation for each label of an image.

    COCO knows boxes and masks, but no labels of a whole image. So an annotation's `bbox` is all of its image,
    `area` its pixels, and `"whole_image": true` says that no object lies there in particular; `score` is the
    class's score, as in COCO's results. Images without labels are there without annotations; inputs that failed
    are not. Category ids count from 1 in the order of the classes and have their `threshold`.
    """
    classes: list[str] = run["classes"]
    category = {name: number for number, name in enumerate(classes, 1)}
    written = Written("coco", folder / "labels.coco.json")

    def images() -> Iterable[dict[str, Any]]:
        for number, row in enumerate(read_labels(folder), 1):
            written.rows = number
            yield {"id": number, "file_name": row.path, "width": row.width, "height": row.height}

    def annotations() -> Iterable[dict[str, Any]]:
        number = 0
        for image, row in enumerate(read_labels(folder), 1):
            scores = _numbers(row)
            for name in row.labels:
                number += 1
                yield {
                    "id": number,
                    "image_id": image,
                    "category_id": category[name],
                    "score": scores[category[name] - 1],
                    "bbox": [0, 0, row.width, row.height],
                    "area": row.width * row.height,
                    "iscrowd": 0,
                    "whole_image": True,
                }

    def write(stream: TextIO) -> None:
        about = {"description": f"labels by {run['model']}", "date_created": run.get("begun", "")}
        categories = [
            {"id": category[name], "name": name, "supercategory": "", "threshold": threshold}
            for name, threshold in zip(classes, run["thresholds"], strict=True)
        ]
        stream.write(f'{{"info": {_json(about)},\n"categories": {_json(categories)},\n"images": [')
        _write_items(stream, images())
        stream.write('],\n"annotations": [')
        _write_items(stream, annotations())
        stream.write("]}\n")

    _write_text(folder / "labels.coco.json", write)
    return written


# The formats that are one file in the folder, and their writers.
TABLES: dict[str, Callable[[Path, dict[str, Any]], Written]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "coco": write_coco,
}
FORMATS = (*TABLES, "xmp")


# Side-cars


def sidecar_of(image: str, style: str) -> str:
    """The name of an image's side-car."""
    if style == "full":
        return image + ".xmp"
    stem = os.path.splitext(image)[0]
    return (
        stem + ".XMP"
        if os.path.exists(stem + ".XMP") and not os.path.exists(stem + ".xmp")
        else stem + ".xmp"
    )


def write_xmp(folder: Path, run: dict[str, Any], style: str) -> Written:
    """Side-cars beside the images; see `write_labels` for the styles."""
    base = str(run.get("cwd", ""))
    shared = _shared_sidecars(folder, base, style)
    written = Written("xmp")
    for row in read_labels(folder):
        image = _own_file(base, row.path)
        if image is None:
            where = "remote" if is_remote(row.path) else "in an archive"
            written.skipped[f"the image is {where}"] += 1
            continue
        sidecar = sidecar_of(image, style)
        if sidecar in shared:
            reason = "several labelled images would share it: use --xmp-style full"
            written.failures.append((sidecar, reason))
            continue
        try:
            _write_sidecar(image, sidecar, row.labels, written)
        except DataError as error:
            written.failures.append((sidecar, f"left as it is: {error.happened}"))
    return written


def _write_sidecar(image: str, sidecar: str, labels: Sequence[str], written: Written) -> None:
    """Bring one side-car up to date.

    Raises:
        DataError: it cannot be read, changed or written.
        EnvironmentError_: the disk is full.
    """
    if not os.path.lexists(image):
        raise DataError("its image is not there any more")
    target = Path(os.path.realpath(sidecar))  # a link stays a link
    try:
        if target.exists() and target.stat().st_size > MAX_SIDECAR_BYTES:
            raise DataError(f"it has more than {MAX_SIDECAR_BYTES:,} bytes")
        before = target.read_bytes() if target.exists() else None
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror or error}") from error
    after = merged(before, labels)
    if after is None:
        written.skipped["the image has no labels and no side-car"] += 1
        return
    written.rows += 1
    if after == before:
        return
    mode = target.stat().st_mode if before is not None else None
    try:
        write_atomically(target, after)
    except EnvironmentError_ as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            written.rows -= 1
            raise DataError(f"it cannot be written: {cause.strerror}") from error
        raise
    if mode is not None:
        os.chmod(target, mode)
    written.changed += 1


def _own_file(base: str, path: str) -> str | None:
    """The file of an image on this machine's disks; None if it is remote or in an archive."""
    name = local_path(path) or path
    if is_remote(name):
        return None
    file = system_name(located(base, name))
    return None if archive_of(path) and not os.path.lexists(file) else file


def _shared_sidecars(folder: Path, base: str, style: str) -> set[str]:
    """Side-cars that are those of several labelled images, such as `a.xmp` of `a.jpg` and `a.png`."""
    if style == "full":
        return set()
    seen, shared = set[str](), set[str]()
    for path in read_labelled_paths(folder):
        image = _own_file(base, path)
        if image is not None:
            sidecar = sidecar_of(image, style)
            (shared if sidecar in seen else seen).add(sidecar)
    return shared


# Text


def _write_text(file: Path, write: Callable[[TextIO], None], **options: Any) -> None:
    with replaced_text(file, **options) as stream:
        write(stream)


def _write_items(stream: TextIO, items: Iterable[dict[str, Any]]) -> None:
    for number, item in enumerate(items):
        stream.write((",\n" if number else "\n") + _json(item))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _numbers(row: LabelRecord) -> list[float]:
    """Scores as the shortest decimals that mean the same float32."""
    return [float(str(score)) for score in row.scores]


def _no_formula(path: str) -> str:
    return f"./{path}" if path[:1] in ("=", "+", "-", "@") else path
