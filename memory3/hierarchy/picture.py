"""Pictures of the hierarchy: what each format costs over its uses (the paper's Figure 4), and the plan of a bank."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log10
from pathlib import Path
from typing import Any

from memory3.cost import Costed, cheapest, intervals, three_digits, total
from memory3.evaluate.picture import pyplot_module
from memory3.hierarchy.planning import Plan

COLOURS = {"text": "#2b6cb0", "memory": "#c05621", "low-rank": "#718096", "parameters": "#2f855a"}


def draw_costs(formats: Sequence[Costed], unit: str, title: str, path: Path) -> None:
    """Draw the cost of every format against uses, both on logarithmic axes, and the cheapest one as a broad line."""
    pyplot = pyplot_module()
    parts = intervals(formats)
    borders = [part.least for part in parts[1:]]
    first, last = (min(borders), max(borders)) if borders else (1.0, 1.0)
    low, high = log10(first) - 1.5, log10(last) + 1.5
    uses = [10 ** (low + (high - low) * n / 400) for n in range(401)]
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), constrained_layout=True)
    hull = [total(n, cheapest(n, formats)) for n in uses]
    axes.plot(uses, hull, color="#ecc94b", linewidth=8, alpha=0.6, solid_capstyle="butt", label="the cheapest")
    for format in formats:
        axes.plot(uses, [total(n, format) for n in uses], color=COLOURS.get(format.name), label=format.name)
    for border in borders:
        axes.axvline(border, color="#777777", linestyle=":", linewidth=1)
        _write_above(axes, border, 0.87, three_digits(border), "#555555")
    _name_parts(axes, [(part.name, max(part.least, uses[0]), min(part.most, uses[-1])) for part in parts])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(uses[0], uses[-1])
    shown = [cost for cost in hull if 0 < cost < inf]
    axes.set_ylim(min(shown) / 2, max(shown) * 30)
    axes.set_xlabel("uses of one reference")
    axes.set_ylabel(f"writing and all uses, {unit}")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _name_parts(axes: Any, parts: Sequence[tuple[str, float, float]]) -> None:
    """Above each interval, which format is cheapest there."""
    for name, least, most in parts:
        _write_above(axes, 10 ** ((log10(least) + log10(most)) / 2), 0.94, name, COLOURS.get(name, "black"))


def _write_above(axes: Any, place: float, height: float, words: str, colour: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.annotate(words, (place, height), xycoords=("data", "axes fraction"), ha="center", fontsize=9, color=colour, bbox=box)


def draw_plan(plan: Plan, title: str, path: Path) -> None:
    """Draw the expected uses of every reference by rank, in the colour of its form, and the total cost beside each form's alone."""
    pyplot = pyplot_module()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 4.2), constrained_layout=True)
    for name, (count, _) in plan.tiers.items():
        rows = [(n, r.uses) for n, r in enumerate(plan.references, 1) if r.tier == name and r.uses > 0]
        label = f"{name}: {count:,} references"
        left.plot([n for n, _ in rows], [u for _, u in rows], "o", markersize=3, color=COLOURS.get(name), label=label)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("reference, the most used first")
    left.set_ylabel(f"expected uses in {plan.days:g} days")
    left.legend(fontsize=8)
    names, costs = ["the plan", *plan.alone], [plan.planned, *plan.alone.values()]
    bars = right.barh(range(len(names)), costs, color=["#ecc94b", *(COLOURS.get(name, "#777777") for name in plan.alone)])
    right.bar_label(bars, [three_digits(cost) for cost in costs], padding=3, fontsize=8)
    right.set_yticks(range(len(names)), ["the plan", *(f"all {name}" for name in plan.alone)])
    right.set_xlim(0, 1.2 * max(costs))
    right.invert_yaxis()
    right.set_xlabel(f"writing and all uses, {plan.unit}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
