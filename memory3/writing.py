"""References -> decoder -> bank: batched, resumable, nothing encoded twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

from memory3.bank import Bank, MemoryWriter
from memory3.spec import Reference

WINDOW = 1024
"""References that are looked up and sorted by length together."""

WINDOWS_PER_REFRESH = 8
"""Windows between two refreshes of the indexes, so that searches and manifests stay small in a long write."""


@dataclass(frozen=True)
class WriteReport:
    """What a write did.

    Args:
        references: memories that are new in the bank.
        skipped: references whose content was there already; their places are noted.
        bytes: bytes of the new records.
        bytes_per_reference: bytes of one record.
        seconds: wall time.
    """

    references: int
    skipped: int
    bytes: int
    bytes_per_reference: int
    seconds: float


def write(
    decoder: MemoryWriter,
    references: Iterable[Reference],
    bank: Bank,
    *,
    batch_size: int = 64,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> WriteReport:
    """Encode references and store them; equal content is encoded once, also across calls.

    Each batch is committed by itself: after a kill, the same call goes on where it stopped.

    Args:
        decoder: the model that writes, the one the bank was opened with.
        references: streamed; at most a window of 1,024 is held.
        bank: where they go; locked against other writers until the end.
        batch_size: references of one forward pass, and of one commit.
        on_progress: called with the references done so far and, where known, their total.

    Raises:
        BankError: another process writes, the disk is full, or the bank is another model's.
    """
    started = perf_counter()
    if decoder is not bank.decoder:
        bank.manifest.check(bank.path, decoder.identity())
    total = len(references) if isinstance(references, Sequence) else None
    done = written = 0
    with bank.exclusive():
        for number, window in enumerate(_windows(references), 1):
            new, rest = _divided(window, bank)
            for batch in _batches(decoder, new, batch_size):
                written += bank.add(batch, decoder.encode([reference.text for reference in batch]))
                done += len(batch)
                _tell(on_progress, done, total)
            bank.add_sources(rest)
            done += len(rest)
            _tell(on_progress, done, total)
            if number % WINDOWS_PER_REFRESH == 0:
                bank.refresh()
        bank.refresh()
    size = bank.record_bytes
    return WriteReport(written, done - written, written * size, size, perf_counter() - started)


def _windows(references: Iterable[Reference]) -> Iterator[list[Reference]]:
    stream = iter(references)
    while window := list(islice(stream, WINDOW)):
        yield window


def _divided(window: Sequence[Reference], bank: Bank) -> tuple[list[Reference], list[Reference]]:
    """The first reference of each content that the bank does not have, and the rest."""
    missing = set(bank.missing(reference.id for reference in window))
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
