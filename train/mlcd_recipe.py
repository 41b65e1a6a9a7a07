"""All settings of multi-label cluster discrimination (MLCD): what is clustered, which trunk learns it, for how long.

    recipe = replace(mlcd_recipe("mlcd"), clusters=1000, trunk="resnet18")

Source: An et al., "Multi-label Cluster Discrimination for Visual Representation Learning", ECCV 2024.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cliplet.errors import DataError

from .classifier_recipe import check_settings

if TYPE_CHECKING:
    from .cluster_losses import LossSettings

LOSSES = {
    "mlcd": "multi-label cluster discrimination, equation (5): positives and negatives apart",
    "mlc": "multi-label contrast, equation (4): positives against negatives",
    "unicom": "one label an image and a margin softmax, as UNICOM",
}
CHOICES = {
    "loss": tuple(LOSSES),
    "trunk_weights": ("random", "pretrained"),
    "neck": ("batchnorm", "none"),
    "precision": ("fp32", "bf16", "fp16"),
}
IMAGES_PER_CLUSTER = 20  # where no number of clusters is asked for
_COUNT, _AMOUNT = (1, math.inf), (0, math.inf)
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("positives", "cluster_iterations", "sample_per_cluster", "epochs", "image_size"), _COUNT
    ),
    "batch": (2, math.inf),
    **dict.fromkeys(("seed", "warmup_steps", "learning_rate", "weight_decay", "clusters"), _AMOUNT),
    "centres_factor": _AMOUNT,
    "least_crop": (0.01, 1),
}


@dataclass(frozen=True, kw_only=True)
class MlcdRecipe:
    """Settings of one run. Published values are given where they differ.

    Clusters:
        teacher: a CLIP, or a trunk, whose embeddings of the whole images are clustered (ViT-L/14).
        clusters: number of clusters; 0 is one for every 20 images (1,000,000 for 400 million images).
        positives: nearest clusters of an image that count as its labels.
        cluster_iterations, sample_per_cluster: of k-means: rounds, and images a cluster that it looks at.

    Trunk:
        trunk: a timm model, or `open_clip:ARCHITECTURE` (ViT-B/32 to L/14). trunk_weights: `random`, or
            `pretrained` to begin with timm's.
        image_size: side of its input.
        neck: what stands between the trunk's features and the clusters while it learns, and is thrown away after:
            `batchnorm` centres and scales every feature, as UNICOM does, so that features that are never negative
            can point away from each other; `none`.

    Loss:
        loss: `mlcd`, `mlc` or `unicom`. negative_rate: share of the other clusters that is drawn at each step.
        scale, margin, angle, threshold: how a similarity is made of a cosine (`LossSettings`); the paper names none
            of them. `mlc` and `unicom` have a scale of 8, `unicom` an angle of 0.3. The larger the scale, the longer
            a run does nothing but undo the similarities that centres happen to begin with: with 200 clusters and 750
            steps, 4 did better than 8, and 8 better than 16. What more clusters and longer runs need is not measured.

    Schedule:
        epochs; batch: images a step over all processes (32,768). learning_rate: of AdamW, warmed up for
            `warmup_steps` (2,000; at most a tenth of the run), then falling as a cosine to 0; centres_factor: times
            that for the centres of the clusters. weight_decay: not on biases and norms.
        least_crop: smallest share of an image's area that a random crop shows; crops are mirrored at random.
        precision; channels_last: memory format; gradient_checkpointing: recompute what lies between the trunk's
            blocks instead of keeping it: slower, with less memory. seed: of everything random.
    """

    teacher: str = "tiny"
    clusters: int = 0
    positives: int = 8
    cluster_iterations: int = 20
    sample_per_cluster: int = 256
    trunk: str = "resnet18"
    trunk_weights: str = "random"
    image_size: int = 224
    neck: str = "batchnorm"
    loss: str = "mlcd"
    negative_rate: float = 0.1
    scale: float = 4.0
    margin: float = 0.0
    angle: float = 0.0
    threshold: float = 0.0
    epochs: int = 32
    batch: int = 128
    learning_rate: float = 1e-3
    centres_factor: float = 10.0
    warmup_steps: int = 2000
    weight_decay: float = 0.2
    least_crop: float = 0.4
    precision: str = "bf16"
    channels_last: bool = True
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(asdict(self), CHOICES, RANGES)

    def loss_settings(self) -> LossSettings:
        """The settings of the loss.

        Raises:
            UsageError: no loss has such.
        """
        # Not above: commands are listed without torch.
        from .cluster_losses import LossSettings

        return LossSettings(
            kind=self.loss,  # type: ignore[arg-type]
            scale=self.scale,
            margin=self.margin,
            angle=self.angle,
            threshold=self.threshold,
            negative_rate=self.negative_rate,
            positives=self.positives,
        )

    def clusters_of(self, images: int) -> int:
        """How many clusters this many images are divided into.

        Raises:
            DataError: too few images, or too few clusters for some to be negatives.
        """
        labels = self.loss_settings().used_positives
        wanted = self.clusters or max(images // IMAGES_PER_CLUSTER, labels + 1)
        if not labels < wanted <= images:
            # Fewer than two images cannot be divided at all.
            mend = f"--clusters {max(images // 2, 2)} --positives {max(min(labels, images // 4), 1)}"
            raise DataError(
                f"{images:,} images in {wanted:,} clusters, of which {labels} are an image's labels",
                "at least as many images as clusters, and more clusters than labels",
                mend if images >= 2 else "name more images: twenty a cluster are usual",
            )
        return wanted

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mlcd_recipe(loss: str) -> MlcdRecipe:
    """The recipe with a loss and what belongs to it.

    `unicom` has ArcFace's angle of 0.3, the least that UNICOM's code fine-tunes with.
    """
    belongs: dict[str, dict[str, float]] = {"mlc": {"scale": 8.0}, "unicom": {"scale": 8.0, "angle": 0.3}}
    return MlcdRecipe(loss=loss, **belongs.get(loss, {}))  # type: ignore[arg-type]
