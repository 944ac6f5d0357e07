"""Traces of use: which reference was read when; made up, or read from a file.

Legend: `T` uses in the order of time, `N` references.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory3.rows import rows
from memory3.spec import SourceError

DAY_S = 86_400


@dataclass(frozen=True)
class Trace:
    """Uses of references, ascending in time.

    Args:
        days: (T,) float64, days since the first moment of the trace.
        ids: (T,) int64, which reference each use reads, from 0.
        references: `N`, of which some may never be used.
    """

    days: NDArray[np.float64]
    ids: NDArray[np.int64]
    references: int

    def __post_init__(self) -> None:
        if not len(self.ids) or len(self.ids) != len(self.days):
            raise SourceError(
                f"found a trace of {len(self.ids)} ids and {len(self.days)} times, expected as many, at least one"
            )
        if (np.diff(self.days) < 0).any() or self.ids.min() < 0 or self.ids.max() >= self.references:
            raise SourceError(
                f"found times that go back, or an id beyond {self.references} references: sort or renumber the uses"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def until(self, uses: int) -> Trace:
        """The first uses alone."""
        return Trace(self.days[:uses], self.ids[:uses], self.references)


def zipf(
    references: int, uses: int, *, exponent: float = 1.0, drift: float = 0.01, head: int = 0, days: float = 120.0, seed: int = 0
) -> Trace:
    """A made-up trace: the reference of rank k is used in proportion to `1 / k**exponent`, at moments that are uniform.

    Args:
        references: `N`.
        uses: `T`.
        exponent: of Zipf's law.
        drift: before a use, the chance that two references at random change ranks. Half of them have moved after
            `0.35 * N / drift` uses.
        head: so many first ranks never move.
        days: length of the trace.
        seed: of everything.

    Raises:
        SourceError: a number out of range.
    """
    if references < 1 or uses < 1 or not 0 <= drift <= 1 or not 0 <= head <= references or days <= 0 or exponent < 0:
        raise SourceError(
            f"found references={references}, uses={uses}, exponent={exponent}, drift={drift}, head={head}, days={days}; expected "
            "at least 1 reference and use, an exponent of at least 0, drift from 0 to 1, a head inside the bank, and some days"
        )
    random = np.random.default_rng(seed)
    weight = np.arange(1, references + 1, dtype=np.float64) ** -exponent
    ranks = random.choice(references, uses, p=weight / weight.sum())
    holder = random.permutation(references)  # which reference has a rank
    ids = np.empty(uses, np.int64)
    start = 0
    moves = np.flatnonzero(random.random(uses) < drift) if references > head else np.zeros(0, np.int64)
    for use in moves.tolist():
        ids[start:use] = holder[ranks[start:use]]
        one, other = random.integers(head, references, 2)
        holder[[one, other]] = holder[[other, one]]
        start = use
    ids[start:] = holder[ranks[start:]]
    return Trace(np.sort(random.random(uses)) * days, ids, references)


def read_trace(path: str | os.PathLike[str], references: int | None = None) -> Trace:
    """A trace from the columns `time` and `id` of a .jsonl, .csv or .parquet file, in any order.

    Args:
        path: the file. `time` is seconds since 1970, a datetime, or ISO 8601; `id` anything.
        references: of the bank; `None` counts those that are used.

    Raises:
        SourceError: the file cannot be read, a row lacks a column, or more references are used than there are.
    """
    found = [(_seconds(row, where), str(_column(row, "id", where))) for where, row in rows(path)]
    if not found:
        raise SourceError(f"found no use in {path}, expected one row with `time` and `id` for each")
    found.sort(key=lambda use: use[0])
    number = {name: n for n, name in enumerate(dict.fromkeys(name for _, name in found))}
    if references is not None and len(number) > references:
        raise SourceError(f"found {len(number)} references in {path}, expected at most the {references} of the bank")
    seconds = np.array([time for time, _ in found])
    ids = np.array([number[name] for _, name in found], np.int64)
    return Trace((seconds - seconds[0]) / DAY_S, ids, references or len(number))


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise SourceError(f"found no {name!r} at {where}, expected `time` and `id` in every row")
    return row[name]


def _seconds(row: dict[str, Any], where: str) -> float:
    time = _column(row, "time", where)
    try:
        seconds = float(time) if not isinstance(time, datetime) else _utc(time)
    except (TypeError, ValueError):
        try:
            seconds = _utc(datetime.fromisoformat(str(time)))
        except ValueError:
            seconds = math.nan
    if not math.isfinite(seconds):
        raise SourceError(f"found time {time!r} at {where}, expected seconds since 1970 or ISO 8601 like 2026-01-31T12:00:00")
    return seconds


def _utc(time: datetime) -> float:
    """A moment without a zone is taken to be UTC, so that a file means the same on every machine."""
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
