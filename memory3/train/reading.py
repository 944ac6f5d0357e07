"""Teach a small model to read memory: references in memory, questions and completions about them in the context.

Source of the order of things: design section 4. Memory is dense at first (all tokens), references keep a language
modelling loss, and the kept tokens are thinned out once the model reads.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memory3.answering import QUESTION
from memory3.attention import Reading
from memory3.decoder import Decoder

SNIPPET = 32
"""A reference of fewer tokens is cut around the answer, without regard to sentences."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(A-Z0-9])")
_SPAN = re.compile(r"\b(?:[A-Z][\w'-]+(?: (?:of|the|de|and|von|[A-Z][\w'-]+)){0,2}|\d[\d,.]*\d|\d|[a-z]{5,})\b")


@dataclass(frozen=True)
class Passage:
    """A text to be put in memory, and the questions it answers."""

    title: str
    text: str
    questions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Phase:
    """How the mixture looks up to a step. Shares and slots are `(value, weight)` pairs.

    `longest` is the range that the most tokens of a reference are drawn from: where an answer stands is learned sooner in
    a sentence or two than in a full reference.
    """

    until: int
    references: tuple[tuple[int, float], ...]
    slots: tuple[tuple[int | None, float], ...]
    tasks: tuple[tuple[str, float], ...]
    reference_loss: float
    question_passages: float
    text_share: float = 0.0
    closed_share: float = 0.05
    batch: int = 16
    contexts: int = 2
    longest: tuple[int, int] = (128, 128)


@dataclass(frozen=True)
class Batch:
    """References as token ids, contexts with the place where their target starts, and the reference each is about."""

    references: list[list[int]]
    contexts: list[list[int]]
    target_starts: list[int]
    about: list[int]
    read: int
    slots: int | None
    mode: str


class ReadingObjective:
    """Questions, clozes and completions on references in memory.

    Args:
        decoder: gives tokenizer and lengths; its spec's tokens per head are set by the phase.
        asked: passages with questions; plain: passages without.
    """

    def __init__(
        self, decoder: Decoder, asked: Sequence[Passage], plain: Sequence[Passage], phases: Sequence[Phase], seed: int = 0
    ):
        self.decoder, self.asked, self.plain, self.phases, self.seed = decoder, asked, plain, phases, seed
        self.eos = int(decoder.tokenizer.eos_token_id)

    def phase(self, step: int) -> Phase:
        """The phase a step belongs to; the last one goes on."""
        return next((p for p in self.phases if step < p.until), self.phases[-1])

    def batch(self, step: int) -> Batch:
        """The batch of a step, drawn from `(seed, step)`."""
        phase, rng = self.phase(step), random.Random(self.seed * 1_000_003 + step)
        references: list[list[int]] = []
        contexts: list[tuple[list[int], int]] = []
        about: list[int] = []
        while len(references) < phase.batch:
            pool = self.asked if rng.random() < phase.question_passages else self.plain
            passage = pool[rng.randrange(len(pool))]
            text, tasks = self._drawn(passage, phase, rng)
            if not tasks:
                continue
            ids = self.decoder.tokens(text)[: self.decoder.spec.reference_length]
            contexts += tasks
            about += [len(references)] * len(tasks)
            references.append(ids)
        draw = rng.random()
        mode = "text" if draw < phase.text_share else "closed" if draw < phase.text_share + phase.closed_share else "memory"
        read = min(_drawn(phase.references, rng), len(references))
        return Batch(
            references, [c for c, _ in contexts], [t for _, t in contexts], about, read, _drawn(phase.slots, rng), mode
        )

    def _drawn(self, passage: Passage, phase: Phase, rng: random.Random) -> tuple[str, list[tuple[list[int], int]]]:
        """One form of the passage that fits into a reference, and contexts about it."""
        question = rng.choice(passage.questions) if passage.questions else None
        text = window(self.decoder, passage, question[1] if question else None, rng, rng.randint(*phase.longest))
        tasks = []
        for n in range(phase.contexts):
            kind = _drawn(phase.tasks, rng)
            if question is not None and (n == 0 or kind == "question"):
                made = self._question(*rng.choice(passage.questions) if n else question, text)
            elif kind == "completion":
                made = self._completion(text, rng)
            else:
                made = self._cloze(text, rng)
            if made is not None:
                tasks.append(made)
        return text, tasks

    def _context(self, prompt: str, target: str, end: bool = True) -> tuple[list[int], int] | None:
        prompt_ids = self.decoder.context(prompt)
        ids = prompt_ids + self.decoder.tokens(target) + ([self.eos] if end else [])
        if len(prompt_ids) >= 60:
            return None
        return ids[: self.decoder.spec.chunk_length], len(prompt_ids)

    def _question(self, question: str, answer: str, text: str) -> tuple[list[int], int] | None:
        if answer not in text:
            return None
        return self._context(QUESTION.format(question=question), f" {answer}")

    def _cloze(self, text: str, rng: random.Random) -> tuple[list[int], int] | None:
        """`Question: <sentence with a gap>?`"""
        sentences = [s for s in _SENTENCE.split(text) if 4 <= len(s.split()) <= 35]
        if not sentences:
            return None
        sentence = rng.choice(sentences).strip()
        spans = list(_SPAN.finditer(sentence))
        if not spans:
            return None
        marked = [s for s in spans if not s.group().islower()]
        span = rng.choice(marked if marked and rng.random() < 0.8 else spans)
        left, right = sentence[: span.start()].split(), sentence[span.end() :].split()
        # A shortened clue asks for reading by meaning rather than for a word by word match.
        left, right = left[-rng.randint(2, 10) :], right[: rng.randint(1, 8)]
        gapped = " ".join([*left, "what", *right]).rstrip(".,;: ")
        return self._context(QUESTION.format(question=gapped + "?"), f" {span.group()}")

    def _completion(self, text: str, rng: random.Random) -> tuple[list[int], int] | None:
        words = text.split(" ")
        if len(words) < 16:
            return None
        start = rng.randrange(0, len(words) - 12)
        given = rng.randint(1, 4)
        return self._context(
            " ".join(words[start : start + given]), " " + " ".join(words[start + given : start + 50]), end=False
        )

    def loss(self, decoder: Decoder, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of targets, plus the reference's own at the phase's weight."""
        phase = self.phase(step)
        if batch.mode == "text":
            return self._text_loss(decoder, batch, step)
        view = decoder.using(replace(decoder.spec, tokens_per_head=batch.slots))
        layout = view.layout(batch.contexts, padding_side="right")
        reading, reference_loss = None, torch.zeros(())
        if batch.mode == "memory":
            stack, states = view.stack_with_states(batch.references, through=phase.reference_loss > 0)
            if states is not None:
                reference_loss = _reference_loss(view, states, batch.references)
            table = self._table(batch, step).to(view.device)
            reading = Reading(stack, table, layout.chunks, view.spec)
        states = view.forward(layout, reading, base=True, use_cache=False).last_hidden_state
        target_loss, found = _target_loss(view, states, layout.input_ids, batch, len(view.prefix_ids), self.eos)
        figures = {f"{batch.mode}_{name}": value for name, value in [("target", float(target_loss.detach())), *found.items()]}
        if batch.mode == "memory":
            figures[f"exact_{batch.slots or 'all'}x{batch.read}"] = found["exact"]
            figures["reference"] = float(reference_loss.detach())
        return target_loss + phase.reference_loss * reference_loss, figures

    def _table(self, batch: Batch, step: int) -> Tensor:
        """`(B, 1, R)`: each context reads its reference among others of the batch, in random order."""
        rng = random.Random(self.seed * 7919 + step)
        rows = []
        for own in batch.about:
            others = rng.sample([n for n in range(len(batch.references)) if n != own], batch.read - 1)
            row = [own, *others]
            rng.shuffle(row)
            rows.append([row])
        return torch.tensor(rows)

    def _text_loss(self, decoder: Decoder, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """The same contexts behind the same references as plain text: the control must be able to read too."""
        read = min(batch.read, 2)
        table = self._table(replace(batch, read=read), step)[:, 0].tolist()
        chosen = range(0, len(batch.contexts), 2)
        bos, separator = decoder.bos_ids, decoder.tokens("\n\n")
        contexts, starts = [], []
        for c in chosen:
            front = bos + [i for r in table[c] for i in [*batch.references[r], *separator]]
            contexts.append(front + batch.contexts[c][len(bos) :])
            starts.append(batch.target_starts[c] + len(front) - len(bos))
        layout = decoder.layout(contexts, padding_side="right", memory=False)
        states = decoder.forward(layout, base=True, use_cache=False).last_hidden_state
        shown = replace(batch, contexts=contexts, target_starts=starts)
        loss, found = _target_loss(decoder, states, layout.input_ids, shown, 0, self.eos)
        return loss, {"text_target": float(loss.detach()), **{f"text_{name}": value for name, value in found.items()}}


def window(decoder: Decoder, passage: Passage, answer: str | None, rng: random.Random, budget: int) -> str:
    """Whole sentences of the passage that fit into `budget` tokens, around the answer, in one of the forms that notes have."""
    if budget < SNIPPET:
        return _snippet(decoder, passage.text, answer, rng, budget)
    sentences = _SENTENCE.split(passage.text)
    holding = [n for n, s in enumerate(sentences) if answer is not None and answer in s]
    before = rng.randint(0, 3) if budget > 96 else rng.randint(0, 1) if budget > 64 else 0
    first = max(0, (holding[0] if holding else rng.randrange(len(sentences))) - before)
    draw = rng.random()
    title = passage.title.replace("_", " ")
    head = "" if not title or draw < 0.3 else f"# {title}\n\n" if draw < 0.7 else f"{title}\n"
    text = head + sentences[first]
    length = len(decoder.tokens(text))
    for sentence in sentences[first + 1 :]:
        length += len(decoder.tokens(" " + sentence))
        if length > budget:
            break
        text += " " + sentence
    return text


def _snippet(decoder: Decoder, text: str, answer: str | None, rng: random.Random, budget: int) -> str:
    """A few words around the answer, or from anywhere."""
    words = text.split()
    at = len(text[: text.find(answer)].split()) if answer is not None and answer in text else rng.randrange(len(words))
    held = len((answer or "").split())
    start = max(0, at - rng.randint(1, max(1, budget // 2 - held)))
    end = max(at + held, start + 4)
    while end < len(words) and len(decoder.tokens(" ".join(words[start : end + 1]))) <= budget:
        end += 1
    return " ".join(words[start:end])


def _drawn(pairs: Sequence[tuple[Any, float]], rng: random.Random) -> Any:
    return rng.choices([v for v, _ in pairs], [w for _, w in pairs])[0]


def _reference_loss(decoder: Decoder, states: Tensor, references: Sequence[Sequence[int]]) -> Tensor:
    """Next-token cross-entropy `()` on half of the references' tokens; states `(N, T, d)`.

    Half, because at this size the vocabulary costs as much as half of the layers.
    """
    longest = states.shape[1]
    labels = torch.tensor([[*r, *[-100] * (longest - len(r))] for r in references], device=states.device)[:, 1:]
    chosen = (labels >= 0) & (torch.rand(labels.shape, device=labels.device) < 0.5)
    logits = decoder.model.get_output_embeddings()(states[:, :-1][chosen])
    return functional.cross_entropy(logits.float(), labels[chosen])


def _target_loss(
    decoder: Decoder, states: Tensor, input_ids: Tensor, batch: Batch, prefix: int, eos: int
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy `()` of the targets in right-padded contexts, every context counting the same whatever its length.

    The figures are the share of target tokens that are predicted, and of questions whose whole answer is.
    """
    weight = torch.zeros(input_ids.shape, device=states.device)
    for row, (context, start) in enumerate(zip(batch.contexts, batch.target_starts, strict=True)):
        weight[row, prefix + start : prefix + len(context)] = 1 / (len(context) - start)
    weight = weight[:, 1:]
    target = weight > 0
    labels = input_ids[:, 1:][target]
    logits = decoder.model.get_output_embeddings()(states[:, :-1][target]).float()
    hits = torch.zeros_like(weight)
    hits[target] = (logits.detach().argmax(-1) == labels).float()
    whole = [float(hits[n].sum() == target[n].sum()) for n, c in enumerate(batch.contexts) if c[-1] == eos]
    loss = (functional.cross_entropy(logits, labels, reduction="none") * weight[target]).sum() / len(batch.contexts)
    return loss, {"accuracy": float(hits[target].mean()), "exact": sum(whole) / max(1, len(whole))}
