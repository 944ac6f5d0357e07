"""Training text: tokenised once, kept on disk as one long row of token ids, and read from there without filling memory.

A corpus is a folder of three files: `ids.npy` (token ids), `starts.npy` (where each document begins) and `corpus.json` (of
what it was made). It is made whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from memory3.documents import KINDS, Document, OnUnreadable, documents
from memory3.identity import tokenizer_fingerprint
from memory3.rows import HUB, datasets_for, hub_name, rows
from memory3.spec import SourceError
from memory3.train.kept import one_at_a_time
from memory3.train.settings import TrainError

FORMAT_VERSION = 1
IDS, STARTS, HEADER = "ids.npy", "starts.npy", "corpus.json"
STDIN_SIGN = "-"
_AT_ONCE = 256
_MOST_SHORT = 2**16

Tell = Callable[[int, int | None], None]
"""Told of progress: how many are done, and of how many, `None` where that is not known."""
Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Corpus:
    """Documents as one row of token ids, each with `</s>` behind it where the tokenizer has one.

    Args:
        ids: `(tokens,)` uint16 where the vocabulary allows, else int32; mapped from its file, not read.
        starts: `(documents + 1,)` int64, where each document begins; the last is the number of tokens.
        key: hash of what the ids are a function of.
        folder: where it lies; `None` for one that is only in memory.
    """

    ids: np.ndarray
    starts: np.ndarray
    key: str
    folder: Path | None = None

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    def rows(self, length: int) -> int:
        """Rows of `length` tokens; what is left behind the last whole row is not used."""
        return len(self.ids) // length

    def row(self, number: int, length: int) -> list[int]:
        """Token ids of a row."""
        found: list[int] = self.ids[number * length : (number + 1) * length].tolist()
        return found

    def documents_of(self, start: int, end: int) -> range:
        """Numbers of the documents that tokens `start` to `end` (excluded, at least one token) are of."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        return range(first, int(np.searchsorted(self.starts, end, "left")))

    def document(self, number: int) -> list[int]:
        """Token ids of a document, `</s>` included."""
        found: list[int] = self.ids[int(self.starts[number]) : int(self.starts[number + 1])].tolist()
        return found

    @classmethod
    def of_texts(cls, texts: Iterable[str], tokenizer: Any) -> Corpus:
        """A small corpus in memory."""
        dtype = _dtype(tokenizer)
        rows = [row for some in _tokenised(texts, tokenizer, dtype) for row in some]
        ids = np.concatenate([np.zeros(0, dtype), *rows])
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        content = hashlib.blake2b(ids.tobytes() + starts.tobytes(), digest_size=16).hexdigest()
        return cls(ids, starts, _hash([content, tokenizer_fingerprint(tokenizer)]))

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """The corpus that `tokenised` left in a folder, mapped; `TrainError` where it is damaged."""
        try:
            header = json.loads((folder / HEADER).read_text("utf-8"))
            ids, starts = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (IDS, STARTS))
            sizes = (header["format_version"], ids.shape, starts.shape, int(starts[-1]))
            if sizes != (FORMAT_VERSION, (header["tokens"],), (header["documents"] + 1,), header["tokens"]):
                raise ValueError(f"{header['tokens']} tokens promised, {ids.shape} found")
            return cls(ids, starts, str(header["key"]), folder)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise TrainError(
                f"found a damaged corpus in {folder} ({error}), expected {IDS}, {STARTS} and {HEADER}: remove the folder"
            ) from None


def tokenised(
    sources: Sources,
    tokenizer: Any,
    cache: Path,
    *,
    text_field: str = "text",
    on_unreadable: OnUnreadable | None = None,
    tell: Tell | None = None,
) -> Corpus:
    """The corpus of some sources, from the cache where nothing changed, else tokenised as a stream.

    One batch of documents is in memory at a time. Of several processes that ask, one works and the others wait for it.

    Args:
        sources: files, folders (the kinds of `documents.KINDS`) and datasets of the Hugging Face hub (`hub:NAME`).
        tokenizer: of the model; its rules and its `</s>` are part of the cache's key.
        cache: folder under which corpora lie, each in a folder named by its key: path, size and time of change of each file
            or the hub's own hash, tokenizer, and settings.
        text_field: field or column that holds the text.
        on_unreadable: told of each document that cannot be read, which is then left out; by default it is an error.
        tell: told of the documents done.

    Raises:
        SourceError: a source is missing, unreadable, or holds no text.
        TrainError: the cache is damaged or cannot be written, or `datasets` is not installed.
    """
    several = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    facts = {
        "sources": [_identity(source, text_field) for source in several],
        "tokenizer": [tokenizer_fingerprint(tokenizer), tokenizer.eos_token_id],
        "settings": [FORMAT_VERSION, text_field, on_unreadable is None],
    }
    key = _hash(facts)
    with one_at_a_time(cache):
        if not (cache / key / HEADER).exists():
            texts = (found.text for found in read_documents(several, text_field, on_unreadable))
            _write(cache, key, facts, texts, tokenizer, tell or _ignore)
    return Corpus.load(cache / key)


def _write(cache: Path, key: str, facts: dict[str, Any], texts: Iterable[str], tokenizer: Any, tell: Tell) -> None:
    fresh = cache / f"{key}.new"
    shutil.rmtree(fresh, ignore_errors=True)  # what a kill left
    try:
        fresh.mkdir()
        tokens, count = _write_arrays(fresh, texts, tokenizer, tell)
        if not count:
            raise SourceError(f"found no text in {facts['sources']}, expected some to train on: give other data")
        header = {"format": "memory3 corpus", "format_version": FORMAT_VERSION, "key": key, "tokens": tokens}
        (fresh / HEADER).write_text(json.dumps(header | {"documents": count, **facts}, indent=1) + "\n", "utf-8")
        shutil.rmtree(cache / key, ignore_errors=True)  # a folder without a header is no corpus
        os.replace(fresh, cache / key)
    except OSError as error:
        raise TrainError(
            f"{cache} cannot take the tokens ({error.strerror}), nothing was kept: free some space, or give another folder"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_arrays(folder: Path, texts: Iterable[str], tokenizer: Any, tell: Tell) -> tuple[int, int]:
    """Both arrays as the texts come; how many tokens and documents."""
    dtype = _dtype(tokenizer)
    with _growing(folder / IDS, dtype) as ids, _growing(folder / STARTS, np.dtype(np.int64)) as starts:
        starts.append(np.zeros(1, np.int64))
        for rows in _tokenised(texts, tokenizer, dtype):
            starts.append(ids.count + np.cumsum([len(row) for row in rows]))
            ids.append(np.concatenate(rows))
            tell(starts.count - 1, None)
        return ids.count, starts.count - 1


class _Growing:
    """A one-dimensional `.npy` file whose length is known only at its end: numpy's header keeps room for it."""

    def __init__(self, file: Any, dtype: np.dtype[Any]) -> None:
        self.file, self.dtype, self.count = file, dtype, 0
        self.header()
        self.begin = file.tell()

    def header(self) -> None:
        """Write the header for the present length."""
        shape = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count,)}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, shape)

    def append(self, values: np.ndarray) -> None:
        """Add values behind the last."""
        self.file.write(values.astype(self.dtype, copy=False).tobytes())
        self.count += len(values)


@contextmanager
def _growing(path: Path, dtype: np.dtype[Any]) -> Iterator[_Growing]:
    with path.open("wb") as file:
        array = _Growing(file, dtype)
        yield array
        array.header()
        assert file.tell() == array.begin, "numpy's header keeps its length"
        file.flush()
        os.fsync(file.fileno())


def _tokenised(texts: Iterable[str], tokenizer: Any, dtype: np.dtype[Any]) -> Iterator[list[np.ndarray]]:
    """Token ids of some documents at a time, `</s>` behind each; those without tokens are left out."""
    end, stream = tokenizer.eos_token_id, iter(texts)
    behind = [] if end is None else [int(end)]
    while some := list(islice(stream, _AT_ONCE)):
        found = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        if rows := [np.array([*row, *behind], dtype) for row in found if row]:
            yield rows


def _dtype(tokenizer: Any) -> np.dtype[Any]:
    return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < _MOST_SHORT else np.int32)


def _hash(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _ignore(done: int, total: int | None) -> None:
    pass


# ---- sources ----


def data_key(sources: Sources) -> str:
    """What tells data from other data, wherever it lies: size, beginning and end of each file, and the hub's own hash."""
    several = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    return _hash([_identity(one, "") if str(one).startswith(HUB) else [*map(_sampled, _local(one))] for one in several])


def _local(source: str | os.PathLike[str]) -> list[Path]:
    if source == STDIN_SIGN:
        raise SourceError("found - for stdin, expected text that can be read again: put it into a file")
    if not Path(source).exists():
        documents(source)  # says so
    return files_of(Path(source).resolve())


def _sampled(file: Path) -> list[Any]:
    size = file.stat().st_size
    with file.open("rb") as content:
        digest = hashlib.blake2b(content.read(_SAMPLE_BYTES), digest_size=16)
        content.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(content.read(_SAMPLE_BYTES))
    return [file.suffix.lower(), size, digest.hexdigest()]


_SAMPLE_BYTES = 2**16


def files_of(path: Path) -> list[Path]:
    """The files of a folder whose kind can be read, in order; a file itself."""
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS and p.is_file()) if path.is_dir() else [path]


def _identity(source: str | os.PathLike[str], text_field: str) -> Any:
    """What tells the content of a source from another, as JSON values."""
    if str(source).startswith(HUB):
        with datasets_for(str(source)) as library:
            name, subset, split = hub_name(str(source))
            return [name, subset, split or "train", library.load_dataset_builder(name, subset).hash]
    files = _local(source)
    documents(source, text_field=text_field)  # says so where the path is of an unknown kind
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file in files for stat in [file.stat()]]


def read_documents(
    sources: Sequence[str | os.PathLike[str]], text_field: str = "text", on_unreadable: OnUnreadable | None = None
) -> Iterator[Document]:
    """The documents of files, folders and hub datasets (whose split is `train` where none is named), as a stream."""
    for source in sources:
        if str(source).startswith(HUB):
            yield from _of_hub(str(source), text_field, on_unreadable)
        else:
            yield from documents(source, text_field=text_field, on_unreadable=on_unreadable)


def _of_hub(source: str, text_field: str, on_unreadable: OnUnreadable | None) -> Iterator[Document]:
    for where, row in rows(source if hub_name(source)[2] else f"{source}@train"):
        text = row.get(text_field)
        if isinstance(text, str):
            yield Document(where, text)
            continue
        error = SourceError(
            f"{where} has no text in {text_field!r}, expected one among its fields {', '.join(row)}: name another field"
        )
        if on_unreadable is None:
            raise error
        on_unreadable(error)
