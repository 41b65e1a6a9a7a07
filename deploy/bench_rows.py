"""What `cliplet bench` is asked for: a job, and the rows of its table, before and while they are measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from cliplet.artifact import Bundle
from cliplet.contract import EMBEDDINGS, TRUNK
from cliplet.errors import ClipletError, UsageError
from cliplet.model_spec import parse_model_spec
from cliplet.plan import OFFERED, PRECISIONS, RUNTIMES, TaggerSettings, make_plan, usable_runtimes
from cliplet.plan_checks import gives_features
from cliplet.record import shown
from cliplet.server_address import ServerAddress

ALL = "all"
MOST_FILES = 256
LABELS = "labels"
# What is done to images, by what a row gives.
DOING = {LABELS: "labelling", EMBEDDINGS: "embedding"}
FROM_PIXELS = (
    "images are decoded here and asked about one batch after the other; clients that send files differ"
)
# What the original was compared with, so to speak.
ORIGINAL = "itself"


@dataclass(frozen=True, kw_only=True)
class BenchJob:
    """One call of `cliplet bench`.

    Attributes:
        models: see `cliplet.model_spec`.
        runtimes, precisions: those to measure; `all` is every engine that a bundle holds, or that can be built at once
            and run here for another model.
        batch_sizes: images in a batch; 0 chooses by the number of views.
        streams: batches that `label` has in the engine at the same time.
        images: sources of images; by default scenes made for the run.
        limit: images to take of them.
        seconds: of the engine's measurement in each round; of all together, as many images as should take so long.
        unverified: also measure engines without a parity verdict, or with a bad one, and mark them.
        trace: also record what the threads of `label` do, once for each row that gives labels.
    """

    models: tuple[str, ...]
    runtimes: tuple[str, ...] = ("auto",)
    precisions: tuple[str, ...] = ("fp32",)
    batch_sizes: tuple[int, ...] = (0,)
    streams: tuple[int, ...] = (1,)
    images: tuple[str, ...] = ()
    limit: int = MOST_FILES
    classes: str | None = None
    views: str | None = None
    device: str = "cpu"
    threads: int = 0
    seconds: float = 3.0
    rounds: int = 3
    unverified: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        for flag, values, known in (
            ("--runtime", self.runtimes, (*RUNTIMES, ALL)),
            ("--precision", self.precisions, (*PRECISIONS, ALL)),
        ):
            for value in values:
                if value not in known:
                    raise UsageError(f"{flag} {value}", f"one or more of {', '.join(known)}")
        for flag, number, least in (
            ("--batch-size", min(self.batch_sizes), 0),
            ("--streams", min(self.streams), 1),
            ("--rounds", self.rounds, 1),
            ("--limit", self.limit, 1),
        ):
            if number < least:
                raise UsageError(f"{flag} {number}", f"a whole number from {least} on")
        if not self.seconds > 0:
            raise UsageError(f"--seconds {self.seconds:g}", "more than 0")


@dataclass
class Row:
    """One line of the table while it is measured.

    Attributes:
        runtime, precision: as asked for, `auto` resolved.
        called: what records and tables call the model.
        gives: LABELS, or EMBEDDINGS of a trunk.
        phases, wholes: what each round found.
        why: why it was not measured, or not to the end.
        broken: rounds in which it failed after it had worked or been accepted.
        notes: what else a reader has to know.
    """

    settings: TaggerSettings
    batch_size: int
    streams: int
    runtime: str
    precision: str
    gives: str = LABELS
    called: str = ""
    phases: list[dict[str, Any]] = field(default_factory=list)
    wholes: list[dict[str, Any]] = field(default_factory=list)
    traced: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    fix: str = ""
    broken: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The model as a record names it: without the folders of this machine."""
        return self.called or shown([self.settings.model])[0]

    @property
    def is_served(self) -> bool:
        """Whether a server runs it, perhaps on another machine."""
        return ServerAddress.is_meant(self.settings.model)

    @property
    def engine(self) -> str:
        return f"{self.runtime}-{self.precision}"

    @property
    def name(self) -> str:
        batch = f", batch {self.batch_size}" if self.batch_size else ""
        streams = f", streams {self.streams}" if self.streams > 1 else ""
        return f"{self.model}, {self.engine}{batch}{streams}"

    def stop(self, found: dict[str, Any]) -> None:
        """Leave it out from now on, for the reason that a measurement gave."""
        self.why, self.fix = found["why"], found.get("fix", "")
        self.broken += bool(self.phases)


def rows_of(job: BenchJob, say: Callable[[str], object] = lambda _: None) -> list[Row]:
    """The rows that `job` asks for, each with a name of its own; those that cannot be had say why.

    Args:
        say: told of each row that is asked for twice, since `auto` is one of the other runtimes.
    """
    rows: dict[str, Row] = {}
    for model, name in _names(job.models).items():
        for row in _of_model(job, model):
            row.called = name
            if row.name in rows:
                say(f"{row.name}: asked for twice, since auto is {row.runtime} here; it is measured once")
            else:
                rows[row.name] = row
    return list(rows.values())


def _names(models: Iterable[str]) -> dict[str, str]:
    """What a record calls each model: the end of its path, with the folder before it where others end alike.

    A model that is named twice comes once; where folders do not help, a number tells models apart.
    """
    different: dict[str, str] = {}
    for model in models:
        different.setdefault(_place(model), model)
    ends = {model: shown([model])[0] for model in different.values()}
    often = Counter(ends.values())
    names: dict[str, str] = {}
    for model, end in ends.items():
        name = _with_folder(model, end) if often[end] > 1 else end
        number = 1
        while (unique := name if number == 1 else f"{name} #{number}") in names.values():
            number += 1
        names[model] = unique
    return names


def _place(model: str) -> str:
    """The same text for every way to spell a folder."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _with_folder(model: str, end: str) -> str:
    """The end of a model's path and the folder that it lies in: `first/bundle` of `/home/me/first/bundle`."""
    last, folder = Path(model).name, Path(model).parent.name
    return f"{end.removesuffix(last)}{folder}/{last}" if folder else end


def _of_model(job: BenchJob, model: str) -> Iterator[Row]:
    """The rows of one model."""
    settings = TaggerSettings(
        model=model, classes=job.classes, views=job.views, device=job.device, threads=job.threads
    )
    if ServerAddress.is_meant(model):
        yield from _served(job, replace(settings, classes=None, threads=0))
        return
    for runtime, precision in dict.fromkeys(_engines(job, model)):
        yield from _planned(job, replace(settings, runtime=runtime, precision=precision))


def _planned(job: BenchJob, settings: TaggerSettings) -> list[Row]:
    """A row for each size of batch and number of streams, of one engine."""
    runtime, gives, why, fix = settings.runtime, LABELS, "", ""
    try:
        plan = make_plan(settings, features=True)
        runtime, gives = plan.runtime, EMBEDDINGS if plan.contract is TRUNK else LABELS
    except ClipletError as error:
        why, fix, gives = reason_of(error), error.fix, _gives(settings)
    except ImportError as error:
        why, fix, gives = f"the library {error.name!r} is not installed", "cliplet doctor", _gives(settings)
    rows = [
        Row(settings, size, streams, runtime, settings.precision, gives, why=why, fix=fix)
        for size, streams in dict.fromkeys(product(job.batch_sizes, job.streams))
    ]
    for row in rows:
        _refuse_streams(row)
        if row.gives == EMBEDDINGS and row.is_served:
            row.notes.append(FROM_PIXELS)
    return rows


def _gives(settings: TaggerSettings) -> str:
    """What a model gives of which there is no plan; LABELS where nobody knows."""
    try:
        if ServerAddress.is_meant(settings.model):
            plan = make_plan(replace(settings, views=None), features=True)
            return EMBEDDINGS if plan.contract is TRUNK else LABELS
        spec = parse_model_spec(settings.model)
        manifest = Bundle.load(spec.bundle).manifest if spec.bundle else None
    except ClipletError:
        return LABELS
    return EMBEDDINGS if gives_features(spec, manifest) else LABELS


def _refuse_streams(row: Row) -> None:
    """Let a row of a trunk with several streams say why it cannot be measured."""
    if row.gives == EMBEDDINGS and row.streams > 1:
        error = UsageError(
            f"--streams {row.streams} for {row.model}",
            "1: embeddings are made one batch at a time, by all threads of the engine",
            "leave --streams out",
        )
        row.why, row.fix = reason_of(error), error.fix


def _served(job: BenchJob, settings: TaggerSettings) -> list[Row]:
    """The rows of a served model: its engine is the server's choice, and a plan has to name its precision."""
    found: list[Row] = []
    for precision in PRECISIONS:
        found = _planned(job, replace(settings, precision=precision))
        if not found[0].why or "--precision" not in found[0].why:
            break
    return found


def gives_of(row: Mapping[str, Any]) -> str:
    """What a row of a record gives: LABELS or EMBEDDINGS; rows of older records have labels alone."""
    return str(row.get("gives", LABELS))


def reason_of(error: ClipletError) -> str:
    """What happened, and what was expected instead, in a line."""
    return error.happened + (f" (expected: {error.expected})" if error.expected else "")


def _engines(job: BenchJob, model: str) -> Iterator[tuple[str, str]]:
    """The (runtime, precision) pairs to measure of one model."""
    if ALL not in (*job.runtimes, *job.precisions):
        yield from ((runtime, precision) for runtime in job.runtimes for precision in job.precisions)
        return
    runtimes = None if ALL in job.runtimes or job.runtimes == ("auto",) else job.runtimes
    precisions = None if ALL in job.precisions or job.precisions == ("fp32",) else job.precisions
    found = [
        (runtime, precision)
        for runtime, precision in _held(job, model)
        if (runtimes is None or runtime in runtimes) and (precisions is None or precision in precisions)
    ]
    # What is not there has a row that says so.
    yield from found or [((runtimes or ("auto",))[0], (precisions or ("fp32",))[0])]


def _held(job: BenchJob, model: str) -> list[tuple[str, str]]:
    """Every engine that a bundle holds for the device, or that is built at once for another model."""
    try:
        spec = parse_model_spec(model)
        if spec.bundle is not None:
            engines = Bundle.load(spec.bundle).manifest.engines
            return [
                (e.runtime, e.precision)
                for e in engines
                if e.runtime == "onnx" or (e.device == "cpu") == (job.device == "cpu")
            ]
    except ClipletError:
        return []
    usable = [name for name in usable_runtimes(job.device) if not name.startswith("tensorrt")]
    return [(name, precision) for name in usable for precision in OFFERED[name] if precision != "int8"]
