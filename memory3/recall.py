"""Chunk -> query -> ids -> memories: search, overlap filter, RAM cache, cold start."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from memory3.bank import Bank
from memory3.reader import BankReader, MemoryWriter, version_name
from memory3.retrieval import RETRIEVERS, Hit, Retriever, default_retriever
from memory3.spec import BankError, Memory, Reference, SpecError
from memory3.splitting import overlap
from memory3.tiers import Settings, Tiers
from memory3.writing import write

TRAINING_OVERLAP, EVALUATION_OVERLAP = 0.9, 2 / 3
"""Above these a reference repeats the text that is being learned or asked (paper 3.6, 4.4); off when a user asks."""


_Found = tuple[int, Hit]
"""Number of a bank and a hit in it."""
_Key = tuple[int, str]
"""Number of a bank and id of a memory in it."""


@dataclass(frozen=True)
class Recalled:
    """What one recall brought, best first.

    Args:
        query: the text that was searched with.
        hits: ids and scores; the score of a fixed reference is 0.
        memories: `(P, K, D)` each, on the CPU, in the order of the hits.
        references: text and first place of each.
        bytes_read: bytes that came from disk; what the RAM cache held costs none.
        encoded: references that are kept as text and were encoded for this recall.
        known: ids of references that were found and not read, for the model knows them from an adapter.
        versions: state of each bank that was searched, as `Bank(…, at=…)` takes it.
    """

    query: str
    hits: tuple[Hit, ...] = ()
    memories: tuple[Memory, ...] = ()
    references: tuple[Reference, ...] = ()
    bytes_read: int = 0
    encoded: int = 0
    known: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()


class MemoryCache:
    """The most recently used memories, at most `limit_bytes` of them."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.nbytes = limit_bytes, 0
        self._held: OrderedDict[_Key, Memory] = OrderedDict()

    def get(self, key: _Key) -> Memory | None:
        """The memory, now the most recent one; `None` where it is not held."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: _Key, memory: Memory) -> None:
        """Hold a memory and let the oldest go until the limit is kept."""
        self._held[key] = memory
        self.nbytes += memory.nbytes
        while self.nbytes > self.limit_bytes:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes

    def ids(self, bank: int) -> list[str]:
        """What it holds of a bank."""
        return [id for holder, id in self._held if holder == bank]

    def drop(self, key: _Key) -> None:
        """Forget a memory, where it is held."""
        if key in self._held:
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
        counted: note each recall in the use history of its bank, and let use move references between tiers; measurements are
            no use.

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
        counted: bool = True,
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
        if cache_bytes < 0:
            raise SpecError(f"found cache_bytes={cache_bytes}, expected at least 0")
        self.cache, self.counted = MemoryCache(cache_bytes), counted
        self._waiting: dict[_Key, bytes] = {}
        self.fixed = None if references is None else list(references)
        self.retriever = retriever or ("lexical" if self.fixed is not None else default_retriever(self.banks))
        self._retrievers: list[Retriever] = [RETRIEVERS[self.retriever](bank) for bank in self.banks]
        self._versions = [bank.version for bank in self.banks]
        self._tiers = [Tiers(bank) if isinstance(bank, Bank) and bank.at is None else None for bank in self.banks]
        self.check(decoder)

    def check(self, decoder: MemoryWriter) -> None:
        """Raise `BankMismatch` where a bank was not opened with this decoder and was written by another."""
        for bank in self.banks:
            if bank.decoder is not decoder:
                bank.manifest.check(bank.address, decoder.identity())

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        """One recall per query; `texts` are what the overlap filter compares with, by default the queries."""
        self._forget_deleted()
        return self._loaded(queries, self._searched(queries, texts or queries) if self.fixed is None else self._fixed(queries))

    def texts(self, queries: Sequence[str]) -> list[Recalled]:
        """What a recall would bring, as texts alone: no memory is read, and nothing is counted but the use."""
        self._forget_deleted()
        found = self._searched(queries, queries) if self.fixed is None else self._fixed(queries)
        texts, versions = self._references(found), tuple(map(version_name, self._versions))
        if self.counted:
            for b, bank in enumerate(self.banks):
                if used := [hit.id for some in found for holder, hit in some if holder == b]:
                    bank.count_uses(used, self._versions[b])
        return [
            Recalled(
                query,
                tuple(hit for _, hit in some),
                references=tuple(texts[b, hit.id] for b, hit in some),
                versions=versions,
            )
            for query, some in zip(queries, found, strict=True)
        ]

    def _searched(self, queries: Sequence[str], texts: Sequence[str]) -> list[list[_Found]]:
        """The best of all banks for each query."""
        wanted = self.count if self.max_overlap is None else 4 * self.count
        found = [retriever.search(queries, wanted) for retriever in self._retrievers]
        ordered = []
        for n in range(len(queries)):
            best: dict[str, _Found] = {}
            for b, hits in enumerate(found):
                for hit in hits[n]:
                    if hit.id not in best or best[hit.id][1].score < hit.score:
                        best[hit.id] = (b, hit)
            ordered.append(sorted(best.values(), key=lambda place: (-place[1].score, place[1].id)))
        return [some[: self.count] for some in self._filtered(ordered, texts)]

    def _forget_deleted(self) -> None:
        """What was deleted from a bank since the last recall, by whichever process, goes from the RAM cache too."""
        for b, bank in enumerate(self.banks):
            version = bank.version
            if version != self._versions[b]:
                for id in bank.missing([*self.cache.ids(b), *(id for holder, id in self._waiting if holder == b)]):
                    self.cache.drop((b, id))
                    self._waiting.pop((b, id), None)
                self._versions[b] = version

    def _filtered(self, found: list[list[_Found]], texts: Sequence[str]) -> list[list[_Found]]:
        """Without hits that score too low or repeat the text that is being asked."""
        if self.min_score is not None:
            found = [[hit for hit in some if hit[1].score >= self.min_score] for some in found]
        if self.max_overlap is None:
            return found
        limit, decoder = self.max_overlap, self.banks[0].decoder
        assert decoder is not None

        def tokens(words: str) -> list[int]:
            return list(decoder.tokenizer(words, add_special_tokens=False)["input_ids"])

        ids = {key: tokens(reference.text) for key, reference in self._references(found).items()}
        asked = [tokens(text) for text in texts]
        return [
            [(b, hit) for b, hit in some if overlap(read, ids[b, hit.id]) <= limit]
            for some, read in zip(found, asked, strict=True)
        ]

    def _fixed(self, queries: Sequence[str]) -> list[list[_Found]]:
        """Where the fixed references lie, for each query; texts that were never encoded are encoded and stored now."""
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
            lazy = Settings.load(first.path).max_bytes is not None  # then what is kept is a matter of its use
            write(first.decoder, [r for r in texts if r.id in missing], first, lazy=lazy)
        wanted = [r.id if isinstance(r, Reference) else r for r in self.fixed]
        absent = [set(bank.missing(wanted)) for bank in self.banks]
        places = []
        for id in wanted:
            holder = next((b for b, lacks in enumerate(absent) if id not in lacks), None)
            if holder is None:
                raise BankError(f"found no memory {id!r} in {self.banks[0].address}, expected an id that `write` stored there")
            places.append((holder, Hit(id, 0.0)))
        return [places for _ in queries]

    def _references(self, found: Sequence[Sequence[_Found]]) -> dict[_Key, Reference]:
        """Text and first place of everything that was found, each bank asked once."""
        wanted = _by_bank((b, hit.id) for some in found for b, hit in some)
        read = {b: self.banks[b].references(ids) for b, ids in wanted.items()}
        return {(b, id): spans[0] for b, some in read.items() for id, spans in some.items()}

    def _loaded(self, queries: Sequence[str], found: Sequence[Sequence[_Found]]) -> list[Recalled]:
        """Memories from the cache, the disk or their texts; what all queries want of one bank comes in one read."""
        known = self._known(found)
        left_out = [tuple(hit.id for b, hit in some if (b, hit.id) in known) for some in found]
        found = [[(b, hit) for b, hit in some if (b, hit.id) not in known] for some in found]
        keys = [[(b, hit.id) for b, hit in some] for some in found]
        texts = self._references(found)
        held = {key: memory for key in texts if (memory := self.cache.get(key)) is not None}
        absent, records = set(texts) - set(held), dict[_Key, bytes]()
        for b, ids in _by_bank(key for some in keys for key in some if key in absent).items():
            for id, one in zip(ids, self.banks[b].load(ids), strict=True):
                held[b, id] = one.memory
                self.cache.put((b, id), one.memory)
                if one.record is not None:
                    records[b, id] = one.record
        if self.counted:
            self._count([*keys, *([key for key in known if key[1] in some] for some in left_out)], records, known)
        versions = tuple(map(version_name, self._versions))
        recalled = []
        for query, some, wanted, without in zip(queries, found, keys, left_out, strict=True):
            fresh = absent & set(wanted)  # the first query that wants a memory is the one that reads it
            absent -= fresh
            made = fresh & set(records)
            size = sum(self.banks[b].record_bytes for b, _ in fresh - made)
            memories, references = tuple(held[key] for key in wanted), tuple(texts[key] for key in wanted)
            hits = tuple(hit for _, hit in some)
            recalled.append(Recalled(query, hits, memories, references, size, len(made), without, versions))
        return recalled

    def _known(self, found: Sequence[Sequence[_Found]]) -> set[_Key]:
        """What the model knows without reading."""
        wanted = _by_bank((b, hit.id) for some in found for b, hit in some)
        return {(b, id) for b, ids in wanted.items() for id in self.banks[b].known(ids)}

    def _count(self, keys: Sequence[Sequence[_Key]], records: Mapping[_Key, bytes], known: Iterable[_Key]) -> None:
        """Note the uses of each bank, and settle in which tier the texts are that were encoded now."""
        known = set(known)
        for b, bank in enumerate(self.banks):
            used = [key[1] for some in keys for key in some if key[0] == b]
            made = {id: record for (holder, id), record in records.items() if holder == b}
            if used:
                inside = [id for id in used if (b, id) in known]
                bank.count_uses(used, self._versions[b], made, inside)
            waiting = {id: self._waiting.pop((b, id)) for id in dict.fromkeys(used) if (b, id) in self._waiting}
            offered = waiting | made
            if offered and (tiers := self._tiers[b]) is not None and tiers.settle(offered) is None:
                self._wait({(b, id): record for id, record in offered.items()})

    def _wait(self, records: Mapping[_Key, bytes]) -> None:
        """Hold records that could not be settled until their next use; the newest ones, as many as half of the cache may be."""
        self._waiting |= records
        while self._waiting and sum(map(len, self._waiting.values())) > self.cache.limit_bytes // 2:
            del self._waiting[next(iter(self._waiting))]


def _by_bank(keys: Iterable[_Key]) -> dict[int, list[str]]:
    """Different ids of each bank, in the order of the keys."""
    found: dict[int, dict[str, None]] = {}
    for b, id in keys:
        found.setdefault(b, {})[id] = None
    return {b: list(ids) for b, ids in found.items()}
