"""One training loop for every stage: accelerate underneath, one process or many, checkpoints that outlive the process.

A batch is a function of its number alone, and the numbers of a step follow from where the run stands. So a resumed run
sees what an unbroken one would have seen, and two processes see what one would that accumulates two micro-batches.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memory3.decoder import Decoder
from memory3.train.checkpoint import Place, drop_last, restore, save
from memory3.train.figures import Log, Means, Meter, flops_per_token
from memory3.train.optimizers import optimizer_of
from memory3.train.settings import Cosine, Objective, Report, Schedule, Settings, TrainError

__all__ = ["Cosine", "Objective", "Report", "Schedule", "Settings", "TrainError", "run"]


def run(decoder: Decoder, objective: Objective, settings: Settings, report: Report = lambda line: None) -> int:
    """Train the decoder's model in place; resumes from the last checkpoint in `settings.folder`.

    Under `torchrun` or `accelerate launch` every process calls this with the same arguments and its own copy of the model;
    they share one folder. The main one alone writes and reports. Torch's random generator is seeded before every micro-batch.

    Returns:
        The number of steps done; less than planned when the time was up.

    Raises:
        TrainError: the run diverges again and again, the checkpoint is of another run, weights are of a half-precision dtype,
            or accelerate is missing or set up for what this loop does not do.
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
        _check_dtypes(decoder.model)
        self.accelerator = _accelerator(settings.optimizer)
        self.main, self.processes = self.accelerator.is_main_process, self.accelerator.num_processes
        self.means, self.started = Means(), time.monotonic()
        peak = settings.peak_flops and settings.peak_flops * self.processes
        self.meter = Meter(flops_per_token(decoder.model, getattr(objective, "length", 0)), peak)
        whole = _Whole(decoder, objective, settings.precision)
        self.whole, self.optimizer = self.accelerator.prepare(whole, optimizer_of(decoder.model, settings))
        decoder.model.train()
        micro_batches = settings.accumulate * self.processes
        found = restore(decoder.model, self.optimizer, settings.folder, micro_batches, _facts(settings))
        self.place = found or Place(micro_batches=micro_batches, facts=_facts(settings))
        if self.place.step > settings.schedule.steps:
            raise TrainError(
                f"found a checkpoint of {self.place.step} steps in {settings.folder}, expected at most the {settings.schedule.steps} of "
                "this run: give more --steps, or use another --out"
            )
        self.log = Log(settings.folder, self.place.step) if self.main else None
        if found is None:
            self._save()  # what a spike before the first regular checkpoint goes back to

    def to_the_end(self) -> None:
        """Step until the schedule, `stop_at` or the time ends."""
        settings, schedule = self.settings, self.settings.schedule
        last = min(schedule.steps, settings.stop_at or schedule.steps)
        timed_out = False
        if self.place.step == 0:
            self._measure()
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
        self._measure()

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

    def _measure(self) -> None:
        measured = getattr(self.objective, "measured", None)
        if measured is not None and (figures := measured(self.decoder)):
            self._write({"step": self.place.step, **figures})

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
        earlier = restore(self.decoder.model, self.optimizer, self.settings.folder, spiked.micro_batches, spiked.facts)
        assert earlier is not None, "a run starts with a checkpoint"
        skipped = spiked.position + 1 - earlier.position
        self.place = replace(earlier, position=spiked.position + 1, watch=watch.back_to(earlier.watch))
        self.means, at = Means(), {"step": spiked.step, "back_to_step": earlier.step, "skipped_batches": skipped}
        self._write({**at, "spike_loss": loss, "spike_gradient_norm": norm})


def _accelerator(optimizer: str) -> Any:
    try:
        from accelerate import Accelerator, DistributedType
        from accelerate.utils import GradientAccumulationPlugin
    except ImportError:
        raise TrainError("found no accelerate, expected it for training: pip install 'memory3[train]'") from None
    try:  # what accelerate's file says of these would be done twice: this loop does both itself
        once = GradientAccumulationPlugin(num_steps=1)
        cpu = not torch.cuda.is_available()
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", gradient_accumulation_plugin=once)
    except ValueError as error:
        raise TrainError(
            f"found accelerate set up for what this loop does not do ({error}), expected mixed_precision: no in its file"
        ) from None
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise TrainError("found FSDP version 1, expected 2: set fsdp_version: 2 under fsdp_config in accelerate's file")
    if kind == DistributedType.FSDP and optimizer == "muon":
        raise TrainError("found optimizer='muon' with FSDP, expected 'adamw': Muon's step needs a matrix whole")
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        raise TrainError(f"found accelerate set up for {kind.value}, expected one process, DDP or FSDP: change its file")
    return accelerator


def _facts(settings: Settings) -> dict[str, Any]:
    """What a checkpoint has to be of: with any other, the run would not be the one that it goes on from."""
    own = {name: getattr(settings, name) for name in ("seed", "optimizer", "precision", "weight_decay", "embedding_rate")}
    return {**settings.facts, **own, "rate": settings.schedule.peak}


def _check_dtypes(model: Any) -> None:
    """In half precision most updates round to nothing: bf16 has 8 bits, and a step moves a weight by less than a 256th."""
    half = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4}
    if half:
        raise TrainError(
            f"found weights to be learned in {', '.join(sorted(str(d) for d in half))}, expected float32: load the model with "
            "dtype='float32' (Settings.precision says what the passes run in)"
        )


def _number(norm: Any) -> float:
    """The gradient's norm; FSDP gives it in parts."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


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
