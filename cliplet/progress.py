"""How far long work has come: a bar on a terminal, a plain line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Seconds between two plain lines.
LINE_EVERY_S = 10.0


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f} {self.unit}/s", style="cyan")


class ProgressBar:
    """Context that shows progress through `total` items.

    Args:
        done: items finished by an earlier run; they count, but not in the rate.
        clock: seconds that only grow (tests bring their own).
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "images",
        *,
        done: int = 0,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._what, self._total, self._unit = what, total, unit
        self._done = self._begun_with = done
        self._quiet, self._clock = quiet, clock
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._began = self._last_line = self._clock()
        if not self._quiet and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(self._unit),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._done)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, items: int) -> None:
        """Count `items` more as done."""
        self._done += items
        if self._bar is not None:
            self._bar.advance(self._task, items)
        elif not self._quiet and self._clock() - self._last_line >= LINE_EVERY_S:
            self._last_line = self._clock()
            rate = (self._done - self._begun_with) / (self._last_line - self._began)
            self._console.print(
                f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {rate:.1f} {self._unit}/s",
                highlight=False,
            )
