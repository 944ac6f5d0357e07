"""Documents -> references of at most 128 tokens; how much of a reference a text repeats (paper, Eq. 6).

A text that fits is one reference. Else neighbouring paragraphs are joined while they fit, and references start anew at
headings and at paragraphs that their own text picks, so that an edit changes few of them; a longer paragraph is cut at
sentences, then words.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from memory3.documents import OnUnreadable, documents
from memory3.spec import Reference, SourceError

Span = tuple[int, int]

_BLANK_LINES = re.compile(r"(?:\r\n|\r|\n)(?:[^\S\r\n]*(?:\r\n|\r|\n))+")
_HEADING = re.compile(r"#{1,6}\s")
_BREAKS = (re.compile(r"[.!?][\"')\]]*\s|[。！？]"), re.compile(r"\s"))
_CHARACTERS_PER_TOKEN = 16
_MOST_CHARACTERS_PER_TOKEN = 256
"""A longer span is too long without being counted: tokenizers take memory many times the size of a text."""
_COUNTED_TOGETHER = 256


def references(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    length: int | None = None,
    text_field: str = "text",
    on_unreadable: OnUnreadable | None = None,
    on_read: Callable[[str], None] | None = None,
) -> Iterator[Reference]:
    """References of documents, streamed in the order of the documents.

    Args:
        source: a file, a folder (read recursively, sorted by path, hidden names left out), `-` for plain text on stdin,
            or several of these; the kinds of files are those of `documents.KINDS`.
        tokenizer: the tokenizer of the model, or the `Decoder` that will write the references.
        length: most tokens of a reference; by default the decoder's `reference_length`, or 128.
        text_field: field or column that holds the text, in JSON lines, CSV and Parquet; such a text has the source
            `FILE:LINE` or `FILE:ROW`.
        on_unreadable: told of each document that cannot be read, which is then left out; by default it is an error.
        on_read: told of each file that was read to its end and left nothing out.

    Raises:
        SourceError: a source is missing, of an unknown kind or unreadable. Paths are looked at before the first
            reference is asked for, contents when it is.
    """
    spec = getattr(tokenizer, "spec", None)
    if spec is not None:
        tokenizer, length = tokenizer.tokenizer, length or spec.reference_length
    most = 128 if length is None else length
    found = documents(source, text_field=text_field, on_unreadable=on_unreadable, on_read=on_read)

    def streamed() -> Iterator[Reference]:
        for document in found:
            try:
                yield from _pieces(document.text, tokenizer, document.name, most, document.markdown)
            except SourceError as error:
                if on_unreadable is None:
                    raise
                on_unreadable(error)

    return streamed()


def split(text: str, tokenizer: Any, source: str = "", length: int = 128, *, markdown: bool = False) -> list[Reference]:
    """Cut a text into references whose spans are in order, do not overlap, and leave out whitespace only.

    Pieces that the tokenizer sees no token in (control characters, for some) are left out as well.

    Args:
        text: any text.
        tokenizer: a fast tokenizer of transformers.
        source: name of the document.
        length: most tokens of a reference, special tokens not counted.
        markdown: prefer the boundaries of Markdown blocks.

    Raises:
        SourceError: the text holds a lone surrogate, or one character has more than `length` tokens.
    """
    return list(_pieces(text, tokenizer, source, length, markdown))


def _pieces(text: str, tokenizer: Any, source: str, length: int, markdown: bool) -> Iterator[Reference]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{source or 'the text'} has a lone surrogate at character {error.start}, expected valid Unicode"
        ) from None
    start, end = _trimmed(text, 0, len(text))
    if start == end:
        return
    counter = _Counter(tokenizer, text, length)
    spans = [(start, end)] if counter.fits((start, end), length) else _groups(text, counter, length)
    cut = _Cutter(counter, length, markdown, source)
    for span in spans:
        for some in _some(cut(span)):
            for (a, b), count in zip(some, counter.many(some), strict=True):
                if count > 0:
                    yield Reference(text[a:b], source, a, b)


def _some(spans: Iterable[Span]) -> Iterator[list[Span]]:
    stream = iter(spans)
    while some := list(islice(stream, _COUNTED_TOGETHER)):
        yield some


def overlap(text_tokens: Sequence[int], reference_tokens: Sequence[int]) -> float:
    """Share of a reference that a text repeats in order and close together: `LCS(t, r; span in t <= 2|r|) / |r|`.

    The longest common subsequence, over all windows of `2|r|` tokens of the text; bit-parallel (Hyyrö 2004), all windows
    at once. Source: arXiv 2407.01178, Eq. 6. An empty reference has no overlap.
    """
    r, t = np.asarray(reference_tokens, dtype=np.int64), np.asarray(text_tokens, dtype=np.int64)
    if r.size == 0 or t.size == 0:
        return 0.0
    words, codes = -(-r.size // 64), np.unique(r)
    masks = _match_masks(r, codes, words)
    code = np.searchsorted(codes, t).clip(max=codes.size - 1)
    code[codes[code] != t] = codes.size
    starts = np.flatnonzero(code < codes.size)  # a best span begins with a match
    if starts.size == 0:
        return 0.0
    padded = np.concatenate((code, np.full(2 * r.size, codes.size)))
    rows = np.full((words, starts.size), ~np.uint64(0))
    for step in range(min(2 * r.size, t.size)):
        _advance(rows, masks[:, padded[starts + step]])
    return int(np.bitwise_count(~rows).sum(0).max()) / r.size


def _match_masks(r: np.ndarray, codes: np.ndarray, words: int) -> np.ndarray:
    """`(words, codes + 1)` uint64: the places of each token in `r` as bits; the last column, of no token, is empty."""
    masks = np.zeros((words, codes.size + 1), np.uint64)
    place = np.arange(r.size)
    np.bitwise_or.at(masks, (place // 64, np.searchsorted(codes, r)), np.uint64(1) << (place % 64).astype(np.uint64))
    return masks


def _advance(rows: np.ndarray, matches: np.ndarray) -> None:
    """One token further in every window: `V = (V + (V & M)) | (V & ~M)`, carries from word to word."""
    carry = np.zeros(rows.shape[1], np.uint64)
    for row, match in zip(rows, matches, strict=True):
        common = row & match
        partial = row + common
        total = partial + carry
        carry = ((partial < common) | (total < carry)).astype(np.uint64)
        row &= ~match
        row |= total


class _Counter:
    """Tokens of spans of one text, trimmed; more than `length` stands for any larger number."""

    def __init__(self, tokenizer: Any, text: str, length: int) -> None:
        self.tokenizer, self.text, self.length = tokenizer, text, length

    def many(self, spans: Sequence[Span]) -> list[int]:
        return [count for some in _some(spans) for count in self._count(some)]

    def _count(self, spans: Sequence[Span]) -> list[int]:
        most = _MOST_CHARACTERS_PER_TOKEN * self.length
        texts = [self.text[slice(*_trimmed(self.text, *span))] if span[1] - span[0] <= most else "" for span in spans]
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [len(ids) if b - a <= most else b - a for ids, (a, b) in zip(found, spans, strict=True)]

    def fits(self, span: Span, length: int) -> bool:
        return self.many([span])[0] <= length


def _groups(text: str, counter: _Counter, length: int) -> list[Span]:
    """Neighbouring paragraphs joined while they fit.

    A heading, and one paragraph in four by the hash of its text, starts a new group once the last has a quarter of the
    length: so the groups behind an edit soon fall in step again, also where all paragraphs are alike in size.
    """
    groups: list[Span] = []
    size = 0
    paragraphs = list(_paragraphs(text))
    for (start, end), count in zip(paragraphs, counter.many(paragraphs), strict=True):
        restarts = size + count > length or _HEADING.match(text, start) or _anchors(text[start:end])
        if not groups or (restarts and size >= length / 4):
            groups.append((start, end))
            size = 0
        groups[-1] = (groups[-1][0], end)
        size += count
    if len(groups) > 1 and size < length / 4 and counter.fits((groups[-2][0], groups[-1][1]), length):
        groups[-2:] = [(groups[-2][0], groups[-1][1])]
    return groups


def _anchors(paragraph: str) -> bool:
    return zlib.crc32(paragraph.encode()) % 4 == 0


def _paragraphs(text: str) -> Iterator[Span]:
    """Trimmed spans between blank lines, none of them empty."""
    start = 0
    for gap in _BLANK_LINES.finditer(text):
        yield from _solid(text, start, gap.start())
        start = gap.end()
    yield from _solid(text, start, len(text))


_splitters: WeakKeyDictionary[Any, dict[tuple[int, int, bool], Any]] = WeakKeyDictionary()


def _splitter(tokenizer: Any, length: int, markdown: bool) -> Any:
    """The library's splitter, kept as long as its tokenizer lives: making one copies the vocabulary, 15 ms for 8,192 words."""
    made, key = _splitters.setdefault(tokenizer, {}), (tokenizer.backend_tokenizer.get_vocab_size(), length, markdown)
    if key not in made:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter

        made[key] = (MarkdownSplitter if markdown else TextSplitter).from_huggingface_tokenizer(
            tokenizer.backend_tokenizer, length
        )
    return made[key]


class _Cutter:
    """Cuts a span into pieces that fit: at sentences and words by semantic-text-splitter, checked by our own count."""

    def __init__(self, counter: _Counter, length: int, markdown: bool, source: str) -> None:
        self.counter, self.length, self.markdown, self.source = counter, length, markdown, source
        self.text = counter.text

    def __call__(self, span: Span) -> list[Span]:
        """The pieces; a short first one, such as a heading, takes the beginning of what follows with it."""
        pieces = self._cut(*span)
        if len(pieces) == 1 or self.counter.many(pieces[:1])[0] >= self.length / 4:
            return pieces
        (start, after), (_, next_end) = pieces[:2]
        body = self._semantic(after, next_end, 3 * self.length // 4)[0]
        if not self.counter.fits((start, body[1]), self.length):
            return pieces
        return [(start, body[1]), *self._cut(body[1], span[1])]

    def _cut(self, start: int, end: int) -> list[Span]:
        if self.counter.fits((start, end), self.length):
            return list(_solid(self.text, start, end))
        pieces = [piece for part in self._parts(start, end) for piece in self._semantic(*part, self.length)]
        counts = self.counter.many(pieces)
        return [
            p for piece, n in zip(pieces, counts, strict=True) for p in ([piece] if n <= self.length else self._plain(*piece))
        ]

    def _parts(self, start: int, end: int) -> Iterator[Span]:
        """Parts of bounded length, for the library takes time quadratic in the length of unbroken text."""
        limit = _CHARACTERS_PER_TOKEN * self.length
        while end - start > limit:
            stop = self._break(start + limit // 2, start + limit)
            yield from _solid(self.text, start, stop)
            start = stop
        yield from _solid(self.text, start, end)

    def _semantic(self, start: int, end: int, length: int) -> list[Span]:
        chunks = _splitter(self.counter.tokenizer, length, self.markdown).chunk_indices(self.text[start:end])
        return [span for at, chunk in chunks for span in _solid(self.text, start + at, start + at + len(chunk))]

    def _plain(self, start: int, end: int) -> Iterator[Span]:
        """Where the library and the tokenizer disagree: the longest prefix that fits, again and again."""
        while start < end:
            stop = self._longest(start, end)
            yield from _solid(self.text, start, stop)
            start = stop

    def _longest(self, start: int, end: int) -> int:
        """End of a prefix that fits, at a word's end where there is one; found by halving."""
        if self.counter.fits((start, end), self.length):
            return end
        low, high = start + 1, min(end, start + _CHARACTERS_PER_TOKEN * self.length)
        if not self.counter.fits((start, low), self.length):
            raise SourceError(
                f"{self.source or 'the text'} has more than {self.length} tokens in character {start}: use longer references"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.counter.fits((start, middle), self.length) else (low, middle)
        at_word = self._break(start + (low - start) // 2, low)
        return at_word if self.counter.fits((start, at_word), self.length) else low

    def _break(self, start: int, end: int) -> int:
        """The last sentence end, else the last white space, in a stretch of the text, else its end."""
        for pattern in _BREAKS:
            ends = [match.end() for match in pattern.finditer(self.text, start, end)]
            if ends:
                return ends[-1]
        return end


def _trimmed(text: str, start: int, end: int) -> Span:
    """The span without white space around it; empty where there is nothing else."""
    piece = text[start:end]
    left = len(piece) - len(piece.lstrip())
    return start + left, max(start + left, start + len(piece.rstrip()))


def _solid(text: str, start: int, end: int) -> Iterator[Span]:
    """The trimmed span, if anything is in it."""
    span = _trimmed(text, start, end)
    if span[0] < span[1]:
        yield span
