"""What a user gets from the wheel, and that versions agree."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import cliplet

REPOSITORY = Path(__file__).parent.parent
FOLDERS = ("cliplet", "train", "export", "deploy")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel that is built from the files git knows, as a release is."""
    copy = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        source, target = REPOSITORY / name.strip('"'), copy / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_python_file(wheel_names: set[str]) -> None:
    wanted = set()
    for folder in FOLDERS:
        for path in (REPOSITORY / folder).rglob("*.py"):
            inside = path.relative_to(REPOSITORY).as_posix()
            wanted.add(inside if folder == "cliplet" else f"cliplet/{inside}")
    assert wanted <= wheel_names


@pytest.mark.parametrize(
    "name",
    [
        "cliplet/py.typed",
        "cliplet/deploy/gallery.html",
        "cliplet/assets/tiny/open_clip_config.json",
        "cliplet/assets/tiny/open_clip_model.safetensors",
        "cliplet/assets/tiny/classes.txt",
        "cliplet/assets/tiny/thresholds.json",
    ],
)
def test_the_wheel_holds_what_the_code_reads(wheel_names: set[str], name: str) -> None:
    assert name in wheel_names


def test_the_wheel_holds_the_sprites_with_their_licences(wheel_names: set[str]) -> None:
    sets = {
        n.split("/")[3] for n in wheel_names if n.startswith("cliplet/assets/sprites/") and n.endswith(".png")
    }
    assert len(sets) >= 2
    for name in sets:
        assert any(n.startswith(f"cliplet/assets/sprites/{name}/LICENSE") for n in wheel_names), name


def test_versions_agree() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == cliplet.__version__
    assert f"## {cliplet.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_every_public_name_exists() -> None:
    for name in cliplet.__all__:
        assert getattr(cliplet, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cliplet.nothing  # noqa: B018


def test_constraints_pin_exactly_and_name_no_address() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 20
    assert all(line.count("==") == 1 and "/" not in line and "@" not in line for line in pins)
