"""Bundles to serve: a teacher, a student and a trunk of a few megabytes, each built once in a test run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from towers import save_toy_trunk

from cliplet.artifact import Bundle, BundleJob, Engine, cache_folder
from cliplet.contract import SNIPPETS
from cliplet.lock import lock_folder
from cliplet.model_spec import MANIFEST_NAME, file_sha256
from cliplet.plan import TaggerSettings, make_plan

# The teacher's are those of `tiny`.
STUDENT_CLASSES = ("cat", "dog", "bird", "boat")


def make_teacher(folder: Path) -> Path:
    """A bundle of the embedded CLIP `tiny` in `folder`: 20 classes, the text tower, onnx-fp32."""
    return Path(shutil.copytree(_teacher(), folder))


def make_student(folder: Path) -> Path:
    """A bundle of a small classifier with random weights in `folder`: STUDENT_CLASSES, onnx-fp32."""
    return Path(shutil.copytree(_student(), folder))


def make_trunk(folder: Path) -> Path:
    """A bundle of a small trunk with random weights in `folder`: embeddings alone, onnx-fp32."""
    return Path(shutil.copytree(_built("trunk", lambda: str(save_toy_trunk(_shared() / "learned"))), folder))


def _teacher() -> Path:
    return _built("teacher", lambda: "tiny")


def _student() -> Path:
    return _built("student", lambda: str(_classifier(_shared() / "classifier")))


def _classifier(folder: Path) -> Path:
    import torch

    from cliplet.classifier import Classifier, ClassifierConfig, save_classifier
    from cliplet.views import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
    from cliplet.vocabulary import read_vocabulary

    torch.manual_seed(3)
    fed = Preprocessing(64, IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")
    config = ClassifierConfig(trunk="test_resnet", boost=3.0, preprocessing=fed)
    made = Classifier(config, read_vocabulary(",".join(STUDENT_CLASSES)))
    with torch.no_grad():
        # Random heads look at everything alike; larger weights make scores differ between images.
        made.head.weight.mul_(30)
    save_classifier(folder, made, {"recipe": {"method": "ccd"}})
    return folder


def _built(name: str, model: Callable[[], str]) -> Path:
    """The bundle of a model, its text tower with it if it has one; built by the first worker that asks."""
    folder = _shared() / name
    lock = lock_folder(_shared(), wait=True)
    try:
        if not folder.exists():
            _build(model(), folder)
    finally:
        os.close(lock)
    return folder


def _build(model: str, folder: Path) -> None:
    from cliplet.export.bundle import BuildOptions, build_bundle

    plan = make_plan(TaggerSettings(model=model, runtime="onnx"), features=True)
    job = BundleJob(plan.spec, plan.vocabulary, plan.aggregation, plan.calibrated)
    build_bundle(job, folder, BuildOptions(count=4, text=plan.contract is SNIPPETS, threads=1))


def _shared() -> Path:
    """A folder of this test run, for all its workers: the tests' own cache lies in that of one worker."""
    own = cache_folder().parent
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "served"


def add_engine(bundle: Path, engine: Engine, *sources: Path) -> Path:
    """Put files beside an engine's main file into a bundle and write it into the manifest, hashes and all."""
    manifest = Bundle.load(bundle).manifest
    place = (bundle / engine.file).parent
    place.mkdir(exist_ok=True)
    copies = [Path(shutil.copy(source, place / source.name)) for source in sources]
    hashes = {copy.relative_to(bundle).as_posix(): file_sha256(copy) for copy in copies}
    changed = replace(manifest, engines=(*manifest.engines, engine), files={**manifest.files, **hashes})
    (bundle / MANIFEST_NAME).write_text(json.dumps(changed.to_json()))
    return bundle
