"""What memory costs in training: the time of a continual step beside a warmup step. Decoding is measured by `memory3 bench`.

Ratios from one run: the ways take turns, and the median of several turns counts, after one turn to warm up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from memory3.bench.scenes import random_text, words
from memory3.bench.turns import Timed, in_turns
from memory3.decoder import Decoder
from memory3.precision import PRECISIONS, resolved
from memory3.spec import SpecError
from memory3.train.corpus import Corpus
from memory3.train.sequences import Continual, Retrieved, Sequences, Warmup, shared

Tell = Callable[[int, int], None]


def measure_speed(
    decoder: Decoder,
    *,
    length: int = 2048,
    batch: int = 1,
    precision: str = "auto",
    repeats: int = 5,
    seed: int = 0,
    tell: Tell = lambda done, total: None,
) -> dict[str, Timed]:
    """Print a Markdown table and return its figures: `warmup` and `continual`.

    Args:
        decoder: its weights stay as they are.
        length: tokens of a training sequence.
        batch: sequences of a training step.
        precision: `bf16` under autocast, `no`, or `auto`, as the training loop has it.
        repeats: turns of each way.
        seed: of the random text.
        tell: told of the turns done.

    Raises:
        SpecError: a size below 1, or an unknown precision.
    """
    for name, size in {"length": length, "batch": batch, "repeats": repeats}.items():
        if size < 1:
            raise SpecError(f"found {name}={size}, expected at least 1")
    if precision not in PRECISIONS:
        raise SpecError(f"found precision {precision!r}, expected {', '.join(PRECISIONS)}")
    found = training(decoder, length, batch, resolved(precision), repeats, seed, lambda done: tell(done, 2 * (repeats + 1)))
    continual, warmup = found["continual"], found["warmup"]
    ratio = median(continual.seconds) / median(warmup.seconds)
    print(
        f"| training step of {batch} x {length} tokens | s, median [least, most] | tokens/s | time beside warmup |\n|---|---|---|---|"
    )
    print(f"{warmup.row(1.0)}\n{continual.row(ratio)}")
    return found


def training(
    decoder: Decoder, length: int, batch: int, precision: str, repeats: int, seed: int, told: Callable[[int], None]
) -> dict[str, Timed]:
    """Steps of both stages on the same random rows: loss, gradient, clipping, and AdamW at a rate of zero.

    Each chunk has a reference of its own, of full length, which is the most that a step can have. Batches are made before the
    clock runs: references are retrieved once, before training.
    """
    rng = np.random.default_rng(seed)
    rows = (repeats + 1) * batch
    ids = np.array(words(decoder, rng, rows * length), np.int32)
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
        seconds = in_turns(ways, repeats, decoder.device, told)
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
        return [[random_text(self.decoder, self.rng) for _ in range(chunks)] for _ in rows]


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
