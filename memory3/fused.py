"""Causal attention with its log-sum-exp by torch's fused CPU kernel, whose backward is given the gradient of both.

The kernel never builds the `(Q, keys)` logits. torch does not offer its log-sum-exp to users, and its backward knows no gradient
of it; so this is written on the private operator, and `available` says whether this torch has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FEWEST_QUERIES = 32
"""Below, building the logits is as fast."""


def available(query: Tensor) -> bool:
    """Whether the kernel serves these queries `(B, H, Q, D)`: on the CPU, many enough, in a torch that has it."""
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    there = hasattr(torch.ops.aten, kernel) and hasattr(torch.ops.aten, f"{kernel}_backward")
    return there and query.device.type == "cpu" and query.shape[2] >= FEWEST_QUERIES


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output `(B, H, Q, D)` and log-sum-exp `(B, H, Q)` float32 or wider.

    Args:
        query: `(B, H, Q, D)`; key and value: `(B, H or fewer kv heads, keys, D)`.
        mask: bool (True: seen) or added to the logits, `(B, 1, Q, keys)` or more keys; `None` is plain causal.
        scale: of the logits.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotation leaves float32
    mask = _added(mask, query, key.shape[2])
    output, lse = _Fused.apply(query, key, value, mask, mask is None, scale)  # type: ignore[no-untyped-call]
    return output, lse.to(torch.promote_types(lse.dtype, torch.float32))


def _added(mask: Tensor | None, query: Tensor, keys: int) -> Tensor | None:
    """A mask that is added to the logits, in the dtype of the queries."""
    if mask is None:
        return None
    lowest, mask = torch.finfo(query.dtype).min, mask[..., :keys]  # finite: a row of padding may see nothing
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
    return mask.to(query.dtype).clamp(min=lowest)


class _Fused(torch.autograd.Function):
    """The kernel takes few kv heads as they are, and its backward wants one for each query head.

    One more column there, zeros in query, key and value, takes the gradient `g` of the log-sum-exp in. With weights P the kernel's
    backward gives `dS = P * (dO V^T - rowsum(dO * O))`, and the log-sum-exp adds `P * g`. So the column is 1 in dO and `-g` in O.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Any:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(query, key, value, output, lse, mask)
        ctx.causal, ctx.scale = causal, scale
        return output, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, mask = ctx.saved_tensors
        of_output, of_lse = gradients
        groups = query.shape[1] // key.shape[1]
        query, key, value = (
            functional.pad(t, (0, 1)) for t in (query, *(t.repeat_interleave(groups, 1) for t in (key, value)))
        )
        output = torch.cat([output, -of_lse[..., None].to(output.dtype)], -1)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            functional.pad(of_output, (0, 1), value=1.0),
            query,
            key,
            value,
            output,
            lse,
            0.0,
            ctx.causal,
            attn_mask=mask,
            scale=ctx.scale,
        )
        of_query, of_key, of_value = (t[..., :-1] for t in found)
        of_key, of_value = (t.unflatten(1, (-1, groups)).sum(2) for t in (of_key, of_value))
        return of_query, of_key, of_value, None, None, None
