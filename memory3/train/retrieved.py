"""Which reference each chunk of the training text retrieves: asked of a bank once, kept beside the tokens.

Source: arXiv 2407.01178, 3.5 and 3.6; design section 4.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from memory3.decoder import Decoder
from memory3.reader import BankReader, version_name
from memory3.recall import TRAINING_OVERLAP
from memory3.retrieval import RETRIEVERS, default_retriever
from memory3.splitting import overlap
from memory3.train.corpus import Corpus, Tell
from memory3.train.kept import one_at_a_time
from memory3.train.settings import TrainError

PART = 256
"""Rows of a file of the cache: what a kill costs at most."""
_ID = np.dtype("S32")
_TEXTS_HELD = 100_000


@dataclass(frozen=True)
class Asking:
    """How the reference of a chunk is chosen.

    Args:
        retriever: row of `RETRIEVERS`; by default the bank's own, as `Recall` has it.
        candidates: hits that are looked at, best first; the first that fits is taken.
        max_overlap: a reference whose overlap with the whole sequence is larger is passed over; `None` takes all.
        exclude_own: pass over references that one of the chunk's own documents holds word for word, white space apart;
            the documents of a chunk are all that one of its tokens is of, in their full length.
    """

    retriever: str | None = None
    candidates: int = 16
    max_overlap: float | None = TRAINING_OVERLAP
    exclude_own: bool = False

    def __post_init__(self) -> None:
        if self.retriever is not None and self.retriever not in RETRIEVERS:
            raise TrainError(f"found retriever {self.retriever!r}, expected one of {', '.join(RETRIEVERS)}")
        if self.candidates < 1:
            raise TrainError(f"found candidates={self.candidates}, expected at least 1 reference to choose from")


class ChunkTexts(Protocol):
    """Where the references of a row come from."""

    def texts(self, rows: Sequence[int]) -> list[list[str | None]]:
        """For each row of the corpus the text that each of its chunks retrieves; `None` where there is none."""


class ChunkReferences:
    """References of a bank for every chunk of a corpus.

    Args:
        decoder: gives tokenizer, chunk length and `<s>`.
        corpus: the training text.
        bank: gives texts and search only: it may have been written by other weights, and be opened without a decoder.
        length: tokens of a row.
        asking: how to choose.
        cache: folder under which answers are kept, by the state of the bank, the corpus and the settings; by default that of
            the corpus. Without any, each row is asked for when it is needed.
    """

    def __init__(
        self,
        decoder: Decoder,
        corpus: Corpus,
        bank: BankReader,
        length: int,
        asking: Asking | None = None,
        cache: Path | None = None,
    ) -> None:
        self.decoder, self.corpus, self.bank, self.length = decoder, corpus, bank, length
        self.asking = asking or Asking()
        name = self.asking.retriever or default_retriever([bank])
        self._retriever = RETRIEVERS[name](bank)
        self._texts: dict[str, str] = {}
        self._document = lru_cache(maxsize=64)(self._document_text)
        cache = cache or corpus.folder
        self.folder = None if cache is None else cache / f"retrieved-{self._key(name)}"

    def _key(self, retriever: str) -> str:
        bank, spec = self.bank, self.decoder.spec
        space = bank.space
        facts = [
            [bank.manifest.created, version_name(bank.version), len(bank), space.embedder if space else None, retriever],
            [self.corpus.key, self.length, spec.chunk_length, self.decoder.bos_ids],
            asdict(self.asking),
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def texts(self, rows: Sequence[int]) -> list[list[str | None]]:
        """For each row the text that each of its chunks retrieves; from the cache where that has the row."""
        found = [self._ids(row) for row in rows]
        self._learn({id for ids in found for id in ids if id})
        return [[self._texts[id] if id else None for id in ids] for ids in found]

    def prepare(self, tell: Tell = lambda done, total: None) -> None:
        """Ask for all rows and keep the answers; a run that was killed goes on behind the last whole part of 256 rows.

        Raises:
            TrainError: there is no cache, or it cannot be written.
        """
        if self.folder is None:
            raise TrainError("found no folder for the retrieved references, expected one: give `cache`, or a corpus on disk")
        count = self.corpus.rows(self.length)
        with one_at_a_time(self.folder):
            for first in range(0, count, PART):
                rows = range(first, min(count, first + PART))
                if not self._file(first).exists():
                    self._save(first, np.array(list(self._told(rows, count, tell)), _ID))
                tell(rows.stop, count)

    def _told(self, rows: range, count: int, tell: Tell) -> Iterator[list[str]]:
        for row in rows:
            yield self._asked(row)
            tell(row + 1, count)

    def _file(self, row: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{row // PART:07d}.npy"

    def _save(self, row: int, ids: np.ndarray) -> None:
        file = self._file(row)
        fresh = file.with_suffix(".new")
        try:
            with fresh.open("wb") as open_file:
                np.save(open_file, ids, allow_pickle=False)
            os.replace(fresh, file)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise TrainError(f"{file} cannot be written ({error.strerror}): free some space, and run again to go on") from error

    def _ids(self, row: int) -> list[str]:
        """Id of each chunk's reference, empty where it has none."""
        if self.folder is None or not self._file(row).exists():
            return self._asked(row)
        file = self._file(row)
        try:
            part = np.load(file, mmap_mode="r", allow_pickle=False)
            if part.dtype != _ID or part.ndim != 2:
                raise ValueError(f"{part.dtype} of {part.ndim} axes")
            return [id.decode("ascii") for id in part[row % PART].tolist()]
        except (OSError, ValueError, IndexError) as error:
            raise TrainError(f"found a damaged file {file} ({error}), expected ids of references: remove it") from None

    # ---- asking ----

    def _asked(self, row: int) -> list[str]:
        ids = self.corpus.row(row, self.length)
        spans = chunk_spans(len(ids), self.decoder.spec.chunk_length, len(self.decoder.bos_ids))
        hits = self._retriever.search([self._text(ids[a:b]).strip() for a, b in spans], self.asking.candidates)
        self._learn({hit.id for some in hits for hit in some})
        repeated: dict[str, bool] = {}
        offset, chosen = row * self.length, []
        for (a, b), some in zip(spans, hits, strict=True):
            foreign = (h.id for h in some if not (self.asking.exclude_own and self._own(h.id, offset + a, offset + b)))
            chosen.append(next((id for id in foreign if not self._repeats(ids, id, repeated)), ""))
        return chosen

    def _repeats(self, row: Sequence[int], id: str, known: dict[str, bool]) -> bool:
        """Whether the row repeats the reference: the filter of paper 3.6. No overlap exceeds the share of tokens in common."""
        limit = self.asking.max_overlap
        if limit is None:
            return False
        if id not in known:
            reference = self.decoder.tokens(self._texts[id])
            known[id] = bool(np.isin(reference, row).mean() > limit) and overlap(row, reference) > limit
        return known[id]

    def _own(self, id: str, start: int, end: int) -> bool:
        """Whether a document of tokens `start` to `end` of the corpus holds the reference."""
        reference = _even(self._text(self.decoder.tokens(self._texts[id])))
        return end > start and any(reference in self._document(n) for n in self.corpus.documents_of(start, end))

    def _document_text(self, number: int) -> str:
        return _even(self._text(self.corpus.document(number)))

    def _text(self, ids: Sequence[int]) -> str:
        """What token ids say, special tokens left out."""
        return str(self.decoder.tokenizer.decode(ids, skip_special_tokens=True))

    def _learn(self, ids: set[str]) -> None:
        """Hold the texts of some references."""
        if len(self._texts) > _TEXTS_HELD:
            self._texts.clear()
        unknown = [id for id in ids if id not in self._texts]
        self._texts.update({id: places[0].text for id, places in self.bank.references(unknown).items()} if unknown else {})


def chunk_spans(length: int, chunk: int, bos: int) -> list[tuple[int, int]]:
    """Where each chunk of a row of `length` tokens begins and ends; `bos` tokens of `<s>` before it count to the first."""
    return list(pairwise([0, *range(max(0, chunk - bos), length, chunk), length]))


def _even(text: str) -> str:
    """The text with single spaces for all white space."""
    return " ".join(text.split())
