"""The contract of every policy, and what the adaptive one decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memory3.cost import PRESETS, formats
from memory3.hierarchy.policies import POLICIES, Adaptive, Rates
from memory3.hierarchy.replay import KINDS, MEMORY, PARAMETERS, TEXT, Shelf, replay
from memory3.hierarchy.trace import Trace, zipf
from memory3.spec import SpecError
from memory3.tiers import Costs, costs_of

PAPER = Costs(text=0.624, encoding=0.308, memory=1.44e-4, consolidation=2.24)
BURDENS = {
    "paper": PAPER,
    "rent": replace(PAPER, rent=0.02),
    "dear to encode": replace(PAPER, encoding=1.5, rent=0.01),
    "parameters have a price": replace(PAPER, consolidation=1.0, parameters=0.1),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("burden", BURDENS)
@pytest.mark.parametrize("slots", [None, 1, 4])
def test_costs_add_up_and_the_budget_holds(name: str, burden: str, slots: int | None) -> None:
    trace, costs = zipf(30, 600, seed=5, days=30), BURDENS[burden]
    played = replay(POLICIES[name], trace, costs, slots)
    assert played.cost == pytest.approx(sum(played.paid.values()))
    assert set(played.paid) == set(KINDS)
    assert (np.diff(played.spent) >= 0).all()
    assert slots is None or played.held <= slots
    assert played.paid["consolidation"] == pytest.approx(played.consolidated * costs.consolidation)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_does_not_see_the_future(name: str) -> None:
    trace, costs = zipf(30, 600, seed=6, days=30), BURDENS["rent"]
    whole, part = replay(POLICIES[name], trace, costs, 3), replay(POLICIES[name], trace.until(250), costs, 3)
    assert (whole.spent[:250] == part.spent).all()


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_trace_costs_the_same_twice(name: str) -> None:
    trace = zipf(30, 300, seed=7)
    assert (replay(POLICIES[name], trace, PAPER, 3).spent == replay(POLICIES[name], trace, PAPER, 3).spent).all()


@pytest.mark.parametrize("name", POLICIES)
def test_every_use_reads_once(name: str) -> None:
    """With free moves and a price of 1 for each use in any tier, the cost is the number of uses."""
    trace = zipf(20, 200, seed=8)
    assert replay(POLICIES[name], trace, Costs(1.0, 0.0, 1.0, 0.0, 1.0), 2).cost == pytest.approx(200)


def test_single_formats_cost_what_equation_1_says() -> None:
    trace = zipf(20, 200, seed=9)
    assert replay(POLICIES["all text"], trace, PAPER).cost == pytest.approx(200 * PAPER.text)
    assert replay(POLICIES["all memory"], trace, PAPER).cost == pytest.approx(20 * PAPER.encoding + 200 * PAPER.memory)
    assert replay(POLICIES["all parameters"], trace, PAPER).cost == pytest.approx(20 * PAPER.consolidation)


def test_the_least_recently_used_goes() -> None:
    trace = Trace(np.arange(5.0), np.array([0, 1, 0, 2, 1]), 3)  # 1 goes for 2, and has to be encoded again
    assert replay(POLICIES["LRU"], trace, PAPER, 2).paid["encoding"] == pytest.approx(4 * PAPER.encoding)
    assert replay(POLICIES["LRU"], trace, PAPER, 3).paid["encoding"] == pytest.approx(3 * PAPER.encoding)


def test_rent_is_paid_for_the_days_a_memory_is_kept() -> None:
    trace = Trace(np.array([0.0, 2.0, 5.0]), np.array([0, 1, 0]), 2)
    costs = replace(PAPER, rent=0.01)
    assert replay(POLICIES["lazy memory"], trace, costs).paid["storage"] == pytest.approx((5 + 3) * 0.01)


def test_a_memory_that_is_not_worth_its_rent_goes() -> None:
    trace = Trace(np.array([0.0, 0.1, 0.2, 300.0, 300.1]), np.array([0, 0, 0, 1, 1]), 2)
    costs = replace(PAPER, rent=0.05, consolidation=1e9)
    shelf = Shelf(costs, 2)
    use = Adaptive(half_life=5.0).start(shelf)
    for id, day in zip(trace.ids[:3].tolist(), trace.days[:3].tolist(), strict=True):
        use(id, day)
    assert shelf.tiers[0] == MEMORY
    use(1, 300.0)
    assert shelf.tiers[0] == TEXT


def test_what_is_used_past_the_threshold_goes_into_parameters_and_nothing_else_does() -> None:
    """A threshold of 50 uses in the horizon, reached by one reference of two."""
    costs = Costs(text=1.0, encoding=0.5, memory=0.1, consolidation=5.0)
    ids = np.array([0] * 60 + [1])
    trace = Trace(np.arange(61.0), ids, 2)
    shelf = Shelf(costs, 2)
    use = Adaptive(half_life=1e6, horizon=60.0, margin=1.0).start(shelf)
    for id, day in zip(ids.tolist(), trace.days.tolist(), strict=True):
        use(id, day)
    assert shelf.tiers.tolist() == [PARAMETERS, MEMORY]
    assert replay(Adaptive(half_life=1e6, horizon=30.0), trace, costs).consolidated == 0


def test_the_adaptive_policy_beats_each_other_under_a_budget() -> None:
    trace = zipf(200, 4000, seed=11)
    costs = replace(PAPER, consolidation=50 * PAPER.consolidation)
    cost = {name: replay(policy, trace, costs, 20).cost for name, policy in POLICIES.items()}
    assert min(cost, key=lambda name: cost[name]) == "adaptive"


def test_rates_come_near_the_true_ones_and_their_sum_is_that_of_the_bank() -> None:
    random = np.random.default_rng(0)
    true, days = np.array([8.0, 2.0, 0.5, 0.0]), 200
    rates = Rates(4, half_life=60.0)
    for day in range(days):
        for id in np.repeat(np.arange(4), random.poisson(true)).tolist():
            rates.count(id, float(day))
    found = rates.of(np.arange(4), days - 1.0)
    assert np.abs(found - true).max() < 1.0  # about two standard deviations of the largest
    assert found[3] > 0  # what was never used is not impossible
    assert found.sum() == pytest.approx(rates.all / (rates.life * -np.expm1(-(days - 1) / rates.life)), rel=0.05)


def test_the_costs_of_the_tiers_are_those_of_the_formats() -> None:
    found = formats(PRESETS["paper-2.4b"], record_bytes=39_424, rank=8)
    costs, rank = costs_of(found), next(f for f in found if f.name == "low-rank")
    assert (costs.text, costs.encoding, costs.memory) == (found[0].read, found[1].write, found[1].read)
    assert costs.consolidation == min(rank.write, found[-1].write)
    with pytest.raises(SpecError, match="inside the parameters"):
        costs_of(found[:2])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SpecError, match="room for at least one"):
        replay(POLICIES["LRU"], zipf(3, 3), PAPER, 0)
    with pytest.raises(SpecError, match="days above 0"):
        Adaptive(half_life=0.0)
    with pytest.raises(SpecError, match="at least 0"):
        replace(PAPER, memory=-1.0)
