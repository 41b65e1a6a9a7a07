"""Teachers for a label pass: any model, any vocabulary, the public code's normalisation if it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from cliplet.contract import SNIPPETS
from cliplet.errors import UsageError
from cliplet.plan import Plan, TaggerSettings, make_plan
from cliplet.tagger import Tagger, load_plan
from cliplet.views import Preprocessing
from cliplet.vocabulary import Vocabulary

# What ImageNet classifiers are fed with; the released code feeds it to CLIP, too.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def open_teacher(
    model: str,
    vocabulary: Vocabulary,
    *,
    views: str,
    normalisation: Literal["own", "imagenet"] = "own",
    whole_image: Literal["own", "squash"] = "own",
    runtime: str = "onnx",
    device: str = "cpu",
    threads: int = 0,
) -> Tagger:
    """A tagger that scores the classes of `vocabulary`; a context manager that frees its engine.

    Args:
        model, views, runtime, device, threads: see `cliplet.plan.TaggerSettings`.
        normalisation: `own` is what the encoder was trained with; `imagenet` is ImageNet's mean and standard
            deviation, as in CCD's public code, and needs the runtime `torch`.
        whole_image: `own` shows the encoder of a whole image what its own transform does, mostly the middle
            square; `squash` shows all of it, the aspect ignored.

    Raises:
        UsageError: an option is unknown, or the runtime cannot do what is asked, or the model is a bundle that
            was made for another vocabulary.
        EnvironmentError_: this machine lacks the runtime, the device or the weights.
    """
    if normalisation not in ("own", "imagenet") or whole_image not in ("own", "squash"):
        raise UsageError(
            f"normalisation {normalisation!r} and whole image {whole_image!r}",
            "own or imagenet, and own or squash",
        )
    settings = TaggerSettings(model=model, views=views, runtime=runtime, device=device, threads=threads)
    chosen = make_plan(settings, vocabulary)
    if chosen.vocabulary.to_json() != vocabulary.to_json():
        raise UsageError(
            f"the bundle {model} was made for other classes or prompts",
            "its own vocabulary, synonyms included",
            "start from its original",
        )
    if normalisation == "own":
        tagger = load_plan(chosen)
    elif runtime == "torch" and chosen.bundle is None:
        tagger = _with_imagenet_normalisation(chosen)
    else:
        raise UsageError(
            "normalisation 'imagenet' with a graph, whose own normalisation is traced into it",
            "the runtime torch and no bundle",
            "choose the runtime torch, or the model's own normalisation",
        )
    if whole_image == "squash":
        tagger.preprocessing = replace(tagger.preprocessing, resize_mode="squash")
    return tagger


def provenance(tagger: Tagger) -> dict[str, Any]:
    """What a row of this teacher depends on, ready for JSON: for `LabelBank.open`."""
    described = tagger.plan.fingerprint()
    return {
        **{key: described[key] for key in ("model", "vocabulary", "views")},
        "preprocessing": tagger.preprocessing.to_json(),
        "runtime": tagger.runner.runtime,
        "device": tagger.runner.device,
        "precision": tagger.runner.precision,
    }


def _with_imagenet_normalisation(chosen: Plan) -> Tagger:
    from cliplet.runners.torch_runner import TorchRunner
    from cliplet.teacher import load_teacher

    teacher = load_teacher(chosen.spec)
    fed: Preprocessing = replace(teacher.preprocessing, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    module = replace(teacher, preprocessing=fed).snippets(chosen.vocabulary, chosen.aggregation)
    runner = TorchRunner(module, SNIPPETS, chosen.settings.device, chosen.settings.threads)
    return Tagger(chosen, runner, fed)
