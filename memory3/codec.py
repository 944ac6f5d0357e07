"""Key-values of a reference <-> the bytes of a fixed-size record (docs/bank.md).

A codec says how keys and values become a payload; header, kept positions, padding and checksum are the same for all.
Adding one: a frozen dataclass with `payload_bytes`, `pack` and `unpack`, and a row in `CODECS`.
Shapes: `P` (layer, kv head) pairs, `S` slots a record reserves, `K` <= `S` kept tokens, `D` head dim.
"""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from memory3.spec import BankError, Memory, MemorySpec

ALIGNMENT = 64
"""Records, and the payloads inside them, start at multiples of this many bytes."""

MAGIC = b"M3KV"
LIVE = 1
_HEADER = struct.Struct("<4sHHI4x16s")  # magic, state, kept tokens, checksum, reserved, id
_CHECKSUM = slice(8, 12)
ID_OFFSET = 16
"""Where a record holds the id of its memory."""


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class RecordShape:
    """Shape of every record of a bank: `P` pairs, `S` slots per pair, `D` head dim."""

    pairs: int
    slots: int
    head_dim: int

    @classmethod
    def of(cls, spec: MemorySpec, head_dim: int) -> RecordShape:
        """The shape that a resolved spec asks for."""
        return cls(spec.pairs, spec.slots, head_dim)

    @property
    def payload_offset(self) -> int:
        """Bytes before the payload: header and kept positions, aligned."""
        return _aligned(_HEADER.size + self.pairs * self.slots)


class Codec(ABC):
    """Packs keys and values `(P, S, D)` into a payload whose size depends on the shape alone."""

    name: ClassVar[str]

    @abstractmethod
    def payload_bytes(self, shape: RecordShape) -> int:
        """Bytes of the payload."""

    @abstractmethod
    def pack(self, keys: Tensor, values: Tensor) -> bytes:
        """Payload of keys and values `(P, S, D)` on the CPU; slots beyond the kept tokens are zeros."""

    @abstractmethod
    def unpack(self, record: bytearray, offset: int, shape: RecordShape) -> tuple[Tensor, Tensor]:
        """Keys and values `(P, S, D)` of the payload at `offset`; may be views of `record`."""

    @abstractmethod
    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether key-values of this dtype can be stored within the codec's stated error."""

    def parameters(self) -> dict[str, Any]:
        """Fields of the codec as plain JSON values, for the manifest."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def record_bytes(self, pairs: int, slots: int, head_dim: int) -> int:
        """Bytes of one record on disk (the planner's number)."""
        shape = RecordShape(pairs, slots, head_dim)
        return shape.payload_offset + _aligned(self.payload_bytes(shape))

    def encode(self, memory: Memory, shape: RecordShape, id: str) -> bytes:
        """The record of one memory, `record_bytes` long.

        Raises:
            BankError: the memory does not have this shape, or a dtype that the codec cannot store.
        """
        _check_memory(memory, shape)
        if not self.accepts(memory.keys.dtype) or memory.values.dtype != memory.keys.dtype:
            raise BankError(
                f"found a memory of {_short(memory.keys.dtype)} keys and {_short(memory.values.dtype)} values for a bank with "
                f"codec {self.name} {self.parameters()}: load the model in the dtype of the bank, or write a new bank"
            )
        record = bytearray(self.record_bytes(shape.pairs, shape.slots, shape.head_dim))
        _HEADER.pack_into(record, 0, MAGIC, LIVE, memory.count, 0, bytes.fromhex(id))
        positions = _padded(memory.positions, shape.slots).numpy().tobytes()
        record[_HEADER.size : _HEADER.size + len(positions)] = positions
        payload = self.pack(_padded(memory.keys, shape.slots), _padded(memory.values, shape.slots))
        record[shape.payload_offset : shape.payload_offset + len(payload)] = payload
        record[_CHECKSUM] = _checksum(record)
        return bytes(record)

    def decode(self, record: bytearray, shape: RecordShape, id: str, place: str) -> Memory:
        """The memory of one record, which it may go on using; `place` names the record in errors.

        Raises:
            BankError: the record is erased, damaged, or belongs to another reference.
        """
        _verify(record, self.record_bytes(shape.pairs, shape.slots, shape.head_dim), id, place)
        count = _HEADER.unpack_from(record)[2]
        if not 1 <= count <= shape.slots:
            raise BankError(_damaged(place, id, f"found {count} kept tokens, expected 1 to {shape.slots}"))
        positions = torch.frombuffer(record, dtype=torch.uint8, count=shape.pairs * shape.slots, offset=_HEADER.size)
        keys, values = self.unpack(record, shape.payload_offset, shape)
        cut = (t[:, :count].contiguous() for t in (keys, values, positions.view(shape.pairs, shape.slots)))
        return Memory(*cut)


@dataclass(frozen=True)
class RawCodec(Codec):
    """Keys and values as they are, bit for bit.

    Args:
        dtype: `bfloat16`, `float16` or `float32`; memories of another dtype are refused.
    """

    dtype: str = "bfloat16"
    name: ClassVar[str] = "raw"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise BankError(f"found dtype {self.dtype!r} for the raw codec, expected one of {sorted(_DTYPES)}")

    @classmethod
    def of(cls, dtype: torch.dtype) -> RawCodec:
        """The raw codec of a torch dtype."""
        return cls(_short(dtype))

    def payload_bytes(self, shape: RecordShape) -> int:
        return 2 * shape.pairs * shape.slots * shape.head_dim * _DTYPES[self.dtype].itemsize

    def pack(self, keys: Tensor, values: Tensor) -> bytes:
        return torch.stack((keys, values)).view(torch.uint8).numpy().tobytes()

    def unpack(self, record: bytearray, offset: int, shape: RecordShape) -> tuple[Tensor, Tensor]:
        both = (2, shape.pairs, shape.slots, shape.head_dim)
        flat = torch.frombuffer(record, dtype=_DTYPES[self.dtype], count=prod(both), offset=offset)
        keys, values = flat.view(both)
        return keys, values

    def accepts(self, dtype: torch.dtype) -> bool:
        return dtype == _DTYPES[self.dtype]


def codec_from(name: object, parameters: object) -> Codec:
    """The codec that a manifest names; `BankError` where it is unknown or its parameters do not fit."""
    if not isinstance(name, str) or name not in CODECS:
        raise BankError(f"found codec {name!r}, expected one of {sorted(CODECS)}: update memory3, or write a new bank")
    if not isinstance(parameters, Mapping):
        raise BankError(f"found parameters {parameters!r} of codec {name}, expected an object of named values")
    try:
        return CODECS[name](**parameters)
    except TypeError as error:
        raise BankError(f"found parameters of codec {name} that it does not take ({error}): update memory3") from None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _padded(t: Tensor, slots: int) -> Tensor:
    """`(P, K, ...)` -> `(P, slots, ...)` on the CPU, zeros behind."""
    out = torch.zeros(t.shape[0], slots, *t.shape[2:], dtype=t.dtype)
    out[:, : t.shape[1]] = t.detach().cpu()
    return out


def _check_memory(memory: Memory, shape: RecordShape) -> None:
    pairs, count, head_dim = memory.keys.shape if memory.keys.ndim == 3 else (0, 0, 0)
    fits = (pairs, head_dim) == (shape.pairs, shape.head_dim) and 1 <= count <= shape.slots
    if not fits or memory.values.shape != memory.keys.shape:
        raise BankError(
            f"found a memory with keys {tuple(memory.keys.shape)} and values {tuple(memory.values.shape)}, expected both "
            f"({shape.pairs}, 1 to {shape.slots}, {shape.head_dim}): write it with the spec of the bank"
        )
    if memory.positions.shape != (pairs, count) or memory.positions.dtype != torch.uint8:
        raise BankError(
            f"found positions {tuple(memory.positions.shape)} of {_short(memory.positions.dtype)}, "
            f"expected {(pairs, count)} of uint8"
        )


def _checksum(record: bytearray) -> bytes:
    """CRC-32 of the record without its checksum field; a guard against accidents, not against forgery."""
    view = memoryview(record)
    return struct.pack("<I", zlib.crc32(view[_CHECKSUM.stop :], zlib.crc32(view[: _CHECKSUM.start])))


def _verify(record: bytearray, size: int, id: str, place: str) -> None:
    if len(record) != size:
        raise BankError(_damaged(place, id, f"found {len(record)} bytes, expected {size}"))
    if not any(record[: _HEADER.size]):
        raise BankError(f"{place} of memory {id} is erased: it was deleted; recall again, or write its document again")
    if record[_CHECKSUM] != _checksum(record):
        raise BankError(_damaged(place, id, "its checksum does not match its bytes"))
    magic, state, _, _, owner = _HEADER.unpack_from(record)
    if magic != MAGIC or state != LIVE or owner.hex() != id:
        raise BankError(_damaged(place, id, f"it is the record of memory {owner.hex()}, state {state}"))


def _damaged(place: str, id: str, reason: str) -> str:
    return f"{place} of memory {id} is damaged ({reason}): delete the memory and write its document again (memory3 write)"


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

CODECS: dict[str, type[Codec]] = {"raw": RawCodec}
