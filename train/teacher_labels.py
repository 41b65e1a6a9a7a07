"""What a recipe's teacher says of a data set: the first pass over all images, and the pass over regions.

Both go into label banks, so a killed run goes on where it was, and recipes that ask the same share the answer.
Of several processes each asks about its own stretch of the images.

Legend: N images, n images of a chunk, V views, C classes, r regions of an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, cast

import numpy as np
import torch
from lightning_fabric import Fabric

from cliplet.artifact import Bundle
from cliplet.datasets import Dataset
from cliplet.errors import UsageError
from cliplet.images import ImageError, Picture, decode_image, read_image
from cliplet.labels import ErrorRecord
from cliplet.listing import ImageRef
from cliplet.model_spec import parse_model_spec
from cliplet.progress import ProgressBar
from cliplet.pseudo_labels import crop_maximum, rescaled
from cliplet.runners import Runner
from cliplet.tagger import Tagger
from cliplet.teacher import load_teacher
from cliplet.views import OVERSAMPLING, Views
from cliplet.vocabulary import Vocabulary, prompt_set

from .classifier_recipe import ClassifierRecipe
from .feed import ahead
from .label_bank import LabelBank
from .label_pass import Boxes, open_teacher, provenance, score_images
from .released_teacher import ReleasedTeacher
from .world import gathered, summed

FLUSH_EVERY = 256  # images, of the pass that goes one by one
Advance = Callable[[int], None]  # images settled since the last call


@dataclass(frozen=True)
class PassOptions:
    """How a pass is carried out.

    Attributes:
        banks: folder of the label banks.
        workers: threads that decode.
        quiet: no progress bar.
        runtime: the engine of a teacher that scores in batches, one of `cliplet.plan.RUNTIMES`; None is `onnx`, or
            `torch` for a normalisation that is not the teacher's own.
    """

    banks: Path
    workers: int = 1
    quiet: bool = False
    runtime: str | None = None


@dataclass(frozen=True, eq=False)
class TeacherLabels:
    """The teacher's word on a data set.

    Attributes:
        probs_NVC: float32 [N, V, C]; rows of failed images are 0.
        done_N: bool [N], which images were scored.
        errors: why others could not be scored.
    """

    probs_NVC: np.ndarray
    done_N: np.ndarray
    errors: list[ErrorRecord]


def teacher_labels(
    recipe: ClassifierRecipe,
    data: Dataset,
    fabric: Fabric,
    options: PassOptions,
    *,
    boxes: Boxes | None = None,
    purpose: Mapping[str, Any] | None = None,
) -> TeacherLabels:
    """The teacher's probabilities of every image in the recipe's views.

    Args:
        boxes: regions to look at instead; a row is then [1, C], the class-wise maximum over the image's regions,
            0 where it has none.
        purpose: what the boxes depend on; it tells this bank from others.

    Raises:
        UsageError: the teacher cannot do what the recipe asks.
    """
    recipe = recipe if boxes is None else replace(recipe, views="1")
    vocabulary = replace(data.vocabulary, prompts=prompt_set(recipe.prompts))
    shape = (len(data.images), Views.parse(recipe.views).count, len(vocabulary.names))
    probs_NVC, done_N = np.zeros(shape, np.float32), np.zeros(shape[0], np.uint8)
    rank, world = fabric.global_rank, fabric.world_size
    own = np.array_split(np.arange(len(data.images)), world)[rank]
    errors: list[ErrorRecord] = []
    if len(own):
        quiet = options.quiet or rank > 0
        part = {"part": f"{rank} of {world}", **(purpose or {})}
        with (
            _asker(recipe, vocabulary, str(fabric.device.type), options.runtime) as asker,
            ProgressBar("teacher" if boxes is None else "regions", len(own), quiet=quiet) as bar,
        ):
            shifted = None if boxes is None else _shifted(boxes, int(own[0]))
            images = [data.images[i] for i in own]
            bank = _filled(asker, images, shape[1], options, part, shifted, bar.advance)
        probs_NVC[own], done_N[own], errors = bank.probs, bank.done, bank.errors
    return TeacherLabels(
        summed(fabric, probs_NVC), summed(fabric, done_N).astype(bool), gathered(fabric, errors)
    )


def _shifted(boxes: Boxes, begin: int) -> Boxes:
    """The same for the rows of a bank whose first image stands at `begin` in the data."""
    return lambda rows, pictures: boxes(rows + begin, pictures)


class _Asker(Protocol):
    """A teacher that fills a bank, its way."""

    vocabulary: Vocabulary

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def provenance(self) -> dict[str, Any]:
        """What its answers depend on."""
        ...

    def fill(
        self, images: Sequence[ImageRef], bank: LabelBank, boxes: Boxes | None, workers: int, advance: Advance
    ) -> None:
        """Answer for all images that are pending."""
        ...


def _asker(recipe: ClassifierRecipe, vocabulary: Vocabulary, device: str, runtime: str | None) -> _Asker:
    if recipe.scoring == "batched":
        return _Batched(recipe, vocabulary, device, runtime)
    if runtime not in (None, "torch"):
        raise UsageError(
            f"the teacher's runtime {runtime} with scoring one_by_one, which has images of any aspect",
            "the runtime torch",
            "--teacher-runtime torch, or leave the option out",
        )
    return _OneByOne(recipe, vocabulary, device)


def _filled(
    asker: _Asker,
    images: Sequence[ImageRef],
    views: int,
    options: PassOptions,
    purpose: Mapping[str, Any],
    boxes: Boxes | None,
    advance: Advance,
) -> LabelBank:
    """The bank of these images, all of them settled."""
    described = {**asker.provenance, **purpose}
    paths = [ref.path for ref in images]
    name = hashlib.sha256(json.dumps([described, paths], sort_keys=True).encode()).hexdigest()[:16]
    folder = options.banks / name
    classes = asker.vocabulary.names
    # Runs that ask the same wait for the first of them to be answered.
    with LabelBank.open(
        folder, paths=paths, classes=classes, views=views, provenance=described, wait=True
    ) as bank:
        pending = len(bank.pending())
        advance(len(images) - pending)
        if pending:
            asker.fill(images, bank, boxes, options.workers, advance)
    return LabelBank.read(folder)


class _Batched:
    """Views and regions of many images together, through whichever engine."""

    def __init__(
        self, recipe: ClassifierRecipe, vocabulary: Vocabulary, device: str, runtime: str | None
    ) -> None:
        self.vocabulary = vocabulary
        self.scale = recipe.softmax_scale
        own = recipe.teacher_normalisation == "own"
        self.tagger: Tagger = open_teacher(
            recipe.teacher,
            vocabulary,
            views=recipe.views,
            normalisation=cast(Literal["own", "imagenet"], recipe.teacher_normalisation),
            whole_image=cast(Literal["own", "squash"], recipe.whole_image),
            runtime=runtime or ("onnx" if own else "torch"),
            device=device,
            threads=torch.get_num_threads(),
        )
        if recipe.softmax_scale:
            self.tagger.runner = RescaledRunner(
                self.tagger.runner, learned_scale(recipe.teacher), recipe.softmax_scale
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tagger.__exit__(kind, error, trace)

    @property
    def provenance(self) -> dict[str, Any]:
        return {**provenance(self.tagger), "scoring": "batched", "scale": self.scale}

    def fill(
        self, images: Sequence[ImageRef], bank: LabelBank, boxes: Boxes | None, workers: int, advance: Advance
    ) -> None:
        score_images(self.tagger, images, bank, boxes=boxes, workers=workers, progress=advance)


class RescaledRunner:
    """Another runner whose view probabilities are those of another softmax scale."""

    def __init__(self, runner: Runner, scale: float, new_scale: float) -> None:
        self.runner, self.scale, self.new_scale = runner, scale, new_scale
        self.runtime, self.device, self.precision = runner.runtime, runner.device, runner.precision
        self.concurrency = runner.concurrency

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, trace)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self.runner.infer(feeds)
        return {**outputs, "view_probs": rescaled(outputs["view_probs"], self.scale, self.new_scale)}


def learned_scale(model: str) -> float:
    """What a softmax model multiplies its cosines by.

    Raises:
        UsageError: it has sigmoids, which know no other scale.
    """
    spec = parse_model_spec(model)
    known = Bundle.load(spec.bundle).manifest if spec.bundle else load_teacher(spec)
    if known.bias is not None:
        raise UsageError(
            f"softmax_scale with {model}, which gives sigmoids",
            "a model with a softmax",
            "--set softmax_scale=0",
        )
    return known.scale


class _OneByOne:
    """As the public code asks: the squashed image, then each crop of it, alone."""

    def __init__(self, recipe: ClassifierRecipe, vocabulary: Vocabulary, device: str) -> None:
        if recipe.views != "1":
            raise UsageError(f"views {recipe.views} with scoring one_by_one", "the whole image alone, 1")
        if (recipe.teacher_normalisation, recipe.whole_image) != ("imagenet", "squash"):
            raise UsageError(
                f"scoring one_by_one with normalisation {recipe.teacher_normalisation} and whole image "
                f"{recipe.whole_image}",
                "what the public code does: imagenet, and squash",
                "--set teacher_normalisation=imagenet",
            )
        self.vocabulary = vocabulary
        self.recipe = recipe
        spec = parse_model_spec(recipe.teacher)
        teacher = load_teacher(spec, device)
        self.identity = spec.identity()
        self.device = device
        self.teacher = ReleasedTeacher(
            teacher, vocabulary, size=recipe.teacher_size, scale=recipe.softmax_scale or None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.teacher

    @property
    def provenance(self) -> dict[str, Any]:
        return {
            "model": self.identity,
            "vocabulary": self.vocabulary.to_json(),
            "scoring": "one_by_one",
            "size": self.recipe.teacher_size,
            "scale": self.teacher.scale,
            "device": self.device,
        }

    def fill(
        self, images: Sequence[ImageRef], bank: LabelBank, boxes: Boxes | None, workers: int, advance: Advance
    ) -> None:
        pending = bank.pending()
        loaded = ahead(lambda i: self._load(images[i]), pending.tolist(), workers)
        for count, (index, found) in enumerate(zip(pending, loaded, strict=True), start=1):
            if isinstance(found, ImageError):
                bank.fail(int(index), found.stage, found.reason)
            else:
                rows = pending[count - 1 : count]
                regions = None if boxes is None else boxes(rows, [found])[0]
                bank.write(rows, self._row(found, regions)[None, None])
            if count % FLUSH_EVERY == 0 or count == len(pending):
                bank.flush()
            advance(1)

    def _load(self, ref: ImageRef) -> Picture | ImageError:
        room = OVERSAMPLING * self.recipe.teacher_size
        try:
            return decode_image(read_image(ref), fit=room, short=room)
        except ImageError as error:
            return error

    def _row(self, picture: Picture, regions_r4: np.ndarray | None) -> np.ndarray:
        """Probabilities float32 [C] of the whole image, or their maximum over its regions."""
        if regions_r4 is None:
            return self.teacher.probs_whole(picture.pixels)
        squashed = self.teacher.squashed(picture.pixels)
        side = self.recipe.teacher_size
        crops = []
        for x0, y0, x1, y1 in np.rint(regions_r4 * side).astype(int).tolist():
            # A region narrower than a pixel here is the pixel that it begins in.
            left, top = min(x0, side - 1), min(y0, side - 1)
            crops.append(self.teacher.probs_crop(squashed, (left, top, max(x1, left + 1), max(y1, top + 1))))
        found = np.asarray(crops, np.float32).reshape(-1, len(self.vocabulary.names))
        return crop_maximum(found, np.zeros(len(found), int), 1)[0]
