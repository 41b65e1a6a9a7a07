"""A running Triton: started, proven ready by inference, watched, started again if asked, and stopped without a trace.

with TritonServer(repository, ServerOptions()) as server:
    server.wait_ready()
    server.supervise()
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Self

from cliplet.errors import ClipletError, EnvironmentError_, UsageError, explained_os_errors
from cliplet.server_address import SECRET_HEADER, TOKEN_HEADER, ServerState, state_file, write_state
from cliplet.triton_program import TritonProgram, find_triton

from .health import Health, ModelHealth, Probe, card_of, check, probes_of
from .server_options import ServerOptions, command_line, free_ports, port_taken
from .server_process import ServerProcess
from .stubs import failing_stubs, stubs_of
from .triton_http import CallError, TritonHttp
from .triton_program import build_backends, server_environment

log = logging.getLogger("cliplet")

# Between two looks at whether the server lives; between inferences of each model, while all is well and while not.
LOOK_EVERY_S = 0.2
CHECK_EVERY_S = 10.0
RECHECK_EVERY_S = 1.0
# A model that answers with nothing but failures so often, right after it was loaded, will not mend itself.
STRIKES = 5
# A server that was well for so long has made up for the failures before.
STEADY_S = 60.0
LONGEST_BACKOFF_S = 60.0
# Triton's words of a model whose process died; it does not start another one.
DEAD_STUB = re.compile("is not healthy|its process .* died")
TAKEN = r"already in use"
# A repository is a temporary one unless a folder was named for it.
LOOK_AT_IT = "--repository FOLDER keeps it; then: cliplet serve check FOLDER"


class Stopped(Exception):
    """The server was asked to stop while somebody waited for it."""


class TritonServer:
    """A Triton that serves a repository; a context manager that starts and stops it.

    Attributes:
        ports: where it listens; real ones from `start` on.
        secret: what the private APIs ask for, in the header `cliplet-secret`.
        refused: models that do not serve, each with the reason; known from `wait_ready` on.
        restarts: how often it was started again.
        is_container: whether its Triton came with the system, as in NVIDIA's container; known from `start` on.
    """

    def __init__(self, repository: Path, options: ServerOptions | None = None) -> None:
        self.repository = repository
        self.options = options or ServerOptions()
        self.ports = self.options.ports
        self.secret = secrets.token_hex(16)
        self.refused: dict[str, str] = {}
        self.restarts = 0
        self._name = ""
        self._process: ServerProcess | None = None
        self._probes: list[Probe] = []
        self._once_ready: set[str] = set()
        self.is_container = False
        self._stubs: dict[int, str] = {}
        self._stop_asked = threading.Event()
        self._health_lock = threading.Lock()
        self._health: tuple[float, Health] = (-1e9, Health(()))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Triton's process; 0 while there is none."""
        return self._process.pid if self._process else 0

    @property
    def http(self) -> TritonHttp:
        """Its HTTP port, with all that is needed to call everything."""
        headers = {SECRET_HEADER: self.secret}
        if self.options.token is not None:
            headers[TOKEN_HEADER] = f"Bearer {self.options.token}"
        return TritonHttp(self.options.own_host, self.ports.http, headers)

    @property
    def models(self) -> list[str]:
        """The models that it serves; known from `wait_ready` on."""
        return [probe.model for probe in self._probes]

    @property
    def lost(self) -> dict[str, str]:
        """Models that were ready once and, since the server was started again, do not serve; each with the reason."""
        return {model: reason for model, reason in self.refused.items() if model in self._once_ready}

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.is_running

    def start(self) -> None:
        """Start the process; `wait_ready` waits for its models.

        Raises:
            UsageError: a port is taken, or there is no repository.
            EnvironmentError_: this machine lacks the server, or what it needs.
        """
        if not self.repository.is_dir():
            raise UsageError(
                f"no folder {self.repository}", "a model repository", "cliplet serve BUNDLE writes one"
            )
        program = find_triton()
        self.is_container = program.folder is None
        # Once it was started, it keeps its ports.
        self.ports = free_ports(replace(self.options, ports=self.ports))
        self._name = f"cliplet-{secrets.token_hex(6)}"
        with explained_os_errors(Path(tempfile.gettempdir()), "set TMPDIR to a folder that can be written"):
            private = Path(tempfile.mkdtemp(prefix="cliplet-triton-"))
        try:
            self._process = self._started(program, private)
            self._hold_alive()
            # With this a client of the same user proves that it is on this machine.
            write_state(ServerState(self.pid, self.secret, vars(self.ports)))
        except BaseException:
            # Nobody asked to stop: who watches over the server may try again.
            self._end()
            # Where there was no process yet, nobody else removes it.
            shutil.rmtree(private, ignore_errors=True)
            raise

    def _started(self, program: TritonProgram, private: Path) -> ServerProcess:
        """Triton's process, with its backends in the folder `private`, which goes when the process does."""
        with explained_os_errors(private, "set TMPDIR to a folder that can be written"):
            backends = build_backends(program, private / "backends")
        return ServerProcess(
            command_line(
                program,
                self.repository,
                self.options,
                self.ports,
                backends=backends,
                name=self._name,
                secret=self.secret,
            ),
            server_environment(program, backends),
            exit_timeout_s=self.options.exit_timeout_s,
            segments=self._name,
            paths=[private],
            notes=[state_file(self.ports.http), state_file(self.ports.grpc)],
            secret=self.secret,
            verbose=self.options.log_verbose > 0,
        )

    def stop(self) -> None:
        """Stop the server, its models' processes with it; harmless if it does not run."""
        self._stop_asked.set()
        self._end()

    def request_stop(self) -> None:
        """Make `wait_ready` and `supervise` return soon; safe in a signal's handler."""
        self._stop_asked.set()

    def wait_ready(self) -> Health:
        """The health of all models, once every one that serves has answered a tiny inference.

        Models that do not load, or answer with failures alone, end in `refused`. After a restart, those of them that
        were ready before are not waited for either, and keep the health from being ok.

        Raises:
            UsageError: another program took a port before the server did.
            EnvironmentError_: the server died, no model serves, or one gave no answer in time.
            Stopped: `request_stop` was called meanwhile.
        """
        end = monotonic() + self.options.ready_timeout_s
        # By its name: another server may have got the port.
        while self.http.name() != self._name:
            self._pause(end, "it does not answer; its models are still being loaded, or hang")
        self._hold_ports()
        self._learn_models()
        strikes: Counter[str] = Counter()
        while True:
            self._hold_some_serve()
            health = self.health()
            if not (reasons := self._unexpected(health)):
                self._once_ready |= set(self.models)
                return health
            strikes.update(m.model for m in health.models if not m.ok and m.answered)
            self._refuse({m: r for m, r in reasons.items() if strikes[m] >= STRIKES})
            self._pause(end, "; ".join(f"{model}: {reason}" for model, reason in reasons.items()))

    def health(self, max_age_s: float = 0.0) -> Health:
        """What came of a tiny inference of every model, within the deadline of the options; `lost` ones are not ok.

        Args:
            max_age_s: an answer that is no older may be given again, so that many who ask cost one inference.
        """
        with self._health_lock:
            when, known = self._health
            if monotonic() - when < max_age_s:
                return known
            if self.is_running:
                failing = failing_stubs(self._stubs)
                known = check(self.http, self._probes, self.options.deadline_s, failing)
            else:
                known = Health.down(self.models, "the server does not run")
            lost = [ModelHealth(m, False, 0.0, reason, answered=False) for m, reason in self.lost.items()]
            known = Health((*known.models, *lost))
            self._health = monotonic(), known
            return known

    def supervise(self) -> None:
        """Watch over the server until it is asked to stop, and start it again when it fails, if that was chosen.

        Raises:
            EnvironmentError_: it died and is not to be started again, or failed too often in a row.
        """
        failures, problem = 0, ""
        while True:
            if not problem:
                began = monotonic()
                problem = self._watch()
                failures = 0 if monotonic() - began > STEADY_S else failures
            if not problem or self._stop_asked.is_set():
                return
            if not self.options.restart:
                raise EnvironmentError_(problem, "a server that goes on running", "--restart starts it again")
            failures += 1
            if failures > self.options.most_failures:
                raise EnvironmentError_(
                    f"the server failed {failures} times in a row; the last time: {problem}",
                    "a server that stays up",
                    "start it again with --log-verbose 1 and read what it says",
                )
            problem = self._started_again(problem, failures)

    def _started_again(self, problem: str, failures: int) -> str:
        """Start the server again after a while; returns what went wrong, if anything did."""
        pause = min(self.options.backoff_s * 2 ** (failures - 1), LONGEST_BACKOFF_S)
        log.warning("%s\nthe server is started again in %.3g s", problem, pause)
        self._end()
        if self._stop_asked.wait(pause):
            return ""
        self.restarts += 1
        try:
            self.start()
            self.wait_ready()
        except Stopped:
            return ""
        except ClipletError as error:
            return str(error)
        lost = self.lost
        for model, reason in lost.items():
            log.error("model %s was lost at the restart: %s", model, reason)
        log.warning("the server is ready again%s", f", without {', '.join(lost)}" if lost else "")
        return ""

    def _watch(self) -> str:
        """Why the server has to be started again; empty once it is asked to stop."""
        sick: dict[str, float] = {}
        next_check = monotonic() + CHECK_EVERY_S
        while not self._stop_asked.wait(LOOK_EVERY_S):
            if not self.is_running:
                assert self._process is not None
                return self._process.how_it_ended()
            if monotonic() < next_check:
                continue
            health = self.health()
            if self.is_running and (problem := self._diagnosed(health, sick)):
                return problem
            next_check = monotonic() + (RECHECK_EVERY_S if sick else CHECK_EVERY_S)
        return ""

    def _diagnosed(self, health: Health, sick: dict[str, float]) -> str:
        """Why only a restart can help, if so; tells of models that fail and that recover."""
        now, reasons = monotonic(), self._unexpected(health)
        for model in sick.keys() - reasons.keys():
            log.warning("model %s answers again", model)
            del sick[model]
        for model, reason in reasons.items():
            if model not in sick:
                log.error("model %s fails: %s", model, reason)
            since = sick.setdefault(model, now)
            lasting = DEAD_STUB.search(reason) or now - since >= self.options.unhealthy_s
            if lasting and self.options.restart:
                return f"model {model} fails for good: {reason}"
        return ""

    def _unexpected(self, health: Health) -> dict[str, str]:
        """Why, of each model that is not well, but for lost ones: to restart for them would only disturb the others."""
        lost = self.lost
        return {model: reason for model, reason in health.reasons.items() if model not in lost}

    def _learn_models(self) -> None:
        """Which models were loaded and how to try them, and which were not and why."""
        try:
            index = self.http.index()
            gone = {
                model: f"it is no longer in {self.repository}" for model in self._once_ready - index.keys()
            }
            self.refused = {model: _brief(reason) for model, reason in index.items() if reason} | gone
            loaded = [model for model, reason in index.items() if not reason]
            cards = {model: card_of(self.http.config(model)) for model in loaded}
            self._probes = probes_of(self.http, loaded)
        except CallError as error:
            self._hold_alive()
            raise EnvironmentError_(
                f"the server does not tell its models: {error}", "a list of them", "start it again"
            ) from error
        self._stubs = stubs_of(self.pid)
        for model, card in cards.items():
            if card and card.graph in self.refused:
                self._refuse({model: f"it needs {card.graph}, which did not load"})

    def _refuse(self, reasons: Mapping[str, str]) -> None:
        self.refused |= reasons
        self._probes = [probe for probe in self._probes if probe.model not in self.refused]

    def _hold_some_serve(self) -> None:
        """Raise `EnvironmentError_` if there is nothing to wait for."""
        if not self._probes:
            why = "; ".join(f"{model}: {reason}" for model, reason in self.refused.items())
            raise EnvironmentError_(
                f"no model serves: {why or f'{self.repository} is empty'}",
                "at least one model that loads",
                LOOK_AT_IT,
            )

    def _pause(self, end: float, waiting_for: str) -> None:
        if self._stop_asked.wait(LOOK_EVERY_S / 2):
            raise Stopped
        self._hold_alive()
        if monotonic() > end:
            raise EnvironmentError_(
                f"the server was not ready within {self.options.ready_timeout_s:.3g} s: {waiting_for}",
                "an answer from every model",
                "--ready-timeout SECONDS gives it more time",
            )

    def _hold_alive(self) -> None:
        """Raise the error that says why the server is gone, if it is."""
        assert self._process is not None
        if self._process.is_running and self._process.pid:
            return
        how = self._process.how_it_ended()
        self._hold_ports()
        raise EnvironmentError_(how, "a server that goes on running", "read what it said above")

    def _hold_ports(self) -> None:
        """Raise `UsageError` if another program was faster; without the port of its metrics Triton goes on."""
        assert self._process is not None
        for name, port in vars(self.ports).items():
            if self._process.logs.said(rf":{port}\b.*{TAKEN}"):
                raise port_taken(port, name)

    def _end(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None


def _brief(reason: str) -> str:
    """What Triton says of a model that does not load, on one line."""
    return " ".join(reason.split())[:400]
