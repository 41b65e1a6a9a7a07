"""Embedders of whole images: CLIP's image tower, released vision towers, trunks and classifiers trained here.

    embedder = teacher_embedder("tiny")
    embeddings = embed_images(images, folder, embedder)

Legend: B images, D width of an embedding, S side of the encoder's input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cliplet.classifier import load_classifier
from cliplet.errors import ClipletError, UsageError
from cliplet.images import Picture
from cliplet.machine import usable_cores
from cliplet.model_spec import ModelSpec, parse_model_spec
from cliplet.runners import engine_failure
from cliplet.runners.torch_encoder import DTYPES
from cliplet.snippets import cut_views
from cliplet.teacher import ImageTower, load_teacher
from cliplet.tower_files import PREFIX, read_tower_normalisation
from cliplet.trunk_files import is_trunk_folder, load_trunk, refuse_near_trunk
from cliplet.views import Preprocessing, Views, place_on_canvas
from cliplet.vision_tower import PooledTower, load_vision_tower

from .predict import usable_device

WHOLE = Views()


@dataclass(frozen=True)
class Encoder:
    """A module that gives features float [B, D] of normalised pixels float [B, 3, S, S], and what it is fed."""

    name: str
    module: nn.Module
    preprocessing: Preprocessing


class TorchEmbedder:
    """Unit embeddings of whole images, by a torch module; an `Embedder`.

    Args:
        threads: of torch's operators on the CPU; 0 means one for each core that this process may use.
        precision: of the encoder's matrix products: `fp32`, `fp16` or `bf16`.

    Raises:
        UsageError: there is no such precision.
        EnvironmentError_: torch cannot use the device.
    """

    def __init__(
        self, encoder: Encoder, device: str = "cpu", threads: int = 0, precision: str = "fp32"
    ) -> None:
        if precision not in DTYPES:
            raise UsageError(f"precision {precision!r}", f"one of {', '.join(DTYPES)}", "--precision fp32")
        usable_device(device)
        torch.set_num_threads(threads or usable_cores())
        # Float32 means float32: on a GPU, convolutions would otherwise round to 10 bits of mantissa.
        torch.backends.cudnn.allow_tf32 = False
        fed = encoder.preprocessing
        self._module = encoder.module.eval().requires_grad_(False).to(device)
        self._fed, self._device, self._precision = fed, device, precision
        self._mean = 255 * torch.tensor(fed.mean, device=device).view(3, 1, 1)
        self._std = 255 * torch.tensor(fed.std, device=device).view(3, 1, 1)
        with torch.inference_mode():
            self.width = self._encoded(torch.zeros(1, 3, fed.size, fed.size, device=device)).shape[1]
        self.room: dict[str, int] = WHOLE.room(fed)
        self.identity: dict[str, Any] = {
            "model": encoder.name,
            "weights_sha256": _weights_sha256(encoder.module),
            "preprocessing": fed.to_json(),
            "precision": precision,
        }

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Float32 [B, D], rows of length 1 (of 0, where the encoder gives zeros).

        Raises:
            EnvironmentError_: torch refuses the batch, mostly for want of memory.
        """
        pixels, sizes = [p.pixels for p in pictures], [(p.width, p.height) for p in pictures]
        feeds = place_on_canvas(pixels, WHOLE, self._fed, None, sizes)
        try:
            image, boxes = (torch.from_numpy(feeds[name]).to(self._device) for name in ("image", "boxes"))
            views_B3SS = cut_views(image, boxes, self._fed.size, self._fed.interpolation)[:, 0]
            features_BD = self._encoded((views_B3SS - self._mean) / self._std)
        except RuntimeError as error:
            raise engine_failure(f"torch {torch.__version__}", feeds, error) from error
        found: np.ndarray = functional.normalize(features_BD.float(), dim=-1).cpu().numpy()
        return found

    def _encoded(self, pixels_B3SS: Tensor) -> Tensor:
        lowered = self._precision != "fp32"
        dtype = DTYPES[self._precision] if lowered else None
        with torch.autocast(self._device, dtype, enabled=lowered):
            features_BD: Tensor = self._module(pixels_B3SS)
        return features_BD


def teacher_embedder(
    model: str, device: str = "cpu", threads: int = 0, precision: str = "fp32"
) -> TorchEmbedder:
    """The embedder that `model` names, fed as its model was trained.

    Args:
        model: a CLIP (`tiny`, `open_clip:…`), whose image tower embeds; `mlcd:FOLDER`, a vision tower that transformers
            saved or a trunk that `cliplet train mlcd` trained; the folder of such a trunk; or the folder of a
            classifier, whose trunk embeds as it pools.

    Raises:
        UsageError: there is no such model, or it is a bundle or on a server, whose engines are not used here.
        DataError: its files are broken.
        EnvironmentError_: this machine lacks the weights, a library or the device.
    """
    return TorchEmbedder(load_encoder(model), device, threads, precision)


def load_encoder(model: str) -> Encoder:
    """The encoder that `model` names, on the CPU; see `teacher_embedder`."""
    spec = encoder_spec(model)
    if spec.trunk is not None:
        return _trunk(model, spec.trunk)
    if spec.classifier is not None:
        classifier = load_classifier(spec.classifier)
        trunk = PooledTower(classifier.trunk) if classifier.config.tower is not None else classifier.trunk
        return Encoder(model, trunk, classifier.config.preprocessing)
    if spec.bundle is not None or spec.server is not None:
        raise UsageError(
            f"{model} is a bundle or on a server, whose engine is not used here",
            f"tiny, open_clip:ARCH/PRETRAINED, {PREFIX}FOLDER, or the folder of a trunk or a classifier",
            "name the original that it was made from",
        )
    teacher = load_teacher(spec)
    return Encoder(model, ImageTower(teacher.clip), teacher.preprocessing)


def encoder_spec(model: str) -> ModelSpec:
    """What `model` names; the folder of a run in which a trunk lies is refused with the trunk's name.

    Raises:
        UsageError, DataError: it names no model.
    """
    try:
        return parse_model_spec(model)
    except ClipletError:
        refuse_near_trunk(model)
        raise


def _trunk(model: str, folder: Path) -> Encoder:
    if is_trunk_folder(folder):
        trunk, config = load_trunk(folder)
        return Encoder(model, trunk, config.preprocessing)
    refuse_near_trunk(model)
    tower = load_vision_tower(folder)
    mean, std = read_tower_normalisation(folder)
    # As CLIP's image processor does it: the shorter side to S, then the middle square.
    return Encoder(model, PooledTower(tower), Preprocessing(tower.config["image_size"], mean, std))


def _weights_sha256(module: nn.Module) -> str:
    """Hex SHA-256 of a module's names, types and values, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = np.ascontiguousarray(tensor.detach().cpu().numpy())
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
