"""The token stream with recall every chunk: batches, citations, and the proof that memory was read.

`stream` is the primitive; `generate` and `complete` fold it. Decoding is our own loop around transformers' logits
processors and stopping criteria, because its `generate()` refuses arguments it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from memory3.attention import Hook, Stepping, Trace
from memory3.decoder import Decoder, Layout
from memory3.recall import Recalled, Recaller
from memory3.sampling import Sampler
from memory3.spec import Memory, Reference, SourceError


@dataclass(frozen=True)
class Prompt:
    """A context as token ids, its own `<s>` included; `content` tells the user's tokens from template and special ones."""

    ids: tuple[int, ...]
    content: tuple[bool, ...]

    @classmethod
    def of(cls, decoder: Decoder, text: str, content: str | None = None) -> Prompt:
        """A prompt of a text; recall queries come from `content`, a part of the text, or from all of it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SourceError(f"found a prompt that is no valid Unicode ({error.reason}), expected UTF-8 text") from None
        marked = decoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start = 0 if content is None else text.rfind(content)
        end = len(text) if content is None else start + len(content)
        inside = [a < end and b > start for a, b in marked["offset_mapping"]]
        bos = decoder.bos_ids
        ids = [int(i) for i in marked["input_ids"]]
        if bos and ids[:1] == bos:  # a chat template may have written it
            bos = []
        if not ids:
            raise SourceError("found an empty prompt, expected some text")
        return cls((*bos, *ids), (*[False] * len(bos), *inside))

    def query(self, decoder: Decoder, start: int, end: int) -> str:
        """The user's words among tokens `start` to `end`, special tokens left out."""
        kept = [i for i, mine in zip(self.ids[start:end], self.content[start:end], strict=True) if mine]
        return str(decoder.tokenizer.decode(kept, skip_special_tokens=True)).strip()


@dataclass(frozen=True)
class Citation:
    """A recalled reference and its share of the attention that the answer paid to memory."""

    id: str
    reference: Reference
    share: float


@dataclass(frozen=True)
class Effect:
    """What memory did to one answer.

    Args:
        attention_mass: per memory layer, the mean over answer tokens and memory heads.
        logit_shift: mean KL divergence in nats over answer tokens, from the same layout with memories masked.
        citations: recalled references by share, largest first.
    """

    attention_mass: dict[int, float]
    logit_shift: float
    citations: tuple[Citation, ...]

    @property
    def silent(self) -> bool:
        """Whether recalled memories changed nothing that could matter."""
        return bool(self.citations) and self.logit_shift < 1e-4


@dataclass(frozen=True)
class Timings:
    """Seconds of recalls, of the pass over the prompts, and of the passes over the new tokens, for the whole batch."""

    recall_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    text: str
    ids: tuple[int, ...]
    finish: str
    recalls: tuple[tuple[str, Recalled], ...]
    timings: Timings
    effect: Effect | None = None


@dataclass(frozen=True)
class Token:
    """One step of one sequence: the text that became certain, and on the last one the whole completion."""

    sequence: int
    id: int
    text: str
    seconds: float
    recalled: Recalled | None = None
    completion: Completion | None = None


@dataclass
class _Sequence:
    """One sequence as it grows."""

    prompt: Prompt
    recalls: list[Recalled] = field(default_factory=list)
    prompt_chunks: int = 0
    queries: list[str] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    shown: str = ""
    before: int = 0  # tokens from here on are decoded together with the newest
    told: int = 0  # tokens whose text was shown
    finish: str | None = None
    fresh: Recalled | None = None

    @property
    def current(self) -> Sequence[Memory]:
        return self.recalls[-1].memories if self.recalls else ()

    def labelled(self) -> tuple[tuple[str, Recalled], ...]:
        """Recalls with the chunk that was read: `prompt 0`, `answer 0`, …"""
        names = [f"prompt {n}" for n in range(self.prompt_chunks)]
        names += [f"answer {n}" for n in range(len(self.recalls) - self.prompt_chunks)]
        return tuple(zip(names, self.recalls, strict=True))


def generate(decoder: Decoder, prompt: str | Prompt, **options: Any) -> Iterator[Token]:
    """Stream one completion; see `stream` for the options."""
    yield from stream(decoder, [prompt], **options)


def complete(decoder: Decoder, prompts: Sequence[str | Prompt], **options: Any) -> list[Completion]:
    """Completions of a batch of prompts, in order; see `stream` for the options."""
    done: dict[int, Completion] = {}
    for token in stream(decoder, prompts, **options):
        if token.completion is not None:
            done[token.sequence] = token.completion
    return [done[n] for n in range(len(prompts))]


@torch.no_grad()
def stream(
    decoder: Decoder,
    prompts: Sequence[str | Prompt],
    *,
    recall: Recaller | None = None,
    config: Any = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    stopping: Any = None,
    effect: bool = False,
) -> Iterator[Token]:
    """Generate for a batch, recalling memories for every chunk.

    Args:
        decoder: an attached decoder.
        prompts: texts or `Prompt`s.
        recall: where memories come from; without it the layout is the plain model's.
        config: a transformers `GenerationConfig`; by default the model's own.
        max_new_tokens: overrules the configuration's.
        seed: sampling gives the same tokens for the same seed and place in the batch.
        stopping: further transformers stopping criteria.
        effect: measure attention mass, logit shift and citations, at the price of two more forward passes.

    Raises:
        BankMismatch: memories of another model would be read.
        SpecError: settings that this loop cannot follow.

    Yields:
        A `Token` per sequence and step; the last of a sequence carries its `Completion`.
    """
    if not prompts:
        return
    made = [p if isinstance(p, Prompt) else Prompt.of(decoder, p) for p in prompts]
    if recall is not None:
        recall.check(decoder)
    sampler = Sampler.of(decoder, config, max_new_tokens, seed, [len(p.ids) for p in made], stopping)
    yield from _Stream(decoder, [_Sequence(p) for p in made], recall, sampler, effect).run()


class _Stream:
    """The loop of one batch."""

    def __init__(
        self, decoder: Decoder, rows: list[_Sequence], recall: Recaller | None, sampler: Sampler, effect: bool
    ) -> None:
        self.decoder, self.rows, self.recall, self.sampler, self.effect = decoder, rows, recall, sampler, effect
        self.recall_s = self.prefill_s = self.decode_s = 0.0
        self.start = perf_counter()

    def run(self) -> Iterator[Token]:
        was_training = self.decoder.model.training
        self.decoder.model.eval()
        try:
            yield from self._run()
        finally:
            self.decoder.model.train(was_training)

    def _run(self) -> Iterator[Token]:
        self._recall_prompts()
        began = perf_counter()
        layout = self.decoder.layout([row.prompt.ids for row in self.rows], memory=self.recall is not None)
        memories = [[r.memories for r in row.recalls] for row in self.rows]
        reading, cache = self.decoder.reading(layout.chunks, memories), self.decoder.fresh_cache()
        logits = self.decoder.forward(layout, reading, cache=cache, logits_to_keep=1).logits
        self.prefill_s = perf_counter() - began
        step = 0
        reading_of: Hook | None = None
        while True:
            began = perf_counter()
            chosen, scores = self.sampler.next(
                logits[:, -1], [row.prompt.ids for row in self.rows], [row.ids for row in self.rows]
            )
            self.decode_s += perf_counter() - began
            yield from self._taken(chosen, scores)
            if all(row.finish for row in self.rows):
                return
            layout = self._next(layout, chosen)
            if self.recall is not None and step and step % self.decoder.spec.chunk_length == 0:
                self._recall_answers(step)
                reading_of = None
            began = perf_counter()
            if reading_of is None:
                reading_of = self.decoder.reading(layout.chunks, [[row.current] for row in self.rows]) or Stepping()
            logits = self.decoder.forward(layout, reading_of, cache=cache).logits
            self.decode_s += perf_counter() - began
            step += 1

    def _recall_prompts(self) -> None:
        """Every chunk of every prompt recalls for itself, in one call.

        A chunk without words of the user (template tokens, for instance) asks nothing and keeps what the one before it has.
        """
        if self.recall is None:
            return
        began, size = perf_counter(), self.decoder.spec.chunk_length
        asking: list[tuple[_Sequence, str]] = []
        for row in self.rows:
            chunks = range(0, len(row.prompt.ids), size)
            row.prompt_chunks = len(chunks)
            row.queries = [row.prompt.query(self.decoder, start, start + size) for start in chunks]
            row.text = row.prompt.query(self.decoder, 0, len(row.prompt.ids))
            asking += [(row, query) for query in row.queries if query]
        found = iter(self.recall([query for _, query in asking], [row.text for row, _ in asking]) if asking else [])
        for row in self.rows:
            last = Recalled("")
            for query in row.queries:
                last = next(found) if query else replace(last, query="", bytes_read=0, encoded=0)
                row.recalls.append(last)
            row.fresh = last
        self.recall_s += perf_counter() - began

    def _recall_answers(self, step: int) -> None:
        """The chunk just generated recalls for the next; one without words keeps what it has."""
        assert self.recall is not None
        began, size = perf_counter(), self.decoder.spec.chunk_length
        going = [row for row in self.rows if not row.finish]
        decode = self.decoder.tokenizer.decode
        queries = [str(decode(row.ids[step - size : step], skip_special_tokens=True)).strip() for row in going]
        asking = [(row, query) for row, query in zip(going, queries, strict=True) if query]
        found = iter(self.recall([query for _, query in asking], [row.text for row, _ in asking]) if asking else [])
        for row, query in zip(going, queries, strict=True):
            row.fresh = next(found) if query else replace(row.recalls[-1], query="", bytes_read=0, encoded=0)
            row.recalls.append(row.fresh)
        self.recall_s += perf_counter() - began

    def _next(self, layout: Layout, chosen: Tensor) -> Layout:
        """The layout of the one token just chosen, behind what the cache holds."""
        ones = torch.ones_like(chosen)[:, None]
        return Layout(
            chosen[:, None],
            torch.cat([layout.attention_mask, ones], 1),
            layout.position_ids[:, -1:] + 1,
            torch.zeros_like(ones) if self.recall is not None else -ones,
            layout.memory,
        )

    def _taken(self, chosen: Tensor, scores: Tensor) -> Iterator[Token]:
        """Note the chosen tokens of the sequences that still run, and tell of them."""
        running, ids = [(n, row) for n, row in enumerate(self.rows) if not row.finish], chosen.tolist()
        for n, row in running:
            row.ids.append(ids[n])
            row.finish = self.sampler.finished(n, row.prompt.ids, row.ids, scores[n])
        ended = [row for _, row in running if row.finish]
        effects = {id(row): effect for row, effect in zip(ended, self._effects(ended), strict=True)}
        for n, row in running:
            text = self._certain(row)
            completion = self._completion(row, effects[id(row)]) if row.finish else None
            yield Token(n, row.ids[-1], text, perf_counter() - self.start, row.fresh, completion)
            row.fresh = None

    def _certain(self, row: _Sequence) -> str:
        """Text that the newest token adds; half a character waits for its other half.

        Only the tokens since the text before last are decoded, for what a token says may depend on the one before it; the whole
        answer is decoded at its end.
        """
        decode = self.decoder.tokenizer.decode
        if row.finish:
            whole = str(decode(row.ids, skip_special_tokens=True))
            added, row.shown = whole[len(row.shown) :], whole
            return added
        known = str(decode(row.ids[row.before : row.told], skip_special_tokens=True))
        now = str(decode(row.ids[row.before :], skip_special_tokens=True))
        if now.endswith("\ufffd"):
            return ""
        row.before, row.told = row.told, len(row.ids)
        row.shown += now[len(known) :]
        return now[len(known) :]

    def _completion(self, row: _Sequence, effect: Effect | None) -> Completion:
        timings = Timings(self.recall_s, self.prefill_s, self.decode_s)
        return Completion(row.shown, tuple(row.ids), row.finish or "", row.labelled(), timings, effect)

    def _effects(self, ended: list[_Sequence]) -> list[Effect | None]:
        if not self.effect or self.recall is None or not ended:
            return [None] * len(ended)
        return list(_measured(self.decoder, ended))


def _measured(decoder: Decoder, rows: Sequence[_Sequence]) -> list[Effect]:
    """Effect of memory on finished answers: one pass with memories and a trace, one with memories masked."""
    size, contexts, grids, tables = decoder.spec.chunk_length, [], [], []
    for row in rows:
        contexts.append([*row.prompt.ids, *row.ids[:-1]])
        answer = [row.prompt_chunks + n // size for n in range(len(row.ids) - 1)]
        grids.append([n // size for n in range(len(row.prompt.ids))] + answer)
        prompt = row.recalls[: row.prompt_chunks]
        tables.append([r.memories for r in [*prompt, prompt[-1], *row.recalls[row.prompt_chunks :]]])
    layout, trace = decoder.layout(contexts, grid=grids), Trace()
    keep = max(len(row.ids) for row in rows)
    reading = decoder.reading(layout.chunks, tables, trace)
    with_memory = decoder.forward(layout, reading, logits_to_keep=keep).logits.float().log_softmax(-1)
    masked = decoder.forward(layout, logits_to_keep=keep).logits.float().log_softmax(-1)
    divergence = (with_memory.exp() * (with_memory - masked)).sum(-1)
    return [
        _effect(row, divergence[n], {layer: t[n] for layer, t in trace.references.items()}, size) for n, row in enumerate(rows)
    ]


def _effect(row: _Sequence, divergence: Tensor, shares: dict[int, Tensor], size: int) -> Effect:
    """Of one sequence: divergence `(keep,)` and per layer the weights `(Q, R)`; the last places predicted the answer.

    The first answer token was predicted by the prompt's last one, the others by their predecessors.
    """
    count = len(row.ids)
    generated = [row.recalls[row.prompt_chunks - 1], *row.recalls[row.prompt_chunks :]]
    read_by = [generated[max(place - 1, 0) // size] for place in range(count)]
    found = {hit.id: reference for r in generated for hit, reference in zip(r.hits, r.references, strict=True)}
    share = dict.fromkeys(found, 0.0)
    for weights in shares.values():
        for recalled, paid in zip(read_by, weights[-count:].tolist(), strict=True):
            for hit, weight in zip(recalled.hits, paid, strict=False):
                share[hit.id] += weight
    whole = sum(share.values()) or 1.0
    citations = sorted((Citation(id, found[id], share[id] / whole) for id in found), key=lambda c: (-c.share, c.id))
    mass = {layer: float(t[-count:].sum(-1).mean()) for layer, t in shares.items()}
    return Effect(mass, max(0.0, float(divergence[-count:].mean())), tuple(citations))
