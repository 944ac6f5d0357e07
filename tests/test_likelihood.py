"""What is scored together fits the device and the model's positions, and a stretch is never its own control."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer

from memory3.decoder import Decoder, attach
from memory3.evaluate.arms import SPARSE, Arm
from memory3.evaluate.asking import Question
from memory3.evaluate.given import Brought, with_wrong
from memory3.evaluate.likelihood import Row, asked_by_chunks, chosen, foretold, log_probabilities, passages
from memory3.spec import MemorySpec, SourceError

SPEC = MemorySpec(tokens_per_head=4, reference_length=48, chunk_length=16, references_per_chunk=2)
TEXTS = [f"The tower number {n} was built in {1900 + n}, they say." for n in range(5)]


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


def test_a_batch_holds_no_more_memories_than_its_limit_and_each_is_written_once(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices of one question may fall into several batches; what they read is written for the first."""
    ids = decoder.context(TEXTS[0])
    rows = [Row(ids, len(ids) - 2 - n % 2, len(ids) - n // 3, [TEXTS[n % 3 : n % 3 + 2]]) for n in range(9)]
    together = log_probabilities(Arm(SPARSE, decoder), rows)
    held: list[int] = []
    written: list[str] = []

    def read(self: Decoder, chunks: Any, memories: Any, trace: Any = None) -> Any:
        held.append(len({id(m) for row in memories for chunk in row for m in chunk}))
        return reading(self, chunks, memories, trace)

    def write(self: Decoder, texts: Any) -> Any:
        written.extend(texts)
        return encode(self, texts)

    reading, encode = Decoder.reading, Decoder.encode
    monkeypatch.setattr(Decoder, "reading", read)
    monkeypatch.setattr(Decoder, "encode", write)
    memory = decoder.encode(TEXTS[:1])[0]
    each = (memory.keys.numel() + memory.values.numel()) * memory.keys.element_size()
    for limit, batches in ((4 * each, [4]), (3 * each, [3, 3]), (2 * each, [2, 2, 2]), (1, [2] * 9)):
        held.clear()
        written.clear()
        monkeypatch.setattr("memory3.evaluate.likelihood.MEMORY_BYTES", limit)
        alone = log_probabilities(Arm(SPARSE, decoder), rows)
        assert len(held) == len(batches)
        assert max(held) <= max(batches)
        assert sorted(written) == sorted(set(written))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=0)


def test_wrong_references_of_a_chunk_are_those_of_another_stretch(decoder: Decoder) -> None:
    text = "".join(TEXTS)
    for limit, count in ((1, 0), (2, 1)):
        stretches = passages(decoder, [text], length=64, limit=limit)
        asked = asked_by_chunks(decoder, stretches)
        brought = with_wrong(asked, [(f"{n}",) for n in range(len(asked))])
        assert {len(b.wrong) for b in brought} == {count}
        for n, b in enumerate(brought):
            assert all(int(text) % limit != n % limit for text in b.wrong)


def positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Furthest position of every forward pass."""
    seen: list[int] = []
    original = Decoder.layout

    def noted(self: Decoder, *args: Any, **options: Any) -> Any:
        made = original(self, *args, **options)
        seen.append(int(made.position_ids.max()))
        return made

    monkeypatch.setattr(Decoder, "layout", noted)
    return seen


def test_no_arm_goes_beyond_the_positions_of_the_model(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory arms stand behind the references' interval, also where nothing was recalled."""
    most, seen = decoder.model.config.max_position_embeddings, positions(monkeypatch)
    fits, arm = decoder.window - SPEC.reference_length, Arm(SPARSE, decoder)
    with pytest.raises(SourceError, match=f"expected 18 to {fits}: give another --length"):
        passages(decoder, TEXTS, length=fits + 1)
    [stretch] = passages(decoder, ["".join(TEXTS) * 9], length=fits, limit=1)
    foretold(arm, [stretch], [[Brought()] * -(-fits // 16)])
    chosen(arm, [Question("", "abc " * 600, choices=("x", "yes"), plain=True)], [Brought()])
    assert seen == [most - 1, most - 1]
