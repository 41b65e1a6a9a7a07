"""Several processes' loss and gradients are one's, one's are those of the equations, and draws depend on nobody."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import (
    CASES,
    MEMORY,
    STEP,
    WIDTH,
    Case,
    Found,
    batch,
    most_bytes,
    outcome,
    resumed,
    run_ranks,
    trunk_outcome,
)
from torch import Tensor

from cliplet.errors import DataError, UsageError
from cliplet.train.class_centres import ClassCentres, initial_centres, memory_per_rank
from cliplet.train.cluster_losses import LossKind, LossSettings

WORLDS = [2, 3]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two and then three processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(folder, "centres", WORLDS)
    return folder


def parts(folder: Path, world: int, name: str) -> list[Found]:
    return [dict(np.load(folder / str(world) / f"{name}_{rank}.npz")) for rank in range(world)]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Of the size of the largest number in it: a gradient near 0 is one that cancelled."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_processes_together_compute_what_one_does(
    together: Path, name: str, world: int, tmp_path: Path
) -> None:
    case = CASES[name]
    alone = outcome(case, tmp_path)
    shares = parts(together, world, name)
    # The scale multiplies what a cosine of float32 is off by. A process rounds to bfloat16 what another order of
    # adding brought about.
    tolerance = 2e-2 if case.bf16 else 1e-6 if case.dtype == torch.float64 else max(1e-6, 1e-7 * case.scale)
    for number in range(2):
        loss = alone[f"loss {number}"]
        for share in shares:
            assert_close(share[f"loss {number}"], loss, tolerance)
        for kind in ("features", "centres"):
            whole = np.concatenate([share[f"{kind} {number}"] for share in shares])
            assert_close(whole, alone[f"{kind} {number}"], tolerance)
    assert np.concatenate([share["drawn"] for share in shares]).tolist() == alone["drawn"].tolist()
    if not case.bf16:
        # AdamW's first steps follow a gradient's sign, also where it is all but 0.
        rows = np.concatenate([share["rows"] for share in shares])
        assert_close(rows, alone["rows"], 1e-6 if case.dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("world", WORLDS)
def test_trunk_in_ddp_has_the_gradients_of_one_process(together: Path, world: int) -> None:
    alone = trunk_outcome()
    for share in parts(together, world, "trunk"):
        for name, gradient in alone.items():
            assert_close(share[name], gradient, 1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_centres_of_two_processes_go_on_in_one_or_three(together: Path, world: int) -> None:
    """Gathered to one file by two processes, which their own rows after two steps are compared with."""
    written = np.concatenate([share["rows"] for share in parts(together, 2, "mlcd")])
    alone = resumed(together / "2" / "mlcd")
    assert alone["rows"].tobytes() == written.tobytes()
    shares = parts(together, world, "resumed")
    assert np.concatenate([share["rows"] for share in shares]).tobytes() == written.tobytes()
    assert_close(np.concatenate([share["centres"] for share in shares]), alone["centres"], 1e-6)
    assert_close(shares[0]["loss"], alone["loss"], 1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_all_processes_raise_what_one_of_them_got_wrong(together: Path, world: int) -> None:
    for share in parts(together, world, "errors"):
        label, count, wrapped = share["said"].tolist()
        assert label.startswith("DataError: clusters 0 to 11 among the labels")
        assert count.startswith(f"UsageError: 1 clusters for {world} processes")
        # DDP would give every process the first one's centres.
        assert wrapped.startswith("RuntimeError: DistributedDataParallel")


def by_hand(centres: ClassCentres, features: np.ndarray, labels: np.ndarray, step: int) -> float:
    """The mean loss in plain exponentials, image by image and pair by pair."""
    settings = centres.settings
    rows = centres.centres.detach().double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    drawn = set(centres.drawn(step).tolist())
    losses = []
    for feature, clusters in zip(features, labels, strict=True):
        cosines = rows @ (feature / np.linalg.norm(feature))
        used = [int(c) for c in clusters[: 1 if settings.kind == "unicom" else settings.positives]]
        own = set(used) - {-1}
        angled = {c: math.cos(math.acos(cosines[c]) + settings.angle) for c in own}
        pulls = [
            math.exp(-settings.scale * (a - settings.margin - settings.threshold)) for a in angled.values()
        ]
        pushes = [math.exp(settings.scale * (cosines[c] - settings.threshold)) for c in drawn - own]
        pairs = sum(a * b for a in pulls for b in pushes)
        losses.append(math.log(1 + pairs + (sum(pulls) + sum(pushes) if settings.kind == "mlcd" else 0)))
    return float(np.mean(losses))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.dtype == torch.float64])
def test_loss_is_that_of_the_equations(name: str) -> None:
    case = CASES[name]
    features, labels = batch(case)
    centres = ClassCentres(case.classes, WIDTH, case.settings).double()
    found = centres(features, labels, STEP).item()
    assert found == pytest.approx(by_hand(centres, features.numpy(), labels.numpy(), STEP), rel=1e-9)


@pytest.mark.parametrize("kind", ["mlcd", "mlc", "unicom"])
@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_gradients_are_those_of_finite_differences(kind: LossKind, rate: float) -> None:
    case = Case(kind=kind, rate=rate, angle=0.3 if kind == "unicom" else 0.0)
    features, labels = batch(case)
    centres = ClassCentres(case.classes, WIDTH, case.settings).double()

    def loss(features_BD: Tensor, rows_KD: Tensor) -> Tensor:
        found = torch.func.functional_call(centres, {"centres": rows_KD}, (features_BD, labels, STEP))
        assert isinstance(found, Tensor)
        return found

    inputs = (features.requires_grad_(), centres.centres.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_at_rate_1_every_cluster_that_is_no_positive_is_a_negative() -> None:
    """The full loss; a rate next to 1 draws all of these few, by the code for drawn ones."""
    case = Case(rate=1.0)
    features, labels = batch(case)
    full = ClassCentres(case.classes, WIDTH, case.settings).double()
    nearly = ClassCentres(case.classes, WIDTH, replace(case.settings, negative_rate=1 - 1e-9)).double()
    assert full.drawn(STEP).tolist() == nearly.drawn(STEP).tolist() == list(range(case.classes))
    torch.testing.assert_close(full(features, labels, STEP), nearly(features, labels, STEP))


def test_clusters_that_are_neither_drawn_nor_positive_get_no_gradient() -> None:
    case = Case(classes=200, rate=0.1)
    features, labels = batch(case)
    centres = ClassCentres(case.classes, WIDTH, case.settings).double()
    centres(features, labels, STEP).backward()
    assert centres.centres.grad is not None
    touched = set(centres.centres.grad.abs().sum(1).nonzero().squeeze(1).tolist())
    assert touched == set(centres.drawn(STEP).tolist()) | set(labels.unique().tolist()) - {-1}


def test_draws_never_push_an_image_from_its_positives() -> None:
    """An image's loss falls when its feature turns towards a positive, though the positive was drawn."""
    settings = LossSettings(negative_rate=1.0, positives=2)
    centres = ClassCentres(20, WIDTH, settings).double()
    features = torch.randn(1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centres(features, torch.tensor([[3, 7]]), 0).backward()
    gradient = centres.centres.grad
    assert isinstance(gradient, Tensor)
    towards = -(gradient @ features[0])
    assert (towards > 0).nonzero().squeeze(1).tolist() == [3, 7]


def test_number_of_negatives_is_the_rate_and_each_cluster_has_its_turn() -> None:
    centres = ClassCentres(20_000, 2, LossSettings(negative_rate=0.1), seed=1)
    draws = torch.zeros(20_000)
    counts = []
    for step in range(100):
        drawn = centres.drawn(step)
        assert drawn.equal(drawn.unique())
        draws[drawn] += 1
        counts.append(len(drawn))
    # 2,000 expected, with a deviation of 42; the mean of 100 deviates by 4.
    assert np.mean(counts) == pytest.approx(2000, abs=20)
    assert np.std(counts) == pytest.approx(42, rel=0.4)
    # Of 100 steps each cluster is drawn in ten, with a deviation of 3, as independent draws are.
    assert draws.var().item() == pytest.approx(9, rel=0.1)


def test_draws_depend_on_seed_step_and_cluster_alone() -> None:
    def drawn(classes: int, seed: int, step: int) -> list[int]:
        settings = LossSettings(negative_rate=0.5)
        return [int(c) for c in ClassCentres(classes, 2, settings, seed).drawn(step).tolist()]

    one = drawn(1000, 0, 0)
    assert one == drawn(1000, 0, 0)
    assert one[: len(drawn(300, 0, 0))] == drawn(300, 0, 0)
    others = [drawn(1000, 0, 1), drawn(1000, 1, 0), drawn(1000, -1, 0), drawn(1000, 0, 10**12)]
    for other in others:
        # Independent halves share a quarter of all clusters.
        assert len(set(one) & set(other)) == pytest.approx(250, abs=60)


def splitmix64(state: int) -> int:
    """The output that follows a state of the generator, in unsigned arithmetic."""
    z = np.uint64((state + 0x9E3779B97F4A7C15) % 2**64)
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int(z ^ (z >> np.uint64(31)))


def test_draws_are_those_of_a_known_hash() -> None:
    """SplitMix64, whose first output for the seed 1234567 its authors' code gives."""
    assert splitmix64(1234567) == 6457827717110365317
    for seed, step in [(0, 0), (7, 12), (-1, 10**12)]:
        key = splitmix64(splitmix64(seed) + step)
        expected = [c for c in range(500) if splitmix64(key + c) / 2**64 < 0.3]
        settings = LossSettings(negative_rate=0.3)
        assert ClassCentres(500, 2, settings, seed).drawn(step).tolist() == expected


def test_initial_rows_are_of_length_1_and_depend_on_their_number_alone() -> None:
    whole = initial_centres(range(10_000), 4, seed=3)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(10_000))
    for part in (range(5000), range(5000, 10_000), range(4095, 4098), range(4096, 8192)):
        assert initial_centres(part, 4, seed=3).equal(whole[part.start : part.stop])
    assert len(whole.unique(dim=0)) == 10_000
    assert whole.mean(0).abs().max() < 0.03
    assert not initial_centres(range(10), 4, seed=4).equal(whole[:10])


def test_labels_may_be_repeated_missing_and_of_another_integer_type() -> None:
    settings = LossSettings(positives=3, negative_rate=1.0)
    centres = ClassCentres(9, WIDTH, settings).double()
    features = torch.randn(1, WIDTH, dtype=torch.float64)
    plain = centres(features, torch.tensor([[4, 2, -1]]), 0)
    for labels in ([4, 2, 2], [4, 4, 2], [-1, 2, 4], [4, 2, -1, 8]):
        same = centres(features, torch.tensor([labels], dtype=torch.int32), 0)
        torch.testing.assert_close(same, plain)


def test_image_without_clusters_has_negatives_only() -> None:
    none, features = torch.full((2, 8), -1), torch.randn(2, WIDTH, requires_grad=True)
    assert ClassCentres(9, WIDTH, LossSettings())(features, none, 0).item() > 0
    kinds: tuple[LossKind, ...] = ("mlc", "unicom")
    for kind in kinds:
        loss = ClassCentres(9, WIDTH, LossSettings(kind=kind))(features, none, 0)
        loss.backward()
        assert loss.item() == 0
        assert features.grad is not None and torch.isfinite(features.grad).all()


@pytest.mark.parametrize("kind", ["mlcd", "mlc", "unicom"])
def test_bfloat16_is_close_to_float32(kind: LossKind) -> None:
    """Cosines are rounded to three digits; what is large in them, sums of exponentials, is not."""
    settings = LossSettings(kind=kind, angle=0.3 if kind == "unicom" else 0.0, negative_rate=0.5)
    centres = ClassCentres(400, 64, settings)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(32, 64, generator=generator, requires_grad=True)
    labels = torch.randint(400, (32, 8), generator=generator)

    def found(enabled: bool) -> tuple[Tensor, Tensor, Tensor]:
        features.grad = centres.centres.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = centres(features, labels, 0)
        loss.backward()
        assert features.grad is not None and centres.centres.grad is not None
        return loss.detach(), features.grad, centres.centres.grad

    exact, rounded = found(False), found(True)
    assert {t.dtype for t in rounded} == {torch.float32}
    assert not rounded[0].equal(exact[0])
    torch.testing.assert_close(rounded[0], exact[0], rtol=2e-3, atol=0)
    for one, other in zip(rounded[1:], exact[1:], strict=True):
        assert (one - other).norm() < 0.03 * other.norm()


def test_sums_have_the_digits_of_float32_under_autocast() -> None:
    """Cosines of 0 and 1 are bfloat16's own; the logarithms of a thousand of them are not."""
    centres = ClassCentres(1000, 4, LossSettings(positives=2, negative_rate=1.0, scale=3.0))
    with torch.no_grad():
        centres.centres.copy_(torch.eye(4)[torch.arange(1000) % 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = centres(torch.eye(4)[:2], torch.tensor([[0, 4], [1, 2]]), 0)
    positive = math.log(1 + 2 * math.exp(-3)), math.log(1 + math.exp(-3) + 1)
    negative = math.log(1 + 248 * math.exp(3) + 750), math.log(1 + 249 * math.exp(3) + 749)
    assert loss.item() == pytest.approx((sum(positive) + sum(negative)) / 2, rel=1e-6)


# What is most: AdamW's step, cosines, rows, pairs.
@pytest.mark.parametrize(
    ("classes", "width", "images", "positives", "rate"),
    [
        (20_000, 64, 8, 8, 0.1),
        (2_000, 16, 1024, 1, 0.5),
        (2_000, 16, 1024, 1, 1.0),
        (20_000, 64, 8, 8, 1.0),
        (20_000, 64, 8, 8, 0.5),
        (500, 128, 500, 32, 0.2),
    ],
)
def test_memory_is_as_stated(classes: int, width: int, images: int, positives: int, rate: float) -> None:
    stated = memory_per_rank(classes, width, images, positives, 1, rate)
    assert most_bytes(classes, width, images, positives, rate) == pytest.approx(stated, rel=0.1)


@pytest.mark.parametrize("world", WORLDS)
def test_memory_of_several_processes_is_as_stated(together: Path, world: int) -> None:
    for share in parts(together, world, "memory"):
        for given, measured in zip(MEMORY, share["bytes"].tolist(), strict=True):
            classes, width, images, positives, rate = given
            stated = memory_per_rank(classes, width, images, positives, world, rate)
            assert measured == pytest.approx(stated, rel=0.1)


def test_memory_falls_with_the_number_of_processes() -> None:
    """Half the centres each, but as many cosines, for there are twice the images."""
    stated = [memory_per_rank(1_000_000, 512, 256, 8, world, 0.1) for world in (1, 2, 4, 8)]
    assert stated == sorted(stated, reverse=True)
    assert stated[0] / stated[3] == pytest.approx(8, rel=0.2)


def test_defaults_learn_which_clusters_are_positive() -> None:
    """Twelve clusters of random features, seen by a linear map: positives end above 0, negatives below."""
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(12, 16, generator=generator)
    clusters = torch.arange(12).repeat(8)
    images = middles[clusters] + 0.3 * torch.randn(96, 16, generator=generator)
    labels = torch.stack([clusters, (clusters + 1) % 12], dim=1)
    torch.manual_seed(0)
    trunk = torch.nn.Linear(16, 16)
    centres = ClassCentres(12, 16, LossSettings(positives=2, negative_rate=0.5))
    optimizer = torch.optim.AdamW([*trunk.parameters(), *centres.parameters()], lr=0.02)
    for step in range(150):
        optimizer.zero_grad()
        loss = centres(trunk(images), labels, step)
        loss.backward()
        optimizer.step()
    cosines = torch.nn.functional.normalize(trunk(images)) @ torch.nn.functional.normalize(centres.centres).T
    positive = torch.zeros(96, 12, dtype=torch.bool).scatter_(1, labels, True)
    assert cosines[positive].min() > 0 > cosines[~positive].max()


@pytest.mark.parametrize("label", [9, -2])
def test_label_that_is_no_cluster_is_refused(label: int) -> None:
    centres = ClassCentres(9, WIDTH, LossSettings(positives=1))
    with pytest.raises(DataError, match="among the labels") as error:
        centres(torch.ones(1, WIDTH), torch.tensor([[label]]), 0)
    assert error.value.expected == "0 to 8, or -1 for none"


def test_fewer_clusters_an_image_than_positives_are_refused() -> None:
    with pytest.raises(UsageError, match="4 clusters an image for 8 positives"):
        ClassCentres(9, WIDTH, LossSettings())(torch.ones(1, WIDTH), torch.zeros(1, 4, dtype=torch.int64), 0)
