"""One measurement of `benchmarks.peers`, in the process that runs this: a task as JSON, what was found as the last line.

Seconds run from files to scores, with the model loaded and, for open_clip, warmed up. The batches are cliplet's own: 32
views, or as many images as fit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.models import CLASSES, gflop_per_view
from cliplet.artifact import Bundle, BundleJob, Engine, cache_folder
from cliplet.errors import ClipletError
from cliplet.machine import usable_cores
from cliplet.model_spec import parse_model_spec
from cliplet.plan import VIEWS_PER_BATCH, TaggerSettings, make_plan
from cliplet.tagger import load_plan
from cliplet.views import Views

if TYPE_CHECKING:
    import torch
    from PIL import Image

WARM_UP = 2
# Images on which an engine is compared with the original.
COMPARED = 8


def main() -> int:
    """Do the task; a refusal that cliplet explains is found like a result, as `why`."""
    task = json.loads(sys.argv[1])
    work = {
        "gflop": lambda task: {"gflop_per_view": gflop_per_view(parse_model_spec(task["model"]))},
        "prepare": prepare,
        "loop": time_loop,
        "loader": time_loader,
        "cliplet": time_cliplet,
    }[task["part"]]
    try:
        found = work(task)
    except ClipletError as error:
        found = {"why": error.happened}
    print(json.dumps(found))
    return 0


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model as a user has it, in evaluation mode, with the text features of all classes."""

    model: Any
    transform: Any
    text: torch.Tensor

    @classmethod
    def load(cls, model: str) -> OpenClip:
        import open_clip
        import torch

        spec = parse_model_spec(model)
        clip, _, transform = open_clip.create_model_and_transforms(
            spec.open_clip_name, pretrained=spec.pretrained
        )
        tokenize = open_clip.get_tokenizer(spec.open_clip_name)
        tokens = tokenize([f"a photo of a {name}" for name in CLASSES.split(",")])
        with torch.inference_mode():
            return cls(clip.eval(), transform, clip.encode_text(tokens, normalize=True))

    def score(self, batch: torch.Tensor) -> Any:
        """Probabilities of every class in every view, as an array."""
        features = self.model.encode_image(batch, normalize=True)
        return (self.model.logit_scale.exp() * features @ self.text.T).softmax(dim=-1).numpy()

    @property
    def precision(self) -> str:
        """What the products of the weights are computed in, as torch tells it."""
        import torch

        dtype = next(self.model.visual.parameters()).dtype
        exact = torch.get_float32_matmul_precision() == "highest"
        return "fp32" if dtype is torch.float32 and exact else str(dtype)


@dataclass(frozen=True)
class Cut:
    """A data set for a DataLoader: all views of an image, prepared by open_clip's transform."""

    paths: Sequence[Path]
    views: Views
    transform: Any

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        import torch

        return torch.stack([self.transform(view) for view in cut(self.paths[number], self.views)])


def cut(path: Path, views: Views) -> list[Image.Image]:
    """The image and its grid cells, by Pillow alone."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    w, h = image.size
    boxes = [
        (w * j // n, h * i // n, w * (j + 1) // n, h * (i + 1) // n)
        for n in views.grids
        for i in range(n)
        for j in range(n)
    ]
    return [image, *(image.crop(box) for box in boxes)]


def time_loop(task: dict[str, Any]) -> dict[str, Any]:
    """What a user writes first: one image after the other, the views of each in a batch."""
    import torch

    clip, cuts = OpenClip.load(task["model"]), _cuts(task)
    data = Cut(cuts.paths, cuts.views, clip.transform)
    with torch.inference_mode():
        for number in range(min(WARM_UP, len(data))):
            clip.score(data[number])
        began = perf_counter()
        for number in range(len(data)):
            clip.score(data[number]).max(axis=0)
        seconds = perf_counter() - began
    return {"seconds": seconds, "images": len(data), "precision": clip.precision}


def time_loader(task: dict[str, Any]) -> dict[str, Any]:
    """The same model behind a DataLoader: a worker process a core prepares views, batches are scored."""
    import torch
    from torch.utils.data import DataLoader

    clip, cuts = OpenClip.load(task["model"]), _cuts(task)
    data = Cut(cuts.paths, cuts.views, clip.transform)
    size = max(1, VIEWS_PER_BATCH // cuts.views.count)
    loader = DataLoader(data, batch_size=size, num_workers=usable_cores())  # type: ignore[arg-type, unused-ignore]
    done = 0
    with torch.inference_mode():
        clip.score(torch.cat([data[0]] * size))
        began = perf_counter()
        for batch in loader:
            scores = clip.score(batch.flatten(0, 1))
            done += len(scores.reshape(len(batch), cuts.views.count, -1).max(axis=1))
        seconds = perf_counter() - began
    return {"seconds": seconds, "images": done, "precision": clip.precision}


def time_cliplet(task: dict[str, Any]) -> dict[str, Any]:
    """`cliplet label` through its public function, from files to written tables; nothing is warmed up."""
    from cliplet.deploy.label import LabelJob, label

    with tempfile.TemporaryDirectory() as folder:
        job = LabelJob(
            sources=(task["images"],), out=Path(folder) / "labels", tagger=_settings(task), quiet=True
        )
        result = label(job)
    if result.failed:
        raise ValueError(f"{result.failed} of {result.inputs} images could not be labelled")
    return {"seconds": result.seconds, "images": result.labelled}


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    """The bundle with all engines that were asked for, built unless it is cached, and what each of them computes in.

    Where this machine cannot build one in low precision, the others are built without: `engines` says `why`.
    """
    asked = [tuple(pair) for pair in task["engines"]]
    exact = [pair for pair in asked if pair[1] == "fp32"]
    found: dict[str, Any] = {}
    try:
        bundle = _built(task["model"], asked)
    except ClipletError as error:
        if not exact or exact == asked:
            raise
        found = {"-".join(pair): {"why": error.happened} for pair in asked if pair not in exact}
        bundle = _built(task["model"], exact)
    for engine in bundle.manifest.engines:
        parity = dict(engine.parity)
        found[engine.name] = {"parity": parity, "precision": _precision(bundle, engine)}
        if not parity.get("passed"):
            found[engine.name] = {
                "why": "it disagrees with the original: " + "; ".join(parity.get("breaches", ()))
            }
    return {"bundle": str(bundle.folder), "engines": found}


def _built(model: str, engines: Sequence[tuple[str, str]]) -> Bundle:
    from cliplet.export.bundle import BuildOptions, build_bundle

    plan = make_plan(TaggerSettings(model=model, classes=CLASSES))
    job = BundleJob(plan.spec, plan.vocabulary, plan.aggregation, plan.calibrated, tuple(engines))
    folder = cache_folder() / "benchmarks" / f"peers-{job.cached_folder().name}"
    if folder.exists():
        return Bundle.load(folder)
    return build_bundle(job, folder, BuildOptions(count=COMPARED, keep_all=True))


def _precision(bundle: Bundle, engine: Engine) -> str:
    settings = TaggerSettings(model=str(bundle.folder), runtime=engine.runtime, precision=engine.precision)
    with load_plan(make_plan(settings)) as tagger:
        return str(tagger.runner.precision)


def _settings(task: dict[str, Any]) -> TaggerSettings:
    return TaggerSettings(
        model=task["model"], views=task["views"], runtime=task["runtime"], precision=task["precision"]
    )


def _cuts(task: dict[str, Any]) -> Cut:
    return Cut(sorted(Path(task["images"]).iterdir()), Views.parse(task["views"]), None)


if __name__ == "__main__":
    sys.exit(main())
