"""The speed of training is measured in turns, on steps that do what they are said to do, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import tiny_model, tiny_tokenizer

import memory3.evaluate.speed as speed
from memory3.decoder import Decoder, attach
from memory3.evaluate.speed import measure_speed
from memory3.spec import MemorySpec, SpecError

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16, reference_length=32, references_per_chunk=2)
SMALL = {"length": 48, "batch": 2, "repeats": 2}


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


def test_the_table_is_printed_and_the_weights_stay(decoder: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: p.detach().clone() for name, p in decoder.model.named_parameters()}
    told: list[tuple[int, int]] = []
    found = measure_speed(decoder, **SMALL, tell=lambda done, total: told.append((done, total)))
    assert all(torch.equal(before[name], p) for name, p in decoder.model.named_parameters())
    assert not decoder.model.training
    assert list(found) == ["warmup", "continual"]
    assert {len(way.seconds) for way in found.values()} == {2}  # the turn that warms up does not count
    assert told == [(n + 1, 6) for n in range(6)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {5}
    assert lines[0].startswith("| training step of 2 x 48 tokens |")
    assert "8 references of 32 tokens" in lines[3]  # 49 tokens with <s> are 4 chunks, of 2 sequences


def test_both_stages_train_on_the_same_tokens_and_both_take_the_gradient(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[list[int]], bool]] = []
    original = speed._Step.__call__

    def noted(self: speed._Step, objective: speed.Sequences, batch: object) -> None:
        original(self, objective, batch)
        rows = batch.rows if isinstance(batch, speed.Retrieved) else batch
        states = [state["exp_avg"].abs().sum() > 0 for state in self.optimizer.state.values()]
        seen.append((type(objective).__name__, rows, all(states) and len(states) == len(self.learned)))

    monkeypatch.setattr(speed._Step, "__call__", noted)
    measure_speed(decoder, **SMALL)
    assert [name for name, _, _ in seen] == ["Warmup", "Continual"] * 3
    assert all(learned for _, _, learned in seen)
    assert all(seen[n][1] == seen[n + 1][1] for n in (0, 2, 4))
    assert seen[0][1] != seen[2][1]


def test_sizes_that_mean_nothing_are_refused(decoder: Decoder) -> None:
    for options, found in (
        ({"repeats": 0}, "repeats=0"),
        ({"precision": "int2"}, "int2"),
    ):
        with pytest.raises(SpecError, match=found):
            measure_speed(decoder, **SMALL | options)
