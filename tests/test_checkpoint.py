"""A checkpoint belongs to one run, and the loop takes its gradients in float32 and divides them once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer

from memory3.decoder import attach
from memory3.spec import MemorySpec
from memory3.train.loop import Schedule, Settings, TrainError, run
from memory3.train.sequences import Warmup

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16)
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def trained(folder: Path, rate: float = 1e-2, steps: int = 6, model: Any = None, **options: Any) -> list[dict[str, float]]:
    """Reports of a run of plain language modelling."""
    lines: list[dict[str, float]] = []
    with attach(model or tiny_model("llama"), tiny_tokenizer(), SPEC) as decoder:
        settings = Settings(folder, Schedule(rate, steps, warmup=2, decay=2), precision="no", log_every=1, **options)
        run(decoder, Warmup(decoder, [TEXT], length=32, batch=2, seed=0), settings, lines.append)
    return lines


def test_a_checkpoint_of_another_run_is_refused_and_one_of_a_higher_rate_or_fewer_steps_is_not(tmp_path: Path) -> None:
    facts = {"facts": {"stage": "warmup small", "layers": (0, 1)}}
    trained(tmp_path, stop_at=2, **facts)
    with pytest.raises(
        TrainError, match=r"found a checkpoint of stage warmup small in .*, expected stage sft paper: use another"
    ):
        trained(tmp_path, facts={"stage": "sft paper", "layers": (0, 1)})
    for options in ({"seed": 1}, {"optimizer": "muon"}, {"weight_decay": 0.0}):
        with pytest.raises(TrainError, match=f"found a checkpoint of {next(iter(options))} "):
            trained(tmp_path, **facts, **options)
    with pytest.raises(TrainError, match=r"found a checkpoint of rate 0.01 in .*, expected rate 0.02"):
        trained(tmp_path, 2e-2, **facts)
    assert [line["step"] for line in trained(tmp_path, 5e-3, 4, **facts)] == [3, 4]
    with pytest.raises(TrainError, match=r"found a checkpoint of 4 steps .* expected at most the 3 of this run"):
        trained(tmp_path, 5e-3, 3, **facts)
    assert [line["step"] for line in trained(tmp_path, 5e-3, 5, **facts)] == [5]


def test_weights_in_half_precision_do_not_learn(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"found weights to be learned in torch.bfloat16, expected float32"):
        trained(tmp_path, model=tiny_model("llama").to(torch.bfloat16))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_teaches_nothing_is_refused(tmp_path: Path, rate: float) -> None:
    with pytest.raises(TrainError, match="found a learning rate of .*, expected a number above 0"):
        trained(tmp_path, rate)


def test_accelerates_own_accumulation_does_not_divide_gradients_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(tmp_path / "a", stop_at=1)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = trained(tmp_path / "b", stop_at=1)
    assert told[0]["gradient_norm"] == plain[0]["gradient_norm"]
