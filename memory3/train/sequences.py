"""The paper's two stages on any decoder: plain language modelling, then sequences whose chunks read references.

Source: arXiv 2407.01178, 3.5 and 5; design section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memory3.attention import Reading
from memory3.decoder import Decoder
from memory3.reader import BankReader
from memory3.train.corpus import Corpus
from memory3.train.recalled import distinct, reference_loss
from memory3.train.retrieved import ChunkReferences, ChunkTexts
from memory3.train.settings import TrainError
from memory3.train.thinning import Thinning, checked, thinned

CHUNKS_BEFORE = 4
"""A chunk reads its own reference and those of so many chunks before it."""


class Sequences:
    """Rows of `length` tokens of a corpus, in another order each epoch.

    Args:
        decoder: gives tokenizer and `<s>`.
        texts: a corpus, or some texts to make one of in memory.
        length: tokens of a row, `<s>` not counted.
        batch: rows of a micro-batch.
        seed: of the order.

    Raises:
        TrainError: the corpus has no whole row.
    """

    def __init__(self, decoder: Decoder, texts: Corpus | Iterable[str], length: int, batch: int, seed: int) -> None:
        self.decoder, self.length, self.batch_size, self.seed = decoder, length, batch, seed
        self.corpus = texts if isinstance(texts, Corpus) else Corpus.of_texts(texts, decoder.tokenizer)
        self.count = self.corpus.rows(length)
        if not self.count:
            raise TrainError(
                f"found {len(self.corpus.ids)} tokens of training text, expected at least {length}: give more, or a shorter --length"
            )

    def rows(self, number: int) -> list[int]:
        """Which rows of the corpus micro-batch `number` holds; a function of the number alone."""
        first = number * self.batch_size
        places = (divmod(n, self.count) for n in range(first, first + self.batch_size))
        return [int(_order(self.count, self.seed, epoch)[place]) for epoch, place in places]

    def batch(self, number: int) -> Any:
        """Token ids of a micro-batch, a list for each row: each epoch goes through all rows in its own order."""
        return [self.corpus.row(row, self.length) for row in self.rows(number)]

    def tokens(self, batch: Any) -> int:
        """Tokens that a micro-batch trains on; references are not counted."""
        return sum(map(len, batch))


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    """The rows of an epoch, shuffled; two are held, for a batch may reach from one epoch into the next."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


class Warmup(Sequences):
    """Plain language modelling, without memory and without its layout."""

    def loss(self, decoder: Decoder, batch: list[list[int]], step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean next-token cross-entropy `()`."""
        layout = decoder.layout([[*decoder.bos_ids, *row] for row in batch], padding_side="right", memory=False)
        loss = _next_token_loss(decoder.forward(layout).logits, layout.input_ids, len(decoder.bos_ids))
        return loss, {}


@dataclass(frozen=True)
class Retrieved:
    """Rows of token ids, and for each chunk of each the text of its own reference; `None` where it has none."""

    rows: list[list[int]]
    own: list[list[str | None]]


class Continual(Sequences):
    """Every chunk retrieves a reference, and reads it and those of the four chunks before.

    References are encoded in the same step with gradient, each distinct one once, and leave after the last memory layer.

    Args:
        decoder: gives tokenizer, chunks and `<s>`.
        texts: as for `Sequences`.
        references: a bank, which is then asked for each batch, or answers kept from before (`ChunkReferences.prepare`).
        length: as for `Sequences`.
        batch: as for `Sequences`.
        seed: as for `Sequences`.
        thinning: tokens per head by step; by default always the decoder's own.
        reference_loss: weight of language modelling on the references themselves. With it they run through all layers.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Corpus | Iterable[str],
        references: BankReader | ChunkTexts,
        length: int,
        batch: int,
        seed: int,
        *,
        thinning: Thinning = (),
        reference_loss: float = 0.0,
    ) -> None:
        super().__init__(decoder, texts, length, batch, seed)
        self.references: ChunkTexts = (
            ChunkReferences(decoder, self.corpus, references, length) if isinstance(references, BankReader) else references
        )
        self.thinning, self.reference_loss = checked(thinning), reference_loss

    def batch(self, number: int) -> Retrieved:
        """Rows of a micro-batch with the references of their chunks."""
        rows = self.rows(number)
        return Retrieved([self.corpus.row(row, self.length) for row in rows], self.references.texts(rows))

    def tokens(self, batch: Retrieved) -> int:
        """Tokens that a micro-batch trains on; references are not counted."""
        return super().tokens(batch.rows)

    def loss(self, decoder: Decoder, batch: Retrieved, step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean next-token cross-entropy `()`; for the log how many chunks found a reference, and the references' own loss."""
        view = thinned(decoder, self.thinning, step)
        layout = view.layout([[*decoder.bos_ids, *row] for row in batch.rows], padding_side="right")
        references, table = distinct(view, [shared(own) for own in batch.own])
        reading, states = None, None
        if references:
            stack, states = view.stack_with_states(references, through=self.reference_loss > 0)
            reading = Reading(stack, table, layout.chunks, view.spec)
        logits = decoder.forward(layout, reading).logits
        loss = _next_token_loss(logits, layout.input_ids, len(decoder.prefix_ids) + len(decoder.bos_ids))
        chunks = [text is not None for own in batch.own for text in own]
        figures = {"chunks_with_reference": sum(chunks) / len(chunks)}
        if states is not None:
            figures["text"] = float(loss.detach())
            own_loss = reference_loss(view, states, references)
            loss, figures["reference"] = loss + self.reference_loss * own_loss, float(own_loss.detach())
        return loss, figures


def shared(own: Sequence[str | None]) -> list[list[str]]:
    """For each chunk its own reference first, then those of the four chunks before; each at most once."""
    read = [
        dict.fromkeys(t for t in reversed(own[max(0, c - CHUNKS_BEFORE) : c + 1]) if t is not None) for c in range(len(own))
    ]
    return [list(chunk) for chunk in read]


def _next_token_loss(logits: Tensor, input_ids: Tensor, skip: int) -> Tensor:
    """Cross-entropy `()` of the tokens from place `skip` on; what stands before is layout."""
    first = max(skip, 1)
    return functional.cross_entropy(logits[:, first - 1 : -1].flatten(0, 1).float(), input_ids[:, first:].flatten())
