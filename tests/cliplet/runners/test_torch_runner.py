"""The eager runner: the device that was asked for, and the same scores on every device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import picture

from cliplet.contract import SNIPPETS
from cliplet.errors import DataError, EnvironmentError_
from cliplet.model_spec import parse_model_spec
from cliplet.runners.torch_runner import TorchRunner
from cliplet.snippets import Snippets
from cliplet.teacher import load_teacher
from cliplet.views import Aggregation, Views, place_on_canvas
from cliplet.vocabulary import read_vocabulary


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_scores_of_the_cpu(module: Snippets) -> None:
    given = feeds(module)
    with TorchRunner(module, SNIPPETS) as runner:
        wanted = runner.infer(given)
    with TorchRunner(module, SNIPPETS, "cuda") as runner:
        assert runner.device == "cuda"
        found = runner.infer(given)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-3)
