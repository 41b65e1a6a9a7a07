"""From pixels and boxes to class probabilities: the module that is run eagerly and exported whole.

Legend: B images, V views, C classes, D embedding, H x W canvas pixels, S side of the encoder's input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


KERNELS = {"bicubic": cubic_kernel, "bilinear": linear_kernel}


def resize_weights(begin: Tensor, end: Tensor, pixels: int, size: int, interpolation: str) -> Tensor:
    """Weights float [..., size, pixels] that resample the stretch `begin`..`end` of an axis to `size` samples.

    Antialiased like Pillow's: when the stretch shrinks, the kernel widens by the same factor. Pixels outside
    of the stretch weigh nothing, as if it had been cut out first.

    Args:
        begin, end: float [...], in pixels.
        pixels: length of the axis.
    """
    begin, end = begin[..., None, None], end[..., None, None]
    step = (end - begin) / size
    stretch = step.clamp(min=1)
    centres = torch.arange(size, dtype=begin.dtype, device=begin.device)[:, None] + 0.5
    middles = torch.arange(pixels, dtype=begin.dtype, device=begin.device)[None, :] + 0.5
    weights = KERNELS[interpolation]((middles - begin - centres * step) / stretch)
    # A box that begins or ends inside a pixel holds that pixel.
    inside = (middles > torch.floor(begin)) & (middles < torch.ceil(end))
    weights = weights * inside
    return weights / weights.sum(dim=-1, keepdim=True)


def cut_views(image_BHWC: Tensor, boxes_BV4: Tensor, size: int, interpolation: str) -> Tensor:
    """Views float [B, V, 3, size, size] in 0..255, cut out of uint8 images [B, H, W, 3] and resized.

    Each is two matrix products, rows x (image x columns), which every runtime has and runs well.
    """
    pixels_B13HW = image_BHWC.permute(0, 3, 1, 2).unsqueeze(1).to(boxes_BV4.dtype)
    x0, y0, x1, y1 = boxes_BV4.unbind(-1)
    rows_BVSH = resize_weights(y0, y1, image_BHWC.shape[1], size, interpolation)
    columns_BVSW = resize_weights(x0, x1, image_BHWC.shape[2], size, interpolation)
    # Bicubic interpolation overshoots at edges and 8-bit images cannot: like Pillow, columns first, and cut off
    # what leaves the range after each pass.
    narrow_BV3HS = (pixels_B13HW @ columns_BVSW.unsqueeze(2).transpose(-1, -2)).clamp(0, 255)
    return (rows_BVSH.unsqueeze(2) @ narrow_BV3HS).clamp(0, 255)


class Snippets(nn.Module):
    """The `snippets` graph of `cliplet.contract`: pixels in, probabilities out.

    Args:
        encoder: maps normalised pixels float [N, 3, S, S] to unit features float [N, D].
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
        return self.score(image, boxes, self.text)

    def score(self, image: Tensor, boxes: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The same against unit text rows [C, D] of one's own."""
        features_BVD = self.features(image, boxes)
        logits_BVC = self.scale * (features_BVD @ text.T)
        if self.bias is None:
            view_probs_BVC = logits_BVC.softmax(dim=-1)
        else:
            view_probs_BVC = (logits_BVC + self.bias).sigmoid()
        return view_probs_BVC, aggregate(view_probs_BVC, self.aggregation)

    def features(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Unit features float [B, V, D] of the views."""
        views = cut_views(image, boxes, self.preprocessing.size, self.preprocessing.interpolation)
        pixels_N3SS = ((views - self.mean) / self.std).flatten(0, 1)
        features_ND = self.encoder(pixels_N3SS)
        return features_ND.unflatten(0, (boxes.shape[0], boxes.shape[1]))
