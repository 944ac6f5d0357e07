"""What a memory is: the specification that shapes it, the texts it is made from, and the errors of the package.

Shape legend of the package: `N` memories or references, `B` sequences, `Q` query tokens, `H` kv heads, `G` query heads
per kv head, `T` tokens of a reference, `K` kept tokens, `D` head dim, `P` (layer, kv head) pairs of a memory,
`C` chunks, `R` references of a chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_PREFIX = "Reference:"
"""The text of the reference BOS, behind `<s>` where the tokenizer has one (design 2.2; paper 3.3)."""


class Memory3Error(Exception):
    """Base of every error of this package; its message says what was found, what was expected and what to do."""


class SpecError(Memory3Error, ValueError):
    """A memory specification that cannot exist, or does not fit the model."""


class UnsupportedModel(Memory3Error):
    """A model whose attention cannot read explicit memory, with the reason."""


class BankError(Memory3Error):
    """A bank that is missing, damaged or in use."""


class BankMismatch(BankError):
    """A bank written by another model, tokenizer, rotation, selection or codec."""


class SourceError(Memory3Error):
    """A document or question that cannot be read."""


@dataclass(frozen=True)
class MemorySpec:
    """Which key-values of a reference are kept, and how the context reads them.

    Args:
        layers: memory layers, ascending; `None` is the first half (paper 3.3).
        heads: for each memory layer its memory kv heads, ascending; `None` is all of them.
        tokens_per_head: kept tokens of a reference per layer and kv head; `None` keeps all of them.
        reference_length: most tokens of a reference; the context starts at `prefix + reference_length`.
        chunk_length: tokens between two recalls.
        references_per_chunk: references that one recall brings.
        selection: name of the rule that chooses the kept tokens (`memory3.selection.SELECTIONS`).

    Raises:
        SpecError: a field is out of range.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[tuple[int, ...], ...] | None = None
    tokens_per_head: int | None = 8
    reference_length: int = 128
    chunk_length: int = 64
    references_per_chunk: int = 5
    selection: str = "received_attention"

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", _ascending("layers", self.layers))
        if self.heads is not None:
            object.__setattr__(self, "heads", tuple(_ascending("heads", row) for row in self.heads))
            if self.layers is not None and len(self.heads) != len(self.layers):
                raise SpecError(
                    f"found heads for {len(self.heads)} layers, expected {len(self.layers)}: give one row of heads per memory layer"
                )
        for name in ("tokens_per_head", "reference_length", "chunk_length", "references_per_chunk"):
            value = getattr(self, name)
            if value is None and name == "tokens_per_head":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"found {name}={value!r}, expected a whole number of at least 1")
        if self.reference_length > 256:
            raise SpecError(
                f"found reference_length={self.reference_length}, expected at most 256: a kept position is one byte"
            )

    def resolved(self, num_layers: int, num_kv_heads: int) -> MemorySpec:
        """The same spec with layers and heads spelled out for a model of this shape; `SpecError` where they do not fit."""
        layers = tuple(range((num_layers + 1) // 2)) if self.layers is None else self.layers
        if layers[-1] >= num_layers:
            raise SpecError(f"found memory layer {layers[-1]}, expected layers below {num_layers}: the model has no more")
        heads = tuple(tuple(range(num_kv_heads)) for _ in layers) if self.heads is None else self.heads
        if len(heads) != len(layers):
            raise SpecError(
                f"found heads for {len(heads)} layers, expected {len(layers)}: give one row of heads per memory layer"
            )
        worst = max(row[-1] for row in heads)
        if worst >= num_kv_heads:
            raise SpecError(f"found memory head {worst}, expected heads below {num_kv_heads}: the model has no more kv heads")
        return replace(self, layers=layers, heads=heads)

    @property
    def pairs(self) -> int:
        """`P`: number of (memory layer, kv head) pairs of a resolved spec."""
        assert self.heads is not None, "resolve the spec first"
        return sum(len(row) for row in self.heads)

    @property
    def slots(self) -> int:
        """`K`: kept tokens per (layer, head) that a record reserves."""
        return self.reference_length if self.tokens_per_head is None else min(self.tokens_per_head, self.reference_length)

    def rows_of(self, layer: int) -> slice:
        """Rows of the `P` axis that belong to a memory layer of a resolved spec."""
        assert self.layers is not None and self.heads is not None, "resolve the spec first"
        index = self.layers.index(layer)
        start = sum(len(row) for row in self.heads[:index])
        return slice(start, start + len(self.heads[index]))

    def heads_of(self, layer: int) -> tuple[int, ...]:
        """Memory kv heads of a memory layer of a resolved spec."""
        assert self.layers is not None and self.heads is not None, "resolve the spec first"
        return self.heads[self.layers.index(layer)]

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> MemorySpec:
        """The spec that `to_json` wrote; `SpecError` on unknown or ill-typed fields."""
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise SpecError(
                f"found unknown fields {sorted(unknown)} in a memory spec, expected {sorted(cls.__dataclass_fields__)}"
            )
        try:
            values = dict(fields)
            if values.get("layers") is not None:
                values["layers"] = tuple(values["layers"])
            if values.get("heads") is not None:
                values["heads"] = tuple(tuple(row) for row in values["heads"])
            return cls(**values)
        except TypeError as error:
            raise SpecError(
                f"found a memory spec with a field of the wrong type ({error}), expected the fields of MemorySpec"
            ) from None


def _ascending(name: str, values: Sequence[int]) -> tuple[int, ...]:
    row = tuple(values)
    if not row or any(not isinstance(v, int) or v < 0 for v in row) or list(row) != sorted(set(row)):
        raise SpecError(f"found {name}={row}, expected distinct whole numbers in ascending order, at least one")
    return row


@dataclass(frozen=True)
class Reference:
    """A text of at most `reference_length` tokens and where it stands in its source.

    `start` and `end` are character offsets into the decoded text of `source` (end excluded). `context` names the texts that
    its memory saw before it (`memory3.context`); empty where it was encoded alone.
    """

    text: str
    source: str = ""
    start: int = 0
    end: int = 0
    context: str = ""

    @property
    def id(self) -> str:
        """Content hash: 32 hexadecimal digits of BLAKE2b over the UTF-8 text; behind it a zero byte and the context, if any.

        The third part of a memory's identity, its spec, is that of the bank.
        """
        content = f"{self.text}\0{self.context}" if self.context else self.text
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Memory:
    """The sparse key-values of one reference.

    Args:
        keys: rotated keys `(P, K, D)` in the dtype of the model, `K` = kept tokens of this reference.
        values: `(P, K, D)`.
        positions: place of each kept token inside the reference `(P, K)`, uint8, ascending along `K`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    def copy(self) -> Memory:
        """The same in storage of its own."""
        return Memory(self.keys.clone(), self.values.clone(), self.positions.clone())

    @property
    def count(self) -> int:
        """`K`: kept tokens per layer and head."""
        return int(self.keys.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and positions in memory."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.positions))
