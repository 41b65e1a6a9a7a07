"""The same server in NVIDIA's container: a command, and the files to build, run, watch and deploy it.

    write_container_files(Path("server"), served, settings)

    server/Dockerfile, constraints.txt, bundles/NAME/…     docker build
    server/compose.yaml                                    docker compose up --build
    server/kubernetes.yaml                                 kubectl apply
    server/prometheus.yaml, grafana.json                   what Triton measures

Sizes follow from what is served: shared memory from the largest batch, memory and disk from the engines. The process
in the container is `cliplet serve` as on any machine, so ready means the same: every model answered just now.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from string import Template
from typing import Any

from cliplet import __version__
from cliplet.artifact import staging_folder
from cliplet.errors import UsageError, explained_os_errors
from cliplet.server_address import PAGE_PORT, TOKEN_VARIABLE

from .page import HEALTH_PATH, READY_PATH
from .repository import Served, ServeSettings, shared_memory_bytes
from .server_options import EVERYWHERE, Ports, ServerOptions

# Of NVIDIA's containers, the one place where it is said: Python 3.12, CUDA 13.
TRITON_RELEASE = "25.10"
BASE_IMAGE = f"nvcr.io/nvidia/tritonserver:{TRITON_RELEASE}-py3"
IMAGE = f"cliplet-serve:{__version__}"
# Of `triton-server`, a user that NVIDIA's image brings.
USER = 1000
BUNDLES = "/opt/cliplet/bundles"
CERTIFICATE, KEY = "/opt/cliplet/tls/cert.pem", "/opt/cliplet/tls/key.pem"
CONSTRAINTS = "numpy<2\n"
INNER = Ports()
FOLDER = Path(__file__).parent
FILES = {
    "Dockerfile": "container.Dockerfile.template",
    "compose.yaml": "container.compose.template",
    "kubernetes.yaml": "container.kubernetes.template",
    "prometheus.yaml": "container.prometheus.template",
}
DASHBOARD = "grafana.json"
_OTHER_PLACE = "choose another --out"
# Options of the server that the container's own `cliplet serve` takes as they are, and those that it gets in another way.
SERVER_FLAGS = {
    "take_turns": "--take-turns",
    "http_threads": "--http-threads",
    "log_verbose": "--log-verbose",
    "ready_timeout_s": "--ready-timeout",
    "exit_timeout_s": "--exit-timeout",
    "deadline_s": "--deadline",
}
CARRIED_OTHERWISE = {"host", "ports", "token", "tls_cert", "tls_key", "cache_bytes", "restart"}
# What docker waits beyond the time that requests in flight get, before it kills a container.
GRACE_S = 20

MIB = 1 << 20
# Of a process that runs a Python model, with its libraries; and of all the rest of a server.
MODEL_BYTES = 384 * MIB
SERVER_BYTES = 768 * MIB
# An engine's weights, and what it computes between them.
ENGINE_FACTOR = 3
# What Triton's Python backend takes for itself, and no container should have less.
LEAST_SHM = LEAST_TMP = 256 * MIB
CPU_REQUEST, CPU_LIMIT = 2, 4
CHECK_S = 10
GPU_COMPOSE = """\
        reservations:
          devices:
            - {driver: nvidia, count: 1, capabilities: [gpu]}"""


@dataclass(frozen=True, kw_only=True)
class ContainerOptions:
    """What the files leave open.

    Attributes:
        image: the name that the built image gets.
        ports, page_port: where this machine listens for what the container serves, at the host that the server has
            (loopback by default); without a `page_port` the page is for the container's own health check alone.
        page_hosts: names of this machine that requests to the page may use beside the usual ones.
        cache_bytes: of the response cache, if there is one.
        wheel: of cliplet, copied beside the Dockerfile; the files cannot be written without.
    """

    image: str = IMAGE
    ports: Ports = INNER
    page_port: int | None = PAGE_PORT
    page_hosts: Sequence[str] = ()
    cache_bytes: int = 64 * MIB
    wheel: Path | None = None

    def __post_init__(self) -> None:
        if self.wheel is not None and not (self.wheel.is_file() and self.wheel.suffix == ".whl"):
            raise UsageError(f"no wheel {self.wheel}", "a file of `python -m build --wheel`", "--wheel FILE")

    def needed_wheel(self) -> Path:
        """The wheel; raises `UsageError` without one, as no package index has cliplet."""
        if self.wheel is None:
            raise UsageError(
                "no wheel of cliplet for the image",
                "a file of `python -m build --wheel`",
                "python -m build --wheel, and then --wheel dist/cliplet-*.whl",
            )
        return self.wheel

    def published(self, server: ServerOptions | None = None) -> list[str]:
        """Each port as docker wants it: where this machine listens, and what for; those of `server` if it is given."""
        server = server or ServerOptions()
        pairs = [(getattr(self.ports, name), getattr(INNER, name)) for name in ("http", "grpc", "metrics")]
        if self.page_port is not None:
            pairs.append((self.page_port, PAGE_PORT))
        if server.tls_cert:
            # All but gRPC then listens at the container's own loopback, where nobody outside reaches it.
            pairs = [(self.ports.grpc, INNER.grpc)]
        # A port that was to be any free one is docker's to choose.
        return [f"{server.host}:{outer or ''}:{inner}" for outer, inner in pairs]


def container_command(
    served: Sequence[Served],
    settings: ServeSettings,
    options: ContainerOptions | None = None,
    server: ServerOptions | None = None,
) -> str:
    """The `docker run …` that serves the same bundles, where they lie, from the image of `write_container_files`.

    Args:
        server: how they are served here; see `not_carried` for what of that a container is not given.
    """
    volumes = [f"--volume={_folder(one).resolve()}:{BUNDLES}/{one.name}:ro" for one in served]
    options, server = options or ContainerOptions(), server or ServerOptions()
    if server.tls_cert and server.tls_key:
        volumes += [f"--volume={server.tls_cert.resolve()}:{CERTIFICATE}:ro"]
        volumes += [f"--volume={server.tls_key.resolve()}:{KEY}:ro"]
    words = _docker_run(served, settings, options, server, volumes)
    return shlex.join([*words, *serve_command(served, settings, options, server)])


def not_carried(server: ServerOptions) -> list[str]:
    """What the command of `container_command` leaves out of how a server is run, and why or what to do about it."""
    missing = [
        field.name
        for field in _changed(server)
        if field.name not in SERVER_FLAGS and field.name not in CARRIED_OTHERWISE
    ]
    if server.tls_cert:
        missing.append("HTTP, metrics and page (with TLS they stay inside the container)")
    if server.token is not None and server.token != os.environ.get(TOKEN_VARIABLE):
        # Never the token itself: command lines can be seen, and this one is printed.
        missing.append(f"the token (export {TOKEN_VARIABLE} first)")
    return missing


def _changed(options: ServerOptions | ServeSettings) -> list[Field[Any]]:
    """The fields that are not as they are by default."""
    usual = type(options)()
    return [f for f in fields(options) if getattr(options, f.name) != getattr(usual, f.name)]


def _docker_run(
    served: Sequence[Served],
    settings: ServeSettings,
    options: ContainerOptions,
    server: ServerOptions,
    more: Sequence[str] = (),
) -> list[str]:
    words = ["docker", "run", "--rm", "--init", "--read-only", "--cap-drop=ALL"]
    words += [f"--stop-timeout={server.exit_timeout_s + GRACE_S}"]
    if server.deadline_s != ServerOptions().deadline_s:
        words += [f"--health-timeout={_patience_s(server)}s"]
    words += ["--security-opt=no-new-privileges", f"--tmpfs=/tmp:size={_mib(_tmp_bytes(served))}m,mode=1777"]
    words += [f"--shm-size={_mib(_shm_bytes(served, settings))}m", "--env=CLIPLET_TOKEN"]
    words += ["--gpus=1"] if settings.device == "cuda" else []
    words += [f"--publish={ports}" for ports in options.published(server)]
    return [*words, *more, options.image]


def _patience_s(server: ServerOptions) -> int:
    """Seconds in which the page says whether all models are ready: `health.check` may need a quarter more."""
    return math.ceil(1.25 * server.deadline_s) + 1


def serve_command(
    served: Sequence[Served],
    settings: ServeSettings,
    options: ContainerOptions | None = None,
    server: ServerOptions | None = None,
) -> list[str]:
    """The words that the container runs."""
    options, server = options or ContainerOptions(), server or ServerOptions()
    words = ["cliplet", "serve", *(f"{one.name}={BUNDLES}/{one.name}" for one in served)]
    words += ["--host", EVERYWHERE, "--restart"]
    for field in _changed(settings):
        if field.name not in ("target", "cache"):
            words += [f"--{field.name.replace('_', '-')}", str(getattr(settings, field.name))]
    if settings.cache:
        words += ["--cache", str(options.cache_bytes // MIB)]
    for field in _changed(server):
        if flag := SERVER_FLAGS.get(field.name):
            value = getattr(server, field.name)
            words += [flag] if value is True else [flag, str(value)]
    if server.tls_cert:
        words += ["--tls-cert", CERTIFICATE, "--tls-key", KEY]
    for name in options.page_hosts:
        words += ["--page-host", name]
    return words


def write_container_files(
    folder: Path,
    served: Sequence[Served],
    settings: ServeSettings,
    options: ContainerOptions | None = None,
) -> list[Path]:
    """The files that were written into `folder`; older ones of the same names are replaced, others stay.

    Raises:
        UsageError: nothing is served, or there is no wheel of cliplet.
        EnvironmentError_: the folder cannot be written.
    """
    if not served:
        raise UsageError("no bundle to serve", "at least one", "cliplet serve files BUNDLE --out DIR")
    options = options or ContainerOptions()
    wheel = options.needed_wheel()
    values = _values(served, settings, options)
    texts = {
        name: Template((FOLDER / template).read_text(encoding="utf-8")).substitute(values[name])
        for name, template in FILES.items()
    }
    texts |= {
        "constraints.txt": CONSTRAINTS,
        # The context of the build is what the build needs and no more.
        ".dockerignore": "*\n!constraints.txt\n!bundles\n!*.whl\n",
        DASHBOARD: (FOLDER / DASHBOARD).read_text(encoding="utf-8"),
    }
    with explained_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _copy_bundles(folder / "bundles", served)
        _replace(folder / wheel.name, wheel.read_bytes())
        for name, text in texts.items():
            _replace(folder / name, text.rstrip("\n").encode() + b"\n")
    return [folder / name for name in texts]


def _values(
    served: Sequence[Served], settings: ServeSettings, options: ContainerOptions
) -> dict[str, dict[str, Any]]:
    """What each file's template is filled with."""
    gpu = settings.device == "cuda"
    names = ("http", "grpc", "metrics")
    shared = {
        "title": f"Serves {', '.join(one.name for one in served)} with Triton {TRITON_RELEASE}. Written by cliplet serve files.",
        "image": options.image,
        "user": USER,
        **{f"{name}_port": getattr(INNER, name) for name in names},
        "page_port": PAGE_PORT,
        "ready_path": READY_PATH,
        "health_path": HEALTH_PATH,
        "shm_mib": _mib(_shm_bytes(served, settings)),
        "tmp_mib": _mib(_tmp_bytes(served)),
        "memory_mib": _mib(_memory_bytes(served, settings)),
        "patience_s": _patience_s(ServerOptions()),
        "grace_s": ServerOptions().exit_timeout_s + GRACE_S,
        "check_s": CHECK_S,
        "gpu": "",
    }
    start_s = round(ServerOptions().ready_timeout_s)
    return {
        "Dockerfile": shared
        | {
            "base": BASE_IMAGE,
            "bundles": BUNDLES,
            "command": shlex.join(_docker_run(served, settings, options, ServerOptions())),
            "command_json": json.dumps(serve_command(served, settings, options)),
            "wheel": options.needed_wheel().name,
            "every_s": 3 * CHECK_S,
            "start_s": start_s,
        },
        "compose.yaml": shared
        | {
            "published": "\n".join(f'      - "{ports}"' for ports in options.published()),
            "gpu": GPU_COMPOSE if gpu else "",
        },
        "kubernetes.yaml": shared
        | {
            "cpu_request": CPU_REQUEST,
            "cpu_limit": CPU_LIMIT,
            "start_checks": max(2, start_s // CHECK_S),
            "gpu": ', nvidia.com/gpu: "1"' if gpu else "",
        },
        "prometheus.yaml": shared | {"metrics_target": f"localhost:{options.ports.metrics or INNER.metrics}"},
    }


def _folder(served: Served) -> Path:
    assert served.plan.bundle is not None, served.name
    return served.plan.bundle.folder


def _engine_bytes(served: Sequence[Served]) -> int:
    """Bytes of all files that are loaded: each bundle's engine, and its text tower."""
    total = 0
    for one in served:
        bundle, engine = one.plan.bundle, one.plan.engine
        assert bundle is not None and engine is not None, one.name
        names = {
            *bundle.manifest.files_of(engine),
            *(n for n in bundle.manifest.files if n.startswith("text.")),
        }
        total += sum((bundle.folder / name).stat().st_size for name in names)
    return total


def _shm_bytes(served: Sequence[Served], settings: ServeSettings) -> int:
    needed = shared_memory_bytes(served, settings)
    return max(LEAST_SHM, needed + needed // 4)


def _tmp_bytes(served: Sequence[Served]) -> int:
    """The model repository may hold a copy of every engine."""
    return LEAST_TMP + _engine_bytes(served)


def _memory_bytes(served: Sequence[Served], settings: ServeSettings) -> int:
    models = sum(len(one.models) for one in served) * settings.instances
    used = SERVER_BYTES + models * MODEL_BYTES + ENGINE_FACTOR * settings.instances * _engine_bytes(served)
    return used + _shm_bytes(served, settings) + _tmp_bytes(served)


def _mib(size: int) -> int:
    """Bytes in MiB, rounded up to a multiple of 64."""
    return -(-size // (64 * MIB)) * 64


def _copy_bundles(folder: Path, served: Sequence[Served]) -> None:
    """The bundles in `folder`, by the names that they are served as, in place of whatever was there."""
    with staging_folder(folder, _OTHER_PLACE) as staged:
        for one in served:
            shutil.copytree(_folder(one), staged / "new" / one.name, copy_function=_link)
        if folder.exists():
            os.replace(folder, staged / "old")
        os.replace(staged / "new", folder)


def _link(source: str, target: str) -> str:
    """The file under a second name; a copy where the two folders lie on different disks."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
