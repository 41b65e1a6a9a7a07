"""The processes that run a server's Python models, looked at from outside.

A model may have several, and an inference tries only one of them: that another one died is seen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
STUB_NAME = "triton_python_backend_stub"


def stubs_of(server: int) -> dict[int, str]:
    """For each such process of a server, its model's name."""
    found = {}
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):
            if _stat(folder)[1] != str(server):
                continue
            # stub, REPOSITORY/MODEL/VERSION/model.py, …
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if Path(words[0].decode()).name == STUB_NAME:
                found[int(folder.name)] = Path(words[1].decode()).parent.parent.name
    return found


def failing_stubs(stubs: Mapping[int, str]) -> dict[str, str]:
    """For each model one of whose processes does not work, why."""
    reasons = {}
    for pid, model in stubs.items():
        try:
            state = _stat(PROC / str(pid))[0]
        except OSError:
            state = "X"
        if state in "ZX":
            reasons[model] = f"its process {pid} died"
        elif state in "Tt":
            reasons.setdefault(model, f"its process {pid} is stopped")
    return reasons


def _stat(folder: Path) -> list[str]:
    """State, parent and so on: what follows the name, which may hold anything, even parentheses."""
    return (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
