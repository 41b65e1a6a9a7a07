"""What an embedded Triton is started with: its backends, the NumPy of its models, and its command line.

folder/python/       the Python backend: links to Triton's files, with the stub for this Python
folder/numpy/        links to the NumPy that the stub was built for, and to nothing else
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cliplet.triton_program import IMPORT_VARIABLE, TritonProgram


def build_backends(program: TritonProgram, folder: Path) -> Path | None:
    """Lay out the backends of an embedded server in `folder`; None where the server brings its own."""
    if program.folder is None or program.stub is None:
        return None
    python = folder / "python"
    python.mkdir(parents=True)
    for file in (program.home / "backends" / "python").iterdir():
        if file.suffix in (".py", ".so"):
            (python / file.name).symlink_to(file.resolve())
    for file in program.stub.parent.iterdir():
        link = python / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    numpy = folder / "numpy"
    numpy.mkdir()
    for name in ("numpy", "numpy.libs"):
        (numpy / name).symlink_to((program.folder / name).resolve())
    return folder


def import_folders(backends: Path) -> list[Path]:
    """Where Python models import from: the NumPy of the stub first, then the packages of this environment."""
    packages = [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return [backends / "numpy", *packages]


def server_environment(program: TritonProgram, backends: Path | None) -> dict[str, str]:
    """The variables to start a server with."""
    environment = program.environment()
    if backends is not None:
        environment[IMPORT_VARIABLE] = os.pathsep.join(map(str, import_folders(backends)))
    return environment
