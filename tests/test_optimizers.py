"""Which optimizer steps which parameter, and that Muon and AdamW under one roof do what each does alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model

from memory3.train import optimizers
from memory3.train.optimizers import MuonAdamW, optimizer_of
from memory3.train.settings import Schedule, Settings, TrainError


def settings(optimizer: str, **options: Any) -> Settings:
    return Settings(Path("unused"), Schedule(1e-2, 6), optimizer=optimizer, **options)


def stepped(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    for n, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
    optimizer.step()


def twins() -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    values = [torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.ones(4)]
    first, second = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    return first, second


@pytest.mark.parametrize("fast", [True, False])
def test_each_part_steps_as_it_does_alone_also_after_its_state_was_loaded_anew(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the machine does not compute in bf16 Muon's step is that of torch but for the rounding."""
    monkeypatch.setattr(optimizers, "computes_bf16", lambda: fast)
    (matrix, vector), (other, line) = twins()
    both = MuonAdamW([{"params": [matrix], "weight_decay": 0.1}], [{"params": [vector], "weight_decay": 0.0}], 1e-2)
    muon = torch.optim.Muon([other], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([line], lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95))
    for turn in range(3):
        stepped(both, [matrix, vector])
        other.grad, line.grad = (p.grad.clone() for p in (matrix, vector) if p.grad is not None)
        muon.step()
        adam.step()
        assert torch.allclose(matrix, other, rtol=0.0, atol=0.0 if fast else 1e-3), turn
        assert fast or not torch.equal(matrix, other)
        assert torch.equal(vector, line), turn
        both.load_state_dict(both.state_dict())  # what accelerate does when it prepares an optimizer


def test_a_learning_rate_given_to_the_groups_is_the_one_that_is_used() -> None:
    (matrix, vector), _ = twins()
    before = matrix.detach().clone(), vector.detach().clone()
    both = MuonAdamW([{"params": [matrix]}], [{"params": [vector]}], 1e-2)
    for group in both.param_groups:
        group["lr"] = 0.0
    stepped(both, [matrix, vector])
    assert torch.equal(matrix, before[0]) and torch.equal(vector, before[1])


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_between_embeddings_and_output_and_adamw_all_else(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    optimizer = optimizer_of(model, settings("muon", embedding_rate=0.3))
    assert isinstance(optimizer, MuonAdamW)
    ours = {id(p) for p in optimizer.parts[0].param_groups[0]["params"]}
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert ours == {id(p) for p in model.parameters() if p.ndim == 2} - outside
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted({id(p) for p in model.parameters()})
    factors = {id(p): group["factor"] for group in optimizer.param_groups for p in group["params"]}
    assert factors[id(model.get_input_embeddings().weight)] == 0.3


def test_an_optimizer_of_another_name_is_refused() -> None:
    with pytest.raises(TrainError, match="found optimizer='sgd', expected 'adamw' or 'muon'"):
        settings("sgd")
