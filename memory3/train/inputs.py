"""What a user gives to a recipe, and the complete run that it returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from memory3.decoder import Decoder
from memory3.spec import MemorySpec
from memory3.train.loop import run
from memory3.train.settings import Objective, Report, Schedule, Settings, TrainError

Tell = Callable[[str, int, int | None], None]
"""Told what is being prepared, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Inputs:
    """What a user gives to a recipe. `None` leaves the choice to it.

    Args:
        data: files, folders or hub datasets (`hub:NAME`); for `reader` one folder.
        out: folder of caches, checkpoints and the finished model.
        model: where to start from; by default the model that ships, or fresh weights for `warmup`.
        bank: whose references are recalled.
        spec: overrules the model's own memory spec; tokens_per_head: overrules that of either.
        size: the dial of fresh models: their depth (`memory3.train.shapes.shape`).
        steps: optimizer steps; rate: peak learning rate; batch: sequences or examples of a micro-batch; length: tokens of a
            sequence; accumulate: micro-batches of a step.
        optimizer: `adamw` or `muon`; by default the recipe's own.
        minutes: most wall time of this call.
        seed: of weights, order and batches.
        text_field: column of the text.
        exclude_own: `continual`: a chunk never reads references of its own document.
        peak_flops: of one process's device, for the share that is used.
        tell: told of the preparation.

    Raises:
        TrainError: a rate that is not above 0, or a count below 1.
    """

    data: tuple[str, ...]
    out: Path
    model: str | None = None
    bank: str | None = None
    spec: MemorySpec | None = None
    tokens_per_head: int | None = None
    size: int = 6
    steps: int | None = None
    rate: float | None = None
    batch: int | None = None
    length: int | None = None
    accumulate: int = 1
    optimizer: str | None = None
    minutes: float | None = None
    seed: int = 0
    text_field: str = "text"
    exclude_own: bool = False
    peak_flops: float | None = None
    tell: Tell = field(default=lambda what, done, total: None)

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate < inf:
            raise TrainError(f"found --rate {self.rate!r}, expected a number above 0")
        for name in ("tokens_per_head", "size", "steps", "batch", "length", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainError(f"found --{name.replace('_', '-')} {value!r}, expected a whole number of at least 1")

    def wanted(self, own: MemorySpec) -> MemorySpec:
        """A model's own spec with the tokens per head that are asked for."""
        return own if self.tokens_per_head is None else replace(own, tokens_per_head=self.tokens_per_head)

    def settings(self, schedule: Any, **options: Any) -> Settings:
        """Of the loop, in the folder of this run."""
        known: dict[str, Any] = {"minutes": self.minutes, "accumulate": self.accumulate, "seed": self.seed}
        known |= {"peak_flops": self.peak_flops} | ({"optimizer": self.optimizer} if self.optimizer else {})
        return Settings(self.out, schedule, **(known | options))

    def wsd(self, steps: int, rate: float) -> Schedule:
        """Warmup-stable-decay: a twentieth up, the last fifth down."""
        steps, rate = self.steps or steps, self.rate or rate
        return Schedule(rate, steps, warmup=max(1, steps // 20), decay=steps // 5)

    def telling(self, what: str) -> Callable[[int, int | None], None]:
        """Progress of one part of the preparation."""
        return lambda done, total: self.tell(what, done, total)


@dataclass(frozen=True)
class Run:
    """A complete run.

    Args:
        decoder: whose model learns.
        settings: of the loop.
        spec: goes beside the finished weights; `None` where the model has not learned to read memory yet.
        train: runs or resumes it under settings (these, with the facts of the stage), and returns the steps done.
        stretched: whether what a step teaches depends on how many steps there are (phases, thinning): such a run cannot be
            made longer on the way.
    """

    decoder: Decoder
    settings: Settings
    spec: MemorySpec | None
    train: Callable[[Settings, Report], int]
    stretched: bool = False


def plain_run(
    decoder: Decoder,
    objective: AbstractContextManager[Objective],
    settings: Settings,
    spec: MemorySpec | None,
    stretched: bool = False,
) -> Run:
    """A run of the loop on an objective, which is made when it begins and left when it ends (it may keep a reference model)."""

    def train(settings: Settings, report: Report) -> int:
        with objective as made:
            return run(decoder, made, settings, report)

    return Run(decoder, settings, spec, train, stretched)


Recipe = Callable[[Inputs], Run]
