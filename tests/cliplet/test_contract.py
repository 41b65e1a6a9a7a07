"""The contract refuses tensors that do not fit, and says how."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cliplet.contract import SNIPPETS
from cliplet.errors import DataError

Feeds = dict[str, np.ndarray]


def feeds() -> Feeds:
    return {"image": np.zeros((2, 32, 32, 3), np.uint8), "boxes": np.zeros((2, 5, 4), np.float32)}


def test_good_feeds_and_outputs_pass() -> None:
    outputs = {"view_probs": np.zeros((2, 5, 7), np.float32), "scores": np.zeros((2, 7), np.float32)}
    SNIPPETS.check_feeds(feeds())
    SNIPPETS.check_outputs(feeds(), outputs)
    outputs["scores"] = np.zeros((2, 6), np.float32)
    with pytest.raises(DataError, match="axis C is 6"):
        SNIPPETS.check_outputs(feeds(), outputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("boxes"), r"got tensors \['image'\]"),
        (lambda f: f.update(extra=np.zeros(1)), "exactly"),
        (lambda f: f.update(image=f["image"].astype(np.float32)), "is float32"),
        (lambda f: f.update(image=f["image"][..., :1]), "axis 3 is 1"),
        (lambda f: f.update(image=f["image"][0]), "uint8"),
        (lambda f: f.update(boxes=f["boxes"][:1]), "axis B is 1"),
    ],
)
def test_bad_feeds_are_named(change: Callable[[Feeds], object], message: str) -> None:
    bad = feeds()
    change(bad)
    with pytest.raises(DataError, match=message):
        SNIPPETS.check_feeds(bad)
