"""What is seen in a fragment of a scene, and the captions people could give it.

Captions name the one or two objects that fill most of the fragment, in one of several templates and by one of
several names. So the model becomes what CLIP is: sure of the salient object, silent about the small ones,
better at frequent classes, and different from view to view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PROMPT = "a photo of a {}"
TEMPLATES = (
    PROMPT,
    PROMPT,
    "a photo of {article} {}.",
    "a picture of {article} {}",
    "{article} {}",
    "a drawing of {article} {}.",
    "there is {article} {} here",
    "a scene with {article} {}.",
    "a close-up photo of {article} {}.",
    "{}",
)
EMPTY_CAPTIONS = (
    "a photo of nothing.",
    "an empty background",
    "a photo of an empty background.",
    "nothing here",
    "a plain texture",
    "a background without objects",
)
SYNONYMS = {
    "aeroplane": ("airplane", "plane"),
    "bicycle": ("bike",),
    "boat": ("ship",),
    "bus": ("coach",),
    "car": ("automobile",),
    "cat": ("kitten",),
    "dog": ("puppy",),
    "motorbike": ("motorcycle", "scooter"),
    "person": ("man", "woman", "human"),
    "potted plant": ("plant", "pot plant"),
    "sofa": ("couch",),
    "train": ("railway train",),
    "tv monitor": ("tv", "television", "monitor"),
}


@dataclass(frozen=True)
class Caption:
    """A text and the classes it names, as their indices in order; none in a caption of emptiness."""

    text: str
    named: tuple[int, ...]


def caption(rng: np.random.Generator, shares_C: np.ndarray, classes: Sequence[str]) -> Caption:
    """A random caption of a fragment in which class c covers `shares_C[c]` of the pixels, float [C]."""
    ranked = [int(c) for c in np.argsort(-shares_C, kind="stable") if shares_C[c] > 0]
    if not ranked:
        return Caption(EMPTY_CAPTIONS[rng.integers(len(EMPTY_CAPTIONS))], ())
    named = ranked[:1]
    # The second object is spoken of the more often the larger it is beside the first.
    if len(ranked) > 1 and rng.random() < 0.6 * shares_C[ranked[1]] / shares_C[ranked[0]]:
        named = ranked[:2]
    words = [_spoken(rng, classes[c]) for c in named]
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    return Caption(_sentence(template, words), tuple(sorted(named)))


def every_caption(classes: Sequence[str]) -> list[str]:
    """All texts that `caption` can give for these classes."""
    words = [word for name in classes for word in (name, *SYNONYMS.get(name, ()))]
    subjects = [[word] for word in words] + [[first, second] for first in words for second in words]
    return [
        *EMPTY_CAPTIONS,
        *(_sentence(template, some) for template in sorted(set(TEMPLATES)) for some in subjects),
    ]


def _sentence(template: str, words: Sequence[str]) -> str:
    subject = words[0] if len(words) == 1 else f"{words[0]} and {article(words[1])} {words[1]}"
    return template.format(subject, article=article(words[0]))


def article(noun: str) -> str:
    """`a` or `an`, whichever is said before the noun."""
    return "an" if noun[0].lower() in "aeiou" else "a"


def _spoken(rng: np.random.Generator, name: str) -> str:
    others = SYNONYMS.get(name, ())
    if others and rng.random() < 0.35:
        return others[rng.integers(len(others))]
    return name
