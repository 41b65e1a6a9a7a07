"""Traced `snippets` graphs of toy CLIPs, each made once for all tests of a process."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from helpers import picture, save_toy_clip

from cliplet.views import Aggregation, Preprocessing, Views, place_on_canvas

if TYPE_CHECKING:
    from cliplet.snippets import Snippets


def _timm(name: str) -> dict[str, object]:
    return {
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
        }
    }


ARCHITECTURES: dict[str, dict[str, object]] = {
    "vit": {},
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}},
    "convnext": _timm("test_convnext"),
}


@functools.cache
def traced(architecture: str) -> tuple[Path, Preprocessing]:
    """A float32 graph with three classes; "tiny" is the embedded CLIP, the others have random weights."""
    from cliplet.model_spec import parse_model_spec
    from cliplet.teacher import load_teacher
    from cliplet.vocabulary import read_vocabulary

    folder = _folder() / architecture
    if architecture == "tiny":
        spec = "tiny"
        folder.mkdir()
    else:
        spec = f"open_clip:local-dir:{save_toy_clip(folder, **ARCHITECTURES[architecture])}"
    teacher = load_teacher(parse_model_spec(spec))
    module = teacher.snippets(read_vocabulary("cat,dog,bird"), Aggregation())
    write_graph(module, folder / "model.onnx")
    return folder / "model.onnx", teacher.preprocessing


def write_graph(module: Snippets, file: Path) -> None:
    """Trace a scoring module to an ONNX graph with its own vocabulary."""
    import torch

    from cliplet.contract import SNIPPETS
    from cliplet.export.graphs import SnippetsGraph
    from cliplet.export.onnx_graph import set_vocabulary, trace

    example = {
        "image": torch.zeros(2, 64, 96, 3, dtype=torch.uint8),
        "boxes": torch.tensor([0.0, 0, 96, 64]).repeat(2, 3, 1),
        "text": torch.ones(5, module.text.shape[1]),
    }
    trace(SnippetsGraph(module), SNIPPETS, example, file)
    set_vocabulary(file, file, module.text.detach().numpy())


def pictures_on_canvas(preprocessing: Preprocessing, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Feeds of `count` smooth random pictures with five views each."""
    pictures = [picture(90 + 7 * i, 80, seed + i) for i in range(count)]
    return place_on_canvas(pictures, Views.parse("1+2x2"), preprocessing)


@functools.cache
def _folder() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="cliplet-traced-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
