"""What memory costs in time: a continual step beside a warmup step, and decoding with memory, without, and with text.

Ratios from one run: the ways take turns, and the median of several turns counts, after one turn to warm up.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from memory3.bank import Bank
from memory3.decoder import Decoder
from memory3.generation import Prompt, complete
from memory3.recall import Recalled
from memory3.retrieval import Hit
from memory3.spec import Memory, Reference, SpecError
from memory3.train.corpus import Corpus
from memory3.train.sequences import Continual, Retrieved, Sequences, Warmup, shared

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Timed:
    """Seconds of each turn of one way, and how much it did in a turn."""

    name: str
    seconds: tuple[float, ...]
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens per second, of the median turn."""
        return self.tokens / median(self.seconds)

    def row(self, ratio: float) -> str:
        """A row of a Markdown table."""
        low, middle, high = min(self.seconds), median(self.seconds), max(self.seconds)
        return f"| {self.name} | {middle:.3g} [{low:.3g}, {high:.3g}] | {self.rate:,.0f} | {ratio:.3f} |"


def measure_speed(
    decoder: Decoder,
    *,
    length: int = 2048,
    batch: int = 1,
    precision: str = "bf16",
    decode_batch: int = 32,
    prompt: int = 128,
    output: int = 128,
    repeats: int = 5,
    seed: int = 0,
    parts: Sequence[str] = ("train", "decode"),
    tell: Tell = lambda done, total: None,
) -> dict[str, Timed]:
    """Print a Markdown table of each part and return the figures: `warmup`, `continual`; `plain`, `memory`, `text`.

    Args:
        decoder: its weights stay as they are.
        length: tokens of a training sequence.
        batch: sequences of a training step.
        precision: `bf16` under autocast, as the training loop has it, or `no`.
        decode_batch: prompts that are answered together.
        prompt: tokens of a prompt, its `<s>` among them.
        output: new tokens of an answer, no fewer.
        repeats: turns of each way.
        seed: of the random text.
        parts: `train`, `decode` or both.
        tell: told of the turns done.

    Raises:
        SpecError: a size below 1, a prompt of `<s>` alone, or an unknown part or precision.
    """
    sizes = {"length": length, "batch": batch, "decode_batch": decode_batch, "prompt": prompt, "output": output}
    _check(sizes | {"repeats": repeats}, parts, precision)
    if prompt <= len(decoder.bos_ids):
        raise SpecError(f"found prompt={prompt}, expected at least {len(decoder.bos_ids) + 1}: `<s>` and a word")
    turns, found = (repeats + 1) * sum(2 if part == "train" else 3 for part in set(parts)), dict[str, Timed]()

    def told(done: int) -> None:
        tell(len(found) * (repeats + 1) + done, turns)

    if "train" in parts:
        found |= training(decoder, length, batch, precision, repeats, seed, told)
        continual, warmup = found["continual"], found["warmup"]
        ratio = median(continual.seconds) / median(warmup.seconds)
        _print(f"training step of {batch} x {length} tokens", "time beside warmup", [(warmup, 1.0), (continual, ratio)])
    if "decode" in parts:
        answers = decoding(decoder, decode_batch, prompt, output, repeats, seed, told)
        rows = [(way, way.rate / answers["plain"].rate) for way in answers.values()]
        _print(f"{decode_batch} answers of {output} tokens to prompts of {prompt}", "rate beside no memory", rows)
        found |= answers
    return found


def _check(sizes: Mapping[str, int], parts: Sequence[str], precision: str) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise SpecError(f"found {name}={size}, expected at least 1")
    if not parts or set(parts) - {"train", "decode"}:
        raise SpecError(f"found parts {', '.join(parts) or 'none'}, expected train, decode or both")
    if precision not in ("bf16", "no"):
        raise SpecError(f"found precision {precision!r}, expected bf16 or no")


def _print(what: str, ratio: str, rows: Sequence[tuple[Timed, float]]) -> None:
    print(f"| {what} | s, median [least, most] | tokens/s | {ratio} |\n|---|---|---|---|")
    for way, value in rows:
        print(way.row(value))


def _in_turns(
    ways: Mapping[str, Callable[[int], object]], repeats: int, device: torch.device, told: Callable[[int], None]
) -> dict[str, tuple[float, ...]]:
    """Seconds of `repeats` turns of each way, behind one that does not count; each is given the number of the turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for n in range((repeats + 1) * len(ways)):
        turn, name = n // len(ways), list(ways)[n % len(ways)]
        _wait(device)
        began = time.perf_counter()
        ways[name](turn)
        _wait(device)
        if turn:
            seconds[name].append(time.perf_counter() - began)
        told(n + 1)
    return {name: tuple(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    """A GPU works on after the call that asked it has come back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _words(decoder: Decoder, rng: np.random.Generator, count: int) -> list[int]:
    """Random token ids, none of them special."""
    plain = np.setdiff1d(np.arange(len(decoder.tokenizer)), decoder.tokenizer.all_special_ids)
    return [int(n) for n in rng.choice(plain, count)]


def _text(decoder: Decoder, rng: np.random.Generator) -> str:
    """A random text of at least as many tokens as a reference has, in nearly all cases."""
    return str(decoder.tokenizer.decode(_words(decoder, rng, 2 * decoder.spec.reference_length)))


# ---- training ----


def training(
    decoder: Decoder, length: int, batch: int, precision: str, repeats: int, seed: int, told: Callable[[int], None]
) -> dict[str, Timed]:
    """Steps of both stages on the same random rows: loss, gradient, clipping, and AdamW at a rate of zero.

    Each chunk has a reference of its own, of full length, which is the most that a step can have. Batches are made before the
    clock runs: references are retrieved once, before training.
    """
    rng = np.random.default_rng(seed)
    rows = (repeats + 1) * batch
    ids = np.array(_words(decoder, rng, rows * length), np.int32)
    corpus = Corpus(ids, np.array([0, len(ids)]), "random")
    source = _RandomTexts(decoder, length, rng)
    warmup = Warmup(decoder, corpus, length, batch, seed)
    continual = Continual(decoder, corpus, source, length, batch, seed)
    step = _Step(decoder, precision)
    plain, reading = ([stage.batch(n) for n in range(repeats + 1)] for stage in (warmup, continual))
    references = _count(reading[0])
    was_training = decoder.model.training
    decoder.model.train()
    try:
        ways = {
            "warmup": lambda turn: step(warmup, plain[turn]),
            "continual": lambda turn: step(continual, reading[turn]),
        }
        seconds = _in_turns(ways, repeats, decoder.device, told)
    finally:
        decoder.model.zero_grad()
        decoder.model.train(was_training)
    names = {"warmup": "warmup", "continual": f"continual, {references} references of {decoder.spec.reference_length} tokens"}
    return {key: Timed(names[key], seconds[key], batch * length) for key in ways}


def _count(batch: Retrieved) -> int:
    """Distinct references that a batch encodes."""
    return len({text for own in batch.own for chunk in shared(own) for text in chunk})


@dataclass(frozen=True)
class _RandomTexts:
    """A reference of its own for every chunk."""

    decoder: Decoder
    length: int
    rng: np.random.Generator

    def texts(self, rows: Sequence[int]) -> list[list[str | None]]:
        chunks = -(-(self.length + len(self.decoder.bos_ids)) // self.decoder.spec.chunk_length)
        return [[_text(self.decoder, self.rng) for _ in range(chunks)] for _ in rows]


class _Step:
    """One optimizer step that leaves the weights as they are."""

    def __init__(self, decoder: Decoder, precision: str) -> None:
        self.decoder, self.half = decoder, precision == "bf16"
        self.learned = [p for p in decoder.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=0.0, weight_decay=0.0)

    def __call__(self, objective: Sequences, batch: Any) -> None:
        with torch.autocast(self.decoder.device.type, torch.bfloat16, enabled=self.half):
            loss, _ = objective.loss(self.decoder, batch, 0)  # type: ignore[attr-defined]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---- decoding ----


def decoding(
    decoder: Decoder, batch: int, prompt: int, output: int, repeats: int, seed: int, told: Callable[[int], None]
) -> dict[str, Timed]:
    """Answers to random prompts: without memory, with memory, and with as many references as text before each prompt.

    The paper's setting, as far as one machine has it: every recall of every turn loads references that no other loads, and no
    cache of this library holds them. Their files were written just before, so they come from the system's page cache rather than
    from the disk itself: reading is as fast as it gets. Prefill, recalls and decoding count; the search for references does not,
    for memory and text need the same.
    """
    rng = np.random.default_rng(seed)
    spec = decoder.spec
    chunks = -(-prompt // spec.chunk_length) + -(-output // spec.chunk_length) - 1
    count = (repeats + 1) * batch * chunks * spec.references_per_chunk
    prompts = [_prompt(decoder, _words(decoder, rng, prompt - len(decoder.bos_ids))) for _ in range(batch)]
    config = deepcopy(decoder.model.generation_config)
    config.min_new_tokens, config.do_sample = output, False
    with tempfile.TemporaryDirectory() as folder, random_bank(decoder, Path(folder) / "bank", count, rng) as bank:
        recall, ids = _Recall(bank, spec.references_per_chunk), bank.ids()

        def with_text(turn: int) -> object:
            places = [islice(cycle(ids), n, n + spec.references_per_chunk) for n in range(batch)]
            asked = [_behind(decoder, bank, list(some), p) for some, p in zip(places, prompts, strict=True)]
            return complete(decoder, asked, config=config, max_new_tokens=output)

        ways: dict[str, Callable[[int], object]] = {
            "plain": lambda turn: complete(decoder, prompts, config=config, max_new_tokens=output),
            "memory": lambda turn: complete(decoder, prompts, recall=recall, config=config, max_new_tokens=output),
            "text": with_text,
        }
        seconds = _in_turns(ways, repeats, decoder.device, told)
    names = {
        "plain": "no memory",
        "memory": f"memory: {chunks} recalls of {spec.references_per_chunk}, {spec.slots} tokens per head, files in the page cache",
        "text": f"text of {spec.references_per_chunk} references in the prompt",
    }
    return {key: Timed(names[key], seconds[key], batch * output) for key in ways}


def _prompt(decoder: Decoder, ids: Sequence[int]) -> Prompt:
    bos = decoder.bos_ids
    return Prompt((*bos, *ids), (*[False] * len(bos), *[True] * len(ids)))


def _behind(decoder: Decoder, bank: Bank, ids: Sequence[str], prompt: Prompt) -> Prompt:
    """A prompt behind the texts of some references."""
    texts = [places[0].text for places in bank.references(ids).values()]
    before = chain.from_iterable(decoder.tokens(text)[: decoder.spec.reference_length] for text in texts)
    return _prompt(decoder, [*before, *prompt.ids[len(decoder.bos_ids) :]])


def random_bank(decoder: Decoder, folder: Path, count: int, rng: np.random.Generator) -> Bank:
    """A bank of random texts with random key-values: reading them takes as long as reading true ones."""
    bank, spec = Bank(folder, decoder, create=True), decoder.spec
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    references = [Reference(f"{n} {_text(decoder, rng)}", f"random:{n}") for n in range(count)]
    positions = torch.arange(spec.slots, dtype=torch.uint8).expand(spec.pairs, -1).contiguous()

    def memories(some: Sequence[Reference]) -> Iterator[Memory]:
        for _ in some:
            keys, values = torch.randn(2, spec.pairs, spec.slots, decoder.head_dim, generator=generator).to(decoder.dtype)
            yield Memory(keys.contiguous(), values.contiguous(), positions)

    for start in range(0, count, 64):
        some = references[start : start + 64]
        bank.add(some, list(memories(some)))
    return bank


class _Recall:
    """Every recall brings references that no other brings, from the bank's files."""

    min_score = None

    def __init__(self, bank: Bank, count: int) -> None:
        self.bank, self.count, self.ids = bank, count, cycle(bank.ids())

    def check(self, decoder: Any) -> None:
        """The decoder made the bank."""

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        return [self._next(query) for query in queries]

    def _next(self, query: str) -> Recalled:
        ids = list(islice(self.ids, self.count))
        memories, found = self.bank.read(ids), self.bank.references(ids)
        references = tuple(found[id][0] for id in ids)
        bytes_read = self.bank.record_bytes * len(ids)
        return Recalled(query, tuple(Hit(id, 0.0) for id in ids), tuple(memories), references, bytes_read)
