"""Bundles: every engine compared with the original, and nothing kept unless all agree."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import Cli, picture
from PIL import Image

import cliplet
from cliplet import snippets
from cliplet.artifact import MODEL_FILE, TEXT_FILE, Bundle, BundleJob, cache_folder
from cliplet.cli import main
from cliplet.engine_sidecar import Profile
from cliplet.errors import ArtifactError, EnvironmentError_, ParityError, UsageError
from cliplet.export import bundle as building
from cliplet.export import parity, verification
from cliplet.export.bundle import BuildOptions, build_bundle, cached_bundle, engines_for
from cliplet.export.originals import Original
from cliplet.model_spec import parse_model_spec
from cliplet.runners import Runner
from cliplet.views import Aggregation
from cliplet.vocabulary import read_vocabulary

CLASSES = "cat,dog,bird"
FEW = BuildOptions(count=4, calibration_count=8)


def job(folder: Path, classes: str = CLASSES, *engines: tuple[str, str]) -> BundleJob:
    spec = parse_model_spec(f"open_clip:local-dir:{folder}")
    chosen = engines or (("onnx", "fp32"),)
    return BundleJob(spec, read_vocabulary(classes), Aggregation(), {}, chosen)


@pytest.fixture(scope="module")
def made(toy_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    engines = (("onnx", "fp32"), ("onnx", "fp16"), ("openvino", "fp32"))
    folder = tmp_path_factory.mktemp("made") / "bundle"
    return build_bundle(job(toy_clip, CLASSES, *engines), folder, replace(FEW, text=True))


def test_every_engine_is_compared_and_read_back(made: Bundle) -> None:
    assert [e.name for e in made.manifest.engines] == ["onnx-fp32", "onnx-fp16", "openvino-fp32"]
    # On an x86 CPU onnxruntime has no products in fp16: weights are, products are not.
    assert [e.precision_read for e in made.manifest.engines] == ["fp32", "fp16/fp32", "fp32"]
    for engine in made.manifest.engines:
        assert engine.parity["passed"]
        assert engine.parity["compared"] > 100
        assert engine.parity["images"] == 4
        assert engine.details["speed"]["views_per_s"] > 0
    sizes = {e.name: (made.folder / e.file).stat().st_size for e in made.manifest.engines}
    assert sizes["onnx-fp16"] < sizes["onnx-fp32"]


def test_the_graph_itself_names_its_classes(made: Bundle) -> None:
    for file in ("model.onnx", "model.fp16.onnx"):
        facts = {p.key: p.value for p in onnx.load(made.folder / file).metadata_props}
        assert json.loads(facts["cliplet.classes"]) == ["cat", "dog", "bird"]


@pytest.mark.parametrize(
    ("engine", "tolerance"),
    [(("onnx", "fp32"), 1e-4), (("onnx", "fp16"), 0.05), (("openvino", "fp32"), 1e-4)],
)
def test_each_engine_labels_as_the_original(
    made: Bundle, toy_clip: Path, engine: tuple[str, str], tolerance: float
) -> None:
    pictures = [picture(90, 60, 1), picture(64, 200, 2)]
    with cliplet.load(f"open_clip:local-dir:{toy_clip}", classes=CLASSES, runtime="torch") as tagger:
        wanted = [r.scores for r in tagger.label(pictures)]
    with cliplet.load(str(made.folder), runtime=engine[0], precision=engine[1]) as tagger:
        assert tagger.runner.precision.startswith(engine[1])
        found = [r.scores for r in tagger.label(pictures)]
    np.testing.assert_allclose(found, wanted, atol=tolerance)


def test_an_engine_that_is_not_there_is_not_replaced(made: Bundle) -> None:
    with pytest.raises(UsageError, match="holds no engine openvino-bf16") as caught:
        cliplet.load(str(made.folder), runtime="openvino", precision="bf16")
    assert "onnx-fp32, onnx-fp16, openvino-fp32" in str(caught.value)
    assert "--precision bf16" in caught.value.fix


def test_what_differs_is_not_kept(toy_clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    strict = {name: replace(t, largest=-1.0) for name, t in parity.TOLERANCES.items()}
    monkeypatch.setattr(parity, "TOLERANCES", strict)
    with pytest.raises(ParityError, match="differs from the eager float32 model") as caught:
        build_bundle(job(toy_clip), tmp_path / "bundle", FEW)
    assert caught.value.exit_code == 3
    assert "what would pass" in caught.value.expected
    assert list(tmp_path.iterdir()) == []


def test_nan_never_passes() -> None:
    found = parity.Agreement(
        compared=10, images=1, largest=float("nan"), mean=float("nan"), cosine=float("nan")
    )
    assert len(found.breaches(parity.TOLERANCES["int8"])) == 3
    assert parity.Agreement().breaches(parity.TOLERANCES["int8"]) == ["nothing was compared"]


@contextmanager
def no_antialiasing(_original: Original) -> Iterator[None]:
    whole = snippets.resize_weights

    def sharp(
        begin: torch.Tensor, end: torch.Tensor, pixels: int, size: int, filter_: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = ((end - begin) / size)[:, None, None]
        centres = begin[:, None, None] + (torch.arange(size)[:, None] + 0.5) * step
        kernel, _ = snippets.KERNELS[filter_]
        weights = kernel(torch.arange(pixels)[None] + 0.5 - centres)
        # All samples in one stretch that looks at all pixels.
        every = torch.arange(pixels).expand(len(begin), 1, pixels)
        return every, (weights / weights.sum(-1, keepdim=True)).unsqueeze(1)

    snippets.resize_weights = sharp
    try:
        yield
    finally:
        snippets.resize_weights = whole


@contextmanager
def scale_divided(original: Original) -> Iterator[None]:
    original.eager.scale = 1 / original.eager.scale
    try:
        yield
    finally:
        original.eager.scale = 1 / original.eager.scale


@contextmanager
def channels_swapped(original: Original) -> Iterator[None]:
    right = original.eager.pixels
    original.eager.pixels = lambda image, boxes: right(image.flip(-1), boxes)
    try:
        yield
    finally:
        original.eager.pixels = right


@pytest.mark.parametrize("broken", [no_antialiasing, scale_divided, channels_swapped])
def test_a_broken_graph_is_caught(
    broken: Callable[..., contextmanager[None]],  # type: ignore[type-arg]
    toy_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The three mistakes that exporters make most, each in an otherwise sound bundle."""
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path / "cache"))
    sound = building.trace
    built_from: list[Original] = []

    def remembered(original_job: BundleJob) -> Original:
        built_from.append(load(original_job))
        return built_from[-1]

    def breaking(*arguments: object) -> None:
        with broken(built_from[-1]):
            sound(*arguments)

    load = building.load_original
    monkeypatch.setattr(building, "load_original", remembered)
    monkeypatch.setattr(building, "trace", breaking)
    with pytest.raises(ParityError, match="differs from the eager"):
        build_bundle(job(toy_clip), tmp_path / "refused", FEW)
    assert not (tmp_path / "refused").exists()
    folder = tmp_path / "broken"
    build_bundle(job(toy_clip), folder, replace(FEW, keep_all=True))
    monkeypatch.undo()
    assert main(["verify", str(folder), "--count", "4"]) == 3


def test_verify_agrees_and_reproduces(made: Bundle, tmp_path: Path, cli: Cli) -> None:
    script = tmp_path / "again.py"
    done = cli("verify", made.folder, "--count", "4", "--reproduce", script)
    assert done.returncode == 0, done.stderr
    for engine in ("onnx-fp32", "onnx-fp16", "openvino-fp32"):
        (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [engine]]
        assert line.split()[-1] == "agrees"
    again = cli("verify", made.folder, "--count", "4", "--json")
    rows = {row["engine"]: row for row in json.loads(again.stdout)}
    assert rows["openvino-fp32"]["parity"]["passed"]
    assert rows["onnx-fp16"]["precision_read"] == "fp16/fp32"
    repeated = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, timeout=120
    )
    assert repeated.stdout.count("largest difference of view_probs") == 4
    assert rows[TEXT_FILE]["parity"]["passed"] and 0 < rows[TEXT_FILE]["parity"]["largest"] < 1e-4
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [TEXT_FILE]]
    assert line.split()[-1] == "agrees"


def test_verify_finds_a_text_tower_that_changed(made: Bundle, tmp_path: Path) -> None:
    folder = shutil.copytree(made.folder, tmp_path / "bundle")
    graph = onnx.load(folder / TEXT_FILE)
    weights = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    changed = onnx.numpy_helper.to_array(weights)[::-1].copy()
    weights.CopyFrom(onnx.numpy_helper.from_array(changed, weights.name))
    onnx.save(graph, folder / TEXT_FILE)
    rows = verification.verify(Bundle(folder, made.manifest), replace(FEW, count=1))
    assert [row.name for row in rows if not row.parity["passed"]] == [TEXT_FILE]
    with pytest.raises(ParityError, match="1 of 4 .*text.onnx: largest difference"):
        verification.hold(rows)


def test_a_reproduction_names_what_is_here_in_full(
    made: Bundle, toy_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = replace(FEW, images=("photos", "s3://bucket/photos", "more/*.jpg"))
    model = f"open_clip:local-dir:{os.path.relpath(toy_clip, tmp_path)}"
    engine = made.manifest.engines[0]
    verification.write_reproduction(tmp_path / "again.py", made, engine, options, model)
    script = (tmp_path / "again.py").read_text()
    assert repr((f"{tmp_path}/photos", "s3://bucket/photos", f"{tmp_path}/more/*.jpg")) in script
    assert f"MODEL = {f'open_clip:local-dir:{toy_clip}'!r}" in script


def test_a_profile_is_that_of_all_tensorrt_engines(made: Bundle) -> None:
    built = Profile(batch=(1, 16, 128), views=(2, 3, 4), canvas=(32, 64, 320))
    details = json.loads(json.dumps({"profile": asdict(built)}))
    engine = replace(made.manifest.engines[0], runtime="tensorrt_rtx", details=details)
    assert verification.common_profile([*made.manifest.engines, engine]) == built
    assert verification.common_profile(made.manifest.engines) == Profile()


def test_verify_wants_the_model_it_was_made_from(made: Bundle, toy_siglip: Path) -> None:
    lost = replace(made, manifest=replace(made.manifest, model="open_clip:local-dir:/nowhere"))
    with pytest.raises(ArtifactError, match="cannot be found") as caught:
        verification.verify(lost, FEW)
    assert caught.value.fix == "name the original with --model"
    with pytest.raises(ArtifactError, match="another hash"):
        verification.verify(made, FEW, f"open_clip:local-dir:{toy_siglip}")


def test_a_bundle_that_can_run_nowhere_here_has_not_passed(
    made: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(runtime: str, *_: object, **__: object) -> None:
        raise EnvironmentError_(f"no {runtime} here")

    monkeypatch.setattr(verification, "open_runner", lacking)
    with pytest.raises(ParityError, match="nothing was compared: onnx-fp32: no onnx here"):
        verification.verify(made, FEW)


def test_the_vocabulary_is_exchanged_without_the_original(
    made: Bundle, toy_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    names = "sheep,cow,horse,train,sofa"
    moved = shutil.copytree(made.folder, tmp_path / "bundle")
    manifest = json.loads((moved / "cliplet.json").read_text())
    (moved / "cliplet.json").write_text(json.dumps({**manifest, "model": "open_clip:local-dir:/nowhere"}))
    done = cli("export", moved, "--classes", names, "--out", tmp_path / "new", "--count", "4")
    assert done.returncode == 0, done.stderr
    with cliplet.load(f"open_clip:local-dir:{toy_clip}", classes=names, runtime="torch") as tagger:
        wanted = tagger.label([picture(90, 60)])[0].scores
    for runtime, precision in (("onnx", "fp32"), ("onnx", "fp16"), ("openvino", "fp32")):
        with cliplet.load(str(tmp_path / "new"), runtime=runtime, precision=precision) as tagger:
            assert tagger.classes == tuple(names.split(","))
            found = tagger.label([picture(90, 60)])[0].scores
        np.testing.assert_allclose(found, wanted, atol=1e-4 if precision == "fp32" else 0.05)


def test_without_a_text_tower_the_original_gives_the_new_rows(toy_clip: Path, tmp_path: Path) -> None:
    build_bundle(job(toy_clip), tmp_path / "old", FEW)
    assert not (tmp_path / "old" / TEXT_FILE).exists()
    out = tmp_path / "new"
    assert main(["export", str(tmp_path / "old"), "--classes", "a,b", "--out", str(out), "--count", "4"]) == 0
    assert Bundle.load(out).manifest.vocabulary.names == ("a", "b")


def test_a_folder_that_is_taken_is_kept(toy_clip: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    model = f"open_clip:local-dir:{toy_clip}"
    command = ["export", model, "--classes", CLASSES, "--out", str(tmp_path / "out"), "--count", "4"]
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 2, "only a bundle is overwritten"
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"


def test_a_bundle_is_replaced_by_a_whole_one_only(
    toy_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = [
        "export",
        f"open_clip:local-dir:{toy_clip}",
        "--out",
        str(out),
        "--count",
        "4",
        "--runtime",
        "onnx",
    ]
    assert main([*command, "--classes", CLASSES]) == 0
    assert main([*command, "--classes", "a,b"]) == 2
    with monkeypatch.context() as patched:
        patched.setitem(parity.TOLERANCES, "fp32", replace(parity.TOLERANCES["fp32"], largest=-1.0))
        assert main([*command, "--classes", "a,b", "--overwrite"]) == 3
    assert Bundle.load(out).manifest.vocabulary.names == ("cat", "dog", "bird")
    assert main([*command, "--classes", "a,b", "--overwrite"]) == 0
    assert Bundle.load(out).manifest.vocabulary.names == ("a", "b")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtime", "caffe"], "is not one of onnx"),
        (["--precision", "fp8"], "is not one of fp32"),
        (["--runtime", "onnx", "--precision", "bf16"], "nothing is built for"),
        (["--runtime", "tensorrt_rtx", "--precision", "int8"], "nothing is built for"),
        (["--batch", "4,1,32"], "batch"),
        (["--images", "nowhere"], "nowhere"),
        (["--runtime", "onnx", "--target", "sm89"], "--target without a TensorRT engine"),
        (
            ["--runtime", "onnx", "--batch", "8", "--views", "4"],
            "--batch and --views without a TensorRT engine",
        ),
        (["--runtime", "onnx", "--canvas", "640"], "--canvas without a TensorRT engine"),
        (["--runtime", "onnx", "--calibration", "/nonexistent"], "--calibration without an INT8 engine"),
        (["--runtime", "onnx", "--calibration-count", "128"], "--calibration-count without an INT8 engine"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    toy_clip: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    model = f"open_clip:local-dir:{toy_clip}"
    assert main(["export", model, "--classes", CLASSES, "--out", str(out), *options]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_engines_are_pairs_with_the_float32_graph_always() -> None:
    assert engines_for(("openvino",), ("bf16",)) == (("onnx", "fp32"), ("openvino", "bf16"))
    assert engines_for(("onnx", "openvino"), ("fp32", "int8")) == (
        ("onnx", "fp32"),
        ("onnx", "int8"),
        ("openvino", "fp32"),
        ("openvino", "int8"),
    )


def test_images_of_ones_own(toy_clip: Path, tmp_path: Path) -> None:
    for index in range(3):
        Image.fromarray(picture(80 + 30 * index, 120, index)).save(tmp_path / f"{index}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    bundle = build_bundle(job(toy_clip), tmp_path / "bundle", replace(FEW, images=(str(tmp_path),)))
    assert bundle.manifest.engines[0].parity["images"] == 3
    assert bundle.manifest.engines[0].parity["on"].startswith("3 of 4 images in ")


def test_a_bundle_comes_from_the_cache(toy_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_bundle(job(toy_clip))
    monkeypatch.setattr(building, "load_original", lambda *_: pytest.fail("loaded again"))
    assert cached_bundle(job(toy_clip)) == first
    assert cache_folder() in first.folder.parents


def test_another_vocabulary_is_not_traced_again(toy_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_bundle(job(toy_clip))
    monkeypatch.setattr(building, "trace", lambda *_: pytest.fail("traced again"))
    assert cached_bundle(job(toy_clip, "sheep,cow")).manifest.vocabulary.names == ("sheep", "cow")


def test_a_damaged_trace_is_made_again(
    toy_clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path))
    cached_bundle(job(toy_clip))
    (trace,) = (tmp_path / "graphs").glob("*/model.onnx")
    trace.write_bytes(trace.read_bytes()[:1000])
    cached_bundle(job(toy_clip, "sheep,cow"))
    assert trace.stat().st_size > 1000


def test_a_cache_that_cannot_be_written(
    toy_clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPLET_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentError_, match="CLIPLET_CACHE"):
        cached_bundle(job(toy_clip))


def test_int8_is_for_bundles_that_were_exported(toy_clip: Path) -> None:
    with pytest.raises(UsageError, match="which is no bundle") as caught:
        cliplet.load(f"open_clip:local-dir:{toy_clip}", classes=CLASSES, runtime="onnx", precision="int8")
    assert "cliplet export" in caught.value.fix


# Exports, and is killed where the graph is written and nothing was compared yet.
KILLED = """
import os, signal, sys
from cliplet.cli import main
from cliplet.export import bundle

bundle.open_gate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


def test_a_killed_export_leaves_no_bundle(toy_clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    words = ["export", f"open_clip:local-dir:{toy_clip}", "--classes", CLASSES, "--out", str(out)]
    words += ["--runtime", "onnx", "--count", "4"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(tmp_path.glob(".bundle-*/model.onnx")), "it was killed before it had written anything"
    assert not out.exists()
    assert main(words) == 0
    assert (out / MODEL_FILE).is_file()


def slow_if(precision: str) -> Callable[..., dict[str, float]]:
    """A stand-in for the stopwatch that finds engines of one precision slow."""

    def speed(_gate: parity.Gate, engine: Runner) -> dict[str, float]:
        rate = 50.0 if precision in engine.precision else 100.0
        return {"views_per_s": rate, "ms_per_batch": 1.0, "batch": 4, "views": 10}

    return speed


@pytest.mark.parametrize(("slow", "kept"), [("fp32", True), ("int8", False)])
def test_int8_is_kept_only_where_it_is_faster(
    toy_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, kept: bool
) -> None:
    monkeypatch.setattr(parity.Gate, "speed", slow_if(slow))
    loose = replace(parity.TOLERANCES["int8"], cosine=0.5, agreement=0.5)
    monkeypatch.setitem(parity.TOLERANCES, "int8", loose)
    wanted = job(toy_clip, CLASSES, ("onnx", "fp32"), ("openvino", "int8"))
    bundle = build_bundle(wanted, tmp_path / "bundle", FEW)
    names = [engine.name for engine in bundle.manifest.engines]
    assert names == ["onnx-fp32", *(["openvino-int8"] if kept else [])]
    assert ("openvino/model.int8.xml" in bundle.manifest.files) == kept
    assert "openvino/model.xml" not in bundle.manifest.files, "it was only what int8 was made from"
    if kept:
        engine = bundle.manifest.engines[1]
        assert engine.details["calibration_images"] == 8
        assert engine.details["speed"]["times_fp32"] == 2.0
    else:
        (dropped,) = bundle.manifest.dropped
        assert dropped["why"] == "not faster: 0.50 times fp32 of the same runtime"
        assert dropped["parity"]["passed"]


def test_int8_beyond_its_tolerance_is_dropped_with_the_reason(
    toy_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.TOLERANCES, "int8", replace(parity.TOLERANCES["int8"], mean=0.0))
    wanted = job(toy_clip, CLASSES, ("onnx", "fp32"), ("onnx", "int8"))
    bundle = build_bundle(wanted, tmp_path / "bundle", FEW)
    assert sorted(bundle.manifest.files) == ["model.onnx"]
    assert "mean difference" in bundle.manifest.dropped[0]["why"]
