"""Average precision and F1, against cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliplet.errors import DataError
from cliplet.metrics import average_precision, mean_average_precision, micro_f1


@pytest.mark.parametrize(
    ("scores", "truth", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], (1 / 1 + 2 / 3) / 2),
        ([0.9, 0.8], [1, 1], 1.0),
        ([0.9, 0.8], [0, 1], 0.5),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], 0.25),
        ([0.9, 0.8], [0, 0], 0.0),
    ],
)
def test_average_precision(scores: list[float], truth: list[int], expected: float) -> None:
    assert average_precision(np.array(scores), np.array(truth, bool)) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_the_order_of_the_images_does_not_matter(rows: list[tuple[int, bool]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    values = []
    for order in (rows, shuffled):
        scores, truth = zip(*order, strict=True)
        values.append(average_precision(np.array(scores, float), np.array(truth, bool)))
    assert values[0] == pytest.approx(values[1])
    assert 0 <= values[0] <= 1 + 1e-12


def test_the_mean_is_over_classes_in_percent() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.2]])
    truth = np.array([[True, True], [False, False]])
    assert mean_average_precision(scores, truth) == pytest.approx(100 * (1.0 + 0.5) / 2)
    with pytest.raises(DataError, match="against truth"):
        mean_average_precision(scores, truth[:1])


def test_micro_f1() -> None:
    tagged = np.array([[True, True], [False, False]])
    truth = np.array([[True, False], [True, False]])
    assert micro_f1(tagged, truth) == pytest.approx(0.5)
    assert micro_f1(~tagged & tagged, ~truth & truth) == 0
