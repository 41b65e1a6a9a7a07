"""The client: the same answers from threads and from asyncio, by gRPC and HTTP, and no image ever lost."""

from __future__ import annotations

import asyncio
import io
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import picture
from PIL import Image
from running import TOKEN, Site, quick, repository_of, two_served

import cliplet
from cliplet.deploy.client import AsyncClient, Client, Tagged
from cliplet.deploy.server import TritonServer
from cliplet.errors import ClipletError, DataError, UsageError
from cliplet.images import ImageError
from cliplet.server_address import ServerAddress
from cliplet.triton_async import AsyncConnection
from cliplet.triton_errors import DeadlineExpired, ServerAway
from cliplet.triton_program import server_folder

pytestmark = pytest.mark.skipif(not server_folder().is_dir(), reason="the embedded server is not installed")


@pytest.fixture(scope="module")
def hang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file is there, the student hangs."""
    return tmp_path_factory.mktemp("flags") / "hang"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, hang: Path) -> Iterator[Site]:
    with two_served(tmp_path_factory.mktemp("site"), hang) as running:
        yield running


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(picture(90, 70)).save(file)
    return file


def asked_async(address: str, image: Any, **options: Any) -> Tagged:
    async def ask() -> Tagged:
        async with AsyncClient(address, token=TOKEN) as client:
            return await client.tag(image, **options)

    return asyncio.run(ask())


def hold_equal(found: Tagged, expected: Tagged) -> None:
    assert [label.name for label in found.labels] == [label.name for label in expected.labels]
    assert found.record.boxes == expected.record.boxes
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)


@pytest.mark.parametrize("http", [False, True])
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_labels_are_those_of_the_bundle(site: Site, photo: Path, name: str, http: bool) -> None:
    with cliplet.load(str(site.bundles[name]), runtime="onnx", threshold=None) as tagger:
        (expected,) = tagger.label([photo])
        thresholds = dict(zip(tagger.classes, tagger.plan.thresholds, strict=True))
        detail = tagger.score([cliplet.images.Picture(picture(90, 70), 90, 70)])
    address = site.address(name, http=http)
    with Client(address, token=TOKEN) as client:
        tagged = client.tag(photo, detail=True)
        assert client.classes == tagger.classes
    assert tuple(label.name for label in tagged.labels) == expected.labels
    assert [label.score for label in tagged.labels] == sorted((s.score for s in tagged.labels), reverse=True)
    assert all(label.score >= label.threshold == thresholds[label.name] for label in tagged.labels)
    np.testing.assert_allclose(tagged.scores, expected.scores, atol=1e-3)
    assert (tagged.record.width, tagged.record.height) == (90, 70)
    extra = {"teacher": tagged.view_probs, "student": tagged.cam}
    wanted = {"teacher": "view_probs", "student": "cam"}
    np.testing.assert_allclose(extra[name], detail[wanted[name]][0], atol=1e-3)
    again = asked_async(address, photo, detail=True)
    hold_equal(again, tagged)
    assert (again.cam is None) == (tagged.cam is None)


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "array", "image"])
def test_what_an_image_may_be(site: Site, photo: Path, kind: str) -> None:
    image = {
        "path": photo,
        "text": str(photo),
        "bytes": photo.read_bytes(),
        "array": picture(90, 70),
        "image": Image.open(photo),
    }[kind]
    with Client(site.address("teacher"), token=TOKEN) as client:
        expected = client.tag(photo)
        assert expected.view_probs is None
        assert client.tag(image).scores.tobytes() == expected.scores.tobytes()
        hold_equal(asked_async(site.address("teacher"), image), expected)


def test_a_turned_photograph_stays_turned(site: Site) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(90, 70)).save(file, "JPEG", exif=exif, quality=95)
    with Client(site.address("teacher"), token=TOKEN) as client:
        sent, opened = client.tag(file.getvalue()), client.tag(Image.open(file))
    assert (sent.record.width, sent.record.height) == (70, 90)
    assert (opened.record.width, opened.record.height) == (70, 90)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "F"])
def test_pillow_images_of_other_modes(site: Site, mode: str) -> None:
    image = Image.fromarray(picture(50, 40))
    image = Image.new(mode, (50, 40)) if mode in ("I;16", "F") else image.convert(mode)
    with Client(site.address("student"), token=TOKEN) as client:
        assert client.tag(image).record.width == 50


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (b"", ImageError),
        (b"garbage", ImageError),
        ("/no/such/file", ImageError),
        (np.zeros((4, 4), np.uint8), DataError),
        (np.zeros((4, 4, 3), np.float32), DataError),
        (np.zeros((0, 4, 3), np.uint8), DataError),
    ],
)
@pytest.mark.parametrize("http", [False, True])
def test_what_is_no_image(site: Site, image: Any, kind: type[ClipletError], http: bool) -> None:
    with Client(site.address("student", http=http), token=TOKEN) as client, pytest.raises(kind):
        client.tag(image)
    with pytest.raises(kind):
        asked_async(site.address("student", http=http), image)


def mixed(photo: Path) -> list[Any]:
    """Images of which every third is none."""
    return [b"garbage" if i % 3 == 1 else picture(30 + i, 40) if i % 3 else photo for i in range(20)]


def hold_in_order(found: list[Tagged | ClipletError], photo: Path) -> None:
    assert len(found) == 20
    for i, one in enumerate(found):
        if i % 3 == 1:
            assert isinstance(one, ImageError)
        else:
            assert isinstance(one, Tagged)
            assert one.record.width == (90 if i % 3 == 0 else 30 + i)


@pytest.mark.parametrize("http", [False, True])
def test_many_images_come_back_in_order_with_their_errors(site: Site, photo: Path, http: bool) -> None:
    address = site.address("student", http=http)
    with Client(address, token=TOKEN, in_flight=5) as client:
        hold_in_order(list(client.tag_many(iter(mixed(photo)))), photo)

    async def ask(as_stream: bool) -> list[Tagged | ClipletError]:
        async def stream() -> AsyncIterator[Any]:
            for image in mixed(photo):
                yield image

        async with AsyncClient(address, token=TOKEN, in_flight=5) as client:
            images = stream() if as_stream else mixed(photo)
            return [one async for one in client.tag_many(images)]

    for as_stream in (False, True):
        hold_in_order(asyncio.run(ask(as_stream)), photo)


def test_images_are_taken_as_fast_as_answers(site: Site, photo: Path) -> None:
    taken = 0

    def images() -> Iterator[Path]:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield photo

    with Client(site.address("student"), token=TOKEN, in_flight=4) as client:
        answers = client.tag_many(images())
        for done in range(1, 6):
            next(answers)
            assert taken <= done + 4
        answers.close()  # type: ignore[attr-defined]
    assert taken < 12


@pytest.mark.parametrize("http", [False, True])
def test_few_images_are_on_their_way_at_a_time(
    site: Site, photo: Path, http: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tasks ask: with 50 there were 50."""
    running = most = 0
    infer = AsyncConnection._infer_once

    async def counted(self: AsyncConnection, *given: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await infer(self, *given)
        finally:
            running -= 1

    monkeypatch.setattr(AsyncConnection, "_infer_once", counted)

    async def ask() -> list[Tagged]:
        async with AsyncClient(site.address("student", http=http), token=TOKEN, in_flight=2) as client:
            return await asyncio.gather(*(client.tag(photo) for _ in range(50)))

    assert len(asyncio.run(ask())) == 50
    assert most == 2


@pytest.mark.parametrize("http", [False, True])
def test_a_model_that_hangs_meets_the_deadline(site: Site, photo: Path, hang: Path, http: bool) -> None:
    address = site.address("student", http=http)
    hang.touch()
    try:
        with Client(address, token=TOKEN) as client:
            with pytest.raises(DeadlineExpired, match=r"no answer within 0.4 s"):
                client.tag(photo, deadline_s=0.4)
            late = list(client.tag_many([photo, photo], deadline_s=0.2))
            assert [type(one) for one in late] == [DeadlineExpired] * 2
            with pytest.raises(DeadlineExpired):
                asked_async(address, photo, deadline_s=0.4)
    finally:
        hang.unlink()
    with Client(address, token=TOKEN) as client:
        assert client.tag(photo, priority=1).scores.shape == (4,)


@pytest.mark.parametrize("http", [False, True])
def test_token_name_and_address(site: Site, http: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in (None, "wrong"):
        with pytest.raises(UsageError, match="restricted"):
            Client(site.address("student", http=http), token=token)
    with pytest.raises(UsageError, match="serves 2 bundles"):
        Client(site.address(http=http), token=TOKEN)

    async def served(name: str | None) -> tuple[str, ...]:
        async with AsyncClient(site.address(name, http=http), token=TOKEN) as client:
            return await client.served()

    assert asyncio.run(served("student")) == ("student", "teacher")
    for name, message in ((None, "serves 2 bundles"), ("cats", "serves no bundle 'cats'")):
        with pytest.raises(UsageError, match=message):
            asyncio.run(served(name))
    monkeypatch.setenv("CLIPLET_TOKEN", TOKEN)
    with Client(site.address("student", http=http)) as client:
        assert client.card.name == "student"
    with pytest.raises(UsageError, match="no scheme"):
        Client("127.0.0.1:8001")
    with pytest.raises(ServerAway):
        Client(str(ServerAddress("127.0.0.1", 9, http=http)), retries=0)
    with pytest.raises(ServerAway):
        asked_async(str(ServerAddress("127.0.0.1", 9, http=http)), b"")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls(site: Site, photo: Path, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )
    repository = repository_of(tmp_path / "repository", pets=site.bundles["student"])
    with TritonServer(repository, quick(tls_cert=cert, tls_key=key, token=TOKEN)) as server:
        server.wait_ready()
        address = f"triton+grpcs://localhost:{server.ports.grpc}"
        with Client(address, token=TOKEN, ca=cert) as client:
            expected = client.tag(photo)

        async def ask() -> Tagged:
            async with AsyncClient(address, token=TOKEN, ca=str(cert)) as client:
                return await client.tag(photo)

        hold_equal(asyncio.run(ask()), expected)
        with pytest.raises(UsageError, match="no trusted connection") as caught:
            Client(address, token=TOKEN)
        assert "--ca" in caught.value.fix
        with pytest.raises(ServerAway):
            Client(f"triton://localhost:{server.ports.grpc}", token=TOKEN, retries=0)
