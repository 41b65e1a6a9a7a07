"""One labelling job divided among any number of processes or machines that share a file system.

    cliplet label photos --out labels --partitions 16 --partition $SLURM_ARRAY_TASK_ID

Partition i of N labels the i-th stretch of the sorted inputs into a folder of its own, which continues after a kill
like any other. Partitions may run at once, one after the other, and in any order. Stretches end where batches end, so
that every image is scored beside the same others, hence with the same result, as in an undivided run. Whichever
finishes last joins all into OUT, which then is what an undivided run would have left; `--partitions N` without
`--partition` joins what another was killed before joining.

What lies where until then: `cliplet.partition_folders`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cliplet.errors import ArtifactError, UsageError, explained_os_errors
from cliplet.images import ImageRef
from cliplet.labels import LabelStore, read_errors, read_labelled_paths, write_atomically
from cliplet.listing import find_images
from cliplet.lock import lock_folder
from cliplet.partition_folders import (
    DIVISION_SCHEMA,
    done_file,
    is_divided,
    job_file,
    not_joined,
    partition_folder,
    partitions_folder,
    read_division,
    unfinished,
)
from cliplet.plan import Plan, make_plan

from .label import DryRun, LabelJob, LabelResult, dry_run, fingerprint, label_images, run_description


@dataclass(frozen=True)
class Division:
    """Which part of a job: partition `index`, from 0, of `of`; without an index, the joining of all."""

    of: int
    index: int | None = None

    def __post_init__(self) -> None:
        if self.of < 1:
            raise UsageError(f"--partitions {self.of}", "a whole number from 1 on")
        if self.index is not None and not 0 <= self.index < self.of:
            raise UsageError(
                f"--partition {self.index}",
                f"0 to {self.of - 1}, since partitions are counted from 0 and there are {self.of}",
                "for batch systems that count from 1: --partition $((SLURM_ARRAY_TASK_ID - 1))",
            )


@dataclass(frozen=True)
class DividedResult:
    """How one part of a divided job ended.

    Attributes:
        own: of the partition; None where all were joined before, or nothing but joining was asked for.
        whole: of all inputs, once they are joined.
        missing: partitions that are not finished yet.
    """

    own: LabelResult | None
    whole: LabelResult | None
    missing: tuple[int, ...] = ()


def label_divided(job: LabelJob, division: Division) -> DividedResult:
    """Label one partition of `job`, and join all if it was the last; see `Division`.

    Raises:
        UsageError: the folder holds another job, another division or an undivided one, the inputs are not those
            that the other partitions saw, or this partition is being labelled by another process.
        DataError: only joining was asked for, and some partitions are not finished.
        Others: as `label`.
    """
    if job.overwrite:
        raise UsageError(
            "--overwrite with --partitions",
            "a new folder: other processes may be writing into this one",
            f"rm -r {shlex.quote(str(job.out))}, then the same commands without --overwrite",
        )
    chosen = make_plan(job.tagger)
    images = find_images(job.sources).images[: job.limit]
    if division.index is None:
        return _joined_only(job, division, chosen, images)
    shared = _shared(job, division, chosen, images)
    share = images[_stretch(shared, division.index)]
    folder = partition_folder(job.out, division.index, division.of)
    own_run = {**shared["run"], "fingerprint": {**shared["fingerprint"], "partition": folder.name}}
    with _entered(job, shared, folder) as store:
        if store is None:
            return DividedResult(None, _whole_result(job, chosen, images))
        own = label_images(replace(job, out=folder), store, chosen, share, own_run)
        if not own.interrupted:
            counts = {"inputs": own.inputs, "labelled": own.labelled, "failed": own.failed}
            write_atomically(done_file(folder), json.dumps(counts).encode())
    # The partition's lock is given back before, so of two that end together the later one finds both free.
    missing = () if own.interrupted else join(job.out)
    whole = None if own.interrupted or missing else _whole_result(job, chosen, images, own)
    return DividedResult(own, whole, tuple(missing))


def dry_run_divided(job: LabelJob, division: Division) -> DryRun:
    """What `label_divided` would do: the inputs of the partition, and how many of them are settled.

    Without an index, those of all partitions, as they saw them.
    """
    chosen = make_plan(job.tagger)
    divided = is_divided(job.out)
    if not divided and (division.index is None or (job.out / "run.json").exists()):
        return dry_run(job)
    listing = find_images(job.sources)
    images = listing.images[: job.limit]
    if division.index is None:
        there = _same_division(job, division, chosen, images)
        inputs, size = there["inputs"], there["images_per_batch"]
        return DryRun(listing, inputs, _settled_in_all(job.out, there["partitions"]), chosen, size)
    shared = _shared(job, division, chosen, images)
    if divided:
        _refuse_other_division(job.out, shared)
    share = images[_stretch(shared, division.index)]
    folder = partition_folder(job.out, division.index, division.of)
    settled = {
        *read_labelled_paths(folder),
        *(() if job.retry_failed else (e.path for e in read_errors(folder))),
    }
    return DryRun(
        replace(listing, images=share),
        len(share),
        sum(ref.path in settled for ref in share),
        chosen,
        shared["images_per_batch"],
    )


def join(out: Path) -> list[int]:
    """Join the partitions of `out` if all are finished; else those that are not, counted from 0.

    Safe to call at any time and by several processes: one joins, the others find it done. A join that is killed is
    done again by the next one; the partitions are removed only when OUT is whole.
    """
    with _locked(out):
        if not is_divided(out):
            _remove_rest(out)
            return []
        of = read_division(out)["partitions"]
        folders = [partition_folder(out, index, of) for index in range(of)]
        missing = sorted({*unfinished(out), *(i for i, folder in enumerate(folders) if _is_held(folder))})
        if not missing:
            _join(out, folders)
    return missing


def _shared(job: LabelJob, division: Division, chosen: Plan, images: Sequence[ImageRef]) -> dict[str, Any]:
    """What all partitions of a job must agree on."""
    names = hashlib.sha256()
    for ref in images:
        names.update(ref.path.encode() + b"\0")
    return {
        "schema": DIVISION_SCHEMA,
        "partitions": division.of,
        "images_per_batch": job.batch_size or chosen.images_per_batch,
        "inputs": len(images),
        "listing": names.hexdigest(),
        "fingerprint": fingerprint(job, chosen),
        "run": run_description(job, chosen),
    }


def _stretch(shared: dict[str, Any], index: int) -> slice:
    """The inputs of a partition: whole batches, their number equal to one."""
    size, of = shared["images_per_batch"], shared["partitions"]
    batches = -(-shared["inputs"] // size)
    return slice(index * batches // of * size, (index + 1) * batches // of * size)


@contextmanager
def _entered(job: LabelJob, shared: dict[str, Any], folder: Path) -> Iterator[LabelStore | None]:
    """Context with the locked store of a partition; None if all are joined already."""
    _refuse_undivided(job, shared)
    store = LabelStore(folder)
    with _locked(job.out):
        _refuse_undivided(job, shared)
        joined = (job.out / "run.json").exists()
        if not joined:
            if job_file(job.out).exists():
                _refuse_other_division(job.out, shared)
            else:
                with explained_os_errors(job.out):
                    partitions_folder(job.out).mkdir(exist_ok=True)
                write_atomically(job_file(job.out), json.dumps(shared, indent=2).encode())
            store.__enter__()
    if joined:
        yield None
        return
    with _leaving(store):
        yield store


@contextmanager
def _leaving(store: LabelStore) -> Iterator[None]:
    try:
        yield
    finally:
        store.__exit__(None, None, None)


def _refuse_undivided(job: LabelJob, shared: dict[str, Any]) -> None:
    """Raise unless `job.out` is fresh, divided, or whole: its inputs are settled and the job is this one."""
    if not (job.out / "run.json").exists():
        return
    store = LabelStore(job.out)
    store.refuse_other_job(shared["fingerprint"])
    labelled = store.labelled_paths()
    errors = store.errors(labelled)
    if len(labelled) + len(errors) < shared["inputs"] or (job.retry_failed and errors):
        raise UsageError(
            f"{job.out} holds one undivided job, and some of its inputs wait to be labelled",
            "no --partitions, which would start from nothing",
            "the same command without --partitions and --partition continues it",
        )


def _refuse_other_division(out: Path, shared: dict[str, Any]) -> None:
    """Raise `UsageError` unless the partitions in `out` belong to the same job, cut in the same way."""
    there = read_division(out)
    if there["partitions"] != shared["partitions"]:
        raise UsageError(
            f"{out} is divided into {there['partitions']:,} partitions, not {shared['partitions']:,}",
            "the same number for all",
            f"--partitions {there['partitions']}, or another --out",
        )
    before, now = there["fingerprint"], shared["fingerprint"]
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    changed += ["batch size"] * (there["images_per_batch"] != shared["images_per_batch"])
    if changed:
        raise UsageError(
            f"{out} holds partitions of another job (other {', '.join(changed)})",
            "the same inputs, model, classes and options in all partitions",
            "choose another --out",
        )
    if (there["inputs"], there["listing"]) != (shared["inputs"], shared["listing"]):
        raise UsageError(
            f"the inputs are not those that the other partitions saw: {there['inputs']:,} then, {shared['inputs']:,} now",
            "the same files, and the same --limit, until all partitions are joined",
            "choose another --out, or write the inputs into a list.txt that stays the same",
        )


def _same_division(
    job: LabelJob, division: Division, chosen: Plan, images: Sequence[ImageRef]
) -> dict[str, Any]:
    """What the partitions that are there share, whatever the sources hold by now; they must be of this job."""
    there = read_division(job.out)
    known = {name: there[name] for name in ("inputs", "listing", "images_per_batch")}
    _refuse_other_division(job.out, {**_shared(job, division, chosen, images), **known})
    return there


def _settled_in_all(out: Path, of: int) -> int:
    """How many inputs have a row or an error in some partition."""
    folders = [partition_folder(out, index, of) for index in range(of)]
    return sum(
        len({*read_labelled_paths(folder), *(error.path for error in read_errors(folder))})
        for folder in folders
    )


def _joined_only(
    job: LabelJob, division: Division, chosen: Plan, images: Sequence[ImageRef]
) -> DividedResult:
    """Join all partitions, whatever the sources hold by now."""
    if is_divided(job.out):
        _same_division(job, division, chosen, images)
        if missing := join(job.out):
            error = not_joined(job.out)
            if len(missing) == len(unfinished(job.out)):
                raise error
            raise UsageError(
                f"partitions of {job.out} are still being written",
                "all of them finished",
                "wait for them to end",
            )
    elif not (job.out / "run.json").exists():
        raise UsageError(
            f"{job.out} holds no partitions yet",
            f"one run with --partition for each of 0 to {division.of - 1}",
            "--partition 0 labels the first one",
        )
    else:
        LabelStore(job.out).refuse_other_job(fingerprint(job, chosen))
        join(job.out)
    return DividedResult(None, _whole_result(job, chosen, images))


def _join(out: Path, folders: Sequence[Path]) -> None:
    """Put the parts of all folders into OUT in their order, and remove the folders.

    run.json comes last: as long as it is missing, readers are told that the folder is divided, and the next join
    begins again.
    """
    with explained_os_errors(out):
        store = LabelStore(out)
        store.parts_folder.mkdir(exist_ok=True)
        for part in store.parts_folder.glob("part-*"):
            part.unlink()
        parts = [part for folder in folders for part in sorted((folder / "labels").glob("part-*.parquet"))]
        for number, part in enumerate(parts):
            _put(part, store.parts_folder / f"part-{number:06d}.parquet")
    errors = []
    for folder in folders:
        errors += LabelStore(folder).errors(set(read_labelled_paths(folder)))
    store.write_errors(sorted(errors, key=lambda error: error.path))
    _count_again(out, folders)
    write_atomically(store.run_file, json.dumps(read_division(out)["run"], indent=2).encode())
    _remove_rest(out)


def _put(part: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system knows no such thing."""
    try:
        os.link(part, target)
    except OSError:
        write_atomically(target, part.read_bytes())


def _count_again(out: Path, folders: Sequence[Path]) -> None:
    """Raise `ArtifactError` unless the joined tables hold as many inputs as the partitions counted."""
    counted = sum(json.loads(done_file(folder).read_text())["inputs"] for folder in folders)
    paths = [*read_labelled_paths(out), *(error.path for error in read_errors(out))]
    wanted = read_division(out)["inputs"]
    if not len(paths) == len(set(paths)) == counted == wanted:
        raise ArtifactError(
            f"the partitions of {out} hold {len(set(paths)):,} inputs in {len(paths):,} rows, and counted {counted:,}",
            f"{wanted:,} inputs, each once",
            f"label again: rm -r {shlex.quote(str(out))}, then the same commands",
        )


def _remove_rest(out: Path) -> None:
    if (out / "run.json").exists():
        # job.json goes first: it is what tells that there are partitions.
        job_file(out).unlink(missing_ok=True)
        shutil.rmtree(partitions_folder(out), ignore_errors=True)


def _is_held(folder: Path) -> bool:
    """Whether a process is writing a partition. Nobody can begin to while the lock of OUT is held."""
    try:
        os.close(lock_folder(folder))
    except UsageError:
        return True
    return False


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Context that holds the lock of OUT; it is held for moments only, so others wait for it."""
    lock = lock_folder(out, wait=True)
    try:
        yield
    finally:
        os.close(lock)


def _whole_result(
    job: LabelJob, chosen: Plan, images: Sequence[ImageRef], own: LabelResult | None = None
) -> LabelResult:
    """The result of a whole folder; what was scored just now is what `own` says."""
    wanted = {ref.path for ref in images}
    labelled = set(read_labelled_paths(job.out)) & wanted
    failed = {error.path for error in read_errors(job.out)} & wanted - labelled
    return LabelResult(
        inputs=len(images),
        labelled=len(labelled),
        failed=len(failed),
        scored_now=own.scored_now if own else 0,
        seconds=own.seconds if own else 0.0,
        interrupted=False,
        threshold_source=chosen.threshold_source,
    )
