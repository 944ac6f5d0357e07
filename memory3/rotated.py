"""Keys and values rotated at random, then rounded number by number to the best grid for what a rotation makes of any vector.

Source: Zandieh, Daliri, Hadian, Mirrokni, *TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate*, arXiv
2504.19874, its quantiser for the mean square error. Nothing is trained, so it is the same for every model. Control: `int4`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from memory3.packing import pack_codes, packed_bytes, unpack_codes
from memory3.record import RecordShape
from memory3.spec import BankError
from memory3.vectorwise import VectorCodec

MOST_BITS = 4
"""Beyond that a length of one byte would be the larger error; `int8` is there for it."""

_STEPS_PER_OCTAVE, _ONE = 8, 128
"""A length is stored as one byte c: 2**((c - _ONE) / _STEPS_PER_OCTAVE), and 0 for no length at all."""

_LONGEST = 2.0 ** ((255 - _ONE) / _STEPS_PER_OCTAVE)
_LENGTH_ERROR = 2.0 ** (0.5 / _STEPS_PER_OCTAVE) - 1


@dataclass(frozen=True)
class RotatedCodec(VectorCodec):
    """Length in one byte, then `bits` for each number of the rotated direction.

    The length that is stored is the best one for the rounded direction (least squares), not that of the vector.
    Stated error: the mean over rotations, for whatever vectors of length 2**-16 to 59,000; shorter ones come out as at most
    2**-16, longer ones are refused.

    Args:
        key_bits: 1 to 4 bits for a number of a key.
        value_bits: the same for a value: softmax forgives errors of values more than those of keys.
        seed: of the rotation.
    """

    key_bits: int = 4
    value_bits: int = 3
    seed: int = 0
    name: ClassVar[str] = "rotated"

    def __post_init__(self) -> None:
        for field, least, most in (("key_bits", 1, MOST_BITS), ("value_bits", 1, MOST_BITS), ("seed", 0, 2**31 - 1)):
            value: Any = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise BankError(f"found {field}={value!r} for codec rotated, expected a whole number from {least} to {most}")

    def payload_bytes(self, shape: RecordShape) -> int:
        if shape.head_dim < 2:
            raise BankError(f"found head dim {shape.head_dim}, expected at least 2 for codec rotated: take int8")
        return super().payload_bytes(shape)

    def row_bytes(self, side: int, head_dim: int) -> int:
        return 1 + packed_bytes(head_dim, self._bits(side))

    def to_rows(self, side: int, vectors: Tensor) -> Tensor:
        head_dim, bits = vectors.shape[-1], self._bits(side)
        grid = _on(_grid_tensor(head_dim, bits), vectors)
        turned = vectors @ rotation(head_dim, self.seed).T
        length = turned.norm(dim=-1, keepdim=True)
        self._refuse_long(length)
        codes = torch.bucketize(turned / length.clamp(min=1e-30), (grid[1:] + grid[:-1]) / 2)
        near = grid[codes]
        best = (turned * near).sum(-1, keepdim=True) / near.square().sum(-1, keepdim=True)
        return torch.cat((_length_code(best), pack_codes(codes, bits)), -1)

    def from_rows(self, side: int, rows: Tensor, head_dim: int) -> Tensor:
        bits = self._bits(side)
        code = rows[..., :1].float()
        length = torch.where(code > 0, ((code - _ONE) / _STEPS_PER_OCTAVE).exp2(), 0)
        grid = _on(_grid_tensor(head_dim, bits), rows)
        codes = unpack_codes(rows[..., 1:], head_dim, bits)
        return (grid.index_select(0, codes.flatten()).view(codes.shape) * length) @ _on(rotation(head_dim, self.seed), rows)

    def relative_error(self, head_dim: int) -> float:
        worst = max(grid_distortion(head_dim, bits) for bits in (self.key_bits, self.value_bits))
        return sqrt(worst + _LENGTH_ERROR**2)

    def _bits(self, side: int) -> int:
        return (self.key_bits, self.value_bits)[side]

    def _refuse_long(self, length: Tensor) -> None:
        if float(length.max()) > _LONGEST:
            raise BankError(
                f"found a vector of length {float(length.max()):,.0f}, expected at most {_LONGEST:,.0f} for codec rotated: take int8"
            )


def _length_code(length: Tensor) -> Tensor:
    code = (length.clamp(min=1e-30).log2() * _STEPS_PER_OCTAVE).round() + _ONE
    return torch.where(length > 0, code.clamp(1, 255), 0).to(torch.uint8)


@lru_cache(maxsize=16)
def rotation(head_dim: int, seed: int) -> Tensor:
    """A random orthogonal matrix `(D, D)` float32 on the CPU, the same on every machine.

    SHAKE-256 of `memory3 rotation SEED D` gives numbers of 64 bits, Box and Muller make them normal, and Q of the QR decomposition
    whose R has a positive diagonal is uniform among all rotations and reflections.
    """
    words = hashlib.shake_256(f"memory3 rotation {seed} {head_dim}".encode()).digest(16 * head_dim**2)
    uniform = (np.frombuffer(words, "<u8").reshape(2, head_dim, head_dim) >> 11) * 2.0**-53
    normal = np.sqrt(-2 * np.log(1 - uniform[0])) * np.cos(2 * np.pi * uniform[1])
    q, r = np.linalg.qr(normal)
    return torch.from_numpy(q * np.sign(np.diag(r))).float()


@lru_cache(maxsize=64)
def best_grid(head_dim: int, bits: int) -> tuple[np.ndarray, float]:
    """The best `2**bits` values, ascending, for one number of a uniformly random unit vector of `D` numbers, and the mean
    square error of the whole vector (Lloyd and Max).

    With the number as sin(t), the density of t is cos(t)**(D - 2), and mean values of sin(t) have a closed form.
    """
    angles = np.linspace(-np.pi / 2, np.pi / 2, 2**15 + 1)
    density = np.cos(angles) ** (head_dim - 2)
    mass = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    mass /= mass[-1]
    step = angles[1] - angles[0]
    total = ((density[1:] + density[:-1]) / 2).sum() * step
    moment = -(np.cos(angles) ** (head_dim - 1)) / (head_dim - 1) / total
    edges = np.interp(np.linspace(0, 1, 2**bits + 1), mass, angles)
    for _ in range(500):
        weights, moments = (np.diff(np.interp(edges, angles, t)) for t in (mass, moment))
        values = moments / weights
        edges[1:-1] = np.arcsin((values[1:] + values[:-1]) / 2)
    return values, float(1 - head_dim * (weights * values**2).sum())


def grid_distortion(head_dim: int, bits: int) -> float:
    """Mean square error of a unit vector on the grid."""
    return best_grid(head_dim, bits)[1]


@lru_cache(maxsize=64)
def _grid_tensor(head_dim: int, bits: int) -> Tensor:
    return torch.from_numpy(best_grid(head_dim, bits)[0]).float()


def _on(t: Tensor, other: Tensor) -> Tensor:
    return t.to(other.device)
