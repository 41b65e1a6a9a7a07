"""Progress: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cliplet.progress import ProgressBar


class Clock:
    """Seconds that a test decides."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(*, terminal: bool = False, quiet: bool = False) -> str:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=100)
    with ProgressBar("labelling", 100, done=10, quiet=quiet, console=console, clock=clock) as bar:
        for _ in range(9):
            clock.now += 4
            bar.advance(10)
    return out.getvalue()


def test_plain_lines_come_now_and_then_with_the_rate_of_this_run() -> None:
    assert lines().splitlines() == [
        "labelling: 40 of 100 images, 2.5 images/s",
        "labelling: 70 of 100 images, 2.5 images/s",
        "labelling: 100 of 100 images, 2.5 images/s",
    ]


def test_a_terminal_gets_a_bar() -> None:
    shown = lines(terminal=True)
    assert "100/100" in shown
    assert "images/s" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_quiet(terminal: bool) -> None:
    assert lines(terminal=terminal, quiet=True) == ""
