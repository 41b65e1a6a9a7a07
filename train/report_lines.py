"""What the reports of all training runs tell alike."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console


def tell_lost(
    console: Console,
    unreadable: Mapping[str, str],
    skipped: Mapping[str, str],
    not_evaluated: Mapping[str, str] | None = None,
) -> None:
    """Say how many images could not be read, were lost while training, or had no part in the mAP.

    Each time with the first of them and its reason.
    """
    told = {
        "unreadable": unreadable,
        "lost while training": skipped,
        "of the evaluation split unreadable, so without a part in the mAP": not_evaluated or {},
    }
    for what, named in told.items():
        if named:
            first = next(iter(named.items()))
            console.print(f"{len(named):,} images {what}, such as {first[0]}: {first[1]}", style="yellow")
