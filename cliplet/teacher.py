"""CLIP as the teacher: any open_clip model's image and text towers, and the text matrix of a vocabulary.

Legend: C classes, D embedding, L text context, S side of the encoder's input.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional

from cliplet.errors import DataError, EnvironmentError_, UsageError
from cliplet.model_spec import ModelSpec
from cliplet.snippets import Snippets
from cliplet.views import Aggregation, Preprocessing
from cliplet.vocabulary import Vocabulary

SENTENCES = 256  # that the text tower is given at once


class ImageTower(nn.Module):
    """Features float [N, D] of normalised pixels float [N, 3, S, S]; what counts is their direction."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.visual = clip.visual

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.visual(pixels)
        # CoCa's tower also returns its tokens.
        return pooled[0] if isinstance(pooled, tuple) else pooled


@dataclass(frozen=True)
class Teacher:
    """A CLIP model ready to score: its two towers, its temperature and its preprocessing."""

    spec: ModelSpec
    clip: nn.Module
    tokenizer: Callable[..., Tensor]
    preprocessing: Preprocessing

    @property
    def scale(self) -> float:
        """What cosines are multiplied by: exp of the learned logit scale (about 100 for OpenAI's CLIP)."""
        return float(self.clip.logit_scale.detach().exp())

    @property
    def bias(self) -> float | None:
        """SigLIP's learned bias; None for a softmax model."""
        bias = getattr(self.clip, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    @property
    def context_length(self) -> int:
        """Number of tokens L of the text context, begin and end marks included."""
        owner = self.clip if hasattr(self.clip, "context_length") else self.clip.text
        return int(owner.context_length)

    @torch.inference_mode()
    def text_matrix(self, vocabulary: Vocabulary) -> Tensor:
        """Unit rows float32 [C, D]; see `text_rows`."""
        device = self.clip.logit_scale.device
        encode = self.clip.encode_text
        return text_rows(
            vocabulary, self.tokenizer, self.context_length, lambda t: encode(t.to(device)).float()
        )

    def snippets(self, vocabulary: Vocabulary, aggregation: Aggregation) -> Snippets:
        """The scoring module for one vocabulary, in evaluation mode."""
        module = Snippets(
            ImageTower(self.clip),
            self.text_matrix(vocabulary),
            self.scale,
            self.bias,
            self.preprocessing,
            aggregation,
        )
        return module.eval()


def text_rows(
    vocabulary: Vocabulary,
    tokenizer: Callable[..., Tensor],
    context_length: int,
    encode: Callable[[Tensor], Tensor],
) -> Tensor:
    """Unit rows float32 [C, D]: for each class the normalised mean of its sentences' unit embeddings.

    Args:
        tokenizer: open_clip's.
        context_length: tokens of a sentence, L.
        encode: embeddings float [N, D], of any length, of tokens int64 [N, L].

    Raises:
        DataError: a sentence does not fit into the text context.
    """
    sentences = vocabulary.sentences()
    named = [
        (name, sentence) for name, own in zip(vocabulary.names, sentences, strict=True) for sentence in own
    ]
    parts = [named[i : i + SENTENCES] for i in range(0, len(named), SENTENCES)]
    unit_ND = torch.cat(
        [functional.normalize(encode(_tokens(part, tokenizer, context_length)), dim=-1) for part in parts]
    )
    means = [own_ND.mean(dim=0) for own_ND in unit_ND.split([len(own) for own in sentences])]
    return functional.normalize(torch.stack(means), dim=-1).clone()


def _tokens(named: Sequence[tuple[str, str]], tokenizer: Callable[..., Tensor], length: int) -> Tensor:
    """Token ids int64 [N, L] of (class, sentence) pairs; refuses what the tokenizer would cut off without a word."""
    sentences = [sentence for _, sentence in named]
    tokens = tokenizer(sentences, context_length=2 * length)
    padding = tokenizer([""], context_length=2 * length)[0, -1]
    too_long = (tokens[:, length:] != padding).any(dim=1)
    if too_long.any():
        name, sentence = named[int(too_long.int().argmax())]
        raise DataError(
            f"the prompt {sentence!r} of class {name!r} is longer than the text context",
            f"at most {length} tokens, begin and end marks included",
            "shorten the class name or its synonyms, or choose shorter --prompts",
        )
    return tokenizer(sentences, context_length=length)


def load_teacher(spec: ModelSpec, device: str = "cpu") -> Teacher:
    """The open_clip model that `spec` names, in float32 and evaluation mode.

    Raises:
        UsageError: open_clip knows no such architecture or weights.
        DataError: the weights do not fit the architecture.
        EnvironmentError_: the weights have to be downloaded and cannot be.
    """
    try:
        with warnings.catch_warnings():
            # open_clip compares a tag's activation with the config's; a mismatch changes every feature.
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            clip = open_clip.create_model(
                spec.open_clip_name, spec.pretrained, precision="fp32", device=device, require_pretrained=True
            )
            tokenizer = open_clip.get_tokenizer(spec.open_clip_name)
    except UserWarning as error:
        raise UsageError(
            f"{spec}: {error}",
            "the architecture that these weights were trained with",
            f"name the model open_clip:{spec.open_clip_name}-quickgelu/{spec.pretrained}",
        ) from error
    # open_clip asserts what it expects of a checkpoint's shapes.
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError) as error:
        raise _explained(spec, error) from error
    return Teacher(spec, clip.eval(), tokenizer, _preprocessing(clip))


def _explained(spec: ModelSpec, error: Exception) -> Exception:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    known = open_clip.list_models()
    if not spec.is_folder and spec.open_clip_name not in known:
        close = spec.closest(spec.open_clip_name, known)
        return UsageError(
            f"open_clip has no architecture {spec.open_clip_name!r}",
            f"one of its {len(known)} models",
            f"name the model open_clip:{close or known[0]}/PRETRAINED",
        )
    if spec.weights_file is not None:
        return DataError(
            f"cannot load {spec.weights_file} into {spec.open_clip_name}: {text}",
            "a checkpoint of that architecture, saved by open_clip or as safetensors",
            "name the architecture that the weights were trained with",
        )
    tags = open_clip.list_pretrained_tags_by_model(spec.open_clip_name)
    if not spec.is_folder and spec.pretrained not in tags:
        return UsageError(
            f"{spec.open_clip_name} has no pretrained weights {spec.pretrained!r}, and no such file exists",
            f"a file, or one of {', '.join(tags) or '(none)'}",
            f"name the model open_clip:{spec.open_clip_name}/{(spec.closest(spec.pretrained or '', tags) or 'FILE')}",
        )
    return EnvironmentError_(
        f"cannot get the weights of {spec}: {text}",
        "a connection to the model hub, or weights on this machine",
        f"download them elsewhere and name the model open_clip:{spec.open_clip_name}/PATH/TO/WEIGHTS",
    )


def _preprocessing(clip: nn.Module) -> Preprocessing:
    config: dict[str, Any] = open_clip.get_model_preprocess_cfg(clip)
    size = config["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UsageError(f"the encoder wants images of {size} pixels", "a square input")
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preprocessing(
        size=sides.pop(),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        interpolation=config["interpolation"],
        resize_mode=config["resize_mode"],
        fill=config["fill_color"],
    )
