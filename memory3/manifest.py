"""What wrote a bank: format, model, tokenizer, rotation, spec and codec; and why another decoder may not use it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from memory3.codec import codec_from
from memory3.record import Codec, Fetch, RecordShape
from memory3.shards import sync_folder
from memory3.spec import BankError, BankMismatch, MemorySpec, SpecError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
READ_FIELDS = ("chunk_length", "references_per_chunk")
"""Fields of a spec that say how memories are read, not what they are: a bank fits every value of them."""

_MEND = "Use the model that wrote it, or encode its texts again: memory3 bank rebuild BANK --model MODEL"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a bank.

    Args:
        identity: what wrote it, as `MemoryWriter.identity()` gives it.
        codec: how key-values lie in the records.
        shape: shape of every record.
        record_bytes: size of every record.
        records_per_shard: most records of one file.
        created: time of creation, ISO 8601 in UTC.
        created_by: version of memory3.
    """

    identity: Mapping[str, Any]
    codec: Codec
    shape: RecordShape
    record_bytes: int
    records_per_shard: int
    created: str
    created_by: str

    @classmethod
    def new(cls, identity: Mapping[str, Any], codec: Codec, max_shard_bytes: int) -> Manifest:
        """The manifest of a bank that is made now; `BankMismatch` where the codec was trained for another model."""
        plain = _plain(identity)
        misfit = codec.misfit(plain)
        if misfit is not None:
            raise BankMismatch(f"{misfit}: train one for it (memory3 bank codebook BANK FILE), or take another codec")
        shape = RecordShape.of(MemorySpec.from_json(plain["spec"]), plain["head_dim"])
        size = codec.record_bytes(shape.pairs, shape.slots, shape.head_dim)
        now = datetime.now(UTC).isoformat()  # to the microsecond: it tells banks apart
        return cls(plain, codec, shape, size, max(1, max_shard_bytes // size), now, _version())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check `manifest.json`; nothing in it is ever executed.

        Raises:
            BankError: missing or ill-formed.
            BankMismatch: of another format version.
        """
        path = folder / MANIFEST
        try:
            text = path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise BankError(f"{path} cannot be read ({error}): restore it from a copy, or write a new bank") from None
        return cls.parse(text, folder, partial(_file_of, folder))

    @classmethod
    def parse(cls, text: str, folder: Path | str, fetch: Fetch) -> Manifest:
        """The manifest of a bank at `folder` from its text; `fetch` reads the other files. Errors as of `load`."""
        path = f"{folder}/{MANIFEST}"
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise BankError(f"{path} cannot be read ({error}): restore it from a copy, or write a new bank") from None
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if version != FORMAT_VERSION:
            raise BankMismatch(
                f"{folder} has format_version {version!r}, expected {FORMAT_VERSION}: write a new bank with this memory3"
            )
        try:
            return cls._from_fields(fields, fetch)
        except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
            raise BankError(
                f"{path} is ill-formed ({type(error).__name__}: {error}): restore it, or write a new bank"
            ) from None

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], fetch: Fetch) -> Manifest:
        codec = codec_from(fields["codec"]["name"], fields["codec"]["parameters"]).beside(fetch)
        identity = fields["identity"]
        shape = RecordShape.of(MemorySpec.from_json(identity["spec"]), _count(identity["head_dim"]))
        size = codec.record_bytes(shape.pairs, shape.slots, shape.head_dim)
        if asdict(shape) != fields["shape"] or fields["record_bytes"] != size:
            raise ValueError(
                f"shape {fields['shape']} with {fields['record_bytes']} bytes, expected {asdict(shape)} with {size}"
            )
        for key in ("model", "weights", "tokenizer", "dtype"):
            if not isinstance(identity[key], str):
                raise TypeError(f"identity.{key} is {identity[key]!r}, expected a text")
        return cls(
            identity, codec, shape, size, _count(fields["records_per_shard"]), str(fields["created"]), str(fields["created_by"])
        )

    def save(self, folder: Path) -> None:
        """Write the codec's files, then `manifest.json`; each whole or not at all."""
        for name, data in self.codec.files().items():
            _write_whole(folder, name, data)
        fields = {
            "format": "memory3 bank",
            "format_version": FORMAT_VERSION,
            "created": self.created,
            "created_by": self.created_by,
            "identity": self.identity,
            "codec": {"name": self.codec.name, "parameters": self.codec.parameters()},
            "shape": asdict(self.shape),
            "record_bytes": self.record_bytes,
            "records_per_shard": self.records_per_shard,
        }
        _write_whole(folder, MANIFEST, (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode())

    def check(self, folder: Path | str, identity: Mapping[str, Any]) -> None:
        """Raise `BankMismatch` where memories of this bank mean nothing to the decoder of `identity`."""
        here = _plain(identity)
        model, other = self.identity["model"], here["model"]
        if self.identity["spec"]["layers"] != here["spec"]["layers"]:  # then the weights that count differ by that alone
            self._check_spec(folder, here)
        for key in ("weights", "tokenizer"):
            if self.identity[key] != here[key]:
                raise BankMismatch(
                    f"{folder} was written by {model} ({key} {_brief(self.identity[key])}), this model is {other} "
                    f"({key} {_brief(here[key])}). {_MEND}"
                )
        self._check_spec(folder, here)
        for key in ("rotation", "head_dim"):
            if not _close(self.identity[key], here[key]):
                raise BankMismatch(f"{folder} {_difference(key, key, self.identity[key], here[key])}. {_MEND}")

    def _check_spec(self, folder: Path | str, here: Mapping[str, Any]) -> None:
        differing = [_difference("spec", *pair) for pair in _spec_differences(self.identity["spec"], here["spec"])]
        if differing:
            raise BankMismatch(
                f"{folder} {'; '.join(differing)}. Attach the model with the spec of the bank, or encode its texts again: {_COMMAND}"
            )


_COMMAND = "memory3 bank rebuild BANK"


def _write_whole(folder: Path, name: str, data: bytes) -> None:
    temporary = folder / f"{name}.new"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / name)
    sync_folder(folder)


def _file_of(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise BankError(
            f"{folder / name} cannot be read ({error.strerror}), and the bank's memories with it: restore it from a copy, or encode the "
            f"texts again: memory3 bank rebuild {folder} --codec raw"
        ) from None


def _difference(kind: str, name: str, bank: object, here: object) -> str:
    label = name if kind == name else f"{kind} {name}"
    return f"was written with {label} {_clipped(bank)}, this model has {_clipped(here)}"


def _clipped(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _brief(fingerprint: str) -> str:
    return f"{fingerprint[:8]}…"


def _spec_differences(bank: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, object, object]]:
    names = sorted((set(bank) | set(here)) - set(READ_FIELDS))
    return [(name, bank.get(name), here.get(name)) for name in names if bank.get(name) != here.get(name)]


def _close(a: object, b: object) -> bool:
    """Equal up to 1e-6 in numbers: devices differ in the last bits of a frequency."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity as it comes back from JSON: tuples as lists, keys as texts."""
    return json.loads(json.dumps(dict(identity)))  # type: ignore[no-any-return]


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r}, expected a whole number of at least 1")
    return value


def _version() -> str:
    try:
        return metadata.version("memory3")
    except metadata.PackageNotFoundError:
        return "source tree"
