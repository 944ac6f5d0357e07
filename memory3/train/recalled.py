"""What the chunks of a training batch read: references as texts, encoded in the step, with gradient where it is enabled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memory3.attention import Reading, Trace
from memory3.decoder import Decoder, Layout


def read_texts(
    decoder: Decoder, layout: Layout, rows: Sequence[Sequence[Sequence[str]]], trace: Trace | None = None
) -> Reading | None:
    """Encode the references of a batch, each distinct one once, and say which chunk reads which.

    Args:
        decoder: an attached decoder; its spec says how many tokens a head keeps.
        layout: of the contexts, with memory.
        rows: `rows[b][c]` are the texts that chunk `c` of sequence `b` reads; any number, repeated ones count once. Tokens
            beyond `reference_length` are cut off.
        trace: takes the attention that the references receive.

    Returns:
        What `Decoder.forward` takes; `None` where no chunk reads anything.
    """
    number: dict[str, int] = {}
    for text in (t for sequence in rows for chunk in sequence for t in chunk):
        number.setdefault(text, len(number))
    if not number:
        return None
    stack = decoder.stack([decoder.tokens(text)[: decoder.spec.reference_length] for text in number])
    read = [[list(dict.fromkeys(number[t] for t in chunk)) for chunk in sequence] for sequence in rows]
    most = max(len(chunk) for sequence in read for chunk in sequence)
    table = torch.full((len(rows), max(map(len, rows)), most), -1)
    for b, sequence in enumerate(read):
        for c, chunk in enumerate(sequence):
            table[b, c, : len(chunk)] = torch.tensor(chunk, dtype=torch.long)
    return Reading(stack, table.to(decoder.device), layout.chunks, decoder.spec, trace)
