"""What can be read of a bank, wherever its files lie: texts, vectors, memories, and earlier states (docs/bank.md)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from memory3.catalogue import Catalogue, Hit, Span
from memory3.embedding import Embedder, VectorSpace, embedder_named
from memory3.manifest import FORMAT_VERSION, Manifest
from memory3.shards import NO_RECORD, Place
from memory3.spec import BankError, Memory, MemorySpec, Reference
from memory3.states import Version
from memory3.tables import check_id, is_id

if TYPE_CHECKING:
    import pyarrow as pa


AT_ONCE = 64
"""Texts that are encoded together."""


class MemoryWriter(Protocol):
    """What a bank and `write` need of a decoder."""

    spec: MemorySpec
    """Resolved: layers and heads spelled out."""
    tokenizer: Any
    adapters: Sequence[str]
    """Fingerprints of the adapters that were merged into the model."""

    @property
    def head_dim(self) -> int:
        """`D`."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""

    def identity(self) -> dict[str, Any]:
        """JSON values `model`, `weights`, `tokenizer`, `rotation`, `spec`, `head_dim`, `dtype` (docs/bank.md)."""

    @property
    def window(self) -> int:
        """Most tokens of one sequence."""

    def encode(self, texts: Sequence[str]) -> list[Memory]:
        """Memories `(P, K, D)` of the texts, in order."""

    def encode_in_context(self, texts: Sequence[str]) -> list[Memory]:
        """The same of neighbouring texts, each of which sees those before it."""


class Records(Protocol):
    """Where key-values are read from."""

    def read(self, shard: int, slot: int) -> bytearray:
        """One record; `BankError` where it cannot be read."""

    def describe(self, place: Place) -> str:
        """The place in words, for errors."""

    def total_bytes(self) -> int:
        """Bytes of all records, of those too that no row points at."""

    def close(self) -> None:
        """Let go of what is held; a later read takes it again."""


def lengths_of(decoder: MemoryWriter | None, references: Sequence[Reference]) -> list[int]:
    """Tokens of each text."""
    assert decoder is not None, "only a bank with its writer is written to"
    return [len(ids) for ids in decoder.tokenizer([r.text for r in references], add_special_tokens=False)["input_ids"]]


def encodable(decoder: MemoryWriter | None, references: Sequence[Reference]) -> list[int]:
    """The same of texts that will be encoded when they are recalled; `BankError` where that would not be possible then."""
    assert decoder is not None, "only a bank with its writer is written to"
    lengths, most = lengths_of(decoder, references), decoder.spec.reference_length
    for reference, length in zip(references, lengths, strict=True):
        if not 1 <= length <= most:
            raise BankError(
                f"found a reference at {reference.source!r}:{reference.start} with {length} tokens, expected 1 to {most}: "
                "split it with memory3.references(SOURCE, decoder)"
            )
    return lengths


@dataclass(frozen=True)
class Loaded:
    """A memory, and its record where it was kept as text and had to be encoded."""

    memory: Memory
    record: bytes | None = None


class BankReader:
    """A bank to look at and to read from.

    Args:
        address: for people.
        decoder: the model that reads; `None` opens the bank to look at it.
        manifest: what wrote it.
        catalogue: its tables.
        records: its key-values.
        embedder: must be the one that made the vectors; by default that is loaded by its name when it is needed.
        at: an earlier state, a tag or a version as `versions` gives it.

    Raises:
        BankError: a state that is not kept.
        BankMismatch: written by another model, tokenizer, rotation, spec or embedder.
    """

    def __init__(
        self,
        address: str,
        decoder: MemoryWriter | None,
        manifest: Manifest,
        catalogue: Catalogue,
        records: Records,
        embedder: Embedder | None,
        at: str | None,
    ) -> None:
        self.address, self.decoder, self.manifest, self.at = address, decoder, manifest, at
        self._catalogue, self._records, self._embedder = catalogue, records, embedder
        self._fits: VectorSpace | None = None
        if decoder is not None:
            manifest.check(address, decoder.identity())
        if at is not None:
            self._catalogue = catalogue.at(self._version_named(at))
        if embedder is not None:
            self._check_embedder(embedder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        """Memories in the bank."""
        return len(self._catalogue)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and is_id(id) and bool(self._catalogue.locate([id]))

    @property
    def record_bytes(self) -> int:
        """Bytes that reading one memory takes from disk."""
        return self.manifest.record_bytes

    def close(self) -> None:
        """Unmap the key-value files; the bank may be used again, and maps them again."""
        self._records.close()

    def ids(self) -> list[str]:
        """Ids of all memories, ascending."""
        return self._catalogue.ids()

    def sources(self) -> dict[str, int]:
        """All sources and how many references each has."""
        return self._catalogue.sources()

    def places(self) -> dict[str, Place]:
        """Shard and slot of every memory's record."""
        return self._catalogue.every_place()

    def tiers(self) -> pa.Table:
        """`id`, `tokens`, `shard` and `adapter` of every reference: a shard below 0 says that it is text alone, an adapter who knows it."""
        return self._catalogue.tiers()

    def lengths(self, ids: Sequence[str]) -> dict[str, int]:
        """Tokens of those references that exist."""
        return self._catalogue.lengths(ids)

    def tier_of_each(self) -> dict[str, str]:
        """`text`, `memory` or `parameters`, by id."""
        table = self.tiers()
        columns = [table[name].to_pylist() for name in ("id", "shard", "adapter")]
        return {id: _tier(shard, adapter) for id, shard, adapter in zip(*columns, strict=True)}

    def spans(self) -> list[tuple[str, str]]:
        """Memory and source of every span."""
        return self._catalogue.every_span()

    def spans_of(self, files: Sequence[str]) -> list[Span]:
        """The spans of some files, with their rows, pages and chapters: id of the memory, source, start, end."""
        return self._catalogue.spans_of(files)

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those ids that the bank has no memory for, in order, each once."""
        wanted = list(dict.fromkeys(ids))
        known = self._catalogue.locate(wanted)
        return [id for id in wanted if id not in known]

    def unwritten(self, ids: Iterable[str]) -> list[str]:
        """Those ids that the bank has no key-values of, in order, each once."""
        wanted = list(dict.fromkeys(ids))
        places = self._catalogue.locate(wanted)
        return [id for id in wanted if places.get(id, NO_RECORD) == NO_RECORD]

    def references(self, ids: Iterable[str]) -> dict[str, list[Reference]]:
        """The text of each memory at every place it came from, by source and span; `BankError` for unknown ids."""
        wanted = list(dict.fromkeys(ids))
        found = self._catalogue.references(wanted)
        self._refuse_unknown(id for id in wanted if id not in found)
        return found

    def in_context(self) -> list[str]:
        """Ids of memories that saw the text before them (`memory3.context`)."""
        return self._catalogue.in_context()

    def read(self, ids: Sequence[str], device: torch.device | str = "cpu") -> list[Memory]:
        """Memories `(P, K, D)` on a device, decoded there, in the dtype of the decoder; each its own copy.

        What is kept as text alone is encoded for this one read, with the same result.

        Raises:
            BankError: an id is unknown, its record is damaged, or there is a text to encode and no model.
        """
        return [one.memory for one in self.load(ids, device)]

    def load(self, ids: Sequence[str], device: torch.device | str = "cpu") -> list[Loaded]:
        """Memories as `read` gives them, and the records of those that were encoded for it."""
        self._check()
        places = self._catalogue.locate(ids)
        self._refuse_unknown(id for id in ids if id not in places)
        kept = [(id, places[id]) for id in dict.fromkeys(ids) if places[id] != NO_RECORD]
        try:
            found = dict(zip((id for id, _ in kept), self._decoded(kept, device), strict=True))
        except BankError:  # a record that moved, or that is damaged: which one?
            found = {id: memory for id, place in kept if (memory := self._read(id, place, device)) is not None}
        made = self._encoded([id for id in dict.fromkeys(ids) if id not in found])
        found |= self._from_records(made, device)
        repeated = len(ids) > len(found)
        return [Loaded(self._in_dtype(found[id].copy() if repeated else found[id]), made.get(id)) for id in ids]

    def count_uses(self, ids: Sequence[str], since: Version, encoded: Iterable[str] = (), known: Iterable[str] = ()) -> None:
        """Note that these were recalled; a bank that is only read keeps no history."""

    def adapters_of(self, ids: Iterable[str]) -> dict[str, str]:
        """The adapter of each of the ids whose text is in the parameters of one."""
        return self._catalogue.adapters_of(ids)

    def known(self, ids: Iterable[str]) -> list[str]:
        """Those of the ids that the model knows by itself, from an adapter that `memory3 apply` has noted here."""
        if self.decoder is None or not self.decoder.adapters:
            return []
        return [id for id, adapter in self.adapters_of(ids).items() if adapter in self.decoder.adapters]

    def search(self, query: str, k: int) -> list[Hit]:
        """The `k` memories whose text shares most with the words of the query (BM25); score descending, then id."""
        return self._catalogue.search(query, k)

    def nearest(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For each question the `k` memories whose vectors have the largest cosine with its own; then by id.

        Raises:
            BankError: the bank has no vectors, or its embedder cannot be loaded.
        """
        return self._catalogue.nearest(self.embedder.embed(queries, query=True), k) if queries else []

    @property
    def space(self) -> VectorSpace | None:
        """Which embedder the bank's vectors are of; `None` where it has none."""
        return self._catalogue.space

    @property
    def vectors_missing(self) -> int:
        """Memories that a search by meaning does not find, for their vectors were never made."""
        return self._catalogue.vectors_missing()

    @property
    def embedder(self) -> Embedder:
        """What made the bank's vectors, loaded when it is first asked for; `BankError` where it has none."""
        space = self.space
        if space is None:
            raise BankError(
                f"{self.address} has no vectors, expected some to search by meaning: make them with memory3 bank embed {self.address}"
            )
        if self._embedder is None or self._fits != space:
            if self._embedder is None or self._embedder.name != space.embedder:
                self._embedder = embedder_named(space.embedder)
            space.check(self.address, self._embedder)
            self._fits = space
        return self._embedder

    def stats(self) -> dict[str, Any]:
        """Counts and sizes, as plain JSON values; sizes in bytes."""
        spec = MemorySpec.from_json(self.manifest.identity["spec"])
        count, total, space = len(self), self.total_bytes(), self.space
        return {
            "path": self.address,
            "references": count,
            "sources": len(self.sources()),
            "bytes": total,
            "bytes_per_reference": self.record_bytes,
            "shard_bytes": self._records.total_bytes(),
            "text_bytes": self._catalogue.text_bytes(),
            "model": self.manifest.identity["model"],
            "layers": list(spec.layers or ()),
            "heads": [list(row) for row in spec.heads or ()],
            "tokens_per_head": spec.tokens_per_head,
            "codec": self.manifest.codec.name,
            "embedder": None if space is None else space.embedder,
            "vectors_missing": self.vectors_missing,
            "created": self.manifest.created,
            "created_by": self.manifest.created_by,
            "format_version": FORMAT_VERSION,
        }

    def where(self, condition: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """`id`, `text`, `tokens` and `created` of the memories that an SQL condition on these selects: the first `limit` by id."""
        return self._catalogue.where(condition, limit)

    # States

    @property
    def version(self) -> Version:
        """Changes whenever anything is committed to the bank."""
        return self._catalogue.version

    def versions(self) -> list[tuple[datetime, str]]:
        """States that `at` can show, oldest first: when each began, and its name."""
        return [(made, version_name(version)) for made, version in self._catalogue.states.versions()]

    def tags(self) -> dict[str, str]:
        """Tagged states and their versions. A tag is kept until a deletion: that drops all of them."""
        return {name: version_name(version) for name, version in self._catalogue.states.tags().items()}

    def _encoded(self, ids: Sequence[str]) -> dict[str, bytes]:
        """Records of texts that have none."""
        if not ids:
            return {}
        if self.decoder is None:
            raise BankError(
                f"{self.address} was opened without a model and keeps {len(ids)} references as text, expected memories: open it with "
                "the model that wrote it"
            )
        found = self._catalogue.references(ids)
        self._refuse_unknown(id for id in ids if id not in found)
        texts = [found[id][0].text for id in ids]
        parts = [texts[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE)]
        memories = [self._in_own_dtype(memory) for part in parts for memory in self.decoder.encode(part)]
        codec, shape = self.manifest.codec, self.manifest.shape
        return {id: codec.encode(memory, shape, id) for id, memory in zip(ids, memories, strict=True)}

    def _in_own_dtype(self, memory: Memory) -> Memory:
        """In the dtype of the model that wrote the bank."""
        dtype = getattr(torch, self.manifest.identity["dtype"])
        return Memory(memory.keys.to(dtype), memory.values.to(dtype), memory.positions)

    def _from_records(self, records: Mapping[str, bytes], device: torch.device | str) -> dict[str, Memory]:
        rows, names = [bytearray(record) for record in records.values()], [f"text {id}, encoded" for id in records]
        memories = self.manifest.codec.decode_all(rows, self.manifest.shape, list(records), names, device)
        return dict(zip(records, memories, strict=True))

    def _read(self, id: str, place: Place, device: torch.device | str) -> Memory | None:
        """One memory; looked up again where a writer moved or erased the record since. `None`: it is text now."""
        try:
            [memory] = self._decoded([(id, place)], device)
        except BankError:
            now = self._catalogue.locate([id])
            self._refuse_unknown(() if id in now else (id,))
            if now[id] == place:
                raise
            if now[id] == NO_RECORD:
                return None
            [memory] = self._decoded([(id, now[id])], device)
        return memory

    def _in_dtype(self, memory: Memory) -> Memory:
        dtype = memory.keys.dtype if self.decoder is None else self.decoder.dtype
        return Memory(memory.keys.to(dtype), memory.values.to(dtype), memory.positions)

    def _decoded(self, rows: Sequence[tuple[str, Place]], device: torch.device | str) -> list[Memory]:
        records = [self._records.read(*place) for _, place in rows]
        names = [self._records.describe(place) for _, place in rows]
        return self.manifest.codec.decode_all(records, self.manifest.shape, [id for id, _ in rows], names, device)

    def _version_named(self, at: str) -> Version:
        """The versions that a tag or a name of a version stands for."""
        kept = {version_name(version): version for _, version in self._catalogue.states.versions()}
        found = self._catalogue.states.tags().get(at, kept.get(at))
        if found is None:
            raise BankError(
                f"{self.address} has no state {at!r}, expected a tag or a version that memory3 bank versions {self.address} lists: a state "
                "without a tag is kept for an hour, and none outlives a deletion"
            )
        return found

    def _check_embedder(self, embedder: Embedder) -> None:
        space = self.space
        if space is None:
            raise BankError(
                f"{self.address} has no vectors, expected some of {embedder.name}: make them with memory3 bank embed {self.address}"
            )
        space.check(self.address, embedder)
        self._fits = space

    def _refuse_unknown(self, ids: Iterable[str]) -> None:
        unknown = [check_id(id) for id in ids]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise BankError(f"{self.address} has no memory {unknown[0]}{more}: it was deleted, or never written here")

    def _check(self) -> None:
        """Raise `BankMismatch` where this became another bank since it was opened."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Bytes of all files of the bank."""


def _tier(shard: int, adapter: str | None) -> str:
    return "parameters" if adapter is not None else "memory" if shard >= 0 else "text"


def version_name(version: Version) -> str:
    """A version of the two tables for people: `12.9`."""
    return f"{version[0]}.{version[1]}"
