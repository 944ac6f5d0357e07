"""Answers from references that are found among all passages, beside those that are given: what a user gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from memory3.decoder import Decoder
from memory3.embedding import Embedder
from memory3.evaluate.outcomes import Outcome, table
from memory3.evaluate.reading import Case, Score, dev_cases, mixed, score_of, short_cases
from memory3.evaluate.retrieval import Tables, whole_tables
from memory3.retrieval import RETRIEVERS
from memory3.spec import SpecError

CLOSED, FOUND = "closed book", "sparse memory, found references"
_SEARCHED_AT_ONCE = 64


@dataclass(frozen=True)
class Findings:
    """The references of each case, and what was answered from them.

    Args:
        texts: for each case the texts of its references, best first.
        holding: whether one of them holds an answer.
        scores: of each way to give them, over the same cases.
    """

    texts: tuple[tuple[str, ...], ...]
    holding: tuple[bool, ...]
    scores: tuple[Score, ...]

    def outcomes(self) -> list[Outcome]:
        """The rows, with what a question reads in each."""
        mean = sum(map(len, self.texts)) / len(self.texts)
        return [score.outcome(0.0 if score.name == CLOSED else mean) for score in self.scores]


def found_texts(tables: Tables, cases: Sequence[Case], retriever: str, count: int) -> list[tuple[str, ...]]:
    """The `count` best references of each case's question, as texts."""
    if retriever not in RETRIEVERS:
        raise SpecError(f"found retriever {retriever!r}, expected one of {', '.join(RETRIEVERS)}")
    finder, found = RETRIEVERS[retriever](tables), []
    for start in range(0, len(cases), _SEARCHED_AT_ONCE):
        hits = finder.search([case.question for case in cases[start : start + _SEARCHED_AT_ONCE]], count)
        known = tables.catalogue.references({hit.id for row in hits for hit in row})
        found += [tuple(dict.fromkeys(known[hit.id][0].text for hit in row)) for row in hits]
    return found


def findings(
    decoder: Decoder, cases: Sequence[Case], texts: Sequence[tuple[str, ...]], tell: Callable[[int, int], None] | None = None
) -> Findings:
    """Answer every case closed book, from the references found for it as sparse and dense memory and as text, from those
    found for another question that do not hold its answer, and from its gold reference among four others.
    """
    own, wrong = dict(zip(map(id, cases), texts, strict=True)), dict(zip(map(id, cases), _wrong(cases, texts), strict=True))
    dense = decoder.using(replace(decoder.spec, tokens_per_head=None))

    def given(case: Case) -> Sequence[str]:
        return own[id(case)]

    scores = (
        score_of(CLOSED, decoder, cases, None, tell=tell),
        score_of("text in the prompt, found references", decoder, cases, given, as_text=True, tell=tell),
        score_of("dense memory, found references", dense, cases, given, tell=tell),
        score_of(FOUND, decoder, cases, given, tell=tell),
        score_of("sparse memory, those found for another", decoder, cases, lambda case: wrong[id(case)], tell=tell),
        score_of("sparse memory, gold among four others", decoder, cases, mixed, tell=tell),
    )
    holding = tuple(_held(case, row) for case, row in zip(cases, texts, strict=True))
    return Findings(tuple(texts), holding, scores)


def _wrong(cases: Sequence[Case], texts: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """For each case what was found for the next one that shares none of its references or answers."""
    found = []
    for n, case in enumerate(cases):
        following = (texts[(n + step) % len(cases)] for step in range(1, len(cases)))
        found.append(next((row for row in following if row and not set(row) & set(texts[n]) and not _held(case, row)), ()))
    return found


def _held(case: Case, row: Sequence[str]) -> bool:
    return any(answer in text for text in row for answer in case.answers)


def measure_found(
    decoder: Decoder,
    data: Path,
    work: Path,
    embedder: Embedder,
    retriever: str = "hybrid",
    limit: int = 300,
    count: int | None = None,
    seed: int = 0,
    tell: Callable[[int, int], None] | None = None,
) -> Findings:
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
    tables = Tables(catalogue, embedder, decoder)
    texts = found_texts(tables, cases, retriever, count or decoder.spec.references_per_chunk)
    made = findings(decoder, cases, texts, tell)
    print(
        f"{len(catalogue):,} references; {sum(made.holding)} of {len(cases)} questions find one that holds an answer ({retriever})"
    )
    print(table(made.outcomes(), [FOUND, CLOSED]))
    return made
