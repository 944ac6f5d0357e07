"""Flat files of fixed-size records: appended and synced when written, read one by one where they lie (docs/bank.md)."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from memory3.spec import BankError

Place = tuple[int, int]
"""Shard number and slot inside it."""
NO_RECORD: Place = (-1, -1)
"""The place of what is kept as text alone."""

ID_OFFSET = 16
"""Where a record holds the id of its memory."""
OPEN_FILES = 128
"""Shard files that are held open: far below the files that a process may have, which banks of terabytes have more of."""
_NAME = re.compile(r"(\d{5})\.kv")


class Shards:
    """The shard files of a folder.

    Args:
        folder: where `00000.kv`, `00001.kv`, ... lie; made at the first append.
        record_bytes: size of every record.
        per_shard: most records of one file.
    """

    def __init__(self, folder: Path, record_bytes: int, per_shard: int) -> None:
        self.folder, self.record_bytes, self.per_shard = folder, record_bytes, per_shard
        self._opened: dict[int, tuple[int, int]] = {}  # inode and descriptor: a number may come again as another file

    def append(self, records: Sequence[bytes]) -> list[Place]:
        """Write records behind all others and sync them to disk; their places, in order.

        Raises:
            BankError: the disk is full or refuses; the files are as they were before.
        """
        places: list[Place] = []
        before = self._sizes()
        try:
            self.folder.mkdir(exist_ok=True)
            while len(places) < len(records):
                places += self._append_to_last(records[len(places) :])
        except OSError as error:
            self._restore(before)
            raise BankError(
                f"{self.folder} could not take {len(records)} records ({error.strerror}): free some space, write again"
            ) from error
        return places

    def read(self, shard: int, slot: int) -> bytearray:
        """A private copy of one record; `BankError` where the file is missing or too short."""
        record, start = bytearray(self.record_bytes), slot * self.record_bytes
        try:
            descriptor = self._descriptor(shard)
            read = os.preadv(descriptor, [record], start) if start >= 0 else 0
            size = os.fstat(descriptor).st_size if read < len(record) else 0
        except OSError as error:
            raise BankError(
                f"{self._path(shard)} cannot be read ({error.strerror}): restore it from a copy, or write its documents again"
            ) from error
        if read < len(record):
            raise BankError(
                f"{self._path(shard)} has {size} bytes, expected at least {start + len(record)}: it was cut; write its documents again (memory3 write)"
            )
        return record

    def replace(self, records: Mapping[Place, bytes]) -> None:
        """Overwrite records that no row points at any more, and sync.

        Raises:
            BankError: the disk refuses; what stood there may be gone.
        """
        by_shard: dict[int, list[int]] = {}
        for shard, slot in records:
            by_shard.setdefault(shard, []).append(slot)
        for shard, slots in by_shard.items():
            try:
                with self._path(shard).open("r+b") as file:
                    for slot in slots:
                        file.seek(slot * self.record_bytes)
                        file.write(records[shard, slot])
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise BankError(f"{self._path(shard)} cannot be written ({error.strerror}): make it writable") from error

    def erase(self, places: Iterable[Place]) -> None:
        """Overwrite records with zeros and sync; what a lost or cut file no longer holds is passed over."""
        by_shard: dict[int, list[int]] = {}
        for shard, slot in places:
            by_shard.setdefault(shard, []).append(slot)
        for shard, slots in by_shard.items():
            try:
                self._erase_in(shard, slots)
            except OSError as error:
                raise BankError(f"{self._path(shard)} cannot be erased in ({error.strerror}): make it writable") from error

    def records_of(self, ids: Collection[str]) -> list[tuple[Place, str]]:
        """Records of these memories and whose they are, of those too that no row points at: a move that was interrupted leaves some."""
        wanted, found = {bytes.fromhex(id): id for id in ids}, list[tuple[Place, str]]()
        for number, size in self._sizes().items() if wanted else ():
            with self._path(number).open("rb", buffering=0) as file:
                for slot in range(size // self.record_bytes):
                    owner = os.pread(file.fileno(), 16, slot * self.record_bytes + ID_OFFSET)
                    found += [((number, slot), wanted[owner])] if owner in wanted else []
        return found

    def numbers(self) -> list[int]:
        """Numbers of the shard files, ascending."""
        return sorted(self._sizes())

    def copy_to_new(self, places: Sequence[Place]) -> list[Place]:
        """Copy records, in this order, into files with numbers above all others; their new places.

        Raises:
            BankError: the disk is full or refuses, or a record cannot be read; the new files are gone again.
        """
        first = max(self._sizes(), default=-1) + 1
        moved: list[Place] = []
        try:
            for start in range(0, len(places), self.per_shard):
                number = first + start // self.per_shard
                some = places[start : start + self.per_shard]
                with self._path(number).open("wb") as file:
                    for place in some:
                        file.write(self.read(*place))
                    file.flush()
                    os.fsync(file.fileno())
                moved += [(number, slot) for slot in range(len(some))]
            sync_folder(self.folder)
        except (OSError, BankError) as error:
            self.remove(number for number in self._sizes() if number >= first)
            if isinstance(error, BankError):
                raise
            raise BankError(
                f"{self.folder} cannot be compacted ({error.strerror}), it is as it was: free some space"
            ) from error
        return moved

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove shard files; readers that opened one go on reading it until they look their records up again."""
        for number in list(numbers):
            self._path(number).unlink(missing_ok=True)
            self._close(number)
        if self.folder.is_dir():
            sync_folder(self.folder)

    def total_bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(self._sizes().values())

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        for number in list(self._opened):
            self._close(number)

    def describe(self, place: Place) -> str:
        """The place in words, for errors."""
        return f"record {place[1]} of {self._path(place[0])}"

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.kv"

    def _sizes(self) -> dict[int, int]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return {int(match[1]): path.stat().st_size for path in found if (match := _NAME.fullmatch(path.name))}

    def _append_to_last(self, records: Sequence[bytes]) -> list[Place]:
        """Fill up the last shard, or a new one where it is full; a torn record at its end is overwritten."""
        sizes = self._sizes()
        shard = max(sizes, default=0)
        first = sizes.get(shard, 0) // self.record_bytes
        if first >= self.per_shard:
            shard, first = shard + 1, 0
        batch = records[: self.per_shard - first]
        descriptor = os.open(self._path(shard), os.O_RDWR | os.O_CREAT, 0o644)
        with open(descriptor, "r+b") as file:
            file.seek(first * self.record_bytes)
            file.writelines(batch)
            file.flush()
            os.fsync(file.fileno())
        if first == 0:
            sync_folder(self.folder)
        return [(shard, first + i) for i in range(len(batch))]

    def _restore(self, before: dict[int, int]) -> None:
        for shard, size in self._sizes().items():
            if shard not in before:
                self._path(shard).unlink()
            elif size > before[shard]:
                os.truncate(self._path(shard), before[shard])

    def _descriptor(self, shard: int) -> int:
        """The open shard, opened again where another file has its name now."""
        path = self._path(shard)
        inode, descriptor = self._opened.get(shard, (None, -1))
        if inode != path.stat().st_ino:
            self._close(shard)
            while len(self._opened) >= OPEN_FILES:
                self._close(next(iter(self._opened)))
            descriptor = os.open(path, os.O_RDONLY)
            inode = os.fstat(descriptor).st_ino
        else:
            del self._opened[shard]  # the one used last stands last
        self._opened[shard] = (inode, descriptor)
        return descriptor

    def _close(self, shard: int) -> None:
        if shard in self._opened:
            os.close(self._opened.pop(shard)[1])

    def __del__(self) -> None:
        self.close()

    def _erase_in(self, shard: int, slots: Iterable[int]) -> None:
        held = self._sizes().get(shard, 0) // self.record_bytes
        if held == 0:
            return
        with self._path(shard).open("r+b") as file:
            for slot in (s for s in slots if s < held):
                file.seek(slot * self.record_bytes)
                file.write(bytes(self.record_bytes))
            file.flush()
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bytes_under(folder: Path) -> int:
    """Bytes of all files of a folder and those inside it."""
    total, folders = 0, [str(folder)]
    while folders:
        with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:  # another process may tidy up meanwhile
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    continue
                with suppress(FileNotFoundError):
                    total += entry.stat().st_size
    return total
