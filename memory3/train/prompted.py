"""The control of reading from memory: the same questions about the same references, with the references as text in the prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memory3.attention import Attended, Original, States
from memory3.decoder import Decoder
from memory3.train.passages import Context
from memory3.train.reading import (
    GROUPS,
    LEAST_MASS,
    Batch,
    ReadingObjective,
    by_length,
    prompted,
    table_of,
    target_loss,
    weights_of,
)

CONTEXTS = 12
"""Prompts of a step: they have about as many tokens as all references and contexts of a step of `ReadingObjective`, in which every
reference is encoded once for all that read it. So the budget is the same in tokens, not in questions."""


@dataclass
class Watching:
    """A `Hook` that notes what some queries of some layers pay to each token before them, with gradient.

    Keys get one-hot values, so that the model's own attention gives its weights, whatever the implementation.

    Args:
        layers: to watch.
        places: `(B, T)` int64, the queries.
        found: by layer the weights `(B, T, H, K)` of the first query head of each kv head.
    """

    layers: Sequence[int]
    places: Tensor
    found: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        """The original attention, and at a watched layer once more for the weights."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        if layer in self.layers:
            rows, keys = torch.arange(len(self.places), device=self.places.device)[:, None], states.key.shape[2]
            query = states.query.transpose(1, 2)[rows, self.places].transpose(1, 2)  # (B, H * G, T, D)
            later = torch.arange(keys, device=query.device) > self.places[:, None, :, None]
            mask = torch.zeros(later.shape, dtype=query.dtype, device=query.device)
            mask = mask.masked_fill(later, torch.finfo(query.dtype).min)
            hot = torch.eye(keys, dtype=query.dtype, device=query.device).expand(*states.key.shape[:2], -1, -1)
            paid = States(query, states.key, hot, mask).through(original, module, options)[0]  # (B, T, H * G, K)
            self.found[layer] = paid.unflatten(2, (states.key.shape[1], -1))[:, :, :, 0].float()
        return states.through(original, module, options)


class PromptedObjective(ReadingObjective):
    """Questions, clozes and completions about references in the prompt; no memory is written or read.

    Batches are those of `ReadingObjective`, of which `CONTEXTS` contexts are taken. The same heads learn to point, and to find the
    sentence, as they do in memory.
    """

    def loss(self, decoder: Decoder, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy `()` of targets plus the pointers' losses at the phase's weights."""
        phase, rng = self.phase(step), random.Random(batch.seed)
        chosen = rng.sample(range(len(batch.contexts)), min(CONTEXTS, len(batch.contexts)))
        contexts = prompted(decoder, batch, table_of(batch).tolist(), chosen)
        total, figures = torch.zeros((), device=decoder.device), dict[str, float]()
        for group in by_length(contexts, GROUPS):
            share = len(group) / len(contexts)
            loss, found = self._asked(decoder, [contexts[n] for n in group], phase.pointer_loss, phase.sentence_loss)
            total = total + share * loss
            for name, value in found.items():
                figures[name] = figures.get(name, 0.0) + share * value
        return total, figures

    def _asked(
        self, decoder: Decoder, contexts: Sequence[Context], pointing: float, finding: float
    ) -> tuple[Tensor, dict[str, float]]:
        assert decoder.spec.layers is not None
        last, before = decoder.spec.layers[-1], decoder.spec.layers[-2:-1]
        layout = decoder.layout([c.ids for c in contexts], padding_side="right", memory=False)
        longest = max(len(c.ids) - c.target_start for c in contexts)
        places = torch.tensor([[min(c.target_start - 1 + n, len(c.ids) - 1) for n in range(longest)] for c in contexts])
        watching = Watching((*before, last), places.to(decoder.device))
        states = decoder.forward(layout, watching, base=True).last_hidden_state
        loss, found = target_loss(decoder, states, contexts, [c.target_start for c in contexts])
        figures = {"text_target": float(loss.detach()), **{f"text_{name}": value for name, value in found.items()}}
        pointed = [
            (b, n, tokens, weight)
            for b, context in enumerate(contexts)
            for n, (tokens, weight) in enumerate(zip(context.pointers, weights_of(len(context.pointers)), strict=True))
        ]
        sentences = [(b, 0, context.sentence, 1.0) for b, context in enumerate(contexts)]
        for name, layer, wanted, weight in (("pointer", (last,), pointed, pointing), ("sentence", before, sentences, finding)):
            if weight and layer:
                missed = paid_loss(watching.found[layer[0]], wanted)
                loss, figures[name] = loss + weight * missed, float(missed.detach())
        return loss, figures


def paid_loss(paid: Tensor, wanted: Sequence[tuple[int, int, Sequence[int], float]]) -> Tensor:
    """Weighted mean `()` of the negative log of what queries pay to tokens of their prompt, heads averaged.

    Args:
        paid: `(B, T, H, K)` attention weights.
        wanted: rows of context, query, tokens (none: left out) and weight.
    """
    rows = [(n, b, query, token) for n, (b, query, tokens, _) in enumerate(wanted) for token in tokens]
    if not rows:
        return paid.new_zeros(())
    number, b, query, token = torch.tensor(rows, device=paid.device).T
    mass = paid.new_zeros(len(wanted)).index_add(0, number, paid[b, query, :, token].mean(-1))
    shares = torch.tensor([weight if tokens else 0.0 for _, _, tokens, weight in wanted], device=paid.device)
    loss: Tensor = -(mass.clamp(min=LEAST_MASS).log() * shares).sum() / shares.sum()
    return loss
