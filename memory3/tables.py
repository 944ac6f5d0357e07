"""The two LanceDB tables of a bank: columns and indexes, safe reads and writes, and how deleted rows leave every file."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory3.spec import BankError

if TYPE_CHECKING:
    import pyarrow as pa

VECTOR = "vector"
"""Column of `memories` that only banks with an embedder have."""
CONTEXT = "context"
"""Column of `memories` that only banks have where a memory saw its surroundings."""
ADAPTER = "adapter"
"""Column of `memories` that only banks have where a reference was moved into the parameters of an adapter."""
FEWEST_FOR_ANN = 32_768
"""Vectors from which on an approximate index is built; figures on both sides of it stand in docs/results.md."""
UNINDEXED = 1 / 16
"""Share of the vectors that may have come since their index was made: a search looks at each of these, until the index is made anew."""
SPAN = ("memory", "source", "start", "end")
"""Columns of `sources`."""
_IDS_PER_QUERY, _FILES_BY_QUERY = 1024, 128
_ATTEMPTS = 4
_ID = re.compile(r"[0-9a-f]{32}")


class Table:
    """One table, at its newest version or at a kept one.

    Args:
        database: connection of lancedb.
        folder: address of the database, for messages and for Lance itself.
        name: `memories` or `sources`.
        at: version to look at; by default always the newest, whoever commits it.
    """

    def __init__(self, database: Any, folder: str, name: str, at: int | None = None) -> None:
        self.folder, self.name, self.at = folder, name, at
        self.raw = database.open_table(name)
        if at is not None:
            self.raw.checkout(at)

    @property
    def version(self) -> int:
        """Version that reads see."""
        return int(self.read(lambda table: table.version))

    @property
    def schema(self) -> pa.Schema:
        """Columns with their metadata."""
        return self.read(lambda table: table.schema)

    def has(self, column: str) -> bool:
        """Whether there is such a column."""
        return column in self.schema.names

    def dataset(self) -> Any:
        """The table as a `lance.LanceDataset`."""
        import lance

        try:
            return lance.dataset(f"{self.folder}/{self.name}.lance")
        except (OSError, RuntimeError, ValueError) as error:
            raise unreadable(error) from error

    def read(self, query: Callable[[Any], Any]) -> Any:
        """A query; once more where a writer rewrote the files that it was about to read."""
        for attempt in range(_ATTEMPTS):
            try:
                return query(self.raw)
            except Exception as error:  # damage can make LanceDB's Rust panic, which has a class of its own
                if self.at is not None and attempt:
                    raise BankError(
                        f"version {self.at} of {self.name} is not kept any more: a state goes an hour after the next one, and with any "
                        "deletion; open the bank without `at`"
                    ) from error
                if attempt == _ATTEMPTS - 1:
                    raise unreadable(error) from error
                with suppress(Exception):
                    self.raw.checkout_latest() if self.at is None else self.raw.checkout(self.at)
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

    def where(self, columns: Sequence[str], condition: str | None) -> list[dict[str, Any]]:
        """Rows that an SQL condition of a user on these columns selects; `BankError` where LanceDB does not understand it."""
        query = self.raw.search().select(list(columns))
        if condition is not None:
            # In parentheses, and the last one on a line of its own: LanceDB ignores what it does not understand behind a
            # condition (LIMIT, a second statement), and what is ignored must not be deleted.
            query = query.where(f"({condition}\n)")
        try:
            found: list[dict[str, Any]] = query.to_arrow().to_pylist()
        except (OSError, RuntimeError, ValueError) as error:
            if condition is None:
                raise unreadable(error) from error
            reason = str(error).splitlines()[0]
            raise BankError(
                f"found the filter {condition!r} ({reason}), expected SQL on the columns {', '.join(columns)}"
            ) from None
        return found

    def index_bytes(self) -> dict[str, int]:
        """Bytes of the indexes, by column."""
        found: dict[str, int] = {}
        for index in self.dataset().describe_indices():
            for segment in index.segments:
                files = Path(self.folder, f"{self.name}.lance", "_indices", str(segment.uuid)).rglob("*")
                found[index.field_names[0]] = found.get(index.field_names[0], 0) + sum(f.stat().st_size for f in files)
        return found

    def rows_with(self, column: str, ids: Iterable[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Rows whose `column` is among the ids."""
        for some in batches(list(dict.fromkeys(ids))):
            yield from self.rows(among(column, some), columns)

    def update(self, columns: Mapping[str, pa.Array]) -> None:
        """Change some columns of the rows that these ids name, in one commit; `id` is among the columns."""
        import pyarrow as pa

        fields = [self.schema.field(name) for name in columns]
        rows = pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields))
        self.raw.merge_insert("id").when_matched_update_all().execute(rows)

    def index_words(self) -> None:
        """Make the full-text index anew."""
        self.raw.create_index("text", config=_words(), replace=True)

    def set_tag(self, name: str, version: int) -> None:
        """Name a version; one of that name that a kill left half made is replaced."""
        tags = self.dataset().tags
        if name in tags.list():
            tags.delete(name)
        tags.create(name, version)

    def optimise(self, keep: timedelta) -> None:
        """Bring the indexes up to date, join small files, and drop versions that no tag names and that another one followed
        longer than `keep` ago.

        The index of vectors is left to `index`: Lance would join its parts to a few, all of which every search then reads.
        """
        stored = self.dataset()
        stored.optimize.compact_files()
        others = [found.name for found in stored.describe_indices() if VECTOR not in found.field_names]
        stored.optimize.optimize_indices(index_names=others)
        self.raw.checkout_latest()
        index(self.raw, self.name)
        made = [row["timestamp"] for row in self.dataset().versions()]
        self._drop_versions(age_to_drop(made, datetime.now(), keep) if keep else keep)

    def purge(self) -> None:
        """Rewrite data without deleted rows, make the indexes anew, and drop all older versions and tags."""
        stored = self.dataset()
        for tag in stored.tags.list():
            stored.tags.delete(tag)
        stored.optimize.compact_files(materialize_deletions=True, materialize_deletions_threshold=0.0)
        self.raw.checkout_latest()
        index(self.raw, self.name, replace=True)
        self._drop_versions(timedelta(0))

    def _drop_versions(self, older_than: timedelta) -> None:
        """Only the one writer may, for files that no version names go too: a writer that was killed has left them."""
        self.dataset().cleanup_old_versions(older_than=older_than, delete_unverified=True, error_if_tagged_old_versions=False)
        self.raw.checkout_latest()


def age_to_drop(made: Iterable[datetime], now: datetime, keep: timedelta) -> timedelta:
    """Age from which on versions go, so that the one that was the newest `keep` ago stays; Lance counts from when each was made."""
    newest_then = max((time for time in made if time <= now - keep), default=None)
    return keep if newest_then is None else now - newest_then + timedelta(milliseconds=1)


def create(database: Any, vector: pa.Field | None = None) -> None:
    """Empty tables with their indexes; what is already there stays."""
    for name, schema in (("memories", memories_schema(vector)), ("sources", sources_schema())):
        index(database.create_table(name, schema=schema, exist_ok=True), name)


def index(table: Any, name: str, replace: bool = False) -> None:
    """Make the indexes that a table lacks, or that it has outgrown, or with `replace` all of them anew."""
    from lancedb.index import BTree, IvfRq

    wanted: dict[str, Any] = {
        "memories": {"text": _words(), "id": BTree()},
        "sources": {"memory": BTree()},
    }[name]
    vectors = table.count_rows(f"{VECTOR} IS NOT NULL") if name == "memories" and VECTOR in table.schema.names else 0
    if vectors >= FEWEST_FOR_ANN:
        parts = round(vectors**0.5)
        wanted[VECTOR] = IvfRq(distance_type="dot", num_partitions=parts, sample_rate=64, max_iterations=20)
    made = {column: existing.name for existing in table.list_indices() for column in existing.columns}
    for column, config in wanted.items():
        anew = replace or (column == VECTOR and column in made and _outgrown(table.index_stats(made[column])))
        if anew or column not in made:
            table.create_index(column, config=config, replace=anew)


def _outgrown(stats: Any) -> bool:
    """Whether more vectors came since the index was made than `UNINDEXED` lets wait."""
    return bool(stats.num_unindexed_rows > stats.num_indexed_rows * UNINDEXED)


def _words() -> Any:
    from lancedb.index import FTS

    return FTS(with_position=False)


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


def is_id(id: str) -> bool:
    """Whether it is 32 hexadecimal digits."""
    return _ID.fullmatch(id) is not None


def spans_of(sources: Table, files: Sequence[str], files_of: Callable[[str], Iterable[str]]) -> list[tuple[str, str, int, int]]:
    """Rows of `sources` whose source is one of these files, or a row, page or chapter of one: `files_of` names those of a source.

    Many files are looked for in the whole table at once: a condition on them would look through it for every few.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not files:
        return []
    wanted, condition = set(files), " OR ".join(f"starts_with(source, {quoted(file)})" for file in files[:_FILES_BY_QUERY])
    if len(files) <= _FILES_BY_QUERY:
        table = sources.read(lambda table: table.search().where(condition).select(list(SPAN)).to_arrow())
    else:
        table = sources.column(*SPAN)
    theirs = [name for name in table["source"].unique().to_pylist() if wanted.intersection(files_of(name))]
    rows = table.filter(pc.is_in(table["source"], value_set=pa.array(theirs, pa.string())))
    return list(zip(*(rows[name].to_pylist() for name in SPAN), strict=True))


def check_id(id: str) -> str:
    """The id itself; `BankError` where it is not 32 hexadecimal digits."""
    if not isinstance(id, str) or not is_id(id):
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
