"""What several tests need: models, images, and the command line as a user meets it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Cli, picture, save_toy_clip
from hypothesis import HealthCheck, settings
from PIL import Image

# No test fails since the machine was busy: Hypothesis limits the time of an example unless told otherwise.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Exported graphs of the tests go to a folder of the tests, never to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("CLIPLET_CACHE")
    os.environ["CLIPLET_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["CLIPLET_CACHE"]
    else:
        os.environ["CLIPLET_CACHE"] = before


@pytest.fixture(autouse=True)
def own_log() -> None:
    """What is heard depends on no library that changed the root's level, or its handlers', in an earlier test."""
    logging.getLogger("cliplet").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def toy_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a toy CLIP with a softmax."""
    return save_toy_clip(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def toy_siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a toy CLIP with a bias, hence with sigmoids, as SigLIP has them."""
    return save_toy_clip(tmp_path_factory.mktemp("toy-siglip"), init_logit_bias=-2.0)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 JPEGs of different sizes, some of them in a sub-folder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i in range(24):
        place = folder / "more" if i % 3 == 0 else folder
        size = (40 + 37 * i % 300, 50 + 53 * i % 200)
        Image.fromarray(picture(*size, seed=i)).save(place / f"{i:03d}.jpg", quality=90)
    return folder


@pytest.fixture
def cli() -> Cli:
    """`cliplet` as a process of its own: cli("label", "photos") gives exit code and both outputs."""

    def run(
        *arguments: object, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cliplet.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, **environment},
            timeout=300,
            check=False,
        )

    return run
