"""Initial weights that can already copy: an induction circuit in the first layers of a small Llama.

A random decoder of this size needs thousands of steps before it reads anything (design section 4 saw it appear suddenly).
The circuit is known, so it is written down: heads of layer 0 look one token back and note who stood there; heads of
layer 1 look for places whose predecessor is the current token, and copy what stands at them. Two more heads of layer 0
note which words stood around, heads of layer 2 look for places with the words of the question around them, and the heads
of layers 2 and 3 copy what they look at. Training refines all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from torch import Tensor

BACK = (60.0, 40.0, 20.0, 10.0)
"""Weight of the fastest rotation pairs in "one token back": the neighbours fall behind by more than 5 in the logit."""
NEAR = (0.0, 0.0, 30.0, 30.0, 30.0)
"""The same for "around five tokens back", about five wide."""
FAR = (0.0, 0.0, 0.0, 30.0, 30.0, 30.0)
"""The same for "around ten tokens back", about ten wide."""


@torch.no_grad()
def induction_prior(model: Any, seed: int = 0) -> None:
    """Set the weights of a Llama with attention biases and four kv heads; others are drawn small and normal."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    dim, heads, groups = config.head_dim, config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    _small(model, generator)
    theta, layers = float(config.rope_parameters["rope_theta"]), [layer.self_attn for layer in model.model.layers]
    who = _orthonormal(3 * dim, config.hidden_size, generator)  # what is noted of a token
    note = _orthonormal(4 * dim, config.hidden_size, generator)  # where notes stand: predecessor (2), near words, far words
    for kv, (sizes, back, gain) in enumerate((*((BACK, 1, 0.12),) * 2, (NEAR, 5, 0.36), (FAR, 10, 0.36))):
        _look_back(layers[0], kv, dim, groups, sizes, back, theta)
        layers[0].v_proj.weight[_rows(kv, dim)] = who[_rows(min(kv, 2), dim)]
        layers[0].o_proj.weight[:, _rows(kv * groups, dim)] = gain * note[_rows(kv, dim)].T
    slow = _slow_pairs(dim, theta)
    for kv in range(heads):
        _match(layers[1], kv, dim, groups, slow, 3.2 * note[_part(kv % 2, dim, slow)], 3.2 * who[_part(kv % 2, dim, slow)])
        near, far = (2 * note[_part(place, dim, slow, shift=kv % 2)] for place in (2, 3))
        _match(layers[2], kv, dim, groups, slow, near, far)
    for n, gain in ((1, 0.6), (2, 0.3), (3, 0.3)):
        copied = _orthonormal(heads * dim, config.hidden_size, generator)
        for head in range(heads * groups):
            rows = _rows(head // groups, dim)
            layers[n].v_proj.weight[rows] = copied[rows]
            if n > 1 or head % groups == 0:
                layers[n].o_proj.weight[:, _rows(head, dim)] = gain * copied[rows].T


def _small(model: Any, generator: torch.Generator) -> None:
    """Everything normal and small, so that the circuit is heard."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            scale = 0.06 if "embed" in name else 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.04
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        elif name.endswith("bias"):
            parameter.zero_()


def _rows(head: int, dim: int) -> slice:
    return slice(head * dim, (head + 1) * dim)


def _part(head: int, dim: int, slow: list[int], shift: int = 0) -> list[int]:
    """As many rows of a note as there are slow dimensions, from its front or, shifted, from its back."""
    start = head * dim + shift * (dim - len(slow))
    return list(range(start, start + len(slow)))


def _look_back(layer: Any, kv: int, dim: int, groups: int, sizes: Sequence[float], back: int, theta: float) -> None:
    """The first query head of a kv head looks `back` tokens back, whoever stands there."""
    rows, query = _rows(kv, dim), _rows(kv * groups, dim)
    layer.k_proj.weight[rows] *= 0.1
    layer.q_proj.weight[query] *= 0.1
    layer.k_proj.bias[rows], layer.q_proj.bias[query] = _back(dim, theta, sizes, back)


def _match(layer: Any, kv: int, dim: int, groups: int, slow: list[int], key: Tensor, query: Tensor) -> None:
    """The first query head of a kv head looks for keys whose note equals its own, wherever they stand."""
    layer.k_proj.weight[_rows(kv, dim)] *= 0.1
    layer.q_proj.weight[_rows(kv * groups, dim)] *= 0.1
    layer.k_proj.weight[[kv * dim + n for n in slow]] = key
    layer.q_proj.weight[[kv * groups * dim + n for n in slow]] = query


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q
    return basis.T.contiguous()


def _frequencies(dim: int, theta: float) -> Tensor:
    return torch.exp(-torch.arange(0, dim, 2, dtype=torch.float32) / dim * log(theta))


def _back(dim: int, theta: float, sizes: Sequence[float], back: int) -> tuple[Tensor, Tensor]:
    """Constant key and query `(D,)` whose logit after rotation is highest `back` tokens before."""
    angle, half = _frequencies(dim, theta) * back, dim // 2
    size = torch.zeros(half)
    size[: len(sizes)] = torch.tensor(sizes).sqrt()
    key = torch.cat([size, torch.zeros(half)])
    query = torch.cat([size * angle.cos(), -size * angle.sin()])
    return key, query


def _slow_pairs(dim: int, theta: float) -> list[int]:
    """Dimensions that hardly rotate over the few hundred positions between a context and its references."""
    slow = (_frequencies(dim, theta) < 0.004).nonzero()[:, 0].tolist()
    return [*slow, *[n + dim // 2 for n in slow]]
