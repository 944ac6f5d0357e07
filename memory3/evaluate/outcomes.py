"""What the arms of an evaluation reached: means, paired differences, and their table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp2
from typing import Any

from memory3.scoring import interval


@dataclass(frozen=True)
class Metric:
    """How a mean of values per question is shown."""

    heading: str
    shown: Callable[[float], float]
    digits: int = 1

    def cell(self, mean: float, bounds: tuple[float, float]) -> str:
        """`mean [low, high]` of the 95 % interval."""
        numbers = [f"{self.shown(value):.{self.digits}f}" for value in (mean, *bounds)]
        return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _percent(value: float) -> float:
    return 100 * value


METRICS = {
    "exact match": Metric("exact match, %", _percent),
    "f1": Metric("F1, %", _percent),
    "accuracy": Metric("accuracy, %", _percent),
    "bits per byte": Metric("bits per byte", float, 3),
    "bits per token": Metric("perplexity of a token", exp2, 2),
}


@dataclass(frozen=True)
class Outcome:
    """What one arm reached.

    Args:
        arm: its name.
        references: mean references of a question.
        values: for each metric one value per question, in the same order in all arms; the first metric leads.
    """

    arm: str
    references: float
    values: Mapping[str, tuple[float, ...]]

    def mean(self, metric: str) -> float:
        """Over the questions."""
        return sum(self.values[metric]) / len(self.values[metric])

    def interval(self, metric: str) -> tuple[float, float]:
        """95 % bootstrap interval of the mean."""
        return interval(self.values[metric])

    def minus(self, other: Outcome, metric: str) -> tuple[float, tuple[float, float]]:
        """Mean difference to another arm, and its paired 95 % interval: questions are drawn, each with both its values."""
        differences = [a - b for a, b in zip(self.values[metric], other.values[metric], strict=True)]
        return sum(differences) / len(differences), interval(differences)


def table(outcomes: Sequence[Outcome], against: Sequence[str]) -> str:
    """A Markdown table: a row per arm, each metric with its interval, and paired differences of the first to some arms."""
    metrics = list(outcomes[0].values)
    lead, by_name = metrics[0], {o.arm: o for o in outcomes}
    others = [by_name[name] for name in against if name in by_name]
    heads = [
        "arm", "n", "references", *(METRICS[m].heading for m in metrics), *(f"{METRICS[lead].heading}: minus {o.arm}" for o in others)
    ]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for outcome in outcomes:
        cells = [METRICS[m].cell(outcome.mean(m), outcome.interval(m)) for m in metrics]
        differences = ["" if o is outcome else METRICS[lead].cell(*outcome.minus(o, lead)) for o in others]
        lines.append([outcome.arm, str(len(outcome.values[lead])), f"{outcome.references:.1f}", *cells, *differences])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The outcomes as plain JSON values: means and intervals of each metric, and the values of each question."""
    return [
        {
            "arm": o.arm,
            "references": o.references,
            "metrics": {
                m: {"mean": o.mean(m), "interval": list(o.interval(m)), "values": list(v)} for m, v in o.values.items()
            },
        }
        for o in outcomes
    ]
