"""Random decoders have the paper's shapes, random banks read like true ones, and a unique recall never repeats itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import tiny_model, tiny_tokenizer

from memory3.bench.scenes import UniqueRecall, random_bank, random_decoder
from memory3.cost import PRESETS, Shape
from memory3.decoder import Decoder, attach
from memory3.integers import Int8Codec
from memory3.spec import MemorySpec, SpecError
from memory3.train.shapes import shape

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16, reference_length=32, references_per_chunk=2)
CPU = torch.device("cpu")


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


def test_a_random_bank_reads_like_a_true_one(decoder: Decoder, tmp_path: Path) -> None:
    with random_bank(decoder, tmp_path / "bank", 3, 0, batch=2) as bank:
        assert len(bank) == 3
        [memory, *_] = bank.read(bank.ids())
        [true] = decoder.encode(["x" * 32])
        assert memory.keys.shape == true.keys.shape and memory.keys.dtype == true.keys.dtype
        texts = [places[0].text for places in bank.references(bank.ids()).values()]
        assert all(len(decoder.tokens(text)) >= SPEC.reference_length for text in texts)


def test_a_random_bank_that_was_interrupted_goes_on_to_the_same_one(decoder: Decoder, tmp_path: Path) -> None:
    with random_bank(decoder, tmp_path / "whole", 5, 0, batch=2) as bank:
        whole = {id: memory.keys for id, memory in zip(bank.ids(), bank.read(bank.ids()), strict=True)}
    told: list[int] = []
    random_bank(decoder, tmp_path / "cut", 2, 0, batch=2).close()
    with random_bank(decoder, tmp_path / "cut", 5, 0, batch=2, told=told.append) as bank:
        assert told == [4, 5]
        assert {*bank.ids()} == {*whole}
        for id, memory in zip(bank.ids(), bank.read(bank.ids()), strict=True):
            assert torch.equal(memory.keys, whole[id])
    with random_bank(decoder, tmp_path / "other", 5, 1, batch=2) as bank:
        assert not {*bank.ids()} & {*whole}


def test_a_random_bank_takes_a_codec(decoder: Decoder, tmp_path: Path) -> None:
    with random_bank(decoder, tmp_path / "bank", 1, 0, Int8Codec()) as bank:
        assert bank.stats()["codec"] == "int8"


def test_a_unique_recall_brings_what_no_other_brought_until_it_is_restarted(decoder: Decoder, tmp_path: Path) -> None:
    with random_bank(decoder, tmp_path / "bank", 8, 0) as bank:
        recall = UniqueRecall(bank, 2)
        first = recall(["a", "b"])
        later = recall(["c", "d"])
        ids = [hit.id for found in (*first, *later) for hit in found.hits]
        assert len(set(ids)) == 8
        assert all(found.bytes_read == 2 * bank.record_bytes for found in first)
        for found in first:
            for hit, memory, reference in zip(found.hits, found.memories, found.references, strict=True):
                assert reference.id == hit.id
                assert torch.equal(memory.keys, bank.read([hit.id])[0].keys)
        recall.restart()
        assert [hit.id for hit in recall(["a"])[0].hits] == ids[:2]


def test_a_preset_can_be_cut_and_its_memories_have_the_papers_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", Shape.of(shape(4, 300)))
    with random_decoder("small", 2, torch.bfloat16, CPU) as decoder:
        assert decoder.geometry.num_layers == 2
        assert decoder.dtype == torch.bfloat16
        assert decoder.spec.layers == (0,) and decoder.spec.slots == 8
    with random_decoder("small", None, torch.bfloat16, CPU) as decoder:
        assert decoder.geometry.num_layers == 4
    with pytest.raises(SpecError, match="found 5 layers"):
        random_decoder("small", 5, torch.float32, CPU)
    with pytest.raises(SpecError, match="found preset 'none'"):
        random_decoder("none", None, torch.float32, CPU)
