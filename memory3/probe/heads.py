"""Which heads a model completes repeated text with, found by what cutting their edges costs (arXiv 2407.01178, Definition 1).

A text of random tokens stands twice in a row, so nothing but the first copy foretells the second. A pattern names the edges
that a kind of head would live by; they are cut at one head after the other, and the fall of the second copy's log-likelihood
is measured. Control: as many edges of the same queries to other tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memory3.decoder import Decoder
from memory3.evaluate.given import Tell
from memory3.probe.edges import Edges, Subject, ablated, estimates, gradients, query_heads
from memory3.scoring import interval
from memory3.spec import SpecError

LEAST = 0.01
"""Nats per token that a found head is worth at least."""

Pairs = list[tuple[int, int]]


class Pattern(Protocol):
    """Edges (query column, key column) of a text of `length` tokens that stands at columns `start` and `start + length`."""

    def pairs(self, start: int, length: int) -> Pairs:
        """Only edges that a token of the second copy can profit from."""


@dataclass(frozen=True)
class Induction:
    """From each token of the second copy to the token behind the same one in the first: what comes next came next before.

    Source: Olsson et al., arXiv 2209.11895.
    """

    def pairs(self, start: int, length: int) -> Pairs:
        return [(start + length + n, start + n + 1) for n in range(length - 1)]


@dataclass(frozen=True)
class Previous:
    """From each token to the one before it: what induction needs to know of the first copy."""

    def pairs(self, start: int, length: int) -> Pairs:
        return [(start + n, start + n - 1) for n in range(1, 2 * length)]


PATTERNS: dict[str, Pattern] = {"induction": Induction(), "previous": Previous()}


@dataclass(frozen=True)
class Head:
    """What the pattern's edges of one query head are worth, in nats per token of the second copy, one value per text.

    Args:
        effects: by ablation.
        gradients: the sum of the edges' derivatives by their gates.
        estimates: the same with saturation made good (`memory3.probe.edges.estimates`).
        controls: by ablation of as many edges of the same queries to other tokens.
    """

    layer: int
    head: int
    effects: tuple[float, ...]
    gradients: tuple[float, ...]
    estimates: tuple[float, ...]
    controls: tuple[float, ...]

    @property
    def found(self) -> bool:
        """Whether it is a head of this kind: the interval lies above `LEAST` and above the control's."""
        return interval(self.effects)[0] > max(LEAST, interval(self.controls)[1])

    def row(self) -> str:
        """A row of a Markdown table."""
        low, high = interval(self.effects)
        others = (self.gradients, self.estimates, self.controls)
        values = " | ".join([f"{_mean(self.effects):+.3f} [{low:+.3f}, {high:+.3f}]", *(f"{_mean(o):+.3f}" for o in others)])
        return f"| {self.layer} | {self.head} | {values} | {'yes' if self.found else ''} |"


@dataclass(frozen=True)
class Heads:
    """Every query head by what the pattern is worth at it, largest first, and the log-likelihood in nats per token.

    Args:
        pattern: row of `PATTERNS`.
        heads: all of the model.
        first: of the first copy's tokens.
        second: of the second copy's.
        cut: of the second copy's with the pattern cut at all found heads together.
    """

    pattern: str
    heads: tuple[Head, ...]
    first: float
    second: float
    cut: float

    @property
    def found(self) -> tuple[Head, ...]:
        """Heads of this kind."""
        return tuple(head for head in self.heads if head.found)


def repeated(decoder: Decoder, length: int, rng: random.Random) -> list[int]:
    """Token ids of a random text of `length` different tokens, twice, behind the tokenizer's `<s>`.

    Raises:
        SpecError: the copies do not fit the model's window, or are too short to repeat.
    """
    special = set(decoder.tokenizer.all_special_ids)
    size = min(int(decoder.model.get_input_embeddings().weight.shape[0]), len(decoder.tokenizer))
    known = [n for n in range(size) if n not in special]
    most = min(len(known), (decoder.window - len(decoder.bos_ids)) // 2)
    if not 4 <= length <= most:
        raise SpecError(f"found texts of {length} tokens, expected 4 to {most}: two copies have to fit the model")
    text = rng.sample(known, length)
    return [*decoder.bos_ids, *text, *text]


def heads_of(
    decoder: Decoder,
    pattern: str = "induction",
    *,
    length: int = 24,
    texts: int = 8,
    seed: int = 0,
    tell: Tell | None = None,
) -> Heads:
    """Measure a pattern at every query head of a model, closed book.

    Args:
        decoder: an attached decoder.
        pattern: row of `PATTERNS`.
        length: tokens of one copy.
        texts: random texts.
        seed: of texts and controls.
        tell: told of texts done.

    Raises:
        SpecError: an unknown pattern, no text, or a length that does not fit.
    """
    if pattern not in PATTERNS:
        raise SpecError(f"found pattern {pattern!r}, expected one of {', '.join(PATTERNS)}")
    if texts < 1:
        raise SpecError(f"found {texts} texts, expected at least 1")
    rng, start = random.Random(seed), len(decoder.bos_ids)
    measured, subjects = [], []
    for n in range(texts):
        ids = repeated(decoder, length, rng)
        subjects.append(Subject.of(decoder, ids, start + length + 1))
        measured.append(_of_text(decoder, subjects[-1], PATTERNS[pattern].pairs(start, length), rng))
        if tell:
            tell(n + 1, texts)
    count, places = length - 1, _places(decoder)
    heads = [
        Head(*place, *(tuple(one[row][n] / count for one in measured) for row in range(4))) for n, place in enumerate(places)
    ]
    heads.sort(key=lambda head: (-_mean(head.effects), head.layer, head.head))
    return _summed(decoder, pattern, heads, subjects, start, length)


def _places(decoder: Decoder) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(decoder.geometry.num_layers) for head in range(query_heads(decoder))]


def _of_text(decoder: Decoder, subject: Subject, pairs: Pairs, rng: random.Random) -> tuple[list[float], ...]:
    """Effects, gradients, estimates and controls of all heads on one text."""
    where, elsewhere = subject.pairs(pairs), subject.pairs([(query, _other(query, key, rng)) for query, key in pairs])
    places = _places(decoder)
    cuts = [[Edges(layer, head, edges)] for edges in (where, elsewhere) for layer, head in places]
    whole, *without = ablated(decoder, subject, [[], *cuts])
    fell = [whole - one for one in without]
    slopes = [
        [float(slope[layer, head][where].sum()) for layer, head in places]
        for slope in (gradients(decoder, subject), estimates(decoder, subject))
    ]
    return fell[: len(places)], *slopes, fell[len(places) :]


def _other(query: int, key: int, rng: random.Random) -> int:
    """Another key that the query sees; `<s>` and the query itself among them only where there is nothing else."""
    others = [n for n in range(1, query) if n != key]
    return rng.choice(others or [query])


def _summed(
    decoder: Decoder, pattern: str, heads: Sequence[Head], subjects: Sequence[Subject], start: int, length: int
) -> Heads:
    where = PATTERNS[pattern].pairs(start, length)
    found, second, cut, first = [head for head in heads if head.found], [], [], []
    for subject in subjects:
        edges = [Edges(head.layer, head.head, subject.pairs(where)) for head in found]
        whole, without = ablated(decoder, subject, [[], edges])
        copy = Subject.of(decoder, subject.layout.input_ids[0, : start + length].tolist(), start + 1)
        second.append(whole / (length - 1))
        cut.append(without / (length - 1))
        first.append(ablated(decoder, copy, [[]])[0] / (length - 1))
    return Heads(pattern, tuple(heads), _mean(first), _mean(second), _mean(cut))


def table(heads: Heads, most: int = 12) -> str:
    """A Markdown table of the heads that are worth most, and what they do together."""
    lines = [
        f"| layer | head | worth by ablation, nats per token [95 % interval] | gradient | estimate | control | {heads.pattern} head |",
        "|---|---|---|---|---|---|---|",
        *(head.row() for head in heads.heads[:most]),
        "",
        f"{len(heads.found)} of {len(heads.heads)} heads found. Log-likelihood per token: first copy {heads.first:.3f}, second copy "
        f"{heads.second:.3f}, second copy with these edges cut at all found heads {heads.cut:.3f} nats",
    ]
    return "\n".join(lines)


def document(heads: Heads, model: str, length: int, seed: int) -> dict[str, object]:
    """The JSON document of docs/json.md."""
    return {
        "model": model,
        "pattern": heads.pattern,
        "length": length,
        "texts": len(heads.heads[0].effects),
        "seed": seed,
        "first_copy": heads.first,
        "second_copy": heads.second,
        "cut": heads.cut,
        "heads": [
            {
                "layer": head.layer,
                "head": head.head,
                "effect": _mean(head.effects),
                "interval": list(interval(head.effects)),
                "gradient": _mean(head.gradients),
                "estimate": _mean(head.estimates),
                "control": _mean(head.controls),
                "found": head.found,
            }
            for head in heads.heads
        ],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
