"""Whether this machine computes in bf16, and what to do where it does not.

On a CPU without instructions for it (AVX2 alone, say) a training step under bf16 autocast takes many times as long as one in float32
(docs/results.md has both).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

PRECISIONS = ("auto", "bf16", "no")


def computes_bf16(device: str | None = None) -> bool:
    """Whether matrices are multiplied in bf16 at speed: on an accelerator, or on a CPU whose instructions oneDNN uses for it.

    `device` is a kind, `cpu` for instance; by default the accelerator where there is one.
    """
    if device != "cpu" and torch.accelerator.is_available():
        return True
    asked: Callable[[], bool] = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return bool(asked())


def resolved(precision: str) -> str:
    """`auto` as `bf16` where this machine computes in it, else as `no`; others as they are."""
    return ("bf16" if computes_bf16() else "no") if precision == "auto" else precision


class Float32InsteadOfBf16(TorchFunctionMode):
    """Inside the block `tensor.bfloat16()` is a copy in float32: torch's Muon takes its step in bf16 whatever the machine."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def warn_of_slow_halves(model: Any) -> None:
    """A `UserWarning` where a model's files chose bf16 for a CPU that does not compute in it."""
    if model.dtype == torch.bfloat16 and model.device.type == "cpu" and not computes_bf16("cpu"):
        warnings.warn(
            "found a model in bfloat16 on a CPU without instructions for it, which is many times slower than float32: give "
            "dtype='float32' (--dtype float32)",
            stacklevel=3,
        )
