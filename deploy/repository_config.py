"""The text of each model's `config.pbtxt`, from the templates in `triton_models`.

Legend: B images, V views, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from cliplet import triton_models
from cliplet.contract import TEXT, TensorSpec
from cliplet.serving import CARD_KEY, SCORES, TAGGER, TRITON_TYPES, tagger_extras

from .repository_types import Served, ServedGraph, ServeSettings

TEMPLATES = Path(triton_models.__file__).parent
MODEL_PY = "model.py"
PATHS_PY = "cliplet_paths.py"
LABELS_FILE = "labels.txt"
# What graphs on the CPU take turns at where several bundles share it: each of them uses all cores.
CORES = "cores"


def tagger_config(served: Served, settings: ServeSettings) -> str:
    """The configuration of the model that takes encoded images: a bundle's tagger, or a trunk's embedder."""
    graph, front = served.graphs[0], served.card.front
    # The tagger looks at a fixed number of views; its graph takes any.
    known = {"V": served.plan.views.count, "C": len(served.plan.vocabulary.names)}
    # A cache would answer those who ask for more with less, see TaggerService.
    extras = () if settings.cache else tagger_extras(served.card.manifest.kind)
    outputs = [(tensor, _sizes(tensor, graph, known)) for tensor in (*front.outputs, *extras)]
    return _filled(
        "tagger",
        name=served.name,
        graph=graph.name,
        max_batch_size=served.card.max_batch_size,
        gives="labels" if front is TAGGER else "embeddings",
        inputs=_tensors([(tensor, (-1, 1)) for tensor in front.inputs]),
        outputs=_tensors(outputs, {SCORES: LABELS_FILE}),
        preferred_batch_sizes=", ".join(map(str, served.batches)),
        queue_delay_us=settings.queue_delay_us,
        instances=settings.instances + 1,
        cache=str(settings.cache).lower(),
        parameters=_parameters({CARD_KEY: served.card.to_json()}),
        **_limits(settings),
    )


def graph_config(served: Served, graph: ServedGraph, settings: ServeSettings, *, shared: bool) -> str:
    """The configuration of one of its graphs.

    Args:
        shared: whether others compute on the same cores.
    """
    _, best, most = graph.profile.batch
    turns = f'rate_limiter {{ resources [ {{ name: "{CORES}" global: true count: 1 }} ] }} '
    return _filled(
        "graph",
        name=graph.name,
        kind=graph.contract.name,
        # In a comment, where a line's end would end it.
        bundle=ascii(str(served.plan.spec)),
        tagger=served.name,
        backend=graph.backend,
        file=next(iter(graph.files), MODEL_PY),
        max_batch_size=most,
        inputs=_tensors(
            [(tensor, graph.axes[tensor.name]) for tensor in graph.contract.inputs],
            ragged=graph.backend == "python",
        ),
        outputs=_tensors([(tensor, graph.axes[tensor.name]) for tensor in graph.contract.outputs]),
        preferred_batch_sizes=", ".join(map(str, sorted({best, most}))),
        instances=settings.instances,
        instance_kind="KIND_GPU" if graph.on_gpu else "KIND_CPU",
        rate_limiter=turns if shared and settings.device == "cpu" else "",
        cache=str(settings.cache and graph.contract is TEXT).lower(),
        warmups=_warmups(graph),
        parameters=_parameters(graph.parameters),
        **_limits(settings),
    )


def _sizes(tensor: TensorSpec, graph: ServedGraph, known: Mapping[str, int]) -> list[int]:
    """The axes of an output of the model of encoded images: as its graph has them, but for those that are known."""
    own = graph.axes.get(tensor.name, (-1,) * len(tensor.axes))
    return [
        a if isinstance(a, int) else known.get(a, found) for a, found in zip(tensor.axes, own, strict=True)
    ]


def config_type(tensor: TensorSpec) -> str:
    """The type of a tensor as configurations spell it."""
    name = TRITON_TYPES[tensor.dtype]
    return f"TYPE_{'STRING' if name == 'BYTES' else name}"


def quoted(text: str) -> str:
    """A text as a protobuf text format has it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _filled(template: str, **values: object) -> str:
    return Template((TEMPLATES / template / "config.pbtxt").read_text(encoding="utf-8")).substitute(values)


def _limits(settings: ServeSettings) -> dict[str, int]:
    return {"timeout_us": settings.timeout_us, "max_queue": settings.max_queue}


def _tensors(
    tensors: Sequence[tuple[TensorSpec, Sequence[int]]],
    labels: Mapping[str, str] | None = None,
    *,
    ragged: bool = False,
) -> str:
    """A list of tensors without their axis of the batch, which configurations leave out.

    Args:
        ragged: requests of different sizes may share a batch, where a tensor has axes of any size. Without it Triton
            closes a batch at the first request of another size, and has been seen to leave the next one waiting for
            half a second.
    """
    lines = []
    for tensor, axes in tensors:
        dims = ", ".join(map(str, axes[1:]))
        more = f' label_filename: "{labels[tensor.name]}"' if labels and tensor.name in labels else ""
        more += " allow_ragged_batch: true" if ragged and -1 in axes[1:] else ""
        lines.append(f'  {{ name: "{tensor.name}" data_type: {config_type(tensor)} dims: [ {dims} ]{more} }}')
    return ",\n".join(lines)


def _warmups(graph: ServedGraph) -> str:
    """Batches of zeros, from the smallest shapes to the largest."""
    inputs = graph.contract.inputs
    warmups = []
    together = zip(*(graph.shapes(t) for t in inputs), strict=True)
    # Of a graph for one image at a time the smallest may be the usual one.
    for number, shapes in enumerate(dict.fromkeys(together), 1):
        rows = [
            f'      {{ key: "{tensor.name}" value {{ data_type: {config_type(tensor)} '
            f"dims: [ {', '.join(map(str, shape[1:]))} ] zero_data: true }} }}"
            for tensor, shape in zip(inputs, shapes, strict=True)
        ]
        listed = ",\n".join(rows)
        warmups.append(
            f'  {{ name: "shapes-{number}" batch_size: {shapes[0][0]} inputs [\n{listed}\n    ] }}'
        )
    return ",\n".join(warmups)


def _parameters(values: Mapping[str, str]) -> str:
    return ",\n".join(
        f"  {{ key: {quoted(key)} value {{ string_value: {quoted(value)} }} }}"
        for key, value in values.items()
    )
