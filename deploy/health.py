"""Whether a server's models work, found out by a tiny real inference of each within a deadline.

Triton's own readiness says that a model was loaded once; it stays so when the process behind it hangs or died. Here
every model computes something that it was never asked before (so that no cache answers), ahead of all requests that
wait. No answer from a model that meanwhile finished other work is `busy`, and from any other it is a failure.

Legend: B images, C classes, L text context.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import numpy as np

from cliplet.contract import TEXT, GraphContract
from cliplet.errors import ArtifactError
from cliplet.serving import CARD_KEY, TAGGER, ModelCard, graph_model
from cliplet.views import Views, place_on_canvas

from .triton_http import CallError, TritonHttp

Feeds = dict[str, np.ndarray]
# Longest side in pixels of the images that models are tried with.
SIDE = 16
QUEUE_FULL = "maximum queue size"
# Parts of the deadline: what a look at the statistics may take, before the inference and after one that was late; and
# what an inference gets at least, however long that first look took on a machine that stood still.
STATISTICS_SHARE = 0.25
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Probe:
    """How to try a model.

    Attributes:
        feeds: makes new inputs for one image; None for a model that is not of cliplet's, which is only asked whether
            it is loaded.
        outputs: what is asked for.
        needs: another model that it asks in turn.
    """

    model: str
    feeds: Callable[[], Feeds] | None = None
    outputs: tuple[str, ...] = ()
    needs: str = ""


@dataclass(frozen=True)
class ModelHealth:
    """What came of one model's inference.

    Attributes:
        ok: it computed, now or at least other work meanwhile (then `busy`).
        seconds: it took.
        reason: why it is not ok, or is busy.
        answered: at all, even if with a failure.
    """

    model: str
    ok: bool
    seconds: float
    reason: str = ""
    busy: bool = False
    answered: bool = True


@dataclass(frozen=True)
class Health:
    """What came of all models' inferences; without any, it is not well."""

    models: tuple[ModelHealth, ...]

    @property
    def ok(self) -> bool:
        return bool(self.models) and all(m.ok for m in self.models)

    @property
    def reasons(self) -> dict[str, str]:
        """Why, of each model that is not well."""
        return {m.model: m.reason for m in self.models if not m.ok}

    @classmethod
    def down(cls, models: Sequence[str], reason: str) -> Health:
        """That of models whose server does not run."""
        return cls(tuple(ModelHealth(model, False, 0.0, reason, answered=False) for model in models))


def check(
    server: TritonHttp, probes: Sequence[Probe], deadline_s: float, known: Mapping[str, str] | None = None
) -> Health:
    """Try every model at once; returns within `deadline_s` seconds, or a quarter more where a model was late.

    Args:
        known: models that are known to fail, with the reason. They are not tried, nor is what needs them: a request
            to a process that was stopped may bring down the whole server when the process goes on.
    """
    if not probes:
        return Health(())
    failing = known or {}

    def tried(probe: Probe) -> ModelHealth:
        if probe.model in failing:
            return ModelHealth(probe.model, False, 0.0, failing[probe.model], answered=False)
        if probe.needs in failing:
            reason = f"it needs {probe.needs}: {failing[probe.needs]}"
            return ModelHealth(probe.model, False, 0.0, reason, answered=False)
        return _tried(server, probe, deadline_s)

    with ThreadPoolExecutor(len(probes), "health") as pool:
        return Health(tuple(pool.map(tried, probes)))


def probes_of(server: TritonHttp, models: Sequence[str]) -> list[Probe]:
    """How to try each of the models that a server has loaded.

    Raises:
        CallError: the server does not tell their configurations.
    """
    configs = {model: server.config(model) for model in models}
    known: dict[str, Probe] = {}
    for model, config in configs.items():
        if card := card_of(config):
            known |= {probe.model: probe for probe in _card_probes(model, card, configs)}
    return [known.get(model, Probe(model)) for model in models]


def card_of(config: Mapping[str, Any]) -> ModelCard | None:
    """The card in a model's configuration; None if it holds none that can be read."""
    text = config.get("parameters", {}).get(CARD_KEY, {}).get("string_value")
    try:
        return ModelCard.from_json(text, config["name"]) if text else None
    except ArtifactError:
        return None


def _card_probes(name: str, card: ModelCard, configs: Mapping[str, Mapping[str, Any]]) -> list[Probe]:
    graph = card.manifest.contract
    text = graph_model(name, TEXT.name)
    makers: list[tuple[str, GraphContract, Callable[[], Feeds]]] = [
        (name, card.front, _encoded_image),
        (card.graph, graph, lambda: _graph_feeds(card)),
    ]
    if text in configs:
        (tokens,) = (row for row in configs[text]["input"] if row["name"] == TEXT.inputs[0].name)
        length = int(tokens["dims"][-1])
        if length > 0:
            makers.append((text, TEXT, lambda: _tokens(length)))
    return [
        Probe(model, feeds, tuple(t.name for t in contract.outputs), card.graph if model == name else "")
        for model, contract, feeds in makers
    ]


def _pixels() -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def _encoded_image() -> Feeds:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(_pixels()).save(file, "JPEG")
    return {TAGGER.inputs[0].name: np.array([[file.getvalue()]], object)}


def _graph_feeds(card: ModelCard) -> Feeds:
    # An engine for a GPU was built for certain numbers of views; the one it is served with is among them.
    views = Views.parse("1" if card.device == "cpu" else card.views)
    return card.manifest.contract.of_views(place_on_canvas([_pixels()], views, card.manifest.preprocessing))


def _tokens(length: int) -> Feeds:
    return {TEXT.inputs[0].name: np.random.default_rng().integers(1, 256, (1, length), np.int64)}


def _tried(server: TritonHttp, probe: Probe, deadline_s: float) -> ModelHealth:
    began = monotonic()
    before = _executions(server, probe.model, STATISTICS_SHARE * deadline_s)
    left = max(deadline_s - (monotonic() - began), LEAST_SHARE * deadline_s)
    try:
        if probe.feeds is None:
            server.call("GET", f"/v2/models/{probe.model}/ready", timeout_s=left)
        else:
            server.infer(probe.model, probe.feeds(), probe.outputs, left)
    except CallError as error:
        failed = ModelHealth(probe.model, False, monotonic() - began)
        return _explained(server, failed, error, before, deadline_s)
    return ModelHealth(probe.model, True, monotonic() - began)


def _explained(
    server: TritonHttp, failed: ModelHealth, error: CallError, before: int | None, deadline_s: float
) -> ModelHealth:
    """Whether a model that did not answer is at work all the same."""
    # Given up by us, or by the server in its own words.
    late = error.late or "timeout" in error.reason.lower()
    reason = f"no answer within the deadline of {deadline_s:.3g} s" if late else error.reason
    waited = error.status == 0 or QUEUE_FULL in error.reason or late
    after = _executions(server, failed.model, STATISTICS_SHARE * deadline_s) if waited else None
    if before is not None and after is not None and after > before:
        return replace(failed, ok=True, reason=f"busy: {reason}", busy=True)
    return replace(failed, reason=reason, answered=not waited)


def _executions(server: TritonHttp, model: str, timeout_s: float) -> int | None:
    try:
        return server.executions(model, timeout_s)
    except CallError:
        return None
