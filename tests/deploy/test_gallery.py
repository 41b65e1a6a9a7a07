"""The gallery: one file that opens offline, shows what the run found, and trusts no name."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import tarfile
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import open_chromium
from PIL import Image
from running import within

from cliplet.deploy.gallery import GalleryOptions, quantised_scores, shown_statement, spread, write_gallery
from cliplet.errors import ClipletError, DataError, EnvironmentError_, UsageError
from cliplet.labels import ErrorRecord, LabelRecord, LabelStore

CLASSES = ["cat", "dog", "<b>bird</b>"]
THRESHOLDS = [0.3, 0.5, 0.2]
# On a disk: a folder `<script>alert(1)<` with a file `script>.jpg`.
SCRIPT_PATH = "<script>alert(1)</script>.jpg"
IMG_NAME = "<img src=x onerror=alert(1)>.jpg"
UNICODE_NAME = "Ünïcode 日本語 \u202eflipped.jpg"
# Scores of cat, dog and bird; the thresholds make the labels.
SCORES: dict[str, tuple[float, float, float]] = {
    "a cat.jpg": (0.9, 0.1, 0.01),
    "both.jpg": (0.6, 0.55, 0.0),
    "nearly a dog.jpg": (0.05, 0.45, 0.02),
    "sub/bird.png": (0.02, 0.03, 0.8),
    "nothing.jpg": (0.001, 0.002, 0.003),
    "moved.jpg": (0.7, 0.0, 0.0),
    UNICODE_NAME: (0.0, 0.9, 0.0),
    "shard.tar::inside.jpg": (0.31, 0.0, 0.0),
    SCRIPT_PATH: (0.95, 0.0, 0.0),
    IMG_NAME: (0.0, 0.0, 0.25),
}


def picture(color: tuple[int, int, int] = (200, 90, 40)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (400, 300), color).save(data, "JPEG")
    return data.getvalue()


def record(path: str, scores: Sequence[float]) -> LabelRecord:
    best_first = np.argsort(-np.asarray(scores))
    labels = tuple(CLASSES[c] for c in best_first if scores[c] >= THRESHOLDS[c])
    return LabelRecord(path, 400, 300, labels, np.asarray(scores, np.float32), "fake-model", 0.01)


def store(
    folder: Path, records: Sequence[LabelRecord], errors: Sequence[ErrorRecord] = (), **run: object
) -> Path:
    settings = {
        "schema": 1,
        "fingerprint": {},
        "classes": CLASSES,
        "thresholds": THRESHOLDS,
        "cwd": "/",
        **run,
    }
    with LabelStore(folder) as written:
        written.begin(settings, overwrite=True)
        written.write_part(records)
        written.write_errors(errors)
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of labels of a small, hostile collection; the images are named relative to their folder."""
    images = tmp_path_factory.mktemp("images")
    for path in SCORES:
        file = images / path
        if "::" in path:
            with tarfile.open(images / "shard.tar", "w") as tar:
                member = tarfile.TarInfo("inside.jpg")
                member.size = len(picture())
                tar.addfile(member, io.BytesIO(picture()))
        elif path != "moved.jpg":
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(picture())
    errors = [
        ErrorRecord("torn<i>.jpg", "decode", "<!--<script </script><script>alert(2)</script>"),
        ErrorRecord("locked.jpg", "read", "permission denied"),
        ErrorRecord("a cat.jpg", "read", "busy, and labelled by a later try"),
    ]
    records = [record(path, scores) for path, scores in SCORES.items()]
    return store(tmp_path_factory.mktemp("labels"), records, errors, cwd=str(images))


def blocks(html: Path) -> dict[str, Any]:
    """The data blocks of a page, by id."""
    text = html.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', text, re.DOTALL)
    return {name: json.loads(body) for name, body in found}


# The file.


def test_summary_says_what_was_written(collection: Path, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "gallery.html"
    summary = write_gallery(collection, out)
    assert summary.file == out and summary.bytes == out.stat().st_size
    assert (summary.shown, summary.total, summary.errors, summary.errors_shown) == (10, 10, 2, 2)
    assert summary.without_thumbnail == 1
    assert summary.statement == "10 images, all shown"
    assert [p.name for p in out.parent.iterdir()] == ["gallery.html"], "no temporary file is left"


def test_thumbnails_are_small_jpegs_and_the_moved_image_has_a_reason(
    collection: Path, tmp_path: Path
) -> None:
    write_gallery(collection, tmp_path / "g.html", GalleryOptions(thumb=64))
    data = blocks(tmp_path / "g.html")
    for (path, *_), made in zip(data["gallery-data"]["rows"], data["thumbs-0"], strict=True):
        if path == "moved.jpg":
            assert made["missing"]
            continue
        image = Image.open(io.BytesIO(base64.b64decode(made)))
        assert (image.format, image.size) == ("JPEG", (64, 48)), path
        red, _, blue = np.asarray(image.convert("RGB"))[24, 32]
        assert red > 150 > blue, path


def test_archives_that_changed_have_reasons(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "here.tar.gz", "w:gz") as tar:
        for name in ("x.jpg", "d/y.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(picture())
            tar.addfile(member, io.BytesIO(picture()))
    paths = ["here.tar.gz::d/y.jpg", "here.tar.gz::taken out.jpg", "away.tar::x.jpg", "here.tar.gz::x.jpg"]
    labels = store(tmp_path / "labels", [record(path, (0, 0, 0)) for path in paths], cwd=str(tmp_path))
    assert write_gallery(labels, tmp_path / "g.html").without_thumbnail == 2
    first, taken, away, last = blocks(tmp_path / "g.html")["thumbs-0"]
    assert isinstance(first, str) and isinstance(last, str)
    assert taken["missing"] == "not in the archive any more"
    assert "does not exist" in away["missing"]


def test_a_name_that_is_not_utf8_is_found(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(picture())
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    labels = store(tmp_path / "labels", [record(str(tmp_path / "caf\\xe9.jpg"), (0, 0, 0))])
    assert write_gallery(labels, tmp_path / "g.html").without_thumbnail == 0


def test_page_refuses_every_request(collection: Path, tmp_path: Path) -> None:
    write_gallery(collection, tmp_path / "g.html")
    text = (tmp_path / "g.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy and policy.count("'sha256-") == 2
    assert "://" not in text.replace("fake-model", "")


def test_sample_is_spread_and_stated(tmp_path: Path) -> None:
    records = [record(f"{n:04}.jpg", (0.9, 0, 0)) for n in range(1000)]
    labels = store(tmp_path / "labels", records)
    summary = write_gallery(labels, tmp_path / "g.html", GalleryOptions(limit=10))
    assert (summary.shown, summary.total) == (10, 1000)
    data = blocks(tmp_path / "g.html")["gallery-data"]
    assert data["statement"] == summary.statement
    assert summary.statement == "10 of 1,000 images shown, spread evenly over the collection"
    numbers = [int(row[0][:4]) for row in data["rows"]]
    assert numbers[0] == 0 and numbers[-1] >= 800 and np.diff(numbers).max() <= 2 * 1000 / 10


@pytest.mark.parametrize(
    ("count", "limit"), [(0, 3), (1, 3), (3, 3), (4, 3), (5, 3), (6, 3), (1000, 7), (9, 1)]
)
def test_spread(count: int, limit: int) -> None:
    kept, total = spread(range(count), limit)
    assert total == count and len(kept) == min(count, limit) and kept == sorted(set(kept))
    if count > limit:
        gaps = np.diff([*kept, count])
        assert gaps.max() <= 2 * count / limit + 1


@pytest.mark.parametrize(
    ("shown", "total", "words"),
    [(0, 0, "0 images, all shown"), (1, 1, "1 image, shown"), (5, 1234, "5 of 1,234 images shown, spread")],
)
def test_statement(shown: int, total: int, words: str) -> None:
    assert shown_statement(shown, total).startswith(words)


def test_memory_does_not_grow_with_the_collection(tmp_path: Path) -> None:
    scores = np.full(3, 0.1, np.float32)
    records = [LabelRecord(f"{n}.jpg", 4, 4, (), scores, "m", 0) for n in range(2000)]
    peaks = []
    for parts in (2, 8):
        labels = store(tmp_path / str(parts), records)
        for number in range(1, parts):
            shutil.copy(labels / "labels/part-000000.parquet", labels / f"labels/part-{number:06}.parquet")
        tracemalloc.start()
        summary = write_gallery(labels, tmp_path / "g.html", GalleryOptions(limit=20))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert summary.total == 2000 * parts
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize("seed", range(3))
def test_stored_scores_keep_every_label(seed: int) -> None:
    """The page tags by comparing steps; at the thresholds of the run it must say what the run said."""
    rng = np.random.default_rng(seed)
    thresholds = rng.random(3)
    near = thresholds + rng.integers(-2, 3, (500, 3)) * 10.0 ** -rng.integers(4, 9, (500, 3))
    rows = []
    for scores in np.clip(near, 0, 1).astype(np.float32):
        labels = tuple(name for c, name in enumerate(CLASSES) if scores[c] >= thresholds[c])
        rows.append(LabelRecord("x", 1, 1, labels, scores, "m", 0))
    steps_NC = quantised_scores(rows, CLASSES, thresholds)
    tagged_NC = steps_NC >= np.ceil(thresholds * 65535)
    for row, tagged, steps in zip(rows, tagged_NC, steps_NC, strict=True):
        assert {CLASSES[c] for c in np.flatnonzero(tagged)} == set(row.labels)
        assert np.abs(steps / 65535 - row.scores).max() < 3 / 65535


def test_truth_goes_in_by_path(collection: Path, tmp_path: Path) -> None:
    truth = {"a cat.jpg": {"cat"}, "both.jpg": {"cat", "unicorn"}}
    write_gallery(collection, tmp_path / "g.html", GalleryOptions(truth=truth))
    data = blocks(tmp_path / "g.html")["gallery-data"]
    by_path = dict(zip([row[0] for row in data["rows"]], data["truth"], strict=True))
    assert by_path["a cat.jpg"] == [0] and by_path["both.jpg"] == [0] and by_path["nothing.jpg"] is None
    assert data["truthUnknown"] == ["unicorn"]


def test_empty_collection(tmp_path: Path) -> None:
    labels = store(tmp_path / "labels", [], [ErrorRecord("a.jpg", "read", "gone")])
    assert write_gallery(labels, tmp_path / "g.html").shown == 0


@pytest.mark.parametrize(
    ("run", "records", "options", "error"),
    [
        ({"classes": []}, [], {}, DataError),
        ({"thresholds": [0.5]}, [], {}, DataError),
        ({}, [LabelRecord("x.jpg", 1, 1, (), np.zeros(2, np.float32), "m", 0)], {}, DataError),
        ({}, [LabelRecord("x.jpg", 1, 1, ("owl",), np.zeros(3, np.float32), "m", 0)], {}, DataError),
        ({}, [], {"limit": 0}, UsageError),
        ({}, [], {"thumb": 5000}, UsageError),
    ],
)
def test_refusals(
    run: Mapping[str, Any],
    records: Sequence[LabelRecord],
    options: dict[str, Any],
    error: type[ClipletError],
    tmp_path: Path,
) -> None:
    labels = store(tmp_path / "labels", records, **run)
    with pytest.raises(error):
        write_gallery(labels, tmp_path / "g.html", GalleryOptions(**options))
    assert not (tmp_path / "g.html").exists()


def test_no_labels_and_no_place_to_write(collection: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write_gallery(tmp_path, tmp_path / "g.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_):
        write_gallery(collection, tmp_path / "file" / "g.html")


# The page, in a browser.


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_chromium() as browser:
        yield browser


class Opened:
    """A page opened from the disk without a network, and all that it complained of or asked for."""

    def __init__(self, browser: Any, file: Path) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(offline=True, viewport={"width": 1300, "height": 900})
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self.refuse)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def refuse(self, dialog: Any) -> None:
        self.complaints.append(dialog.message)
        dialog.dismiss()

    def names(self) -> list[str]:
        return self.page.locator(".tile .name").all_inner_texts()

    def tags(self, name: str) -> list[str]:
        tile = self.page.locator(".tile").filter(has=self.page.get_by_text(name, exact=True))
        return [text.replace("\n", " ") for text in tile.locator(".tag").all_inner_texts()]

    def slide(self, slider: str, to: float) -> None:
        """Move a slider as a hand does: set its value, then let the page hear of it."""
        move = "(s, to) => { s.value = to; s.dispatchEvent(new Event('input', {bubbles: true})); }"
        self.page.locator(slider).evaluate(move, to)
        self.next_frame()

    def next_frame(self) -> None:
        self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )


@pytest.fixture
def opened(chromium: Any, collection: Path, tmp_path: Path) -> Iterator[Opened]:
    write_gallery(collection, tmp_path / "g.html", GalleryOptions(title="Trip <1>"))
    page = Opened(chromium, tmp_path / "g.html")
    yield page
    # Whatever a test did, the page asked for nothing but itself and its own data, and did not complain.
    assert [url[:60] for url in page.requests if not url.startswith(("file:///", "data:"))] == []
    assert [url for url in page.requests if url.startswith("file:///")] == [(tmp_path / "g.html").as_uri()]
    assert page.complaints == []
    page.context.close()


@pytest.mark.browser
def test_opens_offline_with_every_image(opened: Opened) -> None:
    page = opened.page
    assert page.title() == "Trip <1> · cliplet gallery"
    assert page.locator("h1").inner_text() == "Trip <1>"
    header = page.locator("header").inner_text()
    assert "fake-model" in header and "10 images, all shown" in header and "2 errors" in header
    assert page.locator(".tile").count() == 10
    widths = page.locator(".tile img").evaluate_all(
        "images => Promise.all(images.map(async image => { await image.decode(); return image.naturalWidth; }))"
    )
    assert widths == [256] * 9
    assert opened.tags("both.jpg") == ["cat 0.60", "dog 0.55"]
    assert opened.tags("inside.jpg") == ["cat 0.31"]


@pytest.mark.browser
def test_names_are_only_text(opened: Opened) -> None:
    assert {"script>.jpg", IMG_NAME, UNICODE_NAME} <= set(opened.names())
    page = opened.page
    assert page.locator("script:not([type])").count() == 1, "no script but the page's own"
    assert page.locator(".tile script, .tile .about img, td i, td b, #class-list b").count() == 0
    assert "<b>bird</b>" in page.locator("#class-list").inner_text()
    page.locator(".tile", has_text="script>.jpg").click()
    assert page.locator("#viewer-path").inner_text() == SCRIPT_PATH
    page.keyboard.press("Escape")
    page.locator(".tile", has_text="onerror").click()
    assert page.locator("#viewer-name").inner_text() == IMG_NAME


@pytest.mark.browser
def test_moved_image_is_a_placeholder_with_its_reason(opened: Opened) -> None:
    tile = opened.page.locator(".tile").filter(has_text="moved.jpg")
    assert tile.locator("img").count() == 0
    assert "No picture" in tile.inner_text() and len(tile.locator(".gone span").inner_text()) > 5
    assert opened.tags("moved.jpg") == ["cat 0.70"]


@pytest.mark.browser
def test_errors_are_listed(opened: Opened) -> None:
    page = opened.page
    page.get_by_text("2 files could not be labelled").click()
    rows = [row.split("\t") for row in page.locator("#error-rows tr").all_inner_texts()]
    assert rows == [
        ["locked.jpg", "read", "permission denied"],
        ["torn<i>.jpg", "decode", "<!--<script </script><script>alert(2)</script>"],
    ]


@pytest.mark.browser
def test_filter_by_class(opened: Opened) -> None:
    page = opened.page
    dog = page.get_by_role("button", name=re.compile(r"^dog"))
    assert dog.inner_text().split() == ["dog", "2"]
    dog.click()
    assert set(opened.names()) == {"both.jpg", UNICODE_NAME}
    assert page.get_by_role("status").inner_text() == "2 images of the 10 on this page"
    dog.click()
    assert len(opened.names()) == 10


@pytest.mark.browser
def test_filter_nothing_tagged_and_search(opened: Opened) -> None:
    page = opened.page
    page.get_by_label("Show").select_option("none")
    assert set(opened.names()) == {"nothing.jpg", "nearly a dog.jpg"}
    page.get_by_label("File name").fill("NEARLY")
    assert opened.names() == ["nearly a dog.jpg"]
    page.get_by_label("File name").fill("no such file")
    assert opened.names() == [] and page.get_by_text("No image fits").is_visible()


@pytest.mark.browser
def test_sorting(opened: Opened) -> None:
    sort = opened.page.get_by_label("Sort by")
    assert opened.names()[-1] != "a cat.jpg"
    sort.select_option("best")
    assert opened.names()[1:3] == ["a cat.jpg", UNICODE_NAME]
    sort.select_option("doubt")
    assert opened.names()[0] == "inside.jpg", "0.31 at a threshold of 0.3"


@pytest.mark.browser
def test_slider_tags_again(opened: Opened) -> None:
    page = opened.page
    assert page.locator("#shift-value").inner_text() == "0.20 to 0.50"
    assert opened.tags("nearly a dog.jpg") == ["nothing tagged"]
    opened.slide("#shift", -0.3)
    assert opened.tags("nearly a dog.jpg") == ["dog 0.45"]
    opened.slide("#shift", 1.2)
    assert opened.tags("both.jpg") == ["cat 0.60"], "0.3 became 0.587 and 0.5 became 0.769"
    page.get_by_role("button", name="Back to the run").click()
    opened.next_frame()
    assert page.locator("#shift-value").inner_text() == "0.20 to 0.50"
    assert opened.tags("both.jpg") == ["cat 0.60", "dog 0.55"]


@pytest.mark.browser
def test_slider_of_one_class(opened: Opened) -> None:
    opened.page.get_by_role("button", name=re.compile(r"^dog")).click()
    assert "“dog”" in opened.page.locator("#one-class").inner_text()
    opened.slide("#class-shift", -0.3)
    assert set(opened.names()) == {"both.jpg", UNICODE_NAME, "nearly a dog.jpg"}
    assert opened.tags("both.jpg") == ["cat 0.60", "dog 0.55"]


@pytest.mark.browser
def test_large_view_by_keyboard(opened: Opened) -> None:
    page = opened.page
    names = opened.names()
    page.locator(".tile .open").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#viewer").is_visible()
    for _ in range(len(names) + 2):
        page.keyboard.press("ArrowRight")
    assert page.locator("#viewer-name").inner_text() == names[-1], "stops at the end"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#viewer-name").inner_text() == names[-2]
    assert page.locator(".bar").count() == 3
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    # The focus is where the view ended, once the browser has told that it is closed.
    page.wait_for_function(
        "name => (document.activeElement.getAttribute('aria-label') || '').startsWith(name)", arg=names[-2]
    )


@pytest.mark.browser
def test_truth_is_marked(chromium: Any, collection: Path, tmp_path: Path) -> None:
    truth = {"a cat.jpg": {"cat"}, "both.jpg": {"cat"}, "nearly a dog.jpg": {"dog"}}
    write_gallery(collection, tmp_path / "g.html", GalleryOptions(truth=truth))
    opened = Opened(chromium, tmp_path / "g.html")
    page = opened.page
    kinds = {kind: page.locator(f".tile .tag.{kind}").count() for kind in ("correct", "false", "missed")}
    assert kinds == {"correct": 2, "false": 1, "missed": 1}
    assert "missed: there, not tagged" in page.get_by_label("Legend").inner_text()
    assert (
        "67 % of the tags are correct, 67 % of what is there is tagged" in page.locator("header").inner_text()
    )
    page.get_by_label("Show").select_option("missed")
    assert opened.names() == ["nearly a dog.jpg"]
    page.get_by_label("Show").select_option("false")
    assert opened.names() == ["both.jpg"]
    assert opened.complaints == []


@pytest.mark.browser
def test_many_images_come_while_scrolling(chromium: Any, tmp_path: Path) -> None:
    image = tmp_path / "one.jpg"
    image.write_bytes(picture())
    labels = store(tmp_path / "labels", [record(str(image), (0.9, 0, 0))] * 600)
    summary = write_gallery(labels, tmp_path / "g.html", GalleryOptions(limit=500, thumb=32))
    opened = Opened(chromium, tmp_path / "g.html")
    assert summary.statement in opened.page.locator("header").inner_text()
    assert opened.page.locator(".tile").count() < 500
    opened.page.keyboard.press("End")

    def all_there() -> bool:
        opened.page.evaluate("scrollTo(0, document.body.scrollHeight)")
        opened.page.wait_for_timeout(50)
        return bool(opened.page.locator(".tile").count() == 500)

    assert within(60, all_there)
    assert opened.complaints == []
