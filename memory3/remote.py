"""A bank on object storage, read where it lies: tables by LanceDB, key-values by ranges through a bounded cache on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memory3.bank import SHARDS, Bank
from memory3.catalogue import FOLDER, Catalogue
from memory3.embedding import Embedder
from memory3.manifest import MANIFEST, Manifest
from memory3.reader import BankReader, Loaded, MemoryWriter
from memory3.shards import NO_RECORD, Place
from memory3.spec import BankError, Memory

CACHE_BYTES = 2**30
_FEWEST_SWEPT = 64
"""Records that a full cache lets go at once, so that it is not listed for each of them."""


def is_remote(address: str | os.PathLike[str]) -> bool:
    """Whether an address names an object store: `s3://…`, `gs://…`, `az://…`."""
    return "://" in str(address)


def open_bank(
    address: str | os.PathLike[str],
    decoder: MemoryWriter | None = None,
    *,
    embedder: Embedder | None = None,
    at: str | None = None,
) -> BankReader:
    """A bank to read from, in a folder or on object storage; errors as of `Bank` and `RemoteBank`."""
    if is_remote(address):
        return RemoteBank(str(address), decoder, embedder=embedder, at=at)
    return Bank(address, decoder, embedder=embedder, at=at)


def store_of(address: str) -> Any:
    """The object store behind an address; credentials and endpoint come from the environment (`AWS_…`).

    Raises:
        BankError: obstore is missing, or does not know the address.
    """
    try:
        from obstore.store import from_url
    except ImportError:
        raise BankError(f"{address} needs obstore, which is not installed: pip install 'memory3[remote]'") from None
    try:
        return from_url(address, retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=20)})
    except Exception as error:  # obstore's own classes differ between versions
        raise BankError(f"{address} cannot be opened ({_reason(error)}), expected s3://BUCKET/PATH or the like") from None


def fetched(store: Any, address: str, name: str) -> bytes:
    """A whole object; `BankError` where it is missing or out of reach."""
    import obstore

    try:
        return bytes(obstore.get(store, name).bytes())
    except FileNotFoundError:
        raise BankError(f"no bank at {address} (it has no {name}); put one there: memory3 bank push BANK {address}") from None
    except Exception as error:
        raise unreachable(address, error) from None


def unreachable(address: str, error: BaseException) -> BankError:
    """What to say where a store does not answer."""
    return BankError(
        f"{address} cannot be reached ({_reason(error)}): check the address, the network and the credentials in AWS_… variables"
    )


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]


class RecordCache:
    """Records on the local disk, the least recently used leave first. Without a disk that takes them nothing is held.

    Args:
        folder: where they lie; several processes may share it.
        limit_bytes: most bytes of all of them.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        self.nbytes = sum(size for _, size, _ in self._held())

    def get(self, key: str) -> bytes | None:
        """A record, now the most recent one; `None` where it is not held."""
        file = self.folder / key
        try:
            data = file.read_bytes()
            os.utime(file)
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Hold a record; a full disk is no error."""
        if len(data) > self.limit_bytes:
            return
        file, fresh = self.folder / key, self.folder / f"{key}.{os.getpid()}.new"
        try:
            fresh.write_bytes(data)
            fresh.replace(file)
        except OSError:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
            return
        self.nbytes += len(data)
        if self.nbytes > self.limit_bytes:
            self._sweep()

    def drop(self, gone: Callable[[str], bool]) -> None:
        """Forget the records whose keys are `gone`."""
        for _, _, file in self._held():
            if gone(file.name):
                with suppress(OSError):
                    file.unlink()

    def _held(self) -> list[tuple[float, int, Path]]:
        found = []
        with suppress(OSError):
            for file in self.folder.iterdir():
                with suppress(OSError):  # another process let it go
                    status = file.stat()
                    found.append((status.st_mtime, status.st_size, file))
        return sorted(found)

    def _sweep(self) -> None:
        """Let the oldest go, until the limit is kept with some room."""
        held = self._held()
        self.nbytes = sum(size for _, size, _ in held)
        for n, (_, size, file) in enumerate(held):
            if self.nbytes <= self.limit_bytes and n >= min(_FEWEST_SWEPT, len(held) // 4):
                break
            with suppress(OSError):
                file.unlink()
            self.nbytes -= size


class RemoteRecords:
    """Records of shard objects, read by ranges.

    Args:
        address: of the bank.
        store: the object store under it.
        record_bytes: size of every record.
        cache: holds what was read.
    """

    def __init__(self, address: str, store: Any, record_bytes: int, cache: RecordCache) -> None:
        self.address, self.record_bytes, self.cache = address, record_bytes, cache
        self._store = store
        self.bytes_fetched = 0
        self.refresh()

    def fetch(self, places: Iterable[Place]) -> None:
        """Bring records into the cache, those of one shard in one request as far as they lie together."""
        import obstore

        by_shard: dict[int, list[int]] = {}
        for shard, slot in places:
            if self.cache.get(self._key((shard, slot))) is None:
                by_shard.setdefault(shard, []).append(slot)
        for shard, slots in by_shard.items():
            self._check((shard, max(slots)))
            starts = [slot * self.record_bytes for slot in sorted(slots)]
            try:
                found = obstore.get_ranges(self._store, _name(shard), starts=starts, lengths=[self.record_bytes] * len(starts))
            except Exception as error:
                raise unreachable(self.address, error) from None
            for slot, data in zip(sorted(slots), found, strict=True):
                self.bytes_fetched += len(data)
                self.cache.put(self._key((shard, slot)), bytes(data))

    def read(self, shard: int, slot: int) -> bytearray:
        """A private copy of one record; `BankError` where it cannot be read."""
        data = self.cache.get(self._key((shard, slot)))
        return bytearray(self._direct((shard, slot)) if data is None else data)

    def forget(self, place: Place) -> None:
        """Do not trust what was read from there, nor what the shards were."""
        self.refresh()
        wrong = self._key(place)
        self.cache.drop(lambda key: key == wrong)

    def refresh(self) -> None:
        """Look at the shards again, and forget records of those that changed: erased ones are among them."""
        self._shards = self._listed()
        front = self._front()
        now = tuple(self._key((shard, 0)).rpartition("-")[0] + "-" for shard in self._shards)
        self.cache.drop(lambda key: key.startswith(front) and not key.startswith(now))

    def describe(self, place: Place) -> str:
        """The place in words, for errors."""
        return f"record {place[1]} of {self.address}/{_name(place[0])}"

    def total_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(size for size, _ in self._shards.values())

    def close(self) -> None:
        """Nothing is held open."""

    def _direct(self, place: Place) -> bytes:
        import obstore

        self._check(place)
        start = place[1] * self.record_bytes
        try:
            data = bytes(obstore.get_range(self._store, _name(place[0]), start=start, length=self.record_bytes))
        except Exception as error:
            raise unreachable(self.address, error) from None
        self.bytes_fetched += len(data)
        return data

    def _check(self, place: Place) -> None:
        end = (place[1] + 1) * self.record_bytes
        if end > self._shards.get(place[0], (0, ""))[0]:  # pushed since the last look
            self.refresh()
        size = self._shards.get(place[0], (0, ""))[0]
        if end > size:
            raise BankError(
                f"{self.address}/{_name(place[0])} has {size} bytes, expected at least {end}: push the bank again, memory3 bank push"
            )

    def _listed(self) -> dict[int, tuple[int, str]]:
        """Size and tag of every shard; another tag is another content."""
        import obstore

        try:
            found = [o for some in obstore.list(self._store, prefix=SHARDS) for o in some]
        except Exception as error:
            raise unreachable(self.address, error) from None
        names = [(str(o["path"]).rpartition("/")[2], o) for o in found]
        return {int(n[:5]): (int(o["size"]), str(o["e_tag"])) for n, o in names if n.endswith(".kv") and n[:5].isdigit()}

    def _front(self) -> str:
        return f"{hashlib.blake2b(self.address.encode(), digest_size=12).hexdigest()}-"

    def _key(self, place: Place) -> str:
        """Bank, shard with its tag, and slot: a shard of another content has other keys."""
        tag = self._shards.get(place[0], (0, ""))[1]
        return f"{self._front()}{place[0]:05d}.{hashlib.blake2b(tag.encode(), digest_size=8).hexdigest()}-{place[1]}"


def _name(shard: int) -> str:
    return f"{SHARDS}/{shard:05d}.kv"


class RemoteBank(BankReader):
    """A bank on object storage, to read from; to change it, change the local one and push it again.

    Args:
        address: `s3://BUCKET/PATH`, or what else LanceDB and obstore take.
        decoder: the model that reads; `None` opens the bank to look at it.
        embedder: must be the one that made its vectors; by default that is loaded by name when it is needed.
        at: an earlier state.
        cache_folder: where records that were read lie; by default `records` in `$MEMORY3_CACHE` or `~/.cache/memory3`.
        cache_bytes: most bytes of them.

    Raises:
        BankError: no bank, or out of reach.
        BankMismatch: written by another model, tokenizer, rotation, spec, embedder or format.
    """

    def __init__(
        self,
        address: str,
        decoder: MemoryWriter | None = None,
        *,
        embedder: Embedder | None = None,
        at: str | None = None,
        cache_folder: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        address = address.rstrip("/")
        self._store = store_of(address)
        fetch = partial(fetched, self._store, address)
        manifest = Manifest.parse(fetch(MANIFEST).decode("utf-8", "replace"), address, fetch)
        home = Path(os.environ.get("MEMORY3_CACHE", Path.home() / ".cache" / "memory3"))
        cache = RecordCache(cache_folder or home / "records", cache_bytes)
        self.records = RemoteRecords(address, self._store, manifest.record_bytes, cache)
        super().__init__(address, decoder, manifest, Catalogue(f"{address}/{FOLDER}"), self.records, embedder, at)
        self._seen = self.version

    def load(self, ids: Sequence[str], device: torch.device | str = "cpu") -> list[Loaded]:
        """Memories `(P, K, D)`, as `BankReader.load`; what is not in the cache comes in few requests.

        After a push, records of changed shards leave the cache first.
        """
        version = self.version
        if version != self._seen:
            self.records.refresh()
            self._seen = version
        with suppress(BankError):  # a push in between: each record is looked up again below
            self.records.fetch(place for place in self._catalogue.locate(ids).values() if place != NO_RECORD)
        return super().load(ids, device)

    def total_bytes(self) -> int:
        """Bytes of all objects under the address."""
        import obstore

        try:
            return sum(int(o["size"]) for some in obstore.list(self._store) for o in some)
        except Exception as error:
            raise unreachable(self.address, error) from None

    def _decoded(self, rows: Sequence[tuple[str, Place]], device: torch.device | str) -> list[Memory]:
        """One that failed once more from the store: the cache or a listing may be out of date."""
        try:
            return super()._decoded(rows, device)
        except BankError:
            if len(rows) > 1:
                raise
            self.records.forget(rows[0][1])
            return super()._decoded(rows, device)
