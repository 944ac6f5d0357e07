"""Chunk -> query -> ids -> memories: search, overlap filter, RAM cache, cold start."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memory3.bank import Bank
from memory3.reader import BankReader, MemoryWriter, version_name
from memory3.retrieval import RETRIEVERS, Hit, Retriever, default_retriever
from memory3.spec import BankError, Memory, Reference, SpecError
from memory3.splitting import overlap
from memory3.writing import write

TRAINING_OVERLAP, EVALUATION_OVERLAP = 0.9, 2 / 3
"""Above these a reference repeats the text that is being learned or asked (paper 3.6, 4.4); off when a user asks."""


@dataclass(frozen=True)
class Recalled:
    """What one recall brought, best first.

    Args:
        query: the text that was searched with.
        hits: ids and scores; the score of a fixed reference is 0.
        memories: `(P, K, D)` each, on the CPU, in the order of the hits.
        references: text and first place of each.
        bytes_read: bytes that came from disk; what the RAM cache held costs none.
        versions: state of each bank that was searched, as `Bank(…, at=…)` takes it.
    """

    query: str
    hits: tuple[Hit, ...] = ()
    memories: tuple[Memory, ...] = ()
    references: tuple[Reference, ...] = ()
    bytes_read: int = 0
    versions: tuple[str, ...] = ()


class MemoryCache:
    """The most recently used memories, at most `limit_bytes` of them."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.nbytes = limit_bytes, 0
        self._held: OrderedDict[tuple[int, str], Memory] = OrderedDict()

    def get(self, key: tuple[int, str]) -> Memory | None:
        """The memory, now the most recent one; `None` where it is not held."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: tuple[int, str], memory: Memory) -> None:
        """Hold a memory and let the oldest go until the limit is kept."""
        self._held[key] = memory
        self.nbytes += memory.nbytes
        while self.nbytes > self.limit_bytes:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes

    def ids(self, bank: int) -> list[str]:
        """What it holds of a bank."""
        return [id for holder, id in self._held if holder == bank]

    def drop(self, key: tuple[int, str]) -> None:
        """Forget a memory."""
        self.nbytes -= self._held.pop(key).nbytes


class Recaller(Protocol):
    """What generation needs of a recall."""

    min_score: float | None

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        """One recall per query; `texts` are the whole texts that the queries are part of."""

    def check(self, decoder: MemoryWriter) -> None:
        """Raise `BankMismatch` where the memories mean nothing to the decoder."""


class Recall:
    """Brings the memories for a chunk.

    Args:
        banks: one or several; their hits are merged by score.
        references: a fixed list instead of a search: ids, or `Reference`s, which are encoded and stored at their first
            recall where the first bank does not have them (cold start).
        retriever: row of `RETRIEVERS`; by default `hybrid` where every bank has vectors, else `lexical`. Hits of several banks
            can only be compared within one retriever.
        count: references of one recall; by default the spec's `references_per_chunk`.
        min_score: hits below are dropped, so that irrelevant questions recall nothing.
        max_overlap: hits whose overlap with the whole text is larger are dropped (`EVALUATION_OVERLAP`).
        cache_bytes: limit of the RAM cache.

    Raises:
        BankError: no bank, a fixed id that no bank has, or a bank opened without a decoder.
        BankMismatch: banks of different models.
        SpecError: an unknown retriever, or a count or limit out of range.
    """

    def __init__(
        self,
        banks: BankReader | Sequence[BankReader],
        *,
        references: Sequence[str | Reference] | None = None,
        retriever: str | None = None,
        count: int | None = None,
        min_score: float | None = None,
        max_overlap: float | None = None,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        self.banks = [banks] if isinstance(banks, BankReader) else list(banks)
        if not self.banks:
            raise BankError("found no bank, expected at least one to recall from")
        if retriever is not None and retriever not in RETRIEVERS:
            raise SpecError(f"found retriever {retriever!r}, expected one of {', '.join(RETRIEVERS)}")
        if any(bank.decoder is None for bank in self.banks):
            raise BankError("found a bank opened without a model, expected Bank(path, decoder): only its writer can read it")
        decoder = self.banks[0].decoder
        assert decoder is not None
        self.count = decoder.spec.references_per_chunk if count is None else count
        if self.count < 1:
            raise SpecError(f"found count={self.count}, expected at least 1 reference per recall")
        self.min_score, self.max_overlap = min_score, max_overlap
        self.cache = MemoryCache(cache_bytes)
        self.fixed = None if references is None else list(references)
        self.retriever = retriever or ("lexical" if self.fixed is not None else default_retriever(self.banks))
        self._retrievers: list[Retriever] = [RETRIEVERS[self.retriever](bank) for bank in self.banks]
        self._versions = [bank.version for bank in self.banks]
        self.check(decoder)

    def check(self, decoder: MemoryWriter) -> None:
        """Raise `BankMismatch` where a bank was not opened with this decoder and was written by another."""
        for bank in self.banks:
            if bank.decoder is not decoder:
                bank.manifest.check(bank.address, decoder.identity())

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        """One recall per query; `texts` are what the overlap filter compares with, by default the queries."""
        self._forget_deleted()
        if self.fixed is not None:
            places = self._fixed_places()
            return [self._loaded(query, places) for query in queries]
        wanted = self.count if self.max_overlap is None else 4 * self.count
        found = [retriever.search(queries, wanted) for retriever in self._retrievers]
        results = []
        for n, query in enumerate(queries):
            best: dict[str, tuple[int, Hit]] = {}
            for b, hits in enumerate(found):
                for hit in hits[n]:
                    if hit.id not in best or best[hit.id][1].score < hit.score:
                        best[hit.id] = (b, hit)
            places = sorted(best.values(), key=lambda place: (-place[1].score, place[1].id))
            results.append(self._loaded(query, self._kept(places, (texts or queries)[n])[: self.count]))
        return results

    def _forget_deleted(self) -> None:
        """What was deleted from a bank since the last recall, by whichever process, goes from the RAM cache too."""
        for b, bank in enumerate(self.banks):
            version = bank.version
            if version != self._versions[b]:
                for id in bank.missing(self.cache.ids(b)):
                    self.cache.drop((b, id))
                self._versions[b] = version

    def _kept(self, places: list[tuple[int, Hit]], text: str) -> list[tuple[int, Hit]]:
        if self.min_score is not None:
            places = [p for p in places if p[1].score >= self.min_score]
        if self.max_overlap is None:
            return places
        limit, decoder = self.max_overlap, self.banks[0].decoder
        assert decoder is not None

        def tokens(words: str) -> list[int]:
            return list(decoder.tokenizer(words, add_special_tokens=False)["input_ids"])

        read = tokens(text)
        return [p for p in places if overlap(read, tokens(self._reference(*p).text)) <= limit]

    def _fixed_places(self) -> list[tuple[int, Hit]]:
        """Where the fixed references lie; texts that were never encoded are encoded and stored now."""
        assert self.fixed is not None
        texts = [r for r in self.fixed if isinstance(r, Reference)]
        first = self.banks[0]
        missing = set(first.missing(r.id for r in texts))
        if missing:
            assert first.decoder is not None
            if not isinstance(first, Bank):
                raise BankError(
                    f"{first.address} cannot be written to, expected memories of all references there: write them first"
                )
            write(first.decoder, [r for r in texts if r.id in missing], first)
        places = []
        for id in (r.id if isinstance(r, Reference) else r for r in self.fixed):
            holder = next((b for b, bank in enumerate(self.banks) if id in bank), None)
            if holder is None:
                raise BankError(f"found no memory {id!r} in {self.banks[0].address}, expected an id that `write` stored there")
            places.append((holder, Hit(id, 0.0)))
        return places

    def _reference(self, bank: int, hit: Hit) -> Reference:
        return self.banks[bank].references([hit.id])[hit.id][0]

    def _loaded(self, query: str, places: Sequence[tuple[int, Hit]]) -> Recalled:
        """Memories from the cache or the disk, those of one bank in one read."""
        keys = [(b, hit.id) for b, hit in places]
        held = {key: memory for key in keys if (memory := self.cache.get(key)) is not None}
        bytes_read, texts = 0, {}
        for b, bank in enumerate(self.banks):
            ids = [id for holder, id in keys if holder == b]
            if not ids:
                continue
            texts.update({(b, id): spans[0] for id, spans in bank.references(ids).items()})
            absent = list(dict.fromkeys(id for id in ids if (b, id) not in held))
            for id, memory in zip(absent, bank.read(absent), strict=True):
                held[b, id] = memory
                self.cache.put((b, id), memory)
            bytes_read += len(absent) * bank.record_bytes
            bank.count_uses(ids, self._versions[b])
        hits = tuple(hit for _, hit in places)
        versions = tuple(map(version_name, self._versions))
        return Recalled(query, hits, tuple(held[k] for k in keys), tuple(texts[k] for k in keys), bytes_read, versions)
