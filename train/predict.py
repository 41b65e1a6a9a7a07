"""A classifier's scores, and its class activation maps, for any number of images.

Legend: N images, B images of a batch, C classes, S side of the input, h x w cells of the CAM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cliplet.classifier import Classifier
from cliplet.errors import DataError, EnvironmentError_, UsageError
from cliplet.listing import ImageRef

from .feed import ImageBatch, PixelCache, image_batches

PREDICTION_BATCH = 64  # images
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Predictions:
    """Scores of images.

    Attributes:
        scores_NC: float32 [N, C], sigmoids; rows of images that could not be scored are nan.
        failed: (path, reason) of those.
    """

    scores_NC: np.ndarray
    failed: list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """A batch with its logits float32 [B, C] and boosted class activation maps float32 [B, C, h, w]."""

    images: ImageBatch
    logits_BC: Tensor
    cam_BChw: Tensor


def predict(
    classifier: Classifier,
    images: Sequence[ImageRef],
    *,
    device: str = "cpu",
    batch_size: int = PREDICTION_BATCH,
    workers: int = 1,
    precision: str = "fp32",
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """The classifier's scores of `images`.

    Args:
        precision: `fp32`, or `bf16` or `fp16` for mixed precision.
        workers: threads that decode; 0 decodes between the batches.
        progress: called with the number of images just done.

    Raises:
        UsageError: a precision that there is not.
        EnvironmentError_: torch has no such device.
        DataError: scores that are not finite.
    """
    scores_NC = np.full((len(images), len(classifier.vocabulary.names)), np.nan, np.float32)
    failed = []
    batches = prediction_batches(len(images), size=batch_size)
    placed = classifier.to(usable_device(device))
    for scored in scored_batches(placed, images, batches, workers=workers, precision=precision):
        scores_NC[scored.images.indices_B] = scored.logits_BC.sigmoid().cpu().numpy()
        failed += [(images[index].path, reason) for index, reason in scored.images.failed]
        if progress:
            progress(len(scored.images.indices_B) + len(scored.images.failed))
    return Predictions(scores_NC, failed)


def prediction_batches(
    count: int, rank: int = 0, world: int = 1, size: int = PREDICTION_BATCH
) -> list[np.ndarray]:
    """Positions 0 … count - 1 in batches: those that process `rank` of `world` predicts."""
    return np.split(np.arange(count), range(size, count, size))[rank::world]


def scored_batches(
    classifier: Classifier,
    images: Sequence[ImageRef],
    batches: Sequence[np.ndarray],
    *,
    size: int | None = None,
    workers: int = 1,
    precision: str = "fp32",
    cache: PixelCache | None = None,
) -> Iterator[ScoredBatch]:
    """Batches with logits and CAM, in evaluation mode, on the device where the classifier lies.

    Args:
        batches: positions of the images of each batch.
        size: side of the input, by default the classifier's own.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}", f"one of {', '.join(PRECISIONS)}", "--precision fp32")
    training = classifier.training
    classifier.eval()
    try:
        side = size or classifier.config.preprocessing.size
        for batch in image_batches(images, batches, side, workers, cache):
            yield _scored(classifier, batch, PRECISIONS[precision], images)
    finally:
        classifier.train(training)


@torch.inference_mode()
def _scored(
    classifier: Classifier, batch: ImageBatch, dtype: torch.dtype, images: Sequence[ImageRef]
) -> ScoredBatch:
    device = classifier.head.weight.device
    pixels = unit_pixels(batch.pixels_BSS3, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits, cam = classifier(pixels)
    bad_B = ~torch.isfinite(logits).all(1).cpu().numpy()
    if bad_B.any():
        named = ", ".join(images[i].path for i in batch.indices_B[bad_B][:3])
        raise DataError(
            f"the classifier's scores of {int(bad_B.sum())} images are not finite ({named})",
            "finite numbers",
            "use --precision fp32, or an earlier checkpoint",
        )
    return ScoredBatch(batch, logits.float(), cam.float())


def unit_pixels(pixels_BSS3: np.ndarray, device: torch.device) -> Tensor:
    """Pixels float32 [B, 3, S, S] in 0..1 on `device`, channels last in memory."""
    tensor = torch.from_numpy(pixels_BSS3)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    # A permuted [B, S, S, 3] array is what channels_last means, so this copies nothing but the type.
    return tensor.permute(0, 3, 1, 2).float().div(255)


def usable_device(device: str) -> torch.device:
    """The torch device called `cpu` or `cuda`.

    Raises:
        EnvironmentError_: torch finds no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentError_(
            "asked for device 'cuda', but torch finds no usable GPU",
            "an NVIDIA GPU, its driver and a torch built for it",
            "run `cliplet doctor`, or pass --device cpu",
        )
    return torch.device(device)
