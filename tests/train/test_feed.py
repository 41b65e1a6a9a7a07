"""Batches: which images when, what their pixels are, and that threads and caches change nothing."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cliplet.images import ImageError, ImageRef
from cliplet.train import feed
from cliplet.train.feed import (
    ImageBatch,
    PixelCache,
    ahead,
    epoch_batches,
    image_batches,
    load_batch,
    share_of,
    squashed,
)

SIZE = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRef]:
    """Ten images; number 3 is no image, number 6 is not there."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(10):
        Image.fromarray(picture(40 + 7 * i, 90 - 5 * i, seed=i)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    (folder / "6.png").unlink()
    return [ImageRef(f"{i}.png", str(folder / f"{i}.png")) for i in range(10)]


@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(0, 2**40),
    st.integers(0, 1_000_000),
    st.integers(1, 5),
)
def test_an_epoch_sees_every_image_once_and_no_batch_has_a_lone_image(
    count: int, batch: int, seed: int, epoch: int, step: int
) -> None:
    indices = 3 + step * np.arange(count)
    batches = epoch_batches(indices, batch, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == indices.tolist()
    sizes = [len(b) for b in batches]
    assert all(size == batch for size in sizes[:-2])
    assert sizes[-1] <= batch + 1
    if count > 1 and batch > 1:
        assert min(sizes) > 1
    again = epoch_batches(indices, batch, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize(
    ("count", "batch", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [4, 5]), (10, 4, [4, 4, 2]), (4, 4, [4]), (5, 4, [5]), (1, 4, [1]), (3, 4, [3])],
)
def test_a_lone_last_image_joins_the_batch_before_it(count: int, batch: int, sizes: list[int]) -> None:
    assert [len(b) for b in epoch_batches(np.arange(count), batch, 0, 0)] == sizes


def test_the_order_is_decided_by_seed_and_epoch() -> None:
    orders = {
        tuple(np.concatenate(epoch_batches(np.arange(50), 8, seed, epoch)).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    np.random.seed(7)
    before = np.concatenate(epoch_batches(np.arange(50), 8, 1, 2))
    np.random.seed(8)
    assert np.array_equal(before, np.concatenate(epoch_batches(np.arange(50), 16, 1, 2)))


@given(st.integers(0, 40), st.integers(1, 6))
def test_shares_of_processes_are_the_batch(count: int, world: int) -> None:
    batch = np.random.default_rng(0).permutation(count)
    shares = [share_of(batch, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_pixels_are_pillows_and_failures_are_named_with_their_places(images: list[ImageRef]) -> None:
    wanted = np.array([5, 3, 0, 6, 9])
    batch = load_batch(images, wanted, SIZE)
    assert batch.indices_B.tolist() == [5, 0, 9] and batch.places_B.tolist() == [0, 2, 4]
    assert batch.pixels_BSS3.shape == (3, SIZE, SIZE, 3) and batch.pixels_BSS3.dtype == np.uint8
    for index, pixels in zip(batch.indices_B, batch.pixels_BSS3, strict=True):
        with Image.open(images[index].file) as image:
            found = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        # Images of more than twice the size are shrunk twice.
        assert np.abs(pixels.astype(int) - np.asarray(found)).max() <= 2
    assert [index for index, _ in batch.failed] == [3, 6]
    assert batch.failed[0][1].startswith("decode: ") and batch.failed[1][1].startswith("read: ")


def test_a_batch_of_which_nothing_is_left_is_empty_but_whole(images: list[ImageRef]) -> None:
    batch = load_batch(images, np.array([6, 3]), SIZE)
    assert batch.pixels_BSS3.shape == (0, SIZE, SIZE, 3)
    assert len(batch.indices_B) == len(batch.places_B) == 0 and len(batch.failed) == 2


@pytest.mark.parametrize("sides", [(SIZE, SIZE), (SIZE, 50), (20, 20), (50, 40)])
def test_squashed_is_one_bilinear_resize_of_images_that_are_not_much_larger(sides: tuple[int, int]) -> None:
    original = Image.fromarray(picture(*sides))
    file = io.BytesIO()
    original.save(file, "PNG")
    wanted = np.asarray(original.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    assert np.array_equal(squashed(file.getvalue(), SIZE), wanted)
    with pytest.raises(ImageError):
        squashed(file.getvalue()[:60], SIZE)


def facts(batches: Sequence[ImageBatch]) -> list[tuple[object, ...]]:
    return [(b.indices_B.tolist(), b.places_B.tolist(), b.pixels_BSS3.tobytes(), b.failed) for b in batches]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("limit", [None, 0, 4 * 3 * SIZE * SIZE, 10**9])
def test_threads_and_caches_change_nothing(images: list[ImageRef], workers: int, limit: int | None) -> None:
    batches = epoch_batches(np.arange(10), 3, 0, 0)
    wanted = facts(list(image_batches(images, batches, SIZE, 0)))
    cache = None if limit is None else PixelCache(limit)
    for _ in range(2):
        assert facts(list(image_batches(images, batches, SIZE, workers, cache))) == wanted


def test_a_cache_decodes_what_it_keeps_once_and_keeps_no_more_than_its_limit(
    images: list[ImageRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def noted(ref: ImageRef) -> bytes:
        read.append(ref.path)
        return Path(ref.file).read_bytes()

    monkeypatch.setattr(feed, "read_image", noted)
    cache = PixelCache(2 * 3 * SIZE * SIZE + 5)
    for _ in range(3):
        for ref in images[:3]:
            cache.squashed(ref, SIZE)
    assert read == ["0.png", "1.png", "2.png", "2.png", "2.png"]
    # Another size of the same image is another entry.
    assert cache.squashed(images[0], 4).shape == (4, 4, 3)
    assert read[-1] == "0.png"
    with pytest.raises(ImageError):
        cache.squashed(images[3], SIZE)


def test_a_cache_counts_an_image_once_that_two_threads_bring_at_the_same_time(
    images: list[ImageRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2, timeout=60)
    reads = 0

    def noted(ref: ImageRef) -> bytes:
        nonlocal reads
        reads += 1
        if reads <= 2:
            together.wait()
        return Path(ref.file).read_bytes()

    monkeypatch.setattr(feed, "read_image", noted)
    cache = PixelCache(2 * 3 * SIZE * SIZE)
    threads = [threading.Thread(target=cache.squashed, args=(images[0], SIZE)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.squashed(images[1], SIZE)
    reads = 10
    cache.squashed(images[1], SIZE)
    assert reads == 10, "there was room for both images"


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_an_error_where_it_belongs(workers: int) -> None:
    def make(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        if item == 12:
            raise ValueError("twelve")
        return item * item

    assert list(ahead(make, range(10), workers)) == [n * n for n in range(10)]
    seen = []
    with pytest.raises(ValueError, match="twelve"):
        for value in ahead(make, range(30), workers):
            seen.append(value)
    assert seen == [n * n for n in range(12)]


def test_whoever_stops_taking_stops_the_making() -> None:
    made: list[int] = []

    def make(item: int) -> None:
        made.append(item)
        time.sleep(1 if item else 0)

    taken = ahead(make, range(1000), 1)
    next(taken)
    assert isinstance(taken, Generator)
    taken.close()
    assert made in ([0], [0, 1]), "what was begun is ended, what waits is not begun"
