"""CLIP as the public code of CCD asks it: one image or crop at a time, at a size of its own, aspect kept.

The slow way and the exact one: for recipes that follow the release to the letter, and the baseline that the
batched pass is measured against. Facts of its `train.py` and `datasets.py` (k0u-id/CCD) that matter:

- The whole image is squashed to S x S by Pillow, bilinear and antialiased, then normalised as for ImageNet.
- A crop is cut out of those pixels and resized by torch, bilinear and not antialiased, until its longer side
  is S; the factor is found in float32 and the sides are cut off to whole pixels, so that S may become S - 1.
- A ResNet of CLIP's own sees any size, its attention pool's positions interpolated bilinearly.
- Cosines are multiplied by 100 whatever the model learned.

The released code runs CLIP in half precision; here it is float32.

Legend: C classes, S side of the squashed image, H x W pixels of a view, P x Q cells of a feature map.
"""

from __future__ import annotations

import numpy as np
import torch
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from cliplet.errors import UsageError
from cliplet.teacher import ImageTower, Teacher
from cliplet.vocabulary import Vocabulary

from .teacher_tagger import IMAGENET_MEAN, IMAGENET_STD

RELEASED_SIZE = 640
RELEASED_SCALE = 100.0


class ReleasedTeacher:
    """A CLIP model that scores whole images and crops at their own sizes, one by one.

    Args:
        size: side S.
        scale: what cosines are multiplied by; None takes what the model learned.

    Raises:
        UsageError: the model has sigmoids, or its encoder sees images of one size only, as plain ViTs do.
    """

    def __init__(
        self,
        teacher: Teacher,
        vocabulary: Vocabulary,
        *,
        size: int = RELEASED_SIZE,
        scale: float | None = RELEASED_SCALE,
    ) -> None:
        if teacher.bias is not None:
            raise UsageError(
                f"{teacher.spec} gives sigmoids", "a model with a softmax, as the released code has"
            )
        self.size = size
        self.scale = teacher.scale if scale is None else scale
        clip = teacher.clip
        self._device = next(clip.parameters()).device
        self._text_CD = teacher.text_matrix(vocabulary)
        own_resnet = isinstance(clip.visual, ModifiedResNet)
        self._tower = AnySizeResNet(clip.visual) if own_resnet else ImageTower(clip)
        self._refuse_fixed_size(teacher)

    def squashed(self, image: np.ndarray) -> np.ndarray:
        """An image uint8 [H, W, 3] as uint8 [S, S, 3], the aspect ignored."""
        side = (self.size, self.size)
        return np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BILINEAR))

    def probs_whole(self, image: np.ndarray) -> np.ndarray:
        """Class probabilities float32 [C] of an image uint8 [H, W, 3] of any size."""
        return self._probs(self._normalised(self.squashed(image)))

    def probs_crop(self, squashed: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        """Class probabilities float32 [C] of a crop.

        Args:
            squashed: uint8 [S, S, 3], from `squashed`.
            box: (x0, y0, x1, y1) in its pixels, x1 and y1 excluded.

        Raises:
            UsageError: the box is empty or reaches beyond the image.
        """
        x0, y0, x1, y1 = box
        height, width = squashed.shape[:2]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UsageError(
                f"box {box} in an image of {width} x {height} pixels", "0 <= x0 < x1 and 0 <= y0 < y1, inside"
            )
        pixels = self._normalised(squashed)[:, :, y0:y1, x0:x1]
        sides = crop_sides(y1 - y0, x1 - x0, self.size)
        return self._probs(functional.interpolate(pixels, sides, mode="bilinear", align_corners=False))

    def _normalised(self, pixels: np.ndarray) -> Tensor:
        """Float32 [1, 3, H, W]; divided in float64, as there."""
        normal = (pixels / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        return torch.from_numpy(normal.astype(np.float32)).permute(2, 0, 1)[None].to(self._device)

    @torch.inference_mode()
    def _probs(self, pixels: Tensor) -> np.ndarray:
        cosines_1C = functional.normalize(self._tower(pixels), dim=-1) @ self._text_CD.T
        return (self.scale * cosines_1C).softmax(dim=-1)[0].cpu().numpy()

    @torch.inference_mode()
    def _refuse_fixed_size(self, teacher: Teacher) -> None:
        side = teacher.preprocessing.size
        try:
            self._tower(torch.zeros(1, 3, side + 32, side + 64, device=self._device))
        # Encoders complain of a size in whatever way comes first.
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UsageError(
                f"the encoder of {teacher.spec} sees images of {side} x {side} pixels only",
                "one for any size: CLIP's own ResNets (RN50 to RN50x64), or a convolutional one of timm",
                "label with the batched pass, which cuts squares, or choose another teacher",
            ) from error


class AnySizeResNet(nn.Module):
    """Features float [N, D] that a ResNet of CLIP's own gives of pixels float [N, 3, H, W] of any size.

    The attention pool has learned a position for each cell of one square; for another feature map they are
    interpolated bilinearly.
    """

    def __init__(self, visual: ModifiedResNet) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        visual = self.visual
        cells = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
        learned = visual.attnpool.positional_embedding
        resized = {"positional_embedding": resized_positions(learned, cells.shape[-2], cells.shape[-1])}
        return functional_call(visual.attnpool, resized, (cells,))


def resized_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Positions float [1 + height * width, D] from learned ones [1 + P * P, D]; the first stands for the mean."""
    side = round((len(positions) - 1) ** 0.5)
    grid = positions[1:].T.reshape(1, -1, side, side)
    resized = functional.interpolate(grid, (height, width), mode="bilinear", align_corners=False)
    return torch.cat([positions[:1], resized[0].flatten(1).T])


def crop_sides(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width to which a crop is resized: the longer one becomes `size`, or one pixel less.

    torch divides a number by a tensor as a float32 reciprocal times the number, and int() cuts off.
    """
    scale = np.float32(1) / np.float32(max(height, width)) * np.float32(size)
    return int(np.float32(height) * scale), int(np.float32(width) * scale)
