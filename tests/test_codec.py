"""Records: what goes in comes out bit for bit, in the size that was promised, and damage is noticed."""

import pytest
import torch
from fakes import same
from hypothesis import given
from hypothesis import strategies as st

from memory3.codec import RawCodec, codec_from
from memory3.record import ALIGNMENT, RecordShape
from memory3.spec import BankError, Memory, MemorySpec

ID = "0123456789abcdef" * 2
SHAPE = RecordShape(3, 4, 8)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def memory(pairs: int, kept: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> Memory:
    keys, values = torch.randn(2, pairs, kept, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Memory(keys, values, torch.arange(kept, dtype=torch.uint8).expand(pairs, kept).contiguous())


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 17),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 99),
)
def test_a_raw_record_gives_back_every_bit_and_has_the_planned_size(
    pairs: int, slots: int, kept: int, head_dim: int, dtype: str, seed: int
) -> None:
    shape, codec = RecordShape(pairs, slots, head_dim), RawCodec(dtype)
    given_memory = memory(pairs, min(kept, slots), head_dim, DTYPES[dtype], seed)
    record = codec.encode(given_memory, shape, ID)
    assert len(record) == codec.record_bytes(pairs, slots, head_dim)
    assert len(record) % ALIGNMENT == shape.payload_offset % ALIGNMENT == 0
    assert same(codec.decode(bytearray(record), shape, ID, "here"), given_memory)


@pytest.mark.parametrize("pattern", [0x7FC1, 0xFF81, 0x8000, 0x0001])
def test_not_a_number_minus_zero_and_subnormals_survive(pattern: int) -> None:
    bits = torch.tensor(pattern, dtype=torch.int32).to(torch.int16)
    special = Memory(
        *(bits.expand(3, 2, 8).contiguous().view(torch.bfloat16) for _ in range(2)), torch.zeros(3, 2, dtype=torch.uint8)
    )
    codec = RawCodec()
    assert same(codec.decode(bytearray(codec.encode(special, SHAPE, ID)), SHAPE, ID, "here"), special)


def test_the_papers_memory_takes_its_450560_bytes_of_payload() -> None:
    shape = RecordShape.of(MemorySpec(layers=tuple(range(22)), heads=(tuple(range(8)),) * 22), 80)
    assert RawCodec().payload_bytes(shape) == 450_560


@given(st.integers(0, len(RawCodec().encode(memory(3, 3, 8, torch.bfloat16), SHAPE, ID)) * 8 - 1))
def test_any_flipped_bit_is_noticed(bit: int) -> None:
    record = bytearray(RawCodec().encode(memory(3, 3, 8, torch.bfloat16), SHAPE, ID))
    record[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BankError, match=f"record 7 of memory {ID} is damaged"):
        RawCodec().decode(record, SHAPE, ID, "record 7")


def test_an_erased_a_foreign_and_a_cut_record_are_refused_with_the_reason() -> None:
    codec = RawCodec()
    record = codec.encode(memory(3, 3, 8, torch.bfloat16), SHAPE, ID)
    for spoilt, id, reason in (
        (bytearray(len(record)), ID, "is erased"),
        (bytearray(record), "f" * 32, f"record of memory {ID}"),
        (bytearray(record[:-1]), ID, "expected 448"),
    ):
        with pytest.raises(BankError, match=reason):
            codec.decode(spoilt, SHAPE, id, "here")


def test_memories_of_another_shape_or_dtype_are_refused() -> None:
    good = memory(3, 3, 8, torch.bfloat16)
    for bad, reason in (
        (memory(2, 3, 8, torch.bfloat16), "expected both"),
        (memory(3, 5, 8, torch.bfloat16), "1 to 4"),
        (memory(3, 3, 8, torch.float32), "float32 keys"),
        (Memory(good.keys, good.values[:, :2], good.positions), "expected both"),
        (Memory(good.keys, good.values, good.positions.int()), "int32"),
        (Memory(good.keys[0], good.values[0], good.positions), "expected both"),
    ):
        with pytest.raises(BankError, match=reason):
            RawCodec().encode(bad, SHAPE, ID)


@pytest.mark.parametrize(
    ("name", "parameters"), [("zip", {}), (["raw"], {}), ("raw", None), ("raw", {"level": 3}), ("raw", {"dtype": "int8"})]
)
def test_an_unknown_codec_is_refused(name: object, parameters: object) -> None:
    with pytest.raises(BankError, match=r"expected|does not take"):
        codec_from(name, parameters)
