"""`cliplet serve`: bundles in; a repository, a server that answered, and a page beside it, until a signal comes.

with serving(job) as running:
    running.server.supervise()
"""

from __future__ import annotations

import ipaddress
import logging
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cliplet.errors import UsageError
from cliplet.model_spec import parse_model_spec
from cliplet.plan import TaggerSettings, make_plan
from cliplet.server_address import PAGE_PORT, ServerAddress
from cliplet.serving import EMBEDDER, TAGGER
from cliplet.tagger import exported_bundle
from cliplet.triton_program import find_triton

from .health import STATISTICS_SHARE
from .repository import Refused, Served, ServeSettings, plan_served, write_repository
from .repository_check import Problem, check_repository
from .repository_plan import safe_name
from .server import LOOK_AT_IT, TritonServer
from .server_options import EVERYWHERE, LOOPBACK, ServerOptions

log = logging.getLogger("cliplet")


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """What to serve and how.

    Attributes:
        bundles: folders or models, each perhaps with the name to serve it as before it: NAME=BUNDLE.
        settings: of the models.
        options: of the server.
        classes, prompts: of models that are no bundle yet.
        repository: a folder to keep the model repository in; None for a temporary one.
        page_port: of the page; None for no page.
        page_hosts: names of this machine that requests to the page may use beside the usual ones.
        skip_broken: serve the other bundles if one is no good.
    """

    bundles: Sequence[str]
    settings: ServeSettings = field(default_factory=ServeSettings)
    options: ServerOptions = field(default_factory=ServerOptions)
    classes: str | None = None
    prompts: str | None = None
    repository: Path | None = None
    page_port: int | None = PAGE_PORT
    page_hosts: Sequence[str] = ()
    skip_broken: bool = False


@dataclass(frozen=True)
class Running:
    """A server that is ready, and where it is reached.

    Attributes:
        served: the bundles whose taggers answer.
        refused: models and bundles that are not served, with the reason.
        page: the address of the page, perhaps with the token in its fragment; empty without one.
    """

    server: TritonServer
    served: tuple[Served, ...]
    refused: Mapping[str, str]
    page: str

    @property
    def http(self) -> str:
        return f"http://{self.server.http.host}:{self.server.ports.http}"

    @property
    def metrics(self) -> str:
        return f"http://{self.server.http.host}:{self.server.ports.metrics}/metrics"

    def address(self, name: str) -> str:
        """What `--model`, a client or `cliplet bench` takes to use a bundle through this server."""
        options = self.server.options
        return str(
            ServerAddress(_reachable(options.host), self.server.ports.grpc, name, tls=bool(options.tls_cert))
        )

    @property
    def tagger(self) -> Served | None:
        """The first that gives labels; None where only trunks are served."""
        return next((one for one in self.served if one.card.front is TAGGER), None)

    @property
    def trunk(self) -> Served | None:
        """The first that gives embeddings."""
        return next((one for one in self.served if one.card.front is EMBEDDER), None)

    @property
    def page_without_token(self) -> str:
        """The page's address as it may be kept in a log."""
        return self.page.partition("#")[0]

    def to_json(self) -> dict[str, Any]:
        return {
            "http": self.http,
            "grpc": f"{_reachable(self.server.options.host)}:{self.server.ports.grpc}",
            "metrics": self.metrics,
            "page": self.page_without_token or None,
            "models": {one.name: self.address(one.name) for one in self.served},
            "refused": dict(self.refused),
            "pid": self.server.pid,
        }

    def curl(self) -> str:
        """A command that tags one photograph through the page; Triton's own protocol is none for a shell."""
        if not (self.page and self.tagger):
            return ""
        token = ["-H", "authorization: Bearer TOKEN"] if self.server.options.token else []
        where = f"{self.page_without_token.rstrip('/')}/api/tag?model={self.tagger.name}"
        return shlex.join(["curl", *token, "--data-binary", "@photo.jpg", where])


def find_served(job: ServeJob) -> tuple[list[Served], list[Refused]]:
    """What will be served, and what cannot be; models that are no bundles yet are exported, or found in the cache.

    Raises:
        UsageError: a name without a bundle, or an unknown model.
        ClipletError: a bundle is no good, or a model cannot be exported here.
    """
    served, refused = plan_served(
        [_found(word, job) for word in job.bundles], job.settings, skip_broken=job.skip_broken
    )
    for broken in refused:
        log.error("%s is not served: %s", broken.name, broken.error)
    return served, refused


@contextmanager
def serving(job: ServeJob, server_made: Callable[[TritonServer], None] | None = None) -> Iterator[Running]:
    """Context in which the bundles are served and have answered.

    Args:
        server_made: called with the server before it is started, so that a signal can stop it.

    Raises:
        ClipletError: a bundle is no good, this machine lacks the server, a port is taken, no model answers, …
        Stopped: the server was asked to stop before it was ready.
    """
    _warn_of_strangers(job.options)
    # Known before anything is exported, which may take minutes.
    program = find_triton()
    # Where Triton came with the system, it brings its own backends.
    job = replace(job, settings=replace(job.settings, target="embedded" if program.folder else "container"))
    with ExitStack() as stack:
        served, refused = find_served(job)
        server = TritonServer(_repository(job, served, stack), job.options)
        if server_made is not None:
            server_made(server)
        stack.enter_context(server)
        # Before the server is ready: those who wait for it ask the page.
        page = _page(job, server, stack) if job.page_port is not None else ""
        server.wait_ready()
        for model, reason in server.refused.items():
            log.error("model %s does not serve: %s", model, reason)
        reasons = {broken.name: broken.error.happened for broken in refused} | server.refused
        answering = tuple(one for one in served if one.name not in server.refused)
        yield Running(server, answering, reasons, page)


def _found(word: str, job: ServeJob) -> tuple[str | None, Path]:
    name, equals, model = word.partition("=")
    # A path may hold a `=`; what stands before one in a name holds no slash.
    if not equals or "/" in name or Path(word).exists():
        name, model = "", word
    if equals and not model:
        raise UsageError(f"{word!r} names no bundle", "NAME=BUNDLE", "cliplet serve NAME=FOLDER")
    spec = parse_model_spec(model)
    if spec.bundle is not None:
        return name or None, spec.bundle
    settings = TaggerSettings(
        model=model,
        classes=job.classes,
        prompts=job.prompts,
        runtime=job.settings.runtime,
        precision=job.settings.precision,
        device=job.settings.device,
    )
    bundle = exported_bundle(make_plan(settings, features=True))
    # The cache's folders have names that nobody wants to call.
    return name or safe_name(Path(model).name, "model"), bundle.folder


def _repository(job: ServeJob, served: Sequence[Served], stack: ExitStack) -> Path:
    folder = job.repository
    if folder is None:
        folder = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cliplet-serve-"))) / "repository"
        )
    write_repository(served, folder, job.settings)
    mending = f"cliplet serve check {folder}" if job.repository else LOOK_AT_IT
    hold_no_problems(problems_here(folder), folder, mending)
    return folder


def problems_here(folder: Path) -> list[Problem]:
    """What the server of this machine would not like about a model repository."""
    program = find_triton()
    return check_repository(
        folder,
        backends=[path.name for path in (program.home / "backends").iterdir() if path.is_dir()],
        shm_bytes=shutil.disk_usage("/dev/shm").total,
        gpu=Path("/dev/nvidiactl").exists(),
    )


def hold_no_problems(problems: Sequence[Problem], folder: Path, mending: str) -> None:
    """Raise `UsageError` with all that a repository's lint found, if it found anything.

    Args:
        mending: a command that finds the same again.
    """
    if problems:
        raise UsageError(
            f"{folder} could not be served:\n  " + "\n  ".join(str(problem) for problem in problems),
            "a repository without problems",
            mending,
        )


def _page(job: ServeJob, server: TritonServer, stack: ExitStack) -> str:
    """Start the page beside the server; returns its address."""
    from .page import PageOptions, make_app, run_page
    from .page_backend import TritonBackend

    assert job.page_port is not None
    options = PageOptions(
        token=job.options.token or "",
        host_names=tuple(name.lower().rstrip(".") for name in job.page_hosts),
        # A check may begin when another one, of the server's own watch, ends; late ones look at the statistics, too.
        ready_s=2 * (1 + STATISTICS_SHARE) * job.options.deadline_s + 1,
    )
    app = make_app(TritonBackend(server), options)
    return stack.enter_context(run_page(app, job.options.http_host, job.page_port)).url


def _warn_of_strangers(options: ServerOptions) -> None:
    if not ipaddress.ip_address(options.host).is_loopback and options.token is None:
        log.warning("everybody who reaches %s may use this server: --token asks for a secret", options.host)


def _reachable(host: str) -> str:
    return LOOPBACK if host == EVERYWHERE else host
