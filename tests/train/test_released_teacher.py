"""The public code's way to ask CLIP: sizes, pixels and positions, against torch and Pillow called directly."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from helpers import picture
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image
from torch.nn import functional
from torchvision import transforms

from cliplet.errors import UsageError
from cliplet.model_spec import parse_model_spec
from cliplet.teacher import Teacher, load_teacher
from cliplet.train.released_teacher import AnySizeResNet, ReleasedTeacher, crop_sides, resized_positions
from cliplet.vocabulary import read_vocabulary

VOCABULARY = read_vocabulary("cat,dog,bird")


@pytest.fixture(scope="module")
def tiny() -> Teacher:
    return load_teacher(parse_model_spec("tiny"))


@pytest.fixture(scope="module")
def resnet() -> ModifiedResNet:
    """CLIP's own kind of ResNet, small, with random weights that a position makes a difference to."""
    torch.manual_seed(0)
    visual = ModifiedResNet([1, 1, 1, 1], output_dim=8, heads=4, image_size=64, width=8).eval()
    with torch.no_grad():
        visual.attnpool.positional_embedding.mul_(20)
    return visual


@pytest.mark.parametrize("size", [640, 448, 64])
def test_the_sides_of_crops_are_those_of_the_released_expression(size: int) -> None:
    for longer in range(1, size + 1):
        for shorter in {1, longer // 3 + 1, longer}:
            y, x = torch.tensor(shorter), torch.tensor(longer)
            scale = size / x
            wanted = (int(y * scale), int(x * scale))
            assert crop_sides(shorter, longer, size) == wanted
            assert crop_sides(longer, shorter, size) == wanted[::-1]
    # Rounding in float32 and cutting off makes some of them a pixel short.
    assert {crop_sides(1, n, 640)[1] for n in range(1, 641)} == {639, 640}


def test_whole_images_and_crops_are_what_the_released_code_feeds(tiny: Teacher) -> None:
    image = picture(200, 150, seed=3)
    released = ReleasedTeacher(tiny, VOCABULARY, size=128)
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = normalise(transforms.ToTensor()(transforms.Resize((128, 128))(Image.fromarray(image))))[None]
    crop = functional.interpolate(pixels[:, :, 10:70, 5:125], (64, 128), mode="bilinear", align_corners=False)
    text = tiny.text_matrix(VOCABULARY)
    with torch.inference_mode():
        for found, fed in (
            (released.probs_whole(image), pixels),
            (released.probs_crop(released.squashed(image), (5, 10, 125, 70)), crop),
        ):
            wanted = (100 * tiny.clip.encode_image(fed, normalize=True) @ text.T).softmax(-1)[0].numpy()
            assert found.dtype == np.float32 and found.shape == (3,)
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_scale_is_the_released_one_or_the_models_own(tiny: Teacher) -> None:
    image = picture(90, 60)
    assert ReleasedTeacher(tiny, VOCABULARY).scale == 100
    own = ReleasedTeacher(tiny, VOCABULARY, size=64, scale=None)
    assert own.scale == tiny.scale
    flat = ReleasedTeacher(tiny, VOCABULARY, size=64, scale=1e-6)
    np.testing.assert_allclose(flat.probs_whole(image), 1 / 3, atol=1e-4)
    assert np.ptp(own.probs_whole(image)) > 0.01


def test_a_resnet_at_its_own_size_is_left_as_it_is(resnet: ModifiedResNet) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(AnySizeResNet(resnet)(pixels), resnet(pixels))


@pytest.mark.parametrize(
    ("pixels", "cells"), [((64, 64), (2, 2)), ((128, 96), (4, 3)), ((639, 64), (20, 2)), ((638, 95), (19, 3))]
)
def test_positions_are_interpolated_to_any_feature_map(
    resnet: ModifiedResNet, pixels: tuple[int, int], cells: tuple[int, int]
) -> None:
    """The released code computes the feature map as side // 32, and one more when 31 remain."""
    assert cells == tuple(side // 32 + (side % 32 == 31) for side in pixels)
    learned = resnet.attnpool.positional_embedding
    enlarged = ModifiedResNet([1, 1, 1, 1], output_dim=8, heads=4, image_size=64, width=8).eval()
    enlarged.load_state_dict(resnet.state_dict())
    square = learned[1:].reshape(2, 2, -1).permute(2, 0, 1)[None]
    resized = functional.interpolate(square, cells, mode="bilinear")[0]
    positions = torch.cat([learned[:1], resized.reshape(resized.shape[0], -1).T])
    torch.testing.assert_close(resized_positions(learned, *cells), positions)
    enlarged.attnpool.positional_embedding = torch.nn.Parameter(positions)
    image = torch.randn(1, 3, *pixels)
    with torch.inference_mode():
        found = AnySizeResNet(resnet)(image)
        torch.testing.assert_close(found, enlarged(image))
    assert len(resnet.attnpool.positional_embedding) == 5


def test_a_clip_resnet_scores_any_size() -> None:
    torch.manual_seed(0)
    clip = open_clip.create_model("RN50").eval()
    spec, tiny_spec = parse_model_spec("tiny"), load_teacher(parse_model_spec("tiny"))
    teacher = Teacher(spec, clip, open_clip.get_tokenizer("RN50"), tiny_spec.preprocessing)
    released = ReleasedTeacher(teacher, VOCABULARY, size=256)
    squashed = released.squashed(picture(90, 120))
    for probs in (released.probs_whole(picture(90, 120)), released.probs_crop(squashed, (3, 5, 100, 40))):
        assert probs.sum() == pytest.approx(1, abs=1e-5)


def test_what_the_released_way_cannot_ask_is_refused(toy_clip, toy_siglip, tiny: Teacher) -> None:  # type: ignore[no-untyped-def]
    vit = load_teacher(parse_model_spec(f"open_clip:local-dir:{toy_clip}"))
    with pytest.raises(UsageError, match="32 x 32 pixels only"):
        ReleasedTeacher(vit, VOCABULARY)
    siglip = load_teacher(parse_model_spec(f"open_clip:local-dir:{toy_siglip}"))
    with pytest.raises(UsageError, match="sigmoids"):
        ReleasedTeacher(siglip, VOCABULARY)
    released = ReleasedTeacher(tiny, VOCABULARY, size=64)
    for box in ((0, 0, 0, 5), (-1, 0, 5, 5), (0, 0, 65, 5), (0, 5, 5, 5)):
        with pytest.raises(UsageError, match="inside"):
            released.probs_crop(np.zeros((64, 64, 3), np.uint8), box)
