"""A trace played over a bank: what is in which tier, and what every move and use costs.

A use pays for reading its reference in the tier where it is then. Encoding moves text to memory, dropping moves it back, and
consolidating moves either into parameters, for good. Between two uses at most `slots` memories are kept; the one that is being
read may be one too many, for it lies in RAM. So text is read in the cheaper of two ways: as text, or encoded for this one use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memory3.hierarchy.trace import Trace
from memory3.spec import SpecError
from memory3.tiers import Costs

TEXT, MEMORY, PARAMETERS = 0, 1, 2
KINDS = ("reading", "encoding", "storage", "consolidation")
"""What is paid for."""


class Shelf:
    """Which tier every reference is in, and what was paid so far.

    Args:
        costs: of each move and use.
        references: `N`; all begin as text.
        slots: memories that may be kept; `None` sets no limit.
    """

    def __init__(self, costs: Costs, references: int, slots: int | None = None) -> None:
        if slots is not None and slots < 1:
            raise SpecError(f"found a budget of {slots} memories, expected room for at least one: raise the budget")
        self.costs, self.slots = costs, slots
        self.tiers: NDArray[np.int8] = np.full(references, TEXT, np.int8)
        self.held = 0
        self.paid = dict.fromkeys(KINDS, 0.0)

    @property
    def full(self) -> bool:
        return self.slots is not None and self.held >= self.slots

    @property
    def crowded(self) -> bool:
        """More is kept than fits: something has to go before the next use."""
        return self.slots is not None and self.held > self.slots

    def wait(self, days: float) -> None:
        """Let time pass, at the rent of what is kept."""
        self.paid["storage"] += self.held * days * self.costs.rent

    def encode(self, id: int) -> None:
        assert self.tiers[id] == TEXT
        self.tiers[id] = MEMORY
        self.held += 1
        self.paid["encoding"] += self.costs.encoding

    def drop(self, id: int) -> None:
        assert self.tiers[id] == MEMORY
        self.tiers[id] = TEXT
        self.held -= 1

    def consolidate(self, id: int) -> None:
        assert self.tiers[id] != PARAMETERS
        self.held -= int(self.tiers[id] == MEMORY)
        self.tiers[id] = PARAMETERS
        self.paid["consolidation"] += self.costs.consolidation

    def read(self, id: int) -> None:
        costs = self.costs
        self.paid["reading"] += (costs.text, costs.memory, costs.parameters)[self.tiers[id]]

    def read_once(self, id: int) -> None:
        """Read what is kept as text in the cheaper way, and keep nothing."""
        if self.costs.encoding + self.costs.memory < self.costs.text:
            self.encode(id)
            self.read(id)
            self.drop(id)
        else:
            self.read(id)


Use = Callable[[int, float], None]
"""What a policy does at a use: reference and day."""


class Policy(ABC):
    """What moves references between tiers. It knows the trace up to the use at hand, and nothing of what follows."""

    @abstractmethod
    def start(self, shelf: Shelf) -> Use:
        """Prepare the shelf before the first use. What is returned is called at every use; it reads the reference once and leaves
        no more memories than fit."""


@dataclass(frozen=True)
class Replay:
    """What a policy paid.

    Args:
        spent: (T,) the total after each use, in the unit of the costs.
        paid: the total by what was paid for.
        held: most memories that were kept between two uses.
        consolidated: references that ended in parameters.
    """

    spent: NDArray[np.float64]
    paid: dict[str, float]
    held: int
    consolidated: int

    @property
    def cost(self) -> float:
        return float(self.spent[-1])


def replay(policy: Policy, trace: Trace, costs: Costs, slots: int | None = None) -> Replay:
    """Play a trace over a bank that begins as text.

    Args:
        policy: what moves references.
        trace: of use.
        costs: of each move and use.
        slots: memories that may be kept; `None` sets no limit.

    Raises:
        SpecError: no memory fits.
    """
    shelf = Shelf(costs, trace.references, slots)
    use = policy.start(shelf)
    spent, held, before = np.empty(len(trace)), shelf.held, 0.0
    for n, (id, day) in enumerate(zip(trace.ids.tolist(), trace.days.tolist(), strict=True)):
        shelf.wait(day - before)
        use(id, day)
        assert not shelf.crowded, f"{policy} keeps {shelf.held} memories, more than fit"
        spent[n], held, before = sum(shelf.paid.values()), max(held, shelf.held), day
    return Replay(spent, shelf.paid, held, int((shelf.tiers == PARAMETERS).sum()))
