"""A tagger that the page can be tried with: it sees what the test put into it, as slowly as the test likes."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Sequence

import numpy as np
from PIL import Image

from cliplet.artifact import Manifest
from cliplet.deploy.health import Health, ModelHealth
from cliplet.deploy.page import Tagging
from cliplet.errors import ClipletError
from cliplet.images import decode_image
from cliplet.serving import ImageRecord, ModelCard
from cliplet.views import Preprocessing, Views, whole_image_box
from cliplet.vocabulary import ClassName, Vocabulary

CLASSES = ("cat", "dog", "<b>bird</b>", "boat")
THRESHOLDS = (0.3, 0.5, 0.2, 0.4)
FED = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "bilinear", "squash")


def card(name: str = "pets", kind: str = "snippets", classes: Sequence[str] = CLASSES) -> ModelCard:
    """The card of a bundle that does not exist."""
    manifest = Manifest(
        kind, f"{name}-original", "0" * 8, Vocabulary(tuple(map(ClassName, classes))), FED, {}, 1.0, None
    )
    return ModelCard(
        name=name,
        manifest=manifest,
        views="1+2x2" if kind == "snippets" else "1",
        thresholds=(THRESHOLDS * len(classes))[: len(classes)],
        threshold_source="the test",
        runtime="onnx",
        precision="fp32",
        device="cpu",
        max_batch_size=8,
        max_pixels=10_000,
    )


def png(width: int = 60, height: int = 40, color: tuple[int, int, int] = (200, 0, 0)) -> bytes:
    """An image of one colour, encoded; what the fake backend sees in it follows from the colour."""
    data = io.BytesIO()
    Image.new("RGB", (width, height), color).save(data, "PNG")
    return data.getvalue()


class FakeBackend:
    """Scores are the colour's red, green and blue as shares of 255, the same in each view but the last, which is sure.

    Attributes:
        cards: what it serves.
        health: what it says of itself.
        error: raised by every call that labels.
        hold: labelling waits while it is not set.
        hang_s: seconds that labelling, or a check, takes.
        seen: (model, bytes of the image, detail) of each call; `at_once` the most that were under way together.
    """

    def __init__(self, *cards: ModelCard) -> None:
        self.cards = list(cards or [card()])
        self.health = Health(tuple(ModelHealth(c.name, True, 0.01) for c in self.cards))
        self.error: ClipletError | Exception | None = None
        self.down = False
        self.hang_s = 0.0
        self.hold = threading.Event()
        self.hold.set()
        self.seen: list[tuple[str, int, bool]] = []
        self.running = self.at_once = 0
        self.checks = 0
        self.closed = False

    def fail(self, model: str, reason: str) -> None:
        """Make a model unready."""
        self.health = Health(
            tuple(ModelHealth(c.name, c.name != model, 0.01, reason * (c.name == model)) for c in self.cards)
        )

    def heal(self) -> None:
        """Make every model ready again."""
        self.health = Health(tuple(ModelHealth(c.name, True, 0.01) for c in self.cards))

    async def models(self) -> list[ModelCard]:
        return self.cards

    async def tag(self, model: str, image: bytes, detail: bool) -> Tagging:
        self.seen.append((model, len(image), detail))
        self.running += 1
        self.at_once = max(self.at_once, self.running)
        try:
            while not self.hold.is_set():
                await asyncio.sleep(0.02)
            if self.hang_s:
                await asyncio.sleep(self.hang_s)
            if self.error:
                raise self.error
            (found,) = (c for c in self.cards if c.name == model)
            return self._tagging(found, image, detail)
        finally:
            self.running -= 1

    async def ready(self) -> Health:
        self.checks += 1
        if self.hang_s:
            await asyncio.sleep(self.hang_s)
        return self.health

    async def close(self) -> None:
        self.closed = True

    def _tagging(self, served: ModelCard, image: bytes, detail: bool) -> Tagging:
        picture = decode_image(image, fit=64, max_pixels=served.max_pixels)
        names = served.manifest.vocabulary.names
        colour_C = np.resize(picture.pixels[0, 0].astype(np.float32) / 255, len(names))
        order = np.argsort(-colour_C, kind="stable")
        labels = tuple(
            {"name": names[c], "score": float(colour_C[c]), "threshold": served.thresholds[c]}
            for c in order
            if colour_C[c] >= served.thresholds[c]
        )
        size = (picture.width, picture.height)
        cells = Views.parse(served.views).cells(*size)
        boxes = (whole_image_box(*size, FED), *(tuple(map(float, cell)) for cell in cells))
        record = ImageRecord(*size, labels, boxes)  # type: ignore[arg-type]
        if not detail:
            return Tagging(record, colour_C)
        if served.manifest.kind == "snippets":
            probs_VC = np.repeat(colour_C[None] / 2, len(boxes), 0)
            probs_VC[-1] = colour_C
            return Tagging(record, colour_C, view_probs_VC=probs_VC)
        rows, columns = np.mgrid[0:4, 0:5]
        peak_hw = 6 - 2.0 * np.hypot(rows - 1, columns - 3)
        return Tagging(record, colour_C, cam_Chw=np.stack([peak_hw - c for c in range(len(names))]))
