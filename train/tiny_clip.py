"""Train the embedded CLIP, `tiny`, from scratch on captioned fragments of the scene world.

    cliplet train tiny --out runs/tiny

makes its images, trains, evaluates and writes an open_clip model folder (at most 10 MB) in under 40 minutes
on two cores; the folder's README says what it scored and how long it took.
`open_clip.create_model_and_transforms("local-dir:runs/tiny")` loads it.

The loss is CLIP's, with one change. In a batch of 64 pairs many captions say the same, so pairs are not
simply right on the diagonal and wrong elsewhere: a caption that names the same classes as an image's own is
also right, one that names another class that is there (or of which a trace is there) counts as neither.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from cliplet.scenes import SceneWorld, scene_world

from .augment import augmented
from .captions import PROMPT, Caption, caption, every_caption
from .fragments import FragmentBank, fragment_bank
from .model_card import model_card
from .recipes import TinyClipRecipe
from .zero_shot import evaluate

# Legend: B pairs of a batch, C classes, D embedding, S image side.

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own, so that every tool's default fits
STD = (0.26862954, 0.26130258, 0.27577711)

Progress = Callable[[str, int, int], None]  # stage, items just done, items in all
LOG_EVERY = 25  # steps
VOCABULARY = 49408  # tokens of open_clip's own tokenizer
logger = logging.getLogger(__name__)


def model_config(recipe: TinyClipRecipe) -> dict[str, object]:
    """The model's shape as open_clip reads it."""
    return {
        "embed_dim": recipe.embed_dim,
        "vision_cfg": {
            "image_size": recipe.image_size,
            "timm_model_name": recipe.vision_tower,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "context_length": recipe.context_length,
            "vocab_size": VOCABULARY,
            "width": recipe.text_width,
            "heads": recipe.text_heads,
            "layers": recipe.text_layers,
        },
    }


def preprocess_config(recipe: TinyClipRecipe) -> dict[str, object]:
    """How images are prepared: squashed to a square, so that the whole image is seen."""
    return {
        "size": [recipe.image_size, recipe.image_size],
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }


def train_tiny(recipe: TinyClipRecipe, out: Path, progress: Progress) -> dict[str, Any]:
    """The numbers measured, after writing to `out` the model, its recipe, its metrics and its README."""
    began = time.perf_counter()
    bank, classes = make_bank(recipe, progress)
    made = time.perf_counter()
    model, losses = trained(recipe, bank, classes, progress)
    seconds = {"scenes": made - began, "training": time.perf_counter() - made}
    return measured_and_saved(model, losses, seconds, recipe, out, progress)


def measured_and_saved(
    model: nn.Module,
    losses: Sequence[float],
    seconds: dict[str, float],
    recipe: TinyClipRecipe,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """The numbers measured on the model as it was saved, in half precision; `seconds` it took so far."""
    save_open_clip(model, recipe, out)
    began = time.perf_counter()
    measured = evaluate(out, recipe, progress)
    seconds = {**seconds, "evaluation": time.perf_counter() - began}
    report = {
        **measured,
        "logit_scale": model.logit_scale.exp().item(),
        "pairs_seen": recipe.steps * recipe.batch,
        "loss": {"first": float(np.mean(losses[:10])), "last": float(np.mean(losses[-10:]))},
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "threads": torch.get_num_threads(),
        "made_with": {"torch": torch.__version__, "open_clip": open_clip.__version__},
    }
    write_records(report, recipe, out)
    return report


def write_records(report: dict[str, Any], recipe: TinyClipRecipe, out: Path) -> None:
    """Write what was measured beside the weights, with the classes and thresholds to label with."""
    thresholds = {
        "1" if views == "whole" else views: {
            "value": round(best["threshold"], 4),
            "how": f"best micro-F1 ({best['micro_f1']:.1f} %) on {report['scenes']} scenes held out of training",
        }
        for views, best in report["held_out"]["thresholds"].items()
    }
    texts = {
        "metrics.json": json.dumps(report, indent=2) + "\n",
        "thresholds.json": json.dumps(thresholds, indent=2) + "\n",
        "classes.txt": "".join(f"{name}\n" for name in report["classes"]),
        "README.md": model_card(recipe, report),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")


def training_world(recipe: TinyClipRecipe) -> SceneWorld:
    """The scenes it learns from."""
    return scene_world("train", seed=recipe.seed, max_objects=recipe.max_objects, tail=recipe.tail)


def trained(
    recipe: TinyClipRecipe, bank: FragmentBank, classes: Sequence[str], progress: Progress
) -> tuple[nn.Module, list[float]]:
    """The trained model (running average of its weights) and the loss at every step."""
    torch.manual_seed(recipe.seed)
    model = open_clip.CLIP(**model_config(recipe))
    batches = _Batches(recipe, bank, classes)
    spoken = batches.spoken_tokens()
    full_table = _speak_only(model, spoken)
    model.visual.to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average), use_buffers=True
    )
    optimiser = torch.optim.AdamW(
        _parameter_groups(model, recipe), lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True
    )
    losses: list[float] = []
    model.train()
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = _rate(recipe, step)
        loss = _loss(model, batches.next(), recipe)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(recipe.max_logit_scale))
        average.update_parameters(model)
        losses.append(loss.item())
        progress("train", 1, recipe.steps)
        if (step + 1) % LOG_EVERY == 0:
            logger.info("step %d loss %.3f", step + 1, np.mean(losses[-LOG_EVERY:]))
    result = average.module
    full_table[spoken] = result.token_embedding.weight.detach()
    result.token_embedding = nn.Embedding.from_pretrained(full_table, freeze=False)
    return result.eval(), losses


def _speak_only(model: nn.Module, tokens: Tensor) -> Tensor:
    """The full embedding table, after leaving the model only the rows of these tokens, in order.

    A few hundred of the 49,408 tokens occur in captions; the optimiser should not carry the others along.
    Token ids keep their order, as the end of a text is found as its largest id.
    """
    table = model.token_embedding.weight.detach().clone()
    model.token_embedding = nn.Embedding.from_pretrained(table[tokens], freeze=False)
    return table


def _parameter_groups(model: nn.Module, recipe: TinyClipRecipe) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _rate(recipe: TinyClipRecipe, step: int) -> float:
    # A run of few steps warms up for a tenth of them.
    warmup = min(recipe.warmup_steps, max(1, recipe.steps // 10))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class _Batch:
    """Images, tokens, and which caption is true of which image."""

    def __init__(self, images: Tensor, captions: list[Caption], seen_BC: Tensor, tokens: Tensor) -> None:
        self.images = images
        self.tokens = tokens
        self.empty_B = ~seen_BC.any(1)
        named_BC = torch.zeros_like(seen_BC)
        for row, text in enumerate(captions):
            named_BC[row, list(text.named)] = True
        same_BB = (named_BC[:, None] == named_BC[None]).all(-1)
        partly_BB = (seen_BC.float() @ named_BC.float().T) > 0
        self.true_BB = same_BB
        self.unknown_BB = partly_BB & ~same_BB


class _Batches:
    """Endless batches in a random order that the recipe's seed decides."""

    def __init__(self, recipe: TinyClipRecipe, bank: FragmentBank, classes: Sequence[str]) -> None:
        self.recipe, self.bank, self.classes = recipe, bank, classes
        self.rng = np.random.default_rng([recipe.seed, 5])
        self.generator = torch.Generator().manual_seed(recipe.seed)
        tokenizer = open_clip.SimpleTokenizer(context_length=recipe.context_length)
        texts = every_caption(classes)
        tokens = tokenizer(texts)
        self.spoken, places = torch.unique(tokens, return_inverse=True)
        self.known = dict(zip(texts, places, strict=True))
        self.prompts = self._tokens([PROMPT.format(name) for name in classes])
        self.order: list[int] = []

    def spoken_tokens(self) -> Tensor:
        """The ids of all tokens that occur in captions, rising; batches count tokens by place in it."""
        return self.spoken

    def next(self) -> tuple[_Batch, Tensor]:
        """The next batch, and the tokens of one prompt for each class."""
        if len(self.order) < self.recipe.batch:
            self.order.extend(self.rng.permutation(len(self.bank)).tolist())
        rows = np.sort(np.array(self.order[: self.recipe.batch]))
        del self.order[: self.recipe.batch]
        captions = [caption(self.rng, self.bank.shares[row], self.classes) for row in rows]
        images = augmented(torch.from_numpy(self.bank.pixels[rows]), self.recipe, self.generator)
        images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        seen_BC = torch.from_numpy(self.bank.traces[rows])
        tokens = self._tokens([text.text for text in captions])
        return _Batch(images, captions, seen_BC, tokens), self.prompts

    def _tokens(self, texts: list[str]) -> Tensor:
        return torch.stack([self.known[text] for text in texts])


def _loss(model: nn.Module, drawn: tuple[_Batch, Tensor], recipe: TinyClipRecipe) -> Tensor:
    batch, prompts = drawn
    images = batch.images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
        image_BD = model.encode_image(images)
    text_BD = model.encode_text(torch.cat([batch.tokens, prompts]), normalize=True)
    image_BD = F.normalize(image_BD.float(), dim=-1)
    text_BD, prompt_CD = text_BD[: len(images)], text_BD[len(images) :]
    scale = model.logit_scale.exp()
    logits_BB = scale * image_BD @ text_BD.T
    loss = contrastive_loss(logits_BB, batch.true_BB, batch.unknown_BB)
    loss = loss + contrastive_loss(logits_BB.T, batch.true_BB.T, batch.unknown_BB.T)
    if recipe.calm and batch.empty_B.any():
        log_probs = F.log_softmax(scale * image_BD[batch.empty_B] @ prompt_CD.T, dim=-1)
        surprise = -log_probs.mean(1) - math.log(len(prompt_CD))  # KL(uniform || prediction)
        loss = loss + 2 * recipe.calm * surprise.sum() / len(images)
    return loss / 2


def contrastive_loss(logits_BB: Tensor, true_BB: Tensor, unknown_BB: Tensor) -> Tensor:
    """Mean divergence of each row from equal parts on its true columns, its unknown columns left out.

    It differs from cross-entropy by a constant, so that 0 is the best there is however many captions agree.
    """
    log_probs = F.log_softmax(logits_BB.masked_fill(unknown_BB, -1e4), dim=-1)
    count_B = true_BB.sum(-1)  # at least one: every caption is true of its own image
    cross_entropy_B = -(true_BB * log_probs).sum(-1) / count_B
    return (cross_entropy_B - count_B.log()).mean()


def make_bank(recipe: TinyClipRecipe, progress: Progress) -> tuple[FragmentBank, tuple[str, ...]]:
    """The training fragments and the class names their columns stand for."""
    world = training_world(recipe)
    bank = fragment_bank(
        world,
        recipe.scenes,
        recipe.image_size,
        fragments_per_scene=recipe.fragments_per_scene,
        empty_kept=recipe.empty_kept,
        workers=recipe.workers,
        progress=lambda done: progress("scenes", done, recipe.scenes),
    )
    return bank, world.classes


def save_open_clip(model: nn.Module, recipe: TinyClipRecipe, folder: Path) -> None:
    """Write an open_clip model folder with half-precision weights, and the recipe beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous().clone()
        for name, value in model.state_dict().items()
    }
    # Not save_file: it leaves a file that only its owner may read.
    (folder / "open_clip_model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    config = {"model_cfg": model_config(recipe), "preprocess_cfg": preprocess_config(recipe)}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
