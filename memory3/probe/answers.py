"""Which memory heads carried an answer: the subgraph of attention edges that answers one question from memory.

An answer is generated, and its log-likelihood with memory is compared with that under cuts (`memory3.probe.edges`): the
memory of one head after the other, of all heads but some, and of single edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from memory3.answering import question_prompt
from memory3.decoder import Decoder
from memory3.evaluate.given import Tell
from memory3.generation import Completion, Prompt, complete
from memory3.probe.edges import Edges, Subject, ablated, estimates, query_heads
from memory3.recall import Recalled, Recaller
from memory3.spec import Reference, SourceError

SHARE = 0.9
"""Of what memory adds to the answer's log-likelihood, the carrying heads alone keep so much."""
CANDIDATES = 64
"""Edges from memory with the largest estimates, and as many inside the context, which are cut one by one."""


@dataclass(frozen=True)
class Head:
    """A query head that reads memory, and what its edges from memory add to the answer, in nats: by ablation and estimated."""

    layer: int
    head: int
    effect: float
    estimate: float


@dataclass(frozen=True)
class Node:
    """A token: column `place` of the context, or token `place` of a recalled reference."""

    place: int
    text: str
    reference: int | None = None


@dataclass(frozen=True)
class Edge:
    """One attention edge, and what it adds to the answer's log-likelihood, in nats."""

    layer: int
    head: int
    key: Node
    query: Node
    effect: float
    estimate: float


@dataclass(frozen=True)
class Circuit:
    """What answered a question.

    Args:
        question: the question.
        answer: what the model said.
        references: what was recalled.
        with_memory: log-likelihood of the answer in nats.
        without: the same with all memory masked.
        alone: the same where only the carrying heads read memory.
        heads: all query heads that read memory, the largest effect first.
        carriers: as few of the first of them as keep `SHARE` of what memory adds; empty where it adds nothing.
        edges: the strongest single edges from memory, and as many inside the context, largest effect first.
        context: tokens of prompt and answer; the answer's are the last `answered`.
    """

    question: str
    answer: str
    references: tuple[Reference, ...]
    with_memory: float
    without: float
    alone: float
    heads: tuple[Head, ...]
    carriers: tuple[Head, ...]
    edges: tuple[Edge, ...]
    context: tuple[Node, ...]
    answered: int

    @property
    def gain(self) -> float:
        """What memory adds to the answer's log-likelihood."""
        return self.with_memory - self.without


def circuit_of(
    decoder: Decoder,
    question: str,
    recall: Recaller,
    *,
    config: Any = None,
    max_new_tokens: int = 16,
    edges: int = 24,
    tell: Tell | None = None,
) -> Circuit:
    """Answer a question from memory and find what carried the answer.

    Args:
        decoder: an attached decoder.
        question: the question.
        recall: brings memories.
        config: of generation; by default the model's own.
        max_new_tokens: most tokens of the answer.
        edges: most single edges from memory, and as many inside the context.
        tell: told of passes done.

    Raises:
        SourceError: nothing was recalled, or the model said nothing.
    """
    prompt = question_prompt(decoder, question)
    [done] = complete(decoder, [prompt], recall=recall, config=config, max_new_tokens=max_new_tokens)
    said = _spoken(decoder, done)
    if not said or not any(r.hits for _, r in done.recalls):
        raise SourceError(
            f"found {'no words in the answer' if not said else 'nothing recalled'} to {question!r}, expected an answer from memory"
        )
    subject, references = _subject(decoder, prompt, said, [r for _, r in done.recalls])
    tell = tell or (lambda done, total: None)
    estimated = estimates(decoder, subject)
    tell(1, 4)
    heads = _heads(decoder, subject, estimated)
    tell(2, 4)
    whole, without, *nested = _nested(decoder, subject, heads)
    count = next((n for n, kept in enumerate(nested) if kept >= without + SHARE * (whole - without)), len(nested) - 1)
    count = count if whole > without else 0
    tell(3, 4)
    name = _Names(decoder, subject, references)
    found = [
        edge
        for kind in (slice(0, subject.slots), slice(subject.slots + len(decoder.prefix_ids), None))
        for edge in _edges(decoder, subject, estimated, kind, whole, name)[:edges]
    ]
    found.sort(key=lambda edge: -edge.effect)
    tell(4, 4)
    text = str(decoder.tokenizer.decode(said, skip_special_tokens=True)).strip()
    context = tuple(name(0, 0, subject.slots + n) for n in range(len(decoder.prefix_ids), subject.columns))
    parts = (tuple(heads), tuple(heads[:count]), tuple(found), context, len(said))
    return Circuit(question, text, tuple(references), whole, without, nested[count], *parts)


def _spoken(decoder: Decoder, done: Completion) -> list[int]:
    """Token ids of an answer up to its end token."""
    special = set(decoder.tokenizer.all_special_ids)
    ids = list(done.ids)
    return ids[: next((n for n, id in enumerate(ids) if id in special), len(ids))]


def _subject(
    decoder: Decoder, prompt: Prompt, said: Sequence[int], recalls: Sequence[Recalled]
) -> tuple[Subject, list[Reference]]:
    """Prompt and answer on the grid of generation, and the memories that it reads, in their order, with their references."""
    size = decoder.spec.chunk_length
    before = ceil(len(prompt.ids) / size)
    read = [*recalls[:before], recalls[before - 1], *recalls[before:]]
    grid = [n // size for n in range(len(prompt.ids))] + [before + n // size for n in range(len(said))]
    layout = decoder.layout([[*prompt.ids, *said]], grid=[grid])
    reading = decoder.reading(layout.chunks, [[r.memories for r in read]])
    known = {id(m): reference for r in read for m, reference in zip(r.memories, r.references, strict=True)}
    return Subject(layout, len(decoder.prefix_ids) + len(prompt.ids), reading), list(known.values())


def _heads(decoder: Decoder, subject: Subject, estimated: Tensor) -> list[Head]:
    """All heads that read memory by the fall of the log-likelihood where their edges from memory are cut."""
    assert decoder.spec.layers is not None
    group, memories = query_heads(decoder) // decoder.geometry.num_kv_heads, subject.memories()
    places = [
        (layer, kv * group + n) for layer in decoder.spec.layers for kv in decoder.spec.heads_of(layer) for n in range(group)
    ]
    whole, *without = ablated(decoder, subject, [[], *([Edges(*place, memories)] for place in places)])
    found = [
        Head(layer, head, whole - one, float(estimated[layer, head, :, : subject.slots].sum()))
        for (layer, head), one in zip(places, without, strict=True)
    ]
    return sorted(found, key=lambda head: (-head.effect, head.layer, head.head))


def _nested(decoder: Decoder, subject: Subject, heads: Sequence[Head]) -> list[float]:
    """Log-likelihood with all of memory, with none, and with the memory of the first 0, 1, 2, … heads alone."""
    memories = subject.memories()
    cut = [Edges(head.layer, head.head, memories) for head in heads]
    return ablated(decoder, subject, [[], cut, *(cut[n:] for n in range(len(cut) + 1))])


def _edges(decoder: Decoder, subject: Subject, estimated: Tensor, kind: slice, whole: float, name: _Names) -> list[Edge]:
    """Of the edges from some keys those with the largest estimates, by ablation, largest effect first.

    What happens inside the reference BOS, which knows nothing of the question, is left out.
    """
    sizes = estimated[..., kind].abs()
    sizes[:, :, : len(decoder.prefix_ids)] = 0
    strongest = sizes.flatten().topk(min(CANDIDATES, sizes.numel())).indices
    axes = [axis.tolist() for axis in torch.unravel_index(strongest, sizes.shape)]
    offset = kind.start or 0
    places = [(n, h, q, offset + k) for n, h, q, k in zip(*axes, strict=True) if float(sizes[n, h, q, k])]
    cuts = [[Edges(layer, head, subject.pairs([(query, key)]))] for layer, head, query, key in places]
    found = [
        Edge(
            layer,
            head,
            name(layer, head, key),
            name(layer, head, subject.slots + query),
            whole - without,
            float(estimated[layer, head, query, key]),
        )
        for (layer, head, query, key), without in zip(places, ablated(decoder, subject, cuts), strict=True)
    ]
    return sorted(found, key=lambda edge: -edge.effect)


class _Names:
    """Tokens by the number of their key: a slot stands for different tokens at different memory heads."""

    def __init__(self, decoder: Decoder, subject: Subject, references: Sequence[Reference]) -> None:
        self.decoder, self.subject = decoder, subject
        self.tokens = [decoder.tokens(reference.text) for reference in references]
        self.context = subject.layout.input_ids[0].tolist()
        self.group = query_heads(decoder) // decoder.geometry.num_kv_heads

    def __call__(self, layer: int, head: int, key: int) -> Node:
        """The token that a query head of a layer sees under a key."""
        if key >= self.subject.slots:
            place = key - self.subject.slots
            return Node(place - len(self.decoder.prefix_ids), self._word(self.context[place]))
        assert self.subject.reading is not None
        stack, spec = self.subject.reading.stack, self.subject.reading.spec
        reference, slot = divmod(key, stack.keys.shape[2])
        row = spec.rows_of(layer).start + spec.heads_of(layer).index(head // self.group)
        place = int(stack.positions[reference, row, slot])
        return Node(place, self._word(self.tokens[reference][place]), reference)

    def _word(self, id: int) -> str:
        return str(self.decoder.tokenizer.decode([id]))


# ---- tables and documents ----


def described(circuit: Circuit, most: int = 8) -> str:
    """A few lines and two Markdown tables for people."""
    lines = [
        circuit.answer,
        f"log-likelihood {circuit.with_memory:.2f} nats with memory, {circuit.without:.2f} without, "
        f"{circuit.alone:.2f} where only {len(circuit.carriers)} of {len(circuit.heads)} heads read it",
        "",
        "| layer | head | adds by ablation, nats | estimate | carries |",
        "|---|---|---|---|---|",
    ]
    carriers = set(circuit.carriers)
    lines += [
        f"| {h.layer} | {h.head} | {h.effect:+.3f} | {h.estimate:+.3f} | {'yes' if h in carriers else ''} |"
        for h in circuit.heads[: max(most, len(carriers))]
    ]
    lines += ["", "| edge | layer | head | adds by ablation, nats | estimate |", "|---|---|---|---|---|"]
    lines += [
        f"| {_shown(e.key)} → {_shown(e.query)} | {e.layer} | {e.head} | {e.effect:+.3f} | {e.estimate:+.3f} |"
        for e in circuit.edges[:most]
    ]
    return "\n".join(lines)


def _shown(node: Node) -> str:
    where = "" if node.reference is None else f" of memory {node.reference + 1}"
    return f"{node.text.strip() or '·'}{where}".replace("|", "\\|").replace("\n", "¶")


def document(circuit: Circuit, model: str) -> dict[str, Any]:
    """The JSON document of docs/json.md."""
    carriers = set(circuit.carriers)
    return {
        "model": model,
        "question": circuit.question,
        "answer": circuit.answer,
        "references": [
            {"id": r.id, "source": r.source, "start": r.start, "end": r.end, "text": r.text} for r in circuit.references
        ],
        "with_memory": circuit.with_memory,
        "without": circuit.without,
        "alone": circuit.alone,
        "heads": [{**asdict(head), "carries": head in carriers} for head in circuit.heads],
        "edges": [asdict(edge) for edge in circuit.edges],
    }
