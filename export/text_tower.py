"""The text tower as a graph of its own, and what a vocabulary means to it, without the original.

Legend: C classes, D embedding, L text context, N sentences.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer

from cliplet.contract import TEXT
from cliplet.errors import EnvironmentError_, ParityError
from cliplet.runners.onnx_runner import OnnxRunner
from cliplet.teacher import Teacher, text_rows
from cliplet.vocabulary import Vocabulary

from .graphs import TextGraph
from .onnx_graph import metadata, set_metadata, trace

# Largest difference of a component of a unit vector.
TOLERANCE = 1e-4
TOKENIZER_KEY = "cliplet.tokenizer"
# CLIP's own tokenizer, which comes with open_clip; others are named as open_clip names them, and may be files.
CLIPS_OWN = "clip"


def export_text(teacher: Teacher, vocabulary: Vocabulary, target: Path) -> None:
    """Write the text tower of `teacher`, compared with the original on the prompts of `vocabulary`.

    Raises:
        ParityError: the two differ.
    """
    length = teacher.context_length
    example = {"tokens": teacher.tokenizer(["a photo", "another"], context_length=length)}
    trace(TextGraph(teacher.clip), TEXT, example, target, fixed=("L",))
    own = isinstance(teacher.tokenizer, SimpleTokenizer)
    described = {"name": CLIPS_OWN if own else teacher.spec.open_clip_name, "context_length": length}
    set_metadata(target, {TOKENIZER_KEY: json.dumps(described)})
    found = compare_text(target, teacher, vocabulary)
    if not found["passed"]:
        raise ParityError(
            f"the text tower's graph differs from the original by {found['largest']:.2g}",
            f"at most {TOLERANCE:g}",
        )


def compare_text(graph: Path, teacher: Teacher, vocabulary: Vocabulary) -> dict[str, Any]:
    """What a text tower's graph differs from the original's by, with the fields of `cliplet.export.parity.verdict`.

    There are no labels to agree and no images: `agreement` and mAP are None.

    Raises:
        EnvironmentError_: the model's tokenizer is not here.
    """
    found_CD, wanted_CD = rows_from_graph(graph, vocabulary), teacher.text_matrix(vocabulary).numpy()
    difference_CD = np.abs(found_CD - wanted_CD)
    largest = float(difference_CD.max())
    # Written so that nan is a breach.
    breaches = [] if largest <= TOLERANCE else [f"largest difference {largest:.2g}, tolerance {TOLERANCE:g}"]
    return {
        "against": "eager fp32",
        "on": f"the prompts of {len(vocabulary.names)} classes",
        "about": "text rows",
        "compared": difference_CD.size,
        "images": 0,
        "largest": largest,
        "mean": float(difference_CD.mean()),
        "cosine": float((found_CD * wanted_CD).sum(1).min()),
        "agreement": None,
        "map_original": None,
        "map_engine": None,
        "tolerance": {"largest": TOLERANCE},
        "breaches": breaches,
        "passed": not breaches,
    }


def rows_from_graph(graph: Path, vocabulary: Vocabulary) -> np.ndarray:
    """Unit text rows float32 [C, D] of a vocabulary by a text tower's graph.

    Raises:
        DataError: a sentence does not fit into the text context.
        EnvironmentError_: the model's tokenizer is not here.
    """
    described = json.loads(metadata(graph)[TOKENIZER_KEY])
    with OnnxRunner(graph, TEXT) as runner:

        def encode(tokens_NL: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(runner.infer({"tokens": tokens_NL.numpy()})["text"])

        tokenizer = _tokenizer(described["name"])
        return text_rows(vocabulary, tokenizer, described["context_length"], encode).numpy()


def _tokenizer(name: str) -> Callable[..., torch.Tensor]:
    if name == CLIPS_OWN:
        return SimpleTokenizer()
    try:
        return open_clip.get_tokenizer(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentError_(
            f"cannot get the tokenizer of {name}: {str(error).splitlines()[0]}",
            "the model's tokenizer on this machine, or a connection to the model hub",
            "export again from the original with --classes",
        ) from error
