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
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any

from memory3.bank import Bank
from memory3.manifest import MANIFEST
from memory3.spec import BankError

LISTING = "checksums.json"
MOST_LISTING_BYTES = 64 * 2**20
_BLOCK = 2**20
_OURS = re.compile(rf"{re.escape(MANIFEST)}|shards/\d{{5}}\.kv|index\.lance/[\w.\-/]+")
OnProgress = Callable[[int, int | None], None]


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
        paths = [p for p in sorted(bank.path.rglob("*")) if p.is_file() and _OURS.fullmatch(_name(p, bank.path))]
        total, done = sum(p.stat().st_size for p in paths), 0
        try:
            listing = {_name(p, bank.path): [p.stat().st_size, _digest_of(p)] for p in paths}
            with tarfile.open(fresh, "w", format=tarfile.PAX_FORMAT) as archive:
                _add(archive, LISTING, json.dumps(listing).encode())
                for path in paths:
                    archive.add(path, _name(path, bank.path), recursive=False, filter=_anonymous)
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
    path = Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BankError(f"{path} exists, expected a new folder: give another")
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.memory3-importing")
    try:
        with tarfile.open(file, "r:") as archive:
            _unpack(archive, fresh, file, on_progress)
        with Bank(fresh) as opened:  # it must be one before it takes its place
            len(opened)
        if path.exists():
            path.rmdir()
        os.replace(fresh, path)
    except tarfile.TarError as error:
        raise BankError(f"{file} is no archive of a bank ({error}): take one that `memory3 bank export` made") from None
    except OSError as error:
        raise BankError(f"{file} cannot be unpacked to {path} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Bank(path)


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
        if member.size != size or _copied(source, folder / member.name) != digest:
            raise BankError(f"{member.name} in {file} is damaged (size or checksum differ): copy the archive again")
        done += size
        if on_progress:
            on_progress(done, total)
    if left:
        raise BankError(f"{file} lacks {sorted(left)[0]}, expected {len(listing)} files: copy the archive again")


def _listing(archive: tarfile.TarFile, file: Path) -> dict[str, tuple[int, str]]:
    """Names, sizes and checksums; every name is one that a bank has."""
    first = archive.next()
    if first is None or first.name != LISTING or not first.isreg() or first.size > MOST_LISTING_BYTES:
        raise BankError(f"{file} does not begin with {LISTING}, expected an archive that `memory3 bank export` made")
    source = archive.extractfile(first)
    assert source is not None
    try:
        found = {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(source.read()).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BankError(f"{LISTING} in {file} is ill-formed ({error}): copy the archive again") from None
    for name in found:
        if not _OURS.fullmatch(name) or ".." in PurePosixPath(name).parts:
            raise BankError(f"{file} lists {name!r}, expected the names of a bank's files only: do not trust it")
    return found


def _copied(source: IO[bytes], target: Path) -> str:
    """Copy a file and sync it; its checksum."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(digest_size=32)
    with target.open("xb") as file:
        while block := source.read(_BLOCK):
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


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _anonymous(member: Any) -> Any:
    """Without the owner's name and number."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
