"""Initial weights that can already copy: an induction circuit in the first two layers of a small Llama.

A random decoder of this size needs thousands of steps before it reads anything (design section 4 saw it appear suddenly).
The circuit is known, so it is written down: heads of layer 0 look one token back and note who stood there; heads of
layer 1 look for places whose predecessor is the current token, and copy what stands at them. Training refines all of it.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

BACK = (60.0, 40.0, 20.0, 10.0)
"""Weight of the fastest rotation pairs in "one token back": the neighbours fall behind by more than 5 in the logit."""


@torch.no_grad()
def induction_prior(model: Any, seed: int = 0) -> None:
    """Set the weights of a Llama with attention biases and at least two kv heads; others are drawn small and normal."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    dim, heads, groups = config.head_dim, config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            scale = 0.06 if "embed" in name else 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.04
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        elif name.endswith("bias"):
            parameter.zero_()
    who = _orthonormal(2 * dim, config.hidden_size, generator)  # what is noted of a token
    note = _orthonormal(2 * dim, config.hidden_size, generator)  # where the note of the predecessor stands
    copied = _orthonormal(heads * dim, config.hidden_size, generator)
    first, second = (model.model.layers[n].self_attn for n in (0, 1))
    back_key, back_query = _one_back(dim, float(config.rope_parameters["rope_theta"]))
    slow = _slow_pairs(dim, float(config.rope_parameters["rope_theta"]))
    for kv in range(2):
        rows, query = slice(kv * dim, (kv + 1) * dim), slice(kv * groups * dim, kv * groups * dim + dim)
        first.k_proj.weight[rows] *= 0.1
        first.q_proj.weight[query] *= 0.1
        first.k_proj.bias[rows], first.q_proj.bias[query] = back_key, back_query
        first.v_proj.weight[rows] = who[rows]
        first.o_proj.weight[:, query] = 0.12 * note[rows].T
    for kv in range(heads):
        signature = [(kv % 2) * dim + n for n in range(len(slow))]
        slow_rows, slow_query = [kv * dim + n for n in slow], [kv * groups * dim + n for n in slow]
        all_rows, all_query = slice(kv * dim, (kv + 1) * dim), slice(kv * groups * dim, kv * groups * dim + dim)
        second.k_proj.weight[all_rows] *= 0.1
        second.q_proj.weight[all_query] *= 0.1
        second.k_proj.weight[slow_rows] = 3.2 * note[signature]
        second.q_proj.weight[slow_query] = 3.2 * who[signature]
        second.v_proj.weight[all_rows] = copied[all_rows]
        second.o_proj.weight[:, all_query] = 0.6 * copied[all_rows].T


@torch.no_grad()
def widen_copying(weights: dict[str, Tensor], heads: int, dim: int) -> None:
    """Let the second query head of each group of layer 1 copy too, and make it look everywhere; in place.

    Once the circuit copies, the first word of an answer still has no head that could fetch it: this gives four heads a way
    out to the vocabulary, so that a gradient can teach them where to look.
    """
    query, bias, output = (
        weights[f"model.layers.1.self_attn.{name}"] for name in ("q_proj.weight", "q_proj.bias", "o_proj.weight")
    )
    for head in range(1, heads, 2):
        here, before = slice(head * dim, (head + 1) * dim), slice((head - 1) * dim, head * dim)
        output[:, here] = 1.5 * output[:, before]
        query[here] *= 0.1
        bias[here] *= 0.1


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q
    return basis.T.contiguous()


def _frequencies(dim: int, theta: float) -> Tensor:
    return torch.exp(-torch.arange(0, dim, 2, dtype=torch.float32) / dim * log(theta))


def _one_back(dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Constant key and query `(D,)` whose logit after rotation is highest at the token before."""
    angle, half = _frequencies(dim, theta), dim // 2
    size = torch.zeros(half)
    size[: len(BACK)] = torch.tensor(BACK).sqrt()
    key = torch.cat([size, torch.zeros(half)])
    query = torch.cat([size * angle.cos(), -size * angle.sin()])
    return key, query


def _slow_pairs(dim: int, theta: float) -> list[int]:
    """Dimensions that hardly rotate over the few hundred positions between a context and its references."""
    slow = (_frequencies(dim, theta) < 0.004).nonzero()[:, 0].tolist()
    return [*slow, *[n + dim // 2 for n in slow]]
