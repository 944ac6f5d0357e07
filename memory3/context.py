"""Documents as stretches that a model reads at once, so that memories see their surroundings (design 3, Remark 3)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

from memory3.spec import Memory, Reference

GAP = "\n\n"
"""What stands between two references of one sequence."""


class ContextWriter(Protocol):
    """What encoding in context needs of a decoder."""

    tokenizer: Any

    @property
    def window(self) -> int:
        """Most tokens of one sequence."""

    def encode_in_context(self, texts: Sequence[str]) -> list[Memory]:
        """One memory per text, which saw the texts before it."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring references of one document that are encoded as one sequence.

    Args:
        references: in their order in the document, each with the context that it sees.
        known: how many of the first ones are there for the others to see only; the stretch before has encoded them.
    """

    references: tuple[Reference, ...]
    known: int = 0

    @property
    def new(self) -> tuple[Reference, ...]:
        """The references whose memories this stretch gives."""
        return self.references[self.known :]

    def encode(self, writer: ContextWriter) -> list[Memory]:
        """Memories of `new`."""
        return writer.encode_in_context([reference.text for reference in self.references])[self.known :]


def stretches(references: Iterable[Reference], writer: ContextWriter) -> Iterator[Stretch]:
    """Cut the references of each document into stretches that fit the model's window.

    References of a document must follow each other; one document is held at a time. A document that does not fit begins its next
    stretch with the references that filled the last quarter of the window, so that all but the first of a document see at least
    something before them.
    """
    for _, document in groupby(references, key=lambda reference: reference.source):
        yield from _of_document(list(document), writer)


def _of_document(references: Sequence[Reference], writer: ContextWriter) -> Iterator[Stretch]:
    texts = [reference.text for reference in references]
    gap, *rows = writer.tokenizer([GAP, *texts], add_special_tokens=False)["input_ids"]
    sizes = [len(row) + len(gap) for row in rows]
    start = known = 0
    while start + known < len(references):
        end = _filled(sizes, start, writer.window)
        end = max(end, start + known + 1)  # where even one reference does not fit, encoding says so
        yield Stretch(_seeing(references[start:end]), known)
        start = max(end - max(1, _filled(sizes[:end][::-1], 0, writer.window // 4)), start + 1)
        while start < end < len(sizes) and sum(sizes[start : end + 1]) > writer.window:
            start += 1
        known = end - start


def _filled(sizes: Sequence[int], start: int, most: int) -> int:
    """Where a run of sizes from `start` on that adds up to at most `most` ends."""
    total, end = 0, start
    while end < len(sizes) and total + sizes[end] <= most:
        total += sizes[end]
        end += 1
    return end


def _seeing(references: Sequence[Reference]) -> tuple[Reference, ...]:
    """The references with the context that each sees: a hash chained over the texts before it."""
    seen, found = "", []
    for reference in references:
        found.append(replace(reference, context=seen))
        seen = hashlib.blake2b(f"{seen}\0{reference.text}".encode(), digest_size=16).hexdigest()
    return tuple(found)


def in_order(references: Iterable[Reference]) -> list[Reference]:
    """References by source and span, as `stretches` wants them."""
    return sorted(references, key=lambda reference: (reference.source, reference.start, reference.end))
