"""A bank written again for another model, from the texts that it keeps."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from memory3.bank import Bank
from memory3.guard import replaced_bank
from memory3.reader import MemoryWriter
from memory3.spec import BankError, Reference
from memory3.splitting import split
from memory3.writing import WriteReport, write

RENAMED = "renamed.jsonl"
"""In a rebuilt bank: for each memory of the old one its id and those of its texts now, one JSON object a line."""


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild did: the report of its write, and how many texts had to be split again."""

    report: WriteReport
    split: int


def rebuild(
    path: Path, decoder: MemoryWriter, *, batch_size: int = 64, on_progress: Callable[[int, int | None], None] | None = None
) -> Rebuilt:
    """Encode every text of a bank with another decoder, and put the new bank in the place of the old one.

    The new bank grows in a hidden folder beside; the old one is intact until that is complete, and then goes. After a kill,
    the same call goes on. Texts that are over-long for the new tokenizer are split; `renamed.jsonl` maps old ids to new. The
    new bank has the raw codec in the dtype of the model, and vectors of the same embedder.

    Raises:
        BankError: no bank, a bank that another process writes, or a full disk.
    """
    path = path.resolve()
    fresh, old = path.with_name(f".{path.name}.memory3-rebuilding"), replaced_bank(path)
    if not path.exists() and old.exists():  # a kill between two renames
        os.replace(old, path)
    bank = Bank(path)
    with bank.exclusive():
        names: dict[str, list[str]] = {}
        with Bank(fresh, decoder, create=True, embedder=None if bank.space is None else bank.embedder) as target:
            report = write(decoder, _again(bank, decoder, names), target, batch_size=batch_size, on_progress=on_progress)
            _forget_what_went(bank, target, names)
            if len(names) != len(bank) or target.missing(id for now in names.values() for id in now):
                raise BankError(f"{fresh} lacks texts of {path}, expected all of them: run the same command again")
        with (fresh / RENAMED).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"old": id, "new": now}) + "\n" for id, now in names.items())
            file.flush()
            os.fsync(file.fileno())
        bank.close()
        os.replace(path, old)
        os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)
    return Rebuilt(report, sum(len(now) > 1 for now in names.values()))


def _forget_what_went(bank: Bank, target: Bank, names: dict[str, list[str]]) -> None:
    """What was deleted from the old bank since an interrupted rebuild began goes from the new one too."""
    wanted = {id for now in names.values() for id in now}
    gone = [id for id in target.ids() if id not in wanted]
    if gone:
        target.delete(gone)
    sources = set(bank.sources())
    stale = [source for source in target.sources() if source not in sources]
    target.forget_spans([span for span in target.spans_of(stale) if span[1] not in sources])


def _again(bank: Bank, decoder: MemoryWriter, names: dict[str, list[str]]) -> Iterator[Reference]:
    """Every text at every place it came from, split again where it is too long; notes new ids under old ones."""
    ids = bank.ids()
    for start in range(0, len(ids), 512):
        for id, spans in bank.references(ids[start : start + 512]).items():
            pieces = split(spans[0].text, decoder.tokenizer, length=decoder.spec.reference_length)
            names[id] = [piece.id for piece in pieces]
            for place in spans:
                for piece in pieces:
                    yield Reference(piece.text, place.source, place.start + piece.start, place.start + piece.end)
