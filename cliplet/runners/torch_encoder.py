"""The encoder inside of a torch module: run in a precision of its own, observed, compiled; the rest stays float32.

Legend: B images, V views, N = B * V, C classes, D embedding, S side of the encoder's input, h x w cells.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cliplet.contract import FEATURES, PIXELS
from cliplet.errors import EnvironmentError_, UsageError
from cliplet.snippets import Snippets

# What the encoder is called by the modules that have one: `Snippets` and `Classifier`.
ENCODERS = ("encoder", "activation_map")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}
# Operators that multiply matrices, with and without inference mode.
PRODUCTS = (
    "linear matmul mm bmm addmm baddbmm conv1d conv2d convolution _convolution scaled_dot_product_attention "
    "_native_multi_head_attention _transformer_encoder_layer_fwd"
).split()


class Encoder:
    """Stands in a copy of a module for what maps `pixels` to `features`.

    Args:
        module: stays as it is; the copy shares all of its tensors.
        precision: of the encoder's products: `fp32`, `fp16` or `bf16`.

    Attributes:
        module: the copy.
        seen: by name, `pixels` float32 [N, 3, S, S] and `features` float32 [N, D] or [B, C, h, w] of the last run,
            if `observed`.

    Raises:
        UsageError: the module has no encoder, or there is no such precision.
    """

    def __init__(self, module: nn.Module, device: str, precision: str, *, observed: bool) -> None:
        if precision not in DTYPES:
            raise UsageError(
                f"precision {precision!r} with torch",
                f"one of {', '.join(DTYPES)}",
                "--precision fp32, or another --runtime",
            )
        shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
        self.module: nn.Module = copy.deepcopy(module, shared)
        self.seen: dict[str, Tensor] = {}
        self._observed = observed
        self._device, self._dtype = device, DTYPES[precision]
        self._given: torch.dtype | None = None
        self._watch: AbstractContextManager[object] = nullcontext()
        owner, name = _find_encoder(self.module)
        self._encode: Callable[[Tensor], Tensor] = getattr(owner, name)
        # As a plain attribute it goes before the submodule or method of the same name, which stays what it was.
        object.__setattr__(owner, name, self)

    def __call__(self, pixels_N3SS: Tensor) -> Tensor:
        if self._device == "cuda":
            pixels_N3SS = pixels_N3SS.contiguous(memory_format=torch.channels_last)
        # Each weight is used once in a run, so that keeping its cast copy would only cost memory.
        lowered = self._dtype != torch.float32
        dtype = self._dtype if lowered else None
        with torch.autocast(self._device, dtype, enabled=lowered, cache_enabled=False), self._watch:
            features = self._encode(pixels_N3SS)
        if self._given not in (None, features.dtype):
            raise EnvironmentError_(
                f"the encoder now gives {features.dtype}, and gave {self._given} when it was loaded",
                "one precision for all batches",
                "leave compilation out",
            )
        self._given = features.dtype
        if self._observed:
            self.seen = {PIXELS: pixels_N3SS.float(), FEATURES: features.float()}
        return features.float()

    def precision_in(self, run: Callable[[], object]) -> str:
        """In what the encoder multiplies matrices while `run` runs: `fp32`, `fp16`, `bf16` or a mixture of them."""
        self._watch = products = Products()
        run()
        self._watch = nullcontext()
        return "+".join(sorted(PRECISIONS.get(d, str(d)) for d in products.dtypes))

    def compile(self) -> None:
        self._encode = torch.compile(self._encode)


class Products(TorchDispatchMode):
    """Context that notes in `dtypes` in what matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.overloadpacket.__name__ in PRODUCTS:
            self.dtypes |= {a.dtype for a in args if isinstance(a, Tensor)}
        return operator(*args, **(kwargs or {}))


class FusedSnippets(nn.Module):
    """What `Snippets` computes, with GPU kernels before and behind the encoder.

    Args:
        dtype: of the pixels that the encoder is fed.
    """

    def __init__(self, snippets: Snippets, dtype: torch.dtype) -> None:
        super().__init__()
        self.snippets = snippets
        self.dtype = dtype

    def forward(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        # Not at the top: triton is not there on every machine.
        from cliplet.score_kernels import score_fused
        from cliplet.view_kernels import cut_views_fused

        inner, fed = self.snippets, self.snippets.preprocessing
        pixels_N3SS = cut_views_fused(
            image, boxes, fed.size, fed.interpolation, fed.mean, fed.std, self.dtype
        )
        features_BVD = inner.encoder(pixels_N3SS).unflatten(0, boxes.shape[:2])
        return score_fused(features_BVD, inner.text, inner.scale, inner.bias, inner.aggregation)


def _find_encoder(module: nn.Module) -> tuple[nn.Module, str]:
    for owner in module.modules():
        for name in ENCODERS:
            if callable(getattr(owner, name, None)):
                return owner, name
    raise UsageError(
        f"{type(module).__name__} has no encoder to observe or to run in a precision of its own",
        f"a module that holds one under a name of {ENCODERS}",
        "--precision fp32",
    )
