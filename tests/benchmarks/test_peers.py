"""cliplet beside its peers: rows are what was measured, who cannot run is told, and the contenders do the same work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import picture
from PIL import Image

from benchmarks import peers, peers_clip_retrieval, peers_workers
from benchmarks.chapters.peers import chapter
from benchmarks.models import CLASSES, gflop_per_view
from benchmarks.peers import LOADER, LOOP, RETRIEVAL, RETRIEVAL_SCRIPT, table, turns
from benchmarks.watched import MeasurementError, watched
from cliplet.model_spec import parse_model_spec
from cliplet.views import Views

ONNX, BF16 = "cliplet onnx fp32", "cliplet openvino bf16"
REPOSITORY = Path(__file__).parent.parent.parent
QUICK_LIMITS = {"by": "a test", "gop_per_s": {"fp32": 200.0, "bf16": 400.0}, "gb_per_s": 10.0, "notes": []}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        Image.fromarray(picture(60 + 10 * number, 50, seed=number)).save(folder / f"{number}.jpg")
    return folder


@pytest.fixture
def toy(toy_clip: Path) -> str:
    return f"open_clip:local-dir:{toy_clip}"


def measured(rate: float, peak_mb: float = 100.0, disturbed: bool = False) -> dict[str, Any]:
    return {
        "images_per_s": rate,
        "peak_mb": peak_mb,
        "disturbed": disturbed,
        "images": 9,
        "precision": "fp32",
    }


def made_rows() -> dict[str, Any]:
    runs = {
        LOOP: [measured(2.0), measured(4.0)],
        LOADER: [measured(3.0, disturbed=True), measured(3.0)],
        ONNX: [measured(4.0), measured(4.0)],
        BF16: [measured(10.0, 300.0), measured(8.0, 500.0)],
    }
    facts = {
        ONNX: {"precision": "fp32", "parity": {"passed": True}},
        BF16: {"precision": "bf16/fp32", "parity": {"passed": True}},
    }
    return table(runs, facts, 10, 2.0, {"fp32": 100.0, "bf16": 400.0})


def made_record(**changed: Any) -> dict[str, Any]:
    rows = {"1+3x3": made_rows()}
    return {"gflop_per_view": 2.0, "rows": rows, "skipped": {RETRIEVAL: "it is not installed"}, **changed}


def test_rows_are_held_against_the_loop_of_the_same_round_and_the_peak_of_the_precision_that_was_read() -> (
    None
):
    rows = made_rows()
    assert rows[LOADER]["ratio_to_loop"]["all"] == [1.5, 0.75]
    assert rows[BF16]["ratio_to_loop"]["all"] == [5.0, 2.0]
    # 10 views of 2 GFLOP each, 9 times a second, of 100 in fp32: `bf16/fp32` multiplies in fp32.
    assert rows[BF16]["share_of_peak"] == pytest.approx(1.8)
    assert rows[LOOP]["share_of_peak"] == pytest.approx(0.6)
    assert rows[BF16]["views_per_s"]["median"] == 90.0
    assert rows[BF16]["peak_mb"]["max"] == 500.0
    assert (rows[LOADER]["disturbed_rounds"], rows[LOOP]["disturbed_rounds"]) == (1, 0)


def test_the_chapter_tells_the_fastest_by_the_records_own_numbers() -> None:
    told = chapter(made_record())
    assert f"| {BF16} | 9.00 | 8.00 to 10.00 | 90.0 | **3.50** |" in told
    assert f"{BF16} is the fastest, 3.50 times (2.00 to 5.00) the loop and 3.50 times the best" in told
    # The loop and the loader both do 3 images a second; the first of them is named.
    assert f"not cliplet's ({LOOP})" in told
    assert f"In fp32, as the loop computes, {ONNX} does 1.50 times (1.00 to 2.00) the loop." in told
    assert "That is 80% of the peak: nothing in fp32 can be more than 1.25 times as fast." in told
    assert f"- {RETRIEVAL}: not measured, it is not installed" in told
    assert f"other processes disturbed {LOADER}" in told


def test_the_chapter_says_so_where_nothing_beats_the_loop_and_where_no_peak_is_known() -> None:
    rows = made_rows()
    slow = {LOOP: rows[LOOP], LOADER: rows[LOADER] | {"share_of_peak": None}}
    told = chapter(made_record(rows={"1": slow}, skipped={}))
    assert f"nothing is faster than the {LOOP}. That is 60% of the peak" in told
    assert "not measured" not in told
    fast = {LOOP: rows[LOOP], BF16: rows[BF16] | {"share_of_peak": None}}
    assert "of the peak: nothing" not in chapter(made_record(rows={"1": fast}))


class Fake:
    """Measures nothing; some contenders fail."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.asked = failing, list[str]()

    def measure(self, contender: str, views: str, images: Path) -> dict[str, Any]:
        self.asked.append(contender)
        if contender == self.failing:
            raise MeasurementError("it broke")
        return measured(1.0)


def taken(fake: Fake, views: str = "1") -> tuple[dict[str, Any], dict[str, str]]:
    return turns(fake, [LOOP, RETRIEVAL, ONNX], Path("images"), views, 2)  # type: ignore[arg-type]


def test_contenders_take_turns_forwards_and_backwards() -> None:
    fake = Fake()
    runs, failed = taken(fake)
    assert fake.asked == [LOOP, RETRIEVAL, ONNX, ONNX, RETRIEVAL, LOOP]
    assert {len(found) for found in runs.values()} == {2}
    assert not failed


def test_a_contender_that_fails_is_left_out_with_its_reason_and_not_asked_again() -> None:
    fake = Fake(RETRIEVAL)
    runs, failed = taken(fake)
    assert failed == {RETRIEVAL: "it broke"}
    assert list(runs) == [LOOP, ONNX]
    assert fake.asked.count(RETRIEVAL) == 1


def test_without_the_loop_there_is_no_comparison() -> None:
    with pytest.raises(MeasurementError, match="it broke"):
        taken(Fake(LOOP))


def test_a_contender_for_whole_images_is_not_asked_for_more_views() -> None:
    assert RETRIEVAL not in taken(Fake(), "1+2x2")[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--contenders", "open_clip loop,another"],
        ["--contenders", "cliplet onnx fp32"],
        ["--clip-retrieval-python", "/nowhere/python"],
        ["--photos", "/nowhere"],
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_measured(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        peers.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_views_of_the_peers_are_the_image_and_its_cells(tmp_path: Path) -> None:
    pixels = picture(60, 40)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    whole, *cells = map(np.asarray, peers_workers.cut(tmp_path / "a.png", Views.parse("1+2x2")))
    assert np.array_equal(whole, pixels)
    halves = [np.concatenate(cells[i : i + 2], axis=1) for i in (0, 2)]
    assert np.array_equal(np.concatenate(halves), pixels)


@pytest.mark.parametrize("views", ["1", "1+2x2"])
def test_loop_and_loader_score_every_image(images: Path, toy: str, views: str) -> None:
    task = {"model": toy, "images": str(images), "views": views}
    for found in (peers_workers.time_loop(task), peers_workers.time_loader(task)):
        assert (found["images"], found["precision"]) == (5, "fp32")
        assert found["seconds"] > 0


def test_the_peers_scores_are_probabilities_of_the_classes(images: Path, toy: str) -> None:
    import torch

    clip = peers_workers.OpenClip.load(toy)
    paths = sorted(images.iterdir())
    with torch.inference_mode():
        scores = clip.score(peers_workers.Cut(paths, Views.parse("1+2x2"), clip.transform)[0])
    assert scores.shape == (5, len(CLASSES.split(",")))
    assert scores.sum(axis=1) == pytest.approx(1.0)


def test_the_arithmetic_of_a_tower_is_that_of_its_weights(toy: str) -> None:
    """A ViT multiplies every token with every weight of its blocks, and tokens with each other: a few percent."""
    import open_clip

    spec = parse_model_spec(toy)
    visual = open_clip.create_model(spec.open_clip_name).visual
    tokens = visual.positional_embedding.shape[0]
    weights = sum(p.numel() for p in visual.transformer.parameters() if p.ndim == 2)
    assert 1.0 < gflop_per_view(spec) / (2 * tokens * weights / 1e9) < 1.3


# In a process of its own, as it is run: what is measured starts many others.
RUN = """
import sys
from pathlib import Path
from benchmarks import peers, records

records.RESULTS = Path(sys.argv[1])
peers.machine_limits = lambda precisions: {limits!r}
peers.Setting.gflop_per_view = lambda self: 0.5
sys.exit(peers.main(sys.argv[2:]))
"""


def test_a_run_writes_a_record_that_the_chapter_tells(images: Path, toy: str, tmp_path: Path) -> None:
    arguments = ["--model", toy, "--photos", str(images), "--photos-are", "5 pictures", "--rounds", "1"]
    contenders = ",".join([LOOP, RETRIEVAL, ONNX])
    arguments += ["--limit", "3", "--views", "1", "--contenders", contenders]
    command = [sys.executable, "-c", RUN.format(limits=QUICK_LIMITS), str(tmp_path), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert record["name"].startswith("peers_toy")
    rows = record["rows"]["1"]
    assert list(rows) == [LOOP, ONNX]
    assert {row["images"] for row in rows.values()} == {3}
    assert rows[ONNX]["parity"]["passed"]
    assert rows[LOOP]["share_of_peak"] == pytest.approx(rows[LOOP]["views_per_s"]["median"] * 0.5 / 200.0)
    assert rows[LOOP]["peak_mb"]["median"] > rows[ONNX]["peak_mb"]["median"] > 10
    assert record["skipped"] == {RETRIEVAL: "it takes an architecture with a file of weights, and no folder"}
    assert f"| {ONNX} |" in chapter(record)


def test_memory_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.watched.RESTS", 0)
    child = "import time; held = b'1' * 150_000_000; time.sleep(5)"
    program = (
        "import subprocess, sys; held = b'1' * 150_000_000; "
        f"subprocess.run([sys.executable, '-c', {child!r}]); print('{{}}')"
    )
    alone = watched([sys.executable, "-c", "import time; time.sleep(0.5); print('{}')"])
    assert alone.peak_bytes < 100e6
    assert watched([sys.executable, "-c", program]).peak_bytes > 300e6


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ValueError('no such model')", "ValueError: no such model"),
        ("print('done')", "exit code 0, and no word why"),
        ("raise SystemExit(3)", "exit code 3, and no word why"),
    ],
)
def test_a_measurement_without_a_result_gives_its_reason(program: str, reason: str) -> None:
    with pytest.raises(MeasurementError, match=reason):
        watched([sys.executable, "-c", program])


def test_an_interpreter_without_clip_retrieval_says_so() -> None:
    command = [sys.executable, "-S", str(RETRIEVAL_SCRIPT), "{}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {"why": "clip-retrieval is not installed"}


def test_clip_retrievals_own_parts_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of its Runner, by stand-ins of its parts; the model has to come from one loading."""
    loaded: list[dict[str, Any]] = []

    class Model:
        def parameters(self) -> Iterator[SimpleNamespace]:
            yield SimpleNamespace(dtype="torch.float32")

    def load_clip(**settings: Any) -> tuple[Model, str, str]:
        loaded.append(settings)
        return Model(), "transform", "tokenizer"

    class Runner:
        def __init__(self, **builders: Any) -> None:
            self.builders = builders

        def __call__(self, number: int) -> None:
            reader = self.builders["reader_builder"]("sampler")
            writer, mapper = self.builders["writer_builder"](number), self.builders["mapper_builder"]()
            logger = self.builders["logger_builder"](number)
            logger.start()
            for size in reader:
                logger({"sample_count": size})
            logger.end()
            assert (mapper["clip_model"], writer["enable_text"]) == ("open_clip:A/w.safetensors", False)
            # Its loader caches by the order of arguments too.
            assert list(loaded[0]) == [name for name in mapper if name in loaded[0]]

    def files_reader(*arguments: Any, **images: Any) -> list[int]:
        assert arguments == ("sampler", "transform", "tokenizer", "folder", 32, 2)
        return [32, 8]

    def numpy_writer(number: int, out: str, **settings: Any) -> dict[str, Any]:
        return settings

    for name, parts in {
        "all_clip": {"load_clip": load_clip},
        "clip_retrieval.clip_inference.reader": {"FilesReader": files_reader},
        "clip_retrieval.clip_inference.mapper": {"ClipMapper": lambda **settings: settings},
        "clip_retrieval.clip_inference.writer": {"NumpyWriter": numpy_writer},
        "clip_retrieval.clip_inference.runner": {"Runner": Runner},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    found = peers_clip_retrieval.measure("folder", "open_clip:A/w.safetensors", 32, 2)
    assert (found["images"], found["precision"]) == (40, "fp32")
