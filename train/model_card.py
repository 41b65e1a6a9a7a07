"""The README of a trained tiny CLIP: what it is, what it scores, how it was made."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .recipes import TinyClipRecipe

TEXT = """# `{name}`: a CLIP small enough to ship

A real CLIP in open_clip's folder layout (`open_clip_config.json`, `open_clip_model.safetensors`, half-precision
weights): a residual net (timm's `{tower}`) and a small text transformer, trained from scratch on captioned
scenes made of cut-out drawings. It knows {count} classes of drawings and nothing else; it is for demos and
tests that need a teacher without a download, not for photographs.

```python
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:/path/to/this/folder")
tokenizer = open_clip.get_tokenizer("local-dir:/path/to/this/folder")
```

Prompt: `{prompt}`. Classes: {classes}.

## What it scores

{scenes} scenes a number. *Seen*: the drawings of training in scenes it never saw. *Unseen*: a drawing set
(Twemoji) that no training image used. Single-object scenes show every class equally often, whole image
squashed to {side} pixels. Multi-label scenes show 1 to {most} objects of long-tailed classes; a view set's
score is half the whole image's probability and half the best cell's.

| | seen | unseen |
|---|---|---|
{scores}

Thresholds with the best micro-F1 on scenes of the training part that training did not reach (also in
`thresholds.json`, for the classes in `classes.txt` and that prompt):

| views | threshold | micro-F1 |
|---|---|---|
{thresholds}

Bias (mean top-1 probability over low-entropy images, and how many): {bias}.

## How it was made

    cliplet train tiny --out {name}

{minutes:.0f} minutes: {made:.0f} s for the scenes ({workers} processes), {trained:.0f} s for {pairs:,} image-caption
pairs (threads: {threads}), {evaluated:.0f} s for the numbers above; with torch {torch} and open_clip {open_clip}.
Loss (divergence from the right captions; 0 is perfect) from {first:.2f} to {last:.2f}; learned scale {scale:.1f}.
Settings are in `recipe.json`, all numbers in `metrics.json`.

{recipe}

## Licence

The weights are under Apache-2.0 like the code. They were learned from drawings under the MIT, Apache-2.0 and
CC BY 4.0 licences; their authors are named in `../sprites/README.md`.
"""


def model_card(recipe: TinyClipRecipe, report: dict[str, Any], name: str = "tiny") -> str:
    """The README in Markdown, from the recipe and the numbers measured."""
    seen, unseen = report["test-seen"], report["test-unseen"]
    view_sets = list(report["held_out"]["thresholds"])
    rows = [("single-object zero-shot top-1", seen["single_object_top1"], unseen["single_object_top1"])]
    rows += [(f"multi-label mAP, {v}", seen[v]["mAP"], unseen[v]["mAP"]) for v in view_sets]
    chosen = report["held_out"]["thresholds"].items()
    bias = report["held_out"]["bias"].items()
    seconds = report["seconds"]
    return TEXT.format(
        name=name,
        tower=recipe.vision_tower,
        count=len(report["classes"]),
        prompt=report["prompt"],
        classes=", ".join(report["classes"]),
        scenes=report["scenes"],
        side=recipe.image_size,
        most=recipe.max_objects,
        scores="\n".join(f"| {label} | {a:.1f} | {b:.1f} |" for label, a, b in rows),
        thresholds="\n".join(f"| {v} | {t['threshold']:.3f} | {t['micro_f1']:.1f} |" for v, t in chosen),
        bias=", ".join(f"{c} {_bias(entry)}" for c, entry in bias),
        minutes=sum(seconds.values()) / 60,
        threads=report["threads"],
        workers=recipe.workers,
        made=seconds["scenes"],
        trained=seconds["training"],
        evaluated=seconds["evaluation"],
        pairs=report["pairs_seen"],
        torch=report["made_with"]["torch"],
        open_clip=report["made_with"]["open_clip"],
        first=report["loss"]["first"],
        last=report["loss"]["last"],
        scale=report["logit_scale"],
        recipe="\n".join(f"- `{field} = {value!r}`" for field, value in asdict(recipe).items()),
    )


def _bias(entry: dict[str, Any]) -> str:
    if entry["bias"] is None:
        return "unknown (0)"
    return f"{entry['bias']:.2f} ({entry['images']})"
