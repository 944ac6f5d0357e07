"""Texts, sources and vectors of a bank, and where its records lie (docs/bank.md)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from memory3.documents import files_of
from memory3.embedding import VectorSpace
from memory3.shards import Place
from memory3.spec import BankError, Reference
from memory3.states import States, Version
from memory3.tables import (
    ADAPTER,
    CONTEXT,
    SPAN,
    VECTOR,
    Table,
    among,
    batches,
    check_id,
    memories_schema,
    quoted,
    sources_schema,
    spans_of,
    unreadable,
    writing,
)
from memory3.tables import create as create_tables

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FOLDER = "index.lance"
_TIES = 32
KEPT_VERSIONS = timedelta(hours=1)
PROBED, REFINED = 112, 6
"""Parts of an approximate index that a search looks at (of 1,000 for a million vectors), and how many candidates per hit it then compares
exactly (figures: docs/results.md)."""

Span = tuple[str, str, int, int]
"""A row of `sources`: id of the memory, source, first character, character behind the last."""


@dataclass(frozen=True)
class Hit:
    """A found memory: the larger the score, the closer to the query."""

    id: str
    score: float


@dataclass(frozen=True)
class Entry:
    """A new row of `memories`: a reference, its length in tokens, where its record lies, and its vector `(E,)`."""

    reference: Reference
    tokens: int
    place: Place
    vector: np.ndarray | None = None


class Catalogue:
    """The tables `memories` (one row per memory) and `sources` (one row per memory, source and span).

    Every call sees what other processes committed before it. Only `Bank` writes, under its lock.

    Args:
        folder: a path, or an address as LanceDB takes it.
        create: make the tables where there are none.
        space: which vectors new tables hold; none by default.

    Raises:
        BankError: the tables are missing or cannot be opened.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        create: bool = False,
        space: VectorSpace | None = None,
    ) -> None:
        import lancedb

        self.folder = str(folder)
        try:
            database = lancedb.connect(self.folder, read_consistency_interval=timedelta(0))
            if create:
                create_tables(database, None if space is None else space.field(VECTOR))
            self._memories = Table(database, self.folder, "memories")
            self._sources = Table(database, self.folder, "sources")
            self._newest = self._memories
            self._seen: tuple[int, dict[str, Place]] = -1, {}
            self._database = database
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BankError(f"{folder} cannot be opened ({reason}): restore it from a copy, or write a new bank") from error

    def at(self, version: Version) -> Catalogue:
        """An earlier state; records are found where the newest one says they lie."""
        earlier = copy(self)
        earlier._memories, earlier._sources = (
            Table(self._database, self.folder, table.name, at) for table, at in zip(self._tables, version, strict=True)
        )
        return earlier

    def _has(self, column: str) -> bool:
        return self._memories.has(column)

    @property
    def space(self) -> VectorSpace | None:
        """Which vectors the table holds now, whoever changed that; `None` where it holds none."""
        return VectorSpace.from_field(self._memories.schema.field(VECTOR)) if self._has(VECTOR) else None

    def __len__(self) -> int:
        return int(self._memories.read(lambda table: table.count_rows()))

    def locate(self, ids: Iterable[str]) -> dict[str, Place]:
        """Places of those references that exist; `NO_RECORD` for texts. What `references` has just seen is not looked up again."""
        wanted = list(ids)
        version, seen = self._seen
        if seen and all(id in seen for id in wanted) and version == self._newest.version:
            return {id: seen[id] for id in wanted}
        columns = ("id", "shard", "slot")
        return {row["id"]: (row["shard"], row["slot"]) for row in self._newest.rows_with("id", wanted, columns)}

    def references(self, ids: Iterable[str]) -> dict[str, list[Reference]]:
        """For each memory that exists its text at every place it came from, ordered by source and span."""
        wanted = dict.fromkeys(ids)
        with ThreadPoolExecutor(1) as beside:  # LanceDB answers one query in about the time of two at once
            asked = beside.submit(lambda: list(self._spans(wanted)))
            rows = self._seen_rows(list(wanted))
            spans = asked.result()
        texts = {row["id"]: Reference(row["text"], context=row.get(CONTEXT) or "") for row in rows}
        for id, text in texts.items():
            if text.id != id:
                raise BankError(
                    f"the text of memory {id} is not the one that was written: delete the memory and write its document again"
                )
        found: dict[str, list[Reference]] = {id: [] for id in wanted if id in texts}
        for id, source, start, end in sorted(spans):
            if id not in wanted:  # a damaged value behind an index that is whole
                raise unreadable(ValueError(f"source {source!r} names memory {id}, which was not asked for"))
            if id in found:
                found[id].append(replace(texts[id], source=source, start=start, end=end))
        return {id: spans or [texts[id]] for id, spans in found.items()}

    def _seen_rows(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Rows with texts; the places in them are kept for `locate`, with the version that they are of."""
        columns = ("id", "text", "shard", "slot", *((CONTEXT,) if self._has(CONTEXT) else ()))
        version = self._memories.version
        rows = list(self._memories.rows_with("id", ids, columns))
        if self._newest is self._memories and version == self._memories.version:
            self._seen = version, {row["id"]: (row["shard"], row["slot"]) for row in rows}
        return rows

    def in_context(self) -> list[str]:
        """Ids of memories that saw their surroundings."""
        return [row["id"] for row in self._memories.rows(f"{CONTEXT} != ''", ("id",))] if self._has(CONTEXT) else []

    def ids(self) -> list[str]:
        """All ids, ascending."""
        return sorted(self._memories.column("id")["id"].to_pylist())

    def sources(self) -> dict[str, int]:
        """All sources and how many spans each has, by name."""
        found = self._sources.column("source")
        counts = found["source"].value_counts().to_pylist()
        return {row["values"]: row["counts"] for row in sorted(counts, key=lambda row: str(row["values"]))}

    def text_bytes(self) -> int:
        """Bytes of all texts in UTF-8."""
        import pyarrow.compute as pc

        texts = self._memories.column("text")["text"]
        return int(pc.sum(pc.binary_length(texts)).as_py() or 0)

    def search(self, text: str, k: int) -> list[Hit]:
        """The `k` best memories by BM25 for the words of `text`; score descending, then id.

        Ties are settled by id among the first `k + 32` that the index returns.
        """
        from lancedb.query import MatchQuery

        if k < 1 or not text.strip():
            return []
        query = MatchQuery(text.encode("utf-8", "replace").decode("utf-8"), "text")
        found = self._memories.read(
            lambda table: table.search(query, query_type="fts").select(["id", "_score"]).limit(k + _TIES).to_arrow()
        )
        hits = [Hit(row["id"], float(row["_score"])) for row in found.to_pylist()]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]

    def nearest(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """For each vector `(Q, E)` the `k` memories with the largest cosine, then by id; those without a vector are not found.

        Exact up to `FEWEST_FOR_ANN` memories; beyond, the best of the `PROBED` nearest parts of the index.
        """
        if k < 1:
            return [[] for _ in vectors]
        found = [self._memories.read(partial(_nearest, vector=vector, k=k + _TIES)).to_pylist() for vector in vectors]
        hits = [[Hit(row["id"], 1.0 - float(row["_distance"])) for row in rows] for rows in found]
        return [sorted(some, key=lambda hit: (-hit.score, hit.id))[:k] for some in hits]

    def vectors(self) -> np.ndarray:
        """All vectors `(N, E)` float16, in the order of `column_of_ids`; memories without one are left out."""
        column = self._memories.column(VECTOR)[VECTOR].combine_chunks().drop_null()
        found: np.ndarray = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        return found

    def column_of_ids(self) -> list[str]:
        """Ids of memories that have a vector, in the order of the table."""
        found: list[str] = self._memories.read(
            lambda table: table.search().where(f"{VECTOR} IS NOT NULL").select(["id"]).to_arrow()["id"].to_pylist()
        )
        return found

    def vectors_missing(self) -> int:
        """Memories that have no vector, in a bank that has vectors."""
        found = self._memories.read(lambda table: table.count_rows(f"{VECTOR} IS NULL")) if self._has(VECTOR) else 0
        return int(found)

    def without_vector(self, limit: int) -> list[tuple[str, str]]:
        """Ids and texts of memories that have no vector, at most `limit` of them."""
        rows = self._memories.read(
            lambda table: table.search().where(f"{VECTOR} IS NULL").select(["id", "text"]).limit(limit).to_arrow().to_pylist()
        )
        return [(row["id"], row["text"]) for row in rows]

    def make_space(self, space: VectorSpace | None) -> None:
        """Take vectors of this space from now on; those of another go. `None`: none at all."""
        with writing(self.folder):
            if self.space is not None:
                self._memories.raw.drop_columns([VECTOR])
            if space is not None:
                self._memories.raw.add_columns(space.field(VECTOR))

    def fill_vectors(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Store vectors `(N, E)` of some memories, in one commit."""
        import pyarrow as pa

        with writing(self.folder):
            self._memories.update({"id": pa.array(ids, pa.string()), VECTOR: _halves(vectors)})

    def add_memories(self, entries: Sequence[Entry]) -> None:
        """One committed batch of new memories; with a space each entry has its vector."""
        import numpy as np
        import pyarrow as pa

        now = datetime.now(UTC)
        rows = [
            {
                "id": e.reference.id,
                "text": e.reference.text,
                "tokens": e.tokens,
                "shard": e.place[0],
                "slot": e.place[1],
                "created": now,
            }
            for e in entries
        ]
        table = pa.Table.from_pylist(rows, schema=memories_schema())
        space = self.space
        if space is not None and rows:
            vectors = [e.vector for e in entries if e.vector is not None]
            assert len(vectors) == len(rows), "a vector for each memory, or for none"
            table = table.append_column(space.field(VECTOR), _halves(np.stack(vectors)))
        with writing(self.folder):
            contexts = [e.reference.context or None for e in entries]
            if any(contexts) and not self._has(CONTEXT):
                self._memories.raw.add_columns(pa.field(CONTEXT, pa.string()))
            if self._has(CONTEXT):
                table = table.append_column(CONTEXT, pa.array(contexts, pa.string()))
            self._memories.raw.add(table)

    def add_spans(self, references: Iterable[Reference]) -> int:
        """One committed batch of those spans that are new; their number."""
        import pyarrow as pa

        wanted = dict.fromkeys((r.id, r.source, r.start, r.end) for r in references)
        known = set(self._spans(dict.fromkeys(row[0] for row in wanted)))
        new = [dict(zip(SPAN, row, strict=True)) for row in wanted if row not in known]
        if new:
            with writing(self.folder):
                self._sources.raw.add(pa.Table.from_pylist(new, schema=sources_schema()))
        return len(new)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove memories and all their spans."""
        with writing(self.folder):
            for some in batches(ids):
                self._memories.raw.delete(among("id", some))
                self._sources.raw.delete(among("memory", some))

    def delete_spans(self, spans: Iterable[Span]) -> None:
        """Remove single rows of `sources`."""
        conditions = [
            f"(memory = '{check_id(id)}' AND source = {quoted(source)} AND start = {int(start)} AND \"end\" = {int(end)})"
            for id, source, start, end in spans
        ]
        with writing(self.folder):
            for some in batches(conditions):
                self._sources.raw.delete(" OR ".join(some))

    def spans_of(self, files: Sequence[str]) -> list[Span]:
        """All spans of some files, of their rows, pages and chapters too."""
        return spans_of(self._sources, files, files_of)

    def left_without(self, spans: Iterable[Span]) -> list[str]:
        """Memories that would be left without any span if these went."""
        gone = set(spans)
        ids = list(dict.fromkeys(id for id, _, _, _ in gone))
        kept = {span[0] for span in self._spans(ids) if span not in gone}
        return [id for id in ids if id not in kept]

    def where(self, condition: str | None, limit: int | None = None) -> list[dict[str, Any]]:
        """Rows `id`, `text`, `tokens`, `created` of `memories` that an SQL condition on these columns selects, by id; the
        first `limit` of them.

        Raises:
            BankError: LanceDB does not understand the condition.
        """
        found = self._memories.where(("id", "text", "tokens", "created"), condition)
        return sorted(found, key=lambda row: row["id"])[:limit]

    def every_place(self) -> dict[str, Place]:
        """Places of all records; what is kept as text alone has none."""
        rows = self._newest.column("id", "shard", "slot").to_pylist()
        return {row["id"]: (row["shard"], row["slot"]) for row in rows if row["shard"] >= 0}

    def every_span(self) -> list[tuple[str, str]]:
        """Memory and source of every row of `sources`."""
        rows = self._sources.column("memory", "source").to_pylist()
        return [(row["memory"], row["source"]) for row in rows]

    def move(self, places: Mapping[str, Place]) -> None:
        """Note new places of records, in one commit."""
        import pyarrow as pa

        shards, slots = (pa.array([place[n] for place in places.values()], pa.int32()) for n in (0, 1))
        with writing(self.folder):
            self._memories.update({"id": pa.array(list(places), pa.string()), "shard": shards, "slot": slots})

    def give(self, ids: Sequence[str], adapter: str | None) -> None:
        """Note which adapter knows these texts, if any, and that no record of theirs is kept, in one commit."""
        import pyarrow as pa

        with writing(self.folder):
            if not self._has(ADAPTER):
                self._memories.raw.add_columns(pa.field(ADAPTER, pa.string()))
            none = pa.array([-1] * len(ids), pa.int32())
            names = pa.array([adapter] * len(ids), pa.string())
            self._memories.update({"id": pa.array(ids, pa.string()), "shard": none, "slot": none, ADAPTER: names})

    def tiers(self) -> pa.Table:
        """`id`, `tokens`, `shard` and `adapter` of every row; a shard below 0 is none, and so is an adapter of null."""
        import pyarrow as pa

        if self._newest.has(ADAPTER):
            return self._newest.column("id", "tokens", "shard", ADAPTER)
        found = self._newest.column("id", "tokens", "shard")
        return found.append_column(ADAPTER, pa.nulls(len(found), pa.string()))

    def lengths(self, ids: Iterable[str]) -> dict[str, int]:
        """Tokens of those references that exist."""
        return {row["id"]: row["tokens"] for row in self._newest.rows_with("id", ids, ("id", "tokens"))}

    def adapters_of(self, ids: Iterable[str]) -> dict[str, str]:
        """The adapter of each of the ids that one knows."""
        if not self._newest.has(ADAPTER):
            return {}
        rows = self._newest.rows_with("id", ids, ("id", ADAPTER))
        return {row["id"]: row[ADAPTER] for row in rows if row[ADAPTER] is not None}

    @property
    def version(self) -> Version:
        """Changes whenever anything is committed to the tables."""
        return self._memories.version, self._sources.version

    @property
    def states(self) -> States:
        """Earlier states and their tags."""
        return States(self.folder, self._tables)

    @property
    def _tables(self) -> tuple[Table, Table]:
        return self._memories, self._sources

    def index_bytes(self) -> dict[str, int]:
        """Bytes of the indexes of `memories`, by column."""
        return self._memories.index_bytes()

    def index_words(self) -> None:
        """Make the full-text index anew, for all texts at once."""
        with writing(self.folder):
            self._memories.index_words()

    def optimise(self, keep: timedelta = KEPT_VERSIONS) -> None:
        """Bring the indexes up to date, join small files, and drop versions of the tables older than `keep`, but for tagged ones."""
        with writing(self.folder):
            self.states.tidy()
            for table in self._tables:
                table.optimise(keep)

    def purge(self) -> None:
        """Take deleted rows out of every file: data is rewritten without them, indexes are made anew, and all older versions
        go, tagged ones too. Deletion beats snapshots.
        """
        with writing(self.folder):
            for table in self._tables:
                table.purge()

    def _spans(self, ids: Iterable[str]) -> Iterator[Span]:
        for row in self._sources.rows_with("memory", ids, SPAN):
            yield row["memory"], row["source"], row["start"], row["end"]


def _nearest(table: Any, vector: np.ndarray, k: int) -> Any:
    query = table.search(vector, vector_column_name=VECTOR).distance_type("dot").nprobes(PROBED).refine_factor(REFINED)
    return query.select(["id", "_distance"]).limit(k).to_arrow()


def _halves(vectors: np.ndarray) -> pa.Array:
    """Vectors `(N, E)` as a column of float16."""
    import numpy as np
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), vectors.shape[1])
