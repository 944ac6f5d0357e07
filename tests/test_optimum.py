"""The offline optimum: no policy beats it, and on tiny traces it is what trying everything finds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policies import BURDENS, PAPER

from memory3.hierarchy.optimum import optimum
from memory3.hierarchy.policies import POLICIES
from memory3.hierarchy.replay import MEMORY, PARAMETERS, TEXT, replay
from memory3.hierarchy.trace import Trace, zipf
from memory3.tiers import Costs

EPS = 1e-6
"""The solver's tolerance, relative."""


def by_trying(trace: Trace, costs: Costs, slots: int | None) -> float:
    """The least cost by dynamic programming over every state of all references between uses."""
    tiers = list(product((TEXT, MEMORY, PARAMETERS), repeat=trace.references))
    allowed = [state for state in tiers if slots is None or state.count(MEMORY) <= slots]
    best = {(TEXT,) * trace.references: 0.0}
    before = 0.0
    for id, day in zip(trace.ids.tolist(), trace.days.tolist(), strict=True):
        step: dict[tuple[int, ...], float] = {}
        for state, paid in best.items():
            rent = paid + state.count(MEMORY) * (day - before) * costs.rent
            for after in allowed:
                move = _moves(state, after, id, costs)
                step[after] = min(step.get(after, np.inf), rent + move)
        best, before = step, day
    return min(best.values())


def _moves(state: tuple[int, ...], after: tuple[int, ...], id: int, costs: Costs) -> float:
    paid = 0.0
    for n, (old, new) in enumerate(zip(state, after, strict=True)):
        if old == PARAMETERS and new != PARAMETERS:
            return np.inf
        if new == PARAMETERS:
            paid += costs.consolidation * (old != PARAMETERS) + costs.parameters * (n == id)
        elif old == MEMORY:
            paid += costs.memory * (n == id)
        elif new == MEMORY:
            paid += costs.encoding + costs.memory * (n == id)
        else:
            paid += costs.once * (n == id)
    return paid


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    slots=st.sampled_from([None, 1, 2]),
    burden=st.sampled_from(sorted(BURDENS)),
    consolidation=st.sampled_from([0.5, 1.0, 3.0, 1e3]),
)
def test_the_optimum_lies_between_its_bounds_and_without_consolidation_they_meet(
    ids: list[int], slots: int | None, burden: str, consolidation: float
) -> None:
    trace = Trace(np.arange(len(ids), dtype=np.float64) * 3, np.array(ids, np.int64), 3)
    costs = replace(BURDENS[burden], consolidation=consolidation)
    found, tried = optimum(trace, costs, slots), by_trying(trace, costs, slots)
    assert found.bound <= tried * (1 + EPS) and tried <= found.cost * (1 + EPS)
    if consolidation > 100:
        assert found.cost == pytest.approx(found.bound, rel=EPS)


@pytest.mark.parametrize("burden", BURDENS)
@pytest.mark.parametrize("slots", [None, 1, 5])
def test_no_policy_beats_the_optimum(burden: str, slots: int | None) -> None:
    trace, costs = zipf(40, 700, seed=1, days=60), BURDENS[burden]
    best = optimum(trace, costs, slots)
    assert best.bound <= best.cost
    for name, policy in POLICIES.items():
        assert replay(policy, trace, costs, slots).cost >= best.bound * (1 - EPS), name


def test_more_budget_never_costs_the_optimum_more() -> None:
    trace = zipf(40, 700, seed=2, days=60)
    bounds = [optimum(trace, BURDENS["rent"], slots).bound for slots in (1, 2, 4, 8, 16, None)]
    assert all(less >= more * (1 - EPS) for less, more in pairwise(bounds))
    assert bounds[0] > bounds[-1]


def test_without_budget_and_rent_lazy_encoding_is_the_optimum() -> None:
    trace = zipf(40, 700, seed=3)
    best = optimum(trace, PAPER)
    assert replay(POLICIES["lazy memory"], trace, PAPER).cost == pytest.approx(best.bound, rel=EPS)
    assert best.consolidated == 0


def test_furthest_in_the_future_is_what_the_optimum_lets_go() -> None:
    """One slot, a b a b b: keeping b from its last two uses saves one encoding, keeping a another."""
    trace = Trace(np.arange(5.0), np.array([0, 1, 0, 1, 1]), 2)
    costs = replace(PAPER, consolidation=1e3)
    assert optimum(trace, costs, 1).cost == pytest.approx(3 * costs.once + 2 * costs.memory)
