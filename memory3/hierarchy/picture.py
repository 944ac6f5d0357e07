"""Pictures of the hierarchy: what each format costs over its uses (the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log10
from pathlib import Path
from typing import Any

from memory3.cost import Costed, cheapest, intervals, three_digits, total
from memory3.evaluate.picture import pyplot_module

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
