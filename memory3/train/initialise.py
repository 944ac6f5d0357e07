"""Initial weights that can already copy: word vectors from counts, and an induction circuit in a small Llama.

A random decoder of this size needs thousands of steps before it reads anything (design section 4 saw it appear suddenly).
What it finds is known, so it is written down: words that occur alike get like vectors; heads of layer 0 note which token
stood before, and which words stand near; heads of layer 1 look for places whose predecessor is the current token; heads
that are taught to point have a way out to the vocabulary. Training refines all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

BACK = (60.0, 40.0, 20.0, 10.0)
"""Weight of the fastest rotation pairs in "one token back": the neighbours fall behind by more than 5 in the logit."""
NEAR = (0.0, 0.0, 22.0, 22.0)
"""The same for "a few tokens back": half of the weight at four tokens, nothing beyond ten."""


def word_vectors(texts: Iterable[Any], vocabulary: int, dim: int, reach: int = 6) -> Tensor:
    """Vectors `(vocabulary, dim)` of unit length whose products say how alike two tokens are used.

    Positive pointwise mutual information of tokens at most `reach` apart, weighted by their nearness, with contexts
    smoothed by the power 0.75; then a truncated singular value decomposition with square-rooted values (Levy, Goldberg and
    Dagan 2015). Tokens that were never seen get a random vector.

    Args:
        texts: token ids `(n,)`, one array for each text.
    """
    ids = np.concatenate([np.concatenate([t.astype(np.int64), np.full(reach, -1)]) for t in texts])
    counts = np.zeros(vocabulary * vocabulary, dtype=np.float32)
    for distance in range(1, reach + 1):
        first, second = ids[:-distance], ids[distance:]
        pair = (first * vocabulary + second)[(first >= 0) & (second >= 0)]
        counts += np.bincount(pair, minlength=vocabulary * vocabulary).astype(np.float32) / distance
    joint = torch.from_numpy(counts).view(vocabulary, vocabulary)
    joint = joint + joint.T
    context = joint.sum(0) ** 0.75
    expected = joint.sum(1, keepdim=True) * (context / context.sum())[None, :]
    information = torch.log(joint.clamp(min=1e-9) / expected.clamp(min=1e-9)).clamp(min=0)
    torch.manual_seed(0)  # svd_lowrank draws from torch's own generator
    left, values, _ = torch.svd_lowrank(information, q=dim, niter=4)
    vectors, seen = left * values.sqrt(), joint.sum(1) > 0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(vectors.shape, generator=generator)
    vectors = torch.where(seen[:, None], vectors - vectors[seen].mean(0), noise)
    mixed: Tensor = vectors @ torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    return torch.nn.functional.normalize(mixed, dim=-1)


@torch.no_grad()
def induction_prior(model: Any, pointing_layer: int, vectors: Tensor | None = None, seed: int = 0) -> None:
    """Set the weights of a Llama with attention biases and four kv heads; others are drawn small and normal.

    Args:
        model: the model.
        pointing_layer: its first query head of each kv head copies what it attends to.
        vectors: embeddings `(V, d)` of unit length, by default random ones.
        seed: of the random weights.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    dim, heads, groups = config.head_dim, config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    theta = float(config.rope_parameters["rope_theta"])
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            scale = 0.06 if "embed" in name else 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.04
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        elif name.endswith("bias"):
            parameter.zero_()
    if vectors is not None:
        model.get_input_embeddings().weight.copy_(vectors)
    width = config.hidden_size
    who, note = _orthonormal(2 * dim, width, generator), _orthonormal(2 * dim, width, generator)
    words, topic = _orthonormal(2 * dim, width, generator), _orthonormal(2 * dim, width, generator)
    copied = _orthonormal(heads * dim, width, generator)
    first, second, pointing = (model.model.layers[n].self_attn for n in (0, 1, pointing_layer))
    for kv, weights in enumerate((BACK, BACK, NEAR, None)):
        rows, query = slice(kv * dim, (kv + 1) * dim), slice(kv * groups * dim, kv * groups * dim + dim)
        first.k_proj.weight[rows] *= 0.1
        first.q_proj.weight[query] *= 0.1
        if weights is not None:
            first.k_proj.bias[rows], first.q_proj.bias[query] = _back(dim, theta, weights, 1 if weights is BACK else 2)
        taken = slice((kv % 2) * dim, (kv % 2 + 1) * dim)
        first.v_proj.weight[rows] = (who if kv < 2 else words)[taken]
        first.o_proj.weight[:, query] = (0.12, 0.12, 0.25, 0.5)[kv] * (note if kv < 2 else topic)[taken].T
    slow = _slow_pairs(dim, theta)
    for kv in range(heads):
        rows, query = slice(kv * dim, (kv + 1) * dim), slice(kv * groups * dim, kv * groups * dim + dim)
        signature = [(kv % 2) * dim + n for n in range(len(slow))]
        second.k_proj.weight[rows] *= 0.1
        second.q_proj.weight[query] *= 0.1
        second.k_proj.weight[[kv * dim + n for n in slow]] = 3.2 * note[signature]
        second.q_proj.weight[[kv * groups * dim + n for n in slow]] = 3.2 * who[signature]
        for layer, strength in ((second, 0.6), (pointing, 0.6)):
            layer.v_proj.weight[rows] = copied[rows]
            layer.o_proj.weight[:, query] = strength * copied[rows].T


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q
    return basis.T.contiguous()


def _frequencies(dim: int, theta: float) -> Tensor:
    return torch.exp(-torch.arange(0, dim, 2, dtype=torch.float32) / dim * log(theta))


def _back(dim: int, theta: float, weights: tuple[float, ...], distance: int) -> tuple[Tensor, Tensor]:
    """Constant key and query `(D,)` whose logit after rotation is highest `distance` tokens before."""
    angle, half = distance * _frequencies(dim, theta), dim // 2
    size = torch.zeros(half)
    size[: len(weights)] = torch.tensor(weights).sqrt()
    key = torch.cat([size, torch.zeros(half)])
    query = torch.cat([size * angle.cos(), -size * angle.sin()])
    return key, query


def _slow_pairs(dim: int, theta: float) -> list[int]:
    """Dimensions that hardly rotate over the few hundred positions between a context and its references."""
    slow = (_frequencies(dim, theta) < 0.004).nonzero()[:, 0].tolist()
    return [*slow, *[n + dim // 2 for n in slow]]
