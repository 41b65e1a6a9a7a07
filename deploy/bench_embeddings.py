"""What is measured of a trunk, which gives no labels: from files to written embeddings, and the writing alone.

Verbs do not import each other, so what writes embeddings, a part of `train`, is found as the exporters are: by an
entry point. It needs no torch.

Legend: B images of a batch, D width of an embedding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import entry_points
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from cliplet.contract import EMBEDDINGS
from cliplet.errors import EnvironmentError_
from cliplet.images import ImageRef, Picture, find_images
from cliplet.plan import Plan
from cliplet.tagger import Tagger, load_plan

from .label import PART_ROWS

GROUP, NAME = "cliplet.embeddings", "files"


class EngineEmbedder:
    """Embeddings by the engine of a trunk that is loaded; an `Embedder` of `cliplet.train.embeddings`.

    Args:
        size: images in a batch: an engine that was built for some sizes may take no others.
    """

    def __init__(self, tagger: Tagger, size: int) -> None:
        self._tagger = tagger
        self._size = size

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._tagger.plan.fingerprint()

    @property
    def room(self) -> Mapping[str, int]:
        return self._tagger.room

    @cached_property
    def width(self) -> int:
        """D. No contract names it, so the engine is asked, by whoever wants to know first.

        Raises:
            DataError: what it gives for black images is not finite.
        """
        side = self._tagger.preprocessing.size
        black = Picture(np.zeros((side, side, 3), np.uint8), side, side)
        return int(self.embed([black] * self._size).shape[1])

    def embed(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Float32 [B, D], rows of length 1.

        Raises:
            DataError: they are not finite.
        """
        return self._tagger.score(pictures)[EMBEDDINGS]


def embed_folder(plan: Plan, images: Path, out: Path, size: int) -> dict[str, Any]:
    """How many images of a folder were embedded, how many failed, and the seconds from the first file to the last row.

    Before, the engine is loaded and has met one batch, from which the width of its embeddings is known.

    Args:
        plan: of a trunk.
        out: folder of the embeddings.
        size: images in a batch.

    Raises:
        ClipletError: the model cannot be loaded, the engine fails, or no image can be embedded.
    """
    writer = _writer()
    refs = find_images([str(images)]).images
    options = writer.EmbedOptions(batch=size, quiet=True)
    with load_plan(plan) as tagger:
        embedder = EngineEmbedder(tagger, size)
        assert embedder.width > 0
        made = writer.embed_images(refs, out, embedder, options)
    return {
        "inputs": len(refs),
        "images": made.embedded,
        "failed": len(made.failed),
        "seconds": made.seconds,
    }


def seconds_to_write(
    embedder: EngineEmbedder, refs: Sequence[ImageRef], pictures: Sequence[Picture], seconds: float
) -> float:
    """Seconds an image to write embeddings batch by batch and bring them to the disk, once for PART_ROWS rows.

    Args:
        pictures: a batch of decoded images, whose embeddings are written again and again.
        seconds: to spend on it.
    """
    rows_BD = embedder.embed(pictures)
    named = list(islice(cycle(refs), PART_ROWS))
    starts = range(0, PART_ROWS, len(rows_BD))
    found: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="cliplet-bench-") as folder,
        _writer().EmbeddingFile.open(Path(folder), named, embedder) as file,
    ):
        began = perf_counter()
        while not found or perf_counter() - began < seconds:
            start = perf_counter()
            for first in starts:
                places = np.arange(first, min(first + len(rows_BD), PART_ROWS))
                file.write(places, rows_BD[: len(places)])
            file.flush()
            found.append((perf_counter() - start) / PART_ROWS)
    return median(found)


def _writer() -> Any:
    """The module `cliplet.train.embeddings`.

    Raises:
        EnvironmentError_: this installation does not name it, or it cannot be imported.
    """
    found = list(entry_points(group=GROUP, name=NAME))
    if not found:
        raise EnvironmentError_(
            f"this installation of cliplet names nothing that writes embeddings (entry point {GROUP}: {NAME})",
            "an installation that is as new as its sources",
            "install it again: pip install -e . (or make setup)",
        )
    try:
        return found[0].load()
    except ImportError as error:
        raise EnvironmentError_(
            f"writing embeddings needs {error.name}",
            "what labelling needs",
            "pip install 'cliplet[edge]'",
        ) from error
