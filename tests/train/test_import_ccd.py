from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from cliplet.classifier import Classifier, load_classifier
from cliplet.errors import DataError, EnvironmentError_
from cliplet.train.import_ccd import import_ccd
from cliplet.vocabulary import known_vocabulary, read_vocabulary

VOC12 = {"dataset": "voc12", "train_resize": [448, 448], "arch": "resnet101", "coeff": 3.0, "LS": True}
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Munch(dict):
    """What the settings' own class pickles like."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise AssertionError("the settings' class is never asked to fill itself")


class PublicModel(nn.Module):
    """The public model by its description: ResNet-50 without pool and head, 1x1 convolution, BoostLU, mean."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(*list(torchvision.models.resnet50().children())[:-2])
        self.onebyone_conv = nn.Conv2d(2048, num_classes, 1)
        self.register_buffer("alpha", torch.ones(1, num_classes))

    def forward(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        cam = self.onebyone_conv(self.feature_extractor(normalised))
        boosted = functional.relu(cam) * self.alpha.view(1, -1, 1, 1) - functional.relu(-cam)
        return functional.adaptive_avg_pool2d(boosted, 1).flatten(1), boosted


def save(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any] = VOC12) -> Path:
    """Save as the public code does, its settings as a munch.Munch, whether that library is here or not."""
    module = types.ModuleType("munch")
    module.Munch = Munch  # type: ignore[attr-defined]
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setitem(sys.modules, "munch", module)
        patched.setattr(Munch, "__module__", "munch")
        torch.save((state, Munch(settings)), path)
    return path


@pytest.fixture(scope="module")
def public_model() -> PublicModel:
    torch.manual_seed(0)
    model = PublicModel(20)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Trained statistics are not those of an untouched layer: a mixed-up one would show.
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.2)
                module.bias.normal_(0, 0.1)
        model.onebyone_conv.weight.normal_(0, 0.05)
        model.onebyone_conv.bias.normal_(0, 0.1)
        model.alpha = 3.0 * model.alpha
    return model.eval()


@pytest.fixture(scope="module")
def imported(public_model: PublicModel, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = tmp_path_factory.mktemp("ccd")
    checkpoint = save(folder / "bestccd.pt", public_model.state_dict())
    assert import_ccd(checkpoint, folder / "classifier") == folder / "classifier"
    return load_classifier(folder / "classifier")


@pytest.fixture
def small_state(public_model: PublicModel) -> dict[str, Tensor]:
    """A state with the names and shapes of the public model, every tensor one stored number."""
    zero = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in public_model.state_dict().items()}
    return {**zero, "alpha": torch.full((1, 20), 3.0)}


@torch.inference_mode()
def test_an_imported_classifier_answers_as_the_public_model(
    public_model: PublicModel, imported: Classifier
) -> None:
    pixels = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    logits, cam = imported(pixels)
    expected_logits, expected_cam = public_model((pixels - IMAGENET_MEAN) / IMAGENET_STD)
    assert cam.shape == (2, 20, 3, 4) and (cam > 0).any() and (cam < 0).any()
    torch.testing.assert_close(cam, expected_cam, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-6, atol=1e-6)


def test_settings_become_preprocessing_and_boost_and_classes(imported: Classifier) -> None:
    assert imported.vocabulary.names == known_vocabulary("voc12").names
    assert imported.config.trunk == "resnet50" and imported.config.boost == 3.0
    preprocessing = imported.config.preprocessing
    assert (preprocessing.size, preprocessing.resize_mode, preprocessing.interpolation) == (
        448,
        "squash",
        "bilinear",
    )


@pytest.mark.parametrize(
    "dataset, kind, count", [("coco", "coco14", 80), ("nuswide", "nus", 81), ("voc07", "voc07", 20)]
)
def test_the_data_set_in_the_settings_names_the_classes(
    tmp_path: Path, small_state: dict[str, Tensor], dataset: str, kind: str, count: int
) -> None:
    shapes = {
        "onebyone_conv.weight": (count, 2048, 1, 1),
        "onebyone_conv.bias": (count,),
        "alpha": (1, count),
    }
    resized = {name: torch.ones(()).expand(shape) for name, shape in shapes.items()}
    checkpoint = save(tmp_path / "a.pt", {**small_state, **resized}, {**VOC12, "dataset": dataset})
    classifier = load_classifier(import_ccd(checkpoint, tmp_path / "out"))
    assert classifier.vocabulary.names == known_vocabulary(kind).names


def test_dataparallel_prefixes_and_own_classes(tmp_path: Path, small_state: dict[str, Tensor]) -> None:
    prefixed = {f"module.{name}": value for name, value in small_state.items()}
    names = ",".join(f"thing {i}" for i in range(20))
    checkpoint = save(
        tmp_path / "a.pt", prefixed, {**VOC12, "dataset": "home-made", "train_resize": (224, 224)}
    )
    classifier = load_classifier(import_ccd(checkpoint, tmp_path / "out", read_vocabulary(names)))
    assert classifier.vocabulary.names[19] == "thing 19"
    assert classifier.config.preprocessing.size == 224


@pytest.mark.parametrize(
    "change, settings, message",
    [
        ({"feature_extractor.7.2.bn3.bias": None}, {}, r"lacks feature_extractor\.7\.2\.bn3\.bias"),
        ({"linear.weight": torch.zeros(1)}, {}, "besides linear.weight"),
        ({"onebyone_conv.weight": torch.zeros(20, 512, 1, 1)}, {}, "another shape onebyone_conv.weight"),
        ({"onebyone_conv.bias": torch.zeros(21)}, {}, "21 classes apart; .* names 20"),
        ({"onebyone_conv.bias": None}, {}, "lacks onebyone_conv.bias"),
        ({"alpha": None}, {}, "no value as alpha"),
        ({"alpha": torch.arange(1.0, 21.0)}, {}, "as alpha"),
        ({"alpha": torch.zeros(1, 20)}, {}, "as alpha"),
        ({}, {"dataset": "cub"}, r"'cub'[\s\S]*--classes"),
        ({}, {"dataset": None}, "--classes"),
        ({}, {"train_resize": [448, 640]}, "448, 640"),
        ({}, {"train_resize": None}, "None"),
    ],
)
def test_what_is_not_ccds_model_is_refused(
    tmp_path: Path,
    small_state: dict[str, Tensor],
    change: dict[str, Tensor | None],
    settings: dict[str, Any],
    message: str,
) -> None:
    state = {name: value for name, value in {**small_state, **change}.items() if value is not None}
    checkpoint = save(tmp_path / "a.pt", state, {**VOC12, **settings})
    with pytest.raises(DataError, match=message):
        import_ccd(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_another_length_is_refused(tmp_path: Path, small_state: dict[str, Tensor]) -> None:
    with pytest.raises(DataError, match="20 classes apart; --classes names 3"):
        import_ccd(
            save(tmp_path / "a.pt", small_state), tmp_path / "out", read_vocabulary("cat, dog, person")
        )


class Payload:
    """Code in a pickle, as an attacker would write it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("place", ["state", "settings", "all"])
def test_code_in_a_checkpoint_is_refused_and_never_runs(
    tmp_path: Path, small_state: dict[str, Tensor], place: str
) -> None:
    payload = Payload(tmp_path / "ran")
    checkpoint = tmp_path / "a.pt"
    match place:
        case "state":
            save(checkpoint, {**small_state, "alpha": payload})
        case "settings":
            save(checkpoint, small_state, {**VOC12, "lr": payload})
        case _:
            checkpoint.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(DataError, match="asks to run code .*; it was not loaded"):
        import_ccd(checkpoint, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "held", [{"a": torch.zeros(1)}, (1, 2), ({"a": 1}, {}), ({}, {}, {}), torch.zeros(2)], ids=str
)
def test_another_checkpoint_is_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(DataError, match="holds something else[\\s\\S]*bestccd.pt"):
        import_ccd(tmp_path / "a.pt", tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x80\x02.", b"\x80\x02J\x00", b"\x80\x02)(", b"PK\x03\x04 cut off", bytes(range(256))],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(DataError, match="is not a checkpoint[\\s\\S]*bestccd.pt"):
        import_ccd(tmp_path / "a.pt", tmp_path / "out")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_checkpoint_that_is_cut_off_is_refused(
    tmp_path: Path, small_state: dict[str, Tensor], share: float
) -> None:
    whole = save(tmp_path / "a.pt", small_state).read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match="is not a checkpoint"):
        import_ccd(tmp_path / "a.pt", tmp_path / "out")


def test_a_missing_file_and_an_unwritable_folder(tmp_path: Path, small_state: dict[str, Tensor]) -> None:
    with pytest.raises(DataError, match="cannot read .*b.pt"):
        import_ccd(tmp_path / "b.pt", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_):
        import_ccd(save(tmp_path / "a.pt", small_state), tmp_path / "file" / "out")


def test_loading_leaves_no_trust_behind(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(DataError, match="no value as alpha"):
        import_ccd(save(tmp_path / "a.pt", {}), tmp_path / "out")
    assert set(torch.serialization.get_safe_globals()) == before
