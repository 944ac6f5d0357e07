"""What every benchmark ends with: a table, a picture, and one JSON document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memory3.bench.machine import Machine


@dataclass(frozen=True)
class Bar:
    """One bar of the picture.

    Args:
        name: of the way.
        value: its middle.
        low, high: the least and the most of its turns.
    """

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """A finished benchmark.

    Args:
        benchmark: its name.
        machine: where it ran.
        settings: what it was run with, plain JSON values.
        columns: titles of the table.
        rows: its cells, as people read them.
        ratios: names and values; each compares two ways of this run.
        figures: everything else that was measured, plain JSON values.
        unit: of the bars.
        bars: of the picture; none where there is nothing to draw.
    """

    benchmark: str
    machine: Machine
    settings: Mapping[str, Any]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    ratios: Mapping[str, float]
    figures: Mapping[str, Any] = field(default_factory=dict)
    unit: str = ""
    bars: Sequence[Bar] = ()

    @property
    def table(self) -> str:
        """Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def document(self) -> dict[str, Any]:
        """Plain JSON values."""
        known = {"benchmark": self.benchmark, "machine": asdict(self.machine), "settings": dict(self.settings)}
        return known | {"ratios": dict(self.ratios)} | dict(self.figures)

    def show(self, out: Path | None = None) -> None:
        """Print the table, the ratios and, as the last line, the JSON document; draw the picture where `out` names one."""
        print(f"{self.machine}\n\n{self.table}\n")
        for name, value in self.ratios.items():
            print(f"{name} {value:.3g}")
        if out is not None:
            draw(self, out)
        print(json.dumps(self.document()))


def draw(report: Report, path: Path) -> None:
    """Bars of the report, one a way, with the spread of its turns."""
    from memory3.evaluate.picture import pyplot_module

    plots = pyplot_module()
    bars = list(reversed(report.bars))
    figure, axes = plots.subplots(figsize=(8, 1.2 + 0.42 * len(bars)), constrained_layout=True)
    values = [bar.value for bar in bars]
    spread = [[bar.value - bar.low for bar in bars], [bar.high - bar.value for bar in bars]]
    drawn = axes.barh([bar.name for bar in bars], values, xerr=spread, color="#4477aa", ecolor="#222222", capsize=3)
    axes.bar_label(drawn, [f"{value:,.3g}" for value in values], padding=6)
    axes.margins(x=0.15)
    axes.set_xlabel(report.unit)
    axes.set_title(f"{report.benchmark}: {report.machine}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plots.close(figure)
