"""Which attention heads find references? Measured on train questions, chosen one after the other (design 3, Remark 2)."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memory3.catalogue import FOLDER, Catalogue, Entry
from memory3.decoder import Decoder
from memory3.evaluate.reading import document_of, shuffled_questions
from memory3.evaluate.retrieval import Question, references_of, right_references
from memory3.internal import Attention
from memory3.scoring import interval
from memory3.spec import SourceError

CANDIDATES = 30
"""References that the words find, and heads rank."""
_DOCUMENTS = 3000
_LEAST_GAIN = 2e-3
_MOST_HEADS = 8
Head = tuple[int, int]


@dataclass(frozen=True)
class Ranking:
    """One question: scores `(CANDIDATES,)` of each head, and which candidates are right."""

    scores: dict[Head, Tensor]
    words: Tensor
    right: tuple[bool, ...]

    def reciprocal(self, heads: Sequence[Head]) -> float:
        """1 / rank of the first right candidate by the sum over heads; by words where there is no head."""
        total = torch.stack([self.scores[head] for head in heads]).sum(0) if heads else self.words
        order = total.argsort(descending=True, stable=True).tolist()
        return 1 / (1 + next(n for n, place in enumerate(order) if self.right[place]))


def measure_heads(
    decoder: Decoder, data: Path, limit: int, out: Path | None, seed: int, tell: Callable[[int, int | None], None]
) -> list[Head]:
    """Print what each head is worth, choose heads on one half of the questions, and show them on the other; write them to `out`."""
    rankings = _rankings(decoder, data, limit, seed, tell)
    if len(rankings) < 2:
        raise SourceError(
            f"found {len(rankings)} questions whose reference the words find, expected some: give a larger --limit"
        )
    first, second = rankings[::2], rankings[1::2]
    print("| heads | questions | MRR [95 % interval] |\n|---|---|---|")
    for head in rankings[0].scores:
        print(_row(f"layer {head[0]}, query head {head[1]}", rankings, [head]))
    chosen = choose(first)
    print(_row(f"chosen: {', '.join(f'{layer}.{head}' for layer, head in chosen)}, other half", second, chosen))
    print(_row("all heads, other half", second, list(rankings[0].scores)))
    print(_row("words alone, other half", second, []))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(chosen) + "\n", "utf-8")
    return chosen


def choose(rankings: Sequence[Ranking]) -> list[Head]:
    """Heads in the order in which each adds most to the mean reciprocal rank, until none adds anything."""
    chosen: list[Head] = []
    reached = 0.0
    while len(chosen) < _MOST_HEADS:
        left = [head for head in rankings[0].scores if head not in chosen]
        worth = {head: sum(r.reciprocal([*chosen, head]) for r in rankings) / len(rankings) for head in left}
        best = max(worth, key=worth.__getitem__, default=None)
        if best is None or worth[best] < reached + _LEAST_GAIN:
            return chosen
        chosen.append(best)
        reached = worth[best]
    return chosen


def _row(name: str, rankings: Sequence[Ranking], heads: Sequence[Head]) -> str:
    values = [ranking.reciprocal(heads) for ranking in rankings]
    low, high = interval(values)
    return f"| {name} | {len(values)} | {sum(values) / len(values):.3f} [{low:.3f}, {high:.3f}] |"


def _rankings(decoder: Decoder, data: Path, limit: int, seed: int, tell: Callable[[int, int | None], None]) -> list[Ranking]:
    rows = shuffled_questions(data, "train", random.Random(seed))
    documents = {str(n): document_of(row["title"], row["passage"]) for n, row in enumerate(rows[:_DOCUMENTS])}
    questions = [
        Question(row["dataset"], row["question"].strip(), tuple(a.strip() for a in row["answers"] if a.strip()), str(n))
        for n, row in enumerate(rows[: min(limit, _DOCUMENTS)])
    ]
    tokenizer, length = decoder.tokenizer, decoder.spec.reference_length
    references = list({r.id: r for r in references_of(documents, list(documents), tokenizer, length)}.values())
    texts = {reference.id: reference.text for reference in references}
    attention, found = Attention(decoder, []), []
    with tempfile.TemporaryDirectory() as folder:
        catalogue = Catalogue(Path(folder, FOLDER), create=True)
        catalogue.add_memories([Entry(reference, 1, (0, 0)) for reference in references])
        catalogue.optimise()
        for n, (question, right) in enumerate(
            zip(questions, right_references(questions, documents, tokenizer, length), strict=True)
        ):
            hits = catalogue.search(question.text, CANDIDATES)
            if any(hit.id in right for hit in hits):
                scores = attention.by_head(question.text, decoder.encode([texts[hit.id] for hit in hits]))
                words = torch.tensor([hit.score for hit in hits])
                found.append(Ranking(scores, words, tuple(hit.id in right for hit in hits)))
            tell(n + 1, len(questions))
    return found
