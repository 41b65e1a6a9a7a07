"""A trunk on a server: embeddings of encoded images, the same as the bundle's own, beside models that give labels."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import picture
from PIL import Image
from running import ANY_PORT
from served import make_student, make_trunk
from towers import save_toy_trunk

from cliplet.cli import main
from cliplet.deploy.client import AsyncClient, Client
from cliplet.deploy.serve import Running, ServeJob, ServeSettings, find_served, serving
from cliplet.deploy.serve_commands import _tell
from cliplet.deploy.server_options import ServerOptions
from cliplet.errors import ClipletError, UsageError
from cliplet.images import ImageError, decode_image
from cliplet.plan import TaggerSettings, make_plan
from cliplet.tagger import load_plan
from cliplet.triton_program import server_folder

pytestmark = pytest.mark.skipif(not server_folder().is_dir(), reason="the embedded server is not installed")


@dataclass(frozen=True)
class Site:
    """A server of `trunk` and `student`."""

    trunk: Path
    running: Running

    def address(self, name: str) -> str:
        return self.running.address(name)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    trunk, student = make_trunk(folder / "trunk"), make_student(folder / "student")
    job = ServeJob(
        bundles=(str(trunk), str(student)),
        settings=ServeSettings(threads=1),
        options=ServerOptions(ports=ANY_PORT, exit_timeout_s=3, deadline_s=5.0),
        page_port=0,
    )
    with serving(job) as running:
        yield Site(trunk, running)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    files = [folder / f"{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        Image.fromarray(picture(60 + 90 * number, 70, number)).save(file)
    return files


@pytest.fixture(scope="module")
def wanted(site: Site, photos: Sequence[Path]) -> np.ndarray:
    """What the bundle gives without a server."""
    plan = make_plan(TaggerSettings(model=str(site.trunk), runtime="onnx", threads=1), features=True)
    with load_plan(plan) as embedder:
        pictures = [decode_image(file.read_bytes(), **embedder.room) for file in photos]
        return embedder.score(pictures)["embeddings"]


def test_a_client_gets_the_bundles_embeddings(site: Site, photos: Sequence[Path], wanted: np.ndarray) -> None:
    with Client(site.address("trunk")) as client:
        one = client.embed(photos[0])
        many = [row for row in client.embed_many(photos) if not isinstance(row, ClipletError)]
    assert one.shape == (wanted.shape[1],)
    np.testing.assert_allclose(one, wanted[0], atol=1e-5)
    np.testing.assert_allclose(many, wanted, atol=1e-5)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01, "embeddings alike would prove nothing"


def test_so_does_one_of_asyncio(site: Site, photos: Sequence[Path], wanted: np.ndarray) -> None:
    async def ask() -> tuple[np.ndarray, list[np.ndarray | ClipletError]]:
        async with AsyncClient(site.address("trunk")) as client:
            return await client.embed(photos[0]), [row async for row in client.embed_many(photos)]

    one, many = asyncio.run(ask())
    np.testing.assert_allclose(one, wanted[0], atol=1e-5)
    np.testing.assert_allclose(np.stack([np.asarray(row) for row in many]), wanted, atol=1e-5)


def test_a_file_that_is_no_image_spoils_its_own_answer_alone(site: Site, photos: Sequence[Path]) -> None:
    with Client(site.address("trunk")) as client:
        good, bad = client.embed_many([photos[0], b"no image"])
    assert isinstance(good, np.ndarray)
    assert isinstance(bad, ImageError)
    assert bad.stage == "decode"


def test_labels_of_a_trunk_and_embeddings_of_a_tagger_are_refused(
    site: Site, photos: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(site.address("trunk")) as client, pytest.raises(UsageError, match="tag of trunk") as error:
        client.tag(photos[0])
    assert "client.embed(image)" in error.value.fix
    with Client(site.address("student")) as client, pytest.raises(UsageError, match="embed of student"):
        client.embed(photos[0])
    words = ["label", str(photos[0]), "--model", site.address("trunk"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "gives features of images, not labels" in capsys.readouterr().err


def test_the_page_offers_what_gives_labels_and_watches_all(site: Site) -> None:
    with urllib.request.urlopen(f"{site.running.page}api/models", timeout=10) as answer:
        assert [model["name"] for model in json.load(answer)["models"]] == ["student"]
    with urllib.request.urlopen(f"{site.running.page}readyz", timeout=10) as answer:
        ready = json.load(answer)
    assert ready["ready"]
    assert {"trunk", "trunk_trunk", "student"} <= set(ready["models"])
    asked = urllib.request.Request(f"{site.running.page}api/tag?model=trunk", b"bytes", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked, timeout=10)
    assert refused.value.code == 404


def test_it_is_told_with_the_first_model_that_labels(site: Site) -> None:
    assert set(site.running.to_json()["models"]) == {"trunk", "student"}
    assert "model=student" in site.running.curl()


def test_what_only_labels_have_is_refused(site: Site) -> None:
    for settings in (ServeSettings(threshold=0.5), ServeSettings(views="1+3x3")):
        with pytest.raises(UsageError, match="--threshold|--views"):
            find_served(ServeJob(bundles=(str(site.trunk),), settings=settings))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a trunk and nothing else, made of the folder that training leaves."""
    trained = save_toy_trunk(tmp_path_factory.mktemp("trained") / "features")
    job = ServeJob(
        bundles=(f"mlcd:{trained}",),
        settings=ServeSettings(threads=1, runtime="onnx"),
        options=ServerOptions(ports=ANY_PORT, exit_timeout_s=3, deadline_s=5.0),
        page_port=0,
    )
    with serving(job) as running:
        yield running


def test_a_trained_folder_is_served_without_anything_that_labels(
    alone: Running, photos: Sequence[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = alone.served
    with Client(alone.address(one.name)) as client:
        assert client.classes == ()
        assert np.linalg.norm(client.embed(photos[0])) == pytest.approx(1, abs=1e-5)
    assert (alone.tagger, alone.trunk, alone.curl()) == (None, one, "")
    _tell(alone, ServeJob(bundles=()), False)
    told = capsys.readouterr().out
    assert f"{one.name}: embeddings, onnx fp32 on cpu" in told
    assert f'Client("{alone.address(one.name)}").embed("photo.jpg")' in told
    assert "cliplet label" not in told


@pytest.mark.parametrize("query", ["", "?model=features"])
def test_its_page_says_that_nothing_labels(alone: Running, query: str) -> None:
    asked = urllib.request.Request(f"{alone.page}api/tag{query}", b"bytes", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked, timeout=10)
    assert refused.value.code == 404
    assert "no model here gives labels" in refused.value.read().decode()
