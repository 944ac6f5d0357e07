"""Benchmarks in every arm: questions with answers or choices, FACTOR, HaluEval and held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from memory3.decoder import Decoder
from memory3.evaluate.arms import CLOSED, SPARSE, Arm, arms, quantising_codecs, side_by_side, untrained_of
from memory3.evaluate.asking import QUESTION_OF, YES_NO, Question, questions, split_of
from memory3.evaluate.given import Brought, Tell, gold_among_others, retrieved
from memory3.evaluate.likelihood import asked_by_chunks, by_chunk, chosen, foretold, passages
from memory3.evaluate.outcomes import Outcome, table
from memory3.evaluate.reading import Case, score_of
from memory3.reader import BankReader
from memory3.recall import EVALUATION_OVERLAP
from memory3.spec import SourceError

TASKS = (*QUESTION_OF, "lm")


@dataclass(frozen=True)
class Settings:
    """What an evaluation is run with.

    Args:
        source: file, folder or `hub:NAME`, see `asking.rows`.
        banks: opened with the decoder; empty where gold is given.
        gold: the passage of each row among those of other rows, instead of what the banks bring.
        retriever: row of `RETRIEVERS`; by default that of `Recall`.
        count: references of a question, or of a chunk of `lm`; by default the spec's.
        max_overlap: references that repeat more of themselves from the question are dropped; `None` keeps all.
        split: only rows of this `split`; by default all but those of `train`.
        datasets: only rows whose `dataset` is one of these.
        limit: most questions, or stretches of text.
        length: tokens of a stretch of `lm`.
        seed: of the order and of the choice of others.
        untrained: model that training began with; `random` takes random weights of the same shape, `None` leaves the row out.
    """

    source: str
    banks: Sequence[BankReader] = ()
    gold: bool = False
    retriever: str | None = None
    count: int | None = None
    max_overlap: float | None = EVALUATION_OVERLAP
    split: str | None = None
    datasets: Sequence[str] = ()
    limit: int | None = None
    length: int = 512
    seed: int = 0
    untrained: str | None = "random"

    def facts(self) -> dict[str, Any]:
        """As JSON values, for whoever has to repeat it: banks by their address, everything else as it was given."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("banks", "datasets")}
        return plain | {"banks": [bank.address for bank in self.banks], "datasets": list(self.datasets)}


def answered(
    arm: Arm, asked: Sequence[Question], brought: Sequence[Brought], tell: Tell | None = None
) -> dict[str, list[float]]:
    """Exact match and F1 of greedy answers, of at most 24 tokens and one line."""
    cases = [Case(q.dataset, q.text, q.answers, "", arm.texts(b)) for q, b in zip(asked, brought, strict=True)]
    given = None if arm.brings == "nothing" else _others
    score = score_of(arm.name, arm.decoder, cases, given, as_text=arm.as_text, encode=arm.encode, tell=tell)
    return {"exact match": list(score.exacts), "f1": list(score.f1s)}


def _others(case: Case) -> Sequence[str]:
    return case.others


def measure_arms(task: str, decoder: Decoder, settings: Settings, tell: Callable[[int, int | None], None]) -> list[Outcome]:
    """Run a benchmark in every arm.

    `qa` with accepted answers gives exact match and F1; `qa` with choices, `factor` and `halueval` give accuracy by the mean
    log-probability per token; `lm` gives bits per byte and per token.

    Args:
        task: one of `TASKS`.
        decoder: trained, under its own spec.
        settings: data, references and controls.
        tell: told of steps done.

    Raises:
        SourceError: an unknown task, data that cannot be read, or nothing that references could come from.
    """
    if task not in TASKS:
        raise SourceError(f"found eval {task!r}, expected one of {', '.join(TASKS)}")
    if not settings.banks and not settings.gold:
        raise SourceError(
            "found no bank and no --gold, expected where references come from: give --bank, or --gold for rows with a passage"
        )
    if settings.banks and settings.gold:
        raise SourceError("found both a bank and --gold, expected one of them: they are two measurements")
    start = None if settings.untrained == "random" else settings.untrained
    control = None if settings.untrained is None else untrained_of(decoder, start, settings.seed)
    every = arms(decoder, untrained=control, codecs=quantising_codecs(decoder, settings.banks))
    return (_text if task == "lm" else _questions)(task, decoder, settings, every, tell)


def _questions(task: str, decoder: Decoder, settings: Settings, every: list[Arm], tell: Tell) -> list[Outcome]:
    s = settings
    asked = _of_one_kind(questions(s.source, task, split=s.split, datasets=s.datasets, limit=s.limit, seed=s.seed))
    if s.gold:
        asked, brought = gold_among_others(decoder, asked, count=s.count, max_overlap=s.max_overlap, seed=s.seed, tell=tell)
    else:
        brought = _retrieved(decoder, asked, s, tell)
    if len({bool(q.choices) for q in asked}) > 1:
        raise SourceError(f"found questions with and without choices in {s.source}, expected one kind: choose with --dataset")
    if asked[0].choices:
        return side_by_side(every, brought, lambda arm, told: {"accuracy": chosen(arm, asked, brought, told)}, tell)
    return side_by_side(every, brought, lambda arm, told: answered(arm, asked, brought, told), tell)


def _of_one_kind(asked: list[Question]) -> list[Question]:
    """Among questions that are answered freely, those that happen to have "yes" or "no" for an answer are so too."""
    if all(q.choices for q in asked):
        return asked
    return [
        replace(q, choices=(), right=0, answers=q.answers or (YES_NO[q.right],)) if q.choices == YES_NO else q for q in asked
    ]


def _text(task: str, decoder: Decoder, settings: Settings, every: list[Arm], tell: Tell) -> list[Outcome]:
    if settings.gold:
        raise SourceError("found --gold for lm, expected --bank: held-out text has no passage that answers it")
    stretches = passages(decoder, _texts(settings), length=settings.length, limit=settings.limit, seed=settings.seed)
    brought = _retrieved(decoder, asked_by_chunks(decoder, stretches), settings, tell)
    reads = by_chunk(decoder, stretches, brought)
    return side_by_side(every, brought, lambda arm, told: foretold(arm, stretches, reads, told), tell)


def _texts(settings: Settings) -> Iterator[str]:
    for where, row in split_of(settings.source, settings.split):
        if not isinstance(row.get("text"), str):
            raise SourceError(f"{where} has no text among {', '.join(row)}, expected a column text")
        yield row["text"]


def _retrieved(decoder: Decoder, asked: Sequence[Question], s: Settings, tell: Tell) -> list[Brought]:
    return retrieved(s.banks, asked, retriever=s.retriever, count=s.count, max_overlap=s.max_overlap, tell=tell)


def report(task: str, settings: Settings, outcomes: Sequence[Outcome], out: Path | None = None) -> str:
    """The Markdown table of some outcomes, with differences to sparse memory and to closed book; a picture where `out` says."""
    if out is not None:
        from memory3.evaluate.picture import draw_arms

        came = "gold among others" if settings.gold else f"recalled from {', '.join(b.address for b in settings.banks)}"
        draw_arms(outcomes, f"{task} on {Path(settings.source).name}, references {came}", out)
    return table(outcomes, (SPARSE, CLOSED))
