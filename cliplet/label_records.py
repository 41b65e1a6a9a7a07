"""What labelling says of one input: a row of labels, or why there is none.

Apart from `cliplet.labels`, which keeps them in files: Triton's Python has a NumPy that pyarrow does not take.

Legend: C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelRecord:
    """What one image was labelled with.

    Attributes:
        path: the image as the user named it.
        width, height: pixels of the image as it is displayed (after EXIF rotation).
        labels: names of the classes at or above their threshold, best first.
        scores: float32 [C], in the order of the vocabulary.
        model: the model that scored it.
        seconds: this image's share of the time its batch took in the engine.
    """

    path: str
    width: int
    height: int
    labels: tuple[str, ...]
    scores: np.ndarray
    model: str
    seconds: float


@dataclass(frozen=True)
class ErrorRecord:
    """Why one input has no labels: the stage that failed (`read`, `decode`, `infer`) and the reason."""

    path: str
    stage: str
    reason: str
