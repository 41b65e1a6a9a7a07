"""A served bundle as a model: the same scores as the bundle itself, by every way to the server, whatever befalls it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import picture
from PIL import Image
from running import TOKEN, Site, quick, repository_of, two_served

import cliplet
from cliplet import shared_segments
from cliplet.contract import GraphContract, TensorSpec
from cliplet.datasets import open_dataset
from cliplet.deploy.client import AsyncClient, Client
from cliplet.deploy.server import TritonServer
from cliplet.deploy.server_options import Ports
from cliplet.errors import DataError, ServerError, UsageError
from cliplet.images import ImageError
from cliplet.plan import TaggerSettings, make_plan
from cliplet.runners.triton_runner import TritonRunner
from cliplet.server_address import ConnectionSettings, ServerAddress
from cliplet.serving import TAGGER, ImageRecord, tagger_extras
from cliplet.tagger import load_plan
from cliplet.train.scoring import ScoringOptions, score_dataset
from cliplet.train.threshold_entry import place_of_entry
from cliplet.triton_calls import Connection
from cliplet.triton_errors import DeadlineExpired, ServerAway
from cliplet.triton_program import server_folder
from cliplet.triton_wire import GrpcWire

pytestmark = pytest.mark.skipif(not server_folder().is_dir(), reason="the embedded server is not installed")

BOTH = ("teacher", "student")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with two_served(tmp_path_factory.mktemp("site")) as running:
        yield running


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPLET_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    for i, size in enumerate([(90, 70), (41, 200), (300, 180), (64, 64), (1, 1)]):
        Image.fromarray(picture(*size, seed=i)).save(folder / f"{i}.png")
    return [str(path) for path in sorted(folder.iterdir())]


def segments_of(pid: int) -> list[str]:
    return [n for n in os.listdir("/dev/shm") if n.startswith(f"{shared_segments.PREFIX}{pid}-")]


def own_segments() -> list[str]:
    return segments_of(os.getpid())


def encoded(path: str) -> dict[str, np.ndarray]:
    return {"image": np.array([[Path(path).read_bytes()]], object)}


# The same as the bundle


@pytest.mark.parametrize("shared_memory", ["on", "off"])
@pytest.mark.parametrize("http", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_scores_and_labels_are_those_of_the_bundle(
    site: Site, images: list[str], name: str, http: bool, shared_memory: str
) -> None:
    with cliplet.load(str(site.bundles[name]), runtime="onnx") as tagger:
        expected = tagger.label(images)
    connection = ConnectionSettings(shared_memory=shared_memory)
    with cliplet.load(site.address(name, http=http), connection=connection) as tagger:
        found = tagger.label(images)
        assert bool(own_segments()) == (shared_memory == "on")
        assert tagger.runner.runtime == "triton/onnx"
        assert (tagger.runner.precision, tagger.runner.device) == ("fp32", "cpu")
    assert own_segments() == []
    for one, other in zip(found, expected, strict=True):
        assert (one.path, one.width, one.height, one.labels) == (
            other.path,
            other.width,
            other.height,
            other.labels,
        )
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)


@pytest.mark.parametrize("name", BOTH)
def test_eval_measures_what_it_measures_of_the_bundle(
    site: Site, images: list[str], name: str, tmp_path: Path
) -> None:
    rows = [f"{Path(path).name},{'dog' if i % 2 else 'cat'}" for i, path in enumerate(images)]
    for path in images:
        shutil.copy(path, tmp_path)
    (tmp_path / "labels.csv").write_text("\n".join(["file,classes", *rows]))
    # Fewer classes than the model has, in another order.
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    data = open_dataset("folder", tmp_path, "all")
    found = score_dataset(site.address(name), data, ScoringOptions(quiet=True))
    expected = score_dataset(str(site.bundles[name]), data, ScoringOptions(quiet=True))
    assert (found.kind, expected.kind) == ("server", "bundle")
    assert found.names == expected.names and found.thresholds.values == expected.thresholds.values
    assert list(found.columns_C) == list(expected.columns_C) and not found.failed
    np.testing.assert_allclose(found.scores_NM, expected.scores_NM, atol=1e-3)


def test_a_server_keeps_no_thresholds(site: Site) -> None:
    with pytest.raises(UsageError, match="no place for thresholds"):
        place_of_entry(site.address("teacher"), None)


@pytest.mark.parametrize("name", BOTH)
def test_all_outputs_of_a_graph_arrive(site: Site, images: list[str], name: str) -> None:
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in images]
    pictures = [cliplet.images.Picture(p, p.shape[1], p.shape[0]) for p in pixels]
    with (
        cliplet.load(str(site.bundles[name]), runtime="onnx") as local,
        cliplet.load(site.address(name)) as served,
    ):
        expected, found = local.score(pictures), served.score(pictures)
        assert len(pictures) > served.runner.card.max_batch_size or name == "student"  # type: ignore[attr-defined]
    assert sorted(found) == sorted(expected)
    for output, array in expected.items():
        np.testing.assert_allclose(found[output], array, atol=1e-3)


def test_boxes_of_ones_own(site: Site) -> None:
    pixels, boxes = picture(90, 70), [np.array([[0, 0, 30, 30], [10, 5, 80, 60]], np.float32)]
    with (
        cliplet.load(str(site.bundles["teacher"]), runtime="onnx") as local,
        cliplet.load(site.address("teacher")) as served,
    ):
        expected, found = local.label([pixels], boxes), served.label([pixels], boxes)
    np.testing.assert_allclose(found[0].scores, expected[0].scores, atol=1e-3)


# What is decided before


@pytest.mark.parametrize("name", BOTH)
def test_a_run_may_go_on_through_a_server_or_without_it(site: Site, name: str) -> None:
    local = make_plan(TaggerSettings(model=str(site.bundles[name]), runtime="onnx"))
    plans = [make_plan(TaggerSettings(model=site.address(name, http=http))) for http in (False, True)]
    for plan in plans:
        assert plan.fingerprint() == local.fingerprint()
        assert (plan.runtime, plan.threshold_source) == ("triton", local.threshold_source)
        assert (plan.contract, plan.calibrated) == (local.contract, local.calibrated)
    assert (
        plans[0].fingerprint()
        != make_plan(TaggerSettings(model=site.address(name), threshold=0.9)).fingerprint()
    )


@pytest.mark.parametrize("views", ["1", "1+2x2"])
def test_other_views_of_a_clip_have_their_own_thresholds(site: Site, images: list[str], views: str) -> None:
    with (
        cliplet.load(str(site.bundles["teacher"]), runtime="onnx", views=views) as local,
        cliplet.load(site.address("teacher"), views=views) as served,
    ):
        assert served.plan.thresholds == local.plan.thresholds
        assert served.plan.fingerprint() == local.plan.fingerprint()
        expected, found = local.label(images), served.label(images)
    assert [r.labels for r in found] == [r.labels for r in expected]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("teacher", {"runtime": "openvino"}, "--runtime openvino"),
        ("teacher", {"runtime": "torch"}, "--runtime torch"),
        ("teacher", {"precision": "int8"}, "--precision int8"),
        ("teacher", {"threads": 3}, "--threads 3"),
        ("teacher", {"device": "cuda"}, "--device cuda"),
        ("teacher", {"classes": "cat,dog"}, "other classes"),
        ("teacher", {"prompts": "plain"}, "other classes or prompts"),
        ("teacher", {"aggregate": "max"}, "aggregates with cdul"),
        ("teacher", {"zeta": 0.5}, "aggregates with cdul"),
        ("student", {"views": "1+2x2"}, "a classifier or a trunk looks at the whole image"),
        ("student", {"aggregate": "max"}, "neither --aggregate nor --zeta"),
    ],
)
def test_what_a_server_cannot_do_is_refused(
    site: Site, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(TaggerSettings(model=site.address(name), **settings))
    assert message in str(caught.value)


def test_what_it_does_anyway_may_be_asked_for(site: Site) -> None:
    classes = ",".join(make_plan(TaggerSettings(model=site.address("student"))).vocabulary.names)
    make_plan(TaggerSettings(model=site.address("student"), runtime="onnx", classes=classes, views="1"))


@pytest.mark.parametrize("http", [False, True])
def test_a_bundle_has_to_be_named_where_there_are_several(site: Site, http: bool) -> None:
    with pytest.raises(UsageError, match="serves 2 bundles: student, teacher"):
        make_plan(TaggerSettings(model=site.address(http=http)))
    with pytest.raises(UsageError, match="serves no bundle 'cats'") as caught:
        make_plan(TaggerSettings(model=site.address("cats", http=http)))
    assert "student, teacher" in caught.value.expected
    # The raw graph is a model, too, but no bundle.
    with pytest.raises(UsageError, match="serves no bundle"):
        make_plan(TaggerSettings(model=site.address("teacher_snippets", http=http)))


@pytest.mark.parametrize("http", [False, True])
@pytest.mark.parametrize("given", [None, "wrong"])
def test_a_server_wants_its_token(
    site: Site, http: bool, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLIPLET_TOKEN")
    settings = TaggerSettings(
        model=site.address("teacher", http=http), connection=ConnectionSettings(token=given)
    )
    with pytest.raises(UsageError, match="restricted") as caught:
        make_plan(settings)
    assert "CLIPLET_TOKEN" in caught.value.fix


@pytest.mark.parametrize("scheme", ["triton", "triton+http"])
def test_nobody_there(scheme: str) -> None:
    connection = ConnectionSettings(retries=1)
    with pytest.raises(ServerAway, match="does not answer"):
        make_plan(TaggerSettings(model=f"{scheme}://127.0.0.1:9/x", connection=connection))


@pytest.mark.parametrize("http", [False, True])
def test_the_other_protocols_port(site: Site, http: bool) -> None:
    port = site.server.ports.grpc if http else site.server.ports.http
    model = str(ServerAddress("127.0.0.1", port, "teacher", http))
    with pytest.raises(ServerAway) as caught:
        make_plan(TaggerSettings(model=model, connection=ConnectionSettings(retries=0)))
    assert "gRPC has port 8001, HTTP 8000" in caught.value.expected


def test_a_served_model_cannot_be_taken_away(site: Site) -> None:
    with pytest.raises(UsageError, match="can be asked, but not taken"):
        make_plan(TaggerSettings(model=site.address("teacher"))).spec.identity()


# Calls


@pytest.mark.parametrize("http", [False, True])
def test_an_encoded_image(site: Site, images: list[str], http: bool) -> None:
    with Connection(ServerAddress.parse(site.address("teacher", http=http))) as server:
        card = server.card()
        (extra,) = tagger_extras(card.manifest.kind)
        found = server.infer(card.name, TAGGER, encoded(images[0]), (extra,), priority=1)
        record = ImageRecord.from_json(found["record"][0, 0])
        assert (record.width, record.height) == (90, 70)
        assert found[extra.name].shape == (1, 10, 20)
        with pytest.raises(ImageError) as caught:
            server.infer(card.name, TAGGER, {"image": np.array([[b"no image"]], object)})
        assert caught.value.stage == "decode"
        assert "looks like text" in caught.value.reason


@pytest.mark.parametrize("http", [False, True])
def test_what_does_not_fit_never_leaves(site: Site, http: bool) -> None:
    with Connection(ServerAddress.parse(site.address("teacher", http=http))) as server:
        card = server.card()
        for feeds in ({}, {"image": np.zeros((1, 2), np.float32)}, {"image": np.zeros((1,), object)}):
            with pytest.raises(DataError, match="tensor"):
                server.infer(card.name, TAGGER, feeds)
        wrong = GraphContract("other", (TensorSpec("image", "float32", ("B", 1)),), TAGGER.outputs)
        with pytest.raises(DataError, match="refused the request"):
            server.infer(card.name, wrong, {"image": np.zeros((1, 1), np.float32)})
        with pytest.raises(DataError, match="batch-size"):
            server.infer(card.name, TAGGER, {"image": np.array([[b""]] * 99, object)})


@pytest.mark.parametrize("http", [False, True])
def test_an_expired_deadline_is_said_clearly(site: Site, images: list[str], http: bool) -> None:
    with (
        Connection(ServerAddress.parse(site.address("teacher", http=http))) as server,
        pytest.raises(DeadlineExpired, match=r"no answer within 1e-05 s"),
    ):
        server.infer("teacher", TAGGER, encoded(images[0]), deadline_s=1e-5)


@pytest.mark.parametrize("http", [False, True])
def test_threads_share_a_connection(site: Site, images: list[str], http: bool) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with (
        cliplet.load(site.address("student", http=http)) as tagger,
        ThreadPoolExecutor(8) as pool,
    ):
        expected = tagger.label(images)
        for records in pool.map(lambda _: tagger.label(images), range(16)):
            assert [r.labels for r in records] == [r.labels for r in expected]
        assert 1 < len(own_segments()) <= 8
    assert own_segments() == []


# Shared memory


def test_a_full_shared_memory_is_said_once_and_done_without(
    site: Site, images: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_segments, "STEP", 1 << 50)
    with cliplet.load(site.address("student")) as tagger:
        tagger.label(images)
        tagger.label(images)
    (said,) = [r.message for r in caplog.records if "shm" in r.message]
    assert "is full" in said
    assert "slower" in said


def test_a_full_shared_memory_is_an_error_where_it_was_asked_for(
    site: Site, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_segments, "STEP", 1 << 50)
    connection = ConnectionSettings(shared_memory="on")
    with (
        cliplet.load(site.address("student"), connection=connection) as tagger,
        pytest.raises(shared_segments.NoSharedMemory, match="is full") as caught,
    ):
        tagger.label(images)
    assert "--shared-memory off" in caught.value.fix


def test_a_server_that_is_not_known_to_be_here_gets_no_memory(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path))  # as of another user, who has no note of it
    with cliplet.load(site.address("student")) as tagger:
        assert isinstance(tagger.runner, TritonRunner)
        assert not tagger.runner.connection.shares_memory
    with pytest.raises(UsageError, match="not known to be this user's server"):
        cliplet.load(site.address("student"), connection=ConnectionSettings(shared_memory="on"))


def test_the_server_outlives_a_client_that_vanishes(site: Site, images: list[str]) -> None:
    code = (
        "import os, signal, sys, threading, time, cliplet\n"
        "from cliplet.triton_wire import GrpcWire\n"
        "print(os.getpid(), flush=True)\n"
        "infer = GrpcWire.infer\n"
        "def die(self, *given):\n"
        "    threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "    return infer(self, *given)\n"
        "GrpcWire.infer = die\n"
        "with cliplet.load(sys.argv[1]) as tagger:\n"
        "    while True: tagger.label(sys.argv[2:])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, site.address("teacher"), *images],
        check=False,
        timeout=300,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ended.returncode == -signal.SIGKILL
    with cliplet.load(site.address("teacher")) as tagger:
        assert len(tagger.label(images)) == len(images)
        # It also swept what the other one left.
        assert segments_of(int(ended.stdout)) == []


# A server that goes and comes


@pytest.fixture
def own_server(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TritonServer]]:
    """A server for one test to kill; the list holds the one that runs."""
    monkeypatch.delenv("CLIPLET_TOKEN")
    repository = repository_of(site.repository.with_name("own"), pets=site.bundles["student"])
    servers = [TritonServer(repository, quick())]
    servers[0].start()
    try:
        servers[0].wait_ready()
        yield servers
    finally:
        servers[-1].stop()


def killed(servers: list[TritonServer]) -> None:
    os.kill(servers[-1].pid, signal.SIGKILL)
    servers[-1].stop()


def started_again(servers: list[TritonServer], repository: Path | None = None) -> None:
    before = servers[-1]
    ports = Ports(http=before.ports.http, grpc=before.ports.grpc, metrics=0)
    servers.append(TritonServer(repository or before.repository, quick(ports=ports)))
    servers[-1].start()
    servers[-1].wait_ready()


def before_call(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something just before the n-th inference."""
    infer, calls = GrpcWire.infer, iter(range(1, 1 << 30))

    def counted(self: GrpcWire, *given: Any) -> Any:
        if next(calls) == number:
            action()
        return infer(self, *given)

    monkeypatch.setattr(GrpcWire, "infer", counted)


def test_a_server_that_comes_back_is_gone_on_with(
    own_server: list[TritonServer], site: Site, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"triton://127.0.0.1:{own_server[0].ports.grpc}"

    def replace_it() -> None:
        killed(own_server)
        started_again(own_server)

    with cliplet.load(model, connection=ConnectionSettings(wait_s=60)) as tagger:
        assert str(tagger.plan.spec) == f"{model}/pets"
        assert isinstance(tagger.runner, TritonRunner)
        assert tagger.runner.connection.shares_memory
        expected = tagger.label(images)
        before_call(2, replace_it, monkeypatch)
        for _ in range(3):
            assert [r.labels for r in tagger.label(images)] == [r.labels for r in expected]
        assert own_segments()


def test_another_bundle_in_its_place_is_refused(
    own_server: list[TritonServer], site: Site, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = repository_of(site.repository.with_name("other"), pets=site.bundles["teacher"])

    def replace_it() -> None:
        killed(own_server)
        started_again(own_server, other)

    model = f"triton://127.0.0.1:{own_server[0].ports.grpc}/pets"
    with cliplet.load(model, connection=ConnectionSettings(wait_s=60)) as tagger:
        tagger.label(images)
        before_call(1, replace_it, monkeypatch)
        for _ in range(2):
            with pytest.raises(ServerError, match="came back with another bundle"):
                tagger.label(images)
    plan = make_plan(TaggerSettings(model=model))
    assert len(plan.vocabulary.names) == 20


def test_another_bundle_in_its_place_is_refused_by_every_client(
    own_server: list[TritonServer], site: Site, images: list[str]
) -> None:
    """It takes the place between two calls, so that none fails; and gives labels, too, but of other classes."""
    other = repository_of(site.repository.with_name("other-labels"), pets=site.bundles["teacher"])
    ports = own_server[0].ports
    here = [str(ServerAddress("127.0.0.1", ports.http if http else ports.grpc, http=http)) for http in (0, 1)]

    async def ask() -> None:
        async with AsyncClient(here[0]) as grpc, AsyncClient(here[1]) as http:
            for client in (grpc, http):
                assert (await client.tag(images[0])).scores.shape == (4,)
            await asyncio.to_thread(killed, own_server)
            await asyncio.to_thread(started_again, own_server, other)
            for client in (grpc, http, grpc, http):
                with pytest.raises(ServerError, match="came back with another bundle"):
                    await client.tag(images[0])

    with Client(here[0]) as grpc, Client(here[1]) as http:
        for client in (grpc, http):
            assert client.tag(images[0]).scores.shape == (4,)
        asyncio.run(ask())
        for client in (grpc, http, grpc, http):
            with pytest.raises(ServerError, match="came back with another bundle"):
                client.tag(images[0])
    with Client(here[0]) as client:
        assert client.tag(images[0]).scores.shape == (20,)


def test_a_server_that_stays_away(own_server: list[TritonServer], images: list[str]) -> None:
    model = f"triton://127.0.0.1:{own_server[0].ports.grpc}"
    plan = make_plan(TaggerSettings(model=model, connection=ConnectionSettings(wait_s=0.5, retries=0)))
    with load_plan(plan) as tagger:
        tagger.label(images)
        killed(own_server)
        with pytest.raises(ServerAway):
            tagger.label(images)
