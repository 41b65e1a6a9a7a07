"""What an embedded server is started with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cliplet.deploy.server_options import Ports, ServerOptions, command_line
from cliplet.deploy.triton_program import build_backends, import_folders, server_environment
from cliplet.errors import UsageError
from cliplet.triton_program import IMPORT_VARIABLE, TritonProgram, find_triton, server_folder

needs_server = pytest.mark.skipif(not server_folder().is_dir(), reason="the embedded server is not installed")


@needs_server
def test_models_import_the_servers_numpy_and_our_packages(tmp_path: Path) -> None:
    program = find_triton()
    backends = build_backends(program, tmp_path / "backends")
    assert backends is not None
    names = {path.name for path in (backends / "python").iterdir()}
    assert {"libtriton_python.so", "triton_python_backend_stub", "triton_python_backend_utils.py"} <= names
    first, *others = server_environment(program, backends)[IMPORT_VARIABLE].split(os.pathsep)
    assert sorted(os.listdir(first)) == ["numpy", "numpy.libs"]
    assert others and all(Path(folder).is_dir() for folder in others)
    code = "import sys; sys.path[:0] = sys.argv[1].split(':'); import numpy; print(numpy.__version__)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code, first], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("1.")


def test_a_container_brings_its_own(tmp_path: Path) -> None:
    program = TritonProgram(tmp_path / "bin" / "tritonserver")
    assert build_backends(program, tmp_path / "backends") is None
    assert IMPORT_VARIABLE not in server_environment(program, None)
    words = command_line(program, tmp_path, ServerOptions(), Ports(), backends=None, name="it", secret="s")
    assert not [w for w in words if "directory" in w]
    assert import_folders(tmp_path)[0] == tmp_path / "numpy"


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        (
            {},
            ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"],
            ["authorization", "ssl", "cache-config"],
        ),
        ({"host": "localhost"}, ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"], ["localhost"]),
        ({"host": "0.0.0.0"}, ["--http-address=0.0.0.0", "--metrics-address=0.0.0.0"], []),
        (
            {"token": "t"},
            ["--http-restricted-api=inference,metadata,model-config,statistics:authorization=Bearer t"],
            [],
        ),
        ({"cache_bytes": 99}, ["--cache-config=local,size=99"], []),
        ({}, ["--http-restricted-api=shared-memory,model-repository,logging,trace:cliplet-secret=s"], []),
        (
            {},
            ["--grpc-restricted-protocol=shared-memory,model-repository,logging,trace:cliplet-secret=s"],
            [],
        ),
        ({}, ["--model-control-mode=none", "--rate-limit=off"], []),
    ],
)
def test_command_line(
    options: dict[str, object], present: list[str], absent: list[str], tmp_path: Path
) -> None:
    words = command_line(
        TritonProgram(tmp_path / "bin" / "tritonserver"), tmp_path, ServerOptions(**options), Ports(),
        backends=None, name="it", secret="s",
    )  # fmt: skip
    assert set(present) <= set(words)
    assert not [w for w in words for word in absent if word in w]


def test_within_tls_plain_http_stays_here(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("tls_cert", "tls_key")}
    for file in files.values():
        file.touch()
    options = ServerOptions(host="0.0.0.0", **files)
    words = command_line(
        TritonProgram(tmp_path / "t"), tmp_path, options, Ports(), backends=None, name="it", secret="s"
    )
    assert {"--http-address=127.0.0.1", "--metrics-address=127.0.0.1", "--grpc-address=0.0.0.0"} <= set(words)
    assert options.own_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tls_cert": Path(__file__)}, "only one of"),
        ({"tls_cert": Path("/nowhere"), "tls_key": Path("/nowhere")}, "no file /nowhere"),
        ({"token": ""}, "token"),
        ({"token": "two words"}, "token"),
        ({"host": "::1"}, "--host ::1: no IPv4"),
        ({"host": "::"}, "--host ::: no IPv4"),
        ({"host": "nowhere.invalid"}, "nowhere.invalid"),
        ({"host": "a" * 70}, "no IPv4"),
        ({"host": ""}, "no IPv4"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServerOptions(**options)
