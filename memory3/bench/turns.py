"""Ways of doing a thing, timed in turns: what else happens on the machine meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timed:
    """Seconds of each turn of one way, and how much it did in a turn.

    Args:
        name: of the way, for people.
        seconds: wall time of each turn.
        amount: what a turn did, in the unit of the benchmark: tokens, references, bytes.
    """

    name: str
    seconds: tuple[float, ...]
    amount: int

    @property
    def rate(self) -> float:
        """Amount per second, of the median turn."""
        return self.amount / median(self.seconds)

    def row(self, ratio: float) -> str:
        """A row of a Markdown table."""
        low, middle, high = min(self.seconds), median(self.seconds), max(self.seconds)
        return f"| {self.name} | {middle:.3g} [{low:.3g}, {high:.3g}] | {self.rate:,.0f} | {ratio:.3f} |"


def in_turns(
    ways: Mapping[str, Callable[[int], object]],
    repeats: int,
    device: torch.device,
    told: Callable[[int], None] = lambda done: None,
    *,
    warm_up: int = 1,
) -> dict[str, tuple[float, ...]]:
    """Seconds of `repeats` turns of each way, behind `warm_up` turns that do not count; each is given the number of the turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for n in range((repeats + warm_up) * len(ways)):
        turn, name = n // len(ways), list(ways)[n % len(ways)]
        finished(device)
        began = time.perf_counter()
        ways[name](turn)
        finished(device)
        if turn >= warm_up:
            seconds[name].append(time.perf_counter() - began)
        told(n + 1)
    return {name: tuple(values) for name, values in seconds.items()}


def finished(device: torch.device) -> None:
    """Wait: a GPU works on after the call that asked it has come back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
