"""The picture of a simulation: what each policy has paid as time goes on, a panel for each setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memory3.evaluate.picture import pyplot_module
from memory3.hierarchy.simulation import Outcome

COLOURS = {
    "optimum": "black",
    "adaptive": "#c05621",
    "LRU": "#2b6cb0",
    "lazy memory": "#805ad5",
    "all memory": "#d69e2e",
    "all parameters": "#2f855a",
    "all text": "#a0aec0",
}


def draw_simulation(outcomes: Sequence[Outcome], unit: str, scale: float, path: Path) -> None:
    """Draw cost over days, a logarithmic axis of cost; costs are divided by `scale` to be in `unit`."""
    pyplot = pyplot_module()
    columns = min(3, len(outcomes))
    height = -(-len(outcomes) // columns)
    figure, grid = pyplot.subplots(height, columns, figsize=(4.4 * columns, 3.5 * height + 0.5), squeeze=False)
    panels = list(grid.flat)
    for axes, outcome in zip(panels, outcomes, strict=False):
        _panel(axes, outcome, scale)
    for axes in panels[len(outcomes) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(f"paid so far, {unit}")
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, ncols=len(names), loc="upper center", fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axes: Any, outcome: Outcome, scale: float) -> None:
    trace = outcome.setting.trace
    shown = np.unique(np.linspace(0, len(trace) - 1, 400).astype(int))
    for name, spent in outcome.spent.items():
        style = {"linewidth": 2.2} if name in ("optimum", "adaptive") else {"linewidth": 1.3}
        dashes = "--" if name == "optimum" else "-"
        axes.plot(trace.days[shown], spent[shown] / scale, dashes, color=COLOURS.get(name), label=name, **style)
    axes.set_yscale("log")
    axes.set_ylim(bottom=outcome.best.spent[-1] / scale / 30)
    ratio = next(outcome.ratio(line) for line in outcome.lines if line.policy == "adaptive")
    axes.set_title(f"{outcome.setting.name}\n{len(trace):,} uses; adaptive {ratio:.2f} times the optimum", fontsize=9)
    axes.set_xlabel("days")
    axes.grid(alpha=0.3)
