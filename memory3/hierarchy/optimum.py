"""The offline optimum: the least that a policy could pay that knew the whole trace.

Legend: `T` uses, `G` gaps, `Z` references that might be worth consolidating.

Between two uses of a reference lies a gap, and its memory is kept over it or not. Without consolidation this is weighted caching as
a flow of least cost (Chrobak, Karloff, Payne and Vishwanathan, 1991, New results on server problems): the slots flow along the
line of time, and a kept gap is an arc that jumps over it. Its linear program has whole solutions, so it is exact. A consolidated
reference keeps no gap and pays at its first use alone (later would be no cheaper). With these choices relaxed to fractions the
program is a lower bound; rounding them and solving the flow again gives a schedule, an upper bound. HiGHS solves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory3.hierarchy.trace import Trace
from memory3.spec import Memory3Error
from memory3.tiers import Costs

ALGORITHM = "minimum-cost flow with consolidation relaxed to fractions, by linear programming (HiGHS)"


@dataclass(frozen=True)
class Optimum:
    """Bounds of the least cost.

    Args:
        bound: no policy pays less.
        spent: (T,) the total after each use, of the schedule that rounding gave.
        consolidated: references that it consolidates.
    """

    bound: float
    spent: NDArray[np.float64]
    consolidated: int

    @property
    def cost(self) -> float:
        """What the schedule pays; the optimum lies between `bound` and this."""
        return float(self.spent[-1])


@dataclass(frozen=True)
class Gaps:
    """Gaps between uses of one reference: (G,) each, the use before, the use after, the reference."""

    before: NDArray[np.int64]
    after: NDArray[np.int64]
    ids: NDArray[np.int64]

    @classmethod
    def of(cls, ids: NDArray[np.int64]) -> Gaps:
        order = np.argsort(ids, kind="stable")  # uses of one reference side by side, in time
        same = ids[order[1:]] == ids[order[:-1]]
        before, after = order[:-1][same], order[1:][same]
        return cls(before, after, ids[before])

    def __len__(self) -> int:
        return len(self.ids)


def optimum(trace: Trace, costs: Costs, slots: int | None = None) -> Optimum:
    """Bounds of the least cost of a trace.

    Args:
        trace: of use.
        costs: of each move and use.
        slots: memories that may be kept between two uses; `None` sets no limit.

    Raises:
        Memory3Error: scipy is missing.
    """
    gaps, uses = Gaps.of(trace.ids), np.bincount(trace.ids, minlength=trace.references)
    # Outside the parameters no reference ever pays more than reading it afresh each time.
    worth = np.flatnonzero(uses * (costs.once - costs.parameters) > costs.consolidation)
    relaxed, kept, inside = _solve(trace, costs, slots, gaps, uses, worth)
    chosen = worth[inside > 0.5]
    if ((inside > 1e-6) & (inside < 1 - 1e-6)).any():
        _, kept, _ = _solve(trace, costs, slots, gaps, uses, chosen, forced=True)
    spent = spending(trace, costs, gaps, kept > 0.5, chosen)
    return Optimum(min(relaxed, float(spent[-1])), spent, len(chosen))


def _solve(
    trace: Trace,
    costs: Costs,
    slots: int | None,
    gaps: Gaps,
    uses: NDArray[np.int64],
    worth: NDArray[np.int64],
    forced: bool = False,
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Least cost, (G,) how far each gap is kept, (Z,) how far each reference of `worth` is consolidated; `forced` makes it all."""
    G, Z, S = len(gaps), len(worth), len(trace) - 1
    base = len(trace) * costs.once
    if not G:
        inside = np.full(Z, 1.0)
        return base + float(_consolidating(costs, uses[worth]).sum()), np.zeros(0), inside
    E = G if costs.entry > 0 else 0
    free = min(slots or trace.references, len(np.unique(trace.ids)))  # more slots than references are never in use
    rent = costs.rent * (trace.days[gaps.after] - trace.days[gaps.before])
    price: NDArray[np.float64] = np.concatenate(
        [rent - costs.saving, _consolidating(costs, uses[worth]), np.zeros(S), np.full(E, costs.entry)]
    )
    most = np.concatenate([np.ones(G + Z), np.full(S, free), np.ones(E)])
    least = np.zeros(len(most))
    least[G : G + Z] = float(forced)
    line = _line(gaps, S, (S, len(price)), G + Z)
    source = np.zeros(S)
    source[0] = free
    rows = [_either(gaps, worth, trace.references, len(price), G)] + ([_entries(gaps, len(price), G + Z + S)] if E else [])
    found = _linprog(price, rows, line, source, np.stack([least, most], 1))
    return base + float(found.fun), found.x[:G], found.x[G : G + Z]


def _consolidating(costs: Costs, uses: NDArray[np.int64]) -> NDArray[np.float64]:
    """What consolidating costs more than reading afresh at every use."""
    price: NDArray[np.float64] = (costs.consolidation + uses * (costs.parameters - costs.once)).astype(np.float64)
    return price


def _line(gaps: Gaps, S: int, shape: tuple[int, int], idle: int) -> Any:
    """Row s: what is kept or idle between use s and s + 1 is what was before it. Columns from `idle` on are idle slots."""
    from scipy.sparse import coo_array

    ends, columns, steps = gaps.after < S, np.arange(len(gaps)), np.arange(S)
    rows = np.concatenate([gaps.before, gaps.after[ends], steps, steps[1:]])
    places = np.concatenate([columns, columns[ends], idle + steps, idle + steps[:-1]])
    signs = np.concatenate([np.ones(len(gaps)), -np.ones(int(ends.sum())), np.ones(S), -np.ones(S - 1)])
    return coo_array((signs, (rows, places)), shape=shape)


def _either(gaps: Gaps, worth: NDArray[np.int64], references: int, width: int, first: int) -> tuple[Any, NDArray[np.float64]]:
    """A gap is kept or its reference is consolidated, not both: rows `kept + inside <= 1`."""
    from scipy.sparse import coo_array

    column = np.full(references, -1)
    column[worth] = first + np.arange(len(worth))
    some = np.flatnonzero(column[gaps.ids] >= 0)
    rows = np.tile(np.arange(len(some)), 2)
    places = np.concatenate([some, column[gaps.ids[some]]])
    return coo_array((np.ones(len(rows)), (rows, places)), shape=(len(some), width)), np.ones(len(some))


def _entries(gaps: Gaps, width: int, first: int) -> tuple[Any, NDArray[np.float64]]:
    """A gap that is kept behind one that is not is entered: rows `kept - kept before - entered <= 0`."""
    from scipy.sparse import coo_array

    G = len(gaps)
    now = np.arange(G)
    follows = np.flatnonzero(gaps.before[1:] == gaps.after[:-1]) + 1
    rows = np.concatenate([now, now, follows])
    places = np.concatenate([now, first + now, follows - 1])
    signs = np.concatenate([np.ones(G), -np.ones(G), -np.ones(len(follows))])
    return coo_array((signs, (rows, places)), shape=(G, width)), np.zeros(G)


def _linprog(price: NDArray[np.float64], rows: list[Any], line: Any, source: NDArray[np.float64], bounds: Any) -> Any:
    try:
        from scipy.optimize import linprog
        from scipy.sparse import vstack
    except ImportError:
        raise Memory3Error("found no scipy, expected it for the optimum: pip install 'memory3[simulate]'") from None
    # Costs are scaled to about one, for tolerances of the solver are absolute.
    scale = float(np.abs(price).max()) or 1.0
    upper, limits = vstack([matrix for matrix, _ in rows]).tocsr(), np.concatenate([limit for _, limit in rows])
    # Interior point with crossover, for the simplex method takes many times as long on long traces.
    found = linprog(price / scale, upper, limits, line.tocsr(), source, bounds, method="highs-ipm")
    assert found.success, found.message
    found.fun *= scale
    return found


def spending(
    trace: Trace, costs: Costs, gaps: Gaps, kept: NDArray[np.bool_], consolidated: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(T,) What a schedule has paid after each use; the rent of a gap at its end."""
    paid = np.full(len(trace), costs.once)
    paid[gaps.after[kept]] = costs.memory + costs.rent * (trace.days[gaps.after] - trace.days[gaps.before])[kept]
    begun = np.zeros(len(trace), bool)
    begun[gaps.before[kept]] = True
    begun[gaps.after[kept]] = False
    paid[begun] += costs.entry
    inside = np.isin(trace.ids, consolidated)
    paid[inside] = costs.parameters
    paid[np.unique(trace.ids, return_index=True)[1][np.isin(np.unique(trace.ids), consolidated)]] += costs.consolidation
    return np.cumsum(paid)
