"""The process of a server: started under its keeper, asked to stop, and gone for sure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cliplet.errors import EnvironmentError_

from . import triton_keeper
from .server_logs import LogForwarder

# Beyond the time that requests in flight get, until a server that does not stop is made to.
PATIENCE_S = 3.0


class ServerProcess:
    """A server that runs until `stop`, or until this process is gone, however that ends.

    Attributes:
        pid: of the server itself; 0 if it could not be started.
        logs: what it says.

    Args:
        exit_timeout_s: that the server takes, at most, once it is asked to stop.
        segments: how the names of its shared-memory segments begin; they are removed in the end.
        paths: files and folders that are removed in the end.
        notes: files that the server's clients know it by; those that hold `secret` are removed in the end, for another
            server may have written its own there since.

    Raises:
        EnvironmentError_: the system starts no more processes; nothing was removed.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        exit_timeout_s: float,
        segments: str,
        paths: Sequence[Path],
        notes: Sequence[Path],
        secret: str,
        verbose: bool = False,
    ) -> None:
        self._patience_s = exit_timeout_s + PATIENCE_S
        their_lifeline, self._lifeline = os.pipe()
        report, their_report = os.pipe()
        self._left: dict[str, Any] = {
            "segments": segments,
            "paths": [str(path) for path in paths],
            "notes": [str(note) for note in notes],
            "secret": secret,
        }
        job = {
            "lifeline": their_lifeline,
            "report": their_report,
            "patience_s": self._patience_s,
            "left": self._left,
        }
        keeper = [sys.executable, "-I", "-S", triton_keeper.__file__, json.dumps(job), "--"]
        try:
            self._keeper = subprocess.Popen(
                [*keeper, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=(their_lifeline, their_report),
                # A terminal's signals are for us; we stop the server.
                start_new_session=True,
            )
        except BaseException as error:
            os.close(self._lifeline)
            os.close(report)
            if not isinstance(error, OSError):
                raise
            raise EnvironmentError_(
                f"the server's process could not be started: {error}",
                "a system that lets one more process run",
                "free memory or end other processes, then run the same command again",
            ) from error
        finally:
            os.close(their_lifeline)
            os.close(their_report)
        assert self._keeper.stdout is not None
        self.logs = LogForwarder(self._keeper.stdout, verbose=verbose)
        with os.fdopen(report) as told:
            self.pid = int(told.readline().strip() or 0)

    @property
    def is_running(self) -> bool:
        return self._keeper.poll() is None

    def how_it_ended(self) -> str:
        """How the server ended, and its last words."""
        code = self._keeper.wait(self._patience_s)
        self.logs.finish(2.0)
        by_signal = code - 128 if code > 128 else -code
        how = f"was killed by signal {by_signal}" if by_signal > 0 else f"ended with exit status {code}"
        words = self.logs.quote()
        return f"the server {how}" + (f"; it said:\n  {words}" if words else "")

    def stop(self) -> None:
        """End the server, politely first, and remove all that was its; harmless if it is gone."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        try:
            self._keeper.wait(self._patience_s + PATIENCE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # The keeper leads the session in which all of them run; it removes the rest unless it was killed itself.
            with suppress(ProcessLookupError):
                os.killpg(self._keeper.pid, signal.SIGKILL)
            self._keeper.wait()
            self.logs.finish(2.0)
            triton_keeper.clean(**self._left)
