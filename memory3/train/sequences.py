"""The paper's two stages on any decoder: plain language modelling, then sequences whose chunks read references.

Source: arXiv 2407.01178, 3.5 and 5; design section 4.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from memory3.bank import Bank
from memory3.decoder import Decoder
from memory3.recall import TRAINING_OVERLAP
from memory3.splitting import overlap
from memory3.train.loop import TrainError
from memory3.train.recalled import read_texts

CHUNKS_BEFORE = 4
"""A chunk reads its own reference and those of so many chunks before it."""


class Sequences:
    """Texts joined by `</s>` and cut into rows of `length` tokens; held in memory as one int32 tensor."""

    def __init__(self, decoder: Decoder, texts: Iterable[str], length: int, batch: int, seed: int) -> None:
        self.decoder, self.length, self.batch_size, self.seed = decoder, length, batch, seed
        end = decoder.tokenizer.eos_token_id
        ids: list[int] = []
        for text in texts:
            ids += [*decoder.tokens(text), *([] if end is None else [int(end)])]
        self.rows = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int32).view(-1, length)
        if not len(self.rows):
            raise TrainError(
                f"found {len(ids)} tokens of training text, expected at least {length}: give more, or a shorter --length"
            )

    def batch(self, step: int) -> list[list[int]]:
        """Token ids of a step: each epoch goes through all rows in its own order."""
        first = step * self.batch_size
        picked = []
        for n in range(first, first + self.batch_size):
            epoch, place = divmod(n, len(self.rows))
            order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + epoch))
            picked.append(self.rows[order[place]].tolist())
        return picked


class Warmup(Sequences):
    """Plain language modelling, without memory and without its layout."""

    def loss(self, decoder: Decoder, batch: list[list[int]], step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean next-token cross-entropy `()`."""
        layout = decoder.layout([[*decoder.bos_ids, *row] for row in batch], padding_side="right", memory=False)
        loss = _next_token_loss(decoder.forward(layout).logits, layout.input_ids, len(decoder.bos_ids))
        return loss, {}


class Continual(Sequences):
    """Every chunk retrieves a reference, and reads it and those of the four chunks before.

    References are encoded in the same step with gradient. The bank gives texts and search only: it may have been written
    by other weights, and is opened without a decoder.
    """

    def __init__(self, decoder: Decoder, texts: Iterable[str], bank: Bank, length: int, batch: int, seed: int) -> None:
        super().__init__(decoder, texts, length, batch, seed)
        self.bank = bank

    def loss(self, decoder: Decoder, batch: list[list[int]], step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean next-token cross-entropy `()`, and how many chunks found a reference."""
        layout = decoder.layout([[*decoder.bos_ids, *row] for row in batch], padding_side="right")
        texts = [self._retrieved(row) for row in batch]
        reading = read_texts(decoder, layout, [_shared(row) for row in texts])
        logits = decoder.forward(layout, reading).logits
        skip = len(decoder.prefix_ids) + len(decoder.bos_ids)
        found = sum(t is not None for row in texts for t in row) / max(1, sum(map(len, texts)))
        return _next_token_loss(logits, layout.input_ids, skip), {"chunks_with_reference": found}

    def _retrieved(self, row: list[int]) -> list[str | None]:
        """For each chunk the best reference that the sequence does not itself repeat (overlap at most 0.9)."""
        size, skip = self.decoder.spec.chunk_length, len(self.decoder.bos_ids)
        starts = [0, *range(size - skip, len(row), size)]
        found: list[str | None] = []
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            query = str(self.decoder.tokenizer.decode(row[start:end], skip_special_tokens=True)).strip()
            hits = self.bank.search(query, 4)
            texts = self.bank.references([h.id for h in hits])
            fitting = (texts[h.id][0].text for h in hits)
            found.append(next((t for t in fitting if overlap(row, self.decoder.tokens(t)) <= TRAINING_OVERLAP), None))
        return found


def _shared(own: Sequence[str | None]) -> list[list[str]]:
    """For each chunk its own reference first, then those of the four chunks before; each at most once."""
    read = [
        dict.fromkeys(t for t in reversed(own[max(0, c - CHUNKS_BEFORE) : c + 1]) if t is not None) for c in range(len(own))
    ]
    return [list(chunk) for chunk in read]


def _next_token_loss(logits: Tensor, input_ids: Tensor, skip: int) -> Tensor:
    """Cross-entropy `()` of the tokens from place `skip` on; what stands before is layout."""
    first = max(skip, 1)
    return functional.cross_entropy(logits[:, first - 1 : -1].flatten(0, 1).float(), input_ids[:, first:].flatten())


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """The texts in an order drawn from the seed."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    return order
