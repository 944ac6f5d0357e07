"""Codecs that store every key and every value by itself, in as many bytes as any other."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from memory3.record import Codec, RecordShape, refuse_infinite

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
KEYS, VALUES = SIDES = (0, 1)


class VectorCodec(Codec):
    """A codec that stores keys and values alike: a row of bytes per vector, all keys first."""

    @abstractmethod
    def row_bytes(self, side: int, head_dim: int) -> int:
        """Bytes of one vector; `side` is `KEYS` or `VALUES`."""

    @abstractmethod
    def to_rows(self, side: int, vectors: Tensor) -> Tensor:
        """Vectors `(P, S, D)` float32 -> `(P, S, row_bytes)` uint8."""

    @abstractmethod
    def from_rows(self, side: int, rows: Tensor, head_dim: int) -> Tensor:
        """`(N, P, S, row_bytes)` uint8 -> vectors `(N, P, S, D)` float32, on their device."""

    def payload_bytes(self, shape: RecordShape) -> int:
        return shape.vectors * sum(self.row_bytes(side, shape.head_dim) for side in SIDES)

    def pack(self, keys: Tensor, values: Tensor) -> bytes:
        refuse_infinite(self, keys, values)
        return b"".join(self.to_rows(side, t.float()).numpy().tobytes() for side, t in enumerate((keys, values)))

    def unpack(self, payloads: Tensor, shape: RecordShape) -> tuple[Tensor, Tensor]:
        sizes = [shape.vectors * self.row_bytes(side, shape.head_dim) for side in SIDES]
        keys, values = (
            self.from_rows(side, part.reshape(len(part), shape.pairs, shape.slots, -1), shape.head_dim)
            for side, part in enumerate(payloads.split(sizes, 1))
        )
        return keys, values

    def accepts(self, dtype: torch.dtype) -> bool:
        return dtype in FLOATS
