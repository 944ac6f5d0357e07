"""Keys and values through a trained codebook: the paper's codec, 14 bytes for a vector of 80 numbers (arXiv 2407.01178, 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

from torch import Tensor

from memory3.codebook import CODEBOOK, Codebook, Recipe, digest_of
from memory3.record import Fetch, RecordShape
from memory3.spec import BankError
from memory3.vectorwise import VectorCodec


def _nowhere(name: str) -> bytes:
    raise BankError(f"found no {name}, expected it beside the bank's manifest: give the codec the codebook that it names")


@dataclass(frozen=True)
class ProductCodec(VectorCodec):
    """Product quantisation of what a coarse product quantiser leaves, after a learned rotation (`memory3.codebook`).

    The codebook is frozen and named by its hash; it is read when the first memory is encoded or decoded, so a bank whose codebook is
    damaged can still be looked at, forget, and be rebuilt.
    Stated error: that of vectors of the same model held out of training. Vectors unlike those can be off by more.

    Args:
        keys: quantiser of keys, `OPQ20_80,Residual2x14,PQ8x10` for instance.
        values: the same of values.
        codebook: hash of the codebook's file.
        fetch: reads that file.
    """

    keys: str
    values: str
    codebook: str
    fetch: Fetch = field(default=_nowhere, compare=False, repr=False)
    name: ClassVar[str] = "product"

    def __post_init__(self) -> None:
        if not isinstance(self.codebook, str) or not callable(self.fetch):
            raise BankError(f"found codebook {self.codebook!r} of codec product, expected its hash: restore the manifest")
        dims = {recipe.head_dim for recipe in self._recipes}
        if len(dims) > 1:
            raise BankError(f"found quantisers {self.keys} and {self.values}, expected both for one head dim")

    @classmethod
    def of(cls, data: bytes, where: str = CODEBOOK) -> ProductCodec:
        """The codec of a codebook's file; `BankError` where it is none."""
        about = Codebook.from_bytes(data, where).about
        return cls(about["keys"], about["values"], digest_of(data), lambda name: data)

    def parameters(self) -> dict[str, Any]:
        return {"keys": self.keys, "values": self.values, "codebook": self.codebook}

    def files(self) -> Mapping[str, bytes]:
        return {CODEBOOK: self._data}

    def beside(self, fetch: Fetch) -> Self:
        return replace(self, fetch=fetch)

    def misfit(self, identity: Mapping[str, Any]) -> str | None:
        about, pairs = self.book.about, sum(map(len, identity["spec"]["heads"]))
        if about["weights"] != identity["weights"]:
            return (
                f"the codebook was trained on memories of {about['model']} (weights {about['weights'][:8]}…), this model is "
                f"{identity['model']} (weights {identity['weights'][:8]}…)"
            )
        if len(self.book.keys.mean) != pairs:
            return f"the codebook was trained for {len(self.book.keys.mean)} memory heads, this model has {pairs}"
        return None

    def payload_bytes(self, shape: RecordShape) -> int:
        if shape.head_dim != self._recipes[0].head_dim:
            raise BankError(
                f"found quantiser {self.keys} for head dim {shape.head_dim}, expected one that ends in _{shape.head_dim}"
            )
        return super().payload_bytes(shape)

    def row_bytes(self, side: int, head_dim: int) -> int:
        return self._recipes[side].row_bytes

    def to_rows(self, side: int, vectors: Tensor) -> Tensor:
        return self.book.on(side, vectors.device).encode(vectors)

    def from_rows(self, side: int, rows: Tensor, head_dim: int) -> Tensor:
        return self.book.on(side, rows.device).decode(rows)

    def relative_error(self, head_dim: int) -> float:
        return self.book.error

    @cached_property
    def book(self) -> Codebook:
        """The codebook; `BankError` where its file is missing, damaged or another."""
        found = Codebook.from_bytes(self._data, CODEBOOK)
        if (found.about["keys"], found.about["values"]) != (self.keys, self.values):
            raise BankError(f"{CODEBOOK} holds quantisers other than {self.keys} and {self.values}: restore the manifest")
        return found

    @cached_property
    def _data(self) -> bytes:
        data = self.fetch(CODEBOOK)
        if digest_of(data) != self.codebook:
            raise BankError(
                f"{CODEBOOK} is damaged or another (found {digest_of(data)[:8]}…, expected {self.codebook[:8]}…): restore it from a "
                "copy, or encode the texts again: memory3 bank rebuild BANK --codec raw"
            )
        return data

    @cached_property
    def _recipes(self) -> tuple[Recipe, Recipe]:
        return Recipe.parse(self.keys), Recipe.parse(self.values)
