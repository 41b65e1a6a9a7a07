"""From pixels and boxes to class probabilities: the module that is run eagerly and exported whole.

Legend: B images, V views, C classes, D embedding, H x W canvas pixels, S side of the encoder's input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional

from cliplet.views import Aggregation, Preprocessing


def aggregate(view_probs_BVC: Tensor, aggregation: Aggregation) -> Tensor:
    """Scores float [B, C] from view probabilities float [B, V, C], where view 0 is the whole image.

    With V = 1 the whole image stands in for the missing local views. It is written without branches on V, so
    that a traced graph serves any number of views.
    """
    if aggregation.kind == "mean":
        return view_probs_BVC.mean(dim=1)
    if aggregation.kind == "max":
        return view_probs_BVC.amax(dim=1)
    first_local = torch.ones_like(view_probs_BVC[0, :, 0]).sum().sub(1).clamp(max=1)
    index_V = torch.arange(view_probs_BVC.shape[1], device=view_probs_BVC.device)
    is_local_V1 = (index_V >= first_local).unsqueeze(-1)
    # Probabilities lie in 0..1, so -1 and 2 never win.
    largest_BC = torch.where(is_local_V1, view_probs_BVC, -1.0).amax(dim=1)
    smallest_BC = torch.where(is_local_V1, view_probs_BVC, 2.0).amin(dim=1)
    local_BC = torch.where(largest_BC >= aggregation.zeta, largest_BC, smallest_BC)
    return 0.5 * (view_probs_BVC[:, 0] + local_BC)


def cubic_kernel(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2, as Pillow uses it: 1 at 0, 0 at 1, and 0 from 2 on.

    The two cubic pieces are written on the bases (2 - |x|)+ and (1 - |x|)+, which needs no branch.
    """
    x = distance.abs()
    u, v = (2 - x).clamp(min=0), (1 - x).clamp(min=0)
    return 0.5 * u * u * (u - 1) + v * v * (1 - 2 * v)


def linear_kernel(distance: Tensor) -> Tensor:
    """The triangle of bilinear interpolation."""
    return (1 - distance.abs()).clamp(min=0)


# Each with how far it reaches, in samples.
KERNELS = {"bicubic": (cubic_kernel, 2), "bilinear": (linear_kernel, 1)}
# A distance from every sample, in widths of the kernel, at which each kernel is 0.
FAR = 1e4
# Samples of an axis that are resampled in one product of matrices. A sample depends on a few pixels only: for all of
# an axis at once, most of the weights would be 0.
STRETCH = 32


def resize_weights(
    begin_V: Tensor, end_V: Tensor, pixels: int, size: int, interpolation: str
) -> tuple[Tensor, Tensor]:
    """What resamples the part `begin`..`end` of an axis to `size` samples, stretch by stretch of the samples.

    Antialiased like Pillow's: when the part shrinks, the kernel widens by the same factor. Pixels outside
    of the part weigh nothing, as if it had been cut out first.

    Args:
        begin_V, end_V: float [V], in pixels, inside the axis.
        pixels: length P of the axis.

    Returns:
        Pixels int64 [V, N, K] that each of N stretches looks at, and their weights float [V, N, T, K] in each of its T
        samples. The last stretch has samples beyond `size`. A part that is longer than its axis weighs NaN.
    """
    kernel, reach = KERNELS[interpolation]
    step_V = (end_V - begin_V) / size
    width_V = step_V.clamp(min=1)
    stretches = -(-size // STRETCH)
    # As many as any stretch needs that a part inside the axis has: its samples, and the kernel on both sides. Nothing
    # negative is divided: ONNX rounds that towards 0.
    length = torch.sym_min(pixels, STRETCH * pixels // size + 2 * reach * ((pixels + size - 1) // size) + 3)
    samples_T = torch.arange(STRETCH, dtype=begin_V.dtype, device=begin_V.device) + 0.5
    first_N = STRETCH * torch.arange(stretches, dtype=begin_V.dtype, device=begin_V.device)
    lowest_VN = begin_V[:, None] + (first_N + 0.5) * step_V[:, None] - reach * width_V[:, None]
    begins_VN = torch.floor(lowest_VN - 0.5).clamp(min=0, max=pixels - length)
    pixel_VNK = begins_VN[:, :, None] + torch.arange(length, dtype=begin_V.dtype, device=begin_V.device)
    begin_V11, end_V11, width_V11 = (x_V[:, None, None] for x_V in (begin_V, end_V, width_V))
    middle_VNK = pixel_VNK + 0.5
    # A box that begins or ends inside a pixel holds that pixel.
    inside_VNK = (middle_VNK > torch.floor(begin_V11)) & (middle_VNK < torch.ceil(end_V11))
    # Positions in widths of the kernel. Those outside go where no kernel reaches, which costs less than a mask on
    # the larger array of weights.
    pixel_VNK_at = torch.where(inside_VNK, (middle_VNK - begin_V11) / width_V11, FAR)
    sample_VNT_at = (first_N[:, None] + samples_T) * (step_V / width_V)[:, None, None]
    weights_VNTK = kernel(pixel_VNK_at[:, :, None, :] - sample_VNT_at[:, :, :, None])
    fits_V111 = (step_V * size <= pixels + 1)[:, None, None, None]
    sums_VNT1 = torch.where(fits_V111, weights_VNTK.sum(dim=-1, keepdim=True), torch.nan)
    return pixel_VNK.long(), weights_VNTK / sums_VNT1


def cut_image(image_HWC: Tensor, boxes_V4: Tensor, size: int, interpolation: str) -> Tensor:
    """Views float [V, 3, size, size] in 0..255 of one image float [H, W, 3].

    For each axis a product of matrices a stretch of samples, weights x pixels, which every runtime has and runs well.
    """
    height, width, _ = image_HWC.shape
    x0, y0, x1, y1 = boxes_V4.unbind(-1)
    column_VNK, weights_VNTK = resize_weights(x0, x1, width, size, interpolation)
    # All rows and channels in one product: few large ones are faster than many small ones.
    columns_WF = image_HWC.transpose(0, 1).flatten(1)
    # Bicubic interpolation overshoots at edges and 8-bit images cannot: like Pillow, columns first, and cut off
    # what leaves the range after each pass.
    narrow_VSF = (weights_VNTK @ columns_WF[column_VNK]).flatten(1, 2)[:, :size].clamp(0, 255)
    rows_VHF = narrow_VSF.unflatten(2, (height, 3)).transpose(1, 2).flatten(2)
    row_VNK, weights_VNTK = resize_weights(y0, y1, height, size, interpolation)
    # The rows of all views lie one after the other.
    view_V11 = torch.arange(boxes_V4.shape[0], device=boxes_V4.device)[:, None, None]
    stretches_VNKF = rows_VHF.flatten(0, 1)[row_VNK + height * view_V11]
    views_VSF = (weights_VNTK @ stretches_VNKF).flatten(1, 2)[:, :size].clamp(0, 255)
    return views_VSF.unflatten(2, (size, 3)).permute(0, 3, 1, 2)


def cut_views(image_BHWC: Tensor, boxes_BV4: Tensor, size: int, interpolation: str) -> Tensor:
    """Views float [B, V, 3, size, size] in 0..255, cut out of uint8 images [B, H, W, 3] and resized.

    One image after another (a Scan in an exported graph), so that beside the views only the weights and half-done
    views of one image are in memory: 0.24 to 0.28 GB, measured, with V = 30 views of 224 pixels of a 640 x 640 canvas,
    whatever B is. An exported graph holds all images as float32 as well, 12 B H W bytes: 157 MB at B = 32.
    """
    if not torch.compiler.is_exporting():
        views_BV3SS = boxes_BV4.new_empty(*boxes_BV4.shape[:2], 3, size, size)
        for index, (image, boxes) in enumerate(zip(image_BHWC, boxes_BV4, strict=True)):
            views_BV3SS[index] = cut_image(image.to(boxes.dtype), boxes, size, interpolation)
        return views_BV3SS

    def next_image(unused: Tensor, image_and_boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return unused.clone(), cut_image(*image_and_boxes, size, interpolation)

    # TensorRT takes uint8 at its inputs only, so the cast comes before the loop.
    pixels_BHWC = image_BHWC.to(boxes_BV4.dtype)
    _, views_BV3SS = scan(next_image, boxes_BV4.new_zeros(1), (pixels_BHWC, boxes_BV4))
    return views_BV3SS


class Snippets(nn.Module):
    """The `snippets` graph of `cliplet.contract`: pixels in, probabilities out.

    Args:
        encoder: maps normalised pixels float [N, 3, S, S] to features float [N, D].
        text: unit rows float [C, D].
        scale: what cosines are multiplied by before the softmax (CLIP's learned exp(logit_scale), near 100).
        bias: added to them; with it, probabilities are sigmoids (SigLIP), without it a softmax.
    """

    text: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        text: Tensor,
        scale: float,
        bias: float | None,
        preprocessing: Preprocessing,
        aggregation: Aggregation,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.scale = scale
        self.bias = bias
        self.preprocessing = preprocessing
        self.aggregation = aggregation
        self.register_buffer("text", text)
        self.register_buffer("mean", 255 * torch.tensor(preprocessing.mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(preprocessing.std).view(3, 1, 1))

    def forward(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """View probabilities [B, V, C] and scores [B, C] of images uint8 [B, H, W, 3] and boxes [B, V, 4]."""
        return self.score(self.features(image, boxes), self.text)

    def features(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Unit features float [B, V, D] of the views."""
        return self.unit(self.encoder(self.pixels(image, boxes)), boxes)

    def pixels(self, image: Tensor, boxes: Tensor) -> Tensor:
        """What the encoder is fed: normalised views float [B * V, 3, S, S]."""
        views = cut_views(image, boxes, self.preprocessing.size, self.preprocessing.interpolation)
        return ((views - self.mean) / self.std).flatten(0, 1)

    def unit(self, features_ND: Tensor, boxes: Tensor) -> Tensor:
        """The encoder's features [B * V, D], scaled to length 1, as [B, V, D]."""
        unit_ND = functional.normalize(features_ND, dim=-1)
        return unit_ND.unflatten(0, (boxes.shape[0], boxes.shape[1]))

    def score(self, features_BVD: Tensor, text_CD: Tensor) -> tuple[Tensor, Tensor]:
        """View probabilities [B, V, C] and scores [B, C] of unit features float [B, V, D]."""
        logits_BVC = self.scale * (features_BVD @ text_CD.T)
        if self.bias is None:
            view_probs_BVC = logits_BVC.softmax(dim=-1)
        else:
            view_probs_BVC = (logits_BVC + self.bias).sigmoid()
        return view_probs_BVC, aggregate(view_probs_BVC, self.aggregation)
