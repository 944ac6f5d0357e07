"""Ways take turns, and the median turn counts."""

from __future__ import annotations

import torch

from memory3.bench.turns import Timed, in_turns


def test_ways_take_turns_and_the_first_turns_do_not_count() -> None:
    done: list[tuple[str, int]] = []
    told: list[int] = []
    ways = {name: lambda turn, name=name: done.append((name, turn)) for name in ("a", "b")}
    seconds = in_turns(ways, 2, torch.device("cpu"), told.append, warm_up=2)
    assert done == [(name, turn) for turn in range(4) for name in ("a", "b")]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert told == list(range(1, 9))


def test_the_median_turn_counts() -> None:
    timed = Timed("way", (1.0, 4.0, 2.0), amount=100)
    assert timed.rate == 50
    assert timed.row(0.5) == "| way | 2 [1, 4] | 50 | 0.500 |"
