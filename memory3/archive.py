"""A bank as one file, and back: a tar of its files behind a list of their sizes and checksums. Nothing in it is executed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from memory3.bank import Bank
from memory3.codebook import CODEBOOK
from memory3.manifest import MANIFEST
from memory3.spec import BankError
from memory3.tiers import SETTINGS

LISTING = "checksums.json"
MOST_LISTING_BYTES = 64 * 2**20
_BLOCK = 2**20
_LANCE = "data|_versions|_indices|_transactions|_deletions|_refs"
_OURS = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(CODEBOOK)}|{re.escape(SETTINGS)}|shards/\d{{5}}\.kv|index\.lance/(memories|sources)\.lance/({_LANCE})/[\w.\-/]+"
)
OnProgress = Callable[[int, int | None], None]
Listing = dict[str, tuple[int, str]]
"""Files of a bank: their sizes, and their BLAKE2b checksums of 32 bytes."""


def is_ours(name: str) -> bool:
    """Whether a file of this name belongs to a bank."""
    return bool(_OURS.fullmatch(name)) and ".." not in PurePosixPath(name).parts


def files_of(bank: Bank) -> dict[str, Path]:
    """What a bank is made of, by name inside its folder; take it under the bank's lock."""
    names = {p.relative_to(bank.path).as_posix(): p for p in sorted(bank.path.rglob("*")) if p.is_file()}
    return {name: path for name, path in names.items() if is_ours(name)}


def listing_of(files: dict[str, Path]) -> Listing:
    """Sizes and checksums of files."""
    return {name: (path.stat().st_size, _digest_of(path)) for name, path in files.items()}


def export_bank(bank: Bank, file: Path, on_progress: OnProgress | None = None) -> int:
    """Write a bank into one archive, whole or not at all; its bytes.

    The bank is locked against writers meanwhile. Key-values hardly compress, so the archive is a plain tar.

    Raises:
        BankError: the file exists, the disk is full, or another process writes.
    """
    if file.exists():
        raise BankError(f"{file} exists, expected a new name: remove it, or give another")
    if file.resolve().is_relative_to(bank.path.resolve()):
        raise BankError(f"{file} lies inside the bank, expected a place outside of {bank.path}")
    if not file.absolute().parent.is_dir():
        raise BankError(f"{file} has no folder to be in, expected {file.parent} to exist: make it first")
    fresh = file.absolute().with_name(f".{file.name}.{secrets.token_hex(4)}.memory3-exporting")
    with bank.exclusive():
        files = files_of(bank)
        total, done = sum(p.stat().st_size for p in files.values()), 0
        try:
            listing = listing_of(files)
            with tarfile.open(fresh, "w", format=tarfile.PAX_FORMAT) as archive:
                _add(archive, LISTING, json.dumps(listing).encode())
                for name, path in files.items():
                    archive.add(path, name, recursive=False, filter=_anonymous)
                    done += path.stat().st_size
                    if on_progress:
                        on_progress(done, total)
            fresh.replace(file)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise BankError(
                f"{file} could not be written ({error.strerror}): free some space, or give another folder"
            ) from error
    return file.stat().st_size


def import_bank(file: Path, path: Path, on_progress: OnProgress | None = None) -> Bank:
    """Make a bank out of an archive, whole or not at all.

    Names must be those of a bank's files, so nothing leaves the folder. Sizes and checksums must be those of the listing
    that comes first; whatever else is in the archive is refused.

    Raises:
        BankError: no archive of a bank, damage, a name that is not ours, or a target that exists.
    """
    with fresh_bank(path) as fresh:
        try:
            with tarfile.open(file, "r:") as archive:
                _unpack(archive, fresh, file, on_progress)
        except tarfile.TarError as error:
            raise BankError(f"{file} is no archive of a bank ({error}): take one that `memory3 bank export` made") from None
        except OSError as error:
            raise BankError(f"{file} cannot be unpacked to {path} ({error.strerror or error})") from error
    return Bank(path)


@contextmanager
def fresh_bank(path: Path) -> Iterator[Path]:
    """A folder to put the files of a bank into, which takes its place at `path` when it is one, and else goes.

    Raises:
        BankError: the place is taken, or what was put there is no bank.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BankError(f"{path} exists, expected a new folder: give another")
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.memory3-importing")
    try:
        yield fresh
        with Bank(fresh) as opened:
            len(opened)
        if path.exists():
            path.rmdir()
        os.replace(fresh, path)
    except OSError as error:
        raise BankError(f"{path} cannot be made ({error.strerror or error})") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _unpack(archive: tarfile.TarFile, folder: Path, file: Path, on_progress: OnProgress | None) -> None:
    listing = _listing(archive, file)
    total, done = sum(size for size, _ in listing.values()), 0
    left = dict(listing)
    for member in archive:
        if member.name == LISTING:
            continue
        if member.name not in left or not member.isreg():
            raise BankError(
                f"{file} holds {member.name!r}, expected the files of its listing only, each once: it was tampered with"
            )
        size, digest = left.pop(member.name)
        source = archive.extractfile(member)
        assert source is not None
        if member.size != size or copied(iter(partial(source.read, _BLOCK), b""), folder / member.name, size) != digest:
            raise BankError(f"{member.name} in {file} is damaged (size or checksum differ): copy the archive again")
        done += size
        if on_progress:
            on_progress(done, total)
    if left:
        raise BankError(f"{file} lacks {sorted(left)[0]}, expected {len(listing)} files: copy the archive again")


def _listing(archive: tarfile.TarFile, file: Path) -> Listing:
    first = archive.next()
    if first is None or first.name != LISTING or not first.isreg() or first.size > MOST_LISTING_BYTES:
        raise BankError(f"{file} does not begin with {LISTING}, expected an archive that `memory3 bank export` made")
    source = archive.extractfile(first)
    assert source is not None
    return checked_listing(source.read(), str(file))


def checked_listing(data: bytes, where: str) -> Listing:
    """Names, sizes and checksums out of JSON; every name is one that a bank has, so nothing leaves its folder."""
    try:
        found = {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BankError(f"{LISTING} in {where} is ill-formed ({error}): copy the bank again") from None
    for name in found:
        if not is_ours(name):
            raise BankError(f"{where} lists {name!r}, expected the names of a bank's files only: do not trust it")
    return found


def copied(blocks: Iterable[bytes], target: Path, size: int) -> str:
    """Write a new file of `size` bytes, no more, and sync it; its checksum."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, written = hashlib.blake2b(digest_size=32), 0
    with target.open("xb") as file:
        for block in blocks:
            written += len(block)
            if written > size:
                return "too long"
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _digest_of(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _anonymous(member: Any) -> Any:
    """Without the owner's name and number."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
