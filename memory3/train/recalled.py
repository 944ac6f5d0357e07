"""What the chunks of a training batch read: references as texts, encoded in the step, with gradient where it is enabled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from memory3.attention import Reading
from memory3.decoder import Decoder, Layout

IGNORED = -100
"""Label of a token that is no target, as in transformers."""


def read_texts(decoder: Decoder, layout: Layout, rows: Sequence[Sequence[Sequence[str]]]) -> Reading | None:
    """Encode the references of a batch, each distinct one once, and say which chunk reads which.

    Args:
        decoder: an attached decoder; its spec says how many tokens a head keeps.
        layout: of the contexts, with memory.
        rows: as of `distinct`.

    Returns:
        What `Decoder.forward` takes; `None` where no chunk reads anything.
    """
    references, table = distinct(decoder, rows)
    return Reading(decoder.stack(references), table, layout.chunks, decoder.spec) if references else None


def distinct(decoder: Decoder, rows: Sequence[Sequence[Sequence[str]]]) -> tuple[list[list[int]], Tensor]:
    """The distinct references of a batch as token ids, and the table `(B, C, R)` of `Reading`.

    Args:
        decoder: gives tokenizer and `reference_length`; tokens beyond are cut off.
        rows: `rows[b][c]` are the texts that chunk `c` of sequence `b` reads; any number, repeated ones count once.
    """
    number: dict[str, int] = {}
    for text in (t for sequence in rows for chunk in sequence for t in chunk):
        number.setdefault(text, len(number))
    read = [[list(dict.fromkeys(number[t] for t in chunk)) for chunk in sequence] for sequence in rows]
    most = max((len(chunk) for sequence in read for chunk in sequence), default=0)
    table = torch.full((len(rows), max(map(len, rows)), most), -1)
    for b, sequence in enumerate(read):
        for c, chunk in enumerate(sequence):
            table[b, c, : len(chunk)] = torch.tensor(chunk, dtype=torch.long)
    return [decoder.tokens(text)[: decoder.spec.reference_length] for text in number], table.to(decoder.device)


def reference_loss(
    decoder: Decoder, states: Tensor, references: Sequence[Sequence[int]], share: float = 1.0, seed: int = 0
) -> Tensor:
    """Next-token cross-entropy `()` of references, their first tokens apart.

    Args:
        decoder: gives the output embeddings.
        states: their last hidden states `(N, T, d)`, as `Decoder.stack_with_states` gives them.
        references: their token ids.
        share: of the tokens that are asked for, drawn from the seed: in a small model the vocabulary costs as much as half of
            the layers.
        seed: of the draw.
    """
    longest = states.shape[1]
    labels = torch.tensor([[*r, *[IGNORED] * (longest - len(r))] for r in references])[:, 1:]
    asked = labels != IGNORED
    if share < 1:
        asked &= torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < share
    asked, labels = asked.to(states.device), labels.to(states.device)
    logits = vocabulary_logits(decoder, states[:, :-1][asked]).float()
    return functional.cross_entropy(logits, labels[asked]) if len(logits) else logits.sum()


def vocabulary_logits(decoder: Decoder, states: Tensor) -> Tensor:
    """Logits `(..., V)` of last hidden states `(..., d)`, scaled and capped as the families' own forward does it."""
    config = decoder.model.config.get_text_config()
    logits: Tensor = decoder.model.get_output_embeddings()(states)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # granite
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # cohere
    cap = getattr(config, "final_logit_softcapping", None)  # gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)
