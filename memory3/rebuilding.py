"""A bank written again for another model, from the texts that it keeps."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from memory3.bank import Bank
from memory3.codec import RawCodec
from memory3.context import in_order, stretches
from memory3.guard import replaced_bank
from memory3.reader import MemoryWriter
from memory3.record import Codec
from memory3.spec import BankError, Reference
from memory3.splitting import split
from memory3.tiers import Settings, Tiers, shape_of
from memory3.writing import WriteReport, write

RENAMED = "renamed.jsonl"
"""In a rebuilt bank: for each memory of the old one its id and those of its texts now, one JSON object a line."""


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild did: the report of its write, and how many texts had to be split again."""

    report: WriteReport
    split: int


def rebuild(
    path: Path,
    decoder: MemoryWriter,
    *,
    codec: Codec | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> Rebuilt:
    """Encode every text of a bank with another decoder, and put the new bank in the place of the old one.

    The new bank grows in a hidden folder beside; the old one is intact until that is complete, and then goes. After a kill,
    the same call goes on. Texts that are over-long for the new tokenizer are split; `renamed.jsonl` maps old ids to new. The
    new bank has vectors of the same embedder, and `codec`, or without one the codec of the old bank; raw is in the dtype of the model
    then, and a codec that was trained for another model is refused.

    Raises:
        BankMismatch: a codec of another model.
        BankError: no bank, a bank that another process writes, an embedder that cannot be loaded (`memory3 bank embed BANK
            --embedder none` lets the vectors go), or a full disk.
    """
    path = path.resolve()
    fresh, old = path.with_name(f".{path.name}.memory3-rebuilding"), replaced_bank(path)
    if not path.exists() and old.exists():  # a kill between two renames
        os.replace(old, path)
    bank = Bank(path)
    with bank.exclusive():
        names: dict[str, list[str]] = {}
        embedder = None if bank.space is None else bank.embedder
        chosen = codec or _codec_again(bank, decoder)
        with Bank(fresh, decoder, create=True, codec=chosen, embedder=None if fresh.exists() else embedder) as target:
            target.embed(embedder)  # where an interrupted rebuild began with other vectors
            texts = set(bank.unwritten(bank.ids()))
            report = write(decoder, _again(bank, decoder, names, texts), target, batch_size=batch_size, on_progress=on_progress)
            if texts:
                left = _again(bank, decoder, names, set(bank.ids()) - texts)
                report = report.plus(write(decoder, left, target, lazy=True, on_progress=on_progress))
            contextual = _again_in_context(bank, decoder, names)
            if contextual:
                more = write(decoder, contextual, target, batch_size=batch_size, context=True, on_progress=on_progress)
                report = report.plus(more)
            _forget_what_went(bank, target, names)
            if len(names) != len(bank) or target.missing(id for now in names.values() for id in now):
                raise BankError(f"{fresh} lacks texts of {path}, expected all of them: run the same command again")
            with suppress(BankError):  # a damaged history is not worth a rebuild
                target.uses.take(bank.uses.history(), names)
            _same_settings(bank, target, decoder)
        with (fresh / RENAMED).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"old": id, "new": now}) + "\n" for id, now in names.items())
            file.flush()
            os.fsync(file.fileno())
        bank.close()
        os.replace(path, old)
        os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)
    return Rebuilt(report, sum(len(now) > 1 for now in names.values()))


def _codec_again(bank: Bank, decoder: MemoryWriter) -> Codec:
    """The codec of a bank, for this model."""
    there = bank.manifest.codec
    return RawCodec.of(decoder.dtype) if isinstance(there, RawCodec) else there


def _forget_what_went(bank: Bank, target: Bank, names: dict[str, list[str]]) -> None:
    """What was deleted from the old bank since an interrupted rebuild began goes from the new one too."""
    wanted = {id for now in names.values() for id in now}
    gone = [id for id in target.ids() if id not in wanted]
    if gone:
        target.delete(gone)
    sources = set(bank.sources())
    stale = [source for source in target.sources() if source not in sources]
    target.forget_spans([span for span in target.spans_of(stale) if span[1] not in sources])


def _same_settings(bank: Bank, target: Bank, decoder: MemoryWriter) -> None:
    """The limits of the old bank hold for the new one, and its rent for the bytes of a record."""
    there, shape = Settings.load(bank.path), shape_of(decoder)
    rent = 0.0 if shape is None else there.rent * target.record_bytes / bank.record_bytes
    replace(there, shape=shape, rent=rent).save(target.path)
    if there.max_bytes is not None:
        Tiers(target).fit()


def _again(bank: Bank, decoder: MemoryWriter, names: dict[str, list[str]], but: Collection[str] = ()) -> Iterator[Reference]:
    """Every text that was encoded alone at every place it came from, but some, split again where it is too long; notes new ids under
    old ones.
    """
    whole = set(_read_whole(bank))
    ids = [id for id in bank.ids() if id not in but]
    for start in range(0, len(ids), 512):
        for id, spans in bank.references(ids[start : start + 512]).items():
            places = [place for place in spans if place.source not in whole]
            if places:
                names[id] = []
            for place in places:
                pieces = _split_again(place, decoder)
                names[id] = [piece.id for piece in pieces]
                yield from pieces


def _read_whole(bank: Bank) -> list[str]:
    """Documents that are written in context again: those that were, and whose references are one cut of one text.

    The first memory of such a document saw nothing before it, and looks as if it was alone. Where an earlier state of a document is
    still there too, which reference saw which is unknown, and all of them are encoded alone.
    """
    seen = set(bank.in_context())
    sources = list(dict.fromkeys(source for memory, source in bank.spans() if memory in seen))
    wanted, cuts = set(sources), dict[str, list[tuple[int, int]]]()
    for _, source, start, end in bank.spans_of(sources):
        if source in wanted:
            cuts.setdefault(source, []).append((start, end))
    return [s for s in sources if all(a[1] <= b[0] for a, b in pairwise(sorted(cuts[s])))]


def _again_in_context(bank: Bank, decoder: MemoryWriter, names: dict[str, list[str]]) -> list[Reference]:
    """The references of documents that were written in context, in order; notes new ids under old ones."""
    whole = _read_whole(bank)
    spans = [span for span in bank.spans_of(whole) if span[1] in set(whole)]
    texts = bank.references(span[0] for span in spans)
    pieces = [
        (id, _split_again(replace(texts[id][0], source=source, start=start, end=end), decoder))
        for id, source, start, end in spans
    ]
    ordered = in_order(piece for _, some in pieces for piece in some)
    now = {(r.source, r.start, r.end): r.id for stretch in stretches(ordered, decoder) for r in stretch.new}
    for id, some in pieces:
        made = names.setdefault(id, [])
        made += [new for p in some if (new := now[p.source, p.start, p.end]) not in made]
    return ordered


def _split_again(place: Reference, decoder: MemoryWriter) -> list[Reference]:
    pieces = split(place.text, decoder.tokenizer, length=decoder.spec.reference_length)
    return [Reference(p.text, place.source, place.start + p.start, place.start + p.end) for p in pieces]
