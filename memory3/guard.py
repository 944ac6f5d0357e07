"""One writer at a time, across processes, and never into a folder that became another bank meanwhile."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memory3.manifest import MANIFEST
from memory3.spec import BankError, BankMismatch

LOCK = "write.lock"
WAIT_S = 2.0
"""How long a writer waits for another: a recall that keeps a memory holds the lock for a moment."""


class Guard:
    """The write lock of a bank's folder, and which bank it was when it was opened.

    Args:
        path: the folder.
        prepare: what the first of nested blocks does before anything else.
    """

    def __init__(self, path: Path, prepare: Callable[[], None]) -> None:
        self.path, self.prepare = path, prepare
        self._lock: int | None = None
        self._depth = 0
        self._stamp: tuple[int, int] | None = None

    def remember(self) -> None:
        """From now on the folder must stay the bank that it is; its manifest is written once."""
        self._stamp = self._manifest_stamp()

    def check(self) -> None:
        """Raise `BankMismatch` where the folder became another bank since it was opened."""
        if self._stamp is not None and self._manifest_stamp() != self._stamp:
            raise BankMismatch(
                f"{self.path} was rebuilt or replaced since it was opened, expected the same bank: open it again"
            )

    @contextmanager
    def exclusive(self, wait_s: float = WAIT_S) -> Iterator[None]:
        """Be the only writer inside the block; may be nested. `BankError` where another one is at work for longer than `wait_s`."""
        if self._depth == 0:
            self._lock = self._taken(wait_s)
        self._depth += 1
        try:
            if self._depth == 1:
                self.check()
                shutil.rmtree(replaced_bank(self.path), ignore_errors=True)  # what a rebuild that was killed left
                self.prepare()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0 and self._lock is not None:
                os.close(self._lock)
                self._lock = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep writers out inside the block, and change nothing; `BankError` where one is at work."""
        if self._depth:
            yield
            return
        lock = self._taken()
        try:
            yield
        finally:
            os.close(lock)

    def _manifest_stamp(self) -> tuple[int, int] | None:
        try:
            status = (self.path / MANIFEST).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _taken(self, wait_s: float = WAIT_S) -> int:
        try:
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BankError(f"{self.path} cannot be written ({error.strerror}): make the folder writable") from error
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.01)
                    continue
                os.close(descriptor)
                raise BankError(
                    f"{self.path} is being written by another process, expected one writer at a time: wait for it"
                ) from None


def replaced_bank(path: Path) -> Path:
    """Where a rebuild puts the old bank for the moment between two renames."""
    path = path.absolute()
    return path.with_name(f".{path.name}.memory3-replaced")
