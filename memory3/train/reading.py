"""Teach a small model to read memory: references in memory, questions and completions about them in the context.

Source of the order of things: design section 4. Memory is dense at first (all tokens), references keep a language
modelling loss, and the kept tokens are thinned out once the model reads. Where an answer stands is known, so some heads of
the last memory layer are also taught to point there: without that, reading appears late and suddenly.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memory3.attention import MemoryStack, Reading, Trace
from memory3.decoder import Decoder
from memory3.train.passages import Context, ContextMaker, Passage, Window, drawn, window_of
from memory3.train.recalled import reference_loss

FIRST_WEIGHT = 3.0
"""The first token of a target weighs as much as so many others: it has to be found, the others follow from it."""
LEAST_MASS = 1e-3
"""A pointer that gets less counts as this much: selection may have dropped its token."""


REFERENCE_SHARE = 1 / 3
"""Of the references' tokens that are asked for."""
GROUPS = 3
"""The contexts of a batch run in so many passes, by length."""


@dataclass(frozen=True)
class Phase:
    """How the mixture looks up to a step. Shares and slots are `(value, weight)` pairs.

    `longest` is the range that the most tokens of a reference are drawn from. `neighbour` is the share of references that
    bring another window of the same passage into the batch, as a wrong reference that is hard to tell from the right one.
    """

    until: int
    references: tuple[tuple[int, float], ...]
    slots: tuple[tuple[int | None, float], ...]
    tasks: tuple[tuple[str, float], ...]
    asked_share: float
    reference_loss: float = 0.0
    pointer_loss: float = 0.5
    sentence_loss: float = 0.0
    text_share: float = 0.0
    closed_share: float = 0.03
    neighbour: float = 0.0
    batch: int = 24
    contexts: int = 4
    longest: tuple[int, int] = (40, 128)


@dataclass(frozen=True)
class Batch:
    """References, the contexts about them, and which reference each is about."""

    references: list[list[int]]
    contexts: list[Context]
    about: list[int]
    read: int
    slots: int | None
    mode: str
    seed: int


class ReadingObjective:
    """Questions, clozes and completions on references in memory.

    Args:
        decoder: gives tokenizer and lengths; its spec's tokens per head are set by the phase.
        asked: passages with questions; plain: passages without.
        phases: by optimizer step.
        seed: of the batches.
        per_step: micro-batches of a step, all processes together.
    """

    def __init__(
        self,
        decoder: Decoder,
        asked: Sequence[Passage],
        plain: Sequence[Passage],
        phases: Sequence[Phase],
        seed: int = 0,
        per_step: int = 1,
    ):
        self.decoder, self.asked, self.plain, self.phases, self.seed = decoder, asked, plain, phases, seed
        self.maker, self.per_step = ContextMaker(decoder), per_step

    def phase(self, step: int) -> Phase:
        """The phase a step belongs to; the last one goes on."""
        return next((p for p in self.phases if step < p.until), self.phases[-1])

    def batch(self, step: int) -> Batch:
        """The micro-batch of a number, drawn from `(seed, number)`."""
        phase, rng = self.phase(step // self.per_step), random.Random(self.seed * 1_000_003 + step)
        references: list[list[int]] = []
        contexts: list[Context] = []
        about: list[int] = []
        budget = rng.randint(*phase.longest)  # one for all: padding is work for nothing
        while len(references) < phase.batch:
            pool = self.asked if rng.random() < phase.asked_share else self.plain
            passage = pool[rng.randrange(len(pool))]
            window, made = self._made(passage, phase, budget, rng)
            if not made:
                continue
            contexts += made
            about += [len(references)] * len(made)
            references.append(window.ids)
            if rng.random() < phase.neighbour and len(references) < phase.batch:
                other = window_of(self.decoder, passage, None, rng, budget)
                if other.ids and not self._overlapping(window, other):
                    references.append(other.ids)
        draw = rng.random()
        mode = "text" if draw < phase.text_share else "closed" if draw < phase.text_share + phase.closed_share else "memory"
        read = min(drawn(phase.references, rng), len(references))
        return Batch(references, contexts, about, read, drawn(phase.slots, rng), mode, rng.randrange(2**31))

    def _made(self, passage: Passage, phase: Phase, budget: int, rng: random.Random) -> tuple[Window, list[Context]]:
        """One window of the passage, and contexts about it."""
        question = rng.choice(passage.questions) if passage.questions else None
        window = window_of(self.decoder, passage, question[1] if question else None, rng, budget)
        made = [self.maker.question(*question, window, rng)] if question else []
        kinds = [drawn(phase.tasks, rng) for _ in range(phase.contexts - len(made))]
        made += [self.maker.made(kind, passage, window, rng) for kind in kinds]
        return window, list({tuple(context.ids): context for context in made if context is not None}.values())

    @staticmethod
    def _overlapping(first: Window, second: Window) -> bool:
        return second.text[-60:] in first.text or first.text[-60:] in second.text

    def loss(self, decoder: Decoder, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of targets, plus pointers' and the references' own at the phase's weights."""
        phase = self.phase(step)
        if batch.mode == "text":
            return self._text_loss(decoder, batch)
        view = decoder.using(replace(decoder.spec, tokens_per_head=batch.slots))
        total, figures, stack = torch.zeros((), device=view.device), {}, None
        if batch.mode == "memory":
            stack, states = view.stack_with_states(batch.references, through=phase.reference_loss > 0)
            if states is not None:
                reference = reference_loss(view, states, batch.references, REFERENCE_SHARE, batch.seed)
                total, figures["reference"] = total + phase.reference_loss * reference, float(reference.detach())
        table = table_of(batch)
        for group in by_length(batch.contexts, GROUPS):
            part = replace(batch, contexts=[batch.contexts[n] for n in group], about=[batch.about[n] for n in group])
            loss, found = self._read(view, part, stack, table[group], phase)
            share = len(group) / len(batch.contexts)
            total = total + share * loss
            for name, value in found.items():
                figures[name] = figures.get(name, 0.0) + share * value
        if batch.mode == "memory":
            figures[f"exact_{batch.slots or 'all'}x{batch.read}"] = figures["memory_exact"]
        return total, figures

    def _read(
        self, view: Decoder, batch: Batch, stack: MemoryStack | None, table: Tensor, phase: Phase
    ) -> tuple[Tensor, dict[str, float]]:
        """The losses of some of a batch's contexts, which read `table` `(B, R)` of the stack."""
        assert view.spec.layers is not None
        layout = view.layout([c.ids for c in batch.contexts], padding_side="right")
        starts = [len(view.prefix_ids) + c.target_start for c in batch.contexts]
        pointing, finding = view.spec.layers[-1], view.spec.layers[-2:-1]
        reading = None
        if stack is not None:
            watched = ((pointing,) if phase.pointer_loss else ()) + (finding if phase.sentence_loss else ())
            trace = Trace(tokens_too=True, gradient=True, layers=watched) if watched else None
            reading = Reading(stack, table[:, None].to(view.device), layout.chunks, view.spec, trace)
        states = view.forward(layout, reading, base=True).last_hidden_state
        loss, found = target_loss(view, states, batch.contexts, starts)
        figures = {f"{batch.mode}_{name}": value for name, value in [("target", float(loss.detach())), *found.items()]}
        if reading is not None and phase.pointer_loss:
            pointer = pointer_loss(view, reading, batch, table, starts)
            loss, figures["pointer"] = loss + phase.pointer_loss * pointer, float(pointer.detach())
        if reading is not None and phase.sentence_loss and finding:
            sentence = sentence_loss(view, reading, batch, table, starts)
            loss, figures["sentence"] = loss + phase.sentence_loss * sentence, float(sentence.detach())
        return loss, figures

    def _text_loss(self, decoder: Decoder, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The same contexts behind the same references as plain text: the control must be able to read too."""
        table = table_of(replace(batch, read=min(batch.read, 3))).tolist()
        contexts = prompted(decoder, batch, table, range(0, len(batch.contexts), 3))
        layout = decoder.layout([c.ids for c in contexts], padding_side="right", memory=False)
        states = decoder.forward(layout, base=True).last_hidden_state
        loss, found = target_loss(decoder, states, contexts, [c.target_start for c in contexts])
        return loss, {"text_target": float(loss.detach()), **{f"text_{name}": value for name, value in found.items()}}


def table_of(batch: Batch) -> Tensor:
    """`(B, R)`: each context reads its reference among others of the batch, in random order."""
    rng = random.Random(batch.seed)
    rows = []
    for own in batch.about:
        near = [n for n in (own - 1, own + 1) if 0 <= n < len(batch.references)]  # a neighbour follows its passage
        others = [n for n in range(len(batch.references)) if n != own and n not in near]
        row = [own, *[*near, *rng.sample(others, max(0, min(len(others), batch.read - 1 - len(near))))][: batch.read - 1]]
        rng.shuffle(row)
        rows.append(row)
    return torch.tensor(rows)


def prompted(decoder: Decoder, batch: Batch, table: Sequence[Sequence[int]], chosen: Sequence[int]) -> list[Context]:
    """The chosen contexts behind the references that each reads, as text; pointers lead to places of the whole prompt.

    `table` is that of `table_of` as lists.
    """
    bos, separator, made = decoder.bos_ids, decoder.tokens("\n\n"), []
    for c in chosen:
        context, front, at = batch.contexts[c], [*bos], 0
        for r in table[c]:
            at = len(front) if r == batch.about[c] else at
            front += [*batch.references[r], *separator]
        made.append(
            Context(
                [*front, *context.ids[len(bos) :]],
                context.target_start + len(front) - len(bos),
                [[at + n for n in tokens] for tokens in context.pointers],
                [at + n for n in context.sentence],
            )
        )
    return made


def by_length(contexts: Sequence[Context], groups: int) -> list[list[int]]:
    """The contexts' numbers in `groups` parts of like length, so that little of a part is padding."""
    order = sorted(range(len(contexts)), key=lambda n: len(contexts[n].ids))
    size = -(-len(order) // groups)
    return [order[start : start + size] for start in range(0, len(order), size)]


def pointer_loss(decoder: Decoder, reading: Reading, batch: Batch, table: Tensor, starts: Sequence[int]) -> Tensor:
    """Mean negative log `()` of the joint attention that the first query head of each kv head of the last memory layer
    pays to the tokens that a target token stands at; weighted as in `weights_of`.

    Args:
        decoder: its last memory layer points.
        reading: of the pass just made, whose trace kept token weights with their gradient.
        batch: gives pointers.
        table: `(B, R)` references of each context.
        starts: place of each target in the layout.
    """
    assert decoder.spec.layers is not None
    wanted = [
        (b, start + n - 1, tokens, share)
        for b, (context, start) in enumerate(zip(batch.contexts, starts, strict=True))
        for n, (tokens, share) in enumerate(zip(context.pointers, weights_of(len(context.pointers)), strict=True))
    ]
    return _attended(decoder, reading, decoder.spec.layers[-1], batch, table, wanted)


def sentence_loss(decoder: Decoder, reading: Reading, batch: Batch, table: Tensor, starts: Sequence[int]) -> Tensor:
    """The same for the memory layer before, whose heads are taught to find the sentence that holds the answer: `()`, from
    the last token of the prompt. One has to find the place before one can point.
    """
    assert decoder.spec.layers is not None
    wanted = [(b, start - 1, c.sentence, 1.0) for b, (c, start) in enumerate(zip(batch.contexts, starts, strict=True))]
    return _attended(decoder, reading, decoder.spec.layers[-2], batch, table, wanted)


def _attended(
    decoder: Decoder,
    reading: Reading,
    layer: int,
    batch: Batch,
    table: Tensor,
    wanted: Sequence[tuple[int, int, Sequence[int], float]],
) -> Tensor:
    """Weighted mean `()` of the negative log mass that queries pay to tokens of their reference.

    `wanted` are rows of context, query, tokens of the reference (none: left out) and weight.
    """
    assert reading.trace is not None
    weights = reading.trace.tokens[layer]  # (B, Q, heads, R, K)
    rows: list[tuple[int, int, int, int, int, int]] = []  # pointed token, context, query, place in the table, reference, token
    weight: list[float] = []
    for b, query, tokens, share in wanted:
        if tokens:
            own = batch.about[b]
            place = table[b].tolist().index(own)
            rows += [(len(weight), b, query, place, own, token) for token in tokens]
            weight.append(share)
    if not rows:
        return weights.new_zeros(())
    pointed, b, query, place, own, token = torch.tensor(rows, device=weights.device).T
    paid = weights[b, query, :, place].unflatten(1, (len(decoder.spec.heads_of(layer)), -1))[:, :, 0]  # (E, heads, K)
    mass = (paid * _stands_at(reading.stack, decoder.spec.rows_of(layer), own, token)).sum(-1).mean(-1)
    total = mass.new_zeros(len(weight)).index_add(0, pointed, mass)
    shares = torch.tensor(weight, device=mass.device)
    loss: Tensor = -(total.clamp(min=LEAST_MASS).log() * shares).sum() / shares.sum()
    return loss


def weights_of(length: int) -> list[float]:
    """Weights of the tokens of a target, which add up to 1."""
    return [(FIRST_WEIGHT if n == 0 else 1.0) / (FIRST_WEIGHT + length - 1) for n in range(length)]


def _stands_at(stack: MemoryStack, rows: slice, reference: Tensor, token: Tensor) -> Tensor:
    """`(E, heads, K)` bool: slots that hold a token of a reference."""
    slot = torch.arange(stack.positions.shape[2], device=token.device)
    valid = slot[None, :] < stack.counts[reference][:, None]
    at: Tensor = stack.positions[reference][:, rows] == token[:, None, None]
    return at & valid[:, None]


def target_loss(
    decoder: Decoder, states: Tensor, contexts: Sequence[Context], starts: Sequence[int]
) -> tuple[Tensor, dict[str, Any]]:
    """Cross-entropy `()` of the targets in right-padded contexts, every context counting the same whatever its length.

    The figures are the share of target tokens that are predicted, of first ones, and of whole answers.
    """
    end = decoder.tokenizer.eos_token_id
    targets = [c.ids[c.target_start :] for c in contexts]
    rows = torch.tensor([b for b, t in enumerate(targets) for _ in t], device=states.device)
    places = torch.tensor([start + n - 1 for start, t in zip(starts, targets, strict=True) for n in range(len(t))])
    labels = torch.tensor([i for t in targets for i in t], device=states.device)
    weight = torch.tensor([w for t in targets for w in weights_of(len(t))], device=states.device)
    logits = decoder.model.get_output_embeddings()(states[rows, places.to(states.device)]).float()
    hits = (logits.detach().argmax(-1) == labels).float()
    wrong = torch.zeros(len(targets), device=states.device).index_add(0, rows, 1 - hits)
    answers = torch.tensor([t[-1] == end for t in targets], device=states.device)
    loss = (functional.cross_entropy(logits, labels, reduction="none") * weight).sum() / len(targets)
    exact = float((wrong[answers] == 0).float().mean()) if bool(answers.any()) else 0.0
    first = torch.tensor([n == 0 for t in targets for n in range(len(t))], device=states.device)
    return loss, {"accuracy": float(hits.mean()), "first": float(hits[first].mean()), "exact": exact}
