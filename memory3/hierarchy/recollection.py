"""How much of some references a model can say, with and without their memories, and how well it still foretells other text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

from memory3.decoder import Decoder
from memory3.hierarchy.phrasings import Subject, held_continuations, held_questions, plain_context
from memory3.scoring import interval
from memory3.train.convert import memory_logits, plain_logits
from memory3.train.passages import Context
from memory3.train.teaching import Batch

TOGETHER = 16
"""Contexts of one forward pass."""
Tell = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Recollection:
    """How well targets are foretold.

    Args:
        count: contexts with a target.
        probability: of a target token, the geometric mean over each target, and the mean over targets; `None` without any.
        probability_interval: its 95 % bootstrap interval.
        exact: share of targets that greedy decoding says token for token, the end of an answer included.
        exact_interval: its 95 % bootstrap interval.
    """

    count: int
    probability: float | None = None
    probability_interval: tuple[float, float] | None = None
    exact: float | None = None
    exact_interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, scores: Sequence[tuple[float, float]]) -> Recollection:
        """From `(probability, exact)` of each target."""
        if not scores:
            return cls(0)
        sure, exact = zip(*scores, strict=True)
        return cls(len(sure), sum(sure) / len(sure), interval(sure), sum(exact) / len(exact), interval(exact))


@dataclass(frozen=True)
class Recall:
    """Of the held wordings of questions, and of held beginnings of sentences."""

    questions: Recollection
    continuations: Recollection


def recall_of(decoder: Decoder, subjects: Sequence[Subject], *, memory: bool, tell: Tell = lambda done, total: None) -> Recall:
    """What a model says about references from its parameters alone, or with each one's memory (`memory`), encoded as it is now."""
    asked = [(s, c) for s in subjects for c in held_questions(decoder, s)]
    begun = [(s, c) for s in subjects for c in held_continuations(decoder, s)]
    scores = _scores(decoder, [*asked, *begun], memory, tell)
    return Recall(Recollection.of(scores[: len(asked)]), Recollection.of(scores[len(asked) :]))


@torch.no_grad()
def _scores(decoder: Decoder, rows: Sequence[tuple[Subject, Context]], memory: bool, tell: Tell) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    decoder.model.eval()
    for start in range(0, len(rows), TOGETHER):
        some = rows[start : start + TOGETHER]
        contexts = [context for _, context in some]
        logits = memory_logits(decoder, _own(some)) if memory else plain_logits(decoder, contexts)
        found += [_score(logits[n], context) for n, context in enumerate(contexts)]
        tell(len(found), len(rows))
    return found


def _own(rows: Sequence[tuple[Subject, Context]]) -> Batch:
    """Each context with the reference that it is about, and no other."""
    texts = list(dict.fromkeys(subject.text for subject, _ in rows))
    about = [texts.index(subject.text) for subject, _ in rows]
    return Batch(texts, [context for _, context in rows], about, [[n] for n in about])


def _score(logits: Tensor, context: Context) -> tuple[float, float]:
    """From logits `(L, V)`: probability and exactness of a target; the argmax behind its own tokens is what greedy decoding says."""
    foretold = logits[context.target_start - 1 : len(context.ids) - 1].float().log_softmax(-1)
    wanted = torch.tensor(context.ids[context.target_start :], device=logits.device)
    sure = float(foretold.gather(1, wanted[:, None]).mean())
    return exp(sure), float((foretold.argmax(-1) == wanted).all())


@torch.no_grad()
def loss_of(decoder: Decoder, texts: Sequence[str], length: int = 128) -> float:
    """Cross-entropy of texts in nats a token, read without memory, their first `length` tokens each."""
    contexts = [plain_context(decoder, text, length) for text in texts]
    lost, count = 0.0, 0
    decoder.model.eval()
    for start in range(0, len(contexts), TOGETHER):
        some = contexts[start : start + TOGETHER]
        logits = plain_logits(decoder, some)
        for row, context in zip(logits, some, strict=True):
            foretold = row[context.target_start - 1 : len(context.ids) - 1].float().log_softmax(-1)
            wanted = torch.tensor(context.ids[context.target_start :], device=row.device)
            lost -= float(foretold.gather(1, wanted[:, None]).sum())
            count += len(wanted)
    return lost / max(1, count)
