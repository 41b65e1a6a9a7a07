"""What may not be asked of a model that is finished: a bundle, a classifier, or what a server serves."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from cliplet.artifact import Bundle, Manifest
from cliplet.contract import SNIPPETS, TRUNK
from cliplet.errors import UsageError
from cliplet.model_spec import TRUNK_PREFIX, ModelSpec
from cliplet.views import Aggregation, Views
from cliplet.vocabulary import Vocabulary, prompt_set, read_vocabulary

if TYPE_CHECKING:
    from cliplet.plan import TaggerSettings


def chosen_views(settings: TaggerSettings, *, looks_once: bool, usual: str) -> Views:
    """The views that were asked for, or the usual ones.

    Args:
        looks_once: whether the model looks at whole images alone, as classifiers and trunks do.

    Raises:
        UsageError: they are none, or more than one for a model that looks once.
    """
    views = Views.parse(settings.views or usual)
    if looks_once and views.count > 1:
        raise UsageError(
            f"--views {settings.views} for {settings.model}",
            "no --views: a classifier or a trunk looks at the whole image",
            "leave --views out",
        )
    return views


def gives_features(spec: ModelSpec, manifest: Manifest | None) -> bool:
    """Whether a model is a trunk, which gives features and no labels.

    Args:
        manifest: of the bundle that it is, here or on a server.
    """
    return spec.trunk is not None or (manifest is not None and manifest.contract is TRUNK)


def hold_labels(spec: ModelSpec, manifest: Manifest | None) -> None:
    """Raise `UsageError` if a model is a trunk; see `gives_features`."""
    if not gives_features(spec, manifest):
        return
    source = (manifest.model if manifest else str(spec)).removeprefix(TRUNK_PREFIX)
    raise UsageError(
        f"{spec} gives features of images, not labels",
        "a CLIP or a classifier",
        "make a student of it, which gives labels: cliplet train folder_ccd "
        f"--trunk {shlex.quote(TRUNK_PREFIX + source)} --root IMAGES --classes FILE --out OUT",
    )


def refuse_labels(settings: TaggerSettings) -> None:
    """Raise `UsageError` if something about labels was asked of a trunk."""
    names = ("classes", "prompts", "threshold", "aggregate", "zeta")
    given = " and ".join(f"--{name}" for name in names if getattr(settings, name) is not None)
    if given:
        raise UsageError(
            f"{given} for {settings.model}",
            "a CLIP: a trunk gives features of whole images, not labels",
            f"leave {given} out",
        )


def refuse_aggregation(settings: TaggerSettings) -> None:
    """Raise `UsageError` if an aggregation was asked of a classifier."""
    asked = {"--aggregate": settings.aggregate, "--zeta": settings.zeta}
    given = [flag for flag, value in asked.items() if value is not None]
    if given:
        raise UsageError(
            f"{' and '.join(f'{flag} {asked[flag]}' for flag in given)} for {settings.model}",
            "neither --aggregate nor --zeta: a classifier looks at the whole image, so nothing is aggregated",
            f"leave {' and '.join(given)} out",
        )


def hold_vocabulary(
    own: Vocabulary, settings: TaggerSettings, given: Vocabulary | None, bundle: Bundle | None
) -> None:
    """Raise `UsageError` if other classes or prompts were asked for than a finished model has.

    Args:
        given: asked for beside the settings.
        bundle: on this machine, which could be exported with others.
    """
    prompts = prompt_set(settings.prompts) if settings.prompts else (given or own).prompts
    asked = (given or own).names if settings.classes is None else read_vocabulary(settings.classes).names
    if asked == own.names and prompts == own.prompts:
        return
    if bundle is not None and bundle.manifest.contract is SNIPPETS:
        fix = f"leave both out, or cliplet export {bundle.folder} --classes NEW --out OTHER"
    else:
        fix = "leave both out"
    raise UsageError(
        f"{settings.model} was made for other classes or prompts than --classes and --prompts name",
        f"its own {len(own.names)} classes ({', '.join(own.names[:8])}, …)",
        fix,
    )


def own_aggregation(manifest: Manifest, settings: TaggerSettings) -> Aggregation:
    """The aggregation inside a bundle's graph.

    Raises:
        UsageError: another one was asked for.
    """
    own = Aggregation(**manifest.aggregation)
    if asked_aggregation(settings, own) != own:
        raise UsageError(
            f"{settings.model} aggregates with {own.kind}, zeta {own.zeta}: that is inside its graph",
            "no other --aggregate or --zeta",
            f"leave both out, or start from its original: --model {manifest.model}",
        )
    return own


def asked_aggregation(settings: TaggerSettings, usual: Aggregation) -> Aggregation:
    """The usual aggregation, changed where something else was asked for."""
    kind = usual.kind if settings.aggregate is None else settings.aggregate
    return Aggregation(kind, usual.zeta if settings.zeta is None else settings.zeta)
