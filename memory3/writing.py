"""References -> decoder -> bank: batched, resumable, nothing encoded twice."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from time import perf_counter

from memory3.bank import Bank
from memory3.catalogue import Span
from memory3.context import Stretch, stretches
from memory3.reader import MemoryWriter
from memory3.spec import BankError, Memory, Reference, SpecError
from memory3.tiers import Settings, Tiers, prepare

WINDOW = 1024
"""References that are looked up and sorted by length together."""

_ROW_BYTES = 256
"""Ids, place, span and index entries of a reference in the tables, roughly."""
REFRESHED = 8 * WINDOW
"""References between two refreshes of the indexes, so that searches and manifests stay small in a long write."""


@dataclass(frozen=True)
class WriteReport:
    """What a write did.

    Args:
        references: memories that are new in the bank.
        skipped: references whose content was there already; their places are noted.
        stale: spans of the files read that these do not have any more, and that are still in the bank.
        removed: memories that went because the files that had them changed.
        bytes: bytes of the new records.
        bytes_per_reference: bytes of one record.
        seconds: wall time.
    """

    references: int
    skipped: int
    stale: int
    removed: int
    bytes: int
    bytes_per_reference: int
    seconds: float

    def plus(self, more: WriteReport) -> WriteReport:
        """What two writes into one bank did together."""
        sums = {name: getattr(self, name) + getattr(more, name) for name in self.__dataclass_fields__}
        return WriteReport(**{**sums, "bytes_per_reference": self.bytes_per_reference})


def write(
    decoder: MemoryWriter,
    references: Iterable[Reference],
    bank: Bank,
    *,
    batch_size: int = 64,
    max_bytes: int | None = None,
    read: Sequence[str] = (),
    update: bool = False,
    context: bool = False,
    lazy: bool = False,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> WriteReport:
    """Encode references and store them; equal content is encoded once, also across calls.

    Each batch is committed by itself: after a kill, the same call goes on where it stopped.

    Args:
        decoder: the model that writes, the one the bank was opened with.
        references: streamed; at most a window of 1,024 is held, or with `context` one document.
        bank: where they go; locked against other writers until the end.
        batch_size: references of one forward pass, and of one commit.
        max_bytes: most bytes of the bank's folder; a batch that would not fit is not encoded. By default the lasting limit of the
            bank, which a lazy write sets.
        read: files that `references` reads to their end, told to its `on_read` meanwhile; all of their references pass here.
        update: forget what the bank has of these files beyond their references now; otherwise it is only counted.
        context: encode neighbouring references of a document as one sequence, so that each sees what stands before it, as
            far as the model's window reaches. An edit then changes the memories behind it too.
        lazy: store texts alone; each is encoded when it is recalled, and kept where that pays (`memory3.tiers`). With `max_bytes`
            memories fall back to text to make room for texts. Without it, texts of the bank that are met are encoded.
        on_progress: called with the references done so far and, where known, their total.

    Raises:
        BankError: another process writes, the disk or the budget is full, or the bank is another model's. What was
            committed before stays.
        SpecError: both `lazy` and `context`: a memory that saw its surroundings cannot be encoded alone.
    """
    if lazy and context:
        raise SpecError(
            "found a lazy write in context, expected one of them: a memory that saw its surroundings cannot be encoded alone"
        )
    started = perf_counter()
    if decoder is not bank.decoder:
        bank.manifest.check(bank.path, decoder.identity())
    total = len(references) if isinstance(references, Sequence) else None
    done = written = 0
    with bank.exclusive():
        changes = _Changes()
        prepare(bank, decoder)
        limit = max_bytes or Settings.load(bank.path).max_bytes
        ways = {"lazy": _as_texts, "context": _in_context, "alone": _alone}
        way = ways["lazy" if lazy else "context" if context else "alone"]
        for step in way(decoder, references, bank, batch_size):
            changes.take(step.window)
            if step.new:
                _check_budget(bank, step.new, limit, written, lazy)
                written += bank.add_texts(step.new) if lazy else bank.add(step.new, step.encode())
            bank.add_sources(step.known)
            before, done = done, done + len(step.new) + len(step.known)
            _tell(on_progress, done, total)
            if done // REFRESHED > before // REFRESHED:
                bank.refresh(keep_versions=limit is None)
        if lazy and max_bytes:
            prepare(bank, decoder, max_bytes)
        stale = changes.stale(bank, read) if read else []
        removed = bank.forget_spans(stale) if update else 0
        bank.refresh(keep_versions=limit is None)
    size = 0 if lazy else bank.record_bytes
    left = 0 if update else len(stale)
    return WriteReport(written, done - written, left, removed, written * size, size, perf_counter() - started)


def _check_budget(bank: Bank, batch: Sequence[Reference], max_bytes: int | None, written: int, lazy: bool) -> None:
    """Stop before the folder could grow beyond the budget; texts count four times, for their index and for a rewriting, and each row
    for its ids, place, source and vector. A lazy write lets memories go where that makes room.
    """
    if max_bytes is None:
        return
    space = bank.space
    each = _ROW_BYTES + (0 if lazy else bank.record_bytes) + (0 if space is None else 4 * space.dimension)
    texts = sum(each + 4 * len(r.text.encode()) + 2 * len(r.source.encode()) for r in batch)
    if lazy and bank.total_bytes() + bank.table_bytes() + texts > max_bytes:
        bank.refresh(keep_versions=False)
        if bank.total_bytes() - bank.shard_bytes() + bank.table_bytes() + texts <= max_bytes:
            Tiers(bank, max_bytes).fit(texts)
    held, wanted = bank.total_bytes(), texts + bank.table_bytes()
    if held + wanted > max_bytes:
        bank.refresh(keep_versions=False)
        raise BankError(
            f"{bank.path} has {held:,} bytes and the next {len(batch)} references want up to {wanted:,}, expected at most "
            f"{max_bytes:,} in all: {written} new references were written, the rest was not; raise the budget, or delete and compact"
        )


class _Changes:
    """Which spans the files of a write have now.

    A span is kept as one number: a million of them take about 60 MB. Two that agree by chance keep a span that should go, and
    never the other way round.
    """

    def __init__(self) -> None:
        self.now: set[int] = set()

    def take(self, window: Sequence[Reference]) -> None:
        """Note the references of a window."""
        self.now.update(self.key((r.id, r.source, r.start, r.end)) for r in window)

    def stale(self, bank: Bank, read: Sequence[str]) -> list[Span]:
        """Spans of the bank that the files read do not have any more."""
        return [span for span in bank.spans_of(read) if self.key(span) not in self.now]

    @staticmethod
    def key(span: Span) -> int:
        """A number of 62 bits."""
        id, source, start, end = span
        return hash((int(id[:15], 16), zlib.crc32(source.encode()), start, end))


@dataclass(frozen=True)
class _Step:
    """What is encoded and committed together.

    Args:
        new: references that the bank has no memory for.
        encode: their memories, when it is called.
        known: references whose places alone are noted.
        window: all references that were looked at since the step before.
    """

    new: Sequence[Reference]
    encode: Callable[[], list[Memory]]
    known: Sequence[Reference]
    window: Sequence[Reference]


def _alone(decoder: MemoryWriter, references: Iterable[Reference], bank: Bank, batch_size: int) -> Iterator[_Step]:
    """Each reference by itself, in batches of similar length."""
    for window in _windows(references):
        new, known = _divided(window, bank)
        for batch in _batches(decoder, new, batch_size):
            yield _Step(batch, partial(decoder.encode, [reference.text for reference in batch]), (), ())
        yield _Step((), list, known, window)


def _as_texts(decoder: MemoryWriter, references: Iterable[Reference], bank: Bank, batch_size: int) -> Iterator[_Step]:
    """Nothing is encoded; a window is a batch."""
    for window in _windows(references):
        new, known = _divided(window, bank, lazy=True)
        yield _Step(new, list, known, window)


def _in_context(decoder: MemoryWriter, references: Iterable[Reference], bank: Bank, batch_size: int) -> Iterator[_Step]:
    """Neighbours of a document as one sequence; as many sequences at a time as make a batch."""
    held: list[Stretch] = []
    for stretch in stretches(references, decoder):
        held.append(stretch)
        if sum(len(one.new) for one in held) >= batch_size:
            yield _contextual(decoder, held, bank)
            held = []
    if held:
        yield _contextual(decoder, held, bank)


def _contextual(decoder: MemoryWriter, held: Sequence[Stretch], bank: Bank) -> _Step:
    window = [reference for stretch in held for reference in stretch.new]
    new, known = _divided(window, bank)
    wanted = {reference.id for reference in new}

    def encode() -> list[Memory]:
        made = {
            reference.id: memory
            for stretch in held
            if any(reference.id in wanted for reference in stretch.new)
            for reference, memory in zip(stretch.new, stretch.encode(decoder), strict=True)
        }
        return [made[reference.id] for reference in new]

    return _Step(new, encode, known, window)


def _windows(references: Iterable[Reference]) -> Iterator[list[Reference]]:
    stream = iter(references)
    while window := list(islice(stream, WINDOW)):
        yield window


def _divided(window: Sequence[Reference], bank: Bank, lazy: bool = False) -> tuple[list[Reference], list[Reference]]:
    """The first reference of each content that the bank does not have, or not as wanted, and the rest."""
    ids = [reference.id for reference in window]
    missing = set(bank.missing(ids)) | (set() if lazy else set(bank.texts_among(ids)))
    new: list[Reference] = []
    rest: list[Reference] = []
    for reference in window:
        (new if reference.id in missing else rest).append(reference)
        missing.discard(reference.id)
    return new, rest


def _tell(on_progress: Callable[[int, int | None], None] | None, done: int, total: int | None) -> None:
    if on_progress is not None:
        on_progress(done, total)


def _batches(decoder: MemoryWriter, references: Sequence[Reference], size: int) -> Iterator[list[Reference]]:
    """Batches of similar length in tokens: padding is work for nothing."""
    if not references:
        return
    lengths = [len(ids) for ids in decoder.tokenizer([r.text for r in references], add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(references)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield [references[i] for i in order[start : start + size]]
