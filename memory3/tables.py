"""The two LanceDB tables of a bank: columns and indexes, safe reads and writes, and how deleted rows leave every file."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from memory3.spec import BankError

if TYPE_CHECKING:
    import pyarrow as pa

VECTOR = "vector"
"""Column of `memories` that only banks with an embedder have."""
CONTEXT = "context"
"""Column of `memories` that only banks have where a memory saw its surroundings."""
FEWEST_FOR_ANN = 262_144
"""Vectors from which on an approximate index is built; below, exact search is as fast (docs/retrieval.md)."""
_IDS_PER_QUERY = 1024
_ATTEMPTS = 4
_ID = re.compile(r"[0-9a-f]{32}")


class Table:
    """One table, at its newest version or at a kept one.

    Args:
        database: connection of lancedb.
        folder: address of the database, for messages and for Lance itself.
        name: `memories` or `sources`.
        at: version to look at; by default always the newest, whoever commits it.
        options: storage options of Lance, for object stores.
    """

    def __init__(
        self, database: Any, folder: str, name: str, at: int | None = None, options: dict[str, str] | None = None
    ) -> None:
        self.folder, self.name, self.at, self._options = folder, name, at, options
        self.raw = database.open_table(name)
        if at is not None:
            self.raw.checkout(at)

    @property
    def version(self) -> int:
        """Version that reads see."""
        return int(self.raw.version)

    @property
    def schema(self) -> pa.Schema:
        """Columns with their metadata."""
        return self.raw.schema

    def dataset(self, version: int | str | None = None) -> Any:
        """The table as a `lance.LanceDataset`, at a version or a tag."""
        import lance

        return lance.dataset(f"{self.folder}/{self.name}.lance", version=version, storage_options=self._options)

    def read(self, query: Callable[[Any], Any]) -> Any:
        """A query; once more where a writer rewrote the files that it was about to read."""
        for attempt in range(_ATTEMPTS):
            try:
                return query(self.raw)
            except Exception as error:  # damage can make LanceDB's Rust panic, which has a class of its own
                if attempt == _ATTEMPTS - 1:
                    raise unreadable(error) from error
                if self.at is None:
                    self.raw.checkout_latest()
                time.sleep(0.02 * attempt)

    def column(self, *names: str) -> pa.Table:
        """Some columns of all rows."""
        return self.read(lambda table: table.search().select(list(names)).to_arrow())

    def rows(self, condition: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Rows that a condition selects."""
        found: list[dict[str, Any]] = self.read(
            lambda table: table.search().where(condition).select(list(columns)).to_arrow().to_pylist()
        )
        return found

    def rows_with(self, column: str, ids: Iterable[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Rows whose `column` is among the ids."""
        for some in batches(list(dict.fromkeys(ids))):
            yield from self.rows(among(column, some), columns)

    def set_tag(self, name: str, version: int) -> None:
        """Name a version; one of that name that a kill left half made is replaced."""
        tags = self.dataset().tags
        if name in tags.list():
            tags.delete(name)
        tags.create(name, version)

    def optimise(self, keep: timedelta, kept_by_all: timedelta) -> None:
        """Bring the indexes up to date, join small files, and drop versions older than `keep` that no tag names."""
        self.raw.optimize(cleanup_older_than=kept_by_all)
        index(self.raw, self.name)
        if keep < kept_by_all:
            self._drop_versions(keep)

    def purge(self) -> None:
        """Rewrite data without deleted rows, make the indexes anew, and drop all older versions and tags."""
        stored = self.dataset()
        for tag in stored.tags.list():
            stored.tags.delete(tag)
        stored.optimize.compact_files(materialize_deletions=True, materialize_deletions_threshold=0.0)
        self.raw.checkout_latest()
        index(self.raw, self.name, replace=True)
        self._drop_versions(timedelta(0))

    def _drop_versions(self, keep: timedelta) -> None:
        """Only the one writer may: files that no version names count as left behind."""
        self.dataset().cleanup_old_versions(older_than=keep, delete_unverified=True, error_if_tagged_old_versions=False)
        self.raw.checkout_latest()


def create(database: Any, vector: pa.Field | None = None) -> None:
    """Empty tables with their indexes; what is already there stays."""
    for name, schema in (("memories", memories_schema(vector)), ("sources", sources_schema())):
        index(database.create_table(name, schema=schema, exist_ok=True), name)


def index(table: Any, name: str, replace: bool = False) -> None:
    """Make the indexes that a table lacks, or with `replace` all of them anew."""
    from lancedb.index import FTS, BTree, IvfPq

    wanted: dict[str, Any] = {
        "memories": {"text": FTS(with_position=False), "id": BTree()},
        "sources": {"memory": BTree()},
    }[name]
    if name == "memories" and VECTOR in table.schema.names and table.count_rows(f"{VECTOR} IS NOT NULL") >= FEWEST_FOR_ANN:
        wanted[VECTOR] = IvfPq(distance_type="dot")
    made = [column for existing in table.list_indices() for column in existing.columns]
    for column, config in wanted.items():
        if replace or column not in made:
            table.create_index(column, config=config, replace=replace)


def memories_schema(vector: pa.Field | None = None) -> pa.Schema:
    """One row per memory: id, text, length in tokens, place of its record, time of writing, and where wanted a vector."""
    import pyarrow as pa

    fields = {"id": pa.string(), "text": pa.string(), "tokens": pa.int32(), "shard": pa.int32(), "slot": pa.int32()}
    columns = [pa.field(n, kind, nullable=False) for n, kind in (fields | {"created": pa.timestamp("us", "UTC")}).items()]
    return pa.schema(columns if vector is None else [*columns, vector])


def sources_schema() -> pa.Schema:
    """One row per memory, source and span."""
    import pyarrow as pa

    fields = {"memory": pa.string(), "source": pa.string(), "start": pa.int64(), "end": pa.int64()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


def check_id(id: str) -> str:
    """The id itself; `BankError` where it is not 32 hexadecimal digits."""
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise BankError(f"found memory id {id!r}, expected 32 hexadecimal digits: take it from a citation or a search")
    return id


def batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Ids, as many as one query may name."""
    return (ids[i : i + _IDS_PER_QUERY] for i in range(0, len(ids), _IDS_PER_QUERY))


def among(column: str, ids: Sequence[str]) -> str:
    """An SQL condition; ids are checked, so nothing needs quoting."""
    listed = ", ".join(f"'{check_id(id)}'" for id in ids)
    return f"{column} IN ({listed})"


def quoted(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def unreadable(error: BaseException) -> BankError:
    """What to say of a table that a query failed on."""
    reason = str(error).splitlines()[0]
    return BankError(f"the tables cannot be read ({reason}): check them with memory3 bank verify, or restore them from a copy")


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """A full or read-only disk under the tables is one clear sentence; what was committed before stays."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BankError(
            f"{folder} cannot be written ({reason}): free some space or make it writable, then run it again"
        ) from error
