"""One training loop for every stage: accelerate underneath, checkpoints that outlive the process, no pickle.

A batch is a function of the step alone, so a resumed run sees the batches that an unbroken one would have seen.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from memory3.decoder import Decoder
from memory3.spec import Memory3Error


class TrainError(Memory3Error):
    """Training cannot start, resume or go on."""


class Objective(Protocol):
    """What a stage teaches."""

    def batch(self, step: int) -> Any:
        """The batch of a step, the same whenever asked."""

    def loss(self, decoder: Decoder, batch: Any, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss to minimise, and figures for the log."""


@dataclass(frozen=True)
class Schedule:
    """Warmup-stable-decay: linear up, flat, then down to `floor` by the square root, in steps."""

    peak: float
    steps: int
    warmup: int = 100
    decay: int = 0
    floor: float = 0.05

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        left = self.steps - step
        if left >= self.decay:
            return self.peak
        return self.peak * (self.floor + (1 - self.floor) * (1 - sqrt(1 - left / self.decay)))


@dataclass(frozen=True)
class Settings:
    """How to run a stage. `minutes` stops it cleanly with a checkpoint; run the same command again to go on.

    The embeddings learn at `embedding_rate` times the rate of the rest.
    """

    folder: Path
    schedule: Schedule
    weight_decay: float = 0.1
    clip: float = 1.0
    log_every: int = 20
    save_every: int = 200
    minutes: float | None = None
    precision: str = "bf16"
    stop_at: int | None = None
    embedding_rate: float = 1.0


Report = Callable[[dict[str, float]], None]


def run(decoder: Decoder, objective: Objective, settings: Settings, report: Report = lambda line: None) -> int:
    """Train the decoder's model in place; resumes from the last checkpoint in `settings.folder`.

    Returns:
        The number of steps done; less than planned when the time was up.

    Raises:
        TrainError: the loss is not a number, or the checkpoint does not fit the model.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise TrainError("found no accelerate, expected it for training: pip install 'memory3[train]'") from None
    _keep_freed_memory()
    accelerator = Accelerator(mixed_precision=settings.precision, cpu=not torch.cuda.is_available())
    decoder.model.to(accelerator.device)
    optimizer = torch.optim.AdamW(_groups(decoder.model, settings), lr=settings.schedule.peak, betas=(0.9, 0.95))
    step = _resume(decoder.model, optimizer, settings.folder)
    optimizer = accelerator.prepare(optimizer)
    start, window = time.monotonic(), _Window()
    decoder.model.train()
    last = min(settings.schedule.steps, settings.stop_at or settings.schedule.steps)
    while step < last:
        for group in optimizer.param_groups:
            group["lr"] = settings.schedule.rate(step) * group["factor"]
        with accelerator.autocast():
            loss, figures = objective.loss(decoder, objective.batch(step), step)
        if not torch.isfinite(loss):
            raise TrainError(
                f"found loss {loss.item()} at step {step}, expected a number: lower the learning rate and run again"
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(decoder.model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        window.add({"loss": float(loss.detach()), **figures})
        if step % settings.log_every == 0 or step == last:
            report(
                {
                    "step": step,
                    "rate": settings.schedule.rate(step - 1),
                    "minutes": (time.monotonic() - start) / 60,
                    **window.means(),
                }
            )
        timed_out = settings.minutes is not None and time.monotonic() - start > settings.minutes * 60
        if step % settings.save_every == 0 or step == last or timed_out:
            save(decoder, optimizer, settings.folder, step)
        if timed_out:
            break
    decoder.model.eval()
    return step


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


class _Window:
    """Means of the figures since the last report."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.sums.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self.sums.items()}
        self.sums.clear()
        return means


def _groups(model: Any, settings: Settings) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not; embeddings have a rate of their own."""
    learned = [p for p in model.parameters() if p.requires_grad]
    words = model.get_input_embeddings().weight
    return [
        {
            "params": [p for p in learned if p.ndim >= 2 and p is not words],
            "weight_decay": settings.weight_decay,
            "factor": 1.0,
        },
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0, "factor": 1.0},
        {
            "params": [p for p in learned if p is words],
            "weight_decay": settings.weight_decay * settings.embedding_rate,
            "factor": settings.embedding_rate,
        },
    ]


# ---- checkpoints ----


def save(decoder: Decoder, optimizer: Any, folder: Path, step: int) -> None:
    """Write `folder/checkpoint` whole or not at all: model, optimizer moments (safetensors) and the step."""
    from safetensors.torch import save_file

    fresh, final = folder / "checkpoint.new", folder / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in decoder.model.named_parameters()}, fresh / "model.safetensors")
    moments = {}
    names = {id(p): name for name, p in decoder.model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for kind, tensor in state.items():
            moments[f"{kind}|{names[id(parameter)]}"] = tensor.detach().contiguous()
    save_file(moments, fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps({"step": step}), "utf-8")
    old = folder / "checkpoint.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(fresh, final)
    shutil.rmtree(old, ignore_errors=True)


def _resume(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Load the last whole checkpoint; 0 where there is none. A kill between two renames leaves the old one."""
    from safetensors.torch import load_file

    found = next((folder / name for name in ("checkpoint", "checkpoint.old") if (folder / name / "state.json").exists()), None)
    if found is None:
        return 0
    weights, moments = load_file(found / "model.safetensors"), load_file(found / "optimizer.safetensors")
    parameters = dict(model.named_parameters())
    if {n: t.shape for n, t in weights.items()} != {n: p.shape for n, p in parameters.items()}:
        raise TrainError(f"found a checkpoint of another model in {found}, expected the shapes of this one: use another --out")
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    for key, tensor in moments.items():
        kind, _, name = key.partition("|")
        on = "cpu" if kind == "step" else parameters[name].device
        optimizer.state[parameters[name]][kind] = tensor.to(on)
    return int(json.loads((found / "state.json").read_text("utf-8"))["step"])
