"""Which tokens of a reference each head keeps (design 2.5).

A selection scores every token of a reference for every kv head of one layer at once; the best `tokens_per_head` are
kept in text order. Adding one: a frozen dataclass with a `score`, and a row in `SELECTIONS`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from memory3.spec import SpecError


@dataclass(frozen=True)
class LayerStates:
    """What one memory layer computed for a batch of references, before rotation.

    Args:
        queries: `(N, H, G, T, D)`, unrotated.
        keys: `(N, H, T, D)`, unrotated.
        mask: `(N, T)` bool, true where a token is part of the reference.
        token_ids: `(N, T)` int64.
        scaling: factor of the logits, `1 / sqrt(D)` in most families.
        layer: index of the layer in the model.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    token_ids: Tensor
    scaling: float
    layer: int


class Selection(ABC):
    """Scores tokens; the larger, the more worth keeping."""

    @abstractmethod
    def score(self, states: LayerStates) -> Tensor:
        """Scores `(N, H, T)` float32; places outside the mask are ignored by the caller."""


def _logits(states: LayerStates) -> Tensor:
    """`(N, H, G, T, T)` float32, minus infinity where the attended token is no part of the reference."""
    logits = torch.einsum("nhgid,nhjd->nhgij", states.queries.float(), states.keys.float()) * states.scaling
    return logits.masked_fill(~states.mask[:, None, None, None, :], float("-inf"))


@dataclass(frozen=True)
class ReceivedAttention(Selection):
    """Keep the tokens that the reference itself attends to most. Source: arXiv 2407.01178, 3.3. Control: `Random`."""

    def score(self, states: LayerStates) -> Tensor:
        received = torch.softmax(_logits(states), -1) * states.mask[:, None, None, :, None]
        return received.sum((2, 3))


@dataclass(frozen=True)
class ReceivedAttentionUnnormalised(Selection):
    """`sum_i exp(q_i . k_j)` in place of the softmax, as the authors' own code did to save time (design 2.5).

    The logarithm of the sum is returned: the same order without overflow.
    """

    def score(self, states: LayerStates) -> Tensor:
        logits = _logits(states).masked_fill(~states.mask[:, None, None, :, None], float("-inf"))
        return torch.logsumexp(logits, (2, 3))


@dataclass(frozen=True)
class Random(Selection):
    """Control: a uniform choice, reproducible from the seed, the layer and the reference's tokens."""

    seed: int = 0

    def score(self, states: LayerStates) -> Tensor:
        heads, length = states.keys.shape[1:3]
        rows = []
        for ids, mask in zip(states.token_ids.cpu(), states.mask.cpu(), strict=True):
            named = f"{self.seed} {states.layer} {ids[mask].tolist()}".encode()
            digest = int.from_bytes(hashlib.blake2b(named, digest_size=7).digest(), "big")
            generator = torch.Generator().manual_seed(digest)
            row = torch.zeros(heads, length)
            row[:, mask] = torch.rand(heads, int(mask.sum()), generator=generator)
            rows.append(row)
        return torch.stack(rows).to(states.keys.device)


@dataclass(frozen=True)
class FirstAndLast(Selection):
    """Control: the tokens nearest to either end, the same for every head."""

    def score(self, states: LayerStates) -> Tensor:
        place = states.mask.long().cumsum(-1) - 1
        from_end = states.mask.long().sum(-1, keepdim=True) - 1 - place
        nearness = -torch.minimum(place, from_end).float()
        return nearness[:, None, :].expand(-1, states.keys.shape[1], -1)


@dataclass(frozen=True)
class KeyNorm(Selection):
    """Control: the keys of smallest norm, which tend to be the most attended (arXiv 2406.11430)."""

    def score(self, states: LayerStates) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(states.keys.float(), dim=-1)
        return -norms


def kept_positions(scores: Tensor, mask: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The best `slots` places of each head, in text order.

    Args:
        scores: `(N, H, T)`.
        mask: `(N, T)` bool.
        slots: most tokens kept per head.

    Returns:
        Positions `(N, H, K)` int64 with `K = min(slots, T)`, ascending among the valid ones, and counts `(N,)`: the
        first `counts[n]` places of a row are kept, the rest are filler that points at the row's end.
    """
    length = mask.shape[1]
    slots = min(slots, length)
    counts = mask.sum(-1).clamp(max=slots)
    scores = scores.float().masked_fill(~mask[:, None, :], float("-inf"))
    # A token that occurs twice has the same score in the first layer up to rounding. Scores are compared at ten bits, and a
    # stable sort gives ties to the earlier token: so batch and device hardly ever decide, though two scores can still
    # round apart.
    best = torch.sort(_at_ten_bits(scores), dim=-1, descending=True, stable=True).indices[..., :slots]
    filler = torch.arange(slots, device=mask.device)[None, None, :] >= counts[:, None, None]
    best = best.masked_fill(filler, length)
    return best.sort(-1).values.clamp(max=length - 1), counts


def _at_ten_bits(scores: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scores)
    rounded: Tensor = torch.ldexp((mantissa * 1024).round() / 1024, exponent)
    return torch.where(scores.isfinite(), rounded, scores)


def selection(name: str) -> Selection:
    """The registered selection of that name; `SpecError` lists the known ones."""
    if name not in SELECTIONS:
        raise SpecError(f"found selection {name!r}, expected one of {sorted(SELECTIONS)}")
    return SELECTIONS[name]()


SELECTIONS: dict[str, type[Selection]] = {
    "received_attention": ReceivedAttention,
    "received_attention_unnormalised": ReceivedAttentionUnnormalised,
    "random": Random,
    "first_and_last": FirstAndLast,
    "key_norm": KeyNorm,
}
