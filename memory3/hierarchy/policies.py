"""Policies: what each keeps as text, as memory and in parameters while a trace is played."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memory3.hierarchy.replay import MEMORY, PARAMETERS, TEXT, Policy, Shelf, Use
from memory3.spec import SpecError
from memory3.uses import exposure, posterior_rate


@dataclass(frozen=True)
class AllText(Policy):
    """Nothing is ever encoded: plain retrieval-augmented generation."""

    def start(self, shelf: Shelf) -> Use:
        return lambda id, day: shelf.read(id)


@dataclass(frozen=True)
class AllMemory(Policy):
    """A warm bank: as many as fit are encoded before the first use, in the order of the bank; the others at every use."""

    def start(self, shelf: Shelf) -> Use:
        for id in range(len(shelf.tiers)):
            if shelf.full:
                break
            shelf.encode(id)
        return lambda id, day: shelf.read(id) if shelf.tiers[id] == MEMORY else shelf.read_once(id)


@dataclass(frozen=True)
class AllParameters(Policy):
    """The whole bank is consolidated before the first use."""

    def start(self, shelf: Shelf) -> Use:
        for id in range(len(shelf.tiers)):
            shelf.consolidate(id)
        return lambda id, day: shelf.read(id)


@dataclass(frozen=True)
class LazyMemory(Policy):
    """A reference is encoded at its first recall and kept while there is room; nothing that is kept ever goes."""

    def start(self, shelf: Shelf) -> Use:
        def use(id: int, day: float) -> None:
            if shelf.tiers[id] == TEXT and shelf.full:
                shelf.read_once(id)
                return
            if shelf.tiers[id] == TEXT:
                shelf.encode(id)
            shelf.read(id)

        return use


@dataclass(frozen=True)
class LeastRecentlyUsed(Policy):
    """Every reference that is used is kept; where there is no room, the one that was not used for the longest time goes.

    Records of a bank have one size and one cost, so this is a case of Landlord (Young, arXiv cs/0205033), which is competitive.
    """

    def start(self, shelf: Shelf) -> Use:
        order: OrderedDict[int, None] = OrderedDict()

        def use(id: int, day: float) -> None:
            if shelf.tiers[id] == TEXT:
                shelf.encode(id)
            shelf.read(id)
            order[id] = None
            order.move_to_end(id)
            if shelf.crowded:
                shelf.drop(order.popitem(last=False)[0])

        return use


@dataclass(frozen=True)
class Adaptive(Policy):
    """Equation 1 at every use, with expected uses, and with a price for the place that a memory takes.

    The price of a place for a day is its rent or, where memories do not all fit, what the least useful of them saves in a day, if
    that is more. A memory whose savings are below the rent goes, and where one is too many, the one that saves least. A reference
    is encoded to be kept where its savings exceed the price, and consolidated where its cost over the horizon, in the cheaper of
    the two other tiers, exceeds `margin` times that of parameters: consolidation cannot be taken back, and uses are estimates.

    Source: Eq. 1 of arXiv 2407.01178. For one reference this is the rent-or-buy problem, with a forecast in place of the break-even
    point (Purohit et al., 2018, Improving online algorithms via ML predictions); the price of a place is the dual variable of the
    budget, as in the primal-dual method for weighted caching (Bansal, Buchbinder and Naor, 2012). The forecast gives up a guarantee:
    against an adversary no bound of 1.5 exists. Controls: every other policy of this file, and the optimum.

    Args:
        half_life: days in which a use loses half of its weight.
        horizon: days over which a consolidation has to pay; the life of the parameters that it goes into.
        margin: how much more than its cost a consolidation has to promise.
    """

    half_life: float = 30.0
    horizon: float = 60.0
    margin: float = 1.25

    def __post_init__(self) -> None:
        if not (self.half_life > 0 and self.horizon > 0 and self.margin >= 1):
            raise SpecError(f"found {self}, expected days above 0 and a margin of at least 1")

    def start(self, shelf: Shelf) -> Use:
        costs, rates = shelf.costs, Rates(len(shelf.tiers), self.half_life)

        def use(id: int, day: float) -> None:
            rates.count(id, day)
            if shelf.tiers[id] == PARAMETERS:
                shelf.read(id)
                return
            drop_below_rent(day)
            price = max(costs.rent, least(day)[1] if shelf.full else 0.0)
            rate = rates.of(id, day)
            outside = min(rate * costs.once, rate * costs.memory + price)
            inside = costs.consolidation + self.horizon * rate * costs.parameters
            if self.horizon * outside >= self.margin * inside:
                shelf.consolidate(id)
            if shelf.tiers[id] != TEXT:
                shelf.read(id)
            elif self.horizon * (rate * costs.saving - price) > costs.entry:
                shelf.encode(id)
                shelf.read(id)
                if shelf.crowded:
                    shelf.drop(least(day)[0])
            else:
                shelf.read_once(id)

        def savings(day: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
            kept = np.flatnonzero(shelf.tiers == MEMORY)
            return kept, rates.of(kept, day) * costs.saving

        def least(day: float) -> tuple[int, float]:
            kept, saved = savings(day)
            place = int(saved.argmin())
            return int(kept[place]), float(saved[place])

        def drop_below_rent(day: float) -> None:
            if costs.rent:
                kept, saved = savings(day)
                for id in kept[saved < costs.rent].tolist():
                    shelf.drop(id)

        return use


class Rates:
    """Expected uses per day, from uses that fade: the mean of a Gamma distribution whose prior has the mean of the bank.

    The formula is that of `memory3.uses.posterior_rate`, which a bank in use goes by.

    Args:
        references: `N`.
        half_life: days in which a use loses half of its weight.
    """

    def __init__(self, references: int, half_life: float) -> None:
        self.half_life, self.life = half_life, half_life / math.log(2)
        self.uses, self.seen = np.zeros(references), np.zeros(references)
        self.all, self.last = 0.0, 0.0

    def count(self, id: int, day: float) -> None:
        """One use of a reference; days never go back."""
        self.uses[id] = self.uses[id] * math.exp((self.seen[id] - day) / self.life) + 1
        self.all = self.all * math.exp((self.last - day) / self.life) + 1
        self.seen[id] = self.last = day

    def of(self, ids: int | NDArray[np.int64], day: float) -> NDArray[np.float64]:
        """Uses per day, of the shape of `ids`."""
        days = exposure(day, self.half_life)
        mean = self.all / days / len(self.uses)
        faded: NDArray[np.float64] = self.uses[ids] * np.exp((self.seen[ids] - day) / self.life)
        return posterior_rate(faded, days, mean)


POLICIES: dict[str, Policy] = {
    "adaptive": Adaptive(),
    "all text": AllText(),
    "all memory": AllMemory(),
    "all parameters": AllParameters(),
    "lazy memory": LazyMemory(),
    "LRU": LeastRecentlyUsed(),
}
"""The lines of `memory3 simulate`, by name."""
