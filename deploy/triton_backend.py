"""What the Python models of a repository do, apart from Triton: batches of requests in, an answer for each out.

`triton_models/*/1/model.py` turns Triton's requests into arrays and answers into its responses.

Legend: B images of all requests of a batch, b of one request, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from cliplet.contract import GRAPHS
from cliplet.errors import ClipletError, DataError, EnvironmentError_, UsageError
from cliplet.images import ImageError, Picture, decode_image
from cliplet.machine import usable_cores
from cliplet.model_spec import ModelSpec
from cliplet.plan import Plan, TaggerSettings
from cliplet.runners import open_runner
from cliplet.serving import CAM, SCORES, VIEW_PROBS, ImageRecord, ModelCard, image_problem
from cliplet.tagger import Tagger
from cliplet.views import Aggregation, Views, whole_image_box

from .graph_limits import GraphLimits

Feeds = Mapping[str, np.ndarray]
Answer = dict[str, np.ndarray] | ClipletError
EXTRAS = (VIEW_PROBS.name, CAM.name)
# The input whose height and width may differ from request to request.
CANVAS = "image"
# The one that says how many views there are.
BOXES = "boxes"
NO_LIST = DataError("the images are no list", "BYTES [b, 1]")
# What Triton says where a queue is full, a deadline has passed, or a model is being loaded or restarted.
_PASSING = re.compile(r"maximum queue size|timeout expired|not ready|not healthy|unhealthy", re.IGNORECASE)


class GraphUnavailable(EnvironmentError_):
    """The graph is overloaded or still loading: the same request may succeed later."""


def graph_error(message: str) -> EnvironmentError_:
    """What to raise when another model of the server refused a call; Triton then tells its reason in words alone."""
    if _PASSING.search(message):
        return GraphUnavailable(message)
    return EnvironmentError_(message)


def error_code(error: ClipletError) -> str:
    """The name that Triton has for the kind of an error; clients try again on UNAVAILABLE alone."""
    if isinstance(error, GraphUnavailable):
        return "UNAVAILABLE"
    return "INVALID_ARG" if isinstance(error, DataError | UsageError) else "INTERNAL"


class GraphService:
    """A graph of a bundle; `parameters` are those of its configuration, which say where its engine is."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        self.contract = GRAPHS[parameters["graph"]]
        self.runner = open_runner(
            parameters["runtime"],
            Path(parameters["bundle"]) / parameters["file"],
            self.contract,
            precision=parameters["precision"],
            device=parameters["device"],
            threads=int(parameters["threads"]),
        )
        self.limits = GraphLimits.from_parameters(parameters)

    def close(self) -> None:
        self.runner.__exit__(None, None, None)

    def answer(self, requests: Sequence[Feeds]) -> list[Answer]:
        """The outputs for each request; those whose inputs differ in the size of the canvas alone share a run."""
        groups: dict[object, list[int]] = {}
        answers: dict[int, Answer] = {}
        for number, feeds in enumerate(requests):
            try:
                self.limits.check(self.contract, feeds)
            except DataError as error:
                answers[number] = error
                continue
            alike = tuple(t.shape[1:] for name, t in sorted(feeds.items()) if name != CANVAS)
            groups.setdefault(alike, []).append(number)
        for group in groups.values():
            answers.update(zip(group, self._run([requests[number] for number in group]), strict=True))
        return [answers[number] for number in range(len(requests))]

    def _run(self, requests: Sequence[Feeds]) -> list[Answer]:
        """The outputs for each request, from one run. If it is too large, or the engine refuses it, each is tried alone."""
        try:
            outputs = self.runner.infer(self._feeds(requests))
        except ClipletError as error:
            if len(requests) == 1:
                return [error]
            return [answer for feeds in requests for answer in self._run([feeds])]
        sizes = [len(feeds[self.contract.inputs[0].name]) for feeds in requests]
        return [{name: array[rows] for name, array in outputs.items()} for rows in _stretches(sizes)]

    def _feeds(self, requests: Sequence[Feeds]) -> Feeds:
        """The inputs of all requests as one; of a wide and a high canvas a large one.

        Raises:
            DataError: each may be asked for, but not all in one run.
        """
        if len(requests) > 1 and CANVAS in requests[0]:
            canvases = [feeds[CANVAS].shape for feeds in requests]
            room = [max(shape[side] for shape in canvases) for side in (1, 2)]
            views = sum(feeds[BOXES].size // 4 for feeds in requests)
            self.limits.check_run(sum(shape[0] for shape in canvases), room, views)
        return {t.name: _joined([feeds[t.name] for feeds in requests]) for t in self.contract.inputs}


@dataclass
class CalledGraph:
    """The runner of a graph that is another model of the same server."""

    call: Callable[[Feeds], dict[str, np.ndarray]]
    card: ModelCard
    concurrency: int = 1

    def __post_init__(self) -> None:
        self.runtime, self.device, self.precision = (
            f"triton/{self.card.runtime}",
            self.card.device,
            self.card.precision,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def infer(self, feeds: Feeds) -> dict[str, np.ndarray]:
        return self.call(feeds)


class TaggerService:
    """The tagger of a served bundle, or the embedder of a trunk.

    Args:
        infer: runs the bundle's graph; raises `GraphUnavailable` where it is overloaded.
        whole_answers: refuse requests for a part of the outputs. Triton's response cache tells requests apart by
            their inputs alone, and would answer a later request for all of them with that part.
    """

    def __init__(
        self,
        card: ModelCard,
        infer: Callable[[Feeds], dict[str, np.ndarray]],
        *,
        whole_answers: bool = False,
    ) -> None:
        self.card = card
        self.whole_answers = whole_answers
        self.tagger = Tagger(plan_of(card), CalledGraph(infer, card), card.manifest.preprocessing)
        self.pool = ThreadPoolExecutor(usable_cores(), "decode")

    def answer(self, requests: Sequence[np.ndarray], wanted: Sequence[Collection[str]]) -> list[Answer]:
        """Records and scores for each request, and of `view_probs` and `cam` those that it wants; or embeddings.

        Args:
            requests: encoded images, object [b, 1] each.
        """
        # A shape that overflows Triton's arithmetic gets past it; others of the batch must not suffer.
        lists = [list(r[:, 0]) if r.ndim == 2 and r.shape[1] == 1 else [NO_LIST] for r in requests]
        encoded = [image for images in lists for image in images]
        results = self._scored(list(self.pool.map(self._decoded, encoded)))
        stretches = _stretches([len(images) for images in lists])
        answers = [_answer(results[rows], names) for rows, names in zip(stretches, wanted, strict=True)]
        if self.whole_answers:
            answers = [
                a if self._all(names) else self._partial() for a, names in zip(answers, wanted, strict=True)
            ]
        return answers

    def _all(self, names: Collection[str]) -> bool:
        """Whether these are all outputs, but for those that have to be asked for."""
        return {tensor.name for tensor in self.card.front.outputs} <= set(names)

    def _partial(self) -> UsageError:
        names = " and ".join(sorted(tensor.name for tensor in self.card.front.outputs))
        return UsageError(
            f"this server keeps its answers: ask for {names} together, not for one of them",
            "a request for all outputs",
        )

    def _decoded(self, data: bytes | ClipletError) -> Picture | ClipletError:
        if isinstance(data, ClipletError):
            return data
        try:
            return decode_image(data, **self.tagger.room, max_pixels=self.card.max_pixels)
        except ImageError as error:
            return DataError(image_problem(error.stage, error.reason))

    def _scored(self, pictures: Sequence[Picture | ClipletError]) -> list[Answer]:
        """What is found in each picture, as rows; errors stay where they are."""
        results: list[Answer] = [p if isinstance(p, ClipletError) else {} for p in pictures]
        whole = [i for i, p in enumerate(pictures) if isinstance(p, Picture)]
        for start in range(0, len(whole), self.card.max_batch_size):
            chunk = whole[start : start + self.card.max_batch_size]
            found = self._rows([p for i in chunk if isinstance(p := pictures[i], Picture)])
            for i, row in zip(chunk, found, strict=True):
                results[i] = row
        return results

    def _rows(self, pictures: Sequence[Picture]) -> list[Answer]:
        """Rows of pictures that are scored together. If the engine refuses them, each is tried alone."""
        try:
            outputs = self.tagger.score(pictures)
        except GraphUnavailable as error:
            return [error] * len(pictures)
        except ClipletError as error:
            if len(pictures) == 1:
                return [type(error)(image_problem("infer", error.happened))]
            return [row for picture in pictures for row in self._rows([picture])]
        rows = [{name: array[i] for name, array in outputs.items()} for i in range(len(pictures))]
        if SCORES not in outputs:
            return list(rows)
        return [
            {"record": np.array([self._record(picture, row[SCORES]).encode()], object), **row}
            for picture, row in zip(pictures, rows, strict=True)
        ]

    def _record(self, picture: Picture, scores_C: np.ndarray) -> str:
        plan = self.tagger.plan
        score, threshold = (
            dict(zip(plan.vocabulary.names, v, strict=True)) for v in (scores_C, plan.thresholds)
        )
        labels = tuple(
            {"name": name, "score": float(score[name]), "threshold": threshold[name]}
            for name in self.tagger.labels_of(scores_C)
        )
        return ImageRecord(picture.width, picture.height, labels, self._boxes(picture)).to_json()

    def _boxes(self, picture: Picture) -> tuple[tuple[float, float, float, float], ...]:
        """The views' boxes in pixels of the image as it is displayed, whatever size it was decoded in."""
        size = (picture.width, picture.height)
        cells = self.tagger.plan.views.cells(*size).tolist()
        return (whole_image_box(*size, self.tagger.preprocessing), *((b[0], b[1], b[2], b[3]) for b in cells))


def plan_of(card: ModelCard) -> Plan:
    """The plan that a card tells of; nothing of the bundle is read."""
    manifest = card.manifest
    return Plan(
        TaggerSettings(model=card.name, views=card.views),
        ModelSpec(card.name),
        manifest.vocabulary,
        Views.parse(card.views),
        Aggregation(**manifest.aggregation),
        card.thresholds,
        card.threshold_source,
        None,
        dict(manifest.thresholds),
        card.runtime,
        None,
        card,
    )


def response(answer: Answer) -> Any:
    """Triton's response for an answer; only Triton's own Python has what this needs."""
    pb_utils = import_module("triton_python_backend_utils")
    if isinstance(answer, ClipletError):
        code = getattr(pb_utils.TritonError, error_code(answer))
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(answer.happened, code))
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in answer.items()])


def _answer(rows: Sequence[Answer], wanted: Collection[str]) -> Answer:
    """The rows of one request as its tensors, or the error of the first image that has one."""
    for number, row in enumerate(rows, 1):
        if isinstance(row, ClipletError):
            place = f"image {number} of {len(rows)}: " if len(rows) > 1 else ""
            return type(row)(f"{place}{row.happened}", row.expected, row.fix)
    whole = [row for row in rows if not isinstance(row, ClipletError)]
    names = [name for name in whole[0] if name not in EXTRAS or name in wanted]
    return {name: np.ascontiguousarray([row[name] for row in whole]) for name in names}


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays one after the other; canvases of several sizes on larger ones, which changes nothing in the views."""
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) == 1:
        return np.concatenate(arrays)
    room = [max(sides) for sides in zip(*shapes, strict=True)]
    joined = np.zeros((sum(map(len, arrays)), *room), arrays[0].dtype)
    for rows, array in zip(_stretches([len(array) for array in arrays]), arrays, strict=True):
        joined[(rows, *(slice(side) for side in array.shape[1:]))] = array
    return joined


def _stretches(sizes: Sequence[int]) -> Iterator[slice]:
    """Where the rows of each request lie among those of all of them."""
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size
