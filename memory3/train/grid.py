"""A prompt with its response, cut into chunks exactly as generation does it, and what each chunk reads.

The prompt is cut from its first token and a short last piece recalls for itself. The response starts a new count: its
first chunk reads what the prompt's last chunk recalled, and chunk g + 1 what chunk g recalled (design section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from memory3.attention import Reading
from memory3.decoder import Decoder, Layout
from memory3.generation import Prompt
from memory3.recall import TRAINING_OVERLAP, Recalled
from memory3.retrieval import RETRIEVERS, Searchable, default_retriever
from memory3.spec import Reference, SpecError
from memory3.splitting import overlap
from memory3.train.recalled import read_texts

T = TypeVar("T")


@dataclass(frozen=True)
class Answered:
    """A prompt and the token ids of its response, the end token included; empty where the whole row is prompt."""

    prompt: Prompt
    response: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of the whole row."""
        return self.prompt.ids + self.response

    def grid(self, size: int) -> list[int]:
        """Chunk of each token, for `Decoder.layout`; `size` tokens are a chunk."""
        first = -(-len(self.prompt.ids) // size)
        return [n // size for n in range(len(self.prompt.ids))] + [first + n // size for n in range(len(self.response))]

    def queries(self, decoder: Decoder) -> list[str]:
        """What each chunk that recalls asks with, in order; empty where it has no words. A response's last chunk, whole or not,
        recalls for nobody.
        """
        size = decoder.spec.chunk_length
        asked = [self.prompt.query(decoder, start, start + size) for start in range(0, len(self.prompt.ids), size)]
        ends = range(size, len(self.response), size)
        return asked + [_words(decoder, self.response[end - size : end]) for end in ends]

    def text(self, decoder: Decoder) -> str:
        """The words of prompt and response: what the overlap filter of training compares a reference with."""
        return f"{self.prompt.query(decoder, 0, len(self.prompt.ids))} {_words(decoder, self.response)}".strip()

    def read(self, size: int, own: Sequence[T]) -> list[T]:
        """For each chunk of the grid what it reads, from what each chunk that recalls has recalled."""
        first = -(-len(self.prompt.ids) // size)
        return [*own[:first], *([own[first - 1]] if self.response else []), *own[first:]]


def _words(decoder: Decoder, ids: Sequence[int]) -> str:
    return str(decoder.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


class Recalls(Protocol):
    """Anything that recalls for chunks: a `Recall` brings memories (`Recalled`), others bring texts."""

    def __call__(self, queries: Sequence[str], texts: Sequence[str]) -> Sequence[Recalled | Sequence[str]]:
        """One recall per query; `texts` are the whole rows that the queries are part of."""


Found = Recalled | Sequence[str] | None


def recalled(decoder: Decoder, rows: Sequence[Answered], recall: Recalls) -> list[list[Found]]:
    """For each chunk of each row what it reads; all chunks recall in one call, one without words keeps what it has.

    `None` where nothing was recalled so far.
    """
    asked = [row.queries(decoder) for row in rows]
    whole = [row.text(decoder) for row in rows]
    asking = [(query, text) for queries, text in zip(asked, whole, strict=True) for query in queries if query]
    found = iter(recall([query for query, _ in asking], [text for _, text in asking]) if asking else [])
    size = decoder.spec.chunk_length
    return [row.read(size, list(_kept(queries, found))) for row, queries in zip(rows, asked, strict=True)]


def _kept(queries: Sequence[str], found: Iterator[Recalled | Sequence[str]]) -> Iterator[Found]:
    last: Found = None
    for query in queries:
        last = next(found) if query else last
        yield last


def layout_of(decoder: Decoder, rows: Sequence[Answered], padding_side: str = "right") -> Layout:
    """The rows as a batch behind the references' interval, on the grid of prompt and response."""
    grid = [row.grid(decoder.spec.chunk_length) for row in rows]
    return decoder.layout([row.ids for row in rows], padding_side=padding_side, grid=grid)


def reading_of(decoder: Decoder, layout: Layout, found: Sequence[Sequence[Found]]) -> Reading | None:
    """What `Decoder.forward` takes: memories as they are, or texts encoded now, with gradient where it is enabled.

    Raises:
        SpecError: some recalls brought memories and others texts.
    """
    brought = [isinstance(chunk, Recalled) for row in found for chunk in row if chunk is not None]
    if all(brought):
        memories = [[chunk.memories if isinstance(chunk, Recalled) else () for chunk in row] for row in found]
        return decoder.reading(layout.chunks, memories)
    if any(brought):
        raise SpecError("found a recall that brings both memories and texts, expected one kind: use two blocks, or one Recall")
    texts = [[() if chunk is None or isinstance(chunk, Recalled) else chunk for chunk in row] for row in found]
    return read_texts(decoder, layout, texts)


class SearchableBank(Searchable, Protocol):
    """What a recall of texts needs of a bank."""

    def references(self, ids: Sequence[str]) -> dict[str, list[Reference]]:
        """Texts with their spans."""


class RecalledTexts:
    """A recall that brings the texts of a bank's references, so that they can be encoded by the weights of the step.

    The bank may have been written by other weights, and is opened without a decoder.

    Args:
        bank: what is searched.
        tokens: text to token ids, for the overlap filter.
        count: references of one recall.
        retriever: row of `RETRIEVERS`; by default that of generation.
        max_overlap: hits whose overlap with the whole row is larger are dropped; `None` keeps all.

    Raises:
        SpecError: an unknown retriever, or a count below 1.
        BankError: `internal`, which needs the bank's own model.
    """

    def __init__(
        self,
        bank: SearchableBank,
        tokens: Callable[[str], Sequence[int]],
        count: int,
        retriever: str | None = None,
        max_overlap: float | None = TRAINING_OVERLAP,
    ) -> None:
        if retriever is not None and retriever not in RETRIEVERS:
            raise SpecError(f"found retriever {retriever!r}, expected one of {', '.join(RETRIEVERS)}")
        if count < 1:
            raise SpecError(f"found count={count}, expected at least 1 reference per recall")
        self.bank, self.tokens, self.count, self.max_overlap = bank, tokens, count, max_overlap
        self.retriever = RETRIEVERS[retriever or default_retriever([bank])](bank)

    def __call__(self, queries: Sequence[str], texts: Sequence[str]) -> list[list[str]]:
        """Texts for each query, best first."""
        wanted = self.count if self.max_overlap is None else 4 * self.count
        found = self.retriever.search(queries, wanted)
        held = self.bank.references(list(dict.fromkeys(hit.id for hits in found for hit in hits)))
        named = [[held[hit.id][0].text for hit in hits] for hits in found]
        return [self._fitting(some, text) for some, text in zip(named, texts, strict=True)]

    def _fitting(self, found: Sequence[str], text: str) -> list[str]:
        if self.max_overlap is None:
            return list(found)
        whole, limit = self.tokens(text), self.max_overlap
        return [one for one in found if overlap(whole, self.tokens(one)) <= limit][: self.count]
