"""References for questions: what a bank brings, or gold among others; and as a control those of another question."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memory3.decoder import Decoder
from memory3.evaluate.asking import Question
from memory3.evaluate.reading import among, document_of, to_gold
from memory3.reader import BankReader
from memory3.recall import EVALUATION_OVERLAP, Recall
from memory3.scoring import normalised
from memory3.spec import SourceError
from memory3.splitting import overlap, split

BATCH = 64
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Brought:
    """What comes with one question: its own references, and as a control those brought to another question."""

    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


def retrieved(
    banks: BankReader | Sequence[BankReader],
    questions: Sequence[Question],
    *,
    retriever: str | None = None,
    count: int | None = None,
    max_overlap: float | None = EVALUATION_OVERLAP,
    tell: Tell | None = None,
) -> list[Brought]:
    """What a bank brings to each question: one search with the whole question, whatever its length.

    Args:
        banks: opened with the decoder.
        questions: asked with `text`; the overlap filter compares with `whole`.
        retriever: row of `RETRIEVERS`; by default that of `Recall`.
        count: references of a question; by default the spec's.
        max_overlap: references that repeat more of their own tokens from the question are dropped; `None` keeps all.
        tell: told of questions done.
    """
    recall = Recall(banks, retriever=retriever, count=count, max_overlap=max_overlap, cache_bytes=0, counted=False)
    found: list[tuple[str, ...]] = []
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        recalled = recall([q.text for q in batch], [q.whole or q.text for q in batch])
        found += [tuple(dict.fromkeys(r.text for r in one.references)) for one in recalled]
        if tell:
            tell(len(found), len(questions))
    return with_wrong(questions, found)


def gold_among_others(
    decoder: Decoder,
    questions: Sequence[Question],
    *,
    count: int | None = None,
    max_overlap: float | None = EVALUATION_OVERLAP,
    seed: int = 0,
    tell: Tell | None = None,
) -> tuple[list[Question], list[Brought]]:
    """Questions whose passage can be given, and for each its gold reference among those of other questions.

    Gold is the first reference of the passage that holds an answer, or the whole passage where nothing has to be quoted (a
    question with choices, or one that is answered with yes or no). Others do not hold an answer. Questions without gold are left out.

    Args:
        decoder: splits passages.
        questions: with their passages.
        count: references of a question, gold included; by default the spec's.
        max_overlap: as of `retrieved`.
        seed: of the choice of others.
        tell: told of questions done.

    Raises:
        SourceError: no question has a passage that holds its answer.
    """
    wanted, kept, golds = decoder.spec.references_per_chunk if count is None else count, [], []
    for n, question in enumerate(questions, 1):
        if gold := _gold(decoder, question)[:wanted]:
            kept.append(question)
            golds.append(gold)
        if tell:
            tell(n, len(questions))
    if not kept:
        raise SourceError("found no passage that holds its answer, expected some: give rows with a passage, or --bank")
    rng, pool = random.Random(seed), list(dict.fromkeys(g[0] for g in golds))
    given = []
    for question, gold in zip(kept, golds, strict=True):
        others = [o for o in rng.sample(pool, min(len(pool), 8 * wanted)) if o not in gold and not holds(o, question.quoted)]
        mixed = among(question.text, gold, others[: wanted - len(gold)])
        given.append(tuple(t for t in mixed if max_overlap is None or _overlap(decoder, question, t) <= max_overlap))
    return kept, with_wrong(kept, given)


def _gold(decoder: Decoder, question: Question) -> list[str]:
    document = document_of(question.title, question.passage) if question.passage else ""
    if question.quoted and not question.choices:
        return to_gold(decoder, document, question.quoted)[-1:]
    return [p.text for p in split(document, decoder.tokenizer, length=decoder.spec.reference_length)]


def _overlap(decoder: Decoder, question: Question, text: str) -> float:
    return overlap(decoder.tokens(question.whole or question.text), decoder.tokens(text))


def holds(text: str, answers: Sequence[str]) -> bool:
    """Whether a text holds an accepted answer, word by word after normalisation."""
    words = f" {normalised(text)} "
    return any(f" {normalised(a)} " in words for a in answers if normalised(a))


def with_wrong(questions: Sequence[Question], given: Sequence[tuple[str, ...]]) -> list[Brought]:
    """Beside each question's references as many of the next questions', as far as there are so many.

    None is one that the question has itself or that holds its answer, and none was brought to another part of its own `whole`.
    """
    found = []
    for n, (question, own) in enumerate(zip(questions, given, strict=True)):
        following = ((n + place) % len(given) for place in range(1, len(given)))
        others = (text for m in following if not _of_one_text(question, questions[m]) for text in given[m])
        wrong: list[str] = []
        for text in others:
            if len(wrong) == len(own):
                break
            if text not in own and text not in wrong and not holds(text, question.quoted):
                wrong.append(text)
        found.append(Brought(own, tuple(wrong)))
    return found


def _of_one_text(one: Question, other: Question) -> bool:
    return bool(one.whole) and one.whole == other.whole
