"""The page in a headless Chromium: what a person sees and does, with a fake tagger and once with a real server."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import open_chromium
from fake_backend import FakeBackend, card, png
from running import dashboard_metrics, quick
from served import STUDENT_CLASSES, make_student, make_teacher

from cliplet.deploy.page import PageOptions, make_app, run_page
from cliplet.deploy.page_backend import TritonBackend
from cliplet.deploy.repository import ServeSettings, plan_served, write_repository
from cliplet.deploy.server import TritonServer
from cliplet.errors import ServerError
from cliplet.triton_errors import ServerBusy

pytestmark = pytest.mark.browser
CAT = (204, 0, 0)  # cat 0.8, boat 0.8
DOG = (0, 204, 0)
NOTHING = (10, 10, 10)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_chromium() as browser:
        yield browser


class Visit:
    """A visit to a page that runs, and all that it complained of or asked for."""

    def __init__(self, browser: Any, backend: FakeBackend | None = None, **options: Any) -> None:
        self.backend = backend or FakeBackend()
        self.stack = ExitStack()
        app = make_app(self.backend, PageOptions(**{"ready_for_s": 0, **options}))
        self.running = self.stack.enter_context(run_page(app, "127.0.0.1", 0))
        self.context = browser.new_context(viewport={"width": 1300, "height": 900})
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def __enter__(self) -> Visit:
        self.page.goto(self.running.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
        self.stack.close()
        own = (f"http://127.0.0.1:{self.running.port}/", "data:", "blob:")
        assert [url for url in self.requests if not url.startswith(own)] == []
        # Refusals are complained of by the browser itself; nothing else may be.
        assert [text for text in self.complaints if "Failed to load resource" not in text] == []

    def choose(self, **images: bytes) -> None:
        files = [
            {"name": f"{name}.png", "mimeType": "image/png", "buffer": data} for name, data in images.items()
        ]
        self.page.set_input_files("#files", files)

    def bars(self) -> list[str]:
        self.page.locator(".bar").first.wait_for()
        return [text.replace("\n", " ") for text in self.page.locator("#bars .bar").all_inner_texts()]

    def tagged(self) -> list[str]:
        return self.page.locator(".bar.tagged bdi").all_inner_texts()

    def tile(self, name: str) -> Any:
        return self.page.locator(".tile").filter(has_text=f"{name}.png")

    def tags(self, name: str) -> str:
        return self.tile(name).locator(".tags").inner_text().replace("\n", " ")

    def slide(self, to: float) -> None:
        move = "(s, to) => { s.value = to; s.dispatchEvent(new Event('input', {bubbles: true})); }"
        self.page.locator("#shift").evaluate(move, to)
        self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def hand_over(self, event: str, name: str, data: bytes) -> None:
        """Drop or paste a file as a hand does."""
        self.page.evaluate(
            """([event, name, bytes]) => {
                const files = new DataTransfer();
                files.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
                const made = event === "paste"
                    ? new ClipboardEvent("paste", {clipboardData: files, bubbles: true, cancelable: true})
                    : new DragEvent(event, {dataTransfer: files, bubbles: true, cancelable: true});
                document.querySelector("main").dispatchEvent(made);
            }""",
            [event, name, list(data)],
        )


@pytest.fixture
def visit(chromium: Any) -> Iterator[Visit]:
    with Visit(chromium) as page:
        yield page


def test_one_image_shows_bars_against_thresholds(visit: Visit) -> None:
    page = visit.page
    assert page.get_by_text("Drop an image here").is_visible()
    visit.choose(cat=png(color=CAT))
    assert visit.bars() == ["cat tagged 0.800", "boat tagged 0.800", "dog 0.000", "<b>bird</b> 0.000"]
    assert visit.tagged() == ["cat", "boat"]
    marks = page.locator(".bar .track b").evaluate_all("marks => marks.map(m => m.style.left)")
    assert marks == ["30%", "40%", "50%", "20%"]
    assert not page.get_by_text("Drop an image here").is_visible()
    assert page.locator(".tile").count() == 0, "a single image needs no gallery"
    assert "60 × 40 pixels" in page.locator("#viewer-about").inner_text()
    facts = page.locator("header").inner_text()
    assert "pets" in facts and "onnx fp32 on cpu" in facts and "the whole image, 2 × 2 cells" in facts
    assert page.locator("#health").inner_text() == "ready"


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_other_ways_to_give_an_image(visit: Visit, way: str) -> None:
    if way == "drop":
        visit.hand_over("dragenter", "x.png", b"")
        assert "dropping" in visit.page.locator("body").get_attribute("class")
    visit.hand_over(way, "given.png", png(color=DOG))
    assert visit.bars()[0].startswith("dog")
    assert "dropping" not in (visit.page.locator("body").get_attribute("class") or "")


def test_one_of_ours(chromium: Any) -> None:
    with Visit(chromium, FakeBackend(replace(card(), max_pixels=1_000_000))) as visit:
        visit.page.locator("#empty").get_by_text("Try one of ours").click()
        assert visit.bars()
        assert re.fullmatch(r"scene-\d+\.png", visit.page.locator("#viewer-name").inner_text())


def test_views_are_drawn_over_the_image(visit: Visit) -> None:
    page = visit.page
    visit.choose(cat=png(color=CAT))
    visit.bars()
    assert page.locator("svg .view").count() == 0
    page.locator(".bar", has_text="cat").hover()
    assert page.locator("svg .view:not(.best)").count() == 4
    best = page.locator("svg .view.best")
    assert [best.get_attribute(k) for k in ("x", "y", "width", "height")] == ["30", "20", "30", "20"]
    assert (
        page.locator("#where").inner_text()
        == "cat: best seen in view 4 of 4 (0.80); in the whole image 0.40."
    )
    # Over the image, pixel for pixel.
    image, box = page.locator("#stand img").bounding_box(), best.bounding_box()
    scale = min((image["width"] - 40) / 60, (image["height"] - 40) / 40)
    assert abs(box["width"] - 30 * scale) < 4 and abs(box["height"] - 20 * scale) < 4
    assert abs(box["x"] + box["width"] - (image["x"] + image["width"] / 2 + 30 * scale)) < 4
    page.mouse.move(5, 5)
    assert page.locator("svg .view").count() == 0
    page.locator(".bar", has_text="boat").click()
    page.mouse.move(5, 5)
    assert page.locator("svg .view").count() == 5, "a click keeps it"


def test_activation_map_is_laid_over_the_image(chromium: Any) -> None:
    with Visit(chromium, FakeBackend(card("small", "classifier"))) as visit:
        page = visit.page
        visit.choose(cat=png(50, 40, color=CAT))
        visit.bars()
        page.locator(".bar", has_text="cat").hover()
        cam = page.locator("svg image.cam")
        assert [cam.get_attribute(k) for k in ("x", "y", "width", "height")] == ["0", "0", "50", "40"]
        assert page.locator("#where").inner_text().replace("\n", "").startswith("cat: activation from -1.2")
        hottest = page.evaluate(
            """async () => {
                const image = new Image();
                image.src = document.querySelector("svg image.cam").getAttribute("href");
                await image.decode();
                const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
                context.drawImage(image, 0, 0);
                const alpha = [...context.getImageData(0, 0, image.width, image.height).data].filter((_, k) => k % 4 === 3);
                const k = alpha.indexOf(Math.max(...alpha));
                return [image.width, image.height, k % image.width, Math.floor(k / image.width), Math.min(...alpha)];
            }"""
        )
        assert hottest == [5, 4, 3, 1, 0]


def test_slider_tags_again_and_comes_back(visit: Visit) -> None:
    page = visit.page
    visit.choose(dim=png(color=(100, 0, 0)))  # cat and boat 0.392: over 0.3, under 0.4
    visit.bars()
    assert visit.tagged() == ["cat"] and page.locator("#shift-value").inner_text() == "0.20 to 0.50"
    visit.slide(-1)
    assert visit.tagged() == ["cat", "boat"]
    visit.slide(2)
    assert visit.tagged() == []
    page.get_by_role("button", name="Back to the model’s thresholds").click()
    assert visit.tagged() == ["cat"] and page.locator("#shift-value").inner_text() == "0.20 to 0.50"


def test_several_images_become_a_gallery_with_filter(visit: Visit) -> None:
    page = visit.page
    visit.choose(a=png(color=CAT), b=png(color=DOG), c=png(color=NOTHING), d=b"no image")
    page.get_by_text("4 images, 1 could not be labelled").wait_for()
    assert visit.tags("a") == "cat 0.80 boat 0.80" and visit.tags("b") == "dog 0.80"
    assert visit.tags("c") == "nothing tagged" and "not an image" in visit.tags("d")
    dog = page.locator("#class-list").get_by_role("button", name=re.compile("^dog"))
    assert dog.inner_text().split() == ["dog", "1"]
    dog.click()
    assert page.locator(".tile .name").all_inner_texts() == ["b.png"]
    assert page.locator("#status").inner_text() == "1 image of 4, 1 could not be labelled"
    visit.slide(4.9)
    assert page.get_by_text("No image has this label.").is_visible()
    dog.click()
    assert page.locator(".tile").count() == 4
    visit.tile("b").locator(".open").click()
    assert page.locator("#viewer-name").inner_text() == "b.png"
    page.get_by_role("button", name="Remove all").click()
    assert page.get_by_text("Drop an image here").is_visible()


def test_bad_images_say_why(chromium: Any) -> None:
    with Visit(chromium, max_bytes=2000) as visit:
        page = visit.page
        for data, says in [
            (b"", "zero bytes"),
            (png(101, 100), "decompression bomb"),
            (bytes(2001), "2,001 bytes"),
            (b"<!doctype html><p>", "looks like a web page"),
        ]:
            visit.choose(bad=data)
            page.locator("#stand .wrong").get_by_text(says).wait_for()
            page.get_by_role("button", name="Remove this image").click()


def test_names_are_only_text(chromium: Any) -> None:
    with Visit(chromium) as visit:
        name = "<img src=x onerror=alert(1)>"
        visit.choose(**{name: png(color=(0, 0, 204)), "other": png()})
        visit.page.get_by_text("2 images").wait_for()
        assert visit.page.locator("#viewer-name").inner_text() == f"{name}.png"
        assert visit.page.locator(".tile .about img, .tile b img, #bars b b, #class-list b").count() == 0
        assert "<b>bird</b>" in visit.bars()[0]


def test_keyboard(visit: Visit) -> None:
    page = visit.page
    visit.choose(a=png(color=CAT), b=png(color=DOG))
    page.get_by_text("2 images").wait_for()
    visit.bars()
    page.locator(".bar").first.focus()
    assert page.locator("#where").inner_text().startswith("cat:")
    page.keyboard.press("ArrowDown")
    assert page.locator("#where").inner_text().startswith("boat:")
    page.keyboard.press("Enter")
    assert page.locator(".bar[aria-pressed=true] bdi").all_inner_texts() == ["boat"]
    page.keyboard.press("ArrowRight")
    assert page.locator("#viewer-name").inner_text() == "b.png"
    assert page.locator(".bar[aria-pressed=true] bdi").all_inner_texts() == ["boat"], (
        "kept for the next image"
    )
    page.keyboard.press("ArrowRight")
    assert page.locator("#viewer-name").inner_text() == "b.png", "stops at the end"
    # Every control is reached, and one stop is enough for all bars.
    stops = page.evaluate(
        "() => [...document.querySelectorAll('#bars .bar')].filter(b => b.tabIndex === 0).length"
    )
    assert stops == 1
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select')].filter(e => e.offsetParent
            && !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_another_model_labels_them_again(chromium: Any) -> None:
    other = card("small", "classifier", classes=("kite", "leaf"))
    with Visit(chromium, FakeBackend(card(), other)) as visit:
        visit.choose(a=png(color=CAT), b=png(color=DOG))
        visit.page.get_by_text("2 images").wait_for()
        visit.page.get_by_label("Model").select_option("small")
        visit.tile("a").get_by_text("kite").wait_for()
        visit.tile("b").get_by_text("leaf").wait_for()
        assert visit.tags("a") == "kite 0.80"
        assert {model for model, *_ in visit.backend.seen[-2:]} == {"small"}


def test_a_server_that_is_not_ready_says_so_and_recovers(chromium: Any) -> None:
    backend = FakeBackend()
    backend.fail("pets", "no answer within 5 s")
    with Visit(chromium, backend) as visit:
        trouble = visit.page.get_by_role("alert")
        trouble.get_by_text("pets: no answer within 5 s").wait_for()
        visit.choose(cat=png(color=CAT))
        assert visit.page.locator("#viewer-about").inner_text() == "waiting"
        backend.heal()
        assert visit.bars()[0].startswith("cat")
        assert not trouble.is_visible() and visit.page.locator("#health").inner_text() == "ready"


def test_trouble_of_another_model_stops_nobody(chromium: Any) -> None:
    backend = FakeBackend(card(), card("small"))
    backend.fail("small", "died")
    with Visit(chromium, backend) as visit:
        visit.choose(cat=png(color=CAT))
        assert visit.bars()[0].startswith("cat")
        assert "small: died" in visit.page.get_by_role("alert").inner_text()


@pytest.mark.parametrize("error", [ServerBusy("the queue is full"), ServerError("gone")])
def test_what_cannot_be_taken_now_is_sent_again(chromium: Any, error: ServerError) -> None:
    with Visit(chromium) as visit:
        visit.backend.error = error
        visit.choose(cat=png(color=CAT))
        if isinstance(error, ServerBusy):
            visit.page.wait_for_timeout(300)
            assert visit.page.locator(".wrong").count() == 0
            visit.backend.error = None
            assert visit.bars()[0].startswith("cat")
        else:
            visit.page.locator("#stand .wrong").get_by_text("gone").wait_for()


def test_a_server_that_goes_away_and_comes_back(chromium: Any) -> None:
    with Visit(chromium) as visit:
        visit.page.locator("#dot.yes").wait_for()
        port = visit.running.port
        visit.stack.close()
        visit.choose(cat=png(color=CAT))
        visit.page.get_by_text("The server does not answer").wait_for()
        with run_page(make_app(FakeBackend()), "127.0.0.1", port):
            assert visit.bars()[0].startswith("cat")


def test_token_from_the_address_or_by_hand(chromium: Any) -> None:
    with Visit(chromium, token="sesame") as visit:
        visit.page.locator("#dot.yes").wait_for()
        assert "sesame" not in visit.page.url
        visit.choose(cat=png(color=CAT))
        assert visit.bars()
        visit.page.evaluate("sessionStorage.clear()")
        visit.page.goto(f"http://127.0.0.1:{visit.running.port}/?again")
        visit.page.get_by_text("This server wants a token.").wait_for()
        visit.page.get_by_label("Token").fill("sesame")
        visit.page.get_by_role("button", name="Go on").click()
        visit.choose(cat=png(color=CAT))
        assert visit.bars()
        assert all("sesame" not in url for url in visit.requests)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_and_contrast(chromium: Any, scheme: str) -> None:
    with Visit(chromium) as visit:
        visit.page.set_viewport_size({"width": 360, "height": 740})
        visit.page.emulate_media(color_scheme=scheme)
        visit.choose(**{"a" * 120: png(color=CAT), "b": png(color=DOG), "c": b"bad"})
        visit.page.get_by_text("3 images").wait_for()
        wide = visit.page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= 360
        assert not visit.page.get_by_label("Model", exact=True).is_visible()
        visit.page.get_by_role("button", name="Images, thresholds and classes").click()
        assert visit.page.locator("#shift").is_visible()
        assert visit.page.evaluate(CONTRAST) >= 4.5


# Least contrast of any text with what lies behind it, as WCAG counts it.
CONTRAST = """() => {
  const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255]; };
  let least = 99;
  for (const e of document.querySelectorAll("h1, h2, p, bdi, dt, dd, span, button, label, li")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.offsetParent || getComputedStyle(e).opacity !== "1" || e.closest("[aria-disabled=true], .spare")) continue;
    const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
    least = Math.min(least, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
  }
  return least;
}"""


# Once with a real server.


@contextmanager
def real_server(folder: Path, *, cache: bool) -> Iterator[TritonServer]:
    bundles = [("teacher", make_teacher(folder / "teacher")), ("student", make_student(folder / "student"))]
    settings = ServeSettings(threads=1, cache=cache)
    served, _ = plan_served(bundles, settings)
    repository = write_repository(served, folder / "repository", settings)
    with TritonServer(repository, quick(cache_bytes=(1 << 22) * cache)) as running:
        running.wait_ready()
        yield running


def test_page_beside_a_real_server(chromium: Any, tmp_path: Path) -> None:
    with real_server(tmp_path, cache=False) as server, Visit(chromium, TritonBackend(server)) as visit:  # type: ignore[arg-type]
        page = visit.page
        page.get_by_label("Model").select_option("teacher")
        visit.choose(red=png(300, 200, color=CAT), bad=b"no image")
        page.get_by_text("2 images, 1 could not be labelled").wait_for()
        assert len(visit.bars()) == 20 and "not an image" in visit.tags("bad")
        page.locator(".bar").first.hover()
        assert page.locator("svg .view:not(.best)").count() == 9
        page.get_by_label("Model").select_option("student")
        page.locator(".bar", has_text=STUDENT_CLASSES[0]).hover()
        page.locator("svg image.cam").wait_for(state="attached")
        assert len(visit.bars()) == len(STUDENT_CLASSES)


def test_server_that_keeps_its_answers_and_its_metrics(chromium: Any, tmp_path: Path) -> None:
    with real_server(tmp_path, cache=True) as server, Visit(chromium, TritonBackend(server)) as visit:  # type: ignore[arg-type]
        visit.choose(red=png(300, 200, color=CAT))
        assert visit.bars()
        assert "does not tell where" in visit.page.locator("#where").inner_text()
        url = f"http://127.0.0.1:{server.ports.metrics}/metrics"
        text = urllib.request.urlopen(url).read().decode()
    there = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    asked = dashboard_metrics()
    assert len(asked) > 12 and {name for name in asked if "gpu" not in name} - there == set()
