"""Key-values of a reference <-> the bytes of a record: which codecs there are, and how they are named.

Adding one: a frozen dataclass with `payload_bytes`, `pack`, `unpack`, `accepts` and `relative_error`, and a row in `CODECS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from memory3.integers import Int4Codec, Int8Codec
from memory3.product import ProductCodec
from memory3.record import Codec, RecordShape, short
from memory3.rotated import RotatedCodec
from memory3.spec import BankError, Memory


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
        return cls(short(dtype))

    def payload_bytes(self, shape: RecordShape) -> int:
        return 2 * shape.vectors * shape.head_dim * _DTYPES[self.dtype].itemsize

    def pack(self, keys: Tensor, values: Tensor) -> bytes:
        return torch.stack((keys, values)).view(torch.uint8).numpy().tobytes()

    def unpack(self, payloads: Tensor, shape: RecordShape) -> tuple[Tensor, Tensor]:
        both = payloads.view(_DTYPES[self.dtype]).view(-1, 2, shape.pairs, shape.slots, shape.head_dim)
        return both[:, 0], both[:, 1]

    def decode_all(
        self,
        records: Sequence[bytearray],
        shape: RecordShape,
        ids: Sequence[str],
        places: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> list[Memory]:
        """One by one: there is nothing to compute, and a view of each record is no copy."""
        memories = [self.decode(record, shape, id, place) for record, id, place in zip(records, ids, places, strict=True)]
        return [Memory(m.keys.to(device), m.values.to(device), m.positions.to(device)) for m in memories]

    def accepts(self, dtype: torch.dtype) -> bool:
        return dtype == _DTYPES[self.dtype]

    def relative_error(self, head_dim: int) -> float:
        return 0.0


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


def codec_named(text: str, dtype: torch.dtype, codebook: Path | None = None) -> Codec:
    """The codec that a user names: `int8`, or with parameters `rotated:key_bits=3,value_bits=2`.

    Args:
        text: a row of `CODECS`, and behind a colon what it takes besides; `raw` alone takes the dtype below.
        dtype: of the model.
        codebook: file of it, for `product`, which takes nothing else.

    Raises:
        BankError: unknown, or without the codebook that it wants.
    """
    if text == ProductCodec.name:
        return _with_codebook(codebook)
    name, _, rest = text.partition(":")
    parameters: dict[str, object] = {"dtype": short(dtype)} if name == "raw" else {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        parameters[key.strip()] = int(value) if value.strip().isdecimal() else value.strip()
    if name in CODECS and (unknown := set(parameters) - {field.name for field in fields(CODECS[name])}):  # type: ignore[arg-type]
        taken = ", ".join(field.name for field in fields(CODECS[name])) or "none"  # type: ignore[arg-type]
        raise BankError(f"found parameter {sorted(unknown)[0]!r} of codec {name}, expected one of: {taken}")
    return codec_from(name, parameters)


def _with_codebook(file: Path | None) -> ProductCodec:
    if file is None:
        raise BankError(
            "found no codebook of this model, expected one for codec product: give it with --codebook, or train it on a bank "
            "that was written without --codec: memory3 bank codebook BANK FILE"
        )
    try:
        return ProductCodec.of(file.read_bytes(), str(file))
    except OSError as error:
        raise BankError(
            f"{file} cannot be read ({error.strerror}), expected a codebook: give another with --codebook"
        ) from None


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

CODECS: dict[str, type[Codec]] = {
    "raw": RawCodec,
    "int8": Int8Codec,
    "int4": Int4Codec,
    "rotated": RotatedCodec,
    "product": ProductCodec,
}
