"""Codes of a few bits <-> bytes: a vector's codes lie end to end, lowest bits first, and fill whole bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOST_BITS = 16


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes `(…, n)` of 0 to 2**bits - 1 -> `(…, packed_bytes(n, bits))` uint8, on the CPU."""
    assert 1 <= bits <= MOST_BITS
    places = (codes.to(torch.int64).numpy()[..., None] >> np.arange(bits)) & 1
    flat = places.astype(np.uint8).reshape(*codes.shape[:-1], -1)
    return torch.from_numpy(np.packbits(flat, axis=-1, bitorder="little"))


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """The `count` codes `(…, count)` int32 of `(…, packed_bytes(count, bits))` uint8, on their device."""
    assert 1 <= bits <= MOST_BITS
    if bits == 8:
        return packed.int()
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes: Tensor = (packed[..., None] >> shifts) & ((1 << bits) - 1)
        return codes.flatten(-2)[..., :count].int()
    if bits < 8:
        return _unpack_eights(packed, count, bits)
    starts = torch.arange(count, device=packed.device) * bits
    padded = torch.nn.functional.pad(packed, (0, 2)).int()
    words = padded[..., starts // 8]
    for n in (1, 2):
        words = words | padded[..., starts // 8 + n] << 8 * n
    return words >> (starts % 8).int() & ((1 << bits) - 1)


def _unpack_eights(packed: Tensor, count: int, bits: int) -> Tensor:
    """Eight codes fill `bits` bytes exactly: these are read as one number, and cut by shifts."""
    groups = -(-count // 8)
    whole = torch.nn.functional.pad(packed, (0, groups * bits - packed.shape[-1])).unflatten(-1, (groups, bits))
    word = torch.int32 if bits <= 3 else torch.int64
    number = sum((whole[..., n].to(word) << 8 * n for n in range(1, bits)), whole[..., 0].to(word))
    shifts = torch.arange(8, dtype=word, device=packed.device) * bits
    codes: Tensor = (number[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].int()
