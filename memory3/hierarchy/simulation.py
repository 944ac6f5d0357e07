"""Every policy beside the offline optimum, in settings in which the tiers contend.

Without limits, encoding at the first recall is all there is to do. So the budget is a tenth of the bank's memories, storage has a
price, consolidation takes the passes that it takes, and one reference is used often enough for parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory3.cost import Costed
from memory3.hierarchy.optimum import ALGORITHM, Optimum, optimum
from memory3.hierarchy.policies import POLICIES, Adaptive
from memory3.hierarchy.replay import Policy, Replay, replay
from memory3.hierarchy.trace import Trace, zipf
from memory3.spec import SpecError
from memory3.tiers import Costs, costs_of

POINTS = 24
"""Moments at which a document says what was paid so far."""
Tell = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Setting:
    """One trace under one budget and one list of costs; `slots` memories may be kept, without a limit where it is `None`."""

    name: str
    trace: Trace
    costs: Costs
    slots: int | None = None


@dataclass(frozen=True)
class Line:
    """What one policy paid in a setting."""

    policy: str
    played: Replay


@dataclass(frozen=True)
class Outcome:
    """A setting, its optimum, and a line for each policy."""

    setting: Setting
    best: Optimum
    lines: tuple[Line, ...]

    def ratio(self, line: Line) -> float:
        """Cost over the lower bound of the optimum."""
        return line.played.cost / self.best.bound if self.best.bound else 1.0

    @property
    def spent(self) -> dict[str, NDArray[np.float64]]:
        """(T,) what each line has paid after each use, the optimum's schedule first."""
        return {"optimum": self.best.spent} | {line.policy: line.played.spent for line in self.lines}


def settings(
    formats: Sequence[Costed], trace: Trace, *, rent: float, passes: float, share: float = 0.1, head: Trace | None = None
) -> list[Setting]:
    """The settings of `memory3 simulate`: no limit, a budget, then the budget with each further burden.

    Args:
        formats: text, memory and at least one inside the parameters.
        trace: of use.
        rent: of one memory for a day, in the unit of the formats.
        passes: times that training has to see a reference before it is known without memory.
        share: of the bank's memories, how many may be kept.
        head: a trace whose most used references pass the threshold of parameters.

    Raises:
        SpecError: a share out of range, or so small that no memory fits.
    """
    if not 0 < share <= 1 or passes <= 0:
        raise SpecError(
            f"found a budget of {share} of the bank and {passes} passes, expected a share up to 1 and passes above 0"
        )
    costs, slots = costs_of(formats), int(share * trace.references)
    if slots < 1:
        raise SpecError(f"found a budget of {share} of {trace.references} memories, expected room for one: raise --budget")
    known = replace(costs, consolidation=passes * costs.consolidation)
    found = [
        Setting("no limit", trace, costs),
        Setting("budget", trace, costs, slots),
        Setting("budget, storage priced", trace, replace(costs, rent=rent), slots),
        Setting(f"budget, {passes:g} passes to consolidate", trace, known, slots),
        Setting(f"budget, storage priced, {passes:g} passes", trace, replace(known, rent=rent), slots),
    ]
    return found if head is None else [*found, Setting("budget, a head past the threshold", head, costs, slots)]


def headed(references: int, uses: int, costs: Costs, **options: Any) -> Trace:
    """A trace whose first reference passes the threshold of parameters and does not drift: Zipf's exponent is 1.5.

    It has as many uses as that takes, at least `uses`.
    """
    share = 1 / float((np.arange(1, references + 1, dtype=np.float64) ** -1.5).sum())
    threshold = (costs.consolidation - costs.encoding) / max(costs.memory - costs.parameters, 1e-300)
    needed = 1.1 * threshold / share
    if needed > 1e6:
        raise SpecError(f"found a threshold of {threshold:.3g} uses, expected one that a trace of a million uses can pass")
    return zipf(references, max(uses, int(needed)), exponent=1.5, head=1, **options)


def simulate(
    setups: Sequence[Setting], adaptive: Adaptive | None = None, tell: Tell = lambda done, total: None
) -> Iterator[Outcome]:
    """Play every policy and find the optimum, setting by setting.

    Args:
        setups: what to play.
        adaptive: in place of the adaptive policy with its defaults.
        tell: hears how many of all lines are done.
    """
    policies: dict[str, Policy] = POLICIES | ({"adaptive": adaptive} if adaptive else {})
    total, done = len(setups) * (len(policies) + 1), 0
    for setting in setups:
        lines = []
        for name, policy in policies.items():
            tell(done, total)
            lines.append(Line(name, replay(policy, setting.trace, setting.costs, setting.slots)))
            done += 1
        tell(done, total)
        best = optimum(setting.trace, setting.costs, setting.slots)
        done += 1
        yield Outcome(setting, best, tuple(lines))
    tell(done, total)


def document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything but the moments between, as plain JSON values; costs in the unit of the settings."""
    return {"algorithm": ALGORITHM, "settings": [_setting(outcome) for outcome in outcomes]}


def _setting(outcome: Outcome) -> dict[str, Any]:
    setting, best = outcome.setting, outcome.best
    trace = setting.trace
    moments = np.linspace(0, len(trace) - 1, min(POINTS, len(trace))).astype(int)
    return {
        "name": setting.name,
        "references": trace.references,
        "uses": len(trace),
        "days": float(trace.days[-1]),
        "slots": setting.slots,
        "costs": vars(setting.costs),
        "optimum": {"bound": best.bound, "cost": best.cost, "consolidated": best.consolidated},
        "lines": [
            {
                "policy": line.policy,
                "cost": line.played.cost,
                "ratio": outcome.ratio(line),
                **line.played.paid,
                "held": line.played.held,
                "consolidated": line.played.consolidated,
            }
            for line in outcome.lines
        ],
        "moments": trace.days[moments].tolist(),
        "spent": [{"policy": name, "costs": spent[moments].tolist()} for name, spent in outcome.spent.items()],
    }
