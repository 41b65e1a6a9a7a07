"""The eager runner: the device and precision that were asked for, and the same scores in all of them."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import picture
from interpreted import interpreter, run_snippets
from torch import Tensor, nn

from cliplet.classifier import Classifier, ClassifierConfig
from cliplet.contract import CLASSIFIER, FEATURES, PIXELS, SNIPPETS, TEXT
from cliplet.errors import DataError, EnvironmentError_, UsageError
from cliplet.export.graphs import ClassifierGraph, Eager
from cliplet.model_spec import parse_model_spec
from cliplet.runners.torch_runner import TorchRunner
from cliplet.snippets import Snippets
from cliplet.teacher import load_teacher
from cliplet.views import Aggregation, Preprocessing, Views, place_on_canvas
from cliplet.vocabulary import read_vocabulary

IMAGENET = Preprocessing(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", "squash")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture
def module(toy_clip: Path) -> Snippets:
    teacher = load_teacher(parse_model_spec(f"open_clip:local-dir:{toy_clip}"))
    return teacher.snippets(read_vocabulary("cat,dog,bird"), Aggregation())


def feeds(module: Snippets) -> dict[str, np.ndarray]:
    pictures = [picture(90 + 20 * i, 60, i) for i in range(3)]
    return place_on_canvas(pictures, Views.parse("1+2x2"), module.preprocessing)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(module: Snippets) -> None:
    with pytest.raises(EnvironmentError_, match="--device cpu"):
        TorchRunner(module, SNIPPETS, "cuda")


def test_device_and_precision_are_read_back(module: Snippets) -> None:
    with TorchRunner(module, SNIPPETS) as runner:
        assert (runner.device, runner.precision) == ("cpu", "fp32")
        outputs = runner.infer(feeds(module))
        assert outputs["scores"].shape == (3, 3)
        with pytest.raises(DataError, match="exactly"):
            runner.infer({"image": feeds(module)["image"]})


@pytest.fixture(scope="module")
def classifier() -> Eager:
    torch.manual_seed(0)
    config = ClassifierConfig(trunk="test_resnet.r160_in1k", boost=3.0, preprocessing=IMAGENET)
    return Eager(ClassifierGraph(Classifier(config, read_vocabulary("cat,dog,bird")).eval())).eval()


def classifier_feeds() -> dict[str, np.ndarray]:
    given = place_on_canvas([picture(90, 60, 1), picture(50, 70, 2)], Views.parse("1"), IMAGENET)
    return {"image": given["image"], "boxes": np.ascontiguousarray(given["boxes"][:, 0])}


def test_float32_on_the_cpu_is_the_module_as_it_stands(module: Snippets) -> None:
    given = feeds(module)
    with torch.inference_mode():
        wanted = [t.numpy() for t in module(*map(torch.from_numpy, given.values()))]
    for observe in ((), (FEATURES,)):
        with TorchRunner(module, SNIPPETS, observe=observe) as runner:
            found = runner.infer(given)
        for name, values in zip(("view_probs", "scores"), wanted, strict=True):
            np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_encoder_alone_loses_precision(module: Snippets, precision: str) -> None:
    given = feeds(module)
    with TorchRunner(module, SNIPPETS, observe=(PIXELS, FEATURES)) as runner:
        wanted = runner.infer(given)
    with TorchRunner(module, SNIPPETS, precision=precision, observe=(PIXELS, FEATURES)) as runner:
        assert runner.precision == precision
        found = runner.infer(given)
    assert {values.dtype for values in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(found[PIXELS], wanted[PIXELS])
    step = {"fp16": 2**-11, "bf16": 2**-8}[precision]
    size = np.abs(wanted[FEATURES]).max()
    assert 0.01 * step * size < np.abs(found[FEATURES] - wanted[FEATURES]).max() < 20 * step * size
    # Behind the encoder all is float32: from the features that were seen, the scores follow to the last digits.
    with torch.inference_mode():
        features, boxes = torch.from_numpy(found[FEATURES]), torch.from_numpy(given["boxes"])
        scores = module.score(module.unit(features, boxes), module.text)[1].numpy()
    np.testing.assert_allclose(found["scores"], scores, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_classifiers_encoder_ends_before_boostlu(classifier: Eager, precision: str) -> None:
    given = classifier_feeds()
    with TorchRunner(classifier, CLASSIFIER, precision=precision, observe=(FEATURES, PIXELS)) as runner:
        assert runner.precision == precision
        found = runner.infer(given)
    assert found[PIXELS].shape == (2, 3, 32, 32)
    boosted = np.where(found[FEATURES] > 0, 3 * found[FEATURES], found[FEATURES])
    np.testing.assert_array_equal(found["cam"], boosted)
    np.testing.assert_allclose(found["probs"], 1 / (1 + np.exp(-boosted.mean(axis=(2, 3)))), atol=1e-6)
    rounded = torch.from_numpy(found[FEATURES]).to(torch.bfloat16).float().numpy()
    assert np.array_equal(found[FEATURES], rounded) == (precision == "bf16")


def test_a_runner_leaves_the_module_to_others(module: Snippets) -> None:
    given = feeds(module)
    names = list(module.state_dict())
    with TorchRunner(module, SNIPPETS) as plain, TorchRunner(module, SNIPPETS, precision="bf16") as low:
        wanted = plain.infer(given)["scores"]
        assert np.abs(low.infer(given)["scores"] - wanted).max() > 0
        np.testing.assert_array_equal(plain.infer(given)["scores"], wanted)
        assert low._module.text.data_ptr() == module.text.data_ptr()
    assert list(module.state_dict()) == names


class Stubborn(nn.Module):
    """An encoder that computes in float32, whatever it is asked for, and gives what was asked for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.inner(pixels).bfloat16()


def test_a_precision_that_is_not_had_is_refused(module: Snippets) -> None:
    module.encoder = Stubborn(module.encoder)
    with pytest.raises(EnvironmentError_, match="'bf16', but the encoder's matrix products ran in fp32"):
        TorchRunner(module, SNIPPETS, precision="bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "one of fp32, fp16, bf16"),
        ({"observe": ("nonsense",)}, "'pixels' and 'features'"),
        ({"cuda_graphs": True}, "--device cuda"),
    ],
)
def test_what_torch_cannot_do_is_refused(module: Snippets, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TorchRunner(module, SNIPPETS, **options)


def test_a_module_without_an_encoder_has_nothing_to_observe() -> None:
    with pytest.raises(UsageError, match="no encoder"):
        TorchRunner(nn.Linear(2, 2), TEXT, observe=(FEATURES,))


def test_a_compiled_encoder_gives_the_same(module: Snippets, monkeypatch: pytest.MonkeyPatch) -> None:
    given = feeds(module)
    # Traced and guarded as ever, but run by torch's own operators: compiling would take the tests half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    results = []
    for compiled in (False, True):
        with TorchRunner(module, SNIPPETS, precision="bf16", compiled=compiled) as runner:
            assert ("compiled" in runner.runtime, runner.precision) == (compiled, "bf16")
            results.append(runner.infer(given)["scores"])
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)


def test_a_compiler_that_fails_is_found_at_once(module: Snippets, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> object:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    with pytest.raises(EnvironmentError_, match="compiled cannot run 'snippets' on 'cpu'"):
        TorchRunner(module, SNIPPETS, compiled=True)


def test_between_two_kernels_the_scores_are_the_modules() -> None:
    fed = Preprocessing(8, IMAGENET.mean, IMAGENET.std, "bicubic", "squash")
    given = place_on_canvas([picture(24, 18, 1), picture(16, 30, 2)], Views.parse("1"), fed)
    with interpreter() as pool:
        plain, fused = pool.submit(run_snippets, given, fed).result()
    assert np.ptp(plain[1]) > 0.1
    for ours, theirs in zip(fused, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}, {"compiled": True}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_way_on_a_gpu_gives_the_scores_of_the_cpu(
    module: Snippets, precision: str, options: dict
) -> None:
    few, many = feeds(module), {name: np.repeat(values, 2, axis=0) for name, values in feeds(module).items()}
    with TorchRunner(module, SNIPPETS) as runner:
        wanted = runner.infer(few)["scores"]
    with TorchRunner(module, SNIPPETS, "cuda", precision=precision, observe=(FEATURES,), **options) as runner:
        assert (runner.device, runner.precision) == ("cuda", precision)
        assert "views by kernels" in runner.runtime
        for given, copies in ((few, 1), (many, 2), (few, 1)):
            found = runner.infer(given)["scores"]
            np.testing.assert_allclose(
                found, np.repeat(wanted, copies, axis=0), atol={"fp32": 1e-3}.get(precision, 0.1)
            )


@pytest.mark.gpu
@GPU
def test_a_gpu_without_triton_says_so(module: Snippets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliplet.runners.torch_runner.find_spec", lambda _: None)
    with TorchRunner(module, SNIPPETS, "cuda") as runner:
        assert "no triton" in runner.runtime
        assert runner.infer(feeds(module))["scores"].shape == (3, 3)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_gpu_gives_a_classifiers_probabilities_of_the_cpu(classifier: Eager, cuda_graphs: bool) -> None:
    with TorchRunner(classifier, CLASSIFIER) as runner:
        wanted = runner.infer(classifier_feeds())
    with TorchRunner(classifier, CLASSIFIER, "cuda", cuda_graphs=cuda_graphs) as runner:
        found = runner.infer(classifier_feeds())
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-3)


@pytest.mark.gpu
@GPU
def test_a_gpu_gives_the_scores_of_the_cpu(module: Snippets) -> None:
    given = feeds(module)
    with TorchRunner(module, SNIPPETS) as runner:
        wanted = runner.infer(given)
    with TorchRunner(module, SNIPPETS, "cuda") as runner:
        assert runner.device == "cuda"
        found = runner.infer(given)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-3)
