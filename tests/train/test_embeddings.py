"""Embeddings on disk: rows, failures, continuing after a kill, a collection that has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import picture
from PIL import Image

from cliplet.errors import ArtifactError, ClipletError, DataError, EnvironmentError_, UsageError
from cliplet.images import ImageRef, Picture, find_images
from cliplet.train import bank_files
from cliplet.train.embeddings import Embeddings, EmbedOptions, embed_images, read_embeddings

FLOAT32 = EmbedOptions(batch=4, quiet=True, dtype="float32")


class Histogram:
    """An embedder without a model: how often each of eight gray levels occurs, as a unit row."""

    def __init__(self, **identity: Any) -> None:
        self.identity = {"model": "histogram", "bins": (8,), **identity}
        self.width = 8
        self.room = {"fit": 64, "short": 32}
        self.seen: list[int] = []

    def embed(self, pictures: Sequence[Picture]) -> np.ndarray:
        self.seen.append(len(pictures))
        rows = [np.histogram(p.pixels, 8, (0, 256))[0] + 1.0 for p in pictures]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


class Broken(Histogram):
    """It spoils or refuses what `harm` says of a row."""

    def __init__(self, harm: Callable[[Picture, np.ndarray], None]) -> None:
        super().__init__()
        self.harm = harm

    def embed(self, pictures: Sequence[Picture]) -> np.ndarray:
        rows = super().embed(pictures)
        for one, row in zip(pictures, rows, strict=True):
            self.harm(one, row)
        return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven images, two files among them that are none."""
    place = tmp_path / "photos"
    place.mkdir()
    for i in range(11):
        Image.fromarray(picture(40 + i, 30 + i, seed=i)).save(place / f"{i:02d}.png")
    (place / "04.png").write_bytes(b"no image")
    (place / "10.png").write_bytes(b"")
    return place


def listed(folder: Path) -> list[ImageRef]:
    return find_images([str(folder)]).images


def names(found: Embeddings) -> list[str]:
    return [Path(error.path).name for error in found.failed]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_row_is_what_the_embedder_says_of_that_image(folder: Path, tmp_path: Path, dtype: str) -> None:
    images, embedder = listed(folder), Histogram()
    found = embed_images(
        images, tmp_path / "out", embedder, EmbedOptions(workers=2, batch=3, quiet=True, dtype=dtype)
    )
    assert (found.features_ND.shape, str(found.features_ND.dtype)) == ((11, 8), dtype)
    assert isinstance(found.features_ND, np.memmap)
    assert found.done_N.tolist() == [i not in (4, 10) for i in range(11)]
    assert [Path(p).name for p in found.paths] == [f"{i:02d}.png" for i in range(11)]
    assert names(found) == ["04.png", "10.png"] and found.failed[1].stage == "decode"
    assert (found.embedded, found.seconds > 0) == (9, True)
    assert not found.features_ND[[4, 10]].any()
    for i in (0, 3, 5, 9):
        pixels = np.asarray(Image.open(folder / f"{i:02d}.png"))
        wanted = embedder.embed([Picture(pixels, 1, 1)])[0]
        np.testing.assert_allclose(found.features_ND[i], wanted, atol=1e-3 if dtype == "float16" else 1e-6)
    assert np.ptp(found.features_ND[found.done_N], axis=0).min() > 0.01, (
        "images differ, or nothing was tested"
    )


def test_what_is_there_is_not_embedded_again(folder: Path, tmp_path: Path) -> None:
    first = embed_images(listed(folder), tmp_path / "out", Histogram(), FLOAT32)
    embedder = Histogram(model="by another name")
    again = embed_images(listed(folder), tmp_path / "out", embedder, FLOAT32)
    assert embedder.seen == [] and again.embedded == 0
    assert again.features_ND.tobytes() == first.features_ND.tobytes()
    assert again.provenance == first.provenance == read_embeddings(tmp_path / "out").provenance
    json.dumps(again.provenance)
    facts = json.loads((tmp_path / "out" / "embeddings.json").read_text())
    assert facts["embedder"]["bins"] == [8] and facts["versions"] and facts["created"]


def test_a_batch_that_is_not_settled_is_embedded_whole(folder: Path, tmp_path: Path) -> None:
    embed_images(listed(folder), tmp_path, Histogram(), FLOAT32)
    state = np.load(tmp_path / "state.npy", mmap_mode="r+")
    state[6] = 0
    state.flush()
    embedder = Histogram()
    assert embed_images(listed(folder), tmp_path, embedder, FLOAT32).embedded == 1
    assert embedder.seen == [3], "5, 6 and 7, as at the first time; 4 is no image"


def touch(folder: Path) -> None:
    os.utime(folder / "03.png", ns=(1, 1))


def shorten(folder: Path) -> None:
    state = os.stat(folder / "03.png")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:-20])
    os.utime(folder / "03.png", ns=(state.st_atime_ns, state.st_mtime_ns))


def rename(folder: Path) -> None:
    (folder / "03.png").rename(folder / "zz.png")


def remove_many(folder: Path) -> None:
    for i in range(5):
        (folder / f"{i:02d}.png").unlink()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (touch, r"1 file changed in size or time \([^,]*03\.png\)"),
        (shorten, r"1 file changed in size or time"),
        (rename, r"1 file gone \([^,]*03\.png\); 1 file new \([^,]*zz\.png\)"),
        (remove_many, r"5 files gone \([^,]*00\.png, [^,]*01\.png, [^,]*02\.png, …\)"),
    ],
)
def test_a_collection_that_has_changed_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    before = embed_images(listed(folder), tmp_path / "out", Histogram(), FLOAT32)
    change(folder)
    with pytest.raises(UsageError, match=told):
        embed_images(listed(folder), tmp_path / "out", Histogram(), FLOAT32)
    assert read_embeddings(tmp_path / "out").provenance == before.provenance
    anew = EmbedOptions(batch=4, quiet=True, dtype="float32", overwrite=True)
    after = embed_images(listed(folder), tmp_path / "out", Histogram(), anew)
    assert len(after.paths) == len(listed(folder)) == after.embedded + len(after.failed)


def test_another_order_embedder_or_type_is_refused(folder: Path, tmp_path: Path) -> None:
    images = listed(folder)
    embed_images(images, tmp_path, Histogram(), FLOAT32)
    with pytest.raises(UsageError, match="same files in another order"):
        embed_images(images[::-1], tmp_path, Histogram(), FLOAT32)
    with pytest.raises(UsageError, match=r"embedder \(histogram then, differs in bins, sha\)"):
        embed_images(images, tmp_path, Histogram(bins=9, sha="x"), FLOAT32)
    with pytest.raises(UsageError, match=r"dtype \(float32 then\)"):
        embed_images(images, tmp_path, Histogram(), EmbedOptions(quiet=True))


def test_members_of_an_archive_have_its_time_of_change(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "photos.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, "photos")
    images = find_images([str(archive)]).images
    assert embed_images(images, tmp_path / "out", Histogram(), FLOAT32).embedded == 9
    os.utime(archive, ns=(5, 5))
    with pytest.raises(UsageError, match="11 files changed in size or time"):
        embed_images(images, tmp_path / "out", Histogram(), FLOAT32)


def is_third(one: Picture) -> bool:
    return one.width == 43


def spoil(value: float) -> Callable[[Picture, np.ndarray], None]:
    def harm(one: Picture, row: np.ndarray) -> None:
        if is_third(one):
            row *= value

    return harm


def refuse(one: Picture, row: np.ndarray) -> None:
    if is_third(one):
        raise DataError("it is cursed")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (spoil(np.nan), "an embedding that is not finite"),
        (spoil(0), "an embedding of length 0"),
        (spoil(3), "an embedding of length 3"),
        (refuse, "it is cursed"),
    ],
)
def test_an_embedding_that_is_none_costs_its_image_only(
    folder: Path, tmp_path: Path, harm: Callable[[Picture, np.ndarray], None], reason: str
) -> None:
    found = embed_images(listed(folder), tmp_path, Broken(harm), FLOAT32)
    assert names(found) == ["03.png", "04.png", "10.png"]
    assert (found.failed[0].stage, found.failed[0].reason) == ("infer", reason)
    assert not found.features_ND[3].any() and found.done_N.sum() == 8


@pytest.mark.parametrize("batch", [2, 64])
def test_an_embedder_that_refuses_everything_is_to_blame_and_not_the_images(
    folder: Path, tmp_path: Path, batch: int
) -> None:
    def harm(one: Picture, row: np.ndarray) -> None:
        row[0] = np.inf

    options = EmbedOptions(batch=batch, quiet=True, dtype="float32")
    with pytest.raises(EnvironmentError_, match=r"refused (8|9) images one after the other.*not finite"):
        embed_images(listed(folder), tmp_path, Broken(harm), options)
    found = embed_images(listed(folder), tmp_path, Histogram(), options)
    assert found.done_N.sum() == 9, "nothing was recorded about them"


def test_refusals_between_which_others_are_taken_are_the_images_own(tmp_path: Path) -> None:
    def harm(one: Picture, row: np.ndarray) -> None:
        if one.width % 2:
            row[0] = np.nan

    for i in range(24):
        Image.fromarray(picture(40 + i, 30, seed=i)).save(tmp_path / f"{i:02d}.png")
    options = EmbedOptions(batch=1, quiet=True)
    found = embed_images(listed(tmp_path), tmp_path / "out", Broken(harm), options)
    assert found.done_N.tolist() == [True, False] * 12 and len(found.failed) == 12


def test_an_engine_without_memory_ends_the_run_and_it_continues(folder: Path, tmp_path: Path) -> None:
    def harm(one: Picture, row: np.ndarray) -> None:
        if one.width == 47:
            raise EnvironmentError_("out of memory")

    with pytest.raises(EnvironmentError_, match="out of memory"):
        embed_images(listed(folder), tmp_path, Broken(harm), FLOAT32)
    assert read_embeddings(tmp_path).failed == []
    assert embed_images(listed(folder), tmp_path, Histogram(), FLOAT32).done_N.sum() == 9


def test_nothing_to_embed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no images"):
        embed_images([], tmp_path, Histogram(), FLOAT32)
    missing = [ImageRef(f"{i}", str(tmp_path / f"{i}")) for i in range(20)]
    with pytest.raises(DataError, match="not one of 20 images.*0: No such file"):
        embed_images(missing, tmp_path / "out", Histogram(), FLOAT32)
    for wrong in ({"batch": 0}, {"workers": -1}, {"dtype": "int8"}):
        with pytest.raises(UsageError, match="float16, float32"):
            EmbedOptions(**wrong)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda f: (f / "embeddings.json").unlink(), DataError, "no embeddings in"),
        (lambda f: (f / "embeddings.npy").write_bytes(b""), DataError, "cannot read .*embeddings.npy"),
        (lambda f: (f / "paths.parquet").unlink(), DataError, "cannot read .*paths.parquet"),
        (
            lambda f: (f / "embeddings.json").write_text('{"schema": 9}'),
            ArtifactError,
            "embedding again with overwrite",
        ),
    ],
)
def test_damaged_files_are_named(
    folder: Path, tmp_path: Path, harm: Callable[[Path], None], error: type[ClipletError], message: str
) -> None:
    embed_images(listed(folder), tmp_path / "out", Histogram(), FLOAT32)
    harm(tmp_path / "out")
    with pytest.raises(error, match=message):
        read_embeddings(tmp_path / "out")


@pytest.mark.parametrize("name", ["embeddings.npy", "state.npy"])
def test_what_is_cut_off_is_refused_and_not_filled_up(name: str, folder: Path, tmp_path: Path) -> None:
    images, out = listed(folder), tmp_path / "out"
    whole = embed_images(images, out, Histogram(), FLOAT32).features_ND.tobytes()
    size = (out / name).stat().st_size
    os.truncate(out / name, size - 3)
    with pytest.raises(DataError, match=f"cannot read .*{name}") as e:
        embed_images(images, out, Histogram(), FLOAT32)
    assert e.value.fix == "run the embedding again with overwrite"
    assert (out / name).stat().st_size == size - 3
    again = embed_images(images, out, Histogram(), EmbedOptions(**{**vars(FLOAT32), "overwrite": True}))
    assert again.features_ND.tobytes() == whole


def test_failed_images_are_tried_again_where_that_is_asked(folder: Path, tmp_path: Path) -> None:
    embed_images(listed(folder), tmp_path / "out", Broken(refuse), FLOAT32)
    found = embed_images(listed(folder), tmp_path / "out", Histogram(), FLOAT32)
    assert names(found) == ["03.png", "04.png", "10.png"]
    retried = EmbedOptions(**{**vars(FLOAT32), "retry_failed": True})
    again = embed_images(listed(folder), tmp_path / "out", Histogram(), retried)
    assert names(again) == ["04.png", "10.png"] and again.embedded == 1


def test_a_full_disk_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        with bank_files.explained_os_errors(path):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(bank_files, "sync", full)
        with pytest.raises(EnvironmentError_, match="no space left while writing"):
            embed_images(listed(folder), tmp_path / "out", Histogram(), FLOAT32)
    assert embed_images(listed(folder), tmp_path / "out", Histogram(), FLOAT32).embedded == 9


# It flushes after each batch, says that it begins with one, and waits to be killed in the one that it is told to.
SLOW = """
import sys
from pathlib import Path
import numpy as np
from cliplet.images import find_images
from cliplet.train import embeddings
embeddings.FLUSH_EVERY_S = 0.0
class Slow:
    identity, width, room = {"model": "slow"}, 16, {"fit": 64}
    batches = 0
    def embed(self, pictures):
        print("batch", flush=True)
        self.batches += 1
        if self.batches == int(sys.argv[3]):
            sys.stdin.read()
        # Rounding that depends on the company of an image, as matrix products have it.
        rows = np.stack([p.pixels.reshape(-1)[:16].astype(np.float32) + len(pictures) for p in pictures])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
images = find_images([sys.argv[1]]).images
options = embeddings.EmbedOptions(batch=3, quiet=True, dtype="float32")
print(embeddings.embed_images(images, Path(sys.argv[2]), Slow(), options).embedded)
"""


def test_a_killed_run_continues_and_ends_with_the_rows_of_an_undisturbed_one(
    folder: Path, tmp_path: Path
) -> None:
    for i in range(11, 40):
        Image.fromarray(picture(30, 30, seed=i)).save(folder / f"{i:02d}.png")

    def command(out: str, waits_in: str) -> list[str]:
        return [sys.executable, "-c", SLOW, str(folder), str(tmp_path / out), waits_in]

    whole = subprocess.run(command("whole", "0"), capture_output=True, text=True, check=True)
    assert whole.stdout.splitlines()[-1] == "38"
    done = 0
    for batches in (4, 3):
        arguments = command("killed", str(batches))
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(batches):
                assert process.stdout.readline() == "batch\n"
            process.kill()
        found = read_embeddings(tmp_path / "killed")
        assert done < found.done_N.sum() < 38
        done = int(found.done_N.sum())
    last = subprocess.run(command("killed", "0"), capture_output=True, text=True, check=True)
    assert 0 < int(last.stdout.splitlines()[-1]) <= 38 - done + 2
    one, other = read_embeddings(tmp_path / "whole"), read_embeddings(tmp_path / "killed")
    assert one.features_ND.tobytes() == other.features_ND.tobytes()
    assert one.provenance == other.provenance and one.failed == other.failed
    assert [f.name for f in (tmp_path / "killed").glob("*.tmp")] == []
