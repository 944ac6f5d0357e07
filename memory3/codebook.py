"""A trained codebook: rotation, coarse and fine centroids for keys and for values, in one safetensors file that is hashed.

The quantiser is that of the paper (arXiv 2407.01178, 3.3), which FAISS calls `OPQ20_80,Residual2x14,PQ8x10`: a rotation learned for
product quantisation, a coarse product quantiser of 2 parts with 2**14 centroids each, and a fine one of 8 parts with 2**10 for what
the coarse one leaves. Sources: Ge et al., *Optimized Product Quantization*, TPAMI 2014; Babenko, Lempitsky, *The Inverted Multi-Index*,
CVPR 2012. FAISS trains it (`memory3.fitting`); encoding and decoding are torch.

`P` pairs, `S` slots, `D` head dim; a level has `n` parts of `w` = D / n numbers, and `2**bits` centroids in each.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import embedding

from memory3.packing import MOST_BITS, pack_codes, packed_bytes, unpack_codes
from memory3.spec import BankError

CODEBOOK = "codebook.safetensors"
"""Its name beside a bank's manifest and among a model's files."""

SIDES = ("keys", "values")
_FACTORY = re.compile(r"OPQ(\d+)_(\d+)(?:,Residual(\d+)x(\d+))?,PQ(\d+)x(\d+)")
_AT_ONCE = 2**25
"""Distances that are held at once in encoding: 128 MiB."""


@dataclass(frozen=True)
class Level:
    """One product quantiser: `parts` of a vector, `bits` for each."""

    parts: int
    bits: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector's codes."""
        return packed_bytes(self.parts, self.bits)


@dataclass(frozen=True)
class Recipe:
    """What a quantiser is made of, as FAISS spells it.

    Args:
        head_dim: `D`.
        opq_parts: parts that the rotation is learned for.
        levels: coarse, then fine; or fine alone.
    """

    head_dim: int
    opq_parts: int
    levels: tuple[Level, ...]

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe of `OPQ20_80,Residual2x14,PQ8x10` or `OPQ8_32,PQ4x8`; `BankError` where it is none."""
        found = _FACTORY.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise BankError(f"found quantiser {text!r}, expected one like OPQ20_80,Residual2x14,PQ8x10 or OPQ8_32,PQ4x8")
        opq, dim, *rest = (int(part) for part in found.groups(default="0"))
        levels = tuple(Level(*rest[n : n + 2]) for n in (0, 2) if rest[n])
        divided = all(parts and dim % parts == 0 for parts in (opq, *(level.parts for level in levels)))
        if not dim or not divided or not all(1 <= level.bits <= MOST_BITS for level in levels):
            raise BankError(f"found quantiser {text!r}, expected parts that divide {dim}, and 1 to {MOST_BITS} bits for each")
        return cls(dim, opq, levels)

    @classmethod
    def scaled(cls, head_dim: int) -> Recipe:
        """The paper's, in proportion, for another head dim: no more bytes a number than its 14 of 80.

        The fine level takes a bit a number, in parts of 10 numbers where that is possible; the coarse one what is left, 0.35 bits a
        number at most; the rotation is learned for parts of 4.
        """
        width = next((w for w in (10, 8, 9, 7, 6, 5, 4, 3, 2) if head_dim % w == 0), 0)
        if not width:
            raise BankError(f"found head dim {head_dim}, which has no divisor from 2 to 10: take codec rotated")
        fine = Level(head_dim // width, width)
        left = min(28 * head_dim // 80, 8 * (14 * head_dim // 80) - 8 * fine.row_bytes)
        parts = next((n for n in range(2, head_dim + 1) if head_dim % n == 0 and left // n <= 14), 0)
        coarse = (Level(parts, left // parts),) if parts and left >= parts else ()
        return cls(head_dim, head_dim // 4 if head_dim % 4 == 0 else fine.parts, (*coarse, fine))

    def __str__(self) -> str:
        names = ("Residual", "PQ")[-len(self.levels) :]
        parts = [f"{name}{level.parts}x{level.bits}" for name, level in zip(names, self.levels, strict=True)]
        return ",".join([f"OPQ{self.opq_parts}_{self.head_dim}", *parts])

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector, the codes of each level in whole bytes, as FAISS lays them."""
        return sum(level.row_bytes for level in self.levels)


@dataclass(frozen=True)
class Quantiser:
    """Vectors to codes and back.

    Args:
        recipe: its shape.
        mean: `(P, D)`, taken from the vectors of each (layer, head) first.
        scale: `(P, 1)`, what they are then divided by.
        rotation: `(D, D)`, orthogonal: y = rotation @ x.
        centroids: of each level, `(parts, 2**bits, D / parts)`.
    """

    recipe: Recipe
    mean: Tensor
    scale: Tensor
    rotation: Tensor
    centroids: tuple[Tensor, ...]

    def encode(self, vectors: Tensor) -> Tensor:
        """`(P, S, D)` float32 -> `(P, S, row_bytes)` uint8."""
        left = (((vectors - self.mean[:, None]) / self.scale[:, None]) @ self.rotation.T).flatten(0, 1)
        rows = []
        for level, centroids in zip(self.recipe.levels, self.centroids, strict=True):
            codes = _nearest(left, centroids)
            left = left - _looked_up(codes, centroids)
            rows.append(pack_codes(codes, level.bits))
        return torch.cat(rows, -1).view(*vectors.shape[:2], -1)

    def decode(self, rows: Tensor) -> Tensor:
        """`(…, P, S, row_bytes)` uint8 -> `(…, P, S, D)` float32, on the device of both."""
        found: Tensor | None = None
        parts = rows.split([level.row_bytes for level in self.recipe.levels], -1)
        for level, part, centroids in zip(self.recipe.levels, parts, self.centroids, strict=True):
            one = _looked_up(unpack_codes(part, level.parts, level.bits), centroids)
            found = one if found is None else found + one
        assert found is not None
        turned: Tensor = found @ self.rotation
        return turned * self.scale[:, None] + self.mean[:, None]

    def to(self, device: torch.device) -> Quantiser:
        """The same on a device."""
        centroids = tuple(t.to(device) for t in self.centroids)
        return Quantiser(self.recipe, self.mean.to(device), self.scale.to(device), self.rotation.to(device), centroids)

    def tensors(self, side: str) -> dict[str, Tensor]:
        """What a file keeps of it, by name."""
        levels = {f"{side}.centroids.{n}": t for n, t in enumerate(self.centroids)}
        return {f"{side}.mean": self.mean, f"{side}.scale": self.scale, f"{side}.rotation": self.rotation, **levels}

    @classmethod
    def of(cls, recipe: Recipe, side: str, tensors: Mapping[str, Tensor], pairs: int) -> Quantiser:
        """Out of a file's tensors; `ValueError` where one is missing or has another shape."""
        dim = recipe.head_dim
        wanted: dict[str, tuple[int, ...]] = {
            f"{side}.mean": (pairs, dim),
            f"{side}.scale": (pairs, 1),
            f"{side}.rotation": (dim, dim),
        }
        wanted |= {
            f"{side}.centroids.{n}": (level.parts, 1 << level.bits, dim // level.parts) for n, level in enumerate(recipe.levels)
        }
        for name, shape in wanted.items():
            t = tensors.get(name)
            if t is None or tuple(t.shape) != shape or t.dtype != torch.float32 or not bool(t.isfinite().all()):
                raise ValueError(
                    f"{name} is {None if t is None else (tuple(t.shape), t.dtype)}, expected finite float32 {shape}"
                )
        mean, scale, rotation, *centroids = (tensors[name] for name in wanted)
        return cls(recipe, mean, scale, rotation, tuple(centroids))


def _nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Codes `(V, parts)` of vectors `(V, D)`: the nearest centroid of each part, the first of equal ones."""
    parts, count, width = centroids.shape
    squares = centroids.square().sum(-1)[:, None]
    found = []
    for some in vectors.split(max(1, _AT_ONCE // (parts * count))):
        cut = some.unflatten(-1, (parts, width)).transpose(0, 1)
        found.append(torch.baddbmm(squares, cut, centroids.transpose(1, 2), alpha=-2).argmin(-1).T)
    return torch.cat(found)


def _looked_up(codes: Tensor, centroids: Tensor) -> Tensor:
    """Centroids of codes `(…, parts)`, side by side: `(…, D)`."""
    parts, count, _ = centroids.shape
    rows = codes.long() + torch.arange(parts, device=codes.device) * count
    return embedding(rows, centroids.flatten(0, 1)).flatten(-2)


@dataclass(frozen=True)
class Codebook:
    """Both quantisers of a model, and what they were trained on.

    Args:
        keys: quantiser of keys.
        values: quantiser of values.
        about: `weights` (fingerprint of the model), `model` (its name), `error` (that of vectors held out, the worse of both sides),
            `vectors` (trained on, of each side), `seed`.
    """

    keys: Quantiser
    values: Quantiser
    about: Mapping[str, Any]

    @property
    def error(self) -> float:
        """Root mean square of |x - decoded x| / |x| over vectors that were held out of training; of keys or values, the worse."""
        return float(self.about["error"])

    def on(self, side: int, device: torch.device) -> Quantiser:
        """A quantiser, 0 for keys and 1 for values, on a device; copied there once."""
        held: dict[tuple[int, torch.device], Quantiser] = self.__dict__.setdefault("_on", {})
        if (side, device) not in held:
            held[side, device] = (self.keys, self.values)[side].to(device)
        return held[side, device]

    def to_bytes(self) -> bytes:
        """The file."""
        tensors = {**self.keys.tensors("keys"), **self.values.tensors("values")}
        about = {**self.about, "keys": str(self.keys.recipe), "values": str(self.values.recipe)}
        return save(
            {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
            {"memory3": json.dumps(about, sort_keys=True)},
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Codebook:
        """A file's codebook; only numbers are read, nothing is executed. `BankError` where it is none."""
        try:
            about = json.loads(_metadata(data)["memory3"])
            tensors = load(data)
            pairs = len(tensors["keys.mean"])
            keys, values = (Quantiser.of(Recipe.parse(about[side]), side, tensors, pairs) for side in SIDES)
            if not isinstance(about["weights"], str) or not 0 <= float(about["error"]) < sqrt(2):
                raise ValueError(f"weights {about['weights']!r} and error {about['error']!r}")
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, BankError) as error:
            raise BankError(f"{where} is no codebook ({error}): take one that `memory3 bank codebook` made") from None
        return cls(keys, values, about)


def digest_of(data: bytes) -> str:
    """What names a codebook: BLAKE2b with 16 bytes over its file, as 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _metadata(data: bytes) -> dict[str, Any]:
    """The free part of a safetensors header, which `load` leaves out."""
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + min(size, 2**20)])["__metadata__"]
    return header
