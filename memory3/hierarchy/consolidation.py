"""The most used memories into parameters: a model without memory learns to say what it says with a reference in memory.

The teacher is the model itself, as it was, reading each reference in memory; no labels are needed, nor any other model. Replay keeps the
rest: on other texts, with and without memory, the model is to foretell what it foretold before.

Memories are tied to the parameters that wrote them (design 3, Remark 9). Those are the embeddings and the layers up to the last memory
layer, and the fingerprint covers just these. So adapters above the last memory layer leave every bank readable, by construction; with
adapters in lower layers too, banks are refused until they are rebuilt.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from memory3.cost import Shape, low_rank_write_flops, memory_read_flops, memory_write_flops, parameters_write_flops
from memory3.decoder import Decoder
from memory3.hierarchy.phrasings import Subject, drawn, plain_context
from memory3.identity import layer_of
from memory3.train.convert import Lora, Teacher, adapters, divergence, divergence_at, linear_layers, memory_logits, plain_logits
from memory3.train.loop import Report, Schedule, Settings, TrainError, run
from memory3.train.passages import Context, ContextMaker
from memory3.train.teaching import Batch, Lesson, Lessons, Mixture

REPLAYED = (("completion", 0.6), ("cloze", 0.4))
"""How other texts are asked about where they are read from memory."""


@dataclass(frozen=True)
class Layers:
    """Which layers a consolidation changes.

    Args:
        name: `above` or `all`.
        first: the first layer with adapters, as a function of the last memory layer.
        keeps_banks: whether banks stay readable.
    """

    name: str
    first: Callable[[int], int]
    keeps_banks: bool


LAYERS = {
    layers.name: layers for layers in (Layers("above", lambda last: last + 1, True), Layers("all", lambda last: 0, False))
}


def first_layer(decoder: Decoder, layers: str) -> int:
    """The first layer that a consolidation changes.

    Raises:
        TrainError: an unknown choice, or no layer above the last memory layer.
    """
    if layers not in LAYERS:
        raise TrainError(f"found layers {layers!r}, expected one of {', '.join(LAYERS)}")
    assert decoder.spec.layers is not None
    first, count = LAYERS[layers].first(decoder.spec.layers[-1]), decoder.geometry.num_layers
    if first >= count:
        raise TrainError(
            f"found memory in the last of {count} layers, expected a layer above it: change all layers (--layers all), and rebuild the banks"
        )
    return first


def adapted_layers(decoder: Decoder, first: int) -> tuple[str, ...]:
    """Names of the linear layers that get an adapter: those of the decoder layers from `first` on."""
    found = tuple(n for n in linear_layers(decoder.model) if (layer := layer_of(n)) is not None and layer >= first)
    if not found:
        raise TrainError(
            f"found no linear layer from layer {first} on, expected some to adapt: change all layers (--layers all)"
        )
    return found


@dataclass(frozen=True)
class Taught:
    """A batch: contexts about references, and contexts that read other texts from memory or are such texts themselves."""

    learned: Batch
    reading: Batch
    plain: list[Context]


@dataclass(frozen=True)
class Consolidation:
    """The objective: `KL(model with the reference in memory || student without)` over what follows each prompt, and
    `replay` times the mean of two divergences from the model as it was, over other texts: read plainly, and from memory.

    Args:
        decoder: gives tokenizer and spec.
        subjects: what is to be known.
        others: texts that are not, for replay.
        batch_size: references of a batch, with at most `contexts` contexts each; half as many other texts are
            replayed, plainly and from memory each.
        contexts: see `batch_size`.
        length: most tokens of a context.
        replay: weight of the replay; 0 goes without (the control).
        teacher: lends the model as it was; `consolidated` puts it in.
        seed: of the batches.

    Raises:
        TrainError: nothing to learn, or nothing to replay.
    """

    decoder: Decoder
    subjects: Sequence[Subject]
    others: Sequence[str]
    batch_size: int = 8
    contexts: int = 3
    length: int = 64
    replay: float = 1.0
    teacher: Teacher | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.subjects:
            raise TrainError("found no reference to consolidate, expected some: name them with --ids, --top or --plan")
        if len(self.others) < 2:
            raise TrainError(
                f"found {len(self.others)} other texts, expected some to replay against forgetting: give documents with --replay"
            )

    @cached_property
    def maker(self) -> ContextMaker:
        """Clozes and completions."""
        return ContextMaker(self.decoder)

    @property
    def replayed(self) -> int:
        """Other texts of a batch."""
        return max(2, self.batch_size // 2)

    @cached_property
    def lessons(self) -> Lessons:
        """What is replayed from memory."""
        mixture = Mixture(REPLAYED, batch=self.replayed, contexts=1, length=self.length, wrong=0.0)
        return Lessons(self.decoder, [Lesson(text) for text in self.others], mixture, self.seed)

    def batch(self, number: int) -> Taught:
        """A batch by its number, drawn from `(seed, number)`."""
        rng = random.Random(self.seed * 1_000_003 + number)
        references: list[str] = []
        contexts: list[Context] = []
        about: list[int] = []
        for subject in rng.sample(list(self.subjects), len(self.subjects)):
            made = [c for _ in range(self.contexts) if (c := drawn(self.maker, subject, self.length, rng)) is not None]
            if made:
                distinct = list({tuple(c.ids): c for c in made}.values())
                contexts += distinct
                about += [len(references)] * len(distinct)
                references.append(subject.text)
            if len(references) == self.batch_size:
                break
        if not contexts:
            raise TrainError(
                f"found {len(self.subjects)} references that allow no question or continuation, expected some of 16 words or more: name others"
            )
        plain = rng.sample(list(self.others), min(self.replayed, len(self.others)))
        return Taught(
            Batch(references, contexts, about, [[n] for n in about]),
            self.lessons.batch(number),
            [plain_context(self.decoder, text, self.length) for text in plain],
        )

    def tokens(self, batch: Taught) -> int:
        """Tokens of all contexts."""
        return sum(len(c.ids) for c in (*batch.learned.contexts, *batch.reading.contexts, *batch.plain))

    def loss(self, decoder: Decoder, batch: Taught, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss `()`; figures are `kl`, `replay_plain` and `replay_memory` in nats a token, and `agreement`: how often the
        model without memory would say the same next token as with it.
        """
        known, before, read_before = self._taught(batch)
        student = plain_logits(decoder, batch.learned.contexts)
        kl, agreement = divergence_at(known, student, _targets(batch.learned, student.device))
        figures = {"kl": float(kl.detach()), "agreement": agreement}
        if before is None or read_before is None:
            return kl, figures
        plain = Batch([], batch.plain, [], [])
        kept, _ = divergence(before, plain_logits(decoder, batch.plain), plain)
        read, _ = divergence(read_before, memory_logits(decoder, batch.reading), batch.reading)
        figures |= {"replay_plain": float(kept.detach()), "replay_memory": float(read.detach())}
        return kl + self.replay * (kept + read) / 2, figures

    @torch.no_grad()
    def _taught(self, batch: Taught) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.teacher is None:
            raise TrainError("found no teacher, expected one: run it with memory3.hierarchy.consolidation.consolidated")
        with self.teacher() as decoder:
            known = memory_logits(decoder, batch.learned)
            if self.replay <= 0:
                return known, None, None
            return known, plain_logits(decoder, batch.plain), memory_logits(decoder, batch.reading)


def _targets(batch: Batch, device: torch.device) -> Tensor:
    """Where `(B, L)` logits foretell a target token: from the last token of a prompt to the one before the end."""
    places = torch.arange(batch.longest, device=device)[None, :]
    start = torch.tensor([c.target_start - 1 for c in batch.contexts], device=device)[:, None]
    end = torch.tensor([max(c.target_start, len(c.ids) - 1) for c in batch.contexts], device=device)[:, None]
    return (places >= start) & (places < end)


# ---- the run ----


@dataclass(frozen=True)
class Paid:
    """What a consolidation cost.

    Args:
        first_layer: the lowest that was changed.
        parameters: of the adapter.
        steps: done.
        tokens: of all contexts.
        flops: see `work`.
        seconds: of this call; a run that was resumed took more.
    """

    first_layer: int
    parameters: int
    steps: int
    tokens: int
    flops: float
    seconds: float


def consolidated(
    decoder: Decoder,
    objective: Consolidation,
    settings: Settings,
    out: Path,
    *,
    layers: str = "above",
    lora: Lora | None = None,
    base: str | None = None,
    report: Report = lambda line: None,
) -> Paid:
    """Run or resume a consolidation: an ordinary peft adapter in `out`, which is merged into the decoder's model as well.

    Args:
        decoder: attached to the model as it was.
        objective: what to learn; its teacher is put in here.
        settings: of the loop.
        out: folder of the adapter; written when all steps are done.
        layers: `above` the last memory layer, where every bank stays readable, or `all`.
        lora: its rank and scale; `targets` are put in here.
        base: folder or hub name of the model, for the adapter's config; `None` is the one that ships.
        report: told of figures.

    Raises:
        TrainError: no layer to change, peft is missing, or see `memory3.train.loop.run`.
    """
    first, began = first_layer(decoder, layers), time.perf_counter()
    chosen = replace(lora or Lora(seed=objective.seed), targets=adapted_layers(decoder, first))
    facts = {"stage": f"consolidate {layers}", **_facts(objective, chosen), "model": decoder.identity()["weights"]}
    with adapters(decoder, chosen, out, base) as teacher:
        told = replace(objective, teacher=teacher)
        parameters = sum(p.numel() for p in decoder.model.parameters() if p.requires_grad)
        done = run(decoder, told, replace(settings, facts={**facts, **settings.facts}), report)
        if done < settings.schedule.steps:
            raise TrainError(
                f"found time for {done} of {settings.schedule.steps} steps, expected all of them for an adapter: run the same command again to go on"
            )
    seconds = time.perf_counter() - began
    tokens, flops = work(objective, done, chosen.rank, first)
    return Paid(first, parameters, done, tokens, flops, seconds)


def _facts(objective: Consolidation, lora: Lora) -> dict[str, object]:
    """What a checkpoint of this run is of."""
    texts = "\n".join([*(s.id for s in objective.subjects), *objective.others])
    return {
        "references": len(objective.subjects),
        "texts": hashlib.blake2b(texts.encode(), digest_size=8).hexdigest(),
        "rank": lora.rank,
        "alpha": lora.alpha,
        "batch": objective.batch_size,
        "replay": objective.replay,
    }


def work(objective: Consolidation, steps: int, rank: int, first: int) -> tuple[int, float]:
    """Tokens of the contexts of so many steps, and FLOPs of all passes, by the formulas of `memory3.cost`.

    Counted are the student's passes over the contexts (forward through all layers, backward down to layer `first`), the
    teacher's forward passes over the same, the encoding of references (by teacher and student), and their attention to memories.
    """
    decoder, shape = objective.decoder, Shape.of(objective.decoder.model.config)
    spec, length = decoder.spec, objective.length
    assert spec.layers is not None
    one = replace(spec, reference_length=1)
    student = low_rank_write_flops(shape, one, rank, length, first)
    teacher = parameters_write_flops(shape, one, length) / 3  # forward alone
    backward = 3 if first <= spec.layers[-1] else 1  # the student's encoding, where gradients pass through it
    tokens, flops = 0, 0.0
    for batch in map(objective.batch, range(steps)):
        replayed = objective.replay > 0
        count = objective.tokens(batch) if replayed else sum(len(c.ids) for c in batch.learned.contexts)
        tokens += count
        flops += count * (student + teacher)
        reads = len(batch.learned.about)
        flops += _encoding(decoder, shape, batch.learned.references)
        if replayed:
            reads += (1 + backward) * sum(map(len, batch.reading.read))
            flops += (1 + backward) * _encoding(decoder, shape, batch.reading.references)
        flops += reads * memory_read_flops(shape, spec)
    return tokens, flops


def _encoding(decoder: Decoder, shape: Shape, texts: Sequence[str]) -> float:
    most = decoder.spec.reference_length
    lengths = [max(1, min(most, len(decoder.tokens(text)))) for text in texts]
    return sum(memory_write_flops(shape, replace(decoder.spec, reference_length=n)) for n in lengths)


def schedule_of(steps: int, rate: float) -> Schedule:
    """Warmup-stable-decay: a twentieth up, the last third down."""
    return Schedule(rate, steps, warmup=max(1, steps // 20), decay=steps // 3)
