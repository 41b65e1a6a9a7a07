"""What this machine can do, tried rather than believed.

    cliplet doctor            a table; exit status 0 if images can be labelled here

A library that is listed may still not work: onnxruntime names a provider whose libraries are missing, and
labels on the CPU without a word. So each provider creates a session here, each decoder decodes an image,
and what could abort or is slow to import runs in a child process. Nothing here raises: what is broken
becomes a finding.
"""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich.table import Table
from rich.text import Text

from cliplet.errors import EnvironmentError_
from cliplet.machine import CPU_FLAGS, cpu_flags, cpu_quota, memory_bytes, usable_cores
from cliplet.runners.openvino_runner import openvino_core
from cliplet.triton_program import PYTHON, find_triton, server_folder

Status = Literal["ok", "missing", "broken", "note"]
CHILD_TIMEOUT_S = 60
# 8 x 8 pixels of one red, as a baseline JPEG.
TINY_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDACgcHiMeGSgjISMtKygwPGRBPDc3PHtYXUlkkYCZlo+AjIqgtObDoKrarYqMyP/L2u71"
    "////m8H////6/+b9//j/2wBDASstLTw1PHZBQXb4pYyl+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4+Pj4"
    "+Pj4+Pj4+Pj/wAARCAAIAAgDASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAP/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QA"
    "FQEBAQAAAAAAAAAAAAAAAAAAAwT/xAAUEQEAAAAAAAAAAAAAAAAAAAAA/9oADAMBAAIRAxEAPwCIAVr/2Q=="
)
# Providers that hand the work to a service elsewhere: cliplet never uses them.
REMOTE_PROVIDERS = {"AzureExecutionProvider"}
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Finding:
    """One thing about this machine.

    Attributes:
        group: what it belongs to, e.g. `onnxruntime`.
        name: the thing, e.g. `CPUExecutionProvider`.
        status: `ok` (tried, works), `missing`, `broken` (there, does not work) or `note` (neither good nor bad).
        detail: a version, a size, or the reason.
        fix: the command or step that mends it; empty where there is nothing to mend.
    """

    group: str
    name: str
    status: Status
    detail: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.status in get_args(Status), self.status


def examine(*, deep: bool = False) -> list[Finding]:
    """All findings about this machine; `deep` also imports torch (in a child process, some seconds)."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("machine", _machine),
        ("libraries", _libraries),
        ("decoders", _decoders),
        ("onnxruntime", _onnxruntime),
        ("openvino", _openvino),
        ("torch", _torch_deep if deep else _torch),
        ("tensorrt", _tensorrt),
        ("triton", _triton),
        ("models", _models),
        ("models", _cache),
        ("browser", _browser),
    ]
    return [finding for group, check in checks for finding in _guarded(group, check)]


def can_label(findings: Sequence[Finding]) -> bool:
    """Whether images can be labelled with onnxruntime here: decoded, scored, and the labels written."""
    fine = {(f.group, f.name) for f in findings if f.status == "ok"}
    decodes = bool({("decoders", "simplejpeg"), ("decoders", "Pillow")} & fine)
    scores = any(f.group == "onnxruntime" and f.status == "ok" for f in findings)
    return decodes and scores and {("libraries", "pillow"), ("libraries", "pyarrow")} <= fine


def report(findings: Sequence[Finding]) -> Table:
    """The findings as a table for rich to print."""
    looks = {"ok": ("✓ ok", "green"), "missing": ("– missing", "yellow"), "broken": ("✗ broken", "bold red")}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "status", "what", "detail", "fix"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "status")
    group = ""
    for f in findings:
        word, style = looks.get(f.status, ("· note", "dim"))
        if f.group != group and group:
            table.add_section()
        heading, group = ("" if f.group == group else f.group), f.group
        cells = (Text(heading, "bold"), Text(word, style), Text(f.name), Text(f.detail), Text(f.fix, "cyan"))
        table.add_row(*cells)
    return table


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as a JSON list of objects; `Finding(**row)` reads one back."""
    return json.dumps([asdict(f) for f in findings], indent=2, ensure_ascii=False)


def find_chromium() -> Path | None:
    """The Chromium that the browser tests would drive, or None."""
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    return Path(found) if found else None


def one_node_model() -> bytes:
    """An ONNX model of one Relu over float32 [2], written field by field so that no `onnx` is needed.

    Field numbers are those of onnx.proto: ModelProto{1 ir_version, 7 graph, 8 opset_import{2 version}},
    GraphProto{1 node, 2 name, 11 input, 12 output}, NodeProto{1 input, 2 output, 4 op_type},
    ValueInfoProto{1 name, 2 type{1 tensor_type{1 elem_type, 2 shape{1 dim{1 dim_value}}}}}.
    """
    shape = _field(1, _field(1, 2))
    float_type = _field(2, _field(1, _field(1, 1) + _field(2, shape)))
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Relu")
    values = _field(11, _field(1, b"x") + float_type) + _field(12, _field(1, b"y") + float_type)
    graph = _field(1, node) + _field(2, b"g") + values
    return _field(1, 8) + _field(7, graph) + _field(8, _field(2, 13))


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a small integer, or bytes shorter than 128."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    assert len(value) < 128, len(value)
    return bytes([number << 3 | 2, len(value)]) + value


def _guarded(group: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:  # noqa: BLE001  a library may fail in any way; the table says how
        found.append(Finding(group, "check", "broken", _reason(error)))
    return found


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


# What runs in a child process: a public name, simple arguments, an answer that JSON holds.


class ChildError(Exception):
    """The child process did not answer: it raised, aborted, or took too long."""


def _in_child(function: str, *arguments: str) -> tuple[Any, list[str]]:
    """What `function` of this module returns when a new process calls it, and the lines of its stderr."""
    code = (
        "import json, sys; from cliplet import doctor; "
        "print('\\n' + json.dumps(getattr(doctor, sys.argv[1])(*sys.argv[2:])))"
    )
    command = [sys.executable, "-c", code, function, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=CHILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ChildError(f"no answer within {CHILD_TIMEOUT_S} s") from None
    if done.returncode < 0:
        raise ChildError(f"killed by signal {-done.returncode}")
    said = [line.strip()[:300] for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    if done.returncode:
        raise ChildError(said[-1] if said else f"exit status {done.returncode}")
    try:
        return json.loads(done.stdout.decode(errors="replace").splitlines()[-1]), said
    except (ValueError, IndexError):
        raise ChildError("it ended well but gave no answer") from None


def try_provider(name: str) -> dict[str, str]:
    """The provider that a session asked to use `name` really has, and what it computes."""
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(one_node_model(), providers=[name])
    (answer,) = session.run(None, {"x": np.array([-1, 2], np.float32)})
    return {"provider": session.get_providers()[0], "answer": str(answer.tolist())}


def try_openvino() -> dict[str, str]:
    """OpenVINO's devices and their full names."""
    core = openvino_core()
    return {device: str(core.get_property(device, "FULL_DEVICE_NAME")) for device in core.available_devices}


def try_torch() -> dict[str, str]:
    """What torch sees: version, GPU and bfloat16."""
    torch = importlib.import_module("torch")
    cuda = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.cuda.get_device_name(0) if cuda else "",
        "bf16": str(
            torch.cuda.is_bf16_supported() if cuda else torch.ones(2, dtype=torch.bfloat16).sum().item() == 2
        ),
    }


def try_version(module: str) -> str:
    """The version of an importable module."""
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


# The checks, one for each group.


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    fine = sys.version_info >= (3, 11)
    yield Finding(
        "machine", "Python", "ok" if fine else "broken", version, "" if fine else "use Python 3.11 or newer"
    )
    yield Finding("machine", "system", "note", f"{platform.system()} {platform.machine()}")
    quota = cpu_quota()
    limits = f"{os.cpu_count()} in the machine" + (f", quota {quota:g}" if quota is not None else "")
    yield Finding("machine", "cores", "ok", f"{usable_cores()} usable ({limits})")
    yield from _memory()
    flags = cpu_flags()
    if flags is None:
        yield Finding("machine", "CPU", "note", "instruction sets not known on this system")
    else:
        has = [label for flag, label in CPU_FLAGS.items() if flag in flags]
        yield Finding("machine", "CPU", "note", ", ".join(has) or "none of " + ", ".join(CPU_FLAGS.values()))
    yield from _gpus()


def _memory() -> Iterator[Finding]:
    known = memory_bytes()
    if known is None:
        yield Finding("machine", "memory", "note", "not known on this system")
        return
    gib = 2**30
    total, available, limit = known
    limited = f", limited to {limit / gib:.1f}" if limit is not None and limit < total else ""
    yield Finding(
        "machine", "memory", "ok", f"{total / gib:.1f} GiB, {available / gib:.1f} available{limited}"
    )


def _gpus() -> Iterator[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Finding("machine", "GPU", "note", "no nvidia-smi: no NVIDIA driver here")
        return
    query = [program, "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("machine", "GPU", "broken", _reason(error), "look at what `nvidia-smi` says")
        return
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr or done.stdout).strip().splitlines()
        yield Finding(
            "machine", "GPU", "broken", said[0] if said else "no answer", "reinstall the NVIDIA driver"
        )
        return
    for number, line in enumerate(lines):
        name, memory, capability, driver = (word.strip() for word in line.split(","))
        yield Finding(
            "machine",
            f"GPU {number}",
            "ok",
            f"{name}, {memory}, sm_{capability.replace('.', '')}, driver {driver}",
        )


def _libraries() -> Iterator[Finding]:
    """Every library that an extra of cliplet brings, with its version and how to get it."""
    for name, extras in extras_by_library().items():
        version = _version(name)
        where = ", ".join(extras) if extras else "always"
        if version:
            yield Finding("libraries", name, "ok", f"{version} ({where})")
        elif name == "onnxruntime" and _version("onnxruntime-gpu"):
            yield Finding("libraries", name, "note", "onnxruntime-gpu is here instead")
        elif extras == ["gpu"] and shutil.which("nvidia-smi") is None:
            yield Finding("libraries", name, "note", "not here; needs an NVIDIA GPU")
        else:
            yield Finding("libraries", name, "missing", f"({where})", _install(name))


def extras_by_library() -> dict[str, list[str]]:
    """For each library cliplet declares, the extras that bring it; none for those it always brings."""
    found: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("cliplet") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"""extra == ["']([\w-]+)["']""", requirement)
        assert name, requirement
        found.setdefault(name[0], []).extend([extra[1]] if extra else [])
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _install(library: str) -> str:
    extras = extras_by_library().get(library)
    return f"pip install 'cliplet[{extras[0]}]'" if extras else f"pip install {library}"


def _decoders() -> Iterator[Finding]:
    for name, library, decode in (
        ("simplejpeg", "simplejpeg", _with_simplejpeg),
        ("Pillow", "pillow", _with_pillow),
    ):
        try:
            pixels, detail = decode(TINY_JPEG)
        except ModuleNotFoundError as error:
            yield Finding("decoders", name, "missing", _reason(error), _install(library))
            continue
        except Exception as error:  # noqa: BLE001  whatever a broken decoder raises is its finding
            yield Finding(
                "decoders", name, "broken", _reason(error), f"pip install --force-reinstall {library}"
            )
            continue
        red, green, blue = pixels.reshape(-1, 3).mean(axis=0)
        if pixels.shape == (8, 8, 3) and red > 150 > green and blue < 150:
            yield Finding("decoders", name, "ok", detail)
        else:
            yield Finding("decoders", name, "broken", "a red JPEG came out in another colour or size")


def _with_simplejpeg(data: bytes) -> tuple[np.ndarray, str]:
    simplejpeg = importlib.import_module("simplejpeg")
    return simplejpeg.decode_jpeg(data, "RGB"), "JPEG"


def _with_pillow(data: bytes) -> tuple[np.ndarray, str]:
    image, features = importlib.import_module("PIL.Image"), importlib.import_module("PIL.features")
    pixels = np.asarray(image.open(io.BytesIO(data)).convert("RGB"))
    formats = {"jpg": "JPEG", "webp": "WebP", "libtiff": "TIFF", "avif": "AVIF"}
    has = [label for feature, label in formats.items() if features.check(feature)]
    lacks = [label for feature, label in formats.items() if not features.check(feature)]
    turbo = "with" if features.check("libjpeg_turbo") else "without"
    return pixels, f"{', '.join(has)}; {turbo} libjpeg-turbo" + (f"; no {', '.join(lacks)}" if lacks else "")


def _onnxruntime() -> Iterator[Finding]:
    """Each provider that onnxruntime lists, by the session it really creates."""
    try:
        providers = importlib.import_module("onnxruntime").get_available_providers()
    except ModuleNotFoundError as error:
        yield Finding("onnxruntime", "onnxruntime", "missing", _reason(error), _install("onnxruntime"))
        return
    for name in providers:
        if name in REMOTE_PROVIDERS:
            yield Finding(
                "onnxruntime", name, "note", "works through a remote service; cliplet never uses it"
            )
        else:
            yield _provider(name)


def _provider(name: str) -> Finding:
    fix = "install the libraries this provider needs, or label with --device cpu"
    if name == "CPUExecutionProvider":
        fix = "pip install --force-reinstall onnxruntime"
    try:
        made, said = _in_child("try_provider", name)
    except ChildError as error:
        return Finding("onnxruntime", name, "broken", f"listed, but no session: {error}", fix)
    if made["provider"] != name:
        # onnxruntime falls back without an exception; the reason is only what it wrote.
        why = next((f" ({line})" for line in said if re.search("error|not in available", line, re.I)), "")
        detail = f"listed, but the session runs on {made['provider']}{why}"
        return Finding("onnxruntime", name, "broken", detail, fix)
    if made["answer"] != "[0.0, 2.0]":
        return Finding("onnxruntime", name, "broken", f"Relu of [-1, 2] came out as {made['answer']}", fix)
    return Finding("onnxruntime", name, "ok", "created a session and ran it")


def _openvino() -> Iterator[Finding]:
    if importlib.util.find_spec("openvino") is None:
        yield Finding("openvino", "openvino", "missing", "", _install("openvino"))
        return
    try:
        devices, _ = _in_child("try_openvino")
    except ChildError as error:
        yield Finding("openvino", "openvino", "broken", str(error), "pip install --force-reinstall openvino")
        return
    for device, name in devices.items():
        yield Finding("openvino", device, "ok", name)


def _torch() -> Iterator[Finding]:
    version = _version("torch")
    if version:
        yield Finding("torch", "torch", "note", f"{version}, not imported", "cliplet doctor --deep tries it")
    else:
        yield Finding("torch", "torch", "missing", "", _install("torch"))


def _torch_deep() -> Iterator[Finding]:
    if not _version("torch"):
        yield from _torch()
        return
    try:
        seen, _ = _in_child("try_torch")
    except ChildError as error:
        yield Finding("torch", "torch", "broken", str(error), "pip install --force-reinstall torch")
        return
    yield Finding("torch", "torch", "ok", seen["version"])
    yield Finding("torch", "CUDA", "ok" if seen["cuda"] else "note", seen["cuda"] or "not available")
    yield Finding(
        "torch", "bfloat16", "ok" if seen["bf16"] == "True" else "note", f"computes: {seen['bf16']}"
    )


def _tensorrt() -> Iterator[Finding]:
    for module, library in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx-cu13")):
        if importlib.util.find_spec(module) is None:
            yield Finding("tensorrt", module, "missing", "", _install(library))
            continue
        try:
            yield Finding("tensorrt", module, "ok", _in_child("try_version", module)[0])
        except ChildError as error:
            yield Finding(
                "tensorrt", module, "broken", str(error), f"pip install --force-reinstall {library}"
            )


def _triton() -> Iterator[Finding]:
    """The server's program, and whether it could run Python models: as `cliplet serve` finds out before it starts."""
    try:
        program = find_triton()
    except EnvironmentError_ as error:
        # What mends a server that is not there also mends one that is incomplete.
        status: Status = "broken" if server_folder().exists() else "missing"
        yield Finding("triton", "server", status, error.happened, error.fix)
        return
    yield Finding("triton", "server", "ok", str(program.binary))
    if program.stub is not None:
        yield Finding("triton", "Python backend", "ok", f"has a stub for Python {PYTHON}, libpython found")


def _models() -> Iterator[Finding]:
    weights = Path(__file__).with_name("assets") / "tiny" / "open_clip_model.safetensors"
    fix = "pip install --force-reinstall cliplet"
    if not weights.exists():
        yield Finding("models", "tiny", "missing", "the embedded model's weights are not installed", fix)
        return
    # A safetensors file starts with the length of its header, then the header, then the weights.
    with open(weights, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        expected = file.tell() + max(t["data_offsets"][1] for k, t in header.items() if k != "__metadata__")
    size = weights.stat().st_size
    if size == expected:
        yield Finding("models", "tiny", "ok", f"{size / 1e6:.1f} MB")
    else:
        yield Finding("models", "tiny", "broken", f"{size:,} bytes instead of {expected:,}", fix)


def _cache() -> Iterator[Finding]:
    """Whether graphs that cliplet builds can be kept; nothing is created to find out."""
    folder = importlib.import_module("cliplet.artifact").cache_folder()
    nearest = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    fix = "set CLIPLET_CACHE to a folder that can be written"
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        free = shutil.disk_usage(nearest).free / 2**30
        yield Finding("models", "cache", "ok", f"{folder}, {free:.0f} GiB free")
    else:
        yield Finding("models", "cache", "broken", f"{nearest} cannot be written", fix)


def _browser() -> Iterator[Finding]:
    program = find_chromium()
    if program is None:
        yield Finding(
            "browser", "chromium", "missing", "only the browser tests need it", "apt-get install chromium"
        )
    else:
        yield Finding("browser", "chromium", "ok", str(program))
