"""Writes the model repository of served bundles: folders and files as Triton reads them.

served, refused = plan_served([("pets", Path("bundle"))], ServeSettings())
write_repository(served, Path("repository"), ServeSettings())

repository/pets/config.pbtxt             the tagger, labels.txt beside it; or a trunk's embedder
repository/pets/1/model.py
repository/pets_snippets/config.pbtxt    the raw graph
repository/pets_snippets/1/…             model.py, or the engine for one of Triton's own backends
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cliplet.artifact import staging_folder
from cliplet.errors import UsageError, explained_os_errors

from .repository_config import LABELS_FILE, MODEL_PY, PATHS_PY, TEMPLATES, graph_config, tagger_config
from .repository_plan import plan_served, shared_memory_bytes
from .repository_types import Refused, Served, ServedGraph, ServeSettings

__all__ = [
    "Refused",
    "ServeSettings",
    "Served",
    "ServedGraph",
    "plan_served",
    "shared_memory_bytes",
    "write_repository",
]

CONFIG_FILE = "config.pbtxt"
VERSION = "1"
# The first line of every configuration that is written here, and of no other.
SIGNATURE = "# Written by cliplet serve."
_OTHER_PLACE = "choose another folder for the repository"


def write_repository(served: Sequence[Served], folder: Path, settings: ServeSettings) -> Path:
    """The repository of these bundles in `folder`, all at once; one that cliplet wrote there before is replaced.

    Raises:
        UsageError: the folder holds something else.
        EnvironmentError_: it cannot be written.
    """
    _hold_replaceable(folder)
    with staging_folder(folder, _OTHER_PLACE) as staged, explained_os_errors(folder, _OTHER_PLACE):
        for one in served:
            _write_tagger(one, staged, settings)
            for graph in one.graphs:
                _write_graph(one, graph, staged, settings, shared=len(served) > 1)
        # Temporary folders are for their maker alone; a server may run as another user.
        staged.chmod(0o755)
        _replace(staged, folder)
    return folder


def _write_tagger(served: Served, repository: Path, settings: ServeSettings) -> None:
    model = repository / served.name
    _write_python("tagger", model)
    (model / CONFIG_FILE).write_text(tagger_config(served, settings), encoding="utf-8")
    names = served.plan.vocabulary.names
    if names:
        (model / LABELS_FILE).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _write_graph(
    served: Served, graph: ServedGraph, repository: Path, settings: ServeSettings, *, shared: bool
) -> None:
    model = repository / graph.name
    if graph.files:
        (model / VERSION).mkdir(parents=True)
        for name, source in graph.files.items():
            _link(source.resolve(), model / VERSION / name)
    else:
        _write_python("graph", model)
    text = graph_config(served, graph, settings, shared=shared)
    (model / CONFIG_FILE).write_text(text, encoding="utf-8")


def _write_python(template: str, model: Path) -> None:
    version = model / VERSION
    version.mkdir(parents=True)
    shutil.copyfile(TEMPLATES / template / VERSION / MODEL_PY, version / MODEL_PY)
    shutil.copyfile(TEMPLATES / PATHS_PY, version / PATHS_PY)


def _link(source: Path, target: Path) -> None:
    """The file under a second name; a copy where the two folders lie on different disks."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _hold_replaceable(folder: Path) -> None:
    """Raise `UsageError` unless all that a folder holds was written here."""
    if not folder.exists():
        return
    foreign = [p for p in sorted(folder.iterdir()) if not _is_ours(p)] if folder.is_dir() else [folder]
    if foreign:
        raise UsageError(
            f"{folder} holds {foreign[0].name}, which is no model that cliplet wrote",
            "a new or empty folder, or an older repository of cliplet's",
            _OTHER_PLACE,
        )


def _is_ours(model: Path) -> bool:
    config = model / CONFIG_FILE
    return config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith(SIGNATURE)


def _replace(staged: Path, folder: Path) -> None:
    """Put a finished folder in the place of another."""
    if folder.exists():
        with staging_folder(folder, _OTHER_PLACE) as old:
            os.replace(folder, old / folder.name)
            os.replace(staged, folder)
    else:
        os.replace(staged, folder)
