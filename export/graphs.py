"""The modules that are traced: small ones that compose a trained model into a graph of `cliplet.contract`.

Beside the contract's outputs each also returns the tensors `pixels` and `features`, so that these keep their names in
the graph; `cliplet.export.onnx_graph` takes them off the list of outputs again.

Legend: B images, V views, C classes, D embedding, L text context, S side of the encoder's input, h x w cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cliplet.classifier import Classifier
from cliplet.snippets import Snippets, cut_views
from cliplet.views import Preprocessing


class SnippetsGraph(nn.Module):
    """`snippets` with its text matrix as a third input.

    As a constant it would be folded into its transpose and lose its name; `set_vocabulary` makes the input an
    initializer afterwards.
    """

    def __init__(self, snippets: Snippets) -> None:
        super().__init__()
        self.snippets = snippets

    def forward(self, image: Tensor, boxes: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        pixels = self.snippets.pixels(image, boxes)
        features_ND = self.snippets.encoder(pixels)
        return (*self.snippets.score(self.snippets.unit(features_ND, boxes), text), pixels, features_ND)


class ClassifierGraph(nn.Module):
    """`classifier`: a trained classifier with cutting, resizing and normalising in front and sigmoids behind."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.preprocessing = classifier.config.preprocessing

    def forward(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        """Probabilities [B, C] and boosted CAM [B, C, h, w] of images uint8 [B, H, W, 3] that lie in boxes [B, 4].

        Then, as the module's docstring says, `pixels` [B, 3, S, S] and `features` [B, C, h, w].
        """
        fed = self.preprocessing
        views_B13SS = cut_views(image, boxes.unsqueeze(1), fed.size, fed.interpolation)
        pixels = self.classifier.normalised(views_B13SS.squeeze(1) / 255)
        features_BChw = self.classifier.activation_map(pixels)
        logits_BC, cam_BChw = self.classifier.boosted(features_BChw)
        return logits_BC.sigmoid(), cam_BChw, pixels, features_BChw


class TrunkGraph(nn.Module):
    """`trunk`: an encoder with cutting, resizing and normalising in front and the L2 norm behind.

    Args:
        encoder: maps normalised pixels float [B, 3, S, S] to features float [B, D].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.encoder = encoder
        self.preprocessing = preprocessing
        # Of pixels in 0..255.
        self.register_buffer("mean", 255 * torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        """Unit embeddings [B, D] of images uint8 [B, H, W, 3] that lie in boxes [B, 4].

        Then, as the module's docstring says, `pixels` [B, 3, S, S] and `features` [B, D].
        """
        fed = self.preprocessing
        views_B13SS = cut_views(image, boxes.unsqueeze(1), fed.size, fed.interpolation)
        pixels = (views_B13SS.squeeze(1) - self.mean) / self.std
        features_BD = self.encoder(pixels)
        return functional.normalize(features_BD, dim=-1), pixels, features_BD


class Eager(nn.Module):
    """A graph's module as an engine runs it: the contract's outputs alone."""

    def __init__(self, graph: ClassifierGraph | TrunkGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *outputs, _pixels, _features = self.graph(*inputs)
        return tuple(outputs)


class TextGraph(nn.Module):
    """`text`: unit embeddings float [C, D] of token ids int64 [C, L]."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.normalize(self.clip.encode_text(tokens).to(torch.float32), dim=-1)
