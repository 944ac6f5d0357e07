"""What a run makes once and keeps in its folder: by one process, whole or not at all, and never taken for that of other data."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory3.train.settings import TrainError
from memory3.train.tokenizer import trained_tokenizer

MADE_OF = "made_of"
"""File beside a tokenizer that says what it was made of."""


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Make a folder and be the only process inside the block that works in it; `TrainError` where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise TrainError(f"{folder} cannot be written ({error.strerror}): give another folder for the cache") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def kept_tokenizer(folder: Path, made_of: str, texts: Callable[[], Iterable[str]], vocabulary: int) -> Any:
    """The tokenizer in a folder, which is made of the texts where none is there: whole or not at all, by one process.

    Args:
        folder: holds ordinary transformers files; one that was put there by hand is taken as it is.
        made_of: says what the texts are, and is kept beside it.
        texts: gives them.
        vocabulary: most tokens.

    Raises:
        TrainError: there is one that was made of something else, or it cannot be read.
    """
    from transformers import AutoTokenizer

    made_of = f"{made_of} {vocabulary}"
    with one_at_a_time(folder.parent):
        if not (folder / "tokenizer.json").exists():
            fresh = folder.with_name(f"{folder.name}.new")
            shutil.rmtree(fresh, ignore_errors=True)
            trained_tokenizer(texts(), vocabulary).save_pretrained(fresh)
            (fresh / MADE_OF).write_text(made_of, "utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(fresh, folder)
    if (folder / MADE_OF).exists() and (folder / MADE_OF).read_text("utf-8") != made_of:
        raise TrainError(f"found a tokenizer made of other data in {folder}, expected one of this data: use another --out")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise TrainError(f"found a damaged tokenizer in {folder} ({error}), expected a whole one: remove the folder") from None
