"""Runs a graph's module eagerly with torch: the original that every exported file is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np
import torch

from cliplet.contract import GraphContract
from cliplet.errors import EnvironmentError_
from cliplet.machine import usable_cores
from cliplet.runners import engine_failure


class TorchRunner:
    """A module in float32 behind the contract of its graph.

    Args:
        module: takes the contract's inputs in order and returns its outputs in order.
        threads: of torch's operators on the CPU; 0 means one for each core that this process may use.

    Raises:
        EnvironmentError_: torch cannot use the device.
    """

    def __init__(
        self, module: torch.nn.Module, contract: GraphContract, device: str = "cpu", threads: int = 0
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise EnvironmentError_(
                "asked for device 'cuda', but torch finds no usable GPU",
                "an NVIDIA GPU, its driver and a torch built for it",
                "run `cliplet doctor`, or pass --device cpu",
            )
        torch.set_num_threads(threads or usable_cores())
        # Float32 means float32: on a GPU, convolutions would otherwise round to 10 bits of mantissa.
        torch.backends.cudnn.allow_tf32 = False
        self.contract = contract
        self._module = module.to(device).eval()
        self.runtime = f"torch {torch.__version__}"
        self.device = next(self._module.parameters()).device.type
        self.precision = {torch.float32: "fp32"}[next(self._module.parameters()).dtype]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._module

    @torch.inference_mode()
    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.contract.check_feeds(feeds)
        try:
            tensors = [torch.from_numpy(feeds[t.name]).to(self.device) for t in self.contract.inputs]
            results = self._module(*tensors)
            outputs = {t.name: r.cpu().numpy() for t, r in zip(self.contract.outputs, results, strict=True)}
        except RuntimeError as error:
            raise engine_failure(self.runtime, feeds, error) from error
        self.contract.check_outputs(feeds, outputs)
        return outputs
