"""Where the Triton Inference Server is on this machine, and whether its Python models can run.

Two places count. The embedded server is a pip package in a folder of its own, since it wants another NumPy than the
environment; a container of NVIDIA's has `tritonserver` on its PATH. All that can be lacking is found out here, before
a server starts: Triton itself would say it late, or not at all.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cliplet.errors import EnvironmentError_

FOLDER_VARIABLE = "CLIPLET_TRITON"
PROGRAM_NAME = "tritonserver"
# The environment variable that tells Triton's Python models where to import from, in this order; the stub that runs
# them sees no PYTHONPATH. Unset in a container, whose Python holds cliplet.
IMPORT_VARIABLE = "CLIPLET_TRITON_IMPORT"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class TritonProgram:
    """A Triton that can be started.

    Attributes:
        binary: `tritonserver`.
        folder: of the embedded server; None for one that came with the system, such as a container's.
        libraries: folders that the loader has to search.
    """

    binary: Path
    folder: Path | None = None
    libraries: tuple[Path, ...] = ()

    @property
    def home(self) -> Path:
        """The folder that holds `backends` and `caches`."""
        return self.binary.parent.parent

    @property
    def stub(self) -> Path | None:
        """The program that runs Python models with this Python; None where the server brings its own."""
        return _stub(self.folder) if self.folder else None

    def environment(self, variables: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The variables to start it with."""
        return _searching(self.libraries, variables)


def server_folder() -> Path:
    """Where the embedded server is, or belongs: $CLIPLET_TRITON, or `triton` in this Python environment."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(sys.prefix) / "triton")


def install_command() -> str:
    """The command that installs the embedded server."""
    # Found without importing the package: a noun imports no verb.
    spec = importlib.util.find_spec("cliplet.deploy")
    places = list(spec.submodule_search_locations or []) if spec else ["deploy"]
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--upgrade",
        "--target",
        str(server_folder()),
    ]
    return shlex.join([*words, "-r", str(Path(places[0]) / "triton_server.txt")])


def find_triton() -> TritonProgram:
    """The Triton of this machine: that of CLIPLET_TRITON, that of this environment, or the one on the PATH.

    Raises:
        EnvironmentError_: there is none, it has no stub for this Python, or a library that it needs is missing.
    """
    folder = server_folder()
    binary = _embedded_binary(folder)
    if not binary.is_file():
        named = bool(os.environ.get(FOLDER_VARIABLE))
        if not named and (found := shutil.which(PROGRAM_NAME)):
            return TritonProgram(Path(found).resolve())
        other = f"{FOLDER_VARIABLE} names that folder" if named else f"no {PROGRAM_NAME} is on the PATH"
        raise EnvironmentError_(
            f"Triton, the server, is not installed: {binary} is missing, and {other}",
            "the embedded server, or NVIDIA's container",
            install_command(),
        )
    program = TritonProgram(binary, folder, _libraries(folder))
    stub = program.stub
    if stub is None:
        offered = ", ".join(stub_versions(folder)) or "none"
        raise EnvironmentError_(
            f"Triton has no stub for Python {PYTHON}, so it could not run Python models",
            f"one of its Pythons: {offered}",
            "make the environment anew with one of them, or serve in NVIDIA's container: cliplet serve files",
        )
    hold_libraries(program, stub)
    hold_libraries(program, program.binary)
    return program


def stub_versions(folder: Path) -> list[str]:
    """The Pythons that an embedded server can run models with."""
    found = (path.parent.name for path in _stubs(folder).glob("*/triton_python_backend_stub"))
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def hold_libraries(program: TritonProgram, file: Path) -> None:
    """Raise `EnvironmentError_` unless the loader finds all shared libraries of a program; they are not loaded."""
    missing = missing_libraries(file, program.environment())
    if not missing:
        return
    if python := next((name for name in missing if name.startswith("libpython")), None):
        package = python.partition(".so")[0]
        raise EnvironmentError_(
            f"{python} is missing, which Triton needs to run Python models",
            f"the shared library of Python {PYTHON}",
            f"apt-get install {package} (Debian, Ubuntu), or use a Python that was built with --enable-shared",
        )
    raise EnvironmentError_(
        f"{file.name} lacks {', '.join(missing)}",
        "all shared libraries that it was linked with",
        install_command(),
    )


def missing_libraries(file: Path, environment: Mapping[str, str]) -> list[str]:
    """Names of the shared libraries that the loader does not find for a program, asked without running it."""
    done = subprocess.run(
        [str(file)],
        env={**environment, "LD_TRACE_LOADED_OBJECTS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )
    return sorted(set(re.findall(r"(\S+) => not found", done.stdout)))


def _embedded_binary(folder: Path) -> Path:
    return folder / "pytriton" / "tritonserver" / "bin" / PROGRAM_NAME


def _stubs(folder: Path) -> Path:
    return folder / "pytriton" / "tritonserver" / "python_backend_stubs"


def _stub(folder: Path) -> Path | None:
    file = _stubs(folder) / PYTHON / "triton_python_backend_stub"
    return file if file.is_file() else None


def _libraries(folder: Path) -> tuple[Path, ...]:
    """Triton's own, and those of this Python: its models then run with the same one."""
    own = Path(sysconfig.get_config_var("LIBDIR") or "")
    shared = [own] if (own / f"libpython{PYTHON}.so.1.0").is_file() else []
    return (folder / "nvidia_pytriton.libs", *shared)


def _searching(libraries: Sequence[Path], variables: Mapping[str, str]) -> dict[str, str]:
    known = [variables["LD_LIBRARY_PATH"]] if variables.get("LD_LIBRARY_PATH") else []
    folders = os.pathsep.join([*map(str, libraries), *known])
    return {**variables, "LD_LIBRARY_PATH": folders} if folders else dict(variables)
