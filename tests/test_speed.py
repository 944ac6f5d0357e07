"""Speed is measured in turns, on steps and answers that do what they are said to do, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny_model, tiny_tokenizer

import memory3.evaluate.speed as speed
from memory3.decoder import Decoder, attach
from memory3.evaluate.speed import Timed, measure_speed, random_bank
from memory3.spec import MemorySpec, SpecError

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16, reference_length=32, references_per_chunk=2)
SMALL = {"length": 48, "batch": 2, "decode_batch": 2, "prompt": 20, "output": 18, "repeats": 2}


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


def test_both_tables_are_printed_and_the_weights_stay(decoder: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: p.detach().clone() for name, p in decoder.model.named_parameters()}
    told: list[tuple[int, int]] = []
    found = measure_speed(decoder, **SMALL, tell=lambda done, total: told.append((done, total)))
    assert all(torch.equal(before[name], p) for name, p in decoder.model.named_parameters())
    assert not decoder.model.training
    assert list(found) == ["warmup", "continual", "plain", "memory", "text"]
    assert {len(way.seconds) for way in found.values()} == {2}  # the turn that warms up does not count
    assert told == [(n + 1, 15) for n in range(15)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and {line.count("|") for line in lines} == {5}
    assert lines[0].startswith("| training step of 2 x 48 tokens |")
    assert "files in the page cache" in lines[7]
    assert "8 references of 32 tokens" in lines[3]  # 49 tokens with <s> are 4 chunks, of 2 sequences
    assert "3 recalls of 2, 4 tokens per head" in lines[7]  # 2 chunks of the prompt, and the first of 2 of the answer


def test_the_papers_setting_has_three_recalls(decoder: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    """128 tokens in and 128 out, in chunks of 64; here a quarter of all."""
    measure_speed(decoder, decode_batch=1, prompt=32, output=32, repeats=1, parts=("decode",))
    assert "memory: 3 recalls of 2" in capsys.readouterr().out


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
    measure_speed(decoder, **SMALL, parts=("train",))
    assert [name for name, _, _ in seen] == ["Warmup", "Continual"] * 3
    assert all(learned for _, _, learned in seen)
    assert all(seen[n][1] == seen[n + 1][1] for n in (0, 2, 4))
    assert seen[0][1] != seen[2][1]


def test_every_answer_has_its_length_and_reads_what_the_table_says(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, int, list[int], list[int]]] = []
    read: list[str] = []
    original = speed.complete

    def noted(decoder: Decoder, prompts: list[speed.Prompt], **options: object) -> object:
        answers = original(decoder, prompts, **options)
        ids = [hit.id for a in answers for _, recalled in a.recalls for hit in recalled.hits]
        read.extend(ids)
        done.append((len(ids), len(set(ids)), [len(p.ids) for p in prompts], [len(a.ids) for a in answers]))
        return answers

    monkeypatch.setattr(speed, "complete", noted)
    measure_speed(decoder, **SMALL | {"repeats": 1}, parts=("decode",))
    plain, memory, text = (0, 0, [20, 20], [18, 18]), (12, 12, [20, 20], [18, 18]), (0, 0, [84, 84], [18, 18])
    assert done == [plain, memory, text, plain, memory, text]
    assert len(read) == len(set(read)) == 24  # no turn reads what another has read


def test_a_random_bank_reads_like_a_true_one(decoder: Decoder, tmp_path: Path) -> None:
    with random_bank(decoder, tmp_path / "bank", 3, np.random.default_rng(0)) as bank:
        assert len(bank) == 3
        [memory, *_] = bank.read(bank.ids())
        [true] = decoder.encode(["x" * 32])
        assert memory.keys.shape == true.keys.shape and memory.keys.dtype == true.keys.dtype
        texts = [places[0].text for places in bank.references(bank.ids()).values()]
        assert all(len(decoder.tokens(text)) >= SPEC.reference_length for text in texts)


def test_the_median_turn_counts() -> None:
    timed = Timed("way", (1.0, 4.0, 2.0), tokens=100)
    assert timed.rate == 50
    assert timed.row(0.5) == "| way | 2 [1, 4] | 50 | 0.500 |"


def test_sizes_and_parts_that_mean_nothing_are_refused(decoder: Decoder) -> None:
    for options, found in (
        ({"repeats": 0}, "repeats=0"),
        ({"parts": ("sleep",)}, "sleep"),
        ({"precision": "int2"}, "int2"),
        ({"prompt": 1}, "prompt=1"),
    ):
        with pytest.raises(SpecError, match=found):
            measure_speed(decoder, **SMALL | options)
