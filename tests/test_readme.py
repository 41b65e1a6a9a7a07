"""The README is true: its commands run, its tree is the tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import picture
from PIL import Image
from running import quick, repository_of
from served import make_teacher

from cliplet.deploy.server import TritonServer

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
SERVER = "triton://127.0.0.1:8001"
BLOCK = re.compile(r"(?P<note><!--[^\n]*-->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = [
    (m["language"], m["code"], re.findall(r"only planned with (--[a-z-]+)", m["note"] or ""))
    for m in BLOCK.finditer(README)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "photos").mkdir()
    for i, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        Image.fromarray(picture(120, 90, i)).save(folder / "photos" / name)
    (folder / "classes.txt").write_text("person: man, woman\ncat\ndog\n")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server such as the README starts; its address."""
    folder = tmp_path_factory.mktemp("served")
    with TritonServer(
        repository_of(folder / "repository", tiny=make_teacher(folder / "tiny")), quick()
    ) as running:
        running.wait_ready()
        yield f"triton://127.0.0.1:{running.ports.grpc}"


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 6
    assert sum(len(planned) for _, _, planned in BLOCKS) == 2


@pytest.mark.parametrize(("language", "code", "planned"), BLOCKS)
def test_a_block_runs(
    place: Path, language: str, code: str, planned: list[str], request: pytest.FixtureRequest
) -> None:
    if code.startswith("make "):
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert code.split()[1] in targets
        return
    if SERVER in code:
        code = code.replace(SERVER, request.getfixturevalue("server"))
    command = ["bash", "-euc", " ".join([code.rstrip(), *planned])]
    if language == "python":
        command = [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=place, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_tree_names_every_file_and_only_those() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    folders = [line.split()[0] for line in tree.splitlines() if re.match(r"\w+/ ", line)]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    files = tracked.splitlines()
    assert all(any(f.startswith(folder) for f in files) for folder in folders)
    top = {f.split("/")[0] + "/" for f in files if f.endswith(".py")}
    assert top == set(folders)
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    nouns = {Path(f).name for f in files if re.fullmatch(r"cliplet/(?!_)\w+\.py", f)}
    assert named == nouns


def test_the_commands_of_the_makefile_are_the_ones_of_ci() -> None:
    lines = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert "make test" in lines
    assert "make lint" in lines
