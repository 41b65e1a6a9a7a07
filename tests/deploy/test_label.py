"""`cliplet label` through its public doors: every input ends in one row or one error, whatever happens."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Cli, picture
from PIL import Image

import cliplet
from cliplet.deploy import label as labelling
from cliplet.errors import ClipletError, EnvironmentError_, ServerError, UsageError
from cliplet.labels import LabelStore, read_errors, read_labels, read_run
from cliplet.plan import TaggerSettings, usable_runtimes
from cliplet.tagger import Tagger
from cliplet.triton_errors import DeadlineExpired, ModelFailed

CLASSES = "cat,dog,bird,person"


@pytest.fixture(scope="session")
def model(toy_clip: Path) -> str:
    return f"open_clip:local-dir:{toy_clip}"


@pytest.fixture
def options(model: str, tmp_path: Path) -> list[str]:
    return [
        "--model",
        model,
        "--classes",
        CLASSES,
        "--views",
        "1+2x2",
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]


def job(model: str, source: Path, out: Path, runtime: str = "auto", **fields: Any) -> labelling.LabelJob:
    settings = TaggerSettings(model=model, classes=CLASSES, views="1+2x2", runtime=runtime)
    return labelling.LabelJob(sources=(str(source),), out=out, tagger=settings, quiet=True, **fields)


def rows(out: Path) -> dict[str, tuple[object, ...]]:
    """All rows by path, without the column that holds a time; a path that has two is an error."""
    found: dict[str, tuple[object, ...]] = {}
    for r in read_labels(out):
        assert r.path not in found
        found[r.path] = (r.width, r.height, r.labels, r.scores.tobytes(), r.model)
    return found


def test_every_photo_gets_one_row(cli: Cli, photos: Path, options: list[str], tmp_path: Path) -> None:
    done = cli("label", photos, *options[:-1])
    assert done.returncode == 0, done.stderr
    assert "24 of 24 inputs labelled, 0 failed" in done.stdout
    assert f"next: cliplet gallery {tmp_path / 'out'}" in done.stdout
    found = list(read_labels(tmp_path / "out"))
    assert sorted(r.path for r in found) == sorted(str(p) for p in photos.rglob("*.jpg"))
    with Image.open(found[0].path) as image:
        assert (found[0].width, found[0].height) == image.size
    assert all(r.scores.shape == (4,) for r in found)
    run = read_run(tmp_path / "out")
    assert run["classes"] == CLASSES.split(",")
    threshold = run["thresholds"][0]
    for r in found:
        over = {c: s for c, s in zip(run["classes"], r.scores, strict=True) if s >= threshold}
        assert list(r.labels) == sorted(over, key=lambda c: -over[c])


def test_the_api_gives_the_same_scores(model: str, photos: Path, tmp_path: Path) -> None:
    labelling.label(job(model, photos, tmp_path / "out", batch_size=1))
    with cliplet.load(model, classes=CLASSES, views="1+2x2") as tagger:
        for path, row in list(rows(tmp_path / "out").items())[:5]:
            (record,) = tagger.label([path])
            assert (record.width, record.height, record.labels, record.scores.tobytes(), record.model) == row


def test_streams_that_cannot_be_had_are_refused(model: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--streams 2, but torch .* takes 1"):
        labelling.label(job(model, photos, tmp_path / "out", "torch", streams=2))
    with pytest.raises(UsageError, match="--streams 2 with --ray"):
        job(model, photos, tmp_path / "out", streams=2, ray="local")


def test_options_without_the_one_that_they_are_for_are_refused(
    cli: Cli, model: str, photos: Path, options: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--ray-workers 4 without --ray") as caught:
        job(model, photos, tmp_path / "out", ray_workers=4)
    assert caught.value.fix == "--ray local --ray-workers 4"
    for given, fix in (([], "--write xmp"), (["--write", "csv"], "--write csv,xmp")):
        for style in ("full", "basename"):
            done = cli("label", photos, *options, *given, "--xmp-style", style)
            assert done.returncode == 2
            assert f"--xmp-style {style} without --write xmp" in done.stderr
            assert f"fix: {fix} --xmp-style {style}" in done.stderr
    assert not (tmp_path / "out").exists()
    done = cli("label", photos, *options, "--dry-run", "--write", "xmp", "--xmp-style", "full")
    assert done.returncode == 0, done.stderr


def test_a_part_holds_no_more_scores_than_fit(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelling, "PART_SCORES", 8 * len(CLASSES.split(",")))
    labelling.label(job(model, photos, tmp_path / "out", batch_size=4))
    assert len(list((tmp_path / "out" / "labels").glob("part-*.parquet"))) == 3
    assert len(rows(tmp_path / "out")) == 24


@pytest.mark.parametrize("runtime", usable_runtimes("cpu"))
def test_streams_change_no_score(model: str, photos: Path, tmp_path: Path, runtime: str) -> None:
    for streams in (1, 2):
        labelling.label(
            job(model, photos, tmp_path / str(streams), runtime, batch_size=3, workers=2, streams=streams)
        )
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert list(one) == list(two), "rows come in the order of the inputs"
    for path, row in one.items():
        scores, others = (np.frombuffer(r[3], np.float32) for r in (row, two[path]))
        np.testing.assert_allclose(scores, others, atol=1e-6)
        assert row[:3] == two[path][:3]


def test_both_runtimes_agree(model: str, photos: Path, tmp_path: Path) -> None:
    labelling.label(job(model, photos, tmp_path / "onnx"))
    eager = TaggerSettings(model=model, classes=CLASSES, views="1+2x2", runtime="torch")
    labelling.label(
        labelling.LabelJob(sources=(str(photos),), out=tmp_path / "torch", tagger=eager, quiet=True)
    )
    onnx, torch = ({r.path: r.scores for r in read_labels(tmp_path / name)} for name in ("onnx", "torch"))
    assert onnx.keys() == torch.keys()
    for path, scores in onnx.items():
        np.testing.assert_allclose(scores, torch[path], atol=1e-4)


# --- inputs that are no pictures ---------------------------------------------------------------------------


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder with everything that people's folders hold."""
    folder = tmp_path / "zoo ü"
    folder.mkdir()
    good = Image.fromarray(picture(120, 90))
    good.save(folder / "good.jpg")
    data = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("I am no image")
    Image.new("RGB", (1, 1), "red").save(folder / "one pixel.png")
    Image.new("RGB", (30_000, 20), "blue").save(folder / "long.jpg")
    good.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20).save(folder / "16bit.png")
    palette = good.convert("RGBA")
    palette.putalpha(Image.linear_gradient("L").resize((120, 90)))
    palette.quantize(32).save(folder / "palette alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    good.save(folder / "rotated.jpg", exif=exif)
    good.save(folder / "gif.jpg", format="GIF")
    good.save(folder / "Ünïcode and spaces 猫.jpg")
    header = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(header, "PNG")
    (folder / "bomb.png").write_bytes(header.getvalue())
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "notes.txt").write_text("not listed")
    (folder / os.fsdecode(b"latin-\xe9.jpg")).write_bytes(data)
    return folder


BAD = {
    "truncated.jpg": ("decode", "truncated"),
    "zero.jpg": ("decode", "zero bytes"),
    "text.jpg": ("decode", "text"),
    "bomb.png": ("decode", "bomb"),
    "dangling.jpg": ("read", "No such file"),
}


def test_every_input_ends_in_one_table(cli: Cli, zoo: Path, options: list[str], tmp_path: Path) -> None:
    done = cli("label", zoo, *options)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    errors = {Path(e.path).name: (e.stage, e.reason) for e in read_errors(tmp_path / "out")}
    assert errors.keys() == BAD.keys()
    for name, (stage, word) in BAD.items():
        assert errors[name][0] == stage
        assert word in errors[name][1], errors[name]
    found = {Path(r.path).name: r for r in read_labels(tmp_path / "out")}
    inputs = {p.name for p in zoo.iterdir()} - {"notes.txt", os.fsdecode(b"latin-\xe9.jpg")} | {
        "latin-\\xe9.jpg"
    }
    assert found.keys() | errors.keys() == inputs
    assert (found["rotated.jpg"].width, found["rotated.jpg"].height) == (90, 120)
    assert (found["long.jpg"].width, found["long.jpg"].height) == (30_000, 20)
    assert all(np.isfinite(r.scores).all() for r in found.values())


def test_failed_inputs_are_tried_again_when_asked(
    cli: Cli, zoo: Path, options: list[str], tmp_path: Path
) -> None:
    assert cli("label", zoo, *options).returncode == 0
    (zoo / "zero.jpg").write_bytes((zoo / "good.jpg").read_bytes())
    before = rows(tmp_path / "out")
    assert cli("label", zoo, *options).returncode == 0
    assert rows(tmp_path / "out") == before
    assert cli("label", zoo, *options, "--retry-failed").returncode == 0
    assert rows(tmp_path / "out").keys() - before.keys() == {str(zoo / "zero.jpg")}
    assert {Path(e.path).name for e in read_errors(tmp_path / "out")} == BAD.keys() - {"zero.jpg"}


def test_too_many_failures_end_with_their_own_exit_code(
    cli: Cli, zoo: Path, options: list[str], tmp_path: Path
) -> None:
    done = cli("label", zoo, *options, "--max-error-rate", 0.1)
    assert done.returncode == 4
    assert "at most 10.0%" in done.stderr
    assert "--retry-failed" in done.stderr
    assert len(rows(tmp_path / "out")) == 10
    assert cli("label", zoo, *options, "--max-error-rate", 0.5).returncode == 0


def test_nothing_but_failures_is_an_error(cli: Cli, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    done = cli("label", tmp_path / "bad", *options, "--json")
    assert done.returncode == 1
    assert "none of 1 inputs could be labelled" in done.stderr
    assert json.loads(done.stdout)["result"]["failed"] == 1
    assert len(read_errors(tmp_path / "out")) == 1


def test_more_pixels_are_allowed_when_asked(model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (400, 300)).save(tmp_path / "in" / "a.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "in" / "b.png")
    result = labelling.label(job(model, tmp_path / "in", tmp_path / "out", max_pixels=50_000))
    assert (result.labelled, result.failed) == (1, 1)
    again = job(model, tmp_path / "in", tmp_path / "out", max_pixels=200_000, retry_failed=True)
    assert labelling.label(again).labelled == 2


# --- lists, archives, small questions ----------------------------------------------------------------------


def test_lists_globs_and_archives(cli: Cli, photos: Path, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{photos / '001.jpg'}\n# comment\n{photos / 'gone.jpg'}\n")
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(photos / "002.jpg", "a/002.jpg")
    done = cli("label", tmp_path / "list.txt", tmp_path / "shard.tar", f"{photos}/00[12].jpg", *options)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out").keys() == {
        str(photos / "001.jpg"),
        str(photos / "002.jpg"),
        f"{tmp_path / 'shard.tar'}::a/002.jpg",
    }
    assert [e.path for e in read_errors(tmp_path / "out")] == [str(photos / "gone.jpg")]


def test_a_dry_run_writes_nothing(cli: Cli, photos: Path, options: list[str], tmp_path: Path) -> None:
    done = cli("label", photos, *options, "--dry-run", "--json")
    facts = json.loads(done.stdout)
    assert (facts["inputs"], facts["settled"], facts["classes"]) == (24, 0, 4)
    assert (facts["runtime"], facts["precision"]) == (usable_runtimes("cpu")[0], "fp32")
    assert not (tmp_path / "out").exists()
    assert cli("label", photos, *options, "--limit", 7).returncode == 0
    assert json.loads(cli("label", photos, *options, "--dry-run", "--json").stdout)["settled"] == 7
    assert cli("label", photos, *options, "--dry-run", "--views", "1").returncode == 2


@pytest.mark.parametrize(
    ("engine", "code", "message"),
    [
        (["--precision", "fp16"], 0, "runtime           onnx\n  precision         fp16\n"),
        (
            ["--runtime", "torch", "--precision", "bf16"],
            0,
            "runtime           torch\n  precision         bf16\n",
        ),
        (["--runtime", "openvino", "--device", "cuda"], 2, "fix: --device cpu"),
        (["--runtime", "tensorrt"], 2, "fix: --device cuda"),
        (["--runtime", "onnx", "--precision", "bf16"], 2, "onnx has fp32, fp16, int8"),
    ],
)
def test_a_dry_run_tells_the_engine_or_why_there_is_none(
    cli: Cli, photos: Path, options: list[str], engine: list[str], code: int, message: str
) -> None:
    done = cli("label", photos, *options, "--dry-run", *engine)
    assert done.returncode == code, done.stderr
    assert message in (done.stderr if code else done.stdout)


def test_a_limit_can_be_lifted_later(model: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert labelling.label(job(model, photos, out, limit=5)).labelled == 5
    result = labelling.label(job(model, photos, out))
    assert (result.labelled, result.scored_now) == (24, 19)


def test_new_photos_are_added_to_an_old_run(model: str, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.jpg", "c.jpg"):
        (folder / name).write_bytes((photos / "001.jpg").read_bytes())
    assert labelling.label(job(model, folder, tmp_path / "out")).labelled == 2
    (folder / "a.jpg").write_bytes((photos / "002.jpg").read_bytes())
    result = labelling.label(job(model, folder, tmp_path / "out"))
    assert (result.labelled, result.scored_now) == (3, 1)


def test_a_bundle_needs_no_torch(model: str, photos: Path, tmp_path: Path) -> None:
    with cliplet.load(model, classes=CLASSES) as tagger:
        bundle = next(p for p in _open_bundles() if p)
        assert tagger.classes == tuple(CLASSES.split(","))
    code = (
        "import sys\n"
        "from cliplet.cli import main\n"
        f"code = main(['label', {str(photos)!r}, '--model', {str(bundle)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "heavy = {'torch', 'open_clip', 'timm', 'onnx'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "out")) == 24


def _open_bundles() -> list[Path]:
    from cliplet.artifact import cache_folder

    return sorted(p.parent for p in (cache_folder() / "bundles").glob("*/cliplet.json"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/no/such/folder"], 2, "/no/such/folder"),
        (["{empty}"], 1, "no images"),
        (["{photos}", "--classes", "missing.txt"], 2, "no class file"),
        (["{photos}", "--classes", "cat,dog,cat"], 1, "more than once"),
        (["{photos}", "--classes", ""], 1, "names no class"),
        (["{photos}", "--classes", "{empty}/classes.txt"], 2, "no class file"),
        (["{photos}", "--classes", "cat," + "so " * 40 + "long"], 1, "longer than the text context"),
        (["{photos}", "--views", "3x3"], 2, "--views 1+3x3"),
        (["{photos}", "--threshold", "7"], 2, "between 0 and 1"),
        (["{photos}", "--prompts", "foto"], 2, "--prompts photo"),
        (["{photos}", "--model", "tini"], 2, "--model tiny"),
        (["{photos}", "--device", "cuda"], 1, "--device cpu"),
        (["{photos}", "--limit", "0"], 2, "--limit 0"),
        (["{photos}", "--threads", "-1"], 2, "--threads -1"),
        (["{photos}", "--max-error-rate", "5"], 2, "a share from 0 to 1"),
        (["{photos}", "--out", "{photos}/001.jpg/out"], 1, "cannot write"),
        (["{photos}", "--clases", "cat"], 2, "--classes"),
        ([], 2, "SOURCES"),
    ],
)
def test_one_clear_message_and_its_exit_code(
    cli: Cli, photos: Path, options: list[str], tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"photos": str(photos), "empty": str(tmp_path / "empty")}
    done = cli("label", *options, *(a.format(**places) for a in arguments))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_tagged_says_what_would_tag(cli: Cli, photos: Path, options: list[str]) -> None:
    done = cli("label", photos, *options[:-1], "--threshold", 0.999)
    assert done.returncode == 0
    assert "nothing was tagged" in done.stdout
    suggested = next(line.split()[1] for line in done.stdout.splitlines() if "would tag 50%" in line)
    done = cli("label", photos, *options[:-1], "--threshold", suggested, "--overwrite")
    untagged = int(next(w for w in done.stdout.split("; ")[1].split()))
    assert untagged <= 12


def test_another_job_in_the_same_folder_is_refused(cli: Cli, photos: Path, options: list[str]) -> None:
    assert cli("label", photos, *options).returncode == 0
    done = cli("label", photos, *options, "--views", "1")
    assert done.returncode == 2
    assert 'views: "1+2x2" then, "1" now' in done.stderr
    assert cli("label", photos, *options, "--views", "1", "--overwrite").returncode == 0


def test_the_same_folder_spelled_otherwise_is_another_job(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows name inputs as they were spelled, so a run that went on under another name would label them twice."""
    monkeypatch.chdir(photos.parent)
    labelling.label(job(model, Path(photos.name), tmp_path / "out"))
    with pytest.raises(UsageError, match="inputs"):
        labelling.label(job(model, photos, tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / photos.name).symlink_to(photos)
    with pytest.raises(UsageError, match="cwd"):
        labelling.label(job(model, Path(photos.name), tmp_path / "out"))


def test_other_files_in_the_output_folder_are_left_alone(model: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tmp").write_text("years of work")
    labelling.label(job(model, photos, tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.tmp").read_text() == "years of work"


def test_options_may_come_from_the_environment(cli: Cli, photos: Path, options: list[str]) -> None:
    done = cli("label", photos, *options, "--dry-run", CLIPLET_LABEL_JSON="1", CLIPLET_LABEL_BATCH_SIZE="3")
    assert json.loads(done.stdout)["images_per_batch"] == 3


# --- an engine that fails ----------------------------------------------------------------------------------


def test_an_image_that_the_engine_refuses_costs_only_itself(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Tagger.score

    def fails_on_one_size(self: Tagger, pictures: Any, boxes: Any = None) -> Any:
        if any(p.pixels.shape == (50, 40, 3) for p in pictures):
            raise EnvironmentError_("the engine ran out of memory")
        return whole(self, pictures, boxes)

    monkeypatch.setattr(Tagger, "score", fails_on_one_size)
    result = labelling.label(job(model, photos, tmp_path / "out"))
    assert (result.labelled, result.failed) == (23, 1)
    (error,) = read_errors(tmp_path / "out")
    assert (error.stage, error.reason) == ("infer", "the engine ran out of memory")


def test_scores_that_are_not_finite_are_errors(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliplet.runners.onnx_runner import OnnxRunner

    # Exported before, as the export checks what the engine computes.
    labelling.label(job(model, photos, tmp_path / "before", "onnx", limit=1))
    infer = OnnxRunner.infer

    def poisoned(self: OnnxRunner, feeds: Any) -> Any:
        outputs = infer(self, feeds)
        outputs["scores"][:] = np.nan
        return outputs

    monkeypatch.setattr(OnnxRunner, "infer", poisoned)
    with pytest.raises(EnvironmentError_, match="refused 8 images in a row: .*not finite"):
        labelling.label(job(model, photos, tmp_path / "out", "onnx", batch_size=1))
    monkeypatch.undo()
    assert labelling.label(job(model, photos, tmp_path / "out", "onnx")).labelled == 24


def test_an_engine_that_dies_is_no_fault_of_the_images(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was labelled before is kept, what was refused is not recorded, and the same job continues."""
    from cliplet.runners.onnx_runner import OnnxRunner

    labelling.label(job(model, photos, tmp_path / "before", "onnx", limit=1))
    infer, calls = OnnxRunner.infer, []

    def dies(self: OnnxRunner, feeds: Any) -> Any:
        calls.append(len(feeds["image"]))
        if sum(calls) > 5:
            raise EnvironmentError_("CUDA failure 999")
        return infer(self, feeds)

    monkeypatch.setattr(OnnxRunner, "infer", dies)
    with pytest.raises(EnvironmentError_, match="CUDA failure 999"):
        labelling.label(job(model, photos, tmp_path / "out", "onnx", batch_size=5))
    assert len(rows(tmp_path / "out")) == 5
    assert read_errors(tmp_path / "out") == []
    monkeypatch.undo()
    result = labelling.label(job(model, photos, tmp_path / "out", "onnx"))
    assert (result.labelled, result.failed, result.scored_now) == (24, 0, 19)


LATE = DeadlineExpired("no answer")
BROKEN = ModelFailed("the model failed")
DEAD = ModelFailed("a model has died: Stub process 'pets_0_0' is not healthy.")


@pytest.mark.parametrize(
    ("error", "batch_size", "failing_calls", "raised", "labelled", "failed"),
    [
        (LATE, 1, {5}, None, 23, 1),
        (BROKEN, 1, {5, 6, 9}, None, 21, 3),
        (LATE, 1, {23}, EnvironmentError_, 23, 0),
        (BROKEN, 1, {5, 22, 23}, EnvironmentError_, 21, 1),
        # The batch, then one of its images: only the batch after it clears the engine.
        (LATE, 24, {0, 4}, EnvironmentError_, 23, 0),
        (LATE, 12, {0, 4}, None, 23, 1),
        # An engine of our own is trusted at the end.
        (EnvironmentError_("out of memory"), 1, {23}, None, 23, 1),
        (DEAD, 1, {5}, ServerError, 5, 0),
        (DEAD, 12, {1}, ServerError, 12, 0),
    ],
)
def test_what_a_server_failed_at_is_blamed_on_an_image_only_if_a_later_batch_passes(
    model: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: ClipletError,
    batch_size: int,
    failing_calls: set[int],
    raised: type[ClipletError] | None,
    labelled: int,
    failed: int,
) -> None:
    whole, calls = Tagger.score, itertools.count()

    def fails(self: Tagger, *given: Any) -> Any:
        if next(calls) in failing_calls:
            raise error
        return whole(self, *given)

    this = job(model, photos, tmp_path / "out", batch_size=batch_size)
    with monkeypatch.context() as patch:
        patch.setattr(Tagger, "score", fails)
        if raised is None:
            labelling.label(this)
        else:
            with pytest.raises(raised, match=error.happened):
                labelling.label(this)
    assert len(rows(tmp_path / "out")) == labelled
    assert len(read_errors(tmp_path / "out")) == failed
    if raised is not None:
        assert labelling.label(this).labelled == 24 - failed


# --- interruptions -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 400 small images, every 50th of them broken."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(400):
        path = folder / f"{i:04d}.jpg"
        Image.fromarray(picture(48 + i % 31, 40 + i % 17, i)).save(path)
        if i % 50 == 49:
            path.write_bytes(path.read_bytes()[:100])
    return folder


# Writes a part after every batch, so that a kill meets every state of the folder.
EAGER_WRITER = "import sys, cliplet.deploy.label as l; l.PART_ROWS = 1; from cliplet.cli import main; sys.exit(main(sys.argv[1:]))"


def start(
    many: Path, options: list[str], parts: int | None = None, go: Path = Path("/no/such/file")
) -> subprocess.Popen[str]:
    """The command as a process, which waits before it writes more than so many `parts` until there is a file `go`."""
    held = (
        "import pathlib, time, cliplet.labels as b\n"
        "write = b.LabelStore.write_part\n"
        "def held(self, records):\n"
        f"    while len(list(self.parts_folder.glob('part-*.parquet'))) >= {parts}:\n"
        f"        if pathlib.Path({str(go)!r}).exists(): break\n"
        "        time.sleep(0.01)\n"
        "    return write(self, records)\n"
        "b.LabelStore.write_part = held\n"
    )
    code = EAGER_WRITER if parts is None else held + EAGER_WRITER
    command = [sys.executable, "-c", code, "label", str(many), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_parts(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(list((out / "labels").glob("part-*.parquet"))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_runs_end_with_the_rows_of_an_undisturbed_one(
    model: str, many: Path, options: list[str], tmp_path: Path
) -> None:
    undisturbed = tmp_path / "undisturbed"
    labelling.label(job(model, many, undisturbed))
    out = tmp_path / "out"
    chance = random.Random(7)
    for kill in range(3):
        # A little further, where it is held so that a late kill meets it, too.
        process = start(many, options, 10 + 15 * kill)
        wait_for_parts(out, 5 + 15 * kill, process)
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.wait()
        assert len(rows(out)) < 392
    process = start(many, options)
    assert process.wait() == 0
    assert rows(out) == rows(undisturbed)
    assert read_errors(out) == read_errors(undisturbed)
    assert len(read_errors(out)) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_the_work(many: Path, options: list[str], tmp_path: Path, number: int) -> None:
    go = tmp_path / "go"
    process = start(many, options, 3, go)
    wait_for_parts(tmp_path / "out", 3, process)
    process.send_signal(number)
    go.touch()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    saved = rows(tmp_path / "out")
    assert 0 < len(saved) < 392
    process = start(many, options)
    assert process.wait() == 0
    assert len(rows(tmp_path / "out")) == 392
    assert saved.items() <= rows(tmp_path / "out").items()


def test_two_runs_into_one_folder(cli: Cli, photos: Path, options: list[str], tmp_path: Path) -> None:
    with LabelStore(tmp_path / "out"):
        done = cli("label", photos, *options)
    assert done.returncode == 2
    assert "another run is writing" in done.stderr
    assert cli("label", photos, *options).returncode == 0


def test_a_full_disk_ends_the_run_and_keeps_what_was_written(
    many: Path, options: list[str], tmp_path: Path
) -> None:
    """After three parts no file may grow past 700 bytes, as on a disk with no more room; then all is well again."""
    starved = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import cliplet.labels as b\n"
        "write = b.LabelStore.write_part\n"
        "def limited(self, records):\n"
        "    if len(list(self.parts_folder.glob('part-*'))) == 3:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))\n"
        "    return write(self, records)\n"
        "b.LabelStore.write_part = limited\n"
    ) + EAGER_WRITER
    done = subprocess.run(
        [sys.executable, "-c", starved, "label", str(many), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "no space left while writing" in done.stderr
    assert "run the same command again" in done.stderr
    saved = rows(tmp_path / "out")
    assert 0 < len(saved) < 392
    assert not list((tmp_path / "out").rglob("*.tmp"))
    process = start(many, options)
    assert process.wait() == 0
    assert len(rows(tmp_path / "out")) == 392
    assert saved.items() <= rows(tmp_path / "out").items()
