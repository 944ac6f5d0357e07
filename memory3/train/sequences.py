"""The paper's two stages on any decoder: plain language modelling, then sequences whose chunks read references.

Source: arXiv 2407.01178, 3.5 and 5; design section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from memory3.attention import MemoryStack
from memory3.decoder import Decoder
from memory3.reader import BankReader
from memory3.train.corpus import Corpus
from memory3.train.recalled import read_texts
from memory3.train.retrieved import ChunkReferences, ChunkTexts
from memory3.train.settings import TrainError

CHUNKS_BEFORE = 4
"""A chunk reads its own reference and those of so many chunks before it."""

Thinning = tuple[tuple[int, int | None], ...]
"""Until which step how many tokens per head are kept, `None` for all; the last one stays."""


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
        self.thinning, self.reference_loss = _checked(thinning), reference_loss

    def batch(self, number: int) -> Retrieved:
        """Rows of a micro-batch with the references of their chunks."""
        rows = self.rows(number)
        return Retrieved([self.corpus.row(row, self.length) for row in rows], self.references.texts(rows))

    def tokens(self, batch: Retrieved) -> int:
        """Tokens that a micro-batch trains on; references are not counted."""
        return super().tokens(batch.rows)

    def view(self, decoder: Decoder, step: int) -> Decoder:
        """The decoder with the tokens per head of a step."""
        if not self.thinning:
            return decoder
        kept = next((kept for until, kept in self.thinning if step < until), self.thinning[-1][1])
        return decoder.using(replace(decoder.spec, tokens_per_head=kept))

    def loss(self, decoder: Decoder, batch: Retrieved, step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean next-token cross-entropy `()`; for the log how many chunks found a reference, and the references' own loss."""
        writer = _Through(self.view(decoder, step)) if self.reference_loss else self.view(decoder, step)
        layout = writer.layout([[*decoder.bos_ids, *row] for row in batch.rows], padding_side="right")
        reading = read_texts(cast(Decoder, writer), layout, [shared(own) for own in batch.own])
        logits = decoder.forward(layout, reading).logits
        loss = _next_token_loss(logits, layout.input_ids, len(decoder.prefix_ids) + len(decoder.bos_ids))
        chunks = [text is not None for own in batch.own for text in own]
        figures = {"chunks_with_reference": sum(chunks) / len(chunks)}
        if isinstance(writer, _Through) and reading is not None:
            figures["text"] = float(loss.detach())
            reference = writer.language_loss()
            loss, figures["reference"] = loss + self.reference_loss * reference, float(reference.detach())
        return loss, figures


def _checked(thinning: Thinning) -> Thinning:
    steps = [until for until, _ in thinning]
    if steps != sorted(set(steps)) or any(kept is not None and kept < 1 for _, kept in thinning):
        raise TrainError(
            f"found thinning {thinning}, expected pairs of a step and the tokens per head (at least 1, or all) until then, "
            "steps ascending: 1000:all,2000:32,3000:8"
        )
    return thinning


class _Through:
    """A decoder that runs the references of a batch through all of its layers, and keeps what comes out."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.ids: list[list[int]] = []
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def stack(self, rows: Sequence[Sequence[int]]) -> MemoryStack:
        """Memories of the references, as `Decoder.stack` makes them."""
        self.ids = [list(row) for row in rows]
        stack, self.states = self.decoder.stack_with_states(rows)
        return stack

    def language_loss(self) -> Tensor:
        """Next-token cross-entropy `()` of the references that were stacked, their first tokens apart."""
        assert self.states is not None
        longest = self.states.shape[1]
        labels = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in self.ids], device=self.states.device)[:, 1:]
        asked = labels >= 0
        logits = vocabulary_logits(self.decoder, self.states[:, :-1][asked])
        return functional.cross_entropy(logits.float(), labels[asked]) if len(logits) else logits.sum()


def vocabulary_logits(decoder: Decoder, states: Tensor) -> Tensor:
    """Logits `(..., V)` of last hidden states `(..., d)`, scaled and capped as the families' own forward does it."""
    config = decoder.model.config.get_text_config()
    logits: Tensor = decoder.model.get_output_embeddings()(states)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # granite
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # cohere
    cap = getattr(config, "final_logit_softcapping", None)  # gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


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
