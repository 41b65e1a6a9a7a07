"""Everything cliplet raises on purpose, and the exit code each ends with.

    ClipletError              1  catch this one to catch them all
    ├── UsageError            2  what a user asked cannot be done as asked
    ├── DataError             1  what a file holds is not what it should hold
    ├── EnvironmentError_     1  what this machine lacks: a library, a right, space on a disk
    ├── ParityError           3  an exported graph does not agree with its original
    ├── ArtifactError         1  a bundle is incomplete, changed or made by another version
    │   └── ForeignEngine     1  an engine is whole, but made for another GPU, or by another library or version
    ├── ServerError           1  a server is away, busy, too slow, or failed: nothing is wrong with what was asked
    └── ObjectiveError        4  an error rate or a latency objective was exceeded

Every message has up to three parts: what happened, what was expected, and the one command that mends it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Exit code of a run that was interrupted with its work saved; no error stands for it.
INTERRUPTED = 130


class ClipletError(Exception):
    """Base of all errors that cliplet raises on purpose.

    Args:
        happened: what happened, with the value that was received.
        expected: what was expected instead.
        fix: the one command or step that mends it.
    """

    exit_code = 1

    def __init__(self, happened: str, expected: str = "", fix: str = "") -> None:
        super().__init__(happened, expected, fix)
        self.happened = happened
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.happened]
        if self.expected:
            lines.append(f"expected: {self.expected}")
        if self.fix:
            lines.append(f"fix: {self.fix}")
        return "\n".join(lines)


class UsageError(ClipletError):
    """What a user asked cannot be done as asked."""

    exit_code = 2


class DataError(ClipletError):
    """What a file holds is not what it should hold."""


class EnvironmentError_(ClipletError):
    """What this machine lacks: a library, a right, space on a disk."""


class ParityError(ClipletError):
    """An exported graph does not agree with its original."""

    exit_code = 3


class ArtifactError(ClipletError):
    """A bundle is incomplete, changed or made by another version."""


class ForeignEngine(ArtifactError):
    """An engine is whole, but made for another GPU, or by another library or version than this machine's."""


class ServerError(ClipletError):
    """A server is away, busy, too slow, or failed: nothing is wrong with what was asked."""


class ObjectiveError(ClipletError):
    """An error rate or a latency objective was exceeded."""

    exit_code = 4


@contextmanager
def explained_os_errors(path: Path, fix: str = "choose another --out") -> Iterator[None]:
    """Context in which the system's refusal to write `path` becomes an `EnvironmentError_` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentError_(
                f"no space left while writing {path} ({error.strerror})",
                "room for the output; what was written before is whole and kept",
                "free some space, then run the same command again to continue",
            ) from error
        raise EnvironmentError_(
            f"cannot write {path}: {error.strerror or error}", "a folder that can be created and written", fix
        ) from error
