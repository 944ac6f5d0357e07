"""Text -> ids of the memories to recall. Adding a way: a `Retriever`, and a row in `RETRIEVERS`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev
from typing import ClassVar, Protocol

from memory3.catalogue import Hit
from memory3.decoder import Decoder
from memory3.embedding import Embedder, VectorSpace
from memory3.internal import Attention
from memory3.reader import MemoryWriter
from memory3.spec import BankError, Memory

__all__ = ["RETRIEVERS", "Dense", "Hit", "Hybrid", "Internal", "Lexical", "Retriever", "Searchable"]

FUSED = 100
"""Hits of each list that a fusion looks at."""
RRF = 3
"""Constant of reciprocal rank fusion (Cormack, Clarke, Büttcher, SIGIR 2009, who take 60), by `memory3 eval fusion` (docs/results.md)."""


class Searchable(Protocol):
    """What a retriever needs of a bank."""

    @property
    def space(self) -> VectorSpace | None:
        """Which embedder its vectors are of; `None` where it has none."""

    @property
    def vectors_missing(self) -> int:
        """Memories without a vector."""

    @property
    def embedder(self) -> Embedder:
        """That embedder; `BankError` where it cannot be loaded."""

    def search(self, query: str, k: int) -> list[Hit]:
        """By the words."""

    def nearest(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """By the vectors."""

    @property
    def decoder(self) -> MemoryWriter | None:
        """The model that reads its memories; `None` where it was opened without."""

    def unwritten(self, ids: Iterable[str]) -> list[str]:
        """Those of the ids that have no key-values."""

    def read(self, ids: Sequence[str]) -> list[Memory]:
        """Memories `(P, K, D)`."""


class Retriever(ABC):
    """Finds memories of one bank.

    Args:
        bank: the bank to search.
    """

    searches: ClassVar[tuple[str, ...]] = ("lexical",)
    """Which indexes of a bank it goes through, `lexical` and `dense`: what `memory3 eval retrieval` counts as its cost."""
    reads_memories: ClassVar[bool] = False
    """Whether it reads key-values to find references."""

    def __init__(self, bank: Searchable) -> None:
        self.bank = bank

    @abstractmethod
    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query at most `k` hits, score descending, then id; none for a query without words."""


class Lexical(Retriever):
    """BM25 over the words of the texts, stemmed, without stop words. Control: random ids."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [self.bank.search(query, k) for query in queries]


class Dense(Retriever):
    """Cosine of sentence embeddings, by the embedder of the bank. Source: paper 3.2. Control: `Lexical`."""

    searches = ("dense",)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        asked = [query for query in queries if _has_words(query)]
        found = iter(self.bank.nearest([query.encode("utf-8", "replace").decode() for query in asked], k))
        return [next(found) if _has_words(query) else [] for query in queries]


class Hybrid(Retriever):
    """Reciprocal rank fusion of `Lexical` and `Dense`: a hit scores `sum 1 / (3 + rank)` over the lists that hold it.

    Scores say how two ranks agree, not how close a text is; for a threshold take another retriever. Control: either list alone.
    """

    searches = ("lexical", "dense")

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        wanted = max(k, FUSED)
        lists = [retriever(self.bank).search(queries, wanted) for retriever in (Lexical, Dense)]
        return [fused(both, k) for both in zip(*lists, strict=True)]


class Internal(Retriever):
    """The first 100 of `Lexical`, ranked again by how much the question attends to their memories; no other model is needed.

    Both scores are standardised over the 100 and added. A question costs one pass through the memory layers and 100 records;
    what is kept as text alone is not encoded for that, and ranked by its words.
    Source: the paper's Remark 2. Controls: `Lexical`, and `weight=0`.

    Args:
        bank: opened with the model that wrote it.
        weight: of attention beside words.

    Raises:
        BankError: the bank was opened without its model.
    """

    reads_memories = True

    def __init__(self, bank: Searchable, weight: float = 1.0) -> None:
        super().__init__(bank)
        if not isinstance(bank.decoder, Decoder):
            raise BankError(
                "found a bank opened without a model, expected one whose attention can be asked: Bank(path, decoder)"
            )
        self.attention, self.weight = Attention(bank.decoder), weight

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [self._ranked(query, k) for query in queries]

    def _ranked(self, query: str, k: int) -> list[Hit]:
        hits = self.bank.search(query, max(k, FUSED))
        texts = set(self.bank.unwritten(hit.id for hit in hits))
        kept = [hit.id for hit in hits if hit.id not in texts]
        attended = dict(zip(kept, standardised(self.attention.scores(query, self.bank.read(kept))), strict=True))
        words = standardised([hit.score for hit in hits])
        scores = [attended.get(hit.id, 0.0) * self.weight + word for hit, word in zip(hits, words, strict=True)]
        ranked = [Hit(hit.id, score) for hit, score in zip(hits, scores, strict=True)]
        return sorted(ranked, key=lambda hit: (-hit.score, hit.id))[: max(0, k)]


def standardised(scores: Sequence[float]) -> list[float]:
    """Scores less their mean, in standard deviations; zeros where all are equal."""
    if not scores:
        return []
    mean, deviation = fmean(scores), pstdev(scores)
    return [(score - mean) / deviation if deviation > 1e-9 else 0.0 for score in scores]


def fused(lists: Sequence[Sequence[Hit]], k: int, constant: int = RRF) -> list[Hit]:
    """The `k` best of several lists by reciprocal rank, then by id."""
    scores: dict[str, float] = {}
    for hits in lists:
        for rank, hit in enumerate(hits, 1):
            scores[hit.id] = scores.get(hit.id, 0.0) + 1 / (constant + rank)
    return [Hit(id, score) for id, score in sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[: max(0, k)]]


def _has_words(query: str) -> bool:
    return any(character.isalnum() for character in query)


RETRIEVERS: dict[str, type[Retriever]] = {"lexical": Lexical, "dense": Dense, "hybrid": Hybrid, "internal": Internal}


def default_retriever(banks: Sequence[Searchable]) -> str:
    """`hybrid` where all banks have vectors, else `lexical` (figures: docs/results.md).

    Warns:
        UserWarning: there are vectors, but not for all memories, or their embedder cannot be loaded.
    """
    if any(bank.space is None for bank in banks):
        return "lexical"
    try:
        for bank in banks:
            if bank.vectors_missing:
                raise BankError(
                    f"{bank.vectors_missing} memories have no vector yet, expected all: memory3 bank embed finishes them"
                )
            _ = bank.embedder
    except BankError as error:
        warnings.warn(f"searching by words alone: {error}", stacklevel=3)
        return "lexical"
    return "hybrid"
