"""The picture of a circuit: what each memory head added to an answer, and the edges that carried it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from memory3.evaluate.picture import printable, pyplot_module
from memory3.probe.answers import Circuit, Edge, Node

MEMORY, CONTEXT, OTHER = "#d95f0e", "#2b6ca3", "#888888"
_LEAST = 0.02
"""Of the strongest edge of its kind: weaker ones are left out."""
_ALONG = (0.75, 0.5, 0.3, 0.62)
"""Where along a line its label stands, in turn, so that labels of neighbours keep apart."""
_LABELLED = 0.02
"""Of the strongest line: weaker ones get no label."""


def draw_circuit(circuit: Circuit, path: Path) -> None:
    """Draw heads and edges of an answer.

    Above, a cell per query head of each memory layer: what its edges from memory add to the answer's log-likelihood; frames
    mark the heads that carry it. Below, the subgraph: memory tokens at the left, prompt and answer at the right, layers from
    the bottom up. A line is an attention edge that adds something, the thicker the more.
    """
    pyplot = pyplot_module()
    drawn = lines(circuit.edges)
    columns = _columns(circuit, drawn)
    layers = sorted({line.layer for line in drawn} | {head.layer for head in circuit.heads})
    width = max(9.0, 3.0 + 0.5 * len(columns))
    rows = len({head.layer for head in circuit.heads})
    figure, (above, below) = pyplot.subplots(
        2,
        1,
        figsize=(width, 2.4 + 0.34 * rows + 1.1 * len(layers)),
        height_ratios=[1 + 0.34 * rows, 1.4 + 1.1 * len(layers)],
        constrained_layout=True,
    )
    _heads(circuit, figure, above)
    _graph(circuit, drawn, columns, layers, below)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the font lacks some scripts; a box stands there
        figure.savefig(path, dpi=130)
    pyplot.close(figure)


@dataclass(frozen=True)
class Line:
    """Edges between the same two tokens in one layer, and what they add, summed over their query heads."""

    layer: int
    key: Node
    query: Node
    heads: tuple[int, ...]
    effect: float


def lines(edges: Sequence[Edge]) -> list[Line]:
    """Edges that add something beside the strongest of their kind (from memory, or inside the context), joined by tokens."""
    most = {kind: max((e.effect for e in edges if _remembered(e.key) == kind), default=0.0) for kind in (True, False)}
    groups: dict[tuple[int, Node, Node], list[Edge]] = {}
    for edge in edges:
        if edge.effect > 0 and edge.effect >= _LEAST * most[_remembered(edge.key)]:
            groups.setdefault((edge.layer, edge.key, edge.query), []).append(edge)
    return [Line(*place, tuple(sorted(e.head for e in some)), sum(e.effect for e in some)) for place, some in groups.items()]


def _remembered(node: Node) -> bool:
    return node.reference is not None


def _columns(circuit: Circuit, drawn: Sequence[Line]) -> dict[Node, float]:
    """Where each token stands: memory tokens of the lines by reference and place, a gap, then the whole context."""
    remembered = sorted(
        {line.key for line in drawn if _remembered(line.key)}, key=lambda node: (node.reference or 0, node.place)
    )
    places: dict[Node, float] = {}
    for node in (*remembered, *circuit.context):
        last, before = next(reversed(places), node), max(places.values(), default=-1.0)
        places[node] = before + (1.0 if last.reference == node.reference else 2.0)
    return places


def _heads(circuit: Circuit, figure: Any, axes: Any) -> None:
    layers = sorted({head.layer for head in circuit.heads})
    count = 1 + max(head.head for head in circuit.heads)
    grid = [[float("nan")] * count for _ in layers]
    for head in circuit.heads:
        grid[layers.index(head.layer)][head.head] = head.effect
    top = max(1e-6, *(abs(head.effect) for head in circuit.heads))
    image = axes.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top, origin="lower")
    for head in circuit.heads:
        place = head.head, layers.index(head.layer)
        if count <= 16:
            colour = "white" if abs(head.effect) > 0.6 * top else "black"
            axes.text(*place, f"{head.effect:.2f}", ha="center", va="center", fontsize=7, color=colour)
        if head in circuit.carriers:
            axes.add_patch(_frame(place))
    axes.set_xticks(range(count))
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.set_xlabel("query head")
    title = f"{circuit.question}  →  {circuit.answer}\nlog-likelihood {circuit.with_memory:.2f} nats with memory, {circuit.without:.2f} without, "
    title += f"{circuit.alone:.2f} with the framed heads' memory alone"
    axes.set_title(printable(title.replace("\n", "§")).replace("§", "\n"), fontsize=10)
    figure.colorbar(image, ax=axes, label="its memory adds, nats", pad=0.01)


def _frame(place: tuple[int, int]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((place[0] - 0.47, place[1] - 0.46), 0.94, 0.92, fill=False, linewidth=1.8, edgecolor="black")


def _graph(circuit: Circuit, drawn: Sequence[Line], columns: dict[Node, float], layers: Sequence[int], axes: Any) -> None:
    height = {layer: n for n, layer in enumerate(layers)}
    top = len(layers)
    answered = set(circuit.context[-circuit.answered :])
    for node, x in columns.items():
        if node.reference is None:
            axes.plot([x, x], [0, top], color="#dddddd", linewidth=1, zorder=0)
    most = max((line.effect for line in drawn), default=1.0)
    for n, line in enumerate(sorted(drawn, key=lambda line: -line.effect)):
        _draw(line, columns, height[line.layer], most, _ALONG[n % len(_ALONG)], axes)
    for node, x in columns.items():
        colour = MEMORY if node.reference is not None else CONTEXT if node in answered else OTHER
        word = printable(node.text.strip()) or "·"
        axes.text(x, -0.15, word, rotation=90, ha="center", va="top", fontsize=8, color=colour)
    _titles(columns, axes)
    axes.set_xlim(min(columns.values()) - 0.8, max(columns.values()) + 0.8)
    axes.set_ylim(-1.1, top + 0.1)
    axes.set_yticks([n + 0.5 for n in range(top)], [f"layer {layer}" for layer in layers])
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(
        "the edges that add most, orange from memory, blue inside the context: query heads, and what they add together in nats",
        fontsize=9,
    )


def _draw(line: Line, columns: dict[Node, float], level: int, most: float, along: float, axes: Any) -> None:
    """From the key at the bottom of a layer to the query at its top; a token that attends to itself bends beside its column."""
    colour = MEMORY if _remembered(line.key) else CONTEXT
    start, end = columns[line.key], columns[line.query]
    bend = 0.35 if start == end else 0.0
    size = 0.5 + 6.0 * sqrt(line.effect / most)
    middle = (start + end) / 2 - bend, level + 0.5
    axes.plot([start, middle[0], end], [level, middle[1], level + 1], color=colour, linewidth=size, alpha=0.55, zorder=1)
    axes.plot(start, level, "o", color=colour, markersize=4, zorder=2)
    label = f"{','.join(map(str, line.heads))}  {line.effect:.2f}"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    if line.effect >= _LABELLED * most:
        at = (middle[0], middle[1]) if bend else (start + along * (end - start), level + along)
        axes.text(*at, label, fontsize=7, ha="center", va="center", color=colour, bbox=box, zorder=3)


def _titles(columns: dict[Node, float], axes: Any) -> None:
    groups: dict[int | None, list[float]] = {}
    for node, x in columns.items():
        groups.setdefault(node.reference, []).append(x)
    for reference, places in groups.items():
        name = "prompt and answer" if reference is None else f"memory {reference + 1}"
        colour = OTHER if reference is None else MEMORY
        axes.text(sum(places) / len(places), -1.08, name, ha="center", va="bottom", fontsize=8, color=colour, style="italic")
