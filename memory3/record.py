"""The fixed-size record of one memory, and what a codec must do to fill it (docs/bank.md).

A codec says how keys and values become a payload; header, kept positions, padding and checksum are the same for all.
Shapes: `N` records, `P` (layer, kv head) pairs, `S` slots a record reserves, `K` <= `S` kept tokens, `D` head dim.
"""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from memory3.spec import BankError, Memory, MemorySpec

ALIGNMENT = 64
"""Records, and the payloads inside them, start at multiples of this many bytes."""

MAGIC = b"M3KV"
LIVE = 1
_HEADER = struct.Struct("<4sHHI4x16s")  # magic, state, kept tokens, checksum, reserved, id
_CHECKSUM = slice(8, 12)

_MOST_VALUES = 2**24
"""Numbers that are decoded at once: 64 MiB of float32."""

Fetch = Callable[[str], bytes]
"""Reads a file of the bank by its name."""


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

    @property
    def vectors(self) -> int:
        """Keys of one record; it has as many values."""
        return self.pairs * self.slots


class Codec(ABC):
    """Packs keys and values `(P, S, D)` into a payload whose size depends on the shape alone."""

    name: ClassVar[str]

    @abstractmethod
    def payload_bytes(self, shape: RecordShape) -> int:
        """Bytes of the payload; `BankError` where the codec cannot store this shape."""

    @abstractmethod
    def pack(self, keys: Tensor, values: Tensor) -> bytes:
        """Payload of keys and values `(P, S, D)` on the CPU; slots beyond the kept tokens are zeros."""

    @abstractmethod
    def unpack(self, payloads: Tensor, shape: RecordShape) -> tuple[Tensor, Tensor]:
        """Keys and values `(N, P, S, D)` of payloads `(N, payload_bytes)` uint8, on their device; may be views of them."""

    @abstractmethod
    def accepts(self, dtype: torch.dtype) -> bool:
        """Whether key-values of this dtype can be stored within the codec's stated error."""

    @abstractmethod
    def relative_error(self, head_dim: int) -> float:
        """Stated error: root mean square of |x - decoded x| / |x| over vectors x; each codec says of which."""

    def parameters(self) -> dict[str, Any]:
        """Fields of the codec as plain JSON values, for the manifest."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @property
    def described(self) -> str:
        """Name and parameters, for messages."""
        return f"{self.name} {self.parameters()}"

    def files(self) -> Mapping[str, bytes]:
        """What has to lie beside the manifest for this codec to read, by name; most need nothing."""
        return {}

    def beside(self, fetch: Fetch) -> Self:
        """The same codec, which takes its files from there when it first needs them."""
        return self

    def misfit(self, identity: Mapping[str, Any]) -> str | None:
        """Why it cannot store memories of the decoder of `identity`, as a sentence; most fit every model."""
        return None

    def record_bytes(self, pairs: int, slots: int, head_dim: int) -> int:
        """Bytes of one record on disk (the planner's number)."""
        shape = RecordShape(pairs, slots, head_dim)
        return shape.payload_offset + _aligned(self.payload_bytes(shape))

    def encode(self, memory: Memory, shape: RecordShape, id: str) -> bytes:
        """The record of one memory, `record_bytes` long.

        Raises:
            BankError: the memory does not have this shape, or a dtype or numbers that the codec cannot store.
        """
        _check_memory(memory, shape)
        if not self.accepts(memory.keys.dtype) or memory.values.dtype != memory.keys.dtype:
            raise BankError(
                f"found a memory of {short(memory.keys.dtype)} keys and {short(memory.values.dtype)} values for a bank with "
                f"codec {self.name} {self.parameters()}: load the model in the dtype of the bank, or write a new bank"
            )
        record = bytearray(self.record_bytes(shape.pairs, shape.slots, shape.head_dim))
        _HEADER.pack_into(record, 0, MAGIC, LIVE, memory.count, 0, bytes.fromhex(id))
        positions = _padded(memory.positions, shape.slots).numpy().tobytes()
        record[_HEADER.size : _HEADER.size + len(positions)] = positions
        payload = self.pack(_padded(memory.keys, shape.slots), _padded(memory.values, shape.slots))
        assert len(payload) == self.payload_bytes(shape)
        record[shape.payload_offset : shape.payload_offset + len(payload)] = payload
        record[_CHECKSUM] = _checksum(record)
        return bytes(record)

    def decode(self, record: bytearray, shape: RecordShape, id: str, place: str) -> Memory:
        """The memory of one record, which it may go on using; `place` names the record in errors.

        Raises:
            BankError: the record is erased, damaged, or belongs to another reference.
        """
        count = self._checked(record, shape, id, place)
        keys, values = self.unpack(self._payload(record, shape)[None], shape)
        cut = (t[:, :count].contiguous() for t in (keys[0], values[0], _positions(record, shape)))
        return Memory(*cut)

    def decode_all(
        self,
        records: Sequence[bytearray],
        shape: RecordShape,
        ids: Sequence[str],
        places: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> list[Memory]:
        """The memories of several records on a device, decoded there many at a time; each has its own storage.

        Errors as of `decode`.
        """
        counts = [self._checked(*row) for row in zip(records, [shape] * len(records), ids, places, strict=True)]
        at_once = max(1, _MOST_VALUES // (2 * shape.vectors * shape.head_dim))
        found: list[Memory] = []
        for start in range(0, len(records), at_once):
            some = slice(start, start + at_once)
            found += self._together(records[some], counts[some], shape, torch.device(device))
        return found

    def _together(
        self, records: Sequence[bytearray], counts: Sequence[int], shape: RecordShape, device: torch.device
    ) -> Iterator[Memory]:
        payloads = torch.stack([self._payload(record, shape) for record in records]).to(device)
        keys, values = self.unpack(payloads, shape)
        for n, (record, count) in enumerate(zip(records, counts, strict=True)):
            rows = (keys[n], values[n], _positions(record, shape).to(device))
            yield Memory(*(t[:, :count].clone() for t in rows))

    def _payload(self, record: bytearray, shape: RecordShape) -> Tensor:
        return torch.frombuffer(record, dtype=torch.uint8, count=self.payload_bytes(shape), offset=shape.payload_offset)

    def _checked(self, record: bytearray, shape: RecordShape, id: str, place: str) -> int:
        """Kept tokens of a record that is whole."""
        _verify(record, self.record_bytes(shape.pairs, shape.slots, shape.head_dim), id, place)
        count: int = _HEADER.unpack_from(record)[2]
        if not 1 <= count <= shape.slots:
            raise BankError(_damaged(place, id, f"found {count} kept tokens, expected 1 to {shape.slots}"))
        return count


def short(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def refuse_infinite(codec: Codec, *tensors: Tensor) -> None:
    """Raise `BankError` where a number is infinite or none: quantised, it would spoil its whole vector."""
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise BankError(
            f"found infinite or undefined numbers in a memory, expected finite ones for codec {codec.name}: the model overflows "
            "in this dtype; write with --dtype float32, or with codec raw"
        )


def _positions(record: bytearray, shape: RecordShape) -> Tensor:
    flat = torch.frombuffer(record, dtype=torch.uint8, count=shape.vectors, offset=_HEADER.size)
    return flat.view(shape.pairs, shape.slots)


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
            f"found positions {tuple(memory.positions.shape)} of {short(memory.positions.dtype)}, "
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
