"""Is everything in a bank whole, and is something really gone? Looks at every record, row, index and kept version."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory3.bank import SHARDS, Bank
from memory3.catalogue import FOLDER
from memory3.journal import JOURNAL
from memory3.shards import NO_RECORD
from memory3.spec import BankError, Reference
from memory3.uses import USES

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
    """Recompute every checksum, and hold catalogue, shards and sources against each other.

    Writers are kept out meanwhile, where the folder can be written at all; nothing is changed.

    Raises:
        BankError: another process writes.
    """
    with bank.locked() if os.access(bank.path, os.W_OK) else nullcontext():
        return _verified(bank, on_progress)


def _verified(bank: Bank, on_progress: Callable[[int, int | None], None] | None) -> Verdict:
    found, ids, places = Verdict(), bank.ids(), bank.places()
    looks: list[Look] = [bank.references, lambda ids: bank.read([id for id in ids if id in places])]
    try:
        bank.manifest.codec.files()
    except BankError as error:  # then no memory can be decoded: one problem, not one for each
        found.problems.append(str(error))
        looks = [bank.references]
    for start in range(0, len(ids), _AT_ONCE):
        some = ids[start : start + _AT_ONCE]
        found.problems += _problems_of(looks, some)
        found.memories += len(some)
        if on_progress:
            on_progress(found.memories, len(ids))
    known, sourced = set(ids), set()
    for memory, source in bank.spans():
        sourced.add(memory)
        if memory not in known:
            found.problems.append(f"source {source!r} names memory {memory}, which is not there: write it again")
    found.problems += [f"memory {id} has no source: write its document again" for id in ids if id not in sourced]
    odd = [shard for shard in bank.tiers()["shard"].to_pylist() if shard < NO_RECORD[0]]
    if odd:
        found.problems.append(f"{len(odd)} rows point at shards such as {odd[0]}, which are none: restore the bank from a copy")
    twice = len(places) - len(set(places.values()))
    if twice:
        found.problems.append(f"{twice} rows point at a record that another row points at too: restore the bank from a copy")
    if (bank.path / JOURNAL).exists():
        found.problems.append(f"a deletion was interrupted: any write or `memory3 bank compact {bank.path}` finishes it")
    found.problems += _history_problems(bank)
    found.unused_bytes = max(0, int(bank.stats()["shard_bytes"]) - len(places) * bank.record_bytes)
    found.versions = sum(1 for _ in _versions(bank.path))
    return found


Look = Callable[[Sequence[str]], object]


def _problems_of(looks: Sequence[Look], ids: Sequence[str]) -> Iterator[str]:
    """Of some memories: their texts' ids, and their records; one by one only where something is wrong."""
    for look in looks:
        try:
            look(ids)
        except BankError:
            for id in ids:
                try:
                    look([id])
                except BankError as error:
                    yield str(error)


def traces_of(bank: Bank, text: str) -> list[str]:
    """Where a text still stands in a bank, one sentence each.

    Lance encodes and compresses what it stores, so a search of its bytes proves nothing: every column of every data and
    index file is decoded, whichever version it belongs to and whether its rows count as deleted or not. The terms of a
    full-text index are stems in a transducer, where no text can be looked for; but an index lists the rows that its terms
    came from, and each of them must be there in a kept version. Memories whose text holds `text` are looked for in the
    records too, by the id in the header. Manifests, transactions and the journal hold texts as they are.

    A text may be longer than a reference, so it is looked for sentence by sentence too, and stored texts are looked for in it.
    """
    if not text.strip():
        raise BankError("found an empty text to look for, expected some words")
    with bank.locked() if os.access(bank.path, os.W_OK) else nullcontext():
        return _traces(bank, text)


def _traces(bank: Bank, text: str) -> list[str]:
    found: list[str] = []
    wanted = _pieces_of(text)
    gone = {Reference(piece).id for piece in wanted}  # a whole reference that no row has any more
    live = _live_rows(bank.path)
    history = (bank.uses.path, bank.uses.journal)  # has ids and no texts, and its journal comes and goes with every count
    for file in sorted(p for p in bank.path.rglob("*") if p.suffix != ".kv" and p not in history and p.is_file()):
        name = file.relative_to(bank.path)
        if file.suffix not in (".lance", ".idx"):
            found += [f"{name}: the text as it is"] if any(_as_it_is(file, piece) for piece in wanted) else []
            continue
        columns = _decoded(file)
        rows = [n for values in columns.values() for n, value in enumerate(values) if _holds(value, text, wanted)]
        if rows:
            found.append(f"{name}: {len(rows)} values")
        if {"id", "text"} <= set(columns):
            gone |= {columns["id"][n] for n in rows}
        dead = set(columns.get("_rowid", ())) - live.get(file.relative_to(bank.path / FOLDER).parts[0], set())
        if dead:
            found.append(f"{name}: terms of {len(dead)} deleted rows")
    return found + _counted(bank, gone) + _records_of(bank, gone)


def _pieces_of(text: str) -> list[str]:
    """The text itself, and its sentences of at least three words."""
    sentences = re.split(r"(?<=[.!?。！？])\s+|\n+", text)
    return list(dict.fromkeys([text, *(s.strip() for s in sentences if len(s.split()) >= 3)]))


def _holds(value: Any, text: str, wanted: Sequence[str]) -> bool:
    """Whether a stored value holds a piece of the text, or is itself a piece of it of at least three words."""
    if not isinstance(value, str):
        return False
    return any(piece in value for piece in wanted) or (len(value.split()) >= 3 and value in text)


def _live_rows(path: Path) -> dict[str, set[int]]:
    """Row ids of all kept versions, by the name of the table's folder."""
    there: dict[str, set[int]] = {}
    for table, _, dataset in _versions(path):
        rows = dataset.to_table(columns=[], with_row_id=True)["_rowid"].to_pylist()
        there.setdefault(f"{table}.lance", set()).update(rows)
    return there


def _versions(path: Path) -> Iterator[tuple[str, int, Any]]:
    import lance

    for table in TABLES:
        where = str(path / FOLDER / f"{table}.lance")
        for entry in lance.dataset(where).versions():
            yield table, entry["version"], lance.dataset(where, version=entry["version"])


def _decoded(file: Path) -> dict[str, list[Any]]:
    from lance.file import LanceFileReader

    table = LanceFileReader(str(file)).read_all().to_table()
    return {name: table[name].to_pylist() for name in table.column_names}


def _as_it_is(file: Path, text: str) -> bool:
    """Whether a file that is not encoded holds a text, as UTF-8 or inside JSON."""
    data = file.read_bytes()
    return text.encode() in data or json.dumps(text)[1:-1].encode() in data


def _counted(bank: Bank, gone: set[str]) -> list[str]:
    """What the bytes of the use history have of these ids, or of ids that the bank does not have."""
    if not bank.uses.path.is_file():
        return []
    holders = bank.uses.holders_of(gone)
    return [f"{name}: uses of {id}" for name, ids in holders.items() for id in ids] + _history_problems(bank)


def _history_problems(bank: Bank) -> list[str]:
    """A use history that is damaged, or that has memories which the bank does not have."""
    try:
        strangers = bank.missing(bank.uses.history().uses)
    except BankError as error:
        return [str(error)]
    if not strangers:
        return []
    return [f"{USES} has uses of {len(strangers)} memories that are not there: memory3 bank compact {bank.path} removes them"]


def _records_of(bank: Bank, ids: Sequence[str] | set[str]) -> list[str]:
    there = bank.records_of(ids)
    return [f"record {slot} of {SHARDS}/{shard:05d}.kv: key-values of {id}" for (shard, slot), id in sorted(there)]
