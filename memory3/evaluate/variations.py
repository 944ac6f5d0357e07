"""One thing varied, all else equal, on a finished model: tokens per head, selection, number of references, chunk length."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log

from memory3.decoder import Decoder
from memory3.evaluate.arms import CLOSED, SPARSE, WRONG, Arm
from memory3.evaluate.given import Tell, holds, retrieved
from memory3.evaluate.likelihood import Chunks, Passage, Row, asked_by_chunks, by_chunk, log_probabilities, passages
from memory3.evaluate.outcomes import METRICS, Metric, Outcome, table
from memory3.evaluate.reading import OTHERS, Case, Given, among, score_of, selections
from memory3.reader import BankReader
from memory3.recall import EVALUATION_OVERLAP
from memory3.spec import SourceError

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
COUNTS = (1, 2, 3, 5, 8, 12, 16, 20)
CHUNKS = (32, 64, 128)
Curve = Sequence[tuple[float, Outcome]]


@dataclass(frozen=True)
class Study:
    """What an ablation found.

    Args:
        outcomes: rows of the table.
        table: Markdown, with 95 % bootstrap intervals.
        curves: by name, points of what was varied and the outcome there; empty where there is no natural order.
        controls: drawn as levels beside the curves.
        metric: name of the values that are drawn, and how.
        axis: what was varied, for the picture; doubled from one point to the next where `doubling`.
    """

    outcomes: Sequence[Outcome]
    table: str
    curves: Mapping[str, Curve] = field(default_factory=dict)
    controls: Sequence[Outcome] = ()
    metric: tuple[str, Metric] = ("exact match", METRICS["exact match"])
    axis: str = ""
    doubling: bool = True


def answered(name: str, decoder: Decoder, cases: Sequence[Case], given: Given | None, tell: Tell | None = None) -> Outcome:
    """Exact match and F1 of greedy answers to the cases, reading what `given` brings as memories."""
    score = score_of(name, decoder, cases, given, tell=tell)
    return score.outcome(sum(len(given(c)) for c in cases) / len(cases) if given else 0.0)


def gold_and(others: int) -> Given:
    """Gold among so many of a case's other references."""
    return lambda case: among(case.question, [case.gold], case.others[:others])


def only(others: int) -> Given:
    """So many of a case's other references, without gold: a control."""
    return lambda case: case.others[:others]


def part(tell: Tell | None, number: int, count: int) -> Tell:
    """Progress of one part of `count` as progress of the whole."""
    return lambda done, total: tell(number * total + done, count * total) if tell else None


# ---- questions ----


def tokens_study(decoder: Decoder, cases: Sequence[Case], values: Sequence[int] = TOKENS, tell: Tell | None = None) -> Study:
    """Exact match and F1 over kept tokens per head, gold among four others. Numbers beyond the reference length are left out."""
    kept, count = [n for n in values if n <= decoder.spec.reference_length], len(values) + 2
    curve = [
        (n, answered(tokens_name(n), _keeping(decoder, n), cases, gold_and(OTHERS), part(tell, place, count)))
        for place, n in enumerate(kept)
    ]
    closed = answered(CLOSED, decoder, cases, None, part(tell, count - 2, count))
    wrong = answered(WRONG, decoder, cases, only(OTHERS), part(tell, count - 1, count))
    return tokens_found(curve, [closed, wrong])


def tokens_name(kept: int) -> str:
    """Name of a row."""
    return f"{kept} {'token' if kept == 1 else 'tokens'} per head"


def tokens_found(curve: Curve, controls: Sequence[Outcome]) -> Study:
    """A study of kept tokens from its curve and its controls, the first of which the table compares with."""
    rows = [*(outcome for _, outcome in curve), *controls]
    named = {"gold among four others": curve}
    return Study(rows, table(rows, [controls[0].arm]), named, controls, axis="kept tokens per layer and kv head")


def _keeping(decoder: Decoder, kept: int) -> Decoder:
    return decoder.using(replace(decoder.spec, tokens_per_head=kept))


def selection_study(decoder: Decoder, cases: Sequence[Case], tell: Tell | None = None) -> Study:
    """Every registered selection at the decoder's own tokens per head, gold among four others, and paired differences to its
    own selection; the control is the row `random`.
    """
    rows = [score.outcome(1.0 + OTHERS) for score in selections(decoder, cases, tell)]
    return Study(rows, table(rows, [decoder.spec.selection]))


def references_study(
    decoder: Decoder, cases: Sequence[Case], counts: Sequence[int] = COUNTS, seed: int = 0, tell: Tell | None = None
) -> Study:
    """Exact match and F1 when gold is one of `counts` references; a smaller set is part of every larger one.

    Controls are closed book, and as many wrong references as the largest set has.

    Raises:
        SourceError: too few cases to draw the others from.
    """
    most, steps = max(counts), len(counts) + 2
    crowded = with_others(cases, most, seed)
    curve = [
        (n, answered(_references(n), decoder, crowded, gold_and(n - 1), part(tell, place, steps)))
        for place, n in enumerate(counts)
    ]
    closed = answered(CLOSED, decoder, crowded, None, part(tell, steps - 2, steps))
    wrong = answered(f"{most} wrong references", decoder, crowded, only(most), part(tell, steps - 1, steps))
    rows = [*(outcome for _, outcome in curve), wrong, closed]
    names = [curve[0][1].arm, CLOSED]
    axis = "references that a question reads, one of them gold"
    return Study(rows, table(rows, names), {"gold among others": curve}, [closed, wrong], axis=axis, doubling=False)


def _references(count: int) -> str:
    return "gold alone" if count == 1 else f"gold among {count} references"


def with_others(cases: Sequence[Case], count: int, seed: int = 0) -> list[Case]:
    """The cases with `count` other references each, drawn from the gold references of other cases; none holds an answer.

    Raises:
        SourceError: there are not so many.
    """
    rng, pool = random.Random(seed), list(dict.fromkeys(c.gold for c in cases))
    found = []
    for case in cases:
        others = [g for g in rng.sample(pool, len(pool)) if g != case.gold and not holds(g, case.answers)]
        if len(others) < count:
            raise SourceError(
                f"found {len(others)} other references for {case.question[:60]!r}, expected {count}: give a larger --limit"
            )
        found.append(replace(case, others=tuple(others[:count])))
    return found


# ---- text ----


def chunk_study(
    decoder: Decoder,
    banks: BankReader | Sequence[BankReader],
    texts: Iterable[str],
    *,
    sizes: Sequence[int] = CHUNKS,
    length: int = 512,
    limit: int | None = None,
    retriever: str | None = None,
    max_overlap: float | None = EVALUATION_OVERLAP,
    seed: int = 0,
    tell: Tell | None = None,
) -> Study:
    """How well held-out text is foretold when references are recalled every 32, 64 or 128 tokens, by the chunk just read.

    Each stretch is one forward pass as in generation: a token of chunk c reads what chunk c - 1 recalled, as many references
    whatever the chunk's length. All sizes are scored on the very same tokens, those behind the longest first chunk. A short
    chunk recalls more often and with fresher words, but with fewer of them. Controls: references of another stretch, and none.

    Args:
        decoder: a finished model.
        banks: opened with it.
        texts: held-out text.
        sizes: chunk lengths, in tokens.
        length: tokens of a stretch, more than the longest chunk.
        limit: most stretches.
        retriever: row of `RETRIEVERS`; by default that of `Recall`.
        max_overlap: references that repeat more of themselves from the stretch are dropped; `None` keeps all.
        seed: of the choice of stretches.
        tell: told of progress.

    Raises:
        SourceError: too little text.
    """
    longest, steps = max(sizes), 3 * len(sizes) + 1
    stretches = passages(_chunked(decoder, longest), texts, length=length, limit=limit, seed=seed)
    curves: dict[str, list[tuple[float, Outcome]]] = {SPARSE: [], WRONG: []}
    for n, size in enumerate(sizes):
        view, asked = _chunked(decoder, size), asked_by_chunks(_chunked(decoder, size), stretches)
        brought = retrieved(banks, asked, retriever=retriever, max_overlap=max_overlap, tell=part(tell, 3 * n, steps))
        reads = by_chunk(view, stretches, brought)
        for place, arm in enumerate((Arm(SPARSE, view), Arm(WRONG, view, "wrong")), 1):
            references = sum(len(arm.texts(b)) for b in brought) / len(brought)
            values = _foretold(arm, stretches, reads, longest, part(tell, 3 * n + place, steps))
            curves[arm.name].append((size, Outcome(f"{size}-token chunks, {arm.name}", references, values)))
    nothing = Arm(CLOSED, decoder, "nothing")
    closed = Outcome(CLOSED, 0.0, _foretold(nothing, stretches, [()] * len(stretches), longest, part(tell, steps - 1, steps)))
    rows = [closed, *(outcome for points in zip(*curves.values(), strict=True) for _, outcome in points)]
    metric = ("bits per byte", METRICS["bits per byte"])
    return Study(rows, table(rows, [CLOSED]), curves, [closed], metric, "tokens of a chunk")


def _chunked(decoder: Decoder, size: int) -> Decoder:
    return decoder.using(replace(decoder.spec, chunk_length=size))


def _foretold(
    arm: Arm, stretches: Sequence[Passage], reads: Sequence[Chunks], first: int, tell: Tell
) -> dict[str, tuple[float, ...]]:
    """Bits per byte and per token of each stretch, over the tokens behind its first `first + 1`.

    As in `likelihood.foretold`, bits are divided by the mean bytes of a stretch, so that their mean is all bits over all bytes.
    """
    size, mean_bytes = arm.decoder.spec.chunk_length, sum(s.scored_bytes for s in stretches) / len(stretches)
    rows = [
        Row(s.ids, first + 1, len(s.ids), [arm.texts(b) for b in chunks], [n // size for n in range(len(s.ids))])
        for s, chunks in zip(stretches, reads, strict=True)
    ]
    found = log_probabilities(arm, rows, tell)
    bits = [-sum(row) / log(2) for row in found]
    return {
        "bits per byte": tuple(b / mean_bytes for b in bits),
        "bits per token": tuple(b / len(row) for b, row in zip(bits, found, strict=True)),
    }
