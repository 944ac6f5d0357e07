"""Text -> ids of the memories to recall. Adding a way: a `Retriever`, and a row in `RETRIEVERS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from memory3.bank import Bank, Hit

__all__ = ["RETRIEVERS", "Hit", "Lexical", "Retriever"]


class Retriever(ABC):
    """Finds memories of one bank.

    Args:
        bank: the bank to search.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    @abstractmethod
    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each query at most `k` hits, score descending, then id; none for a query without words."""


class Lexical(Retriever):
    """BM25 over the words of the texts, stemmed, without stop words. Control: random ids."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [self.bank.search(query, k) for query in queries]


RETRIEVERS: dict[str, type[Retriever]] = {"lexical": Lexical}
