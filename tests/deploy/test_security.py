"""SECURITY.md against a real server: after every attack the same processes label as before, and `/readyz` says so."""

from __future__ import annotations

import ast
import logging
import random
import re
import resource
import socket
import struct
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from attacks import (
    PROTOCOLS,
    Answer,
    Target,
    Tensor,
    array_tensor,
    good_image,
    grpc_request,
    http_request,
    image_tensor,
    png,
    resident_mib,
    strings,
)
from running import hang_while, quick, supervised, within
from served import make_student, make_teacher

import cliplet
from cliplet.deploy.page import PageOptions, make_app, run_page
from cliplet.deploy.page_backend import TritonBackend
from cliplet.deploy.repository import ServeSettings, plan_served, write_repository
from cliplet.deploy.server import TritonServer
from cliplet.serving import parse_image_problem
from cliplet.triton_program import server_folder

pytestmark = pytest.mark.skipif(not server_folder().is_dir(), reason="the embedded server is not installed")
DOCUMENT = Path(__file__).parents[2] / "SECURITY.md"
MAX_PIXELS = 2_000_000
MAX_QUEUE = 8
TOKEN = "open-sesame-of-this-test"
BEARER = f"Bearer {TOKEN}"
# As Triton wants them over each protocol.
TOKEN_HEADER = {"http": "authorization", "grpc": "triton-grpc-protocol-authorization"}
CONNECTIONS = 10_000
SMALL = np.zeros((1, 32, 32, 3), np.uint8)
BOX = np.array([[0, 0, 32, 32]], np.float32)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {"teacher": make_teacher(folder / "teacher"), "student": make_student(folder / "student")}


@contextmanager
def served(bundles: Mapping[str, Path], folder: Path, token: str | None = None) -> Iterator[Target]:
    """Bundles behind a real server and a real page."""
    settings = ServeSettings(threads=1, max_pixels=MAX_PIXELS, max_queue=MAX_QUEUE)
    models, _ = plan_served(list(bundles.items()), settings)
    repository = write_repository(models, folder / "repository", settings)
    flag = folder / "hang"
    hang_while(repository / "student_classifier", flag)
    (folder / "good.png").write_bytes(good_image())
    wanted = {}
    for name, bundle in bundles.items():
        with cliplet.load(str(bundle), runtime="onnx", threads=1) as tagger:
            wanted[name] = tagger.label([folder / "good.png"])[0].labels
    options = quick(deadline_s=20, token=token, restart=True, backoff_s=0.1, log_verbose=1 if token else 0)
    with TritonServer(repository, options) as server:
        app = make_app(TritonBackend(server), PageOptions(token=token or "", ready_s=60, ready_for_s=0))
        with run_page(app, "127.0.0.1", 0) as page:
            assert server.wait_ready().ok
            yield Target(server, page.port, flag, wanted)


@pytest.fixture(scope="module")
def running(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Started with few files allowed, as many systems do."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[1]), before[1]))
    try:
        with served(bundles, tmp_path_factory.mktemp("served")) as target:
            yield target
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def target(running: Target) -> Iterator[Target]:
    """The server, which every test has to leave as it was."""
    pids = running.pids
    assert len(pids) > 5
    yield running
    running.hold_unharmed(pids)


@pytest.fixture(scope="module")
def said() -> Iterator[list[str]]:
    """All that the server with a token says, at any level."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("cliplet")
    before = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture(scope="module")
def closed(
    bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, said: list[str]
) -> Iterator[Target]:
    """A server with a token."""
    with served({"student": bundles["student"]}, tmp_path_factory.mktemp("closed"), TOKEN) as target:
        yield target


def refused(answer: Answer) -> str:
    """Why."""
    assert 400 <= answer.status < 600, answer
    return answer.body.decode(errors="replace")


# Images


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (png(30_000, 30_000, rows=30), "900,000,000 pixels"),
        (png(1500, 1500), "2,250,000 pixels"),
        (png(1, 10_000_000, rows=1), "10,000,000 pixels"),
        (good_image()[:-2000], "truncated PNG"),
        (b"", "zero bytes"),
        (b"/etc/passwd", "looks like text"),
        (b"file:///etc/passwd", "looks like text"),
        (b"http://127.0.0.1/", "looks like text"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "SVG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_images_are_errors_of_their_own(target: Target, protocol: str, image: bytes, reason: str) -> None:
    before = max(resident_mib(pid) for pid in target.pids)
    problem = parse_image_problem(
        refused(target.infer(protocol, "student", image_tensor(image))).partition(": ")[2]
        if protocol == "grpc"
        else target.infer(protocol, "student", image_tensor(image)).json["error"]
    )
    assert problem is not None and problem[0] == "decode" and reason in problem[1]
    assert "root:" not in problem[1]
    assert max(resident_mib(pid) for pid in target.pids) < before + 100


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "image",
    [
        png(1, 1),
        png(1, 5000),
        png(1000, 1000, rows=3),
        png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))),
        png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000)))),
    ],
    ids=[
        "1x1",
        "1x5000",
        "rows that are missing",
        "text that unpacks to 100 MB",
        "profile that unpacks to 100 MB",
    ],
)
def test_strange_images_are_labelled(target: Target, protocol: str, image: bytes) -> None:
    before = max(resident_mib(pid) for pid in target.pids)
    assert target.infer(protocol, "student", image_tensor(image)).status == 200
    assert max(resident_mib(pid) for pid in target.pids) < before + 100


# Requests that contradict the contract, or themselves


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("image", "FP32", (1, 1), bytes(4)),
        Tensor("image", "JUNK", (1, 1), bytes(4)),
        Tensor("picture", "BYTES", (1, 1), strings(b"x")),
        Tensor("", "BYTES", (1, 1), strings(b"x")),
        Tensor("image", "BYTES", (), strings(b"x")),
        Tensor("image", "BYTES", (1,), strings(b"x")),
        Tensor("image", "BYTES", (1, 2), strings(b"x", b"y")),
        Tensor("image", "BYTES", (0, 1), b""),
        Tensor("image", "BYTES", (-1, 1), strings(b"x")),
        Tensor("image", "BYTES", (-1, -1), strings(b"x")),
        Tensor("image", "BYTES", (2**62, 2), strings(b"x")),
        Tensor("image", "BYTES", (1, 2**63 - 1), strings(b"x")),
        # Of this number of images Triton keeps 32 bits, which are zero.
        Tensor("image", "BYTES", (2**32, 1), strings(b"x")),
        Tensor("image", "BYTES", (2**32 + 1, 1), strings(b"x")),
        Tensor("image", "BYTES", (9999, 1), strings(*[b"x"] * 9999)),
        # Lengths that lie.
        Tensor("image", "BYTES", (1, 1), struct.pack("<I", 1000) + b"abc"),
        Tensor("image", "BYTES", (1, 1), struct.pack("<I", 2**32 - 1) + b"abc"),
        Tensor("image", "BYTES", (1, 1), b"ab"),
        Tensor("image", "BYTES", (1, 1), strings(b"abc") + b"xx"),
        Tensor("image", "BYTES", (1, 1), strings(b"abc", b"def")),
        Tensor("image", "BYTES", (2, 1), strings(b"abc")),
    ],
    ids=lambda tensor: f"{tensor.datatype}-{tensor.shape}-{len(tensor.data)}",
)
def test_requests_that_fit_nothing(target: Target, protocol: str, tensor: Tensor) -> None:
    refused(target.infer(protocol, "student", tensor))


@pytest.mark.parametrize("size", [3, 5000, -5, 2**62, 2**63, 2**64, "9"])
def test_http_sizes_that_lie(target: Target, size: object) -> None:
    tensor = Tensor("image", "BYTES", (1, 1), strings(b"abc"), size)  # type: ignore[arg-type]
    refused(target.infer("http", "student", tensor))


@pytest.mark.parametrize("length", ["-1", "5", "999999", "x", str(2**64)])
def test_http_header_lengths_that_lie(target: Target, length: str) -> None:
    _, body = http_request(image_tensor(b"abc"))
    path = "/v2/models/student/infer"
    refused(target.call("POST", path, body, inference_header_content_length=length))


def test_grpc_tensors_without_or_with_too_much_data(target: Target) -> None:
    empty = grpc_request("student", image_tensor(b"abc"))
    del empty.raw_input_contents[:]
    both = grpc_request("student", image_tensor(b"abc"))
    both.inputs[0].contents.bytes_contents.append(b"x")
    other = grpc_request("student", image_tensor(b"abc"))
    del other.raw_input_contents[:]
    other.inputs[0].contents.fp32_contents.append(1)
    for message in (empty, both, other):
        refused(target.grpc("ModelInfer", message.SerializeToString()))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_bad_request_spoils_no_other_of_its_batch(target: Target, protocol: str) -> None:
    """A shape that overflows gets as far as the model, together with good images."""
    bad = Tensor("image", "BYTES", (2**32, 1), strings(b"x"))
    with ThreadPoolExecutor(6) as pool:
        tensors = [bad, image_tensor(good_image())] * 15
        answers = list(pool.map(lambda t: target.infer(protocol, "student", t), tensors))
    assert {answer.status for answer in answers[1::2]} == {200}
    assert all(answer.status != 200 for answer in answers[::2])


# The raw graph


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("model", "tensors", "reason"),
    [
        ("student_classifier", {"image": SMALL, "boxes": BOX * np.nan}, "not a number"),
        ("student_classifier", {"image": SMALL, "boxes": BOX + np.inf}, "not a number"),
        ("student_classifier", {"image": SMALL, "boxes": BOX - np.inf}, "not a number"),
        ("student_classifier", {"image": SMALL, "boxes": BOX + 1e38}, "far away"),
        ("student_classifier", {"image": SMALL[:, :0, :0], "boxes": BOX}, "no pixels"),
        ("student_classifier", {"image": np.zeros((1, 4097, 4096, 3), np.uint8), "boxes": BOX}, "at most 16,777,216"),
        ("student_classifier", {"image": np.zeros((33, 8, 8, 3), np.uint8), "boxes": np.tile(BOX, (33, 1))}, "<= 32"),
        ("student_classifier", {"image": SMALL, "boxes": np.tile(BOX, (2, 1))}, ""),
        ("student_classifier", {"image": SMALL, "boxes": BOX[:, :3]}, ""),
        ("student_classifier", {"image": SMALL}, "boxes"),
        ("teacher_snippets", {"image": SMALL, "boxes": np.full((1, 2, 4), np.nan, np.float32)}, "not a number"),
        ("teacher_snippets", {"image": SMALL, "boxes": np.zeros((1, 0, 4), np.float32)}, "no views"),
        ("teacher_snippets", {"image": SMALL, "boxes": np.tile(BOX, (1, 321, 1))}, "321 views, at most 320"),
        ("teacher_snippets", {"image": SMALL, "boxes": np.tile(BOX, (1, 10**6, 1))}, "at most 320"),
        ("teacher_text", {"tokens": np.full((1, 16), 10**9)}, ""),
        ("teacher_text", {"tokens": np.ones((257, 16), np.int64)}, "<= 256"),
        ("teacher_text", {"tokens": np.ones((1, 5000), np.int64)}, "shape"),
    ],
)  # fmt: skip
def test_raw_graphs_have_limits(
    target: Target, protocol: str, model: str, tensors: dict[str, np.ndarray], reason: str
) -> None:
    sent = [array_tensor(name, array) for name, array in tensors.items()]
    assert reason in refused(target.infer(protocol, model, *sent))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_raw_graphs_with_a_batch_that_overflows(target: Target, protocol: str) -> None:
    """Billions of empty images: no bytes to send, and no batch at all as Triton counts, which then never answers."""
    nothing = Tensor("image", "UINT8", (2**32, 0, 0, 3), b"")
    boxes = Tensor("boxes", "FP32", (2**32, 0, 4), b"")
    with ThreadPoolExecutor(20) as pool:
        asked = [
            pool.submit(target.infer, protocol, "teacher_snippets", nothing, boxes, timeout_s=1)
            for _ in range(20)
        ]
    for future in asked:
        if not isinstance(future.exception(), TimeoutError):
            refused(future.result())


# Connections


@pytest.mark.parametrize("port", ["http", "grpc"])
def test_ten_thousand_connections(target: Target, port: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < CONNECTIONS + 1000:
        pytest.skip(f"this system allows {limits[1]} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    try:
        with target.held(port, CONNECTIONS):
            target.hold_unharmed(target.pids)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    ("port", "first"),
    [
        ("http", b"POST /v2/models/student/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"),
        ("http", b"POST /v2/models/student/inf"),
        ("grpc", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"),
        ("grpc", b"PRI * HT"),
        ("metrics", b"GET /met"),
        ("page", b"POST /api/tag?model=student HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n"),
    ],
)
def test_half_sent_requests_hold_nobody_up(target: Target, port: str, first: bytes) -> None:
    count = 300 if port != "page" else 100
    with target.held(port, count, first):
        target.hold_unharmed(target.pids)
        assert target.call("GET", "/metrics", port="metrics").status == 200


def test_a_full_page_leaves_the_server_alone(target: Target) -> None:
    """Who asks the page, probes among them, has to come back; who asks Triton is served."""
    with target.held("page", 300):
        assert within(60, lambda: target.call("GET", "/healthz", port="page").status == 503)
        assert target.labels("http", "student") == list(target.wanted["student"])


JUNK = [
    bytes(5000),
    random.Random(5).randbytes(20_000),
    b"\x16\x03\x01\x02\x00\x01\x00" + random.Random(6).randbytes(300),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.Random(7).randbytes(5000),
    b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",
    b"POST /v2/models/student/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /api/tag HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v2/models/student/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"ffffffffffffffff\r\nxx",
]


@pytest.mark.parametrize("port", ["http", "grpc", "metrics", "page"])
def test_garbage_on_every_port(target: Target, port: str) -> None:
    for junk in JUNK:
        target.raw(junk, port)
        target.labels("http", "student")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_clients_that_vanish(target: Target, protocol: str) -> None:
    """In the middle of a request, and before the answer to a whole one."""
    if protocol == "grpc":
        message = grpc_request("student", image_tensor(good_image())).SerializeToString()
        for _ in range(40):
            target.grpc_call("ModelInfer").future(message).cancel()
    else:
        vanish_over_http(target)
    # What they left in the queue is worked off.
    good = image_tensor(good_image())
    assert within(60, lambda: target.infer(protocol, "student", good).status == 200)


def vanish_over_http(target: Target) -> None:
    head, body = http_request(image_tensor(good_image()))
    request = (
        b"POST /v2/models/student/infer HTTP/1.1\r\nHost: x\r\n"
        b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (head, len(body))
    ) + body
    for part in (request, request[: len(request) // 2], request[:40]):
        with target.held("http", 30, part) as clients:
            for client in clients:
                # Closed with a reset, not with a farewell.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# Bodies


def test_fuzzed_grpc_messages(target: Target) -> None:
    seeds = [
        grpc_request("student", image_tensor(good_image())).SerializeToString(),
        grpc_request(
            "teacher_snippets", array_tensor("image", SMALL), array_tensor("boxes", BOX[:, None])
        ).SerializeToString(),
    ]
    statuses = set()
    for number in range(400):
        fuzzed = mutated(seeds[number % 2], random.Random(number))
        statuses.add(target.grpc("ModelInfer", fuzzed).body.partition(b":")[0])
    assert {b"INVALID_ARGUMENT", b"NOT_FOUND", b"INTERNAL"} <= statuses, "they got to different places"


@pytest.mark.parametrize("method", ["ModelConfig", "ModelStatistics", "ModelMetadata", "ModelStreamInfer"])
def test_fuzzed_grpc_calls(target: Target, method: str) -> None:
    for number in range(30):
        target.grpc(method, random.Random(number).randbytes(number), timeout_s=5)


def test_fuzzed_http_bodies(target: Target) -> None:
    head, body = http_request(image_tensor(good_image()))
    for number in range(300):
        rng = random.Random(number)
        fuzzed = mutated(body[:head], rng) + body[head:]
        length = str(rng.choice([head, len(fuzzed) - len(body) + head]))
        target.call("POST", "/v2/models/student/infer", fuzzed, inference_header_content_length=length)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The same with a few bytes changed, lost, new, or all from somewhere on missing; mostly near its beginning."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(1 + (len(changed) if rng.random() < 0.3 else min(len(changed), 60)))
        match rng.randrange(8):
            case 0 | 1 | 2:
                changed[place : place + 1] = rng.randbytes(1)
            case 3 | 4:
                del changed[place : place + rng.randrange(1, 9)]
            case 5 | 6:
                changed[place:place] = rng.randbytes(rng.randrange(1, 9))
            case _:
                del changed[place:]
    return bytes(changed)


def test_large_bodies_do_not_add_up(target: Target) -> None:
    """Nothing limits one, but its memory serves for the next; an answer may come before the body is let go."""
    size_mib, before, sizes = 200, resident_mib(target.server.pid), []
    for _ in range(8):
        answer = target.call(
            "POST", "/v2/models/student/infer", bytes(size_mib << 20), inference_header_content_length="10"
        )
        refused(answer)
        sizes.append(resident_mib(target.server.pid))
    assert max(sizes) < before + 3 * size_mib, sizes


def test_the_page_refuses_large_bodies(target: Target) -> None:
    """Before they are sent, where their length is told, or else on the way."""
    head = b"POST /api/tag?model=student HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
    with target.connected("page") as client:
        client.sendall(head + b"Content-Length: 1073741824\r\n\r\n")
        assert b" 413 " in client.recv(65536)
    with target.connected("page") as client:
        client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        try:
            for _ in range(64):
                client.sendall(chunk)
        except OSError:
            pass  # it was cut
        else:
            assert b" 413 " in client.recv(65536)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_full_queue_refuses_and_recovers(target: Target, protocol: str) -> None:
    """While the graph hangs, some wait, and all others are told so at once."""
    target.flag.touch()
    image = image_tensor(good_image())
    with ThreadPoolExecutor(120) as pool:
        try:
            asked = [pool.submit(target.infer, protocol, "student", image) for _ in range(120)]
            first = next(as_completed(asked, timeout=60)).result()
        finally:
            target.flag.unlink()
        answers = [future.result() for future in asked]
    assert "maximum queue size" in refused(first)
    if protocol == "http":
        assert first.status == 503
    else:
        assert first.body.startswith(b"UNAVAILABLE")
    statuses = [answer.status for answer in answers]
    assert statuses.count(200) >= MAX_QUEUE
    assert all("maximum queue size" in refused(a) for a in answers if a.status != 200)


# What only this machine may do

PRIVATE_HTTP = [
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/student/load"),
    ("POST", "/v2/repository/models/student/unload"),
    ("POST", "/v2/repository/models/..%2f..%2fetc/load"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/region/mine/register"),
    ("POST", "/v2/systemsharedmemory/unregister"),
    ("GET", "/v2/cudasharedmemory/status"),
    ("POST", "/v2/cudasharedmemory/region/mine/register"),
    ("POST", "/v2/cudasharedmemory/unregister"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/trace/setting"),
    ("GET", "/v2/models/student/trace/setting"),
    ("POST", "/v2/models/student/trace/setting"),
]
PRIVATE_GRPC = [
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
]


@pytest.mark.parametrize(("method", "path"), PRIVATE_HTTP)
def test_private_apis_over_http(target: Target, method: str, path: str, tmp_path: Path) -> None:
    file = tmp_path / "written"
    # Deeper than Triton's parser can go: it is refused before it is read.
    for body in (f'{{"log_file":"{file}","trace_file":["{file}"],"key":"/x"}}', "[" * 300_000):
        for named in ({}, {"cliplet_secret": "wrong"}, {"cliplet_secret": ""}):
            assert "restricted" in refused(target.call(method, path, body.encode(), **named))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", PRIVATE_GRPC)
def test_private_apis_over_grpc(target: Target, method: str, tmp_path: Path) -> None:
    from tritonclient.grpc import service_pb2

    messages = [b""]
    if method in ("LogSettings", "TraceSetting"):
        settings = getattr(service_pb2, f"{method}Request")()
        if method == "LogSettings":
            settings.settings["log_file"].string_param = str(tmp_path / "written")
        else:
            settings.settings["trace_file"].value.append(str(tmp_path / "written"))
        messages.append(settings.SerializeToString())
    for message in messages:
        for metadata in ((), (("triton-grpc-protocol-cliplet-secret", "wrong"),)):
            assert "restricted" in refused(target.grpc(method, message, metadata=metadata))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_memory_regions_have_to_be_known(target: Target, protocol: str) -> None:
    """A request names memory; what nobody registered is not looked for."""
    for region in ("/etc/passwd", "cliplet-", "../x"):
        if protocol == "http":
            parameters = f'{{"shared_memory_region":"{region}","shared_memory_byte_size":100}}'
            row = f'{{"name":"image","datatype":"BYTES","shape":[1,1],"parameters":{parameters}}}'
            answer = target.call("POST", "/v2/models/student/infer", f'{{"inputs":[{row}]}}'.encode())
        else:
            message = grpc_request("student", image_tensor(b""))
            del message.raw_input_contents[:]
            message.inputs[0].parameters["shared_memory_region"].string_param = region
            message.inputs[0].parameters["shared_memory_byte_size"].int64_param = 100
            answer = target.grpc("ModelInfer", message.SerializeToString())
        assert "Unable to find shared memory region" in refused(answer)


PATHS = [
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "/etc/passwd",
    "student/../student",
]


@pytest.mark.parametrize("name", PATHS)
def test_names_are_no_paths(target: Target, name: str) -> None:
    for path in (
        f"/v2/models/{name}/config",
        f"/v2/models/{name}/infer",
        f"/v2/models/student/versions/{name}/config",
        f"/{name}",
        f"//{name}",
    ):
        for method in ("GET", "POST"):
            assert "root:" not in refused(target.call(method, path))
            assert "root:" not in refused(target.call(method, path, port="page"))
            # That one answers everything with the same numbers, or with nothing.
            assert b"root:" not in target.call(method, path, port="metrics").body
    answer = target.call("POST", f"/api/tag?model={name}", good_image(), port="page")
    assert answer.status == 404 and b"root:" not in answer.body
    assert "unknown model" in refused(target.infer("grpc", name, image_tensor(good_image())))
    message = grpc_request("student", image_tensor(good_image()))
    message.model_version = name
    refused(target.grpc("ModelInfer", message.SerializeToString()))


# The page


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({}, 200),
    ],
)
def test_pages_of_others_cannot_use_ours(target: Target, headers: dict[str, str], status: int) -> None:
    answer = target.call("POST", "/api/tag?model=student", good_image(), port="page", **headers)
    assert answer.status == status
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("name", ["x%0d%0aSet-Cookie:%20a=b", "x%0aSet-Cookie:a=b", "%00", "<script>"])
def test_no_header_comes_from_a_request(target: Target, name: str) -> None:
    answer = target.call("POST", f"/api/tag?model={name}", good_image(), port="page")
    assert answer.status == 404 and "Set-Cookie" not in answer.headers
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_triton_itself_knows_no_origins(target: Target) -> None:
    """A weakness that SECURITY.md names: a page of another site may use the HTTP port where there is no token."""
    image = image_tensor(good_image())
    headers = {"Origin": "http://evil.example", "Host": "evil.example", "Content-Type": "text/plain"}
    answer = target.infer("http", "student", image, **headers)
    assert answer.status == 200 and "Access-Control-Allow-Origin" not in answer.headers


# With a token


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", TOKEN, BEARER[:-1], BEARER + "x"])
def test_a_wrong_token(closed: Target, protocol: str, given: str) -> None:
    headers = {TOKEN_HEADER[protocol]: given} if given else {}
    answer = closed.infer(protocol, "student", image_tensor(good_image()), **headers)
    why = refused(answer)
    assert "restricted" in why and TOKEN not in why
    page = {"authorization": given} if given else {}
    assert closed.call("POST", "/api/tag", good_image(), port="page", **page).status == 401
    assert closed.call("GET", "/api/models", port="page", **page).status == 401
    for path in ("/v2", "/v2/models/student", "/v2/models/student/config", "/v2/models/student/stats"):
        assert "restricted" in refused(closed.call("GET", path, **page))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_right_token(closed: Target, protocol: str) -> None:
    known = {TOKEN_HEADER[protocol]: BEARER}
    assert closed.labels(protocol, "student", **known) == list(closed.wanted["student"])
    answer = closed.call("POST", "/api/tag", good_image(), port="page", authorization=BEARER)
    assert answer.status == 200


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_token_is_not_the_secret(closed: Target, protocol: str) -> None:
    known = {TOKEN_HEADER[protocol]: BEARER}
    if protocol == "http":
        answer = closed.call("POST", "/v2/repository/index", **known)
    else:
        answer = closed.grpc("RepositoryIndex", b"", metadata=tuple(known.items()))
    assert "restricted" in refused(answer)


def test_token_and_secret_are_in_no_log(closed: Target, said: list[str]) -> None:
    """However much Triton was asked to say."""
    closed.labels("http", "student", authorization=BEARER)
    closed.labels("grpc", "student", **{TOKEN_HEADER["grpc"]: BEARER})
    closed.call("GET", "/v2/logging", cliplet_secret="wrong")
    assert len(said) > 20, "it does speak"
    text = "\n".join(said)
    assert TOKEN not in text and closed.server.secret not in text


def test_the_command_line_shows_token_and_secret(closed: Target) -> None:
    """A weakness that SECURITY.md names: Triton takes them as arguments alone."""
    words = Path(f"/proc/{closed.server.pid}/cmdline").read_text()
    assert TOKEN in words and closed.server.secret in words


DEEP = b"[" * 300_000
PIECES = b"1\r\n \r\n" * 700_000
KILLERS = (
    b"Content-Length: %d\r\n\r\n" % len(DEEP) + DEEP,
    b"Transfer-Encoding: chunked\r\n\r\n" + PIECES + b"0\r\n\r\n",
)


def test_a_body_that_kills_triton_needs_the_token(closed: Target) -> None:
    """A weakness of Triton 2.51 that SECURITY.md names. Strangers are refused before it; `--restart` mends the rest."""
    path = b"POST /v2/models/student/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    known = path + b"authorization: " + BEARER.encode() + b"\r\n"
    pids = closed.pids
    for killer in KILLERS:
        assert b" 403 " in closed.raw(path + killer, timeout_s=30, farewell=False)
    assert closed.pids == pids
    with supervised(closed.server) as ended:
        for number, killer in enumerate(KILLERS, closed.server.restarts + 1):
            closed.raw(known + killer, timeout_s=30, farewell=False)
            assert within(120, lambda n=number: closed.server.restarts == n and closed.server.health().ok)
    assert ended == []
    assert closed.labels("http", "student", authorization=BEARER) == list(closed.wanted["student"])


# The document


def test_every_statement_names_a_test() -> None:
    named = set(re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", DOCUMENT.read_text()))
    assert len(named) > 20
    for file in sorted({file for file, _ in named}):
        tree = ast.parse((DOCUMENT.parent / file).read_text())
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {test for where, test in named if where == file} <= tests, file


def test_every_test_here_stands_in_it() -> None:
    tree = ast.parse(Path(__file__).read_text())
    tests = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}
    text = DOCUMENT.read_text()
    missing = {test for test in tests if f"test_security.py::{test}" not in text}
    assert missing == {"test_every_statement_names_a_test", "test_every_test_here_stands_in_it"}
