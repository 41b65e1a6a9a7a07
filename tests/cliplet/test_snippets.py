"""Cutting, resizing and scoring views, against Pillow, open_clip and hand-computed cases."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from helpers import picture
from PIL import Image

from cliplet.model_spec import parse_model_spec
from cliplet.snippets import aggregate, cubic_kernel, cut_views
from cliplet.teacher import load_teacher
from cliplet.views import Aggregation, Views, place_on_canvas
from cliplet.vocabulary import read_vocabulary

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    "box", [(0, 0, 200, 150), (20, 30, 180, 140), (150, 100, 200, 150), (5, 5, 25, 20), (0, 0, 1, 1)]
)
def test_views_are_resized_like_pillow_does(interpolation: str, box: tuple[int, int, int, int]) -> None:
    image = picture(200, 150, seed=3)
    image[40:60, 40:160] = np.random.default_rng(0).integers(0, 256, (20, 120, 3))
    ours = cut_views(torch.from_numpy(image[None]), torch.tensor([[box]]).float(), 48, interpolation)
    pillow = Image.fromarray(image).crop(box).resize((48, 48), FILTERS[interpolation])
    difference = np.abs(ours[0, 0].permute(1, 2, 0).numpy() - np.asarray(pillow, np.float32))
    # Pillow rounds to whole numbers after each of its two passes.
    assert difference.max() <= 1.5


def test_a_view_sees_nothing_outside_of_its_box() -> None:
    image = np.full((1, 64, 64, 3), 255, np.uint8)
    image[:, 16:48, 16:48] = 100
    view = cut_views(torch.from_numpy(image), torch.tensor([[[16.0, 16, 48, 48]]]), 8, "bicubic")
    assert view.min() == pytest.approx(100, abs=1e-3)
    assert view.max() == pytest.approx(100, abs=1e-3)


def test_the_cubic_kernel_is_keys_with_a_half() -> None:
    x = torch.tensor([0.0, 0.5, -0.5, 1.0, 1.5, 2.0, 3.0])
    assert cubic_kernel(x).tolist() == pytest.approx([1, 0.5625, 0.5625, 0, -0.0625, 0, 0])


VIEW_PROBS = torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.2, 0.3]]])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        (Aggregation("cdul", 0.0), [(0.6 + 0.9) / 2, (0.4 + 0.3) / 2]),
        (Aggregation("cdul", 0.5), [(0.6 + 0.9) / 2, (0.4 + 0.1) / 2]),
        (Aggregation("max"), [0.9, 0.4]),
        (Aggregation("mean"), [1.7 / 3, 0.8 / 3]),
    ],
)
def test_views_become_a_score(aggregation: Aggregation, expected: list[float]) -> None:
    assert aggregate(VIEW_PROBS, aggregation)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["cdul", "max", "mean"])
def test_a_single_view_is_its_own_score(kind: str) -> None:
    assert aggregate(VIEW_PROBS[:, :1], Aggregation(kind))[0].tolist() == pytest.approx([0.6, 0.4])


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(300, 200), (120, 260), (32, 32), (20, 50)])
def test_the_whole_image_is_seen_as_open_clip_shows_it(
    toy_clip: object, resize_mode: str, size: tuple[int, int]
) -> None:
    clip = open_clip.create_model(
        f"local-dir:{toy_clip}", force_preprocess_cfg={"resize_mode": resize_mode}
    ).eval()
    config = open_clip.get_model_preprocess_cfg(clip)
    transform = open_clip.image_transform(
        32,
        is_train=False,
        mean=config["mean"],
        std=config["std"],
        resize_mode=resize_mode,
        interpolation="bicubic",
    )
    teacher = load_teacher(parse_model_spec(f"open_clip:local-dir:{toy_clip}"))
    module = teacher.snippets(read_vocabulary("cat,dog"), Aggregation())
    module.preprocessing = module.preprocessing.from_json(
        {**module.preprocessing.to_json(), "resize_mode": resize_mode}
    )
    image = picture(*size, seed=5)
    feeds = place_on_canvas([image], Views.parse("1"), module.preprocessing)
    with torch.inference_mode():
        ours = module.features(torch.from_numpy(feeds["image"]), torch.from_numpy(feeds["boxes"]))[0]
        theirs = clip.encode_image(transform(Image.fromarray(image))[None], normalize=True)
    # The edge between image and padding is resampled with the rest here, and sharp in open_clip.
    least = 0.95 if resize_mode == "longest" else 0.999
    assert float((ours * theirs).sum()) >= least


def test_a_box_that_is_longer_than_its_canvas_gives_nan_and_never_a_wrong_view() -> None:
    image = torch.full((1, 32, 64, 3), 100, dtype=torch.uint8)
    boxes = torch.tensor([[[0.0, 0, 64, 32], [0, 0, 64, 40], [-20, 0, 64, 32]]])
    whole, high, wide = cut_views(image, boxes, 16, "bicubic")[0]
    assert torch.allclose(whole, torch.tensor(100.0))
    assert high.isnan().all() and wide.isnan().all()


def test_scores_do_not_depend_on_the_company_in_a_batch(toy_clip: object) -> None:
    teacher = load_teacher(parse_model_spec(f"open_clip:local-dir:{toy_clip}"))
    module = teacher.snippets(read_vocabulary("cat,dog,bird"), Aggregation())
    pictures = [picture(90, 60, 1), picture(200, 150, 2)]
    views = Views.parse("1+2x2")

    def scores(chosen: list[np.ndarray]) -> torch.Tensor:
        feeds = place_on_canvas(chosen, views, module.preprocessing)
        with torch.inference_mode():
            return module(torch.from_numpy(feeds["image"]), torch.from_numpy(feeds["boxes"]))[1]

    together, alone = scores(pictures), scores(pictures[:1])
    assert together[0].tolist() == pytest.approx(alone[0].tolist(), abs=1e-6)


MEMORY = """
import sys, torch
from cliplet.machine import peak_memory_bytes
from cliplet.snippets import cut_views

images = int(sys.argv[1])
torch.set_num_threads(1)
image = torch.zeros(images, 640, 640, 3, dtype=torch.uint8)
boxes = torch.tensor([0.0, 0, 640, 640]).repeat(images, 30, 1)
with torch.inference_mode():
    cut_views(image, boxes, 112, "bicubic")
print(peak_memory_bytes())
"""


def test_memory_does_not_grow_with_the_batch() -> None:
    """Beside images and views themselves, only what one image needs is there, whatever the size of the batch."""

    def peak(images: int) -> int:
        command = [sys.executable, "-c", MEMORY, str(images)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    per_image = 640 * 640 * 3 + 30 * 3 * 112 * 112 * 4
    # Freed memory that the allocator keeps counts too; with all images at once it would be twenty times as much.
    assert peak(12) - peak(2) <= 4 * 10 * per_image
