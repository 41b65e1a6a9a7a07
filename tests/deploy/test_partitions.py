"""A divided job ends with what an undivided one would have left, in whatever order and however often it is killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import Cli, picture
from PIL import Image

import cliplet.deploy.partitions as partitions
from cliplet.deploy.label import LabelJob, LabelResult, label
from cliplet.deploy.partitions import Division, dry_run_divided, join, label_divided
from cliplet.errors import ArtifactError, DataError, UsageError
from cliplet.labels import LabelStore, read_errors, read_labels, read_run
from cliplet.partition_folders import partition_folder, unfinished
from cliplet.plan import TaggerSettings
from cliplet.tagger import Tagger

CLASSES = "cat,dog,bird"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 50 small images, every seventh of them broken."""
    folder = tmp_path_factory.mktemp("mixed")
    for i in range(50):
        path = folder / f"{i:03d}.jpg"
        Image.fromarray(picture(48 + i % 31, 40 + i % 17, i)).save(path)
        if i % 7 == 6:
            path.write_bytes(path.read_bytes()[:100])
    return folder


@pytest.fixture
def job(toy_clip: Path, mixed: Path, tmp_path: Path) -> LabelJob:
    tagger = TaggerSettings(model=f"open_clip:local-dir:{toy_clip}", classes=CLASSES, views="1+2x2")
    return LabelJob(sources=(str(mixed),), out=tmp_path / "out", tagger=tagger, batch_size=3, quiet=True)


def changed(job: LabelJob, **fields: Any) -> LabelJob:
    return LabelJob(**{**vars(job), **fields})


def content(out: Path) -> tuple[list[tuple[object, ...]], object, dict[str, Any]]:
    """All that a folder says but the times, in its order."""
    rows = [(r.path, r.width, r.height, r.labels, r.scores.tobytes(), r.model) for r in read_labels(out)]
    return rows, read_errors(out), {**read_run(out), "begun": ""}


@pytest.fixture
def undivided(job: LabelJob, tmp_path: Path) -> tuple[object, ...]:
    label(changed(job, out=tmp_path / "undivided"))
    return content(tmp_path / "undivided")


@pytest.mark.parametrize(
    "of, order", [(1, [0]), (3, [2, 0, 1]), (5, [0, 1, 2, 3, 4]), (20, [*range(19, -1, -1)])]
)
def test_any_division_in_any_order_equals_the_undivided_run(
    job: LabelJob, undivided: tuple[object, ...], of: int, order: list[int]
) -> None:
    for number, index in enumerate(order, 1):
        result = label_divided(job, Division(of, index))
        assert result.own is not None
        assert set(result.missing) == set(order[number:])
        assert (result.whole is None) == (number < of)
    assert content(job.out) == undivided
    assert isinstance(result.whole, LabelResult)
    assert (result.whole.inputs, result.whole.labelled, result.whole.failed) == (50, 43, 7)
    assert sorted(p.name for p in job.out.iterdir()) == [".lock", "errors.parquet", "labels", "run.json"]


def test_every_image_is_scored_beside_the_same_others(
    job: LabelJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores may depend on the batch in their last bits, so partitions are cut where batches end."""
    whole = Tagger.score
    seen: list[tuple[int, ...]] = []

    def score(self: Tagger, pictures: Any, boxes: Any = None) -> Any:
        seen.append(tuple(int(p.pixels.sum()) for p in pictures))
        return whole(self, pictures, boxes)

    monkeypatch.setattr(Tagger, "score", score)
    label(changed(job, out=tmp_path / "undivided"))
    undivided = seen.copy()
    seen.clear()
    for index in range(4):
        label_divided(job, Division(4, index))
    assert seen == undivided


def test_a_joined_folder_is_that_of_an_undivided_run(job: LabelJob, mixed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(mixed, folder)
    job = changed(job, sources=(str(folder),))
    for index in range(3):
        label_divided(job, Division(3, index))
    again = label_divided(job, Division(3, 1))
    assert again.own is None and again.whole is not None and again.whole.labelled == 43
    assert label_divided(job, Division(3)).whole == again.whole
    shutil.copy(folder / "000.jpg", folder / "new.jpg")
    with pytest.raises(UsageError, match="without --partitions and --partition continues it"):
        label_divided(job, Division(3, 1))
    assert label(job).scored_now == 1


def test_inputs_are_those_of_their_partition(job: LabelJob) -> None:
    shares = [dry_run_divided(job, Division(4, index)) for index in range(4)]
    assert [s.inputs for s in shares] == [12, 12, 12, 14]
    assert not job.out.exists()
    names = [ref.path for s in shares for ref in s.listing.images]
    assert names == sorted(names) and len(set(names)) == 50
    label_divided(job, Division(4, 2))
    assert dry_run_divided(job, Division(4, 2)).settled == 12
    assert dry_run_divided(job, Division(4, 1)).settled == 0
    assert {r.path for r in read_labels(partition_folder(job.out, 2, 4))} <= set(names[24:36])


def test_a_dry_run_of_joining_tells_what_is_there(job: LabelJob) -> None:
    label_divided(job, Division(4, 2))
    both = dry_run_divided(job, Division(4))
    assert (both.inputs, both.settled, both.images_per_batch) == (50, 12, 3)
    label_divided(job, Division(4, 0))
    assert dry_run_divided(job, Division(4)).settled == 24
    with pytest.raises(UsageError, match="divided into 4 partitions, not 5"):
        dry_run_divided(job, Division(5))


def test_a_command_to_copy_names_an_odd_folder(job: LabelJob, tmp_path: Path) -> None:
    job = changed(job, out=tmp_path / "my labels; ls")
    label_divided(job, Division(2, 0))
    with pytest.raises(DataError, match="--out '/[^']*/my labels; ls' --partitions 2"):
        read_run(job.out)
    with pytest.raises(UsageError, match="rm -r '/[^']*/my labels; ls', then"):
        label_divided(changed(job, overwrite=True), Division(2, 1))


# --- readers -------------------------------------------------------------------------------------------------


def test_readers_say_which_partitions_are_missing(job: LabelJob, cli: Cli) -> None:
    label_divided(job, Division(5, 1))
    with pytest.raises(DataError, match="4 of 5 partitions are not finished: 0, 2, 3, 4"):
        read_run(job.out)
    done = cli("gallery", job.out)
    assert done.returncode == 1
    assert "not finished: 0, 2, 3, 4" in done.stderr
    assert f"--out {job.out} --partitions 5 --partition I" in done.stderr
    assert unfinished(job.out) == [0, 2, 3, 4]
    with pytest.raises(DataError, match="4 of 5 partitions are not finished"):
        label_divided(job, Division(5))


def test_the_command(toy_clip: Path, mixed: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["label", mixed, "--model", f"open_clip:local-dir:{toy_clip}", "--classes", CLASSES]
    command += ["--out", out, "--batch-size", 3, "--partitions", 2, "--write", "csv,jsonl"]
    done = cli(*command, CLIPLET_LABEL_PARTITION="1")
    assert done.returncode == 0, done.stderr
    assert "partition 1 of 2: 22 of 26 inputs labelled, 4 failed\nnot finished yet (1): 0\n" in done.stdout
    done = cli(*command)
    assert done.returncode == 1
    assert "1 of 2 partitions are not finished: 0" in done.stderr
    done = cli(*command, "--partition", 0, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["result"]["labelled"] == 43
    assert [(w["format"], w["rows"]) for w in facts["written"]] == [("csv", 43), ("jsonl", 43)]
    assert len((out / "labels.jsonl").read_text().splitlines()) == 50
    assert cli(*command).returncode == 0
    assert cli("label", *command[1:-4], "--write", "coco").returncode == 0
    assert len(json.loads((out / "labels.coco.json").read_text())["images"]) == 43


def test_side_cars_are_written_and_told(toy_clip: Path, photos: Path, cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    sidecar = next(iter(sorted(folder.glob("*.jpg")))).with_suffix(".xmp")
    sidecar.write_text("somebody's work")
    command = ["label", folder, "--model", f"open_clip:local-dir:{toy_clip}", "--classes", CLASSES]
    command += ["--out", tmp_path / "out", "--threshold", 0, "--write", "xmp"]
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert "side-cars: 23 hold their image's labels, 23 of them written now" in done.stdout
    assert "1 not touched: left as it is: it is not whole XML" in done.stdout
    assert sidecar.read_text() == "somebody's work"
    assert len(list(folder.rglob("*.xmp"))) == 24
    assert "23 hold their image's labels, 0 of them written now" in cli(*command).stdout


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--partition", "0"], 2, "without --partitions"),
        (["--partitions", "0"], 2, "from 1 on"),
        (["--partitions", "4", "--partition", "4"], 2, "counted from 0"),
        (["--partitions", "4", "--partition", "-1"], 2, "0 to 3"),
        (["--partitions", "4"], 2, "holds no partitions yet"),
        (["--partitions", "4", "--partition", "0", "--overwrite"], 2, "rm -r"),
        (["--write", "csv,exel"], 2, "csv, jsonl, coco, xmp"),
        (["--write", "xmp", "--xmp-style", "apple"], 2, "basename, full"),
        (["--ray-workers", "-1"], 2, "--ray-workers -1"),
    ],
)
def test_options_that_cannot_be_meant(
    mixed: Path, cli: Cli, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    done = cli("label", mixed, "--out", tmp_path / "out", *options)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_does_not_belong_together_is_refused(job: LabelJob, mixed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(mixed, folder)
    job = changed(job, sources=(str(folder),))
    label_divided(job, Division(4, 0))
    other_views = TaggerSettings(**{**vars(job.tagger), "views": "1"})
    with pytest.raises(UsageError, match="divided into 4 partitions, not 5"):
        label_divided(job, Division(5, 1))
    with pytest.raises(UsageError, match="another job .other views"):
        label_divided(changed(job, tagger=other_views), Division(4, 1))
    with pytest.raises(UsageError, match="other batch size"):
        label_divided(changed(job, batch_size=4), Division(4, 1))
    with pytest.raises(UsageError, match="50 then, 20 now"):
        label_divided(changed(job, limit=20), Division(4, 1))
    with pytest.raises(UsageError, match="divided into 4 partitions"):
        label(job)
    (folder / "049.jpg").rename(folder / "renamed.jpg")
    with pytest.raises(UsageError, match="not those that the other partitions saw"):
        label_divided(job, Division(4, 1))
    with pytest.raises(UsageError, match="not those"):
        dry_run_divided(job, Division(4, 1))


def test_an_undivided_run_is_not_divided(job: LabelJob) -> None:
    label(changed(job, limit=10))
    with pytest.raises(UsageError, match="one undivided job"):
        label_divided(job, Division(4, 1))


def test_one_partition_has_one_writer(job: LabelJob) -> None:
    label_divided(job, Division(2, 0))
    with LabelStore(partition_folder(job.out, 0, 2)):
        with pytest.raises(UsageError, match="another run is writing"):
            label_divided(job, Division(2, 0))
        assert label_divided(job, Division(2, 1)).missing == (0,)
        with pytest.raises(UsageError, match="still being written"):
            label_divided(job, Division(2))
    whole = label_divided(job, Division(2)).whole
    assert whole is not None and whole.labelled == 43


# --- faults --------------------------------------------------------------------------------------------------


def test_failed_inputs_are_tried_again_within_a_partition(job: LabelJob, mixed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(mixed, folder)
    job = changed(job, sources=(str(folder),))
    label_divided(job, Division(2, 0))
    shutil.copy(folder / "000.jpg", folder / "006.jpg")
    assert label_divided(changed(job, retry_failed=True), Division(2, 0)).own is not None
    whole = label_divided(job, Division(2, 1)).whole
    assert whole is not None and (whole.labelled, whole.failed) == (44, 6)


@pytest.mark.parametrize("step", ["_put", "_count_again", "_remove_rest"])
def test_a_join_that_is_killed_is_done_again(
    job: LabelJob, undivided: tuple[object, ...], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in (0, 1):
        label_divided(job, Division(3, index))
    with monkeypatch.context() as patch:
        patch.setattr(partitions, step, _killed)
        with pytest.raises(KeyboardInterrupt):
            label_divided(job, Division(3, 2))
    if step != "_remove_rest":
        with pytest.raises(DataError, match="not joined"):
            read_run(job.out)
    assert label_divided(job, Division(3)).whole is not None
    assert content(job.out) == undivided
    assert not (job.out / "partitions").exists()


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_partitions_that_lost_rows_are_not_joined(job: LabelJob) -> None:
    for index in (0, 1):
        label_divided(job, Division(3, index))
    next((partition_folder(job.out, 0, 3) / "labels").glob("*.parquet")).unlink()
    with pytest.raises(ArtifactError, match="50 inputs, each once"):
        label_divided(job, Division(3, 2))


def test_a_file_system_without_links_gets_copies(
    job: LabelJob, undivided: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    for index in (0, 1):
        label_divided(job, Division(2, index))
    assert content(job.out) == undivided


def test_many_that_finish_at_once_join_once(job: LabelJob, undivided: tuple[object, ...]) -> None:
    """Processes started together; each ends by looking whether it was the last."""
    processes = [start(job, index, 4) for index in range(4)]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert content(job.out) == undivided


def test_threads_that_join_at_once(job: LabelJob, undivided: tuple[object, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "join", lambda out: [0])
        for index in range(3):
            label_divided(job, Division(3, index))
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(join, [job.out] * 12)) == [[]] * 12
    assert content(job.out) == undivided


def test_a_killed_partition_continues(job: LabelJob, undivided: tuple[object, ...]) -> None:
    label_divided(job, Division(2, 0))
    parts = partition_folder(job.out, 1, 2) / "labels"
    process = start(job, 1, 2, slow=True)
    deadline = time.monotonic() + 60
    while len(list(parts.glob("part-*.parquet"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    saved = len(list(read_labels(parts.parent)))
    assert 0 < saved < 22
    own = label_divided(job, Division(2, 1)).own
    assert own is not None and own.scored_now == 22 - saved
    assert content(job.out) == undivided


def start(job: LabelJob, index: int, of: int, *, slow: bool = False) -> subprocess.Popen[str]:
    """A partition as a process that writes a part after every batch."""
    code = (
        "import sys, time, cliplet.deploy.label as l\n"
        "l.PART_ROWS = 1\n"
        "import cliplet.labels as b\n"
        "write = b.LabelStore.write_part\n"
        f"b.LabelStore.write_part = lambda self, rows: (time.sleep({0.2 if slow else 0}), write(self, rows))[1]\n"
        "from cliplet.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    options = ["--model", job.tagger.model, "--classes", CLASSES, "--views", "1+2x2", "--batch-size", "3"]
    options += ["--out", str(job.out), "--partitions", str(of), "--partition", str(index), "--quiet"]
    command = [sys.executable, "-c", code, "label", *job.sources, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
