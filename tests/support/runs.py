"""Training runs of a few seconds, and the means to stop them at a chosen moment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cliplet.checkpoint import load_arrays
from cliplet.train.classifier_recipe import ClassifierRecipe
from cliplet.train.loop import RunOptions
from cliplet.train.recipes import scenes_ccd
from cliplet.train.run_data import DataOptions, make_scenes
from cliplet.train.train_classifier import TrainOptions, train_classifier

# 36 images to learn from and 4 held out: batches of 16, 16 and 4, hence three steps an epoch.
TOY = replace(
    scenes_ccd(),
    train_scenes=40,
    eval_scenes=16,
    image_size=64,
    region_size=96,
    epochs=3,
    warmup_epochs=1,
    batch=16,
    teacher_normalisation="imagenet",  # which asks it as it is, without exporting it to ONNX first
    precision="fp32",
)
STEPS = 3
# The same by `cliplet train scenes_ccd`.
TOY_ARGUMENTS = [
    *("--epochs", "3", "--batch-size", "16", "--precision", "fp32", "--threads", "1", "--workers", "1"),
    *("--set", "train_scenes=40", "--set", "eval_scenes=16", "--set", "image_size=64"),
    *("--set", "region_size=96", "--set", "warmup_epochs=1", "--set", "teacher_normalisation=imagenet"),
]

# `die_at` lets a process be killed when a function is called for the n-th time, with no chance to say good-bye.
_PRELUDE = """
import json, os, signal, sys
from importlib import import_module

import cliplet.train.loop
import cliplet.train.train_classifier
from cliplet.cli import main

def die_at(where, count):
    module, _, name = where.partition(":")
    *owners, name = name.split(".")
    owner = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    def counted(*given, **named):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(owner, name, counted)

options = cliplet.train.loop.RunOptions
moments, checkpoint_steps, *arguments = sys.argv[1:]
cliplet.train.loop.RunOptions = lambda **given: options(**given, checkpoint_steps=int(checkpoint_steps))
"""
# Runs `cliplet` once for each moment.
_KILLS = f"""{_PRELUDE}
for where, count in json.loads(moments):
    # Importing is what takes long; nothing was computed yet, hence there are no threads that a fork would lose.
    child = os.fork()
    if child == 0:
        die_at(where, count)
        os._exit(main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


# The same among processes that `torchrun` started: only the first of them dies.
_TOGETHER = f"""{_PRELUDE}
if os.environ["RANK"] == "0":
    for where, count in json.loads(moments):
        die_at(where, count)
sys.exit(main(arguments))
"""


class Killed(BaseException):
    """Stands for a kill within one process: nothing that is tested catches it."""


def toy_scenes(folder: Path) -> Path:
    """A folder of the scenes that `TOY` learns from and is evaluated on."""
    make_scenes(TOY, folder / "scenes", quiet=True)
    return folder / "scenes"


def trained(recipe: ClassifierRecipe, out: Path, scenes: Path | None, **more: Any) -> dict[str, Any]:
    """The report of a run on one thread, with the options of `RunOptions` and `TrainOptions` by their names."""
    run = {name: more.pop(name) for name in list(more) if name in RunOptions.__dataclass_fields__}
    options = TrainOptions(
        data=more.pop("data", DataOptions(root=scenes)),
        threads=1,
        run=RunOptions(**{"workers": 1, "quiet": True, **run}),
        **more,
    )
    return train_classifier(recipe, out, options)


@contextmanager
def killed_at(where: str, count: int) -> Iterator[None]:
    """Context that ends where the function `MODULE:NAME` is about to be called for the `count`-th time."""
    module, _, name = where.partition(":")
    *owners, name = name.split(".")
    owner: Any = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Killed
        return original(*given, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, counted)
        yield


def killed_runs(
    moments: Sequence[tuple[str, int]], *arguments: object, checkpoint_steps: int = 2
) -> list[int]:
    """Exit codes of `cliplet` run once for each moment and sent SIGKILL there: as a function is called the n-th time."""
    command = [sys.executable, "-c", _KILLS, json.dumps(moments), str(checkpoint_steps), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return [int(line) for line in ended.stdout.splitlines()]


def run_of_two(
    folder: Path, moments: Sequence[tuple[str, int]], *arguments: object
) -> subprocess.CompletedProcess[str]:
    """`cliplet` in two processes by torchrun, the first of which gets SIGKILL at the moments; it takes a script."""
    script = folder / "together.py"
    script.write_text(_TOGETHER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(script), json.dumps(moments), "2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def ending(out: Path) -> dict[str, Any]:
    """All that a run ends with, to the bit, besides the time that it took."""
    report = json.loads((out / "report.json").read_text())
    found: dict[str, Any] = {
        "history": [{k: v for k, v in row.items() if k != "seconds"} for row in report["history"]],
        "chosen": report["chosen_epoch"],
        "measured": report["measured"],
    }
    for stem in ("classifier", "checkpoint"):
        arrays, _ = load_arrays(out / stem, stem)
        found |= {f"{stem}.{name}": array.tobytes() for name, array in arrays.items()}
    return found
