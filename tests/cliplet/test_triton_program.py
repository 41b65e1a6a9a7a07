"""The server is found where it should be, and what it lacks is said before it starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cliplet.errors import EnvironmentError_
from cliplet.triton_program import (
    FOLDER_VARIABLE,
    PYTHON,
    find_triton,
    missing_libraries,
    server_folder,
)

HERE = server_folder()
needs_server = pytest.mark.skipif(not HERE.is_dir(), reason="the embedded server is not installed")


@pytest.fixture
def lookalike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like that of the embedded server, of links; the stubs lie in folders of their own."""
    home = tmp_path / "triton" / "pytriton" / "tritonserver"
    home.mkdir(parents=True)
    for name in ("bin", "backends", "caches"):
        (home / name).symlink_to(HERE / "pytriton" / "tritonserver" / name)
    for name in ("numpy", "numpy.libs", "nvidia_pytriton.libs"):
        (tmp_path / "triton" / name).symlink_to(HERE / name)
    stub = Path("python_backend_stubs") / PYTHON / "triton_python_backend_stub"
    (home / stub).parent.mkdir(parents=True)
    # Copied: a link would be resolved, and the loader looks for Triton's libraries beside the file.
    (home / stub).write_bytes((HERE / "pytriton" / "tritonserver" / stub).read_bytes())
    (home / stub).chmod(0o755)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "triton"))
    return tmp_path / "triton"


def stub_of(folder: Path) -> Path:
    return (
        folder / "pytriton" / "tritonserver" / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    )


@needs_server
def test_the_server_of_this_environment_is_found() -> None:
    program = find_triton()
    assert program.binary.name == "tritonserver" and program.stub is not None
    assert program.environment({"LD_LIBRARY_PATH": "/mine"})["LD_LIBRARY_PATH"].endswith(":/mine")
    assert missing_libraries(program.stub, program.environment()) == []


@needs_server
def test_the_variable_names_another_folder(lookalike: Path) -> None:
    program = find_triton()
    assert program.folder == lookalike and program.stub == stub_of(lookalike)


def test_a_missing_server_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(EnvironmentError_, match="not installed") as caught:
        find_triton()
    words = caught.value.fix.split()
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    assert words[words.index("--target") + 1] == str(tmp_path)
    assert Path(words[-1]).read_text().startswith("#"), "the file that the command names is there"


def test_a_server_on_the_path_is_a_containers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    found = find_triton()
    assert (found.binary, found.folder, found.stub) == (program.resolve(), None, None)
    assert found.home == tmp_path
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(EnvironmentError_, match="elsewhere"):
        find_triton()


@needs_server
def test_no_stub_for_this_python(lookalike: Path) -> None:
    others = stub_of(lookalike).parent.parent / "3.1"
    stub_of(lookalike).parent.rename(others)
    with pytest.raises(EnvironmentError_, match=f"no stub for Python {PYTHON}") as caught:
        find_triton()
    assert "3.1" in caught.value.expected


@needs_server
@pytest.mark.parametrize(
    ("needed", "instead", "fix"),
    [
        (f"libpython{PYTHON}.so.1.0", "libpython3.99.so.1.0", "apt-get install libpython3.99"),
        ("libstdc++.so.6", "libstdcpp.so.6", "pip install"),
    ],
)
def test_a_missing_library_is_named(needed: str, instead: str, fix: str, lookalike: Path) -> None:
    """The stub asks for a library that no machine has: the loader itself says that it is not found."""
    stub = stub_of(lookalike)
    before = stub.read_bytes()
    assert needed.encode() in before and len(instead) <= len(needed)
    stub.write_bytes(before.replace(needed.encode(), instead.encode().ljust(len(needed), b"\0")))
    with pytest.raises(EnvironmentError_, match=instead) as caught:
        find_triton()
    assert fix in caught.value.fix
