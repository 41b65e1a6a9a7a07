"""The model that a bundle is made from, ready to be traced and to be compared with.

Legend: B images, V views, C classes, D embedding, L text context.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cliplet.artifact import BundleJob
from cliplet.classifier import load_classifier
from cliplet.contract import CLASSIFIER, SNIPPETS, TEXT_INITIALIZER, TRUNK, GraphContract
from cliplet.teacher import Teacher, load_teacher
from cliplet.tower_files import read_tower_normalisation
from cliplet.trunk_files import is_trunk_folder, load_trunk
from cliplet.views import Preprocessing
from cliplet.vision_tower import PooledTower, load_vision_tower

from .graphs import ClassifierGraph, Eager, SnippetsGraph, TrunkGraph

# Any sizes do: all axes are dynamic.
IMAGES, VIEWS, HEIGHT, WIDTH = 2, 3, 64, 96


@dataclass(frozen=True)
class Original:
    """A trained model as a graph of `cliplet.contract`.

    Attributes:
        eager: the module that every file is compared with: the contract's inputs in, its outputs out.
        traced: the module that is traced, with what it is fed meanwhile in `example`.
        text_CD: unit text rows, of a CLIP.
        teacher: the CLIP, if it is one.
    """

    contract: GraphContract
    eager: nn.Module
    traced: nn.Module
    example: dict[str, torch.Tensor]
    preprocessing: Preprocessing
    scale: float
    bias: float | None
    text_CD: torch.Tensor | None = None
    teacher: Teacher | None = None


def load_original(job: BundleJob) -> Original:
    """The model that `job` names, in float32 on the CPU.

    Raises:
        ArtifactError, DataError, EnvironmentError_, UsageError: it cannot be loaded.
    """
    if job.spec.trunk:
        return _whole_images(TRUNK, TrunkGraph(*_trunk(job.spec.trunk)))
    if job.spec.classifier:
        return _whole_images(CLASSIFIER, ClassifierGraph(load_classifier(job.spec.classifier)))
    return _clip(job)


def _clip(job: BundleJob) -> Original:
    teacher = load_teacher(job.spec)
    module = teacher.snippets(job.vocabulary, job.aggregation)
    boxes = torch.tensor([0.0, 0, WIDTH, HEIGHT]).repeat(IMAGES, VIEWS, 1)
    example = {
        "image": torch.zeros(IMAGES, HEIGHT, WIDTH, 3, dtype=torch.uint8),
        "boxes": boxes,
        TEXT_INITIALIZER: torch.ones(5, module.text.shape[1]),
    }
    return Original(
        SNIPPETS,
        module,
        SnippetsGraph(module),
        example,
        teacher.preprocessing,
        teacher.scale,
        teacher.bias,
        module.text,
        teacher,
    )


def _trunk(folder: Path) -> tuple[nn.Module, Preprocessing]:
    """What gives features of normalised pixels, and what it is fed."""
    if is_trunk_folder(folder):
        trunk, config = load_trunk(folder)
        return trunk, config.preprocessing
    tower = load_vision_tower(folder)
    # As CLIP's image processor does it, which MLCD kept: the shorter side to S, then the middle square.
    fed = Preprocessing(tower.config["image_size"], *read_tower_normalisation(folder))
    return PooledTower(tower), fed


def _whole_images(contract: GraphContract, graph: ClassifierGraph | TrunkGraph) -> Original:
    example = {
        "image": torch.zeros(IMAGES, HEIGHT, WIDTH, 3, dtype=torch.uint8),
        "boxes": torch.tensor([0.0, 0, WIDTH, HEIGHT]).repeat(IMAGES, 1),
    }
    return Original(contract, Eager(graph).eval(), graph, example, graph.preprocessing, 1.0, None)
