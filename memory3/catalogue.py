"""Texts and sources of a bank, and where its records lie: two LanceDB tables with a full-text index (docs/bank.md)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory3.documents import is_part
from memory3.shards import Place
from memory3.spec import BankError, Reference

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = "index.lance"
_IDS_PER_QUERY = 1024
_TIES = 32
KEPT_VERSIONS = timedelta(hours=1)
_FILES_PER_QUERY = 128
_ATTEMPTS = 4
_ID = re.compile(r"[0-9a-f]{32}")


Span = tuple[str, str, int, int]
"""A row of `sources`: id of the memory, source, first character, character behind the last."""


@dataclass(frozen=True)
class Hit:
    """A found memory: the larger the score, the closer to the query."""

    id: str
    score: float


@dataclass(frozen=True)
class Entry:
    """A new row of `memories`: a reference, its length in tokens, and where its record lies."""

    reference: Reference
    tokens: int
    place: Place


class Catalogue:
    """The tables `memories` (one row per memory) and `sources` (one row per memory, source and span).

    Every call sees what other processes committed before it. Only `Bank` writes, under its lock.

    Raises:
        BankError: the tables are missing or cannot be opened.
    """

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        import lancedb

        try:
            database = lancedb.connect(folder, read_consistency_interval=timedelta(0))
            if create:
                _create(database)
            self._folder = Path(folder)
            self._memories, self._sources = database.open_table("memories"), database.open_table("sources")
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BankError(f"{folder} cannot be opened ({reason}): restore it from a copy, or write a new bank") from error

    def __len__(self) -> int:
        return int(_read(self._memories, lambda t: t.count_rows()))

    def locate(self, ids: Iterable[str]) -> dict[str, Place]:
        """Places of those memories that exist."""
        columns = ("id", "shard", "slot")
        return {row["id"]: (row["shard"], row["slot"]) for row in _rows_with(self._memories, "id", ids, columns)}

    def references(self, ids: Iterable[str]) -> dict[str, list[Reference]]:
        """For each memory that exists its text at every place it came from, ordered by source and span."""
        wanted = list(ids)
        texts = {row["id"]: row["text"] for row in _rows_with(self._memories, "id", wanted, ("id", "text"))}
        for id, text in texts.items():
            if Reference(text).id != id:
                raise BankError(
                    f"the text of memory {id} is not the one that was written: delete the memory and write its document again"
                )
        found: dict[str, list[Reference]] = {id: [] for id in wanted if id in texts}
        for id, source, start, end in sorted(self._spans(texts)):
            found[id].append(Reference(texts[id], source, start, end))
        return {id: spans or [Reference(texts[id])] for id, spans in found.items()}

    def ids(self) -> list[str]:
        """All ids, ascending."""
        return sorted(_read(self._memories, lambda t: t.search().select(["id"]).to_arrow())["id"].to_pylist())

    def sources(self) -> dict[str, int]:
        """All sources and how many spans each has, by name."""
        found = _read(self._sources, lambda t: t.search().select(["source"]).to_arrow())
        counts = found["source"].value_counts().to_pylist()
        return {row["values"]: row["counts"] for row in sorted(counts, key=lambda row: str(row["values"]))}

    def text_bytes(self) -> int:
        """Bytes of all texts in UTF-8."""
        import pyarrow.compute as pc

        texts = _read(self._memories, lambda t: t.search().select(["text"]).to_arrow())["text"]
        return int(pc.sum(pc.binary_length(texts)).as_py() or 0)

    def search(self, text: str, k: int) -> list[Hit]:
        """The `k` best memories by BM25 for the words of `text`; score descending, then id.

        Ties are settled by id among the first `k + 32` that the index returns.
        """
        from lancedb.query import MatchQuery

        if k < 1 or not text.strip():
            return []
        query = MatchQuery(text.encode("utf-8", "replace").decode("utf-8"), "text")
        found = _read(
            self._memories, lambda t: t.search(query, query_type="fts").select(["id", "_score"]).limit(k + _TIES).to_arrow()
        )
        hits = [Hit(row["id"], float(row["_score"])) for row in found.to_pylist()]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]

    def add_memories(self, entries: Sequence[Entry]) -> None:
        """One committed batch of new memories."""
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
        with _writing(self._folder):
            self._memories.add(pa.Table.from_pylist(rows, schema=_memories_schema()))

    def add_spans(self, references: Iterable[Reference]) -> int:
        """One committed batch of those spans that are new; their number."""
        import pyarrow as pa

        wanted = dict.fromkeys((r.id, r.source, r.start, r.end) for r in references)
        known = set(self._spans(dict.fromkeys(row[0] for row in wanted)))
        new = [dict(zip(_SPAN, row, strict=True)) for row in wanted if row not in known]
        if new:
            with _writing(self._folder):
                self._sources.add(pa.Table.from_pylist(new, schema=_sources_schema()))
        return len(new)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove memories and all their spans."""
        with _writing(self._folder):
            for some in _batches(ids):
                self._memories.delete(_among("id", some))
                self._sources.delete(_among("memory", some))

    def delete_spans(self, spans: Iterable[Span]) -> None:
        """Remove single rows of `sources`."""
        conditions = [
            f"(memory = '{check_id(id)}' AND source = {_quoted(source)} AND start = {int(start)} AND \"end\" = {int(end)})"
            for id, source, start, end in spans
        ]
        with _writing(self._folder):
            for some in _batches(conditions):
                self._sources.delete(" OR ".join(some))

    def spans_of(self, files: Sequence[str]) -> list[Span]:
        """All spans of some files, of their rows, pages and chapters too."""
        found: list[Span] = []
        for n in range(0, len(files), _FILES_PER_QUERY):
            some = files[n : n + _FILES_PER_QUERY]
            condition = " OR ".join(f"starts_with(source, {_quoted(file)})" for file in some)
            rows = _read(self._sources, partial(_selected, condition=condition, columns=_SPAN))
            found += [
                (r["memory"], r["source"], r["start"], r["end"]) for r in rows if any(is_part(r["source"], f) for f in some)
            ]
        return found

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
        columns = ["id", "text", "tokens", "created"]
        query = self._memories.search().select(columns)
        if condition is not None:
            # In parentheses, and the last one on a line of its own: LanceDB ignores what it does not understand behind a
            # condition (LIMIT, a second statement), and what is ignored must not be deleted.
            query = query.where(f"({condition}\n)")
        try:
            found = query.to_arrow().to_pylist()
        except (OSError, RuntimeError, ValueError) as error:
            if condition is None:
                raise _unreadable(error) from error
            reason = str(error).splitlines()[0]
            raise BankError(
                f"found the filter {condition!r} ({reason}), expected SQL on the columns {', '.join(columns)}"
            ) from None
        return sorted(found, key=lambda row: row["id"])[:limit]

    def every_place(self) -> dict[str, Place]:
        """Places of all memories."""
        rows = _read(self._memories, lambda t: t.search().select(["id", "shard", "slot"]).to_arrow()).to_pylist()
        return {row["id"]: (row["shard"], row["slot"]) for row in rows}

    def every_span(self) -> list[tuple[str, str]]:
        """Memory and source of every row of `sources`."""
        rows = _read(self._sources, lambda t: t.search().select(["memory", "source"]).to_arrow()).to_pylist()
        return [(row["memory"], row["source"]) for row in rows]

    def move(self, places: Mapping[str, Place]) -> None:
        """Note new places of records, in one commit."""
        import pyarrow as pa

        columns = {"id": list(places), "shard": [p[0] for p in places.values()], "slot": [p[1] for p in places.values()]}
        schema = pa.schema([_memories_schema().field(name) for name in columns])
        with _writing(self._folder):
            self._memories.merge_insert("id").when_matched_update_all().execute(pa.Table.from_pydict(columns, schema=schema))

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever anything is committed to the tables."""
        return int(self._memories.version), int(self._sources.version)

    def optimise(self, keep: timedelta = KEPT_VERSIONS) -> None:
        """Bring the indexes up to date, join small files, and drop versions of the tables older than `keep`."""
        with _writing(self._folder):
            for table, name in ((self._memories, "memories"), (self._sources, "sources")):
                table.optimize(cleanup_older_than=KEPT_VERSIONS)
                if keep < KEPT_VERSIONS:
                    _drop_versions(table, self._folder / f"{name}.lance", keep)

    def purge(self) -> None:
        """Take deleted rows out of every file: data is rewritten without them, indexes are made anew, and all older versions
        go, tagged ones too. Deletion beats snapshots.
        """
        with _writing(self._folder):
            for table, name in ((self._memories, "memories"), (self._sources, "sources")):
                _purge(table, name, self._folder / f"{name}.lance")

    def _spans(self, ids: Iterable[str]) -> Iterator[Span]:
        for row in _rows_with(self._sources, "memory", ids, _SPAN):
            yield row["memory"], row["source"], row["start"], row["end"]


_SPAN = ("memory", "source", "start", "end")


def check_id(id: str) -> str:
    """The id itself; `BankError` where it is not 32 hexadecimal digits."""
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise BankError(f"found memory id {id!r}, expected 32 hexadecimal digits: take it from a citation or a search")
    return id


def _rows_with(table: Any, column: str, ids: Iterable[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for some in _batches(list(dict.fromkeys(ids))):
        yield from _read(table, partial(_selected, condition=_among(column, some), columns=columns))


def _selected(table: Any, condition: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.search().where(condition).select(list(columns)).to_arrow().to_pylist()
    return rows


def _read(table: Any, query: Callable[[Any], Any]) -> Any:
    """A query of the newest version; once more where a writer rewrote the files that it was about to read."""
    for attempt in range(_ATTEMPTS):
        try:
            return query(table)
        except Exception as error:  # damage can make LanceDB's Rust panic, which has a class of its own
            if attempt == _ATTEMPTS - 1:
                raise _unreadable(error) from error
            table.checkout_latest()
            time.sleep(0.02 * attempt)


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[i : i + _IDS_PER_QUERY] for i in range(0, len(ids), _IDS_PER_QUERY))


def _among(column: str, ids: Sequence[str]) -> str:
    """An SQL condition; ids are checked, so nothing needs quoting."""
    listed = ", ".join(f"'{check_id(id)}'" for id in ids)
    return f"{column} IN ({listed})"


def _unreadable(error: Exception) -> BankError:
    reason = str(error).splitlines()[0]
    return BankError(f"the tables cannot be read ({reason}): check them with memory3 bank verify, or restore them from a copy")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A full or read-only disk under the tables is one clear sentence; what was committed before stays."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BankError(
            f"{folder} cannot be written ({reason}): free some space or make it writable, then run it again"
        ) from error


def _quoted(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def _create(database: Any) -> None:
    """Empty tables with their indexes; what is already there stays."""
    for name, schema in (("memories", _memories_schema()), ("sources", _sources_schema())):
        _index(database.create_table(name, schema=schema, exist_ok=True), name)


def _purge(table: Any, name: str, folder: Path) -> None:
    import lance

    stored = lance.dataset(str(folder))
    for tag in stored.tags.list():
        stored.tags.delete(tag)
    stored.optimize.compact_files(materialize_deletions=True, materialize_deletions_threshold=0.0)
    table.checkout_latest()
    _index(table, name, replace=True)
    _drop_versions(table, folder, timedelta(0))


def _drop_versions(table: Any, folder: Path, keep: timedelta) -> None:
    """Only the one writer may: files that no version names count as left behind."""
    import lance

    lance.dataset(str(folder)).cleanup_old_versions(older_than=keep, delete_unverified=True)
    table.checkout_latest()


def _index(table: Any, name: str, replace: bool = False) -> None:
    from lancedb.index import FTS, BTree

    wanted = {"memories": {"text": FTS(with_position=False), "id": BTree()}, "sources": {"memory": BTree()}}[name]
    for column, index in wanted.items():
        if replace or not any(column in existing.columns for existing in table.list_indices()):
            table.create_index(column, config=index, replace=replace)


def _memories_schema() -> pa.Schema:
    import pyarrow as pa

    fields = {"id": pa.string(), "text": pa.string(), "tokens": pa.int32(), "shard": pa.int32(), "slot": pa.int32()}
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in (fields | {"created": pa.timestamp("us", "UTC")}).items()]
    )


def _sources_schema() -> pa.Schema:
    import pyarrow as pa

    fields = {"memory": pa.string(), "source": pa.string(), "start": pa.int64(), "end": pa.int64()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])
