"""What is measured of features whose truth is known, wherever they come from.

    found = probe_features(train, evaluation, names, ProbeOptions())
    found["measured"]["linear"]["mAP"]

Legend: N images of a split, C classes, D width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from cliplet.errors import UsageError

from .probe_judge import Judge, Labelled
from .probe_linear import STEPS, LinearSettings, linear_probe, strength_of
from .probe_neighbours import neighbour_votes, retrieval

MEASURES = ("linear", "knn", "retrieval", "zero-shot")
NEIGHBOURS = (1, 5, 10, 20)
RECALLS = (1, 5, 10)
QUERY_SALT = 2  # tells the random choice of queries from others of the same seed
# Scores [N, C] of unit features [N, D], by their name: what a text tower says.
TextScores = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What is measured and how; the defaults of the command line.

    Attributes:
        measures: of MEASURES; none means all that the encoder is capable of.
        features, held_out: of the linear probe; see `LinearSettings`.
        evaluation_share: of the images, where training and evaluation split are one and the same.
        queries: images at most that retrieval asks about, drawn at random; all others are there to be found.
        seed: of all random choices.
        batch: images that are embedded at once.
        overwrite: forget the features of an earlier run.
    """

    measures: tuple[str, ...] = ()
    features: str = "standardised"
    held_out: float = 0.2
    evaluation_share: float = 0.5
    queries: int = 10_000
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    workers: int = 0
    batch: int = 64
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown:
            raise UsageError(f"no measure is called {unknown[0]!r}", f"one of {', '.join(MEASURES)}")
        if not 0 < self.evaluation_share < 1:
            raise UsageError(f"an evaluation share of {self.evaluation_share}", "a share between 0 and 1")
        self.linear_settings()

    def linear_settings(self) -> LinearSettings:
        """Those of the linear probe; refused here and not after everything is embedded."""
        return LinearSettings(
            features=self.features, held_out=self.held_out, seed=self.seed, device=self.device
        )


def probe_features(
    train: Labelled,
    evaluation: Labelled,
    names: tuple[str, ...],
    options: ProbeOptions,
    *,
    measures: tuple[str, ...] = MEASURES[:3],
    text_scores: TextScores | None = None,
) -> dict[str, Any]:
    """What the measures find in features: `classes`, `chance`, `measured`, `notes` and `seconds`, ready for JSON.

    Args:
        names: the classes [C].
        text_scores: of zero-shot: scores [N, C] of unit features, by their name.

    Raises:
        DataError: no class can be measured, or the linear probe cannot be judged.
    """
    judge = Judge.of(names, train.truth_NC, evaluation.truth_NC)
    session = _Session(train, evaluation, judge, options)
    if "linear" in measures:
        session.linear()
    if "knn" in measures:
        session.neighbours()
    if "retrieval" in measures:
        session.retrieval()
    if "zero-shot" in measures:
        assert text_scores is not None
        session.zero_shot(text_scores)
    measured = [name for name, is_in in zip(names, judge.measured_C, strict=True) if is_in]
    return {
        "classes": {"measured": measured, "left_out": judge.left_out},
        "chance": {"mAP": judge.chance},
        "measured": session.measured,
        "notes": session.notes,
        "seconds": session.seconds,
    }


class _Session:
    """Measures one after the other, and keeps what they find."""

    def __init__(self, train: Labelled, evaluation: Labelled, judge: Judge, options: ProbeOptions) -> None:
        self.train, self.train_ND = train, train.unit
        self.evaluation, self.evaluation_ND = evaluation, evaluation.unit
        self.judge, self.options = judge, options
        self.measured: dict[str, Any] = {}
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = perf_counter()
        yield
        self.seconds[name] = perf_counter() - began

    def linear(self) -> None:
        with self._timed("linear"):
            found = linear_probe(self.train_ND, self.train.truth_NC, self.options.linear_settings())
            quality = self.judge.quality(found.scores(self.evaluation_ND))
        self.measured["linear"] = {
            **quality,
            "loss": "multinomial" if found.one_label else "one-vs-rest",
            "features": self.options.features,
            "strength": found.strength,
            "swept": [{"strength": s, "held_out": 100 * value} for s, value in found.swept.items()],
            "chosen_by": "top-1" if found.one_label else "mAP",
            "held_out_images": found.held_out,
        }
        if found.strength in (strength_of(0), strength_of(STEPS)):
            self.notes.append(f"the L2 strength {found.strength:g} is at the end of the sweep")
        if found.unconverged:
            self.notes.append(f"{found.unconverged} fits of the linear probe ended before they had converged")

    def neighbours(self) -> None:
        counts = [k for k in NEIGHBOURS if k <= len(self.train_ND)]
        if len(counts) < len(NEIGHBOURS):
            self.notes.append(f"no more than {counts[-1]} neighbours of {len(self.train_ND)} training images")
        with self._timed("knn"):
            votes = neighbour_votes(
                self.train_ND,
                self.train.truth_NC,
                self.evaluation_ND,
                counts,
                device=self.options.device,
            )
            self.measured["knn"] = {str(k): self.judge.quality(s) for k, s in votes.scores.items()}
        if votes.duplicates:
            self.notes.append(f"{votes.duplicates:,} evaluation images have a duplicate in training")

    def retrieval(self) -> None:
        count = len(self.evaluation_ND)
        rows = np.arange(count)
        if count > self.options.queries:
            chosen = np.random.default_rng([self.options.seed, QUERY_SALT]).permutation(count)
            rows = np.sort(chosen[: self.options.queries])
        with self._timed("retrieval"):
            found = retrieval(
                self.evaluation_ND,
                self.evaluation.truth_NC,
                RECALLS,
                queries=rows,
                device=self.options.device,
            )
        self.measured["retrieval"] = {
            **{f"recall_at_{k}": 100 * share for k, share in found.recall_at.items()},
            "mAP_at_R": 100 * found.map_at_r,
            "queries": found.queries,
            "without_match": found.without_match,
            "gallery": count,
            "duplicate_pairs_left_out": found.duplicates,
            "hit": "an image that has a label in common",
        }

    def zero_shot(self, text_scores: TextScores) -> None:
        with self._timed("zero-shot"):
            scores = text_scores(self.evaluation_ND)
            self.measured["zero-shot"] = {name: self.judge.quality(found) for name, found in scores.items()}
