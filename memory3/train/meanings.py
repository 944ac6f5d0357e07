"""Word vectors that know which words mean the same: what a sentence-embedding model makes of each token, averaged over texts.

Counts of neighbours put *born* beside *October*; the embedding model puts it beside *birth*. A small reader needs both, and
cannot learn the second from 30,000 questions. Source of the averaging: Bommasani, Davis and Cardie 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memory3.embedding import SentenceEmbedder

LAYERS = slice(0, 5)
"""Embeddings and the first layers: later ones say more of the sentence than of the word."""
BATCH = 32


@torch.no_grad()
def meanings(
    texts: Sequence[str], tokenizer: Any, embedder: SentenceEmbedder, tell: Callable[[int, int], None] = lambda done, all: None
) -> tuple[Tensor, Tensor]:
    """What the embedder's first layers make of each token of `tokenizer`, averaged over the places where it stands.

    Returns:
        `(V, E)` float32, zero for tokens that never stood anywhere, and how often each stood `(V,)`.
    """
    transformer = embedder.model[0]
    inner = transformer.tokenizer
    sums, counts = torch.zeros(len(tokenizer), transformer.auto_model.config.hidden_size), torch.zeros(len(tokenizer))
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        made = inner(batch, return_offsets_mapping=True, padding=True, truncation=True, max_length=160, return_tensors="pt")
        spans = made.pop("offset_mapping").tolist()
        layers = transformer.auto_model(**made.to(embedder.model.device), output_hidden_states=True).hidden_states[LAYERS]
        states = torch.stack([functional.layer_norm(h, h.shape[-1:]) for h in layers]).mean(0).float().cpu()
        ours = tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True)
        for n, text in enumerate(batch):
            ids, places = _pairs(text, ours["input_ids"][n], ours["offset_mapping"][n], spans[n])
            sums.index_add_(0, ids, states[n, places])
            counts.index_add_(0, ids, torch.ones(len(ids)))
        tell(start + len(batch), len(ordered))
    return sums / counts.clamp(min=1)[:, None], counts


def _pairs(
    text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Our token ids and the other tokenizer's places `(n,)` that share characters; blanks are nobody's."""
    place_at = [-1] * (len(text) + 1)
    for place, (start, end) in enumerate(other):
        place_at[start:end] = [place] * (end - start)
    found = [
        (id, place)
        for id, (start, end) in zip(ids, spans, strict=True)
        for place in sorted({place_at[c] for c in range(start, end) if not text[c].isspace()} - {-1})
    ]
    pairs = torch.tensor(found, dtype=torch.long).view(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def joined(neighbours: Tensor, meant: Tensor, counts: Tensor, seed: int = 0) -> Tensor:
    """Vectors `(V, d)` of unit length whose products are the mean of both: of neighbours `(V, d)` and of meanings `(V, E)`.

    Strong common directions of the meanings are damped by the square root of their singular values. Tokens without a
    meaning keep their vector of neighbours.
    """
    seen = counts > 0
    left, values, _ = torch.linalg.svd(meant[seen] - meant[seen].mean(0), full_matrices=False)
    damped = functional.normalize(left * values.sqrt(), dim=-1)
    torch.manual_seed(seed)  # svd_lowrank draws from torch's own generator
    left, values, _ = torch.svd_lowrank(torch.cat([neighbours[seen], damped], 1), q=neighbours.shape[1], niter=6)
    both = left * values
    mixed = functional.normalize(both - both.mean(0), dim=-1)
    turn = torch.linalg.qr(torch.randn(neighbours.shape[1], neighbours.shape[1])).Q  # so that no dimension is special
    result: Tensor = neighbours.clone().index_copy(0, seen.nonzero()[:, 0], mixed @ turn)
    return result
