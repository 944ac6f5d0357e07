"""Rows of tables: Parquet, JSON lines and CSV files, folders of them, and datasets of the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory3.spec import SourceError

HUB = "hub:"
"""What stands before the name of a dataset of the Hugging Face hub: `hub:NAME`, `hub:NAME:SUBSET`, `hub:NAME@SPLIT`."""
Row = dict[str, Any]
Placed = tuple[str, Row]
"""A row behind the place that an error names."""


def rows(source: str | os.PathLike[str]) -> Iterator[Placed]:
    """Rows of a local file (.parquet, .jsonl, .csv), of a folder that `datasets` can load, or of a hub dataset, as a stream.

    A dataset of several splits gives all of them, each row with its `split`.

    Raises:
        SourceError: the source is missing, of another kind, or damaged; the message says where.
    """
    path, name = Path(source), str(source)
    if name.startswith(HUB) or path.is_dir():
        yield from _of_datasets(name)
        return
    if path.suffix.lower() not in _KINDS or not path.is_file():
        kinds = ", ".join(_KINDS)
        raise SourceError(f"found no file {name!r} of the kinds {kinds}, expected one, a dataset's folder, or {HUB}NAME")
    try:
        yield from _KINDS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise SourceError(f"{source} is no UTF-8 at byte {error.start}, expected it: convert the file") from None
    except OSError as error:
        raise SourceError(f"{source} cannot be read ({error.strerror}): check its permissions") from None


def of_split(found: Iterable[Placed], split: str = "train") -> Iterator[Placed]:
    """Rows of one split, and those that name none: nobody learns from what is kept for a measurement."""
    return ((where, row) for where, row in found if (row.get("split") or split) == split)


def answers_of(row: Mapping[str, Any], where: str) -> list[str]:
    """The accepted answers of a question, stripped, empty ones left out.

    Under `answers`, else `answer`, is a text, a list of texts, or SQuAD's `{"text": [...]}`; without any there are none.

    Raises:
        SourceError: it is something else; the message names the place.
    """
    given = row["answers"] if row.get("answers") is not None else row.get("answer")
    found = given.get("text") if isinstance(given, Mapping) else [given] if isinstance(given, str) else given
    if found is None and given is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise SourceError(f"found answers {str(given)[:60]} at {where}, expected a text or a list of texts under 'answers'")
    return [one.strip() for one in found if one.strip()]


def _parquet(path: Path) -> Iterator[Placed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            found = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            yield from ((f"{path} row {number}", row) for number, row in enumerate(found, 1))
    except pa.ArrowException as error:
        raise SourceError(
            f"{path} is no Parquet file ({str(error).splitlines()[0]}), expected one: restore or convert it"
        ) from None


def _json_lines(path: Path) -> Iterator[Placed]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{path}:{number} is no JSON ({error}), expected one object per line") from None
            if not isinstance(row, dict):
                raise SourceError(f"{path}:{number} is a JSON {type(row).__name__}, expected one object per line")
            yield f"{path}:{number}", row


def _csv(path: Path) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, strict=True)
        try:
            yield from ((f"{path} row {number}", row) for number, row in enumerate(table, 1))
        except csv.Error as error:
            raise SourceError(f"{path} is no CSV at line {table.line_num} ({error}): correct or convert it") from None


_KINDS: dict[str, Callable[[Path], Iterator[Placed]]] = {".parquet": _parquet, ".jsonl": _json_lines, ".csv": _csv}
TABLES = tuple(_KINDS)
"""Suffixes of the files that hold rows."""


# ---- datasets ----


def _of_datasets(source: str) -> Iterator[Placed]:
    name, subset, split = hub_name(source)
    with datasets_for(source) as library:
        found = library.load_dataset(name, subset, split=split, streaming=True)
        parts = found.items() if isinstance(found, dict) else [(split, found)]
        every = (({"split": part} if not split else {}) | row for part, some in parts for row in some)
        yield from ((f"{source} row {number}", row) for number, row in enumerate(every, 1))


def hub_name(source: str) -> tuple[str, str | None, str | None]:
    """Name, subset and split of `hub:NAME[:SUBSET][@SPLIT]`, with or without the front; `SourceError` without a name."""
    address, _, split = source.removeprefix(HUB).partition("@")
    name, _, subset = address.partition(":")
    if not name:
        raise SourceError(f"found {source!r}, expected the name of a dataset: hub:NAME, hub:NAME:SUBSET or hub:NAME@SPLIT")
    return name, subset or None, split or None


@contextmanager
def datasets_for(source: str) -> Iterator[Any]:
    """The library `datasets` inside the block, and its errors as ours. It runs no code of a dataset since version 4."""
    try:
        import datasets
    except ImportError:
        raise SourceError(f"{source} needs datasets, which is not installed: pip install 'memory3[train]'") from None
    try:
        yield datasets
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"{source} cannot be read ({reason}), expected a dataset: hub:NAME, hub:NAME:SUBSET or hub:NAME@SPLIT"
        ) from None
