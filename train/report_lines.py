"""What the reports of all training runs tell alike."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console


def tell_lost(console: Console, unreadable: Mapping[str, str], skipped: Mapping[str, str]) -> None:
    """Say how many images could not be read, or were lost while training, with the first of each and its reason."""
    for what, named in (("unreadable", unreadable), ("lost while training", skipped)):
        if named:
            first = next(iter(named.items()))
            console.print(f"{len(named):,} images {what}, such as {first[0]}: {first[1]}", style="yellow")
