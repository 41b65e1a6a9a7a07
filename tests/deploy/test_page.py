"""The page's server: answers, refusals in one form, limits that hold while others are served, and who may ask."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fake_backend import CLASSES, THRESHOLDS, FakeBackend, card, png
from PIL import Image

from cliplet.deploy import page_guard, page_server
from cliplet.deploy.health import Health
from cliplet.deploy.page import PageOptions, make_app, page_html, run_page
from cliplet.deploy.page_backend import TritonBackend
from cliplet.errors import EnvironmentError_, UsageError
from cliplet.triton_errors import DeadlineExpired, ModelFailed, ServerBusy

# Seconds that a busy machine may need for what takes none.
LONG_S = 60.0


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stalls between two writes of a test is no slow client."""
    monkeypatch.setattr(page_guard, "GRACE_S", LONG_S)
    monkeypatch.setattr(page_server, "IDLE_S", LONG_S)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


@dataclass
class Caller:
    """A page that runs, and how to ask it."""

    port: int
    backend: FakeBackend

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG_S)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        response = connection.getresponse()
        answer = Answer(response.status, {k.title(): v for k, v in response.headers.items()}, response.read())
        connection.close()
        return answer

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def tag(self, image: bytes, query: str = "", **headers: str) -> Answer:
        return self.ask("POST", f"/api/tag{query}", image, **headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONG_S)

    def tag_at_once(self, image: bytes) -> bytes:
        """The answer to an image that is sent in one piece, so that no stall makes it slow."""
        with self.connect() as client:
            client.sendall(tag_head(image, "Connection: close") + image)
            return _all_of(client)


def tag_head(image: bytes, *more: str) -> bytes:
    lines = ["POST /api/tag HTTP/1.1", "Host: localhost", f"Content-Length: {len(image)}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


@contextmanager
def serving(backend: FakeBackend | None = None, host: str = "127.0.0.1", **options: Any) -> Iterator[Caller]:
    backend = backend or FakeBackend()
    with run_page(make_app(backend, PageOptions(**options)), host, 0) as page:
        yield Caller(page.port, backend)


@pytest.fixture(scope="module")
def two() -> Iterator[Caller]:
    """A CLIP and a classifier, with small limits."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(page_server, "IDLE_S", LONG_S)
        # For who is refused while this machine stalls in the middle of sending.
        patch.setattr(page_server, "LINGER_S", LONG_S / 2)
        both = FakeBackend(card(), card("small", "classifier"))
        yield stack.enter_context(serving(both, max_bytes=20_000))


# Answers.


def test_models_say_what_a_client_needs(two: Caller) -> None:
    answer = two.get("/api/models")
    pets, small = answer.json["models"]
    assert (pets["name"], pets["kind"], pets["views"], pets["max_pixels"]) == (
        "pets",
        "snippets",
        "1+2x2",
        10_000,
    )
    assert pets["classes"] == list(CLASSES) and pets["thresholds"] == list(THRESHOLDS)
    assert (small["name"], small["kind"]) == ("small", "classifier")
    assert answer.json["limits"] == {"bytes": 20_000, "in_flight": 4}


def test_labels_with_scores_thresholds_and_views(two: Caller) -> None:
    found = two.tag(png(color=(204, 51, 102)), "?model=pets&detail=1").json
    assert (found["width"], found["height"]) == (60, 40)
    assert np.allclose(found["scores"], [0.8, 0.2, 0.4, 0.8])
    labels = [(label["name"], label["threshold"]) for label in found["labels"]]
    assert labels == [("cat", 0.3), ("boat", 0.4), ("<b>bird</b>", 0.2)]
    assert [label["score"] for label in found["labels"]] == sorted(
        (s for s in found["scores"] if s > 0.3), reverse=True
    )
    assert np.shape(found["boxes"]) == (5, 4) and found["boxes"][0] == [0, 0, 60, 40]
    assert np.shape(found["view_probs"]) == (5, 4) and found["cam"] is None
    assert found["view_probs"][4] == [0.8, 0.2, 0.4, 0.8]


def test_activation_map_of_a_classifier(two: Caller) -> None:
    found = two.tag(png(), "?model=small&detail=1").json
    assert np.shape(found["cam"]) == (4, 4, 5) and found["view_probs"] is None
    assert np.unravel_index(np.argmax(found["cam"][0]), (4, 5)) == (1, 3)


def test_details_only_where_they_are_wanted(two: Caller) -> None:
    for query in ("?model=pets", "?model=pets&detail=0"):
        found = two.tag(png(), query).json
        assert found["view_probs"] is None and found["cam"] is None
    assert two.backend.seen[-1] == ("pets", len(png()), False)


def test_forms_as_browsers_and_curl_send_them(two: Caller) -> None:
    image = png(color=(0, 255, 0))
    for name in ('name="image"', 'name="other"; filename="../../etc/passwd"'):
        body = b'--x\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'
        body += f"--x\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode() + image + b"\r\n--x--\r\n"
        answer = two.tag(body, "?model=pets", content_type="multipart/form-data; boundary=x")
        assert answer.json["labels"][0]["name"] == "dog"
        assert two.backend.seen[-1][1] == len(image)


def test_the_only_model_needs_no_name() -> None:
    with serving() as caller:
        assert caller.tag(png()).json["width"] == 60


def test_samples_are_scenes(two: Caller) -> None:
    first, again, other = (two.get(f"/api/sample?number={n}") for n in (7, 7, 8))
    assert first.headers["Content-Type"] == "image/png" and first.body == again.body != other.body
    assert Image.open(io.BytesIO(first.body)).size[0] >= 240


# Refusals: status and JSON, whatever was wrong.

BOUNDARY = {"content_type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "says"),
    [
        ("POST", "/api/tag?model=cats", png(), {}, 404, "no model 'cats'"),
        ("POST", "/api/tag", png(), {}, 400, "2 models give labels"),
        ("POST", "/api/tag?model=pets", b"", {}, 422, "zero bytes"),
        ("POST", "/api/tag?model=pets", b"%PDF-1.7", {}, 422, "looks like PDF"),
        ("POST", "/api/tag?model=pets", png()[:60], {}, 422, ""),
        ("POST", "/api/tag?model=pets", png(101, 100), {}, 422, "decompression bomb"),
        ("POST", "/api/tag?model=pets", bytes(20_001), {}, 413, "more than 20,000 bytes"),
        ("POST", "/api/tag?model=pets", iter([bytes(9_000)] * 3), {}, 413, "more than 20,000 bytes"),
        ("POST", "/api/tag?model=pets", gzip.compress(bytes(10**8)), {"content_encoding": "gzip"}, 413, ""),
        ("POST", "/api/tag?model=pets", b"--x--\r\n", BOUNDARY, 400, "holds no file"),
        ("POST", "/api/tag?model=pets", b"nonsense", BOUNDARY, 400, "form"),
        ("POST", "/api/tag?model=pets", b"", {"content_type": "multipart/form-data"}, 400, "form"),
        ("GET", "/api/tag?model=pets", None, {}, 405, "Method Not Allowed"),
        ("DELETE", "/", None, {}, 405, "Method Not Allowed"),
        ("GET", "/api/sample?number=-1", None, {}, 400, "sample '-1'"),
        ("GET", "/api/sample?number=99999", None, {}, 400, "below 10,000"),
        ("GET", "/nothing", None, {}, 404, "Not Found"),
        ("GET", "/page.html", None, {}, 404, "Not Found"),
        ("GET", "/../../../../etc/passwd", None, {}, 404, "Not Found"),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", None, {}, 404, "Not Found"),
        ("GET", "/api/models", None, {"host": "evil.example"}, 421, "evil.example"),
        ("GET", "/", None, {"host": "rebound.example:8080"}, 421, "rebound.example"),
        ("POST", "/api/tag?model=pets", png(), {"origin": "http://evil.example"}, 403, "evil.example"),
        ("POST", "/api/tag?model=pets", png(), {"sec_fetch_site": "cross-site"}, 403, "another site"),
        ("POST", "/api/tag?model=pets", png(), {"origin": "null"}, 403, "null"),
    ],
)
def test_refusals(
    two: Caller, method: str, path: str, body: Any, headers: dict[str, str], status: int, says: str
) -> None:
    answer = two.ask(method, path, body, **headers)
    assert answer.status == status, answer.body
    assert says in f"{answer.error['happened']} {answer.error['expected']}"
    assert set(answer.error) >= {"happened", "expected", "fix"}
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_bad_image_has_its_stage(two: Caller) -> None:
    assert two.tag(b"text", "?model=pets").error["stage"] == "decode"


@pytest.mark.parametrize(
    ("raised", "status", "retried"),
    [
        (ServerBusy("the queue is full"), 503, True),
        (EnvironmentError_("no server"), 503, True),
        (DeadlineExpired("too slow"), 504, False),
        (ModelFailed("it failed"), 502, False),
        (UsageError("no such thing"), 400, False),
        (RuntimeError("a secret of ours"), 500, False),
    ],
)
def test_trouble_of_the_server(raised: Exception, status: int, retried: bool) -> None:
    with serving() as caller:
        caller.backend.error = raised
        answer = caller.tag(png())
        assert answer.status == status and ("Retry-After" in answer.headers) == retried
        assert ("secret" in answer.body.decode()) is False
        caller.backend.error = None
        assert caller.tag(png()).status == 200


# The page itself.


def test_page_loads_nothing_from_elsewhere(two: Caller) -> None:
    answer = two.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy
    text = answer.body.decode()
    assert text == page_html()[0] and "cliplet: the style of" not in text
    outside = {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert {word.strip("\"';") for word in text.split() if "://" in word} <= outside
    assert not any(f'{word}="' in text for word in ("src", "onclick", "onload", "style"))


# Ready or not.


def test_ready_follows_the_models() -> None:
    with serving(FakeBackend(card(), card("small")), ready_for_s=0) as caller:
        answer = caller.get("/readyz")
        assert (
            answer.status == 200 and answer.json["ready"] and set(answer.json["models"]) == {"pets", "small"}
        )
        caller.backend.fail("small", "no answer within 5 s")
        answer = caller.get("/readyz")
        assert answer.status == 503 and not answer.json["ready"]
        assert answer.json["models"]["small"]["reason"] == "no answer within 5 s"
        assert answer.json["models"]["pets"]["ok"]
        assert caller.get("/healthz").status == 200, "alive all the same"
        caller.backend.heal()
        assert caller.get("/readyz").status == 200


def test_ready_has_a_deadline_and_costs_one_check_for_all() -> None:
    with serving(ready_s=0.3, ready_for_s=LONG_S) as caller:
        caller.backend.hang_s = LONG_S
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: caller.get("/readyz"), range(8)))
        assert {a.status for a in answers} == {503} and time.monotonic() - began < LONG_S / 2
        assert answers[0].json["models"]["server"]["reason"] == "no answer within 0.3 s"
        assert caller.backend.checks == 1


def test_ready_says_no_without_any_model() -> None:
    backend = FakeBackend()
    backend.cards.clear()
    backend.heal()
    with serving(backend) as caller:
        assert caller.get("/readyz").status == 503


# Limits.


def test_queue_is_bounded_and_drains() -> None:
    with serving(in_flight=2, queue=3) as caller:
        caller.backend.hold.clear()
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(caller.tag, png()) for _ in range(12)]
            try:
                _until(lambda: sum(one.done() for one in asked) == 7)
                refused = [one.result() for one in asked if one.done()]
            finally:
                caller.backend.hold.set()
            by_status = [one.result().status for one in asked]
        assert by_status.count(200) == 5 and by_status.count(503) == 7
        assert caller.backend.at_once == 2
        assert {answer.status for answer in refused} == {503}
        assert refused[0].headers["Retry-After"] == "1" and "5 images" in refused[0].error["happened"]
        assert caller.tag(png()).status == 200


def test_a_slow_model_has_a_deadline() -> None:
    with serving(timeout_s=0.3) as caller:
        caller.backend.hang_s = 30
        answer = caller.tag(png())
        assert answer.status == 504 and "0.3 s" in answer.error["happened"]
        assert caller.backend.running == 0


def test_a_client_that_vanishes_leaves_its_place() -> None:
    with serving(in_flight=1, queue=0, timeout_s=10 * LONG_S) as caller:
        caller.backend.hang_s = 10 * LONG_S
        with caller.connect() as client:
            client.sendall(tag_head(png()) + png())
            _until(lambda: caller.backend.running == 1)
        _until(lambda: caller.backend.running == 0)
        caller.backend.hang_s = 0
        assert caller.tag(png()).status == 200


SLOW_HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
SLOW_BODY = b"POST /api/tag HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"


@pytest.mark.parametrize(("head", "answer"), [(SLOW_HEAD, b""), (SLOW_BODY, b" 408 ")])
def test_slow_clients_are_cut_while_others_are_served(
    monkeypatch: pytest.MonkeyPatch, head: bytes, answer: bytes
) -> None:
    # One that says nothing for so long is cut, too; only where the head is what comes slowly is that meant.
    monkeypatch.setattr(page_server, "IDLE_S", LONG_S if answer else 3.0)
    monkeypatch.setattr(page_guard, "GRACE_S", 3.0)
    monkeypatch.setattr(page_server, "LINGER_S", 0.2)
    with serving(in_flight=1, queue=1) as caller, ExitStack() as stack:
        slow = [stack.enter_context(caller.connect()) for _ in range(20)]
        for client in slow:
            client.sendall(head)
        stop = threading.Event()

        def drip() -> None:
            open_ones = list(slow)
            while open_ones and not stop.wait(0.1):
                for client in list(open_ones):
                    try:
                        client.send(b"a")
                    except OSError:
                        open_ones.remove(client)

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            served = [caller.tag_at_once(png()) for _ in range(5)]
            said = [_all_of(client) for client in slow]
        finally:
            stop.set()
            dripping.join()
    # One that a stall of this machine made slow was cut like them.
    assert any(served) and all(b" 200 " in text for text in served if text)
    assert all(answer in text for text in said)


def test_a_slow_line_that_goes_on_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece buys the time for the next ones; without that, it would have 0.3 s."""
    monkeypatch.setattr(page_guard, "GRACE_S", 0.3)
    monkeypatch.setattr(page_guard, "SLOWEST_BYTES_S", 30 / LONG_S)
    image = png()
    assert len(image) > 60
    with serving() as caller, caller.connect() as client:
        client.sendall(tag_head(image, "Connection: close") + image[:30])
        for start in range(30, len(image), 30):
            time.sleep(0.3)
            client.sendall(image[start : start + 30])
        assert b" 200 " in _all_of(client)


def test_received_images_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(max_bytes=1000) as caller, ExitStack() as stack:
        half = b"POST /api/tag HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" + bytes(900)
        for _ in range(page_guard.BUFFERED_BODIES):
            stack.enter_context(caller.connect()).sendall(half)
        _until(lambda: caller.tag(bytes(950)).status == 503)
        stack.close()
        _until(lambda: caller.tag(png()).status == 200)
        statuses = {caller.tag(bytes(950)).status for _ in range(2 * page_guard.BUFFERED_BODIES)}
        assert statuses == {422}, "what was received and answered takes no room any more"


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "CONNECTIONS", 10)
    with serving() as caller, ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(caller.connect())
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in client.recv(65536), "it is one of the connections by now"
        with caller.connect() as client:
            text = _all_of(client)
        assert b" 503 " in text and b"Retry-After: 1" in text and b"too many connections" in text
        stack.close()

        def answers() -> bool:
            with suppress(ConnectionError):
                return caller.get("/healthz").status == 200
            return False

        _until(answers)


@pytest.mark.parametrize(
    "junk", [b"\x00" * 5000, b"\x16\x03\x01" + bytes(200), b"GET / HTTP/9\r\n\r\n", b"A" * 99999]
)
def test_garbage_leaves_it_answering(two: Caller, junk: bytes) -> None:
    with two.connect() as client:
        client.sendall(junk)
        client.shutdown(socket.SHUT_WR)
        assert b" 200 " not in _all_of(client)
    assert two.tag(png(), "?model=pets").status == 200


# Who may ask.


def test_a_token_closes_the_api_and_opens_other_names() -> None:
    with serving(token="sesame") as caller:
        for given in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "sesame"},
            {"authorization": "Bearer "},
        ):
            answer = caller.get("/api/models", **given)
            assert answer.status == 401 and answer.headers["Www-Authenticate"] == "Bearer"
            assert caller.tag(png(), **given).status == 401
            assert caller.get("/api/sample", **given).status == 401
        known = {"authorization": "Bearer sesame"}
        assert caller.tag(png(), **known, host="gpu.example", origin="http://gpu.example").status == 200
        assert caller.get("/").status == 200 and caller.get("/healthz").status == 200
        caller.backend.fail("pets", "its folder /home/me/secret")
        assert "models" not in caller.get("/readyz").json
    assert caller.backend.closed


@pytest.mark.parametrize(
    ("host", "name", "status"),
    [
        ("127.0.0.1", "127.0.0.1", 200),
        ("127.0.0.1", "localhost:1234", 200),
        ("127.0.0.1", "me.localhost", 200),
        ("127.0.0.1", "[::1]:8080", 200),
        ("127.0.0.1", "box", 421),
        ("127.0.0.1", "10.0.0.1", 421),
        ("127.0.0.1", "127.0.0.1.evil.example", 421),
        ("127.0.0.1", "localhost.evil.example", 421),
        ("127.0.0.1", "named.example", 200),
        ("0.0.0.0", "10.0.0.1:8080", 200),
        ("0.0.0.0", "box", 200),
        ("0.0.0.0", "cliplet.default.svc.cluster.local", 200),
        ("0.0.0.0", "evil.example", 421),
    ],
)
def test_hosts(host: str, name: str, status: int) -> None:
    with serving(host=host, host_names=("named.example",)) as caller:
        assert caller.get("/healthz", host=name).status == status


def test_own_origin_may_post(two: Caller) -> None:
    own = f"127.0.0.1:{two.port}"
    answer = two.tag(png(), "?model=pets", origin=f"http://{own}", host=own, sec_fetch_site="same-origin")
    assert answer.status == 200 and "Access-Control-Allow-Origin" not in answer.headers


def test_a_taken_port_is_one_clear_error() -> None:
    with serving() as caller:
        with pytest.raises(
            EnvironmentError_, match=f"127.0.0.1:{caller.port}: address already in use"
        ) as told:
            with run_page(make_app(FakeBackend()), "127.0.0.1", caller.port):
                pass
    assert "--page-port" in told.value.fix


@pytest.mark.parametrize(
    ("host", "token", "url"),
    [("127.0.0.1", "", "http://127.0.0.1:{}/"), ("0.0.0.0", "sesame", "http://127.0.0.1:{}/#token=sesame")],
)
def test_addresses(host: str, token: str, url: str) -> None:
    with run_page(make_app(FakeBackend(), PageOptions(token=token)), host, 0) as page:
        assert page.url == url.format(page.port)


def test_the_watch_and_the_page_share_an_answer() -> None:
    """A check of the page that meets one of the server's own watch gets its answer, the reasons with it."""
    down = Health.down(["pets"], "it hangs")
    asked: list[float] = []

    class Watched:
        def health(self, max_age_s: float = 0.0) -> Health:
            asked.append(max_age_s)
            return down

    backend = TritonBackend(Watched())
    with run_page(make_app(backend), "127.0.0.1", 0) as page:
        answer = Caller(page.port, FakeBackend()).get("/readyz")
    assert answer.status == 503 and answer.json["models"]["pets"]["reason"] == "it hangs"
    assert asked == [1.0]


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"in_flight": 0}, {"queue": -1}])
def test_options_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        PageOptions(**options)


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def _all_of(client: socket.socket) -> bytes:
    text = b""
    try:
        while more := client.recv(65536):
            text += more
    except ConnectionError:
        pass
    return text
