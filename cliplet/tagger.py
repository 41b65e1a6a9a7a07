"""`load(model)`: one object that labels images, whatever the model is and whichever runtime runs it.

Legend: B images, V views, C classes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cliplet.artifact import Bundle, BundleJob
from cliplet.contract import CLASSIFIER, EMBEDDINGS, TRUNK
from cliplet.errors import DataError, EnvironmentError_, ServerError, UsageError
from cliplet.images import ImageRef, Picture, decode_image, read_image, upright_rgb
from cliplet.label_records import LabelRecord
from cliplet.plan import Plan, TaggerSettings, find_engine, make_plan
from cliplet.runners import Runner, open_runner
from cliplet.serving import ModelCard
from cliplet.views import Preprocessing, place_on_canvas

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("cliplet")


class Tagger:
    """A model ready to label images; a context manager that frees its engine.

    Attributes:
        plan: what was decided: vocabulary, views, thresholds.
        runner: the engine.
        preprocessing: what the encoder is fed.
    """

    def __init__(self, chosen: Plan, runner: Runner, preprocessing: Preprocessing) -> None:
        self.plan = chosen
        self.runner = runner
        self.preprocessing = preprocessing
        self._names = chosen.vocabulary.names
        self._thresholds_C = np.asarray(chosen.thresholds, np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, trace)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of every score vector."""
        return self._names

    @property
    def room(self) -> dict[str, int]:
        """How far images may be shrunk: `fit` and `short` of `decode_image`, in pixels."""
        return self.plan.views.room(self.preprocessing)

    def score(
        self, pictures: Sequence[Picture], boxes: Sequence[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """`scores` float32 [B, C] of decoded images; also `view_probs` [B, V, C], or a classifier's `cam` [B, C, h, w].

        Of a trunk `embeddings` float32 [B, D], rows of length 1, and nothing else.

        Args:
            boxes: float32 [v, 4] for each image, in its pixels, to look at in place of the grids.

        Raises:
            DataError: what the engine gives is not finite.
            UsageError: boxes for a classifier or a trunk.
        """
        contract = self.plan.contract
        pixels, sizes = [p.pixels for p in pictures], [(p.width, p.height) for p in pictures]
        if boxes is not None and not contract.takes_views:
            raise UsageError(
                f"boxes for a {contract.name}", "none: it looks at the whole image", "use a CLIP"
            )
        feeds = place_on_canvas(pixels, self.plan.views, self.preprocessing, boxes, sizes)
        outputs = self.runner.infer(contract.of_views(feeds))
        if contract is CLASSIFIER:
            outputs = {"scores": outputs["probs"], "cam": outputs["cam"]}
        main = EMBEDDINGS if contract is TRUNK else "scores"
        if not np.isfinite(outputs[main]).all():
            raise DataError(
                f"the engine returned {main} that are not finite", "finite numbers", "try --runtime torch"
            )
        return outputs

    def labels_of(self, scores_C: np.ndarray) -> tuple[str, ...]:
        """Names of the classes at or above their threshold, best first."""
        above = np.flatnonzero(scores_C >= self._thresholds_C)
        order = np.argsort(-scores_C[above], kind="stable")
        return tuple(self._names[c] for c in above[order])

    def label(
        self,
        images: Sequence[str | os.PathLike[str] | np.ndarray | Image.Image],
        boxes: Sequence[np.ndarray] | None = None,
    ) -> list[LabelRecord]:
        """One record for each image: a path, a PIL image, or an array uint8 [h, w, 3] RGB.

        With `boxes`, images have to be arrays or PIL images: a file is shrunk while it is decoded, and boxes are
        in pixels.

        Raises:
            DataError: an image cannot be read or decoded.
            UsageError: boxes for paths, or not one list of boxes for each image.
        """
        if boxes is not None and (
            len(boxes) != len(images) or any(isinstance(i, str | os.PathLike) for i in images)
        ):
            raise UsageError(
                f"{len(boxes)} lists of boxes for {len(images)} images",
                "one for each, and images as arrays or PIL images, since boxes are in their pixels",
                "open the images first: PIL.Image.open(path)",
            )
        records = []
        step = self.plan.images_per_batch
        for start in range(0, len(images), step):
            chunk = [self._picture(image) for image in images[start : start + step]]
            began = perf_counter()
            own = None if boxes is None else boxes[start : start + step]
            scores_BC = self.score([picture for _, picture in chunk], own)["scores"]
            seconds = (perf_counter() - began) / len(chunk)
            records += [
                self.record(path, picture, scores_C, seconds)
                for (path, picture), scores_C in zip(chunk, scores_BC, strict=True)
            ]
        return records

    def record(self, path: str, picture: Picture, scores_C: np.ndarray, seconds: float) -> LabelRecord:
        """The row of one scored image."""
        labels = self.labels_of(scores_C)
        return LabelRecord(
            path, picture.width, picture.height, labels, scores_C, str(self.plan.spec), seconds
        )

    def _picture(self, image: str | os.PathLike[str] | np.ndarray | Image.Image) -> tuple[str, Picture]:
        if isinstance(image, str | os.PathLike):
            path = os.fspath(image)
            return path, decode_image(read_image(ImageRef(path, path)), **self.room)
        pixels = image if isinstance(image, np.ndarray) else upright_rgb(image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise DataError(
                f"an image of {pixels.dtype} {list(pixels.shape)}", "uint8 [height, width, 3], RGB"
            )
        return "", Picture(pixels, pixels.shape[1], pixels.shape[0])


def load(model: str = "tiny", **settings: Any) -> Tagger:
    """A tagger for `model`; further settings are the fields of `TaggerSettings`.

    >>> tagger = cliplet.load("tiny", classes="cat, dog", views="1+3x3")
    >>> tagger.label(["photo.jpg"])[0].labels
    """
    return load_plan(make_plan(TaggerSettings(model=model, **settings)))


def load_plan(chosen: Plan, streams: int = 1) -> Tagger:
    """The tagger that `chosen` describes, its engine loaded.

    Args:
        streams: batches that an engine on the CPU scores at the same time; see `runner.concurrency` for what came of it.

    Raises:
        EnvironmentError_: this machine lacks the runtime, the device or the weights.
        ParityError: an exported graph does not agree with its original.
        ServerError: the server that has the model does not answer, or serves another one by now.
    """
    settings = chosen.settings
    if chosen.card is not None:
        return _load_served(chosen, chosen.card)
    if chosen.runtime == "torch":
        return _load_eager(chosen)
    bundle = chosen.bundle or exported_bundle(chosen)
    engine = chosen.engine or find_engine(bundle, chosen.runtime, settings.precision, settings.device)
    runner = open_runner(
        chosen.runtime,
        bundle.folder / engine.file,
        chosen.contract,
        precision=settings.precision,
        device=settings.device,
        threads=settings.threads,
        streams=streams,
    )
    return Tagger(chosen, runner, bundle.manifest.preprocessing)


def _load_served(chosen: Plan, card: ModelCard) -> Tagger:
    from cliplet.runners.triton_runner import TritonRunner
    from cliplet.triton_calls import Connection

    assert chosen.spec.server is not None
    connection = Connection(chosen.spec.server, chosen.settings.connection)
    try:
        if connection.card().to_json() != card.to_json():
            raise ServerError(
                f"{chosen.spec} serves another bundle, engine or thresholds than a moment ago",
                "a server that stays as it is",
                "the same command again",
            )
    except BaseException:
        connection.close()
        raise
    return Tagger(chosen, TritonRunner(connection, card), card.manifest.preprocessing)


def _load_eager(chosen: Plan) -> Tagger:
    settings = chosen.settings
    if chosen.bundle is not None:
        raise UsageError(
            f"{chosen.spec} is a bundle: it holds a graph, not a torch model",
            "--runtime openvino or onnx for a bundle",
            f"use its original: --model {chosen.bundle.manifest.model} --runtime torch",
        )
    try:
        from cliplet.runners.torch_runner import TorchRunner

        (original,) = entry_points(group="cliplet.exporters", name="original")
        found = original.load()(_job(chosen))
    except ImportError as error:
        raise _lacks(f"--runtime torch needs {error.name}") from error
    runner = TorchRunner(
        found.eager, chosen.contract, settings.device, settings.threads, precision=settings.precision
    )
    return Tagger(chosen, runner, found.preprocessing)


def _job(chosen: Plan) -> BundleJob:
    engine = (chosen.runtime, chosen.settings.precision)
    return BundleJob(chosen.spec, chosen.vocabulary, chosen.aggregation, chosen.calibrated, (engine,))


def exported_bundle(chosen: Plan) -> Bundle:
    """The bundle of a model that is none: from the cache, or made by the exporter that is installed."""
    job = _job(chosen)
    if job.cached_folder().exists():
        return Bundle.load(job.cached_folder())
    log.info("exporting %s and comparing it with the original; once, then it is cached", chosen.spec)
    (exporter,) = entry_points(group="cliplet.exporters", name="bundle")
    try:
        export = exporter.load()
    except ImportError as error:
        raise _lacks(f"{chosen.spec} has to be exported first, which needs {error.name}") from error
    bundle: Bundle = export(job)
    log.info("kept as the bundle %s", bundle.folder)
    return bundle


def _lacks(happened: str) -> EnvironmentError_:
    return EnvironmentError_(
        happened,
        "torch and open_clip, or a bundle that was exported elsewhere",
        "pip install 'cliplet[export]'",
    )
