"""Which heads look far back? Distant tokens are hidden from one head after the other, and the rise of the loss is measured.

A head whose loss rises most is the one that memory should serve (design 3, Remark 4).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from memory3.answering import QUESTION
from memory3.attention import KEYWORD, Attended, Original, States
from memory3.decoder import Decoder
from memory3.evaluate.reading import document_of, shuffled_questions
from memory3.scoring import interval
from memory3.spec import MemorySpec, SourceError

WINDOW = 64
"""Tokens that a head still sees before the query."""
LENGTH = 512
"""Tokens of a document."""

Head = tuple[int, int]
"""Layer and kv head."""


@dataclass(frozen=True)
class DistantMask:
    """A `Hook` that hides the tokens farther than `window` from the query, at some kv heads alone.

    Args:
        heads: for each layer its masked kv heads; all their query heads are masked, other heads see what they always saw.
        window: largest distance in tokens that is still seen.
        first: tokens at the start of a sequence that are never hidden: `<s>`, on which attention rests that looks at nothing.
    """

    heads: Mapping[int, Sequence[int]]
    window: int
    first: int = 0

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        """The original attention under a mask of its own for each head; rows must be padded at the right."""
        heads = self.heads.get(module.layer_idx, ())  # type: ignore[call-overload]
        length = states.key.shape[2]
        if not heads or length <= self.window + 1:
            return states.through(original, module, options)
        far = self._far(states.query.shape[2], length, states.key.device)
        masked = torch.zeros(states.key.shape[1], dtype=torch.bool, device=far.device)
        masked[list(heads)] = True
        hidden = masked.repeat_interleave(states.query.shape[1] // len(masked))[:, None, None] & far  # (H * G, Q, keys)
        return replace(states, mask=_hiding(states.mask, hidden, length)).through(original, module, options)

    def _far(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """`(Q, keys)`: which keys are too far away; the queries are the last ones."""
        place = torch.arange(keys, device=device)
        return (place[keys - queries :, None] - place > self.window) & (place >= self.first)


def _hiding(mask: Tensor | None, hidden: Tensor, keys: int) -> Tensor:
    """A mask `(B, H * G, Q, keys)` of the same kind that also hides `(H * G, Q, keys)`; none means plain causal."""
    if mask is None:
        queries = hidden.shape[-2]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device).tril(keys - queries)[None, None]
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


@dataclass(frozen=True)
class Sample:
    """Token ids with their `<s>`, and the place of the first token whose loss counts."""

    ids: tuple[int, ...]
    first: int


def document_samples(
    decoder: Decoder, texts: Iterable[str], limit: int, length: int = LENGTH, window: int = WINDOW
) -> list[Sample]:
    """The first `length` tokens of texts that have so many; the loss counts where there is something distant to see."""
    found: list[Sample] = []
    for text in texts:
        ids = decoder.context(text)[:length]
        if len(ids) == length:
            found.append(Sample(tuple(ids), len(decoder.bos_ids) + window + 1))
        if len(found) == limit:
            break
    return found


def question_samples(decoder: Decoder, data: Path, limit: int, seed: int = 0, window: int = WINDOW) -> list[Sample]:
    """Train rows of `qa.parquet` (boolq apart): passage, question and answer, where the answer's passage is mostly distant.

    Only the answer's loss counts; rows of at most twice the window are left out, those beyond the model's window too.
    """
    found: list[Sample] = []
    for row in shuffled_questions(data, "train", random.Random(seed)):
        asked = QUESTION.format(question=row["question"].strip())
        before = decoder.context(f"{document_of(row['title'], row['passage'])}\n\n{asked}")
        accepted = [a.strip() for a in row["answers"] if a.strip()]
        answer = decoder.tokens(f" {accepted[0]}") if accepted else []
        if answer and 2 * window < len(before) <= decoder.window - len(answer):
            found.append(Sample((*before, *answer), len(before)))
        if len(found) == limit:
            break
    return found


@torch.no_grad()
def losses(decoder: Decoder, samples: Sequence[Sample], hook: DistantMask | None = None, batch: int = 8) -> list[float]:
    """Mean loss in nats of each sample's counted tokens, closed book, under a mask."""
    found: list[float] = []
    options: dict[str, Any] = {} if hook is None else {KEYWORD: hook}
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        layout = decoder.layout([sample.ids for sample in part], padding_side="right", memory=False)
        logits = decoder.forward(layout, **options).logits
        for n, sample in enumerate(part):
            end, ids = len(sample.ids), layout.input_ids[n]
            predicted = logits[n, sample.first - 1 : end - 1].float()
            found.append(float(functional.cross_entropy(predicted, ids[sample.first : end])))
    return found


@dataclass(frozen=True)
class Rise:
    """What hiding distant tokens from some heads costs: the rise of each sample's loss in nats, its mean and 95 % interval."""

    name: str
    heads: tuple[Head, ...]
    rises: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean rise."""
        return sum(self.rises) / len(self.rises)

    def row(self) -> str:
        """A row of a Markdown table."""
        low, high = interval(self.rises)
        return f"| {self.name} | {len(self.rises)} | {self.mean:+.4f} [{low:+.4f}, {high:+.4f}] |"


def ranking(
    decoder: Decoder,
    samples: Sequence[Sample],
    window: int = WINDOW,
    tell: Callable[[int, int], None] | None = None,
    batch: int = 8,
) -> tuple[list[Rise], Rise]:
    """Every (layer, kv head) of the model by the rise that its masking causes, largest first; and the rise of masking all.

    `<s>` stays visible.

    Raises:
        SourceError: no sample, or one that has nothing distant.
    """
    if not samples or min(len(sample.ids) for sample in samples) <= window + 1:
        raise SourceError(
            f"found {len(samples)} samples, the shortest of {min((len(s.ids) for s in samples), default=0)} tokens, expected some "
            f"longer than {window + 1}: give longer texts, or a smaller window"
        )
    shape = decoder.geometry
    heads = [(layer, head) for layer in range(shape.num_layers) for head in range(shape.num_kv_heads)]
    plain = losses(decoder, samples, batch=batch)
    found = []
    groups = [("all heads", tuple(heads)), *((f"layer {layer}, kv head {head}", ((layer, head),)) for layer, head in heads)]
    for n, (name, group) in enumerate(groups):
        masked = {layer: [head for at, head in group if at == layer] for layer, _ in group}
        hidden = losses(decoder, samples, DistantMask(masked, window, len(decoder.bos_ids)), batch)
        found.append(Rise(name, group, tuple(h - p for h, p in zip(hidden, plain, strict=True))))
        if tell:
            tell(n + 1, len(groups))
    return sorted(found[1:], key=lambda rise: (-rise.mean, rise.heads)), found[0]


def kept(spec: MemorySpec, ranked: Sequence[Rise], keep: int | float) -> MemorySpec:
    """The spec with the best `keep` heads, a number or a share below 1 of all, as its memory heads.

    Raises:
        SourceError: more heads than there are, or none.
    """
    best = sorted(head for rise in ranked[: _count(keep, len(ranked))] for head in rise.heads)
    layers = tuple(dict.fromkeys(layer for layer, _ in best))
    return replace(spec, layers=layers, heads=tuple(tuple(head for at, head in best if at == layer) for layer in layers))


def _count(keep: int | float, heads: int) -> int:
    count = keep if isinstance(keep, int) else round(keep * heads) if 0 < keep < 1 else 0
    if not 1 <= count <= heads:
        raise SourceError(f"found keep={keep!r}, expected 1 to {heads} heads, or a share of them below 1")
    return count


def measure_masking(
    decoder: Decoder,
    samples: Sequence[Sample],
    keep: int | float,
    out: Path | None,
    window: int = WINDOW,
    tell: Callable[[int, int], None] | None = None,
) -> list[Rise]:
    """Print the ranking and, where `out` says, write the `MemorySpec` that keeps the best heads (`memory_spec.json`)."""
    _count(keep, decoder.geometry.num_layers * decoder.geometry.num_kv_heads)  # before hours of measuring
    ranked, everything = ranking(decoder, samples, window, tell)
    spec = kept(decoder.spec, ranked, keep)
    print(f"| tokens farther than {window} hidden from | samples | rise of the loss, nats [95 % interval] |\n|---|---|---|")
    for rise in (everything, *ranked):
        print(rise.row())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(spec.to_json(), indent=1) + "\n", "utf-8")
    return ranked
