"""Training resumes bit for bit, and gradients reach references through memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer

from memory3.attention import Reading
from memory3.decoder import attach
from memory3.spec import MemorySpec
from memory3.train.loop import Schedule, Settings, TrainError, run
from memory3.train.recalled import read_texts
from memory3.train.sequences import Warmup

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16)
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def trained(folder: Path, stops: tuple[int | None, ...], optimizer: str = "adamw", **overrides: Any) -> dict[str, torch.Tensor]:
    """Weights after six steps of plain language modelling, stopped and started as told."""
    for stop in stops:
        with attach(tiny_model("llama", **overrides), tiny_tokenizer(), SPEC) as decoder:
            objective = Warmup(decoder, [TEXT], length=32, batch=2, seed=0)
            schedule = Schedule(1e-2, 6, warmup=2, decay=2)
            settings = Settings(folder, schedule, save_every=100, stop_at=stop, precision="no", optimizer=optimizer)
            run(decoder, objective, settings)
            weights = {name: p.detach().clone() for name, p in decoder.model.named_parameters()}
    return weights


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_and_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    whole, broken = trained(tmp_path / "a", (None,), optimizer), trained(tmp_path / "b", (3, None), optimizer)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    start = dict(tiny_model("llama").named_parameters())
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


def test_a_checkpoint_holds_safetensors_and_json_only_and_another_models_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, (2,))
    assert {p.suffix for p in (tmp_path / "checkpoint").iterdir()} == {".safetensors", ".json"}
    with pytest.raises(TrainError, match="checkpoint of another model"):
        trained(tmp_path, (None,), intermediate_size=80)


def test_the_schedule_warms_up_stays_and_decays() -> None:
    schedule = Schedule(1.0, 100, warmup=10, decay=20)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert 0.05 <= rates[-1] < 0.4


def test_gradient_reaches_a_reference_through_its_memory() -> None:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as decoder:
        stack = decoder.stack([decoder.tokens("a reference")])
        stack.keys.retain_grad()
        layout = decoder.layout([decoder.context("what?")])
        reading = Reading(stack, torch.zeros(1, 1, 1, dtype=torch.long), layout.chunks, decoder.spec)
        decoder.forward(layout, reading).logits.square().sum().backward()
        assert stack.keys.grad is not None
        assert float(stack.keys.grad.abs().sum()) > 0
        decoder.model.zero_grad()


@pytest.mark.parametrize("family", ["starcoder2", "gpt-neox"])  # whose norms stay in float64
def test_the_gradient_of_the_memory_path_equals_finite_differences_in_float64(family: str) -> None:
    """Along a random direction of all weights: encoding, selection (which stands still), reading and the merge of two softmaxes."""
    with attach(tiny_model(family).double(), tiny_tokenizer(), SPEC) as decoder:
        layout = decoder.layout([decoder.context("what does the quick fox do in the morning?")])
        rows = [[["a quick fox jumps over a dog", "dogs sleep"], ["dogs sleep"], ["a fox"]]]

        def loss() -> torch.Tensor:
            logits = decoder.forward(layout, read_texts(decoder, layout, rows)).logits
            return torch.nn.functional.cross_entropy(logits[0, :-1], layout.input_ids[0, 1:])

        weights = [p for p in decoder.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
        made = torch.Generator().manual_seed(0)
        ways = [torch.randn(p.shape, generator=made, dtype=p.dtype) for p in weights]
        along = sum(float((g * w).sum()) for g, w in zip(gradients, ways, strict=True) if g is not None)
        ends = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                for p, w in zip(weights, ways, strict=True):
                    p.add_(w, alpha=step)
                ends.append(float(loss()))
    assert along == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)
    assert abs(along) > 1e-4
