"""The loop: how many processes, micro-batches, kills or bad batches a run meets does not change what it learns.

Run as a program under `torch.distributed.run`, this file is the worker of the tests with two processes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny_model, tiny_tokenizer
from golden_losses import check_losses
from torch.nn import functional

from memory3.attention import Reading
from memory3.decoder import Decoder, attach
from memory3.spec import MemorySpec
from memory3.train.checkpoint import full_weights
from memory3.train.figures import flops_per_token
from memory3.train.loop import Cosine, Schedule, Settings, TrainError, run
from memory3.train.sequences import Warmup
from memory3.train.spikes import Watch

SPEC = MemorySpec(layers=(0, 1), heads=((0, 1), (0, 1)), tokens_per_head=4, chunk_length=16)
ROWS, LENGTH = 2, 24
SUMMED = 2e-5
"""Relative tolerance where sums are taken in another order: float32 losses of six steps, seen to agree to 2e-7."""


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it, and nothing is written after it."""


class Random:
    """Next-token prediction on rows drawn from the batch's number, in memory's layout: a reference is encoded in the step."""

    length = LENGTH

    def __init__(self, rows: int = ROWS, before: Callable[[int], None] = lambda number: None, bad: Any = ()) -> None:
        self.rows, self.before, self.bad, self.drawn = rows, before, bad, list[int]()

    def batch(self, number: int) -> tuple[int, list[list[int]]]:
        self.before(number)
        self.drawn.append(number)
        own = range(number * self.rows, (number + 1) * self.rows)
        generators = [torch.Generator().manual_seed(row) for row in own]
        return number, [torch.randint(3, VOCABULARY // 8, (LENGTH,), generator=g).tolist() for g in generators]

    def tokens(self, batch: tuple[int, list[list[int]]]) -> int:
        return sum(map(len, batch[1]))

    def loss(self, decoder: Decoder, batch: tuple[int, list[list[int]]], step: int) -> tuple[torch.Tensor, dict[str, float]]:
        number, rows = batch
        layout = decoder.layout(rows)
        stack = decoder.stack([row[:8] for row in rows])
        table = torch.arange(len(rows))[:, None, None].expand(-1, 2, -1)
        logits = decoder.forward(layout, Reading(stack, table, layout.chunks, decoder.spec)).logits
        first = len(decoder.prefix_ids)
        loss = functional.cross_entropy(logits[:, first:-1].flatten(0, 1), layout.input_ids[:, first + 1 :].flatten())
        return (loss * math.nan if number in self.bad else loss), {"number": number}


def settings_of(folder: Path, steps: int = 6, **options: Any) -> Settings:
    return Settings(folder, Schedule(1e-2, steps, warmup=2, decay=2), **{"precision": "no", "log_every": 1, **options})


def trained(
    folder: Path, objective: Any, model: Any = None, steps: int = 6, **options: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Reports of a run and the weights it ends with."""
    lines: list[dict[str, float]] = []
    with attach(model or tiny_model("llama"), tiny_tokenizer(), SPEC) as decoder:
        run(decoder, objective, settings_of(folder, steps, **options), lines.append)
        return lines, {name: p.detach().clone() for name, p in decoder.model.named_parameters()}


def losses(lines: list[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dying(at: int) -> Callable[[int], None]:
    def before(number: int) -> None:
        if number == at:
            raise Killed

    return before


# ---- golden losses ----


def test_ten_steps_of_warmup_give_the_golden_losses(tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as decoder:
        objective = Warmup(decoder, [text], length=32, batch=2, seed=0)
    check_losses("warmup", losses(trained(tmp_path, objective, steps=10)[0]))


# ---- micro-batches and processes ----


def test_two_micro_batches_teach_what_one_of_double_size_teaches(tmp_path: Path) -> None:
    small, big = Random(ROWS), Random(2 * ROWS)
    parts, _ = trained(tmp_path / "parts", small, accumulate=2)
    whole, _ = trained(tmp_path / "whole", big)
    assert losses(parts) == pytest.approx(losses(whole), rel=SUMMED)
    assert [line["gradient_norm"] for line in parts] == pytest.approx([line["gradient_norm"] for line in whole], rel=1e-3)
    assert small.drawn == list(range(12))
    assert losses(parts)[-1] < losses(parts)[0]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes on this machine report, by the worker below, with DDP and with FSDP."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize(("kind", "sharded"), [("ddp", False), ("fsdp", True)])
def test_two_processes_give_the_losses_of_one_that_accumulates_two(
    tmp_path: Path, two_processes: dict[str, Any], kind: str, sharded: bool
) -> None:
    """The two stop in the middle and go on from the checkpoint that they saved together."""
    found = two_processes[kind]
    lines, weights = trained(tmp_path, Random(), accumulate=2)
    assert found["sharded"] == sharded
    assert found["losses"] == pytest.approx(losses(lines), rel=SUMMED)
    assert found["reports"] == [6, 0]
    assert found["numbers"] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    assert found["norms"] == pytest.approx({name: float(w.norm()) for name, w in weights.items()}, rel=1e-3)


def test_sharded_weights_are_those_of_replicated_ones(two_processes: dict[str, Any]) -> None:
    assert two_processes["fsdp"]["norms"] == pytest.approx(two_processes["ddp"]["norms"], rel=1e-3)
    assert two_processes["version 1"] == "found FSDP version 1, expected 2"


def worker(folder: Path) -> None:
    """One of the processes: three steps, then three more that resume from the checkpoint of all; with DDP, then FSDP.

    accelerate takes FSDP from its file on GPUs only. Here its state is told so, and all that follows is its own code.
    """
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState

    torch.set_num_threads(1)
    state, found = Accelerator(cpu=True).state, {}
    found["ddp"] = halves(folder / "ddp", state.is_main_process)
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    options = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    found["fsdp"] = halves(folder / "fsdp", state.is_main_process)
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1, **options)
    try:
        halves(folder / "version 1", state.is_main_process)
    except TrainError as error:
        found["version 1"] = str(error).partition(":")[0]
    if state.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def halves(folder: Path, main: bool) -> dict[str, Any]:
    from accelerate.utils import gather_object

    lines: list[dict[str, float]] = []
    objective = Random()
    for stop in (3, None):
        with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as decoder:
            run(decoder, objective, settings_of(folder, stop_at=stop), lines.append)
            weights = full_weights(decoder.model, main)
            sharded = any(hasattr(p, "full_tensor") for p in decoder.model.parameters())
    return {
        "losses": losses(lines),
        "reports": gather_object([len(lines)]),
        "numbers": gather_object([objective.drawn]),
        "norms": {name: float(w.norm()) for name, w in weights.items()},
        "sharded": sharded,
    }


# ---- exact resume ----


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"attention_dropout": 0.3}])
def test_a_killed_run_ends_with_the_weights_and_losses_of_an_unbroken_one_bit_for_bit(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    dropout = {"attention_dropout": options["attention_dropout"]} if "attention_dropout" in options else {}
    loop = {name: value for name, value in options.items() if name not in dropout} | {"save_every": 2}
    unbroken, weights = trained(tmp_path / "a", Random(), tiny_model("llama", **dropout), **loop)
    with pytest.raises(Killed):  # in the fourth step, two steps after the last checkpoint but one
        trained(tmp_path / "b", Random(before=dying(at=3 * loop.get("accumulate", 1))), tiny_model("llama", **dropout), **loop)
    torch.manual_seed(99)
    rest, again = trained(tmp_path / "b", Random(), tiny_model("llama", **dropout), **loop)
    assert [line["step"] for line in rest] == [3, 4, 5, 6]
    assert losses(rest) == losses(unbroken)[2:]
    assert equal(weights, again)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    _, weights = trained(tmp_path / "a", Random())
    trained(tmp_path / "b", Random(), stop_at=4, save_every=3)
    (tmp_path / "b" / "checkpoint").rename(tmp_path / "b" / "checkpoint.new")  # between the two renames
    rest, again = trained(tmp_path / "b", Random())
    assert [line["step"] for line in rest] == [4, 5, 6]
    assert equal(weights, again)


def test_a_checkpoint_holds_only_what_is_learned_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def partly_frozen() -> Any:
        model = tiny_model("llama")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
        return model

    _, weights = trained(tmp_path / "a", Random(), partly_frozen())
    trained(tmp_path / "b", Random(), partly_frozen(), stop_at=3)
    _, again = trained(tmp_path / "b", Random(), partly_frozen())
    saved = load_file(tmp_path / "b" / "checkpoint" / "model.safetensors")
    assert len(saved) == 4 and all("q_proj" in name for name in saved)
    assert equal(weights, again)


def test_a_checkpoint_of_other_micro_batches_a_step_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, Random(), stop_at=1)
    with pytest.raises(TrainError, match="found a checkpoint of 1 micro-batches a step .* expected 2"):
        trained(tmp_path, Random(), accumulate=2)


def test_a_checkpoint_that_names_the_step_alone_goes_on(tmp_path: Path) -> None:
    """As the first version of the loop wrote it."""
    _, weights = trained(tmp_path / "a", Random())
    trained(tmp_path / "b", Random(), stop_at=3)
    (tmp_path / "b" / "checkpoint" / "state.json").write_text('{"step": 3}')
    assert equal(weights, trained(tmp_path / "b", Random())[1])


def test_a_model_that_is_wholly_frozen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="all frozen"):
        trained(tmp_path, Random(), tiny_model("llama").requires_grad_(False))


# ---- spikes ----


def test_a_batch_whose_loss_is_no_number_is_skipped_with_those_since_the_checkpoint(tmp_path: Path) -> None:
    """Batch 3 is bad: back to step 2, and on with batch 4. So the run equals one that never had batches 2 and 3."""

    class Without(Random):
        def batch(self, number: int) -> tuple[int, list[list[int]]]:
            return super().batch(number if number < 2 else number + 2)

    objective = Random(bad={3})
    lines, weights = trained(tmp_path / "bad", objective, save_every=2)
    assert objective.drawn == [0, 1, 2, 3, 4, 5, 6, 7]
    spikes = [line for line in lines if "spike_loss" in line]
    assert [(s["step"], s["back_to_step"], s["skipped_batches"]) for s in spikes] == [(3, 2, 2)]
    assert all(torch.isfinite(w).all() for w in weights.values())
    good, clean = trained(tmp_path / "clean", Without(), save_every=2)
    assert equal(weights, clean) and losses(lines)[3:] == losses(good)[2:]
    log = [json.loads(line) for line in (tmp_path / "bad" / "log.jsonl").read_text().splitlines()]
    assert [line["spike_loss"] for line in log if "back_to_step" in line] == [None]


def test_a_second_spike_in_a_row_goes_back_one_checkpoint_further(tmp_path: Path) -> None:
    lines, _ = trained(tmp_path, Random(bad={5, 6}), steps=8, save_every=2)
    spikes = [(s["step"], s["back_to_step"], s["skipped_batches"]) for s in lines if "spike_loss" in s]
    assert spikes == [(5, 4, 2), (4, 2, 5)]
    assert lines[-1]["step"] == 8


def test_the_run_gives_up_after_three_spikes_in_a_row(tmp_path: Path) -> None:
    objective = Random(bad=range(2, 100))
    with pytest.raises(TrainError, match="a spike for the 3. time in a row.*lower the learning rate"):
        trained(tmp_path, objective, save_every=2)
    assert objective.drawn == [0, 1, 2, 3, 4]


def test_spikes_between_which_a_checkpoint_passes_them_are_not_in_a_row(tmp_path: Path) -> None:
    lines, _ = trained(tmp_path, Random(bad={3, 7, 11, 15}), steps=10, save_every=2)
    assert sum("spike_loss" in line for line in lines) == 4
    assert lines[-1]["step"] == 10


def test_a_run_killed_after_a_spike_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    _, weights = trained(tmp_path / "a", Random(bad={3}), save_every=2)
    with pytest.raises(Killed):
        trained(tmp_path / "b", Random(bad={3}, before=dying(at=5)), save_every=2)
    _, again = trained(tmp_path / "b", Random(bad={3}), save_every=2)
    assert equal(weights, again)


def test_only_high_steps_in_a_row_are_a_spike_and_none_before_medians_are_known(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, spike_window=8, spike_steps=2, spike_loss=3.0, spike_norm=20.0, clip=1.0)
    watch = Watch()
    assert not any(watch.spiked(9.0 + n, 1.0, settings) for n in (0, 9))
    watch = Watch()
    assert not any(watch.spiked(2.0 + 0.1 * n, 0.5, settings) for n in range(20))
    assert len(watch.losses) == 8
    median = sorted(watch.losses)[3:5]
    limit = sum(median) / 2 + 3.0
    assert not watch.spiked(limit + 0.01, 0.5, settings)  # a single one
    assert not watch.spiked(limit - 0.01, 0.5, settings)
    assert not watch.spiked(2.0, 20.1, settings)
    assert watch.spiked(limit + 9, 0.5, settings)
    assert watch.spiked(2.0, math.inf, settings)
    at_once = replace(settings, spike_steps=1)
    assert not Watch([2.0] * 8, [0.01] * 8).spiked(2.0, 19.0, at_once)  # `clip` would have let a twentieth through
    assert Watch([2.0] * 8, [0.01] * 8).spiked(2.0, 20.1, at_once)


def test_a_run_that_climbs_goes_back(tmp_path: Path) -> None:
    """Batches 7 and 8 are five nats higher. The checkpoint due after the first of them is not written, for it is no good."""

    class Climbing(Random):
        def loss(self, decoder: Decoder, batch: Any, step: int) -> tuple[torch.Tensor, dict[str, float]]:
            loss, figures = super().loss(decoder, batch, step)
            return loss + (5.0 if batch[0] in (7, 8) else 0.0), figures

    lines, _ = trained(tmp_path, Climbing(), steps=12, save_every=4, spike_window=8, spike_steps=2)
    spikes = [(s["step"], s["back_to_step"], s["skipped_batches"]) for s in lines if "spike_loss" in s]
    assert spikes == [(8, 4, 5)]
    assert lines[-1]["step"] == 12


# ---- figures ----


def test_log_and_report_have_the_same_figures(tmp_path: Path) -> None:
    lines, _ = trained(tmp_path, Random(), log_every=2, peak_flops=1e12)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == lines
    assert [line["step"] for line in lines] == [2, 4, 6]
    names = {"step", "rate", "minutes", "loss", "gradient_norm", "number", "tokens_per_s", "flops_per_s", "flop_use"}
    assert set(lines[0]) == names
    per_token = flops_per_token(tiny_model("llama"), LENGTH)
    for line in lines:
        assert line["flops_per_s"] == pytest.approx(line["tokens_per_s"] * per_token)
        assert line["flop_use"] == pytest.approx(line["flops_per_s"] / 1e12)
    assert [line["number"] for line in lines] == [0.5, 2.5, 4.5]


def test_tensorboard_gets_every_figure_of_every_report(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines, _ = trained(tmp_path, Random(), log_every=3)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(lines[0]) - {"step"}
    seen = [(event.step, event.value) for event in board.Scalars("loss")]
    assert seen == [(line["step"], pytest.approx(line["loss"])) for line in lines]


def test_frozen_weights_take_two_thirds_of_the_work_and_looked_up_ones_none(tmp_path: Path) -> None:
    model = tiny_model("llama")
    words = model.get_input_embeddings().weight
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2) - words.numel()
    assert flops_per_token(model) == 6 * matrices
    assert flops_per_token(model, 10) - flops_per_token(model) == 6 * 4 * 10 * 64
    assert flops_per_token(tiny_model("llama", tie_word_embeddings=True)) == 6 * matrices
    assert flops_per_token(tiny_model("llama").requires_grad_(False)) == 4 * matrices
    mixture, half = tiny_model("mixtral"), tiny_model("mixtral", num_experts_per_tok=1, num_local_experts=4)
    experts = sum(p.numel() for name, p in mixture.named_parameters() if ".experts." in name)
    assert experts > 0
    assert flops_per_token(mixture) - flops_per_token(half) == pytest.approx(6 * experts / 4)


# ---- schedules and settings ----


def test_the_cosine_warms_up_and_ends_at_its_floor() -> None:
    schedule = Cosine(2.0, 101, warmup=10)
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * 0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    assert Cosine(1.0, 1).rate(0) == 1.0


def test_matrices_alone_decay(tmp_path: Path) -> None:
    """At a rate of zero for the gradient's part nothing but decay would move; so compare two decays after one step."""
    start = dict(tiny_model("llama").named_parameters())
    _, none = trained(tmp_path / "a", Random(), stop_at=1, weight_decay=0.0)
    _, some = trained(tmp_path / "b", Random(), stop_at=1, weight_decay=0.5)
    rate = Schedule(1e-2, 6, warmup=2, decay=2).rate(0)
    for name, weight in none.items():
        expected = -rate * 0.5 * start[name].detach() if weight.ndim >= 2 else torch.zeros_like(weight)
        torch.testing.assert_close(some[name] - weight, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate=0, expected a whole number"),
        ({"precision": "fp16"}, "precision='fp16', expected auto, bf16, no"),
        ({"clip": 0.0}, "clip=0.0, expected a number above 0"),
        ({"spike_loss": math.nan}, "spike_loss=nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        settings_of(tmp_path, **options)


def test_bf16_is_autocast_and_weights_stay_float32(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Watching(Random):
        def loss(self, decoder: Decoder, batch: Any, step: int) -> tuple[torch.Tensor, dict[str, float]]:
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            return super().loss(decoder, batch, step)

    _, weights = trained(tmp_path, Watching(), precision="bf16", stop_at=1)
    assert seen == [torch.bfloat16]
    assert {w.dtype for w in weights.values()} == {torch.float32}


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    worker(Path(sys.argv[1]))
