"""Which knowledge can be taken out of a model's parameters? *Separable* and *imitable* facts, by measured probabilities.

A fact is unknown to a model where every realization has an answer token of probability at most 1/2. It is *separable* where one
prefix then brings every answer token of all realizations to at least 0.9, and *imitable* where any realization serves as that
prefix for any other (arXiv 2407.01178, Definitions 6 and 7). The prefix is the fact's text, a realization as running text,
or the explicit memory of the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

from memory3.decoder import Decoder
from memory3.evaluate.arms import CLOSED, SPARSE, Arm
from memory3.evaluate.given import Tell
from memory3.evaluate.likelihood import Row, log_probabilities
from memory3.generation import Prompt, complete
from memory3.probe.facts import Fact, relations
from memory3.recall import Recalled
from memory3.retrieval import Hit
from memory3.scoring import exact_match, interval, normalised
from memory3.spec import Memory, Reference, SourceError, SpecError
from memory3.splitting import split

TEXT, MEMORY = "text", "memory"
GAP = "\n\n"
"""Between a prefix and a realization, as between references in a prompt."""

Steps = tuple[float, ...]
"""Probability of each answer token of one realization, branches summed."""


@dataclass(frozen=True)
class Thresholds:
    """Of probabilities: unknown is at most `without` for some token, served is at least `given` for every token."""

    without: float = 0.5
    given: float = 0.9

    def __post_init__(self) -> None:
        for name in ("without", "given"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"found a threshold {name}={getattr(self, name)}, expected a probability of 0 to 1")


@dataclass(frozen=True)
class Verdict:
    """What was measured of one fact.

    Args:
        fact: the fact.
        without: for each realization the probabilities without a prefix.
        given: the same by prefix: `text`, `memory`, and `realization N` for the N-th realization.
        said: what the model goes on with, greedily, for each realization behind `text` and `memory`.
        thresholds: what the verdict is by.
    """

    fact: Fact
    without: tuple[Steps, ...]
    given: Mapping[str, tuple[Steps, ...]]
    said: Mapping[str, tuple[str, ...]]
    thresholds: Thresholds = field(default_factory=Thresholds)

    @property
    def unknown(self) -> bool:
        """Whether every realization has a token that is not foretold without a prefix."""
        return all(min(steps) <= self.thresholds.without for steps in self.without)

    def serves(self, prefix: str) -> bool:
        """Whether a prefix brings all realizations above the threshold; a realization is not asked to serve itself."""
        others = (steps for n, steps in enumerate(self.given[prefix]) if prefix != _named(n))
        return all(min(steps) >= self.thresholds.given for steps in others)

    @property
    def serving(self) -> tuple[str, ...]:
        """Prefixes that serve all realizations, where the fact is unknown without them."""
        return tuple(prefix for prefix in self.given if self.unknown and self.serves(prefix))

    @property
    def separable(self) -> bool:
        """Definition 6."""
        return bool(self.serving)

    @property
    def imitable(self) -> bool:
        """Definition 7: all ordered pairs of different realizations."""
        return self.unknown and all(self.serves(_named(n)) for n in range(len(self.fact.realizations)))

    @property
    def itself(self) -> Steps:
        """Least probability of each realization behind itself. It shows that the model copies and counts in no verdict."""
        return tuple(min(self.given[_named(n)][n]) for n in range(len(self.fact.realizations)))

    def agree(self, prefix: str) -> bool:
        """Whether the model's own outputs agree behind a prefix (Definition 4): it says the same to all realizations, or of a
        specific fact to each of them an accepted answer."""
        said, realizations = self.said[prefix], self.fact.realizations
        right = all(exact_match(text, one.answers) for text, one in zip(said, realizations, strict=True))
        return len({normalised(text) for text in said}) == 1 or (right and self.fact.specific)


def _named(n: int) -> str:
    return f"realization {n}"


def summed(branches: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Steps:
    """Probability of each step along accepted branches: that it stays on one of them, given that the steps before did.

    With one branch these are the probabilities of its tokens. A branch that is finished stays; one that goes on from a
    finished one says nothing new.

    Args:
        branches: token ids and their log-probabilities in nats.
    """
    known = {tuple(ids): list(nats) for ids, nats in branches}
    leaves = {ids: nats for ids, nats in known.items() if not any(ids[:n] in known for n in range(1, len(ids)))}
    reached = [1.0]
    for depth in range(1, max(map(len, leaves)) + 1):
        stems = {ids[:depth]: exp(sum(nats[:depth])) for ids, nats in leaves.items()}
        reached.append(sum(stems.values()))
    return tuple(now / before if before else 0.0 for before, now in itertools.pairwise(reached))


def judged(
    decoder: Decoder, facts: Sequence[Fact], thresholds: Thresholds | None = None, tell: Tell | None = None
) -> list[Verdict]:
    """Measure facts: every realization without a prefix, behind each prefix, and behind the memory of the text.

    Args:
        decoder: an attached decoder; no more is asked of it, but one not trained for memory will take no fact from it.
        facts: what is measured.
        thresholds: by default 1/2 and 0.9.
        tell: told of answers measured.

    Raises:
        SourceError: a fact does not fit the model's window.
    """
    plain = [(fact, prefix, *row) for fact in facts for prefix in _prefixes(fact) for row in _rows(decoder, fact, prefix)]
    written = [(fact, MEMORY, *row) for fact in facts for row in _rows(decoder, fact, MEMORY)]
    both = len(plain) + len(written)
    found: dict[tuple[str, str | None, int], list[tuple[Sequence[int], Sequence[float]]]] = {}
    done = 0
    for arm, rows in ((Arm(CLOSED, decoder, "nothing"), plain), (Arm(SPARSE, decoder), written)):

        def told(part: int, total: int, done: int = done) -> None:
            if tell:
                tell(done + part, both)

        nats = log_probabilities(arm, [row for *_, row in rows], told)
        for (fact, prefix, n, row), one in zip(rows, nats, strict=True):
            found.setdefault((fact.id, prefix, n), []).append((row.ids[row.start : row.end], one))
        done += len(rows)
    return [_verdict(decoder, fact, found, thresholds or Thresholds()) for fact in facts]


def _prefixes(fact: Fact) -> list[str | None]:
    return [None, TEXT, *map(_named, range(len(fact.realizations)))]


def _verdict(decoder: Decoder, fact: Fact, found: Mapping[Any, Any], thresholds: Thresholds) -> Verdict:
    def steps(prefix: str | None) -> tuple[Steps, ...]:
        return tuple(summed(found[fact.id, prefix, n]) for n in range(len(fact.realizations)))

    given = {prefix: steps(prefix) for prefix in (*_prefixes(fact)[1:], MEMORY) if prefix is not None}
    return Verdict(fact, steps(None), given, {TEXT: _said_behind(decoder, fact), MEMORY: _said(decoder, fact)}, thresholds)


def _rows(decoder: Decoder, fact: Fact, prefix: str | None) -> Iterator[tuple[int, Row]]:
    """For each realization and branch of a fact behind a prefix: the number of the realization, and what is scored."""
    front = decoder.tokens(_text_of(fact, prefix))
    given = [_references(decoder, fact)] if prefix == MEMORY else ()
    for n, realization in enumerate(fact.realizations):
        prompt, branches = realization.parts
        before = [*decoder.bos_ids, *front, *decoder.tokens(prompt)]
        for branch in branches:
            answer = decoder.tokens(branch)
            row = Row([*before, *answer], len(before), len(before) + len(answer), given)
            _check(decoder, fact, row, bool(given))
            yield n, row


def _text_of(fact: Fact, prefix: str | None) -> str:
    if prefix in (None, MEMORY):
        return ""
    texts = {TEXT: fact.text} | {_named(n): one.text for n, one in enumerate(fact.realizations)}
    return texts[str(prefix)].rstrip() + GAP


def _references(decoder: Decoder, fact: Fact) -> list[str]:
    """The fact's text as references; a long one is cut into several, which are read together."""
    return [r.text for r in split(fact.text, decoder.tokenizer, length=decoder.spec.reference_length)]


def _check(decoder: Decoder, fact: Fact, row: Row, remembers: bool) -> None:
    most = decoder.window - (decoder.spec.reference_length if remembers else 0)
    if not row.start or row.start == row.end or len(row.ids) > most:
        raise SourceError(
            f"found {row.end - row.start} answer tokens among {len(row.ids)} of fact {fact.id!r}, expected 1 or more, some before "
            f"them, and at most {most} in all: shorten the fact"
        )


# ---- what the model says itself ----


class _Kept:
    """A recall that brings the memories of one fact, whatever is asked."""

    min_score = None

    def __init__(self, texts: Sequence[str], memories: Sequence[Memory]) -> None:
        references = tuple(map(Reference, texts))
        self.recalled = Recalled("", tuple(Hit(r.id, 0.0) for r in references), tuple(memories), references)

    def check(self, decoder: Any) -> None:
        """They were written by the decoder itself."""

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        return [self.recalled for _ in queries]


def _said(decoder: Decoder, fact: Fact) -> tuple[str, ...]:
    texts = _references(decoder, fact)
    return _continued(decoder, fact, "", _Kept(texts, decoder.encode(texts)))


def _said_behind(decoder: Decoder, fact: Fact) -> tuple[str, ...]:
    return _continued(decoder, fact, _text_of(fact, TEXT), None)


def _continued(decoder: Decoder, fact: Fact, front: str, recall: _Kept | None) -> tuple[str, ...]:
    """The first line that the model goes on with for each realization, at most as many tokens as its longest answer."""
    prompts = [Prompt.of(decoder, front + realization.parts[0]) for realization in fact.realizations]
    most = [max(len(decoder.tokens(branch)) for branch in one.parts[1]) for one in fact.realizations]
    done = complete(decoder, prompts, recall=recall, config=_greedy(decoder), max_new_tokens=max(most))
    texts = [decoder.tokenizer.decode(c.ids[:n], skip_special_tokens=True) for c, n in zip(done, most, strict=True)]
    return tuple((str(text).strip().splitlines() or [""])[0].strip() for text in texts)


def _greedy(decoder: Decoder) -> Any:
    from copy import deepcopy

    config = deepcopy(decoder.model.generation_config)
    config.do_sample, config.temperature = False, None
    return config


# ---- tables and documents ----


def table(verdicts: Sequence[Verdict]) -> str:
    """A Markdown table: the share of separable facts per relation, with its interval, and by which prefix."""
    lines = [
        "| relation | facts | unknown | separable, % [95 % interval] | by text | by a realization | by memory | imitable | specific |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = {name: [v for v in verdicts if v.fact.relation == name] for name in relations([v.fact for v in verdicts])}
    groups = groups | ({"all": list(verdicts)} if len(groups) > 1 else {})
    return "\n".join([*lines, *(_row(name, some) for name, some in groups.items())])


def _row(name: str, verdicts: Sequence[Verdict]) -> str:
    values = [100.0 * v.separable for v in verdicts]
    low, high = interval(values)
    counts = [
        sum(TEXT in v.serving for v in verdicts),
        sum(any(prefix.startswith("realization") for prefix in v.serving) for v in verdicts),
        sum(MEMORY in v.serving for v in verdicts),
        sum(v.imitable for v in verdicts),
        sum(v.fact.specific for v in verdicts),
    ]
    share = f"{sum(values) / len(values):.1f} [{low:.1f}, {high:.1f}]"
    return f"| {name} | {len(verdicts)} | {sum(v.unknown for v in verdicts)} | {share} | {' | '.join(map(str, counts))} |"


def described(verdict: Verdict) -> str:
    """A few lines for people: the verdict of one fact, and the least probability of each realization behind each prefix."""
    names = [name for name in ("unknown", "separable", "imitable") if getattr(verdict, name)] or ["foretold without a prefix"]
    kind = "specific" if verdict.fact.specific else "abstract"
    lines = [f"{verdict.fact.id} ({verdict.fact.relation}, {kind}): {', '.join(names)}"]
    for prefix, steps in {"no prefix": verdict.without, **verdict.given}.items():
        served = " serves" if prefix in verdict.serving else ""
        least = "  ".join(_least(prefix, n, one) for n, one in enumerate(steps))
        lines.append(f"  {prefix:<15} {least}{served}".rstrip())
    for prefix, said in verdict.said.items():
        lines.append(f"  says behind {prefix}: {' | '.join(said)} ({'agree' if verdict.agree(prefix) else 'differ'})")
    return "\n".join(lines)


def _least(prefix: str, n: int, steps: Steps) -> str:
    return f"({min(steps):.3f})" if prefix == _named(n) else f" {min(steps):.3f} "


def document(verdicts: Sequence[Verdict], model: str) -> dict[str, Any]:
    """The JSON document of docs/json.md."""
    thresholds = verdicts[0].thresholds
    return {
        "model": model,
        "thresholds": {"without": thresholds.without, "given": thresholds.given},
        "facts": [_fact_document(v) for v in verdicts],
        "relations": [
            {
                "relation": name,
                "facts": len(some),
                "separable": sum(v.separable for v in some) / len(some),
                "imitable": sum(v.imitable for v in some) / len(some),
                "specific": sum(v.fact.specific for v in some) / len(some),
            }
            for name in relations([v.fact for v in verdicts])
            for some in [[v for v in verdicts if v.fact.relation == name]]
        ],
    }


def _fact_document(verdict: Verdict) -> dict[str, Any]:
    return {
        "id": verdict.fact.id,
        "relation": verdict.fact.relation,
        "specific": verdict.fact.specific,
        "unknown": verdict.unknown,
        "separable": verdict.separable,
        "imitable": verdict.imitable,
        "serving": list(verdict.serving),
        "itself": list(verdict.itself),
        "without": [list(steps) for steps in verdict.without],
        "given": {prefix: [list(steps) for steps in rows] for prefix, rows in verdict.given.items()},
        "said": {prefix: list(texts) for prefix, texts in verdict.said.items()},
        "agree": {prefix: verdict.agree(prefix) for prefix in verdict.said},
    }
