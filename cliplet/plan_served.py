"""What is decided for a bundle that a server serves: its card says all that a bundle's folder would say."""

from __future__ import annotations

from dataclasses import replace

from cliplet.artifact import Engine
from cliplet.contract import CLASSIFIER
from cliplet.errors import ArtifactError, UsageError
from cliplet.model_spec import ModelSpec
from cliplet.plan import CLASSIFIER_THRESHOLD, DEFAULT_THRESHOLD, Plan, TaggerSettings
from cliplet.plan_checks import (
    chosen_views,
    gives_features,
    hold_labels,
    hold_vocabulary,
    own_aggregation,
    refuse_aggregation,
    refuse_labels,
)
from cliplet.plan_thresholds import chosen_thresholds
from cliplet.server_address import ServerAddress
from cliplet.serving import ModelCard
from cliplet.thresholds import Thresholds
from cliplet.triton_calls import Connection
from cliplet.views import Aggregation, Views
from cliplet.vocabulary import Vocabulary


def plan_of_server(
    settings: TaggerSettings, vocabulary: Vocabulary | None = None, *, features: bool = False
) -> Plan:
    """The plan of a model `triton://…`; asks the server. Arguments are those of `make_plan`.

    Raises:
        ServerError: it does not answer.
        UsageError: it serves no such bundle, wants another token, or cannot do what was asked.
        ArtifactError: it was started by another version.
    """
    address = ServerAddress.parse(settings.model)
    # Work that has not begun needs no patience: an address may be wrong.
    asking = replace(settings.connection, shared_memory="off", wait_s=0.0)
    with Connection(address, asking) as server:
        card = server.card()
    named = replace(address, name=card.name)
    engine = _engine(card, named)
    _hold_engine(settings, card, engine)
    manifest = card.manifest
    spec = ModelSpec(str(named), server=named)
    if not features:
        hold_labels(spec, manifest)
    if gives_features(spec, manifest):
        refuse_labels(settings)
    is_classifier = manifest.contract is CLASSIFIER
    if is_classifier:
        refuse_aggregation(settings)
    aggregation = own_aggregation(manifest, settings)
    hold_vocabulary(manifest.vocabulary, settings, vocabulary, None)
    views = chosen_views(settings, looks_once=not manifest.contract.takes_views, usual=card.views)
    thresholds = _thresholds(settings, card, views, aggregation, is_classifier=is_classifier)
    return Plan(
        settings,
        spec,
        manifest.vocabulary,
        views,
        aggregation,
        thresholds.values,
        thresholds.source,
        None,
        dict(manifest.thresholds),
        "triton",
        engine,
        card,
    )


def _engine(card: ModelCard, address: ServerAddress) -> Engine:
    """The one of the bundle's engines that the server runs."""
    for engine in card.manifest.engines:
        if (engine.runtime, engine.precision_read, engine.device) == (
            card.runtime,
            card.precision,
            card.device,
        ):
            return engine
    raise ArtifactError(
        f"{address} runs {card.runtime} in {card.precision} on {card.device}, which its bundle does not hold",
        f"one of {', '.join(engine.name for engine in card.manifest.engines)}",
        "serve the bundle again",
    )


def _hold_engine(settings: TaggerSettings, card: ModelCard, engine: Engine) -> None:
    """Raise `UsageError` if another engine was asked for than the server runs, which nobody here can change."""
    for flag, asked, served in (
        ("--runtime", settings.runtime, ("auto", engine.runtime)),
        ("--precision", settings.precision, (engine.precision,)),
        ("--threads", settings.threads, (0,)),
        # Of this machine's devices none is used; only who asks for a GPU may be disappointed.
        ("--device", settings.device, ("cpu",) if card.device == "cpu" else ("cpu", "cuda")),
    ):
        if asked not in served:
            raise UsageError(
                f"{flag} {asked} for {settings.model}",
                f"{flag} {served[-1]}: the server runs {engine.name}",
                f"{flag} {served[-1]}, or serve another engine",
            )


def _thresholds(
    settings: TaggerSettings,
    card: ModelCard,
    views: Views,
    aggregation: Aggregation,
    *,
    is_classifier: bool,
) -> Thresholds:
    """The server's own, unless others were asked for, or views that it has none for."""
    if settings.threshold is None and str(views) == card.views:
        return Thresholds(card.thresholds, card.threshold_source)
    usual = CLASSIFIER_THRESHOLD if is_classifier else DEFAULT_THRESHOLD
    names = card.manifest.vocabulary.names
    return chosen_thresholds(settings, names, str(views), aggregation, card.manifest.thresholds, usual)
