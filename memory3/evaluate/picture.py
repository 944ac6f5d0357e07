"""Pictures: what one answer read, the curve of exact match over slots, and what each retriever finds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memory3.answering import question_prompt
from memory3.attention import Trace
from memory3.decoder import Decoder
from memory3.generation import Completion
from memory3.scoring import interval
from memory3.spec import Memory3Error

if TYPE_CHECKING:
    from memory3.evaluate.outcomes import Outcome
    from memory3.evaluate.reading import Score
    from memory3.evaluate.retrieval import Found
    from memory3.evaluate.variations import Study


def pyplot_module() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise Memory3Error("found no matplotlib, expected it for pictures: pip install 'memory3[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def check_picture(path: Path) -> None:
    """Refuse what cannot be drawn into, before hours of measuring.

    Raises:
        Memory3Error: matplotlib is missing, or does not write files of this suffix.
    """
    pyplot = pyplot_module()
    known = sorted(pyplot.matplotlib.backend_bases.FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise Memory3Error(f"found a picture named {path.name}, expected one that ends in .{', .'.join(known)}")


BAND = 50
"""Most tokens of a reference beside each other in the picture of `draw_reading`."""


@torch.no_grad()
def draw_reading(decoder: Decoder, question: str, completion: Completion, path: Path) -> None:
    """Draw, for the most cited reference of an answer, the tokens that each memory head kept and what it attended to.

    A row is a memory head, a column a token of the reference; grey was not kept, the darker the more attention the
    answer's tokens paid (mean over the answer, sum over the query heads of the kv head).
    """
    assert completion.effect is not None and completion.effect.citations, "an answer with citations"
    assert decoder.spec.layers is not None
    cited = completion.effect.citations[0]
    recalled = next(r for _, r in completion.recalls if any(h.id == cited.id for h in r.hits))
    place = [h.id for h in recalled.hits].index(cited.id)
    memory, tokens = recalled.memories[place], decoder.tokens(cited.reference.text)
    prompt = question_prompt(decoder, question)
    context = [*prompt.ids, *completion.ids[:-1]]
    layout, trace = decoder.layout([context], grid=[[0] * len(context)]), Trace(tokens_too=True)
    decoder.forward(layout, decoder.reading(layout.chunks, [[recalled.memories]], trace))
    paid = torch.full((decoder.spec.pairs, len(tokens)), float("nan"))
    for layer in decoder.spec.layers:
        rows = decoder.spec.rows_of(layer)
        heads = len(decoder.spec.heads_of(layer))
        weights = trace.tokens[layer][0, -len(completion.ids) :, :, place].mean(0)  # (heads * G, K)
        by_head = weights.unflatten(0, (heads, -1)).sum(1)[:, : memory.count]
        positions = memory.positions[rows].long()
        paid[rows] = paid[rows].scatter(1, positions, by_head.to(paid.dtype).cpu())
    words = [decoder.tokenizer.decode([t]).replace("\n", "¶").strip() or "·" for t in tokens]
    labels = [f"layer {layer}, head {head}" for layer in decoder.spec.layers for head in decoder.spec.heads_of(layer)]
    _heat(paid, words, labels, f"{question}  →  {completion.text.strip()}", path)


def _heat(paid: torch.Tensor, words: Sequence[str], labels: Sequence[str], title: str, path: Path) -> None:
    """Bands of at most `BAND` tokens, one below the other, so that the words stay readable on a page."""
    pyplot = pyplot_module()
    words, title = [printable(word) for word in words], printable(title)
    bands = max(1, -(-len(words) // BAND))
    width = -(-len(words) // bands)
    height = 0.9 + bands * (0.9 + 0.2 * len(labels))
    figure, rows = pyplot.subplots(bands, figsize=(max(9.0, 0.22 * width), height), constrained_layout=True, squeeze=False)
    colours = pyplot.get_cmap("Blues").with_extremes(bad="#d9d9d9")
    top = max(1e-6, float(torch.nan_to_num(paid).max()))
    for band, [axes] in enumerate(rows):
        here = slice(band * width, (band + 1) * width)
        image = axes.imshow(paid[:, here].numpy(), aspect="auto", cmap=colours, vmin=0, vmax=top)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_xticks(range(len(words[here])), words[here], rotation=90, fontsize=9)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
    figure.suptitle(f"{title}\ngrey: not kept; darker: more attention paid by the answer", fontsize=11)
    figure.colorbar(image, ax=list(rows[:, 0]), label="weight in the joint softmax", pad=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the font lacks some scripts; a box stands there
        figure.savefig(path, dpi=130)
    pyplot.close(figure)


def printable(text: str) -> str:
    """Without control characters, and without the dollar signs that would begin a formula."""
    return "".join(c if c.isprintable() else "·" for c in text).replace("$", r"\$")


def draw_curve(points: Sequence[tuple[int, Score]], path: Path) -> None:
    """Draw exact match and F1 in percent, with intervals, over key-value slots of one reference."""
    pyplot = pyplot_module()
    figure, axes = pyplot.subplots(figsize=(6.4, 4), constrained_layout=True)
    slots = [s for s, _ in points]
    for name, means, bounds in (
        ("exact match", [p.exact for _, p in points], [p.exact_interval for _, p in points]),
        ("F1", [p.f1 for _, p in points], [p.f1_interval for _, p in points]),
    ):
        low = [100 * (m - b[0]) for m, b in zip(means, bounds, strict=True)]
        high = [100 * (b[1] - m) for m, b in zip(means, bounds, strict=True)]
        axes.errorbar(slots, [100 * m for m in means], yerr=[low, high], marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(slots, [str(s) for s in slots])
    axes.set_xlabel("slots of one reference (memory layers x kv heads x tokens per head)")
    axes.set_ylabel("percent of dev questions")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_retrieval(rows: Sequence[Found], path: Path) -> None:
    """Draw recall@5 with intervals: a group of bars per dataset, a bar per retriever."""
    pyplot = pyplot_module()
    names, datasets = (list(dict.fromkeys(v)) for v in zip(*((r.retriever, r.dataset) for r in rows), strict=True))
    figure, axes = pyplot.subplots(figsize=(2.6 + 1.5 * len(datasets), 4), constrained_layout=True)
    width = 0.8 / len(names)
    for n, name in enumerate(names):
        found = {row.dataset: row.recall(5) for row in rows if row.retriever == name}
        means = [sum(found[d]) / len(found[d]) for d in datasets]
        bounds = [interval(found[d]) for d in datasets]
        errors = [
            [m - b[0] for m, b in zip(means, bounds, strict=True)],
            [b[1] - m for m, b in zip(means, bounds, strict=True)],
        ]
        places = [place + (n - (len(names) - 1) / 2) * width for place in range(len(datasets))]
        axes.bar(places, means, width, yerr=errors, capsize=2, label=name)
    axes.set_xticks(range(len(datasets)), [d.replace(" + ", " +\n") for d in datasets], fontsize=8)
    axes.set_ylabel("recall@5")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(ncols=len(names), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_arms(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Draw the first metric of every arm with its 95 % interval: a bar per arm, in the order of the table."""
    from memory3.evaluate.outcomes import METRICS

    pyplot = pyplot_module()
    name = next(iter(outcomes[0].values))
    shown = METRICS[name].shown
    means = [shown(o.mean(name)) for o in outcomes]
    bounds = [[shown(b) for b in o.interval(name)] for o in outcomes]
    errors = [[m - b[0] for m, b in zip(means, bounds, strict=True)], [b[1] - m for m, b in zip(means, bounds, strict=True)]]
    figure, axes = pyplot.subplots(figsize=(7.5, 1.2 + 0.42 * len(outcomes)), constrained_layout=True)
    axes.barh(range(len(outcomes)), means, xerr=errors, capsize=3, color="#7aa6d2")
    axes.set_yticks(range(len(outcomes)), [printable(o.arm) for o in outcomes])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(METRICS[name].heading)
    axes.set_title(printable(title), fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_study(study: Study, path: Path) -> None:
    """Draw the curves of an ablation with 95 % intervals, and its controls as dashed levels."""
    pyplot = pyplot_module()
    name, metric = study.metric
    figure, axes = pyplot.subplots(figsize=(6.8, 4.2), constrained_layout=True)
    for n, (label, points) in enumerate(study.curves.items()):
        places, means = [x for x, _ in points], [metric.shown(o.mean(name)) for _, o in points]
        bounds = [[metric.shown(b) for b in o.interval(name)] for _, o in points]
        low = [max(0.0, m - b[0]) for m, b in zip(means, bounds, strict=True)]
        high = [max(0.0, b[1] - m) for m, b in zip(means, bounds, strict=True)]
        axes.errorbar(places, means, yerr=[low, high], marker="os^v"[n % 4], capsize=3, label=printable(label))
    for n, control in enumerate(study.controls):
        style, level = ("--", ":")[n % 2], metric.shown(control.mean(name))
        axes.axhline(level, color="#777777", linestyle=style, label=printable(control.arm))
    ticks = sorted({x for points in study.curves.values() for x, _ in points})
    if study.doubling:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xlabel(study.axis)
    axes.set_ylabel(metric.heading)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
