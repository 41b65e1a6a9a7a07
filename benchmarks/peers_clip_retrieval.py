"""clip-retrieval's inference loop over a folder, timed; run by any interpreter that has it, with nothing of cliplet.

    python benchmarks/peers_clip_retrieval.py '{"folder": ..., "model": ..., "batch_size": 32, "workers": 2}'

Its own reader, mapper, writer and Runner do the work. Its logger alone is replaced: that one starts a process which
imports everything once more beside the first batches; over thousands of images that is nothing, here it would be.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import Any

PACKAGES = ("clip-retrieval", "all-clip", "open-clip-torch", "torch", "numpy")


def main() -> int:
    """Print what was found as the last line: a measurement, or for `{}` the versions, or `why` there is neither."""
    task = json.loads(sys.argv[1])
    try:
        found: dict[str, Any] = {"versions": {name: version(name) for name in PACKAGES}}
        found |= measure(**task) if task else {}
    except PackageNotFoundError as error:
        found = {"why": f"{error.name} is not installed"}
    except ImportError as error:
        found = {"why": f"clip-retrieval does not load: {error}"}
    print(f"\n{json.dumps(found)}")
    return 0


class Clock:
    """Stands in for its logger: when the loop began, and how many images went through."""

    def __init__(self) -> None:
        self.began, self.images = 0.0, 0

    def start(self) -> None:
        self.began = perf_counter()

    def __call__(self, batch: dict[str, Any]) -> None:
        self.images += batch["sample_count"]

    def end(self) -> None:
        """Nothing to do: the embeddings are written after this, and that is timed too."""


def measure(folder: str, model: str, batch_size: int, workers: int) -> dict[str, Any]:
    """Seconds from the files of `folder` to written embeddings, the model loaded and warmed up as its loader does.

    Args:
        model: as `all_clip` names it.
    """
    inference = "clip_retrieval.clip_inference"
    reader, mapper, writer, runner = (
        import_module(f"{inference}.{name}") for name in ("reader", "mapper", "writer", "runner")
    )
    loading = {
        "clip_model": model,
        "use_jit": False,
        "warmup_batch_size": batch_size,
        "clip_cache_path": None,
    }
    # In the mapper's own order of arguments, so that the loader's cache gives it the same model.
    clip, preprocess, tokenizer = import_module("all_clip").load_clip(**loading)
    images = {"enable_text": False, "enable_image": True, "enable_metadata": False}
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        runner.Runner(
            reader_builder=lambda sampler: reader.FilesReader(
                sampler, preprocess, tokenizer, folder, batch_size, workers, **images
            ),
            mapper_builder=lambda: mapper.ClipMapper(use_mclip=False, mclip_model="", **images, **loading),
            writer_builder=lambda number: writer.NumpyWriter(number, out, output_partition_count=1, **images),
            logger_builder=lambda number: clock,
            output_partition_count=1,
        )(0)
        seconds = perf_counter() - clock.began
    dtype = str(next(clip.parameters()).dtype)
    return {
        "seconds": seconds,
        "images": clock.images,
        "precision": {"torch.float32": "fp32"}.get(dtype, dtype),
    }


if __name__ == "__main__":
    sys.exit(main())
