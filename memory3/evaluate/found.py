"""Answers from references that are found among all passages, in every arm, beside gold ones that are given: what a user gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from memory3.decoder import Decoder
from memory3.embedding import Embedder
from memory3.evaluate.arms import CLOSED, SPARSE, Arm, arms, side_by_side
from memory3.evaluate.asking import Question
from memory3.evaluate.given import BATCH, Brought, Tell, holds, with_wrong
from memory3.evaluate.outcomes import Outcome, table
from memory3.evaluate.qa import answered
from memory3.evaluate.reading import Case, dev_cases, mixed, score_of, short_cases
from memory3.evaluate.retrieval import Tables, whole_tables
from memory3.retrieval import RETRIEVERS
from memory3.spec import SpecError

GOLD = f"{SPARSE}, gold among others instead"


def measure_found(
    decoder: Decoder,
    data: Path,
    work: Path,
    embedder: Embedder,
    retriever: str = "hybrid",
    limit: int = 300,
    count: int | None = None,
    seed: int = 0,
    tell: Callable[[int, int | None], None] = lambda done, total: None,
) -> list[Outcome]:
    """Print how often the references found hold an answer, and a Markdown table of the answers with paired differences.

    Args:
        decoder: answers; the references may have been cut by another tokenizer, they are texts.
        data: folder of `qa.parquet`.
        work: tables of `memory3 eval retrieval`.
        count: references of a question; by default the spec's.

    Raises:
        SourceError: there are no finished tables in `work`, or no questions.
        SpecError: an unknown retriever, or vectors of another embedder.
    """
    catalogue = whole_tables(work, embedder)
    cases = short_cases(decoder, dev_cases(decoder, data, limit, seed))
    asked = [Question(dataset=c.dataset, text=c.question, answers=c.answers) for c in cases]
    brought = found_for(asked, Tables(catalogue, embedder, decoder), retriever, count or decoder.spec.references_per_chunk)

    def scored(arm: Arm, told: Tell) -> dict[str, list[float]]:
        return answered(arm, asked, brought, told)

    outcomes = [*side_by_side(arms(decoder), brought, scored, tell), gold_of(decoder, cases)]
    right = sum(any(holds(text, q.quoted) for text in b.right) for q, b in zip(asked, brought, strict=True))
    print(f"{len(catalogue):,} references; {right} of {len(asked)} questions find one that holds an answer ({retriever})")
    print(table(outcomes, [SPARSE, CLOSED]))
    return outcomes


def found_for(asked: Sequence[Question], tables: Tables, retriever: str, count: int) -> list[Brought]:
    """The `count` best references of each question, best first, and as a control those found for others."""
    if retriever not in RETRIEVERS:
        raise SpecError(f"found retriever {retriever!r}, expected one of {', '.join(RETRIEVERS)}")
    finder, found = RETRIEVERS[retriever](tables), list[tuple[str, ...]]()
    for start in range(0, len(asked), BATCH):
        hits = finder.search([q.text for q in asked[start : start + BATCH]], count)
        known = tables.catalogue.references({hit.id for row in hits for hit in row})
        found += [tuple(dict.fromkeys(known[hit.id][0].text for hit in row)) for row in hits]
    return with_wrong(asked, found)


def gold_of(decoder: Decoder, cases: Sequence[Case]) -> Outcome:
    """The same questions with their gold reference given among those of others: what better search could bring."""
    return score_of(GOLD, decoder, cases, mixed).outcome(sum(len(mixed(c)) for c in cases) / len(cases))
