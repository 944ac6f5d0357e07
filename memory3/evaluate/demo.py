"""The demonstration: notes into a bank, ten questions with and without memory, one picture."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.table import Table

from memory3.answering import question_prompt
from memory3.bank import Bank
from memory3.decoder import Decoder
from memory3.embedding import SentenceEmbedder, offline_available
from memory3.evaluate.picture import draw_reading
from memory3.generation import Completion, complete
from memory3.manifest import MANIFEST
from memory3.recall import Recall
from memory3.scoring import exact_match
from memory3.spec import BankMismatch, SourceError
from memory3.splitting import references
from memory3.writing import write


@dataclass(frozen=True)
class Asked:
    """A question, what is accepted, and both answers."""

    question: str
    answers: tuple[str, ...]
    remembered: Completion
    closed: Completion


def run_demo(decoder: Decoder, notes: Path, questions: Path, bank_path: Path, picture: Path) -> list[Asked]:
    """Write, ask, print the table, draw. Raises `SourceError` where the examples are missing."""
    console = Console(width=110)
    if not questions.is_file():
        raise SourceError(f"found no {questions}, expected the demo's questions: run it in the folder of the project")
    with _demo_bank(bank_path, decoder) as bank:
        report = write(decoder, references(notes, decoder), bank)
        console.print(
            f"{report.references} references written to {bank_path}, {report.skipped} known already: "
            f"{report.bytes_per_reference:,} bytes each, {report.seconds:.1f} s"
        )
        asked = ask_all(decoder, questions, Recall(bank))
    console.print(_table(asked))
    right = [
        sum(exact_match(c.text.strip(), a.answers) for a in asked for c in [getattr(a, kind)])
        for kind in ("remembered", "closed")
    ]
    console.print(f"right: {right[0]:.0f} of {len(asked)} with memory, {right[1]:.0f} without")
    shown = next((a for a in asked if exact_match(a.remembered.text.strip(), a.answers)), asked[0])
    draw_reading(decoder, shown.question, shown.remembered, picture)
    console.print(f"what the answer to {shown.question!r} read: {picture}")
    return asked


def _demo_bank(path: Path, decoder: Decoder) -> Bank:
    """The bank of an earlier run, or a new one where there is none, or where another model or spec wrote it; with vectors where
    the offline embedder is installed.
    """
    embedder = SentenceEmbedder() if offline_available() else None
    try:
        return Bank(path, decoder) if (path / MANIFEST).exists() else Bank(path, decoder, create=True, embedder=embedder)
    except BankMismatch:
        Bank(path)  # a bank indeed, not a folder of something else
        shutil.rmtree(path)
        return Bank(path, decoder, create=True, embedder=embedder)


def ask_all(decoder: Decoder, questions: Path, recall: Recall) -> list[Asked]:
    """Every question with memory and closed book."""
    rows = [json.loads(line) for line in questions.read_text("utf-8").splitlines() if line.strip()]
    prompts = [question_prompt(decoder, row["question"]) for row in rows]
    remembered = complete(decoder, prompts, recall=recall, effect=True, max_new_tokens=24)
    closed = complete(decoder, prompts, max_new_tokens=24)
    return [Asked(r["question"], tuple(r["answers"]), m, c) for r, m, c in zip(rows, remembered, closed, strict=True)]


def _table(asked: list[Asked]) -> Table:
    table = Table(title="ten questions", title_justify="left")
    for name in ("question", "with memory", "without", "read from", "logit shift"):
        table.add_column(name, overflow="fold")
    for a in asked:
        effect = a.remembered.effect
        cited = effect.citations[0] if effect and effect.citations else None
        source = f"{Path(cited.reference.source).name} {cited.share:.0%}" if cited else "-"
        table.add_row(
            a.question,
            _marked(a.remembered, a.answers),
            _marked(a.closed, a.answers),
            source,
            f"{effect.logit_shift:.2f}" if effect else "-",
        )
    return table


def _marked(completion: Completion, answers: tuple[str, ...]) -> str:
    said = shorten(completion.text, 40, placeholder=" …")
    return f"{'✓' if exact_match(completion.text.strip(), answers) else '✗'} {said}"
