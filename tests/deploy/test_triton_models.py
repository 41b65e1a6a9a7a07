"""The models in a real server: the same answers as without one, over both protocols."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from helpers import picture
from PIL import Image
from running import quick, repository_of
from served import STUDENT_CLASSES, make_student, make_teacher
from tritonclient.utils import InferenceServerException

import cliplet
from cliplet.deploy.repository_check import check_repository
from cliplet.deploy.server import TritonServer
from cliplet.labels import LabelRecord
from cliplet.serving import CARD_KEY, ImageRecord, ModelCard, parse_image_problem
from cliplet.triton_program import server_folder
from cliplet.views import Views, place_on_canvas

pytestmark = pytest.mark.skipif(not server_folder().is_dir(), reason="the embedded server is not installed")
# Requests at the same time: enough that some have to share a batch.
CLIENTS = 12
PROTOCOLS = ["grpc", "http"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {"teacher": make_teacher(folder / "teacher"), "student": make_student(folder / "student")}


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = repository_of(tmp_path_factory.mktemp("served") / "repository", **bundles)
    assert check_repository(folder, backends={"python"}) == []
    with TritonServer(folder, quick()) as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    found = []
    for seed in range(24):
        file = io.BytesIO()
        size = (40 + 37 * seed % 900, 50 + 53 * seed % 700)
        Image.fromarray(picture(*size, seed)).save(file, "JPEG" if seed % 2 else "PNG")
        found.append(file.getvalue())
    return found


def local(bundle: Path, images: list[bytes], folder: Path) -> list[LabelRecord]:
    """What the bundle gives without a server."""
    files = [folder / str(number) for number in range(len(images))]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(image)
    with cliplet.load(str(bundle), runtime="onnx", threads=1) as tagger:
        return tagger.label(files)


def ask(
    server: TritonServer, protocol: str, model: str, feeds: dict[str, np.ndarray], *outputs: str, **more: Any
) -> Any:
    """The answer of one request; `more` are arguments of the outputs."""
    library = {"grpc": tritonclient.grpc, "http": tritonclient.http}[protocol]
    inputs = []
    for name, array in feeds.items():
        kind = {"O": "BYTES", "u": "UINT8", "f": "FP32", "i": "INT64"}[array.dtype.kind]
        inputs.append(library.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    wanted = [library.InferRequestedOutput(name, **more) for name in outputs]
    with library.InferenceServerClient(f"127.0.0.1:{getattr(server.ports, protocol)}") as client:
        return client.infer(model, inputs, outputs=wanted or None)


def encoded(*images: bytes) -> dict[str, np.ndarray]:
    return {"image": np.array([[image] for image in images], object)}


def batches(server: TritonServer, model: str) -> dict[int, int]:
    """How many batches of each size a model has run."""
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.ports.http}") as client:
        (found,) = client.get_inference_statistics(model)["model_stats"]
    return {row["batch_size"]: row["compute_infer"]["count"] for row in found["batch_stats"]}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_labels_equal_those_of_the_bundle(
    server: TritonServer,
    bundles: dict[str, Path],
    images: list[bytes],
    name: str,
    protocol: str,
    tmp_path: Path,
) -> None:
    """Images of all sizes at once: what shares a batch is chance, what is found is not."""
    before = batches(server, name)
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(
            clients.map(lambda i: ask(server, protocol, name, encoded(i), "record", "scores"), images)
        )
    for answer, wanted in zip(answers, local(bundles[name], images, tmp_path), strict=True):
        record = ImageRecord.from_json(answer.as_numpy("record")[0, 0])
        np.testing.assert_allclose(answer.as_numpy("scores")[0], wanted.scores, atol=1e-5)
        assert (record.width, record.height) == (wanted.width, wanted.height)
        assert tuple(label["name"] for label in record.labels) == wanted.labels
    shared = {size: n - before.get(size, 0) for size, n in batches(server, name).items()}
    assert any(n for size, n in shared.items() if size > 1), shared


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_more_is_given_to_those_who_ask(server: TritonServer, images: list[bytes], protocol: str) -> None:
    probs = ask(server, protocol, "teacher", encoded(*images[:2]), "view_probs").as_numpy("view_probs")
    assert probs.shape == (2, 10, 20)
    np.testing.assert_allclose(probs.sum(axis=-1), 1, atol=1e-4)
    assert ask(server, protocol, "student", encoded(images[0]), "cam").as_numpy("cam").shape == (1, 4, 2, 2)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_classification_extension_knows_the_names(
    server: TritonServer, images: list[bytes], protocol: str
) -> None:
    best = ask(server, protocol, "student", encoded(images[0]), "scores", class_count=3)
    rows = [row.decode().split(":") for row in best.as_numpy("scores")[0]]
    assert len(rows) == 3
    assert all(STUDENT_CLASSES[int(number)] == name for _, number, name in rows)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("image", "reason"), [(b"", "zero bytes"), (b"\x00junk", "not an image"), (b"\xff\xd8\xff\xe0", "JPEG")]
)
def test_a_bad_image_is_an_error_of_its_own_request(
    server: TritonServer, images: list[bytes], protocol: str, image: bytes, reason: str
) -> None:
    def answered(data: bytes) -> Any:
        try:
            return ask(server, protocol, "student", encoded(data), "scores").as_numpy("scores")[0]
        except InferenceServerException as error:
            return error

    mixed = [good for pair in zip(images[:8], [image] * 8, strict=True) for good in pair]
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(answered, mixed))
    assert all(isinstance(a, np.ndarray) for a in answers[::2])
    for error in answers[1::2]:
        assert error.status() in ("400", "StatusCode.INVALID_ARGUMENT")
        stage, why = parse_image_problem(error.message()) or ("", "")
        assert stage == "decode" and reason in why


def test_the_raw_graph_and_the_text_tower_answer(server: TritonServer, bundles: dict[str, Path]) -> None:
    with cliplet.load(str(bundles["teacher"]), runtime="onnx", threads=1) as tagger:
        feeds = place_on_canvas(
            [picture(90, 80), picture(64, 100)], Views.parse("1+2x2"), tagger.preprocessing
        )
        wanted = tagger.runner.infer(feeds)
    found = ask(server, "grpc", "teacher_snippets", feeds)
    for name, array in wanted.items():
        np.testing.assert_allclose(found.as_numpy(name), array, atol=1e-5)
    text = ask(server, "http", "teacher_text", {"tokens": np.ones((3, 16), np.int64)}).as_numpy("text")
    assert text.shape == (3, 128) and np.isfinite(text).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"image": np.zeros((1, 1), np.float32)}, "BYTES"),
        ({"image": np.array([[b"x", b"y"]], object)}, "shape"),
        ({"image": np.array([[b"x"]] * 99, object)}, "batch-size must be <= 32"),
        ({"picture": np.array([[b"x"]], object)}, "picture"),
    ],
)
def test_what_is_no_request_for_a_tagger(
    server: TritonServer, protocol: str, feeds: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message):
        ask(server, protocol, "student", feeds)


def test_the_card_can_be_asked_for(server: TritonServer, bundles: dict[str, Path]) -> None:
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.ports.http}") as client:
        text = client.get_model_config("student")["parameters"][CARD_KEY]["string_value"]
    card = ModelCard.from_json(text, "the server")
    assert card.manifest.vocabulary.names == STUDENT_CLASSES
    assert (card.runtime, card.precision, card.device) == ("onnx", "fp32", "cpu")
