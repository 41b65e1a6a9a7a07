"""Labelling on a cluster of two workers gives the very rows of one process, whoever is killed on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import picture
from PIL import Image

from cliplet.deploy import label as labelling
from cliplet.deploy import ray_label
from cliplet.deploy.label import LabelJob, label
from cliplet.deploy.ray_label import Workers, planned_workers
from cliplet.errors import ClipletError, EnvironmentError_
from cliplet.labels import LabelStore, read_errors, read_labels
from cliplet.plan import TaggerSettings, make_plan

ray = pytest.importorskip("ray")

CLASSES = "cat,dog,bird"
WORKER = "ray::MapWorker"
# Seconds that a busy machine may need to start a worker, or to come to its work.
LONG_S = 120.0


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 150 small images, every 25th of them broken."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(150):
        path = folder / f"{i:03d}.jpg"
        Image.fromarray(picture(48 + i % 31, 40 + i % 17, i)).save(path)
        if i % 25 == 24:
            path.write_bytes(path.read_bytes()[:100])
    return folder


@pytest.fixture(scope="module")
def tagger(toy_clip: Path) -> TaggerSettings:
    return TaggerSettings(model=f"open_clip:local-dir:{toy_clip}", classes=CLASSES, views="1+2x2")


@pytest.fixture
def job(many: Path, tagger: TaggerSettings, tmp_path: Path) -> LabelJob:
    out = tmp_path / "out"
    return LabelJob(
        sources=(str(many),), out=out, tagger=tagger, batch_size=3, quiet=True, ray="local", ray_workers=2
    )


def changed(job: LabelJob, **fields: Any) -> LabelJob:
    return LabelJob(**{**vars(job), **fields})


def content(out: Path) -> tuple[list[tuple[object, ...]], object]:
    rows = [(r.path, r.width, r.height, r.labels, r.scores.tobytes(), r.model) for r in read_labels(out)]
    return rows, read_errors(out)


@pytest.fixture(scope="module")
def undisturbed(many: Path, tagger: TaggerSettings, tmp_path_factory: pytest.TempPathFactory) -> object:
    """What one process makes of the images."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    label(LabelJob(sources=(str(many),), out=out, tagger=tagger, batch_size=3, quiet=True))
    return content(out)


def slow_and_mortal(hold: Path) -> Callable[[], None]:
    """What each worker does when it starts: decode slowly, and die of an image called `killer`.

    At an image from `072.jpg` on it waits as long as there is a folder `hold`, with a file there named for its
    process.
    """

    def prepare() -> None:
        import os
        import time

        from cliplet.deploy import label_scoring, ray_label

        ray_label.MOST_DEATHS = 2
        whole = label_scoring.load

        def load(ref: Any, *rest: Any) -> Any:
            time.sleep(0.02)
            give_up = time.monotonic() + LONG_S
            while os.path.basename(ref.path) >= "072.jpg" and hold.exists() and time.monotonic() < give_up:
                (hold / str(os.getpid())).touch()
                time.sleep(0.02)
            if "killer" in ref.path:
                os.kill(os.getpid(), 9)
            return whole(ref, *rest)

        label_scoring.load = load

    return prepare


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that does not exist; while it does, workers wait."""
    return tmp_path_factory.mktemp("flags") / "hold"


@pytest.fixture(scope="module")
def cluster(hold: Path) -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        runtime_env={"worker_process_setup_hook": slow_and_mortal(hold)},
    )
    yield
    ray.shutdown()


def until(holds: Callable[[], Any]) -> Any:
    """Wait for something that comes true."""
    end = time.monotonic() + LONG_S
    while not (found := holds()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def workers() -> list[psutil.Process]:
    """The processes below this one that hold engines."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(WORKER in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.mark.usefixtures("cluster")
def test_a_worker_killed_half_way_costs_nothing(
    job: LabelJob, undisturbed: object, hold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    write = LabelStore.write_part

    def write_and_kill(self: LabelStore, rows: Any) -> Path:
        part = write(self, rows)
        # Early, as Ray hands a stretch out when it has the one after it, too, and those from 072.jpg on are held.
        if part.name == "part-000004.parquet":
            # One in the middle of its stretch, while there is another one.
            until(lambda: len(workers()) == 2)
            pid = int(until(lambda: list(hold.iterdir()))[0].name)
            assert pid in [worker.pid for worker in workers()]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            shutil.rmtree(hold)
        return part

    monkeypatch.setattr(labelling, "PART_ROWS", 1)
    monkeypatch.setattr(LabelStore, "write_part", write_and_kill)
    hold.mkdir()
    try:
        result = label(job)
    finally:
        shutil.rmtree(hold, ignore_errors=True)
    assert len(killed) == 1
    assert (result.labelled, result.failed, result.scored_now) == (144, 6, 144)
    assert content(job.out) == undisturbed


@pytest.mark.usefixtures("cluster")
def test_through_ray_client_somebody_in_the_cluster_relays(job: LabelJob, undisturbed: object) -> None:
    """The cluster of this process stands for the one behind the address: only the way to the rows is another."""
    assert label(changed(job, ray="ray://host:10001")).labelled == 144
    assert content(job.out) == undisturbed


@pytest.mark.usefixtures("cluster")
def test_an_image_that_kills_its_workers_ends_the_run_and_is_named(
    job: LabelJob, many: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(60):
        name = "060-killer.jpg" if n == 59 else f"{n:03d}.jpg"
        (folder / name).symlink_to(many / f"{n % 20:03d}.jpg")
    with pytest.raises(
        EnvironmentError_, match="060-killer.jpg has ended with the death of its worker 2 times"
    ):
        label(changed(job, sources=(str(folder),), ray_workers=1))
    assert len(list(read_labels(job.out))) == 48
    assert read_errors(job.out) == []


@pytest.mark.usefixtures("cluster")
def test_what_a_worker_raises_on_purpose_comes_home(
    job: LabelJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliplet.tagger import exported_bundle

    def damaged(chosen: Any) -> Any:
        bundle = exported_bundle(chosen)
        copy = shutil.copytree(bundle.folder, tmp_path / "bundle")
        for file in Path(copy).rglob("*.onnx"):
            file.write_bytes(b"no graph")
        return type(bundle)(Path(copy), bundle.manifest)

    monkeypatch.setattr(ray_label, "exported_bundle", damaged)
    chosen = TaggerSettings(**{**vars(job.tagger), "runtime": "onnx"})
    with pytest.raises(ClipletError, match="model.onnx"):
        label(changed(job, tagger=chosen))


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_there_is_room_for(job: LabelJob) -> None:
    with pytest.raises(EnvironmentError_, match="3 workers want 1 CPUs each; the cluster has room for 2"):
        label(changed(job, ray_workers=3))


@pytest.mark.parametrize(
    "nodes, device, threads, asked, expected",
    [
        ([(16, 0)], "cpu", 0, 0, Workers(1, 16, 0)),
        ([(16, 0), (8, 0)], "cpu", 0, 0, Workers(3, 8, 0)),
        ([(16, 0)], "cpu", 4, 0, Workers(4, 4, 0)),
        ([(16, 0)], "cpu", 0, 4, Workers(4, 4, 0)),
        ([(16, 0), (16, 0)], "cpu", 0, 4, Workers(4, 8, 0)),
        ([(16, 4), (16, 4)], "cuda", 0, 0, Workers(8, 4, 1)),
        ([(16, 4)], "cuda", 0, 2, Workers(2, 4, 1)),
        ([(2, 4)], "cuda", 0, 0, Workers(2, 1, 1)),
        ([(16, 0)], "cuda", 0, 0, None),
        ([(0, 0)], "cpu", 0, 0, None),
        ([(2, 0)], "cpu", 3, 0, None),
    ],
)
def test_a_cluster_is_shared_out_by_device(
    tagger: TaggerSettings,
    nodes: list[tuple[int, int]],
    device: str,
    threads: int,
    asked: int,
    expected: Workers | None,
) -> None:
    from dataclasses import replace

    chosen = make_plan(tagger)
    chosen = replace(chosen, settings=replace(tagger, device=device, threads=threads))
    if expected is None:
        with pytest.raises(EnvironmentError_, match="room"):
            planned_workers(nodes, chosen, asked)
    else:
        assert planned_workers(nodes, chosen, asked) == expected


# --- clusters of our own -------------------------------------------------------------------------------------


def start(job: LabelJob, parts: int, *options: str) -> subprocess.Popen[str]:
    """`label --ray local` as a process that writes each batch, and waits before it writes more than so many `parts`.

    A file `go` beside the results lets it go on.
    """
    code = (
        "import sys, time, cliplet.deploy.label as l, cliplet.labels as b\n"
        f"go = __import__('pathlib').Path({str(job.out)!r}).with_name('go')\n"
        "l.PART_ROWS = 1\n"
        "write = b.LabelStore.write_part\n"
        "def held(self, rows):\n"
        f"    while len(list(self.parts_folder.glob('part-*.parquet'))) >= {parts} and not go.exists():\n"
        "        time.sleep(0.01)\n"
        "    return write(self, rows)\n"
        "b.LabelStore.write_part = held\n"
        "from cliplet.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    options = (
        "--model",
        job.tagger.model,
        "--classes",
        CLASSES,
        "--views",
        "1+2x2",
        "--batch-size",
        "3",
        *options,
    )
    command = [sys.executable, "-c", code, "label", *job.sources, "--out", str(job.out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def parts_of(out: Path) -> int:
    return len(list((out / "labels").glob("part-*.parquet")))


def wait_for_parts(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LONG_S
    while parts_of(out) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def ended_below(process: subprocess.Popen[str], *, killed: bool = False) -> Iterator[None]:
    """Context after which nothing that the process started may live on; of a killed one, nothing that works.

    Ray's agents look only now and then whether their node still lives.
    """
    below = psutil.Process(process.pid).children(recursive=True)
    agents = [p for p in below if "Agent" in p.name() or any("Agent" in word for word in p.cmdline())]
    yield
    assert len(below) > len(agents) + 2
    _, left = psutil.wait_procs([p for p in below if p not in agents] if killed else below, timeout=60)
    for agent in agents:
        if agent.is_running():
            agent.kill()
    assert not left


def test_a_driver_that_is_stopped_or_killed_continues(job: LabelJob, undisturbed: object) -> None:
    process = start(job, 3, "--ray", "local", "--ray-workers", "2")
    wait_for_parts(job.out, 3, process)
    go = job.out.with_name("go")
    with ended_below(process):
        process.send_signal(signal.SIGTERM)
        go.touch()
        stdout, stderr = process.communicate(timeout=LONG_S)
    assert process.returncode == 130, stderr
    assert all(line.startswith("labelling: ") for line in stderr.splitlines()), stderr
    assert stdout.startswith("interrupted, all work saved")
    saved = len(list(read_labels(job.out)))
    assert 0 < saved < 144

    go.unlink()
    more = parts_of(job.out) + 2
    process = start(job, more, "--ray", "local", "--ray-workers", "2", "--quiet")
    wait_for_parts(job.out, more, process)
    with ended_below(process, killed=True):
        process.kill()
        process.communicate()
    assert saved < len(list(read_labels(job.out))) < 144

    label(changed(job, ray=None, ray_workers=0))
    assert content(job.out) == undisturbed


def test_without_ray_one_error_says_how_to_get_it(job: LabelJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(EnvironmentError_, match=r"pip install 'cliplet\[ray\]'"):
        label(job)


@pytest.mark.filterwarnings("ignore:Ray Client connection timed out")
def test_an_address_without_a_cluster(job: LabelJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.client.worker.INITIAL_TIMEOUT_SEC", 0.2)
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(EnvironmentError_, match="no Ray cluster at 'ray://127.0.0.1:1'"):
        label(changed(job, ray="ray://127.0.0.1:1"))


def test_nothing_else_imports_ray() -> None:
    code = (
        "import sys, cliplet.deploy.commands, cliplet.deploy.label, cliplet.deploy.partitions, cliplet.deploy.ray_label\n"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
