"""What a training run is told: what to teach, how fast, when to save, log, go back and stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import cos, inf, pi, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from memory3.spec import Memory3Error

if TYPE_CHECKING:
    from torch import Tensor

    from memory3.decoder import Decoder


class TrainError(Memory3Error):
    """Training cannot start, resume or go on."""


class Objective(Protocol):
    """What a stage teaches.

    Optional, for the log: `tokens(batch) -> int`, the tokens trained on; `length: int`, the tokens of a sequence; and
    `measured(decoder) -> dict[str, float]`, figures of what is kept apart, taken before the first step and at the end.
    """

    def batch(self, step: int) -> Any:
        """The micro-batch of this number, the same whenever and in whatever process it is asked for.

        A step takes `accumulate` times the number of processes of them; with one of each the number is the step.
        """

    def loss(self, decoder: Decoder, batch: Any, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss `()` to minimise, and figures for the log; `step` counts optimizer steps."""


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
class Cosine:
    """Linear up, then half a cosine down to `floor` times the peak at the last step."""

    peak: float
    steps: int
    warmup: int = 0
    floor: float = 0.1

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.peak * (self.floor + (1 - self.floor) * (1 + cos(pi * min(1.0, done))) / 2)


@dataclass(frozen=True)
class Settings:
    """How to run a stage. `minutes` stops it cleanly with a checkpoint; run the same command again to go on.

    Args:
        folder: of checkpoints, `log.jsonl` and `tensorboard/`.
        schedule: learning rate of each step, and how many there are.
        weight_decay: of matrices; vectors (norms, biases) do not decay.
        clip: most norm of the gradient; a longer one is shortened to it.
        log_every: steps between two reports; save_every: steps between two checkpoints.
        minutes: most wall time of this call.
        precision: `bf16` (autocast), `no`, or `auto`: the first where this machine computes in it.
        stop_at: stop after this step, with a checkpoint.
        embedding_rate: the embeddings learn at so many times the rate of the rest.
        accumulate: micro-batches of a step in each process; the step takes the mean of all.
        seed: of dropout and of whatever else draws from torch's generator inside a step.
        spike_loss: a step is high when its loss, in nats, is so much above the median of the last `spike_window` steps.
            3 nats: a language model that diverges climbs from 2-4 to the 7-11 of a uniform guess.
        spike_norm: or when its gradient norm is so many times above the larger of that median and `clip`: what `clip` would
            have let through is never a spike.
        spike_steps: so many high steps in a row are a spike; a loss or norm that is not finite is one at once. A single high
            step is no sign: clipped, it does little, and mixtures have rare hard batches (in this project's recipe,
            closed-book ones, 4.8 nats above the others).
        spike_window: steps that the medians are taken over; until a quarter of them is known, only what is not finite counts.
        spike_tries: spikes in a row that end the run with a `TrainError`. `inf` for `spike_loss` and `spike_norm` leaves
            only the check for finite numbers.
        peak_flops: of one process's device, per second, for the share that is used.
        optimizer: `adamw`, or `muon` for the matrices between embeddings and output and AdamW for the rest.
        facts: what else the run is of (its stage, data, …), as JSON values by names that a user knows: a checkpoint of other
            facts is refused.
    """

    folder: Path
    schedule: Schedule | Cosine
    weight_decay: float = 0.1
    clip: float = 1.0
    log_every: int = 20
    save_every: int = 200
    minutes: float | None = None
    precision: str = "auto"
    stop_at: int | None = None
    embedding_rate: float = 1.0
    accumulate: int = 1
    seed: int = 0
    spike_loss: float = 3.0
    spike_norm: float = 20.0
    spike_steps: int = 3
    spike_window: int = 64
    spike_tries: int = 3
    peak_flops: float | None = None
    optimizer: str = "adamw"
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        from memory3.precision import (
            PRECISIONS,
            resolved,
        )  # with torch, which a command line that only asks need not wait for

        for name in ("accumulate", "log_every", "save_every", "spike_steps", "spike_window", "spike_tries"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise TrainError(f"found {name}={value!r}, expected a whole number of at least 1")
        for name in ("clip", "spike_loss", "spike_norm"):
            if not 0 < getattr(self, name) <= inf:
                raise TrainError(f"found {name}={getattr(self, name)!r}, expected a number above 0 (inf: no limit)")
        if not 0 < self.schedule.peak < inf:
            raise TrainError(f"found a learning rate of {self.schedule.peak!r}, expected a number above 0")
        if self.optimizer not in ("adamw", "muon"):
            raise TrainError(f"found optimizer={self.optimizer!r}, expected 'adamw' or 'muon'")
        if self.precision not in PRECISIONS:
            raise TrainError(
                f"found precision={self.precision!r}, expected {', '.join(PRECISIONS)} (fp16 would need a loss scale)"
            )
        object.__setattr__(self, "precision", resolved(self.precision))


Report = Callable[[dict[str, float]], None]
