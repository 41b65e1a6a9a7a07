"""Class names, their synonyms and the prompts that describe them: the only place they come from.

A class file has one class a line, optionally with synonyms; `#` starts a comment:

    person: man, woman, people
    potted plant
    tv monitor: television, screen
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cliplet.errors import DataError, UsageError


@dataclass(frozen=True)
class PromptSet:
    """Templates that turn a class name into sentences; `{}` stands for the name.

    The version changes with the templates, so that two artifacts with the same name and version were made
    from the same sentences.
    """

    name: str
    version: int
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        bad = [t for t in self.templates if t.count("{}") != 1]
        if bad or not self.templates:
            raise UsageError(
                f"prompt templates {bad or self.templates} of {self.name!r}",
                "at least one template, each with exactly one {} for the class name",
                'write them like "a photo of a {}"',
            )

    def sentences(self, name: str) -> list[str]:
        """One sentence a template."""
        return [template.replace("{}", name) for template in self.templates]


# `ccd` is the one template of Classifier-guided CLIP Distillation (CVPR 2025).
# `ensemble7` holds the seven templates that CLIP's authors found to be the best small ensemble on ImageNet.
PROMPT_SETS: dict[str, PromptSet] = {
    p.name: p
    for p in (
        PromptSet("photo", 1, ("a photo of a {}",)),
        PromptSet("ccd", 1, ("a photo of the {}",)),
        PromptSet(
            "ensemble7",
            1,
            (
                "itap of a {}.",
                "a bad photo of the {}.",
                "a origami {}.",
                "a photo of the large {}.",
                "a {} in a video game.",
                "art of the {}.",
                "a photo of the small {}.",
            ),
        ),
        PromptSet("plain", 1, ("{}",)),
    )
}
DEFAULT_PROMPT_SET = "photo"
# What makes a word on the command line the name of a file that should be there.
CLASS_FILE_SUFFIXES = (".txt", ".csv", ".names", ".lst")
# Names of known class lists, and the file of each in assets/classes.
CLASS_LISTS = {
    "voc": "voc.txt",
    "voc07": "voc.txt",
    "voc12": "voc.txt",
    "coco": "coco.txt",
    "coco14": "coco.txt",
    "coco17": "coco.txt",
    "nus": "nus.txt",
}


@dataclass(frozen=True)
class ClassName:
    """A class as it is written into the results, and other words that mean it."""

    name: str
    synonyms: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        return (self.name, *self.synonyms)


@dataclass(frozen=True)
class Vocabulary:
    """The classes that images are labelled with, in the order of every score vector.

    Raises:
        DataError: no class, an empty name, or a class named twice.
    """

    classes: tuple[ClassName, ...]
    prompts: PromptSet = field(default_factory=lambda: PROMPT_SETS[DEFAULT_PROMPT_SET])
    source: str = "the class list"

    def __post_init__(self) -> None:
        if not self.classes:
            raise DataError(f"{self.source} names no class", "one class name a line", "add a class name")
        if any(not word.strip() for c in self.classes for word in c.words):
            raise DataError(
                f"{self.source} holds an empty name", "a word between all commas", "remove the extra comma"
            )
        twice = [n for n, k in Counter(c.name.casefold() for c in self.classes).items() if k > 1]
        if twice:
            raise DataError(
                f"{self.source} names {', '.join(map(repr, twice))} more than once",
                "each class once (upper and lower case are the same class)",
                "remove the repeated lines",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of every score vector."""
        return tuple(c.name for c in self.classes)

    def sentences(self) -> list[list[str]]:
        """For each class, all sentences whose mean embedding stands for it: words x templates."""
        return [[s for word in c.words for s in self.prompts.sentences(word)] for c in self.classes]

    def to_json(self) -> dict[str, Any]:
        """What a manifest keeps: enough to make the same sentences again."""
        return {
            "classes": [{"name": c.name, "synonyms": list(c.synonyms)} for c in self.classes],
            "prompt_set": self.prompts.name,
            "prompt_set_version": self.prompts.version,
            "templates": list(self.prompts.templates),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str = "the manifest") -> Vocabulary:
        """The vocabulary that `to_json` wrote."""
        prompts = PromptSet(data["prompt_set"], data["prompt_set_version"], tuple(data["templates"]))
        classes = tuple(ClassName(c["name"], tuple(c["synonyms"])) for c in data["classes"])
        return cls(classes, prompts, source)


class NoClasses(Vocabulary):
    """What a model that gives features, not labels, has in the place of a vocabulary."""

    def __init__(self) -> None:
        super().__init__(())

    def __post_init__(self) -> None:
        """Nothing to check."""

    def to_json(self) -> dict[str, Any]:
        return {"classes": []}


NO_CLASSES = NoClasses()


def prompt_set(name: str) -> PromptSet:
    """The prompt set called `name`, or one made of the template(s) written in it, separated by `|`.

    Raises:
        UsageError: neither a known name nor a template.
    """
    if "{}" in name:
        return PromptSet("custom", 1, tuple(t.strip() for t in name.split("|")))
    if name not in PROMPT_SETS:
        close = difflib.get_close_matches(name, PROMPT_SETS, 1)
        raise UsageError(
            f"no prompt set is called {name!r}",
            f"one of {', '.join(sorted(PROMPT_SETS))}, or a template with {{}} in it",
            f"--prompts {close[0] if close else DEFAULT_PROMPT_SET}",
        )
    return PROMPT_SETS[name]


def known_vocabulary(name: str, prompts: PromptSet | None = None) -> Vocabulary:
    """The classes of a public data set in its official order, written for people (`tv monitor`).

    Pascal VOC's 20 (`voc`, `voc07`, `voc12`), COCO's 80 (`coco`, `coco14`, `coco17`), NUS-WIDE's 81 (`nus`).

    Raises:
        UsageError: no list has that name.
    """
    if name not in CLASS_LISTS:
        raise UsageError(
            f"no class list is called {name!r}",
            f"one of {', '.join(CLASS_LISTS)}",
            "name one of them, or write a class file",
        )
    path = Path(__file__).parent / "assets" / "classes" / CLASS_LISTS[name]
    chosen = prompts or PROMPT_SETS[DEFAULT_PROMPT_SET]
    return Vocabulary(_parse_classes(path), chosen, f"the class list {name}")


def read_vocabulary(classes: str, prompts: PromptSet | None = None) -> Vocabulary:
    """The vocabulary named on a command line: a class file, a known list, or names separated by commas.

    A file comes first: it is also how to have a single class called `voc`.

    Raises:
        UsageError: it looks like a file, and there is none.
        DataError: the file is not text, or names no class, an empty one, or one twice.
    """
    chosen = prompts or PROMPT_SETS[DEFAULT_PROMPT_SET]
    # Not Path.is_file, which raises on a list of names that is longer than a file name may be.
    if os.path.isfile(classes):
        return Vocabulary(_parse_classes(Path(classes)), chosen, classes)
    if classes in CLASS_LISTS:
        return known_vocabulary(classes, chosen)
    looks_like_a_file = os.sep in classes or classes.endswith(CLASS_FILE_SUFFIXES) or os.path.isdir(classes)
    if looks_like_a_file and "," not in classes and classes.strip():
        raise UsageError(
            f"there is no class file {classes!r}",
            "a text file with one class name a line, or names separated by commas",
            "check the path, or write --classes 'cat,dog,person'",
        )
    if ":" in classes:
        raise UsageError(
            f"--classes {classes!r} has a colon",
            "names alone, separated by commas; synonyms need a class file",
            "write a file with one `name: synonym, synonym` a line",
        )
    names = tuple(ClassName(name.strip()) for name in classes.split(","))
    return Vocabulary(names if classes.strip() else (), chosen, "--classes")


def _parse_classes(path: Path) -> tuple[ClassName, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"cannot read the class file {path}: {error}",
            "a readable UTF-8 text file",
            "save it as UTF-8 text, one class name a line",
        ) from error
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return tuple(_parse_class(line) for line in lines if line)


def _parse_class(line: str) -> ClassName:
    name, colon, synonyms = line.partition(":")
    return ClassName(name.strip(), tuple(s.strip() for s in synonyms.split(",")) if colon else ())
