"""One training loop for every stage: accelerate underneath, one process or many, checkpoints that outlive the process.

A batch is a function of its number alone, and the numbers of a step follow from where the run stands. So a resumed run
sees what an unbroken one would have seen, and two processes see what one would that accumulates two micro-batches.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from memory3.decoder import Decoder
from memory3.train.checkpoint import Place, drop_last, restore, save
from memory3.train.figures import Log, Means, Meter, flops_per_token
from memory3.train.settings import Cosine, Objective, Report, Schedule, Settings, TrainError

__all__ = ["Cosine", "Objective", "Report", "Schedule", "Settings", "TrainError", "run"]


def run(decoder: Decoder, objective: Objective, settings: Settings, report: Report = lambda line: None) -> int:
    """Train the decoder's model in place; resumes from the last checkpoint in `settings.folder`.

    Under `torchrun` or `accelerate launch` every process calls this with the same arguments and its own copy of the model;
    they share one folder. The main one alone writes and reports. Torch's random generator is seeded before every micro-batch.

    Returns:
        The number of steps done; less than planned when the time was up.

    Raises:
        TrainError: the run diverges again and again, the checkpoint does not fit, or accelerate is missing or set up for
            what this loop does not do.
    """
    _keep_freed_memory()
    running = _Run(decoder, objective, settings, report)
    try:
        running.to_the_end()
    finally:
        running.close()
    return running.place.step


class _Whole(torch.nn.Module):
    """The whole step as one module, so that DDP and FSDP see one forward however often the model runs inside."""

    def __init__(self, decoder: Decoder, objective: Objective, precision: str) -> None:
        super().__init__()
        self.model = decoder.model
        self.task = (decoder, objective)  # in a tuple, lest a teacher inside the objective be taken for a part to train
        self.bf16 = precision == "bf16"
        self._no_split_modules = getattr(decoder.model, "_no_split_modules", None)  # what FSDP shards apart

    def tie_weights(self) -> None:
        """FSDP asks for it after it has moved the weights."""
        self.model.tie_weights()

    def forward(self, batch: Any, step: int) -> tuple[Tensor, dict[str, float]]:
        decoder, objective = self.task
        with torch.autocast(decoder.device.type, torch.bfloat16, enabled=self.bf16):
            return objective.loss(decoder, batch, step)


class _Run:
    """A run under way: what accelerate prepared, and where it stands."""

    def __init__(self, decoder: Decoder, objective: Objective, settings: Settings, report: Report) -> None:
        self.decoder, self.objective, self.settings, self.report = decoder, objective, settings, report
        self.accelerator = _accelerator()
        self.main, self.processes = self.accelerator.is_main_process, self.accelerator.num_processes
        self.means, self.started = Means(), time.monotonic()
        peak = settings.peak_flops and settings.peak_flops * self.processes
        self.meter = Meter(flops_per_token(decoder.model, getattr(objective, "length", 0)), peak)
        optimizer = torch.optim.AdamW(_groups(decoder.model, settings), lr=settings.schedule.peak, betas=(0.9, 0.95))
        self.whole, self.optimizer = self.accelerator.prepare(_Whole(decoder, objective, settings.precision), optimizer)
        decoder.model.train()
        micro_batches = settings.accumulate * self.processes
        found = restore(decoder.model, self.optimizer, settings.folder, micro_batches)
        self.place = found or Place(micro_batches=micro_batches)
        self.log = Log(settings.folder, self.place.step) if self.main else None
        if found is None:
            self._save()  # what a spike before the first regular checkpoint goes back to

    def to_the_end(self) -> None:
        """Step until the schedule, `stop_at` or the time ends."""
        settings, schedule = self.settings, self.settings.schedule
        last = min(schedule.steps, settings.stop_at or schedule.steps)
        timed_out = False
        while self.place.step < last and not timed_out:
            for group in self.optimizer.param_groups:
                group["lr"] = schedule.rate(self.place.step) * group["factor"]
            loss, tokens, timed_out = self._gradient()
            norm = _number(self.accelerator.clip_grad_norm_(self.whole.parameters(), settings.clip))
            if self.place.watch.spiked(loss, norm, settings):
                self._go_back(loss, norm)
                continue
            self._step(loss, norm, tokens)
            ends = self.place.step == last
            if ends or self.place.step % settings.log_every == 0:
                self._report_means()
            if ends or timed_out or (self.place.step % settings.save_every == 0 and not self.place.watch.high):
                self._save()

    def close(self) -> None:
        self.decoder.model.eval()
        if self.log is not None:
            self.log.close()

    # ---- one step ----

    def _gradient(self) -> tuple[float, float, bool]:
        """Backward through the step's micro-batches; their mean loss, their tokens, and whether some process's time is up."""
        losses, tokens = [], 0
        count = getattr(self.objective, "tokens", None)
        for number, synchronised in self._numbers():
            batch = self.objective.batch(number)
            torch.manual_seed(self.settings.seed * 1_000_003 + number)
            with nullcontext() if synchronised else self.accelerator.no_sync(self.whole):
                loss, figures = self.whole(batch, self.place.step)
                self.accelerator.backward(loss / self.settings.accumulate)
            losses.append(float(loss.detach()))
            self.means.add(figures)
            tokens += count(batch) if count else 0
        limit, elapsed = self.settings.minutes, time.monotonic() - self.started
        own = [sum(losses) / len(losses), float(tokens), float(limit is not None and elapsed > limit * 60)]
        if self.processes == 1:
            return own[0], own[1], own[2] > 0
        mean = self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device), "mean").tolist()
        return mean[0], mean[1] * self.processes, mean[2] > 0

    def _numbers(self) -> Iterator[tuple[int, bool]]:
        """Numbers of this process's micro-batches, and whether the gradient is shared after it (the last one)."""
        many, rank = self.settings.accumulate, self.accelerator.process_index
        for a in range(many):
            yield (self.place.position * many + a) * self.processes + rank, a == many - 1

    def _step(self, loss: float, norm: float, tokens: float) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.place.step += 1
        self.place.position += 1
        self.meter.tokens += tokens
        self.means.add({"loss": loss, "gradient_norm": norm})

    # ---- what remains of it ----

    def _report_means(self) -> None:
        from accelerate.utils import gather_object

        self._write(
            {
                "step": self.place.step,
                "rate": self.settings.schedule.rate(self.place.step - 1),
                "minutes": (time.monotonic() - self.started) / 60,
                **self.means.taken(gather_object),
                **self.meter.taken(),
            }
        )

    def _write(self, line: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write(line)
            self.report(line)

    def _save(self) -> None:
        self.place.watch.passed(self.place.step)
        save(self.decoder.model, self.optimizer, self.settings.folder, self.place, self.main)
        self.accelerator.wait_for_everyone()

    def _go_back(self, loss: float, norm: float) -> None:
        """Return to the last checkpoint, or from the second spike in a row to the one before, and go on with new batches.

        The same batches would lead to the same spike, so all since that checkpoint are skipped.
        """
        spiked, watch = self.place, self.place.watch
        watch.count_spike(spiked.step, loss, norm, self.settings)
        if watch.tries > 1 and self.main:
            drop_last(self.settings.folder)
        self.accelerator.wait_for_everyone()
        self.optimizer.zero_grad()
        earlier = restore(self.decoder.model, self.optimizer, self.settings.folder, spiked.micro_batches)
        assert earlier is not None, "a run starts with a checkpoint"
        skipped = spiked.position + 1 - earlier.position
        self.place = Place(earlier.step, spiked.position + 1, spiked.micro_batches, watch.back_to(earlier.watch))
        self.means, at = Means(), {"step": spiked.step, "back_to_step": earlier.step, "skipped_batches": skipped}
        self._write({**at, "spike_loss": loss, "spike_gradient_norm": norm})


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator, DistributedType
    except ImportError:
        raise TrainError("found no accelerate, expected it for training: pip install 'memory3[train]'") from None
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise TrainError("found FSDP version 1, expected 2: set fsdp_version: 2 under fsdp_config in accelerate's file")
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        raise TrainError(f"found accelerate set up for {kind.value}, expected one process, DDP or FSDP: change its file")
    return accelerator


def _number(norm: Any) -> float:
    """The gradient's norm; FSDP gives it in parts."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _groups(model: Any, settings: Settings) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not; embeddings have a rate of their own."""
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        raise TrainError("found a model whose parameters are all frozen, expected some that require a gradient")
    words, decay, factor = model.get_input_embeddings().weight, settings.weight_decay, settings.embedding_rate
    groups = [
        {"params": [p for p in learned if p.ndim >= 2 and p is not words], "weight_decay": decay, "factor": 1.0},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0, "factor": 1.0},
        {"params": [p for p in learned if p is words], "weight_decay": decay * factor, "factor": factor},
    ]
    return [group for group in groups if group["params"]]


def _keep_freed_memory() -> None:
    """Tell glibc to keep large blocks instead of giving them back after every step.

    A step frees and asks again for the same hundreds of megabytes, and the kernel clears each page anew. No other C
    library knows `mallopt`; there nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
            mallopt(option, value)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
