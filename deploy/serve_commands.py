"""The verb `serve`: options in, a server until a signal comes, its addresses told.

cliplet serve BUNDLE…          serve them here
cliplet serve check FOLDER     find out what Triton would not like about a model repository
cliplet serve files BUNDLE…    write the repository and all that a container needs
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from cliplet.errors import INTERRUPTED
from cliplet.plan import DEVICES, PRECISIONS, RUNTIMES
from cliplet.server_address import GRPC_PORT, HTTP_PORT, METRICS_PORT, PAGE_PORT, TOKEN_VARIABLE

if TYPE_CHECKING:
    from .serve import Running, ServeJob
    from .server import TritonServer

C = TypeVar("C", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
MIB = 2**20


class StartsByDefault(click.Group):
    """A group that is also a command: whatever is not the name of a subcommand are bundles to serve."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        return start.make_context(info_name, args, parent, **extra)


def model_options(command: C) -> C:
    """The options that say how bundles are served; the same wherever the server runs."""
    options = [
        click.option("--classes", help="For a model that is no bundle yet: a class file, or names separated by commas."),
        click.option("--prompts", help="For a model that is no bundle yet: a prompt set, or templates with {} separated by |."),
        click.option("--views", help="Where to look: 1, 1+2x2, 1+3x3, … Default: 1+3x3, or 1 for a classifier or a trunk."),
        click.option("--threshold", type=float, help="Score from which on a class is a label. Default: the bundle's own. A trunk has none."),
        click.option("--runtime", type=click.Choice([r for r in RUNTIMES if r != "torch"]), default="auto", show_default=True, help="auto: the fastest that is installed and in the bundle."),
        click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of the encoder. Refused, never replaced, if the bundle has no such engine."),
        click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True, help="Refused, never replaced, if it cannot be used."),
        click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of each engine (0: one a core)."),
        click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Engines of each graph at work at the same time."),
        click.option("--max-batch-size", type=click.IntRange(min=0), default=0, help="Most images in a batch (0: by the number of views, or as the engine was built)."),
        click.option("--queue-delay-us", type=click.IntRange(min=0), default=1000, show_default=True, help="How long an image waits for others to share its batch."),
        click.option("--max-queue", type=click.IntRange(min=1), default=256, show_default=True, help="Requests that may wait for a model; more are refused at once."),
        click.option("--max-pixels", type=click.IntRange(min=1), help="Larger images are refused before they are decoded."),
        click.option("--timeout-us", type=click.IntRange(min=0), help="Longest wait in a queue (0: any). Default: a minute."),
        click.option("--cache", "cache_mib", type=click.IntRange(min=0), default=0, show_default=True, metavar="MIB", help="Memory for answers, so that the same image costs nothing the second time (0: none)."),
        click.option("--skip-broken", is_flag=True, help="Serve the others if a bundle is no good."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def server_options(command: C) -> C:
    """The options that say where the server listens and how it is run."""
    options = [
        click.option("--host", default="127.0.0.1", show_default=True, help="IPv4 address to listen at; 0.0.0.0 lets everybody in who reaches this machine."),
        click.option("--http-port", type=int, default=HTTP_PORT, show_default=True, help="0 takes a free one; so do the others."),
        click.option("--grpc-port", type=int, default=GRPC_PORT, show_default=True, help="For clients; `label`, `eval` and `bench` use it unless told otherwise."),
        click.option("--metrics-port", type=int, default=METRICS_PORT, show_default=True, help="For Prometheus."),
        click.option("--page-port", type=int, default=PAGE_PORT, show_default=True, help="A page to try it, /healthz and /readyz."),
        click.option("--page/--no-page", default=True, show_default=True, help="Whether there is a page, and with it /healthz and /readyz."),
        click.option("--page-host", "page_hosts", multiple=True, metavar="NAME", help="Another name of this machine by which the page may be opened, as through a proxy; repeatable."),
        click.option("--token", envvar=["CLIPLET_SERVE_TOKEN", TOKEN_VARIABLE], help="Clients have to send `authorization: Bearer TOKEN`. Better given as an environment variable: command lines can be seen."),
        click.option("--tls-cert", type=FILE, help="Certificate (PEM) for gRPC; plain HTTP then stays on this machine."),
        click.option("--tls-key", type=FILE, help="Its key (PEM)."),
        click.option("--restart", is_flag=True, help="Start the server again when it dies, or when a model does for good."),
        click.option("--take-turns", is_flag=True, help="Bundles compute one at a time; one that hangs then holds up all."),
        click.option("--http-threads", type=click.IntRange(min=1), default=8, show_default=True, help="Threads that handle HTTP requests."),
        click.option("--ready-timeout", "ready_timeout_s", type=float, default=120.0, show_default=True, metavar="S", help="Until all models have answered once."),
        click.option("--exit-timeout", "exit_timeout_s", type=click.IntRange(min=0), default=10, show_default=True, metavar="S", help="For the requests in flight when it is stopped."),
        click.option("--deadline", "deadline_s", type=float, default=5.0, show_default=True, metavar="S", help="For the tiny inference that tells whether a model works."),
        click.option("--log-verbose", type=click.IntRange(min=0), default=0, help="How much Triton says."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=StartsByDefault)
def serve() -> None:
    """Serve bundles with NVIDIA Triton."""


@click.command(
    epilog="`cliplet serve check FOLDER` lints a model repository; `cliplet serve files BUNDLE… --out FOLDER` "
    "writes one and all that a container needs. Both have a --help of their own."
)
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@model_options
@server_options
@click.option("--repository", type=FOLDER, help="Keep the model repository in this folder.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    envvar="CLIPLET_SERVE_JSON",
    help="When all is ready, print the addresses as one line of JSON.",
)
def start(bundles: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Serve bundles until a signal comes, each as a model of its own: BUNDLE or NAME=BUNDLE.

    BUNDLE is a folder that `cliplet export` wrote; tiny, an open_clip model or the folder of a classifier or a trunk
    is exported first. Of a trunk, images give embeddings and not labels. Every model has answered a small image
    before the addresses are told.
    """
    from .serve import serving
    from .server import Stopped

    job = _job(bundles, options)
    with Signals() as signals:
        try:
            with serving(job, signals.stops) as running:
                _tell(running, job, as_json)
                running.server.supervise()
        except (Stopped, KeyboardInterrupt):
            pass
        return signals.exit_code


@serve.command()
@click.argument("repository", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--container", is_flag=True, help="It is for a container: what this machine has does not matter."
)
def check(repository: Path, container: bool) -> int:
    """Find out what Triton would not like about a model repository; exit code 1 if there is anything."""
    from .repository_check import check_repository
    from .serve import problems_here

    problems = check_repository(repository) if container else problems_here(repository)
    for problem in problems:
        click.echo(str(problem))
    models = sum(1 for path in repository.iterdir() if path.is_dir())
    click.echo(f"{repository}: {models} models, {len(problems)} problems")
    return 1 if problems else 0


@serve.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@model_options
@click.option("--out", type=FOLDER, required=True, help="Folder for the files; made here.")
@click.option(
    "--wheel", type=FILE, help="A wheel of cliplet, from `python -m build --wheel`; the image installs it."
)
def files(bundles: tuple[str, ...], out: Path, wheel: Path | None, **options: Any) -> int:
    """Write what a container needs to serve the bundles: repository, Dockerfile, compose, Kubernetes, dashboard."""
    from .container import ContainerOptions, container_command, write_container_files
    from .repository import write_repository
    from .repository_check import check_repository
    from .serve import find_served, hold_no_problems

    job = _job(bundles, options | {"target": "container"})
    container = ContainerOptions(wheel=wheel, **_container_cache(job))
    # Before anything is exported, which may take minutes.
    container.needed_wheel()
    served, _ = find_served(job)
    repository = write_repository(served, out / "repository", job.settings)
    mending = f"cliplet serve check {repository} --container"
    hold_no_problems(check_repository(repository), repository, mending)
    written = write_container_files(out, served, job.settings, container)
    for file in [repository, *written]:
        click.echo(f"wrote {file}")
    click.echo(f"next: docker build --tag {container.image} {out}, then")
    click.echo(container_command(served, job.settings, container))
    return 0


class Signals:
    """Context in which SIGTERM and SIGINT stop the server, or interrupt the work before there is one.

    Attributes:
        exit_code: 130 after an interrupt, else 0.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._server: TritonServer | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stops(self, server: TritonServer) -> None:
        """From now on a signal stops this server."""
        self._server = server

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.exit_code = INTERRUPTED if number == signal.SIGINT else 0
        if self._server is None:
            raise KeyboardInterrupt
        self._server.request_stop()


def _job(bundles: Sequence[str], options: dict[str, Any]) -> ServeJob:
    from .repository import ServeSettings
    from .serve import ServeJob
    from .server_options import Ports, ServerOptions

    def those_of(kind: type) -> dict[str, Any]:
        return {f.name: options[f.name] for f in fields(kind) if options.get(f.name) is not None}

    cache = options.get("cache_mib", 0)
    settings = ServeSettings(**those_of(ServeSettings), cache=cache > 0)
    ports = {
        name: options[f"{name}_port"] for name in ("http", "grpc", "metrics") if f"{name}_port" in options
    }
    server = ServerOptions(**those_of(ServerOptions), ports=Ports(**ports), cache_bytes=cache * MIB)
    page_port = options.get("page_port") if options.get("page") else None
    own = {k: options.get(k) for k in ("classes", "prompts", "repository")}
    return ServeJob(
        bundles=bundles,
        settings=settings,
        options=server,
        page_port=page_port,
        page_hosts=options.get("page_hosts", ()),
        skip_broken=options["skip_broken"],
        **own,
    )


def _tell(running: Running, job: ServeJob, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(running.to_json()))
        return
    for one in running.served:
        card = one.card
        names = card.manifest.vocabulary.names
        gives = f"{len(names)} classes, views {card.views}" if names else "embeddings"
        click.echo(f"{one.name}: {gives}, {card.runtime} {card.precision} on {card.device}")
    tagger, trunk = running.tagger, running.trunk
    rows = {
        "HTTP": running.http,
        "gRPC": running.to_json()["grpc"],
        "metrics": running.metrics,
        # What is no terminal may be kept, and with it the token.
        "page": running.page if sys.stdout.isatty() else running.page_without_token,
        "try": running.curl(),
        "label": f"cliplet label PHOTOS --model {running.address(tagger.name)}" if tagger else "",
        "embed": f'cliplet.deploy.client.Client("{running.address(trunk.name)}").embed("photo.jpg")'
        if trunk
        else "",
        **_container(running, job),
    }
    for word, value in rows.items():
        if value:
            click.echo(f"  {word:<10} {value}")
    click.echo("Ctrl-C stops it")


def _container(running: Running, job: ServeJob) -> dict[str, str]:
    """The command that serves the same in a container, and what it leaves out; none where this is one."""
    from .container import ContainerOptions, container_command, not_carried

    if running.server.is_container or not running.served:
        return {}
    settings = replace(job.settings, target="container")
    options = ContainerOptions(
        ports=job.options.ports, page_port=job.page_port, page_hosts=job.page_hosts, **_container_cache(job)
    )
    return {
        "container": container_command(running.served, settings, options, job.options),
        "not carried over:": "; ".join(not_carried(job.options)),
    }


def _container_cache(job: ServeJob) -> dict[str, Any]:
    return {"cache_bytes": job.options.cache_bytes} if job.options.cache_bytes else {}
