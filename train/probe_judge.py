"""Features with the truth of their images, and what counts how well scores agree with it.

A mean over classes is over those with positives and negatives on both sides, for every measure the same; the others
are named. `mAP` is the all-points one, `mAP_11_point` that of VOC2007, which linear probes in papers report.

Legend: N images of a split, C classes, D width of the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cliplet.errors import DataError
from cliplet.metrics import average_precisions, eleven_point_average_precisions

from .probe_linear import is_learnable

MOST_NAMED = 3


@dataclass(frozen=True, eq=False)
class Labelled:
    """Features with the truth of their images.

    Attributes:
        features_ND: float; `unit` makes rows of length 1 of them.
        truth_NC: bool.
        paths: the images.

    Raises:
        DataError: other numbers of rows, or rows that are not finite or have no direction.
    """

    features_ND: np.ndarray
    truth_NC: np.ndarray
    paths: list[str]

    def __post_init__(self) -> None:
        counts = {len(self.features_ND), len(self.truth_NC), len(self.paths)}
        if len(counts) != 1 or not len(self.paths):
            raise DataError(
                f"{len(self.features_ND):,} rows of features and {len(self.truth_NC):,} of labels for "
                f"{len(self.paths):,} images",
                "one of each for every image, and at least one image",
            )
        lengths_N = np.linalg.norm(self.features_ND.astype(np.float64), axis=1)
        bad = np.flatnonzero(~(np.isfinite(lengths_N) & (lengths_N > 0)))
        if len(bad):
            named = ", ".join(self.paths[n] for n in bad[:MOST_NAMED])
            raise DataError(
                f"the features of {len(bad):,} of {len(self.paths):,} images are not finite or all 0: {named}",
                "a vector with a direction for every image",
                "check the encoder, then embed anew with --overwrite",
            )

    @property
    def unit(self) -> np.ndarray:
        """Rows of length 1, float64 [N, D]."""
        features_ND = self.features_ND.astype(np.float64)
        return features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Judge:
    """Counts how good scores are on the evaluation images."""

    names: tuple[str, ...]
    truth_NC: np.ndarray
    measured_C: np.ndarray
    left_out: dict[str, str]

    @classmethod
    def of(cls, names: tuple[str, ...], train_NC: np.ndarray, evaluation_NC: np.ndarray) -> Judge:
        """The judge of a data set.

        Raises:
            DataError: no class can be measured.
        """
        reasons = {
            "no positive in training": np.asarray(~train_NC.any(0)),
            "no image without it in training": np.asarray(train_NC.all(0)),
            "no positive in evaluation": np.asarray(~evaluation_NC.any(0)),
            "no image without it in evaluation": np.asarray(evaluation_NC.all(0)),
        }
        left_out = {
            name: next(reason for reason, holds_C in reasons.items() if holds_C[c])
            for c, name in enumerate(names)
            if any(holds_C[c] for holds_C in reasons.values())
        }
        measured_C = is_learnable(train_NC) & is_learnable(evaluation_NC)
        if not measured_C.any():
            name, reason = next(iter(left_out.items()))
            raise DataError(
                f"none of {len(names)} classes can be measured; {name}: {reason}",
                "images with and without a class, in training and in evaluation",
                "label more images, or choose other splits",
            )
        return cls(names, evaluation_NC, measured_C, left_out)

    @property
    def chance(self) -> float:
        """mAP in percent that scores at random have in the long run: the mean share of positives."""
        return 100 * float(self.truth_NC[:, self.measured_C].mean())

    def quality(self, scores_NC: np.ndarray) -> dict[str, Any]:
        """mAP counted in both ways, the APs, and top-1 where every image has one label; all in percent."""
        scores, truth = scores_NC[:, self.measured_C], self.truth_NC[:, self.measured_C]
        all_points, eleven = average_precisions(scores, truth), eleven_point_average_precisions(scores, truth)
        found = {"mAP": 100 * float(all_points.mean()), "mAP_11_point": 100 * float(eleven.mean())}
        if (self.truth_NC.sum(1) == 1).all():
            right_N = self.truth_NC[np.arange(len(scores_NC)), scores_NC.argmax(1)]
            found["top_1"] = 100 * float(right_N.mean())
        return {**found, "AP": self._named(all_points), "AP_11_point": self._named(eleven)}

    def _named(self, values: np.ndarray) -> dict[str, float]:
        kept = [name for name, measured in zip(self.names, self.measured_C, strict=True) if measured]
        return dict(zip(kept, (100 * values).tolist(), strict=True))
