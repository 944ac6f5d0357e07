"""Which constant of reciprocal rank fusion? Measured on train questions, for `RRF` of memory3.retrieval."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from memory3.catalogue import Hit
from memory3.decoder import Decoder
from memory3.embedding import Embedder
from memory3.evaluate.retrieval import TOGETHER, documents_and_questions, fingerprint, right_references, whole_tables
from memory3.retrieval import FUSED, fused
from memory3.scoring import interval

CONSTANTS = (1, 2, 3, 5, 10, 20, 60)


def measure_fusion(
    decoder: Decoder, data: Path, work: Path, embedder: Embedder, limit: int, seed: int, tell: Callable[[int, int | None], None]
) -> dict[int, float]:
    """Print recall@5 of each constant on `limit` train questions of `TOGETHER`, over the tables of `memory3 eval retrieval`.

    Raises:
        SourceError, SpecError: as of `whole_tables`.
    """
    tokenizer, length = decoder.tokenizer, decoder.spec.reference_length
    documents, questions = documents_and_questions(data, "train")
    catalogue = whole_tables(work, embedder, fingerprint(documents, tokenizer, length))
    questions = [question for question in questions if question.dataset in TOGETHER]
    random.Random(seed).shuffle(questions)
    questions = questions[:limit]
    right = right_references(questions, documents, tokenizer, length)
    vectors = embedder.embed([question.text for question in questions], query=True)
    lists: list[tuple[list[Hit], list[Hit]]] = []
    for question, vector in zip(questions, vectors, strict=True):
        lists.append((catalogue.search(question.text, FUSED), catalogue.nearest(vector[None], FUSED)[0]))
        tell(len(lists), len(questions))
    found = {}
    print("| constant | questions | recall@5 [95 % interval] |\n|---|---|---|")
    for constant in CONSTANTS:
        hits = [
            float(any(hit.id in wanted for hit in fused(both, 5, constant))) for both, wanted in zip(lists, right, strict=True)
        ]
        low, high = interval(hits)
        found[constant] = sum(hits) / len(hits)
        print(f"| {constant} | {len(hits)} | {found[constant]:.3f} [{low:.3f}, {high:.3f}] |")
    return found
