"""Runs a graph's module eagerly with torch: the original that every exported file is compared with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cliplet.contract import FEATURES, PIXELS, TEXT, GraphContract
from cliplet.errors import ClipletError, EnvironmentError_, UsageError
from cliplet.machine import usable_cores
from cliplet.runners import engine_failure
from cliplet.runners.torch_encoder import DTYPES, PRECISIONS, Encoder, FusedSnippets
from cliplet.snippets import Snippets

# CUDA graphs that are kept, one for each shape of a batch; each holds the memory of its run.
MAX_GRAPHS = 4
# Sides of what is run once to see what an encoder computes in.
PROBE_AXES = {"B": 1, "V": 1, "H": 32, "W": 32}


class TorchRunner:
    """A module behind the contract of its graph; on the CPU in float32, exactly as it stands.

    In another precision the encoder alone runs under autocast. On a GPU a `Snippets` cuts views and scores them with
    the kernels of `cliplet.view_kernels` and `cliplet.score_kernels`; without triton it does so as on the CPU. What
    of this is the case stands in `runtime`.

    Args:
        module: takes the contract's inputs in order and returns its outputs in order.
        threads: of torch's operators on the CPU; 0 means one for each core that this process may use.
        precision: of the encoder's matrix products: `fp32`, `fp16` or `bf16`.
        observe: of `pixels` and `features`, those that `infer` returns beside the contract's outputs.
        compiled: run the encoder through torch.compile.
        cuda_graphs: record a run for each shape of a batch and replay it; the last MAX_GRAPHS shapes are kept.

    Raises:
        EnvironmentError_: torch cannot use the device, cannot compile, or computes in another precision.
        UsageError: a precision that torch has not, a name that is not observed, graphs without a GPU.
    """

    concurrency = 1

    def __init__(
        self,
        module: torch.nn.Module,
        contract: GraphContract,
        device: str = "cpu",
        threads: int = 0,
        precision: str = "fp32",
        observe: tuple[str, ...] = (),
        compiled: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        _check(device, observe, cuda_graphs)
        torch.set_num_threads(threads or usable_cores())
        # Float32 means float32: on a GPU, convolutions would otherwise round to 10 bits of mantissa.
        torch.backends.cudnn.allow_tf32 = False
        self.contract = contract
        self._module = module.to(device).eval()
        self.runtime = f"torch {torch.__version__}"
        self.device = next(self._module.parameters()).device.type
        self.precision = PRECISIONS[next(self._module.parameters()).dtype]
        self._observe = observe
        self._encoder: Encoder | None = None
        self._graphs: OrderedDict[tuple[torch.Size, ...], _Recorded] | None = None
        is_asked = bool(precision != self.precision or observe or compiled)
        if is_asked or (self.device == "cuda" and contract is not TEXT):
            self._prepare(precision, compiled)
        if cuda_graphs:
            self._graphs = OrderedDict()
            self.runtime += ", CUDA graphs"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._module, self._encoder, self._graphs

    @torch.inference_mode()
    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.contract.check_feeds(feeds)
        try:
            tensors = [torch.from_numpy(feeds[t.name]) for t in self.contract.inputs]
            results = self._infer_on_gpu(tensors) if self.device == "cuda" else self._run(tensors)
            outputs = {name: result.numpy() for name, result in results.items()}
        except RuntimeError as error:
            raise engine_failure(self.runtime, feeds, error) from error
        self.contract.check_outputs(feeds, outputs)
        return outputs

    def _run(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The contract's outputs and what is observed, by name, on the device."""
        results = self._module(*tensors)
        outputs = {t.name: r for t, r in zip(self.contract.outputs, results, strict=True)}
        seen = self._encoder.seen if self._encoder else {}
        return outputs | {name: seen[name] for name in self._observe}

    def _infer_on_gpu(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        # Only copies from and to pinned memory run beside the host.
        pinned = [t.pin_memory() for t in tensors]
        if self._graphs is None:
            results = self._run([t.to(self.device, non_blocking=True) for t in pinned])
        else:
            results = self._recorded(pinned)(pinned)
        copies = {name: r.to("cpu", non_blocking=True) for name, r in results.items()}
        torch.cuda.current_stream().synchronize()
        return copies

    def _recorded(self, tensors: Sequence[Tensor]) -> _Recorded:
        assert self._graphs is not None
        key = tuple(t.shape for t in tensors)
        if key not in self._graphs:
            # First make room: each holds the memory of a whole run.
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = _Recorded(self._run, [t.to(self.device) for t in tensors])
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _prepare(self, precision: str, compiled: bool) -> None:
        """Give the encoder its precision, see that it has it, and only then compile it."""
        module = self._module
        if self.device == "cuda":
            module.to(memory_format=torch.channels_last)
            module = self._fused(module, precision)
        self._encoder = Encoder(module, self.device, precision, observed=bool(self._observe))
        self._module = self._encoder.module
        self.precision = self._encoder.precision_in(self._probe)
        if self.precision != precision:
            raise EnvironmentError_(
                f"asked for precision {precision!r}, but the encoder's matrix products ran in {self.precision}",
                "an encoder that autocast can run in it",
                "--precision fp32, or export the model",
            )
        if compiled:
            self._encoder.compile()
            self.runtime += ", compiled"
            self._probe()

    def _fused(self, module: torch.nn.Module, precision: str) -> torch.nn.Module:
        if not isinstance(module, Snippets):
            return module
        if find_spec("triton") is None:
            self.runtime += ", views by matrix products (no triton)"
            return module
        self.runtime += ", views by kernels"
        return FusedSnippets(module, DTYPES.get(precision, torch.float32))

    @torch.inference_mode()
    def _probe(self) -> None:
        """Run the module once, on one small empty image."""
        tensors = []
        for spec in self.contract.inputs:
            sizes = [axis if isinstance(axis, int) else PROBE_AXES[axis] for axis in spec.axes]
            tensors.append(torch.from_numpy(np.zeros(sizes, spec.dtype)).to(self.device))
        try:
            self._run(tensors)
        except ClipletError:
            raise
        except Exception as error:  # noqa: BLE001  a compiler may fail in any way
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EnvironmentError_(
                f"{self.runtime} cannot run {self.contract.name!r} on {self.device!r}: {first_line}",
                "torch with what it needs for this device, and a C++ compiler where it compiles",
                "run `cliplet doctor`, or pass --device cpu",
            ) from error


class _Recorded:
    """A run for one shape, recorded as a CUDA graph: one launch, whatever the number of its kernels."""

    def __init__(
        self, run: Callable[[Sequence[Tensor]], dict[str, Tensor]], tensors: Sequence[Tensor]
    ) -> None:
        self._inputs = list(tensors)
        # Libraries set themselves up and kernels are compiled in the first runs, which must not be recorded.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = run(self._inputs)

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Outputs by name, on the device; the next call overwrites them."""
        for own, tensor in zip(self._inputs, tensors, strict=True):
            own.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._outputs


def _check(device: str, observe: tuple[str, ...], cuda_graphs: bool) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentError_(
            "asked for device 'cuda', but torch finds no usable GPU",
            "an NVIDIA GPU, its driver and a torch built for it",
            "run `cliplet doctor`, or pass --device cpu",
        )
    if cuda_graphs and device != "cuda":
        raise UsageError(f"CUDA graphs on device {device!r}", "device 'cuda'", "--device cuda")
    unknown = set(observe) - {PIXELS, FEATURES}
    if unknown:
        raise UsageError(f"no tensors {sorted(unknown)} to observe", f"of {PIXELS!r} and {FEATURES!r}")
