"""Is everything in a bank whole, and is something really gone? Looks at every record, row, index and kept version."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory3.bank import Bank
from memory3.catalogue import FOLDER
from memory3.journal import JOURNAL
from memory3.spec import BankError, Reference

TABLES = ("memories", "sources")
_AT_ONCE = 512


@dataclass
class Verdict:
    """What a look at a bank found.

    Args:
        memories: memories whose record, text and row were checked.
        versions: kept versions of the tables that were decoded.
        unused_bytes: space of records that no row points at; `compact` gives it back.
        problems: one sentence each; none where all is well.
    """

    memories: int = 0
    versions: int = 0
    unused_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify(bank: Bank, on_progress: Callable[[int, int | None], None] | None = None) -> Verdict:
    """Recompute every checksum, and hold catalogue, shards and sources against each other."""
    found = Verdict()
    rows = {row["id"]: row for row in bank.where()}
    ids = sorted(rows)
    for start in range(0, len(ids), _AT_ONCE):
        some = ids[start : start + _AT_ONCE]
        found.problems += [problem for id in some for problem in _problems_of(bank, rows[id])]
        found.memories += len(some)
        if on_progress:
            on_progress(found.memories, len(ids))
    spans = bank.spans()
    sourced = {memory for memory, _ in spans}
    found.problems += [
        f"source {source!r} names memory {id}, which is not there: write it again" for id, source in spans if id not in rows
    ]
    found.problems += [f"memory {id} has no source: write its document again" for id in ids if id not in sourced]
    places = bank.places()
    twice = len(places) - len(set(places.values()))
    if twice:
        found.problems.append(f"{twice} rows point at a record that another row points at too: restore the bank from a copy")
    if (bank.path / JOURNAL).exists():
        found.problems.append(f"a deletion was interrupted: any write or `memory3 bank compact {bank.path}` finishes it")
    found.unused_bytes = max(0, int(bank.stats()["shard_bytes"]) - len(places) * bank.record_bytes)
    found.versions = sum(1 for _ in _versions(bank.path))
    return found


def _problems_of(bank: Bank, row: dict[str, Any]) -> Iterator[str]:
    if Reference(row["text"]).id != row["id"]:
        yield f"the text of memory {row['id']} is not the one that was written: delete it and write its document again"
    try:
        bank.read([row["id"]])
    except BankError as error:
        yield str(error)


def traces_of(bank: Bank, text: str) -> list[str]:
    """Where a text still stands in a bank, one sentence each: every column of every kept version, every index, the journal.

    Lance encodes and compresses what it stores, so a search of its bytes proves nothing; all of it is decoded. Memories whose
    text holds `text` are looked for in the records too: their id stands in the header.
    """
    found: list[str] = []
    gone: set[str] = set()
    for table, version, dataset in _versions(bank.path):
        for batch in dataset.to_batches():
            for row in batch.to_pylist():
                if any(text in value for value in row.values() if isinstance(value, str)):
                    found.append(f"version {version} of {table}: {row.get('id') or row.get('memory')}")
                    gone |= {row["id"]} if "id" in row else set()
    found += [f"index file {file.relative_to(bank.path)}: {why}" for file, why in _index_traces(bank.path, text)]
    journal = bank.path / JOURNAL
    if journal.exists() and text in json.dumps(json.loads(journal.read_text("utf-8")), ensure_ascii=False):
        found.append(f"{JOURNAL}: an interrupted deletion")
    # The text itself may be a whole reference that no row has any more: its record would still carry its id.
    return found + _records_of(bank, {*gone, Reference(text).id})


def _versions(path: Path) -> Iterator[tuple[str, int, Any]]:
    import lance

    for table in TABLES:
        where = str(path / FOLDER / f"{table}.lance")
        for entry in lance.dataset(where).versions():
            yield table, entry["version"], lance.dataset(where, version=entry["version"])


def _index_traces(path: Path, text: str) -> Iterator[tuple[Path, str]]:
    """Index files that hold the text as a value, or postings of rows that are no more.

    The terms of a full-text index are stems in a transducer, where no text can be looked for. But an index lists the rows
    that its terms came from: where all of them are there still, none of its terms came from a deleted text.
    """
    import lance
    from lance.file import LanceFileReader

    for table in TABLES:
        folder = path / FOLDER / f"{table}.lance"
        live = set(lance.dataset(str(folder)).to_table(columns=[], with_row_id=True)["_rowid"].to_pylist())
        for file in sorted((folder / "_indices").rglob("*.lance")):
            found = LanceFileReader(str(file)).read_all().to_table()
            if any(isinstance(value, str) and text in value for column in found.columns for value in column.to_pylist()):
                yield file, "a value"
            if "_rowid" in found.column_names:
                dead = set(found["_rowid"].to_pylist()) - live
                if dead:
                    yield file, f"terms of {len(dead)} deleted rows"


def _records_of(bank: Bank, ids: Sequence[str] | set[str]) -> list[str]:
    wanted = {bytes.fromhex(id): id for id in ids}
    found = []
    for file in sorted((bank.path / "shards").glob("*.kv")):
        size = bank.record_bytes
        with file.open("rb") as records:
            for slot in range(file.stat().st_size // size):
                records.seek(slot * size + 16)
                owner = wanted.get(records.read(16))
                if owner:
                    found.append(f"record {slot} of {file.relative_to(bank.path)}: key-values of {owner}")
    return found
