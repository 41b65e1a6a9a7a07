"""What a server's answers mean: well, busy, or not well, told in time."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import Any

import numpy as np
import pytest
from running import within

from cliplet.deploy import health as health_module
from cliplet.deploy.health import Health, ModelHealth, Probe, check
from cliplet.deploy.triton_http import CallError, TritonHttp

# A machine may stand still for seconds. What is answered at once gets this deadline, in seconds; what hangs a short one.
PATIENT_S, SHORT_S = 20.0, 0.5
# How long what hangs does, and what must have come to its end before that.
HANGS_S, ENDS_S = 60, 30


class Triton(ThreadingHTTPServer):
    """Answers as Triton would, as the test wants it.

    Attributes:
        answer: status and error of inferences; None hangs.
        batches: computed so far; each look at them adds `progress`.
        slow_statistics: a look at them hangs.
        meeting: where inferences wait for each other before they are answered.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.answer: tuple[int, str] | None = (200, "")
        self.batches, self.progress = 7, 0
        self.slow_statistics = False
        self.meeting: threading.Barrier | None = None
        self.requests: list[tuple[dict[str, Any], bytes, dict[str, str]]] = []
        self.let_go = threading.Event()


class Answers(BaseHTTPRequestHandler):
    server: Triton

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        if self.path.endswith("/stats") and self.server.slow_statistics:
            self.server.let_go.wait(HANGS_S)
        elif self.path.endswith("/stats"):
            self.server.batches += self.server.progress
            self._say(200, {"model_stats": [{"execution_count": self.server.batches}]})
        elif self.path == "/v2":
            self._say(200, {"name": "it"})
        elif self.path.endswith("/ready"):
            self._say(200, None)
        else:
            self._say(404, {"error": f"nothing at {self.path}"})

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        size = int(self.headers["Inference-Header-Content-Length"])
        self.server.requests.append((json.loads(body[:size]), body[size:], dict(self.headers)))
        if self.server.answer is None:
            self.server.let_go.wait(HANGS_S)
            return
        if self.server.meeting is not None:
            self.server.meeting.wait(ENDS_S)
        status, error = self.server.answer
        self._say(status, {"error": error} if error else {"outputs": []})

    def _say(self, status: int, answer: object) -> None:
        data = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def triton() -> Iterator[Triton]:
    server = Triton()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.let_go.set()
    server.shutdown()
    thread.join()
    server.server_close()


def http_of(triton: Triton) -> TritonHttp:
    return TritonHttp("127.0.0.1", triton.server_address[1], {"authorization": "Bearer x"})


def probe(model: str = "pets", needs: str = "") -> Probe:
    feeds = {"image": np.array([[b"bytes"]], object), "boxes": np.ones((1, 2, 4), np.float32)}
    return Probe(model, lambda: feeds, ("scores",), needs)


def only(health: Health) -> ModelHealth:
    (found,) = health.models
    return found


@pytest.mark.parametrize(
    ("answer", "progress", "ok", "busy", "answered", "reason"),
    [
        ((200, ""), 0, True, False, True, ""),
        ((500, "Stub process 'pets_0' is not healthy."), 0, False, False, True, "is not healthy"),
        ((500, "Stub process 'pets_0' is not healthy."), 3, False, False, True, "is not healthy"),
        ((503, "Exceeds maximum queue size"), 1, True, True, True, "busy: Exceeds maximum queue size"),
        ((503, "Exceeds maximum queue size"), 0, False, False, False, "Exceeds maximum queue size"),
        ((504, "Request timeout expired"), 2, True, True, True, "busy: no answer within"),
        ((504, "Request timeout expired"), 0, False, False, False, "no answer within"),
        (None, 1, True, True, True, "busy: no answer within"),
        (None, 0, False, False, False, "no answer within"),
        ((400, "unexpected shape"), 5, False, False, True, "unexpected shape"),
    ],
)
def test_what_an_answer_means(
    answer: tuple[int, str] | None,
    progress: int,
    ok: bool,
    busy: bool,
    answered: bool,
    reason: str,
    triton: Triton,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton.answer, triton.progress = answer, progress
    deadline_s = PATIENT_S if answer else SHORT_S
    # The statistics are answered at once, even if the deadline is short.
    monkeypatch.setattr(health_module, "STATISTICS_SHARE", PATIENT_S / deadline_s)
    began = monotonic()
    health = check(http_of(triton), [probe()], deadline_s)
    found = only(health)
    assert (found.ok, found.busy, found.answered) == (ok, busy, answered)
    assert reason in found.reason and bool(reason) == bool(found.reason)
    assert health.ok == ok and set(health.reasons) == (set() if ok else {"pets"})
    assert monotonic() - began < ENDS_S


def test_slow_statistics_leave_time_for_the_inference(
    triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton.slow_statistics = True
    monkeypatch.setattr(health_module, "STATISTICS_SHARE", 0.01)
    assert check(http_of(triton), [probe()], PATIENT_S).ok


def test_an_inference_gets_its_time_even_if_the_statistics_took_all(
    triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton.slow_statistics, triton.answer = True, None
    monkeypatch.setattr(health_module, "STATISTICS_SHARE", 2.0)
    assert only(check(http_of(triton), [probe()], SHORT_S)).reason == "no answer within the deadline of 0.5 s"
    assert within(ENDS_S, lambda: triton.requests), "it may arrive after it was given up"
    ((head, _, _),) = triton.requests
    assert head["parameters"]["timeout"] == health_module.LEAST_SHARE * SHORT_S * 1_000_000


def test_models_are_tried_at_the_same_time(triton: Triton) -> None:
    triton.meeting = threading.Barrier(6)
    assert check(http_of(triton), [probe(f"m{i}") for i in range(6)], PATIENT_S).ok


def test_the_request_is_what_triton_reads(triton: Triton) -> None:
    assert check(http_of(triton), [probe()], PATIENT_S).ok
    ((head, blob, headers),) = triton.requests
    image, boxes = head["inputs"]
    assert (image["name"], image["datatype"], image["shape"]) == ("image", "BYTES", [1, 1])
    assert (boxes["datatype"], boxes["shape"]) == ("FP32", [1, 2, 4])
    size = image["parameters"]["binary_data_size"]
    assert blob[:size] == struct.pack("<I", 5) + b"bytes"
    assert np.array_equal(np.frombuffer(blob[size:], np.float32), np.ones(8))
    assert head["parameters"]["priority"] == 1 and 0 < head["parameters"]["timeout"] <= PATIENT_S * 1e6
    assert [row["name"] for row in head["outputs"]] == ["scores"]
    assert {k.lower(): v for k, v in headers.items()}["authorization"] == "Bearer x"


def test_what_is_known_to_fail_is_not_asked(triton: Triton) -> None:
    probes = [probe("pets", "pets_snippets"), probe("pets_snippets"), probe("other")]
    health = check(http_of(triton), probes, PATIENT_S, {"pets_snippets": "its process 5 is stopped"})
    assert health.reasons == {
        "pets": "it needs pets_snippets: its process 5 is stopped",
        "pets_snippets": "its process 5 is stopped",
    }
    assert len(triton.requests) == 1


def test_nothing_to_try_is_not_well(triton: Triton) -> None:
    assert not check(http_of(triton), [], 1.0).ok
    assert not Health.down(["pets"], "the server does not run").ok


def test_a_model_of_others_is_only_asked_whether_it_is_loaded(triton: Triton) -> None:
    assert check(http_of(triton), [Probe("other")], PATIENT_S).ok
    assert triton.requests == []


def test_no_server_at_all() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as gone:
        port = gone.server_address[1]
    server = TritonHttp("127.0.0.1", port)
    assert "Connection refused" in only(check(server, [probe()], PATIENT_S)).reason
    assert server.name() is None
    with pytest.raises(CallError) as caught:
        server.index()
    assert caught.value.status == 0
