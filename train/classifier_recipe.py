"""All settings of a classifier's training: what teaches, which labels it gives, what learns, for how long.

    recipe = replace(scenes_ccd(), seed=1)

The functions that build complete recipes are in `recipes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cliplet.errors import UsageError

METHODS = {
    "ccd": "classifier-guided CLIP distillation (Kim & Shim 2025)",
    "cdul": "CLIP-driven unsupervised learning (Abdelfattah et al. 2023)",
    "an": "assume negative: CLIP's top-1 class is the one positive",
    "an_ls": "assume negative with label smoothing (Szegedy et al. 2016)",
    "wan": "weak assume negative (Mac Aodha et al. 2019)",
    "epr": "expected positive regularisation (Cole et al. 2021)",
    "role": "regularised online label estimation (Cole et al. 2021)",
    "durand": "partial BCE (Durand et al. 2019)",
    "ll_r": "large loss rejected (Kim et al. 2022)",
    "ll_ct": "large loss corrected for the step (Kim et al. 2022)",
    "ll_cp": "large loss corrected for good (Kim et al. 2022)",
    "asl": "asymmetric loss (Ridnik et al. 2021)",
    "bce": "true labels, BCE: an upper bound",
    "bce_ls": "true labels, BCE with label smoothing: an upper bound",
}
WITH_TRUTH = ("bce", "bce_ls")
CHOICES = {
    "method": tuple(METHODS),
    "scoring": ("batched", "one_by_one"),
    "teacher_normalisation": ("own", "imagenet"),
    "whole_image": ("own", "squash"),
    "bias_guard": ("none", "mean", "one"),
    "trunk_weights": ("random", "pretrained", "teacher"),
    "precision": ("fp32", "bf16", "fp16"),
    "threshold_search": ("walk", "quantile"),
    "box_rule": ("first_last", "bounding"),
    "crop_shape": ("square", "stretched"),
    "selection": ("held_out", "released", "last"),
}
_COUNT, _AMOUNT, _SHARE, _POSITIVE = (1, math.inf), (0, math.inf), (0, 1), (0.01, math.inf)
# Least and largest value; other numbers may be any finite one.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("epochs", "batch", "accumulate", "image_size", "region_size"), _COUNT),
    **dict.fromkeys(("update_every", "max_regions"), _COUNT),
    **dict.fromkeys(("seed", "warmup_epochs", "updates", "teacher_size", "softmax_scale"), _AMOUNT),
    **dict.fromkeys(("learning_rate", "head_factor", "weight_decay", "crop_margin"), _AMOUNT),
    **dict.fromkeys(("train_scenes", "eval_scenes", "max_entropy", "consistency"), _AMOUNT),
    **dict.fromkeys(("focus_negative", "focus_positive"), _AMOUNT),
    **dict.fromkeys(("cam_threshold", "blend", "average", "held_out", "local_threshold"), _SHARE),
    **dict.fromkeys(("threshold_start", "known_negative_below", "unsure_weight", "focus_clip"), _SHARE),
    **dict.fromkeys(("boost", "label_step_sigma", "mean_classes", "expected_count"), _POSITIVE),
    "floor": (-1, 1),
    "large_loss_percent": (0, 100),
    "jitter": (0, 0.5),  # hues turn by at most half a circle
    "smoothing": (0, 0.5),
}


def check_settings(
    settings: Mapping[str, Any],
    choices: Mapping[str, Sequence[str]],
    ranges: Mapping[str, tuple[float, float]],
) -> None:
    """Raise `UsageError` unless words are one of their choices, and numbers finite and in their ranges."""
    for name, known in choices.items():
        if settings[name] not in known:
            raise UsageError(f"{name} {settings[name]!r} in a recipe", f"one of {', '.join(known)}")
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name} is {value} in a recipe", "a finite number")
    for name, (least, largest) in ranges.items():
        if not least <= settings[name] <= largest:
            wanted = f"{least} or more" if largest == math.inf else f"{least} to {largest}"
            raise UsageError(f"{name} is {settings[name]} in a recipe", wanted)


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe:
    """Settings of one training run. Published names are given where they differ.

    Data:
        dataset: a kind of `cliplet.datasets.open_dataset`.
        train_split, eval_split: of that kind; an empty `eval_split` evaluates nothing.
        difficult: what VOC's difficult objects count as.
        train_scenes, eval_scenes: how many scenes are made where `dataset` is `scenes` and none are there.

    Teacher and its labels:
        teacher: a `--model`. prompts: a prompt set.
        views: where the teacher looks: `1`, `1+3x3`.
        scoring: `batched`, or `one_by_one` as the public code does it: squashed to `teacher_size`, crops of
            any aspect, one at a time.
        teacher_size: side, or longer side of crops, of `one_by_one`; 0 where batches have the encoder's own.
        teacher_normalisation: mean and deviation of the pixels it sees.
        whole_image: `squash` shows the whole image as a square, `own` what the teacher's preprocessing shows.
        softmax_scale: what cosines are multiplied by; 0 is the teacher's own.
        max_entropy: nats up to which an image counts for the bias.
        debias: whether probabilities are divided by the bias; bias_guard: its value for a class that is
            never top-1 on a sure image.
        floor: least probability before debiasing (published as 1 / LS_coeff); negative is 1 / classes.

    Student:
        trunk: a timm model. trunk_weights: where its weights come from (`pretrained` asks timm's hub,
            `teacher` takes the image tower of a teacher with the same trunk).
        boost: alpha of BoostLU (coeff). image_size: side of its input.

    Schedule:
        epochs; warmup_epochs: on the first labels alone; updates: how many label updates (inf_num), as far as
            there are epochs for them; update_every: epochs from one to the next.
        batch: images a step over all processes; accumulate: parts it is computed in.
        learning_rate: of the trunk; head_factor: times that for the head. weight_decay.
        average: decay of the running average of the weights that is evaluated and kept; 0 is none.
        precision; channels_last: memory format. seed: of everything random.

    Regions (CCD):
        region_size: side of the image for class activation maps (resize).
        cam_threshold: share of a map's range that a region exceeds.
        box_rule: `first_last` spans the first and last such pixel in reading order, `bounding` all of them.
        crop_margin: added on each side, as a share of the image's side (offset_size).
        crop_shape: `square` makes crops square in the image, `stretched` leaves them as they are.
        threshold_search, threshold_start, mean_classes: classes count from the score at which an image has
            this many on average; a `walk` climbs from the start until it is within mean_classes..+2 (bound).
        max_regions: most regions of an image, best classes first.
        blend: weight of the old label (ratio). label_update: whether to do all this.

    Loss:
        consistency: weight of the consistency loss; jitter: strength of its colour changes.
        unsure_weight: added to the weight of images that are not sure (loss_coeff; 1 makes all equal).
        smoothing: of the label smoothing losses. expected_count: positives an image (EPR, ROLE).
        large_loss_percent: delta of the large-loss methods.
        known_negative_below: probability below which Durand's loss knows a class to be absent.
        label_step_sigma: sigma of CDUL's label update. local_threshold: zeta of its aggregation.
        focus_negative, focus_positive, focus_clip: gammas and margin of the asymmetric loss.

    Selection:
        selection: `held_out`: best mAP against the pseudo-labels of a held-out part; `released`: the public
            code's rule on training scores; `last`: the last epoch. Never by ground truth.
        held_out: share of the training images kept for it.
    """

    dataset: str
    train_split: str = "train"
    eval_split: str = "test"
    difficult: str = "negative"
    train_scenes: int = 0
    eval_scenes: int = 0
    method: str = "ccd"
    teacher: str = "open_clip:RN50x64/openai"
    prompts: str = "photo"
    views: str = "1"
    scoring: str = "batched"
    teacher_size: int = 0
    teacher_normalisation: str = "own"
    whole_image: str = "squash"
    softmax_scale: float = 0.0
    max_entropy: float = 2.0
    debias: bool = True
    bias_guard: str = "mean"
    floor: float = -1.0
    trunk: str = "resnet101.tv_in1k"
    trunk_weights: str = "pretrained"
    boost: float = 3.0
    image_size: int = 448
    epochs: int = 10
    warmup_epochs: int = 2
    updates: int = 1
    update_every: int = 1
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-5
    head_factor: float = 10.0
    weight_decay: float = 0.0
    average: float = 0.0
    precision: str = "bf16"
    channels_last: bool = True
    seed: int = 0
    region_size: int = 640
    cam_threshold: float = 0.95
    box_rule: str = "bounding"
    crop_margin: float = 0.125
    crop_shape: str = "square"
    threshold_search: str = "quantile"
    threshold_start: float = 0.05
    mean_classes: float = 5.0
    max_regions: int = 10
    blend: float = 0.2
    label_update: bool = True
    consistency: float = 1.0
    jitter: float = 0.5
    unsure_weight: float = 1.0
    smoothing: float = 0.1
    expected_count: float = 1.5
    large_loss_percent: float = 0.2
    known_negative_below: float = 0.01
    label_step_sigma: float = 1.0
    local_threshold: float = 0.0
    focus_negative: float = 4.0
    focus_positive: float = 0.0
    focus_clip: float = 0.05
    selection: str = "held_out"
    held_out: float = 0.1

    def __post_init__(self) -> None:
        check_settings(asdict(self), CHOICES, RANGES)
        if self.held_out == 1 or (self.selection == "held_out" and self.held_out == 0):
            raise UsageError(
                f"held_out is {self.held_out} with selection {self.selection!r}",
                "a share between 0 and 1, above 0 for held_out",
                "--set held_out=0.1",
            )
        if self.average == 1:
            raise UsageError(
                "average is 1.0 in a recipe, which keeps the weights from before the first step for good",
                "a decay below 1, or 0 for none",
                "--set average=0.999",
            )
        if (self.scoring == "one_by_one") != (self.teacher_size > 0):
            raise UsageError(
                f"scoring {self.scoring!r} with teacher_size {self.teacher_size}",
                "a size with one_by_one, 0 with batched",
            )

    @property
    def update_epochs(self) -> range:
        """Epochs, counted from 0, that begin with a label update."""
        if self.method == "ccd" and not self.label_update:
            return range(0)
        end = self.warmup_epochs + self.updates * self.update_every
        return range(self.warmup_epochs, min(end, self.epochs), self.update_every)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
