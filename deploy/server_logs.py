"""Triton's log lines, passed on as they come, with the last of them kept to quote."""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from typing import IO

log = logging.getLogger("cliplet.triton")

# Such as: E1122 21:45:08.763974 11433 main.cc:535] "failed to stop server"
_LINE = re.compile(r"^([IWEF])\d{4} [\d:.]+ \d+ (\S+)\] ?(.*)$")
_LEVELS = {"I": logging.DEBUG, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
# What Triton says of a machine without a GPU, or as it is told to stop; nobody has to act on it.
_HARMLESS = re.compile(r"pinned system memory|CudaDriverHelper|DCGM unable|initialize NVML|^Signal \(")
KEPT = 200


class LogForwarder:
    """Reads a server's output to its end in a thread of its own: a server whose output nobody reads stands still.

    Args:
        verbose: also tell what Triton says for information, which is a lot.
    """

    def __init__(self, stream: IO[bytes], *, verbose: bool) -> None:
        self._stream = stream
        self._levels = _LEVELS | ({"I": logging.INFO} if verbose else {})
        self._last: deque[tuple[int, str]] = deque(maxlen=KEPT)
        self._thread = threading.Thread(target=self._forward, name="triton-logs", daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float) -> None:
        """Wait until all that the server said was passed on."""
        self._thread.join(timeout_s)

    def said(self, pattern: str) -> re.Match[str] | None:
        """The first match in the lines that are kept."""
        return next((m for _, text in list(self._last) if (m := re.search(pattern, text))), None)

    def quote(self, lines: int = 6) -> str:
        """The last lines worth reading: errors if there are any."""
        kept = list(self._last)
        grave = [text for level, text in kept if level >= logging.ERROR]
        return "\n  ".join((grave or [text for _, text in kept])[-lines:])

    def _forward(self) -> None:
        with self._stream:
            for line in self._stream:
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._pass_on(text)

    def _pass_on(self, text: str) -> None:
        found = _LINE.match(text)
        if found:
            level, text = self._levels[found[1]], f"{found[3]} ({found[2]})"
        else:
            # Tables of what was configured are for the curious; what models write is for everybody.
            level = logging.DEBUG if re.match(r"[+|]", text) else logging.INFO
        if _HARMLESS.search(text):
            level = logging.DEBUG
        self._last.append((level, text))
        log.log(level, "triton: %s", text)
