"""Files and texts -> references of at most 128 tokens; how much of a reference a text repeats (paper, Eq. 6).

A text that fits is one reference. Else neighbouring paragraphs are joined until half the length is reached, and the next
reference starts at a paragraph, so that an edit changes few of them; a longer paragraph is cut at sentences, then words.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memory3.spec import Reference, SourceError

SUFFIXES = {".txt": "text", ".md": "Markdown", ".markdown": "Markdown", ".jsonl": "JSON lines"}
"""What `references` reads, by suffix."""

Span = tuple[int, int]

_logger = logging.getLogger(__name__)
_BLANK_LINES = re.compile(r"(?:\r\n|\r|\n)(?:[^\S\r\n]*(?:\r\n|\r|\n))+")
_HEADING = re.compile(r"#{1,6}\s")
_BREAKS = (re.compile(r"[.!?][\"')\]]*\s|[。！？]"), re.compile(r"\s"))
_CHARACTERS_PER_TOKEN = 16


def references(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    length: int = 128,
    text_field: str = "text",
) -> Iterator[Reference]:
    """References of documents, streamed in the order of the documents.

    Args:
        source: a file, a folder (read recursively, sorted by path, hidden names left out), `-` for plain text on stdin,
            or several of these. Files are .txt, .md, .markdown, or .jsonl with one object per line.
        tokenizer: the tokenizer of the model; a reference has at most `length` of its tokens.
        length: most tokens of a reference.
        text_field: field of a JSON line that holds its text; such a text has the source `FILE:LINE`.

    Raises:
        SourceError: a source is missing, of an unknown kind, not UTF-8 (or UTF-16 with a byte order mark), or a JSON
            line has no such text. Paths are looked at before the first reference is asked for, contents when it is.
    """
    several = [source] if isinstance(source, str | os.PathLike) else list(source)
    paths = [path for one in several for path in _files(one)]
    documents = (document for path in paths for document in _documents(path, text_field))
    return (r for name, text, markdown in documents for r in split(text, tokenizer, name, length, markdown=markdown))


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
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{source or 'the text'} has a lone surrogate at character {error.start}, expected valid Unicode") from None
    start, end = _trimmed(text, 0, len(text))
    if start == end:
        return []
    counter = _Counter(tokenizer, text)
    spans = [(start, end)] if counter.fits((start, end), length) else _groups(text, counter, length)
    cut = _Cutter(counter, length, markdown, source)
    pieces = [piece for span in spans for piece in cut(span)]
    return [Reference(text[a:b], source, a, b) for (a, b), n in zip(pieces, counter.many(pieces), strict=True) if n > 0]


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
    best = int(np.bitwise_count(~rows).sum(0).max()) if hasattr(np, "bitwise_count") else _most_zeros(rows)
    return best / r.size
