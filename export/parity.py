"""The parity gate: an engine against the eager float32 model, on real images, through the whole path.

What the two disagree by is counted five ways, and each way has a tolerance that depends on the precision that was
asked for. A comparison of nothing fails.

Legend: N images, B images of a batch, V views, C classes, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from cliplet.contract import CLASSIFIER, EMBEDDINGS, FEATURES, TRUNK, GraphContract
from cliplet.engine_sidecar import Bounds, Profile
from cliplet.errors import DataError
from cliplet.metrics import mean_average_precision
from cliplet.runners import Runner
from cliplet.views import Preprocessing, Views

from .samples import Samples


@dataclass(frozen=True)
class Tolerance:
    """How far an engine may be from the original.

    Attributes:
        largest, mean: difference of a probability or a score, over all views, classes and images; of a trunk, of a
            value of its unit embeddings.
        cosine: least cosine of the features of an image or a view, and of an image's class activation maps.
        agreement: least share of image-class pairs that get the same label; of a trunk, of comparisons (which of two
            images is nearer to a third) that end the same way.
        map_drop: how much mAP may fall, in percentage points, where the truth is known.
    """

    largest: float
    mean: float
    cosine: float
    agreement: float
    map_drop: float


# By the precision that was asked for. Probabilities are a softmax of cosines times about 100, so a cosine that is
# off by 0.001 moves a probability near 0.5 by 0.025.
TOLERANCES = {
    "fp32": Tolerance(largest=1e-4, mean=1e-5, cosine=0.99999, agreement=0.999, map_drop=0.05),
    "fp16": Tolerance(largest=0.05, mean=1e-3, cosine=0.9995, agreement=0.995, map_drop=0.3),
    "bf16": Tolerance(largest=0.25, mean=5e-3, cosine=0.995, agreement=0.98, map_drop=1.0),
    "int8": Tolerance(largest=0.6, mean=2e-2, cosine=0.95, agreement=0.95, map_drop=2.0),
}
# Images in a batch, and views of each.
Shape = tuple[int, int]
# One image alone, a usual batch, a large one; one view, several, many. Labels, mAP and speed are taken from the first.
SHAPES: tuple[Shape, ...] = ((4, 10), (1, 1), (1, 30), (3, 5), (32, 1))
WHOLE_SHAPES: tuple[Shape, ...] = ((4, 1), (1, 1), (32, 1))
# Those of these numbers that are whole grids; of any other number the last grid is seen in part.
GRIDS = {Views.parse(text).count: text for text in ("1", "1+2x2", "1+3x3", "1+2x2+3x3+4x4")}
# The original runs each shape on the CPU, where a ViT-B/32 sees some 20 views a second: large batches are compared
# with as many views as fit into this, or with the least that the profile allows.
MOST_VIEWS = 96
# What is compared first: of labels, or of neighbours.
SCORES = {CLASSIFIER.name: "probs", TRUNK.name: EMBEDDINGS}
# Of one image alone, as many are run, and one batch of a profile's own shapes: more would say no more.
SINGLES = 2
ROUNDS = 3
# A classifier's maps have no bound: they are compared by direction, as features are.
CAM = "cam"
# Cosines of embeddings that differ by less are alike: that is how far float32 goes.
ALIKE = 1e-5


@dataclass
class Agreement:
    """What an engine and the original were found to differ by; see `Tolerance`. They agree about `about`."""

    about: str = "labels"
    compared: int = 0
    images: int = 0
    largest: float = 0.0
    mean: float = 0.0
    cosine: float = 1.0
    agreement: float = 1.0
    map_original: float | None = None
    map_engine: float | None = None
    shapes: list[str] = field(default_factory=list)

    @property
    def map_drop(self) -> float:
        if self.map_original is None or self.map_engine is None:
            return 0.0
        return self.map_original - self.map_engine

    def breaches(self, tolerance: Tolerance) -> list[str]:
        """Every way in which it exceeds a tolerance, in words; nothing compared is one."""
        if not self.compared:
            return ["nothing was compared"]
        found = []
        for name in ("largest", "mean"):
            value, limit = getattr(self, name), getattr(tolerance, name)
            # Written so that nan is a breach.
            if not value <= limit:
                found.append(f"{name} difference {value:.2g}, tolerance {limit:g}")
        equal = f"share of equal {self.about}"
        for name, what in (("cosine", "least cosine of features"), ("agreement", equal)):
            value, limit = getattr(self, name), getattr(tolerance, name)
            if not value >= limit:
                found.append(f"{what} {value:.5f}, tolerance {limit:g}")
        if not self.map_drop <= tolerance.map_drop:
            found.append(
                f"mAP {self.map_engine:.2f} against {self.map_original:.2f}, tolerance {tolerance.map_drop:g}"
            )
        return found


@dataclass(frozen=True, eq=False)
class _Reference:
    """Batches of one shape, and what the original gives of them."""

    shape: Shape
    feeds: list[dict[str, np.ndarray]]
    outputs: list[dict[str, np.ndarray]]


class Gate:
    """The original's outputs on some images, computed once, to compare any number of engines with.

    Args:
        eager: the original, with `observe=(FEATURES,)`.
        thresholds: [C], for the labels.
        profile: the sizes that TensorRT engines among those to compare were built for; they are compared at its
            least, usual and largest batch too. None where there are no such engines.

    Raises:
        DataError: the original cannot tell these images and classes apart, or there are too few to compare neighbours.
    """

    def __init__(
        self,
        eager: Runner,
        contract: GraphContract,
        preprocessing: Preprocessing,
        samples: Samples,
        thresholds: Sequence[float],
        profile: Profile | None = None,
    ) -> None:
        self.contract = contract
        self.samples = samples
        self._score = SCORES.get(contract.name, "scores")
        self._thresholds_C = np.asarray(thresholds, np.float32)
        usual = SHAPES if contract.takes_views else WHOLE_SHAPES
        self._references: list[_Reference] = []
        for shape in shapes_of(contract, profile):
            batch, views = shape
            seen = Views.parse(GRIDS[views]) if views in GRIDS else views
            # Only engines that are built for a profile refuse smaller batches.
            filled = profile is not None
            batches = samples.batches(batch, seen, preprocessing, contract, filled)
            # All of the first shape, from which labels and neighbours are taken.
            most = None
            if self._references and shape not in usual:
                most = 1
            elif self._references and batch == 1:
                most = SINGLES
            feeds = list(islice(batches, most))
            # What is run, which with few images is less than what was meant.
            run = (len(feeds[0]["image"]), views)
            self._references.append(_Reference(run, feeds, [eager.infer(one) for one in feeds]))
        self._refuse_constants()

    def compare(self, engine: Runner, profile: Profile | None = None) -> Agreement:
        """What `engine`, opened with `observe=(FEATURES,)`, differs by.

        Args:
            profile: the sizes that it takes, if it was built for some; the others are left out.
        """
        about = "neighbours" if self.contract is TRUNK else "labels"
        found = Agreement(about, images=len(self.samples.pictures))
        total = 0.0
        scores: list[np.ndarray] = []
        for number, reference in enumerate(self._references):
            if not takes(profile, self.contract, reference.shape):
                continue
            found.shapes.append(shown(reference.shape))
            for feeds, wanted in zip(reference.feeds, reference.outputs, strict=True):
                outputs = engine.infer(feeds)
                total += self._compare_values(outputs, wanted, found)
                if number == 0:
                    scores.append(outputs[self._score])
        found.mean = total / max(found.compared, 1)
        if self.contract is TRUNK:
            found.agreement = equal_neighbours(self._of_images(scores), self._wanted())
        else:
            self._compare_labels(self._of_images(scores), self._wanted(), found)
        return found

    def differences(self, engine: Runner) -> Iterator[dict[str, float]]:
        """For each image the largest difference of every output, at the main shape."""
        main = self._references[0]
        left = len(self.samples.pictures)
        for feeds, wanted in zip(main.feeds, main.outputs, strict=True):
            outputs = engine.infer(feeds)
            images = len(feeds["image"])
            for image in range(min(images, left)):
                yield {
                    name: _largest_of_image(outputs[name], values, images, image)
                    for name, values in wanted.items()
                }
            left -= images

    def _wanted(self) -> np.ndarray:
        """What the original scores the images: float [N, ...]."""
        return self._of_images([outputs[self._score] for outputs in self._references[0].outputs])

    def _of_images(self, batches: Sequence[np.ndarray]) -> np.ndarray:
        """One row for each image: those that a batch was filled up with are left out."""
        return np.concatenate(batches)[: len(self.samples.pictures)]

    def _compare_values(
        self, outputs: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], found: Agreement
    ) -> float:
        """The sum of all differences of outputs; their largest, and the least cosine, are noted in `found`."""
        total = 0.0
        # The larger of anything and nan is nan, which no tolerance lets pass.
        for spec in self.contract.outputs:
            if spec.name == CAM:
                continue
            difference = np.abs(outputs[spec.name] - wanted[spec.name])
            found.compared += difference.size
            found.largest = float(np.maximum(found.largest, difference.max()))
            total += float(difference.sum())
        for name in (FEATURES, CAM):
            if name in wanted:
                found.cosine = float(np.minimum(found.cosine, _cosines(outputs[name], wanted[name]).min()))
        return total

    def speed(self, engine: Runner) -> dict[str, Any]:
        """Views a second at the main shape, the median of a few rounds; indicative, for a table."""
        feeds = self._references[0].feeds[0]
        engine.infer(feeds)
        seconds = []
        for _ in range(ROUNDS):
            began = perf_counter()
            engine.infer(feeds)
            seconds.append(perf_counter() - began)
        views = int(np.prod(feeds["boxes"].shape[:-1]))
        return {
            "batch": len(feeds["image"]),
            "views": views // len(feeds["image"]),
            "ms_per_batch": 1000 * median(seconds),
            "views_per_s": views / median(seconds),
        }

    def _compare_labels(self, scores_NC: np.ndarray, wanted_NC: np.ndarray, found: Agreement) -> None:
        same_NC = (scores_NC >= self._thresholds_C) == (wanted_NC >= self._thresholds_C)
        found.agreement = float(same_NC.mean())
        truth_NC = self.samples.truth_NC
        if truth_NC is not None:
            found.map_original = mean_average_precision(wanted_NC, truth_NC)
            found.map_engine = mean_average_precision(scores_NC, truth_NC)

    def _refuse_constants(self) -> None:
        values = self._wanted()
        if self.contract is TRUNK:
            _refuse_alike(values)
        elif not np.isfinite(values).all() or values.std() == 0:
            raise DataError(
                "the original gives the same probability for every image and class, or one that is not finite",
                "images and classes that it tells apart: a comparison of constants would prove nothing",
                "choose other --images",
            )


def shapes_of(contract: GraphContract, profile: Profile | None = None) -> list[Shape]:
    """What engines are compared at: the usual shapes, and those of the profile that TensorRT engines are built for.

    The first, from which labels are taken, is one that every engine takes.
    """
    usual = SHAPES if contract.takes_views else WHOLE_SHAPES
    if profile is None:
        return list(usual)
    batch, views = profile.batch, profile.views if contract.takes_views else (1, 1, 1)
    main = min(max(usual[0][0], batch[0]), batch[2])
    own = [(size, _affordable(size, views, views[1])) for size in batch]
    own.append((batch[0], _affordable(batch[0], views, views[2])))
    return list(dict.fromkeys([(main, _affordable(main, views, usual[0][1])), *usual, *own]))


def _affordable(batch: int, views: Bounds, wanted: int) -> int:
    """The number of views within a profile's bounds that is nearest to `wanted` and not too much for the CPU."""
    return min(max(min(wanted, MOST_VIEWS // batch), views[0]), views[2])


def takes(profile: Profile | None, contract: GraphContract, shape: Shape) -> bool:
    """Whether an engine that is built for a profile takes so many images with so many views each."""
    if profile is None:
        return True
    batch, views = shape
    fits = profile.batch[0] <= batch <= profile.batch[2]
    return fits and (not contract.takes_views or profile.views[0] <= views <= profile.views[2])


def shown(shape: Shape) -> str:
    """A shape in words, such as "4 x 1+3x3"."""
    batch, views = shape
    return f"{batch} x {GRIDS.get(views, f'{views} views')}"


def _largest_of_image(found: np.ndarray, wanted: np.ndarray, images: int, image: int) -> float:
    """Largest difference within one image's part of an output of `images` images, whatever its axes."""
    found_BF, wanted_BF = (values.reshape(images, -1) for values in (found, wanted))
    return float(np.abs(found_BF[image] - wanted_BF[image]).max())


def equal_neighbours(found_ND: np.ndarray, wanted_ND: np.ndarray) -> float:
    """Share of comparisons (which of two images is nearer to a third) that end the same way in both.

    What is alike in `wanted_ND`, to within the rounding of float32, is not compared; 0 if that is everything.

    Args:
        found_ND, wanted_ND: unit rows.
    """
    found_NN, wanted_NN = (unit_ND.astype(np.float64) @ unit_ND.T for unit_ND in (found_ND, wanted_ND))
    same = compared = 0
    for image in range(len(wanted_ND)):
        others_M = np.arange(len(wanted_ND)) != image
        wanted_M, found_M = wanted_NN[image, others_M], found_NN[image, others_M]
        nearer_MM = wanted_M[:, None] > wanted_M + ALIKE
        compared += int(nearer_MM.sum())
        same += int((nearer_MM & (found_M[:, None] > found_M)).sum())
    return same / compared if compared else 0.0


def _refuse_alike(embedding_ND: np.ndarray) -> None:
    """Raise `DataError` unless there are neighbours to compare."""
    if len(embedding_ND) < 3:
        raise DataError(
            f"{len(embedding_ND)} images to compare the neighbours of",
            "at least 3",
            "more --images, or --count 32",
        )
    if equal_neighbours(embedding_ND, embedding_ND) == 0:
        raise DataError(
            "the original gives every image the same embedding, or one that is not finite",
            "images that it tells apart: a comparison of constants would prove nothing",
            "choose other --images",
        )


def _cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Cosines of the rows of two arrays [N, ...], flattened from the second axis on: float64 [N]."""
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (found, wanted))
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def verdict(found: Agreement, precision: str, samples: Samples) -> dict[str, Any]:
    """What a manifest says of a comparison: what, on what, how far apart, which tolerance, and whether it passed."""
    tolerance = TOLERANCES[precision]
    breaches = found.breaches(tolerance)
    return {
        "against": "eager fp32",
        "on": samples.described,
        **asdict(found),
        "tolerance": asdict(tolerance),
        "breaches": breaches,
        "passed": not breaches,
    }
