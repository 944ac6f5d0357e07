"""Convert a decoder: it learns to read references from sparse memory as it read them before from the text of its prompt.

The teacher is the model itself, as it was, with the references in front of the context; the student has them in memory. No
labels are needed, nor any other model. `B` contexts, `L` tokens of the longest, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from memory3.context import GAP
from memory3.decoder import Decoder, Layout
from memory3.quiet import old_words
from memory3.train.loop import Report, Schedule, Settings, TrainError, run
from memory3.train.passages import Context
from memory3.train.recalled import read_texts
from memory3.train.teaching import Batch, Lesson, Lessons, Mixture, longest_text
from memory3.train.thinning import Thinning, checked, halvings, thinned

Teacher = Callable[[], AbstractContextManager[Decoder]]
"""Lends the decoder as it was before conversion."""


@dataclass(frozen=True)
class Conversion:
    """The objective of a conversion: `distillation * KL(teacher || student) + label_loss * cross-entropy of the targets`.

    The divergence is that of the next-token distributions at temperature 1, averaged over all tokens of the contexts.
    The cross-entropy leaves contexts out that read others' references only: answering those would be guessing.

    Args:
        decoder: gives tokenizer and spec.
        pool: lessons of distinct references.
        thinning: tokens per head by step; by default the spec's own from the first step.
        mixture: how lessons become batches.
        label_loss: weight of the labels.
        distillation: weight of the teacher.
        teacher: lends it; `converted` puts it in.
        seed: of the batches.
        held: lessons that are measured, not learned.

    Raises:
        TrainError: both weights are 0, or the teacher cannot hold the references' text in its window.
    """

    decoder: Decoder
    pool: Sequence[Lesson]
    thinning: Thinning = ()
    mixture: Mixture = field(default_factory=Mixture)
    label_loss: float = 0.0
    distillation: float = 1.0
    teacher: Teacher | None = None
    seed: int = 0
    held: Sequence[Lesson] = ()

    def __post_init__(self) -> None:
        checked(self.thinning)
        if self.label_loss <= 0 and self.distillation <= 0:
            raise TrainError("found no weight on labels or distillation, expected one above 0: there is nothing to learn")
        needed = longest_text(self.decoder, self.mixture)
        if self.distillation > 0 and needed > self.decoder.window:
            raise TrainError(
                f"found up to {needed} tokens of references and context in the teacher's prompt, expected at most {self.decoder.window}, "
                "the model's window: let contexts read fewer references"
            )

    @cached_property
    def lessons(self) -> Lessons:
        """Where batches come from."""
        return Lessons(self.decoder, self.pool, self.mixture, self.seed)

    def batch(self, number: int) -> Batch:
        """A batch by its number, drawn from `(seed, number)`."""
        return self.lessons.batch(number)

    def tokens(self, batch: Batch) -> int:
        """Tokens of contexts and references."""
        return sum(len(c.ids) for c in batch.contexts) + sum(len(self.decoder.tokens(t)) for t in batch.references)

    @property
    def length(self) -> int:
        """Tokens of a context at most: what the log's count of work goes by."""
        return self.mixture.length

    def loss(self, decoder: Decoder, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss `()`; figures are `kl` in nats a token, `label` and `accuracy` of the target tokens, and `agreement`: how
        often teacher and student would say the same next token.
        """
        student = memory_logits(thinned(decoder, self.thinning, step), batch)
        total = student.new_zeros(())
        figures: dict[str, float] = {}
        if self.label_loss > 0:
            label, accuracy = label_loss(student, batch)
            total = total + self.label_loss * label
            figures |= {"label": float(label.detach()), "accuracy": accuracy}
        if self.distillation > 0:
            kl, agreement = divergence(self.taught(batch), student, batch)
            total = total + self.distillation * kl
            figures |= {"kl": float(kl.detach()), "agreement": agreement}
        return total, figures

    def measured(self, decoder: Decoder) -> dict[str, float]:
        """Figures of the held lessons (`held_out`), where there are any."""
        return held_out(decoder, self, self.held) if self.held else {}

    @torch.no_grad()
    def taught(self, batch: Batch) -> Tensor:
        """The teacher's logits `(B, L, V)`, without gradient."""
        if self.teacher is None:
            raise TrainError("found no teacher, expected one: run the conversion with memory3.train.convert.converted")
        with self.teacher() as decoder:
            return text_logits(decoder, batch)


# ---- teacher and student on the same tokens ----


def memory_logits(decoder: Decoder, batch: Batch) -> Tensor:
    """Logits `(B, L, V)` behind each context token, the references in memory, encoded here with gradient.

    All tokens of a context read the same references, as a short prompt and its first answer chunk do (design section 3).
    """
    layout = decoder.layout(
        [c.ids for c in batch.contexts], padding_side="right", grid=[[0] * len(c.ids) for c in batch.contexts]
    )
    reading = read_texts(decoder, layout, [[batch.texts(b)] for b in range(len(batch.contexts))])
    logits: Tensor = decoder.forward(layout, reading, logits_to_keep=batch.longest).logits
    return logits


def plain_logits(decoder: Decoder, contexts: Sequence[Context]) -> Tensor:
    """Logits `(B, L, V)` behind each token of contexts that read nothing, as the model computes them without memory."""
    layout = decoder.layout([c.ids for c in contexts], padding_side="right", memory=False)
    logits: Tensor = decoder.forward(layout).logits
    return logits


def text_logits(decoder: Decoder, batch: Batch) -> Tensor:
    """Logits `(B, L, V)` behind the same tokens, the references as text where memory would be, and no memory."""
    logits: Tensor = decoder.forward(text_layout(decoder, batch), logits_to_keep=batch.longest).logits
    return logits


def text_layout(decoder: Decoder, batch: Batch) -> Layout:
    """The reference BOS, the texts of the references with a blank line between them, and the context, in the last `L` columns.

    A context begins at the position where it begins behind memories, or right behind its text where that is longer than one
    reference. So with one reference the plain model computes what dense memory in all layers computes (design 7.2).
    """
    gap, most = decoder.tokens(GAP), decoder.spec.reference_length
    fronts = [_joined([decoder.tokens(t)[:most] for t in batch.texts(b)], gap) for b in range(len(batch.contexts))]
    prefix, width = decoder.prefix_ids, max(map(len, fronts))
    rows: list[tuple[list[int], list[int], list[int]]] = []
    for front, context in zip(fronts, batch.contexts, strict=True):
        before, behind = width - len(front), batch.longest - len(context.ids)
        length, start = len(prefix) + len(front), max(decoder.context_start, len(prefix) + len(front))
        places = [*range(length), *range(start, start + len(context.ids))]
        rows.append(
            (
                [*[0] * before, *prefix, *front, *context.ids, *[0] * behind],
                [*[0] * before, *[1] * (length + len(context.ids)), *[0] * behind],
                [*[0] * before, *places, *[0] * behind],
            )
        )
    ids, mask, positions = (torch.tensor(list(column), device=decoder.device) for column in zip(*rows, strict=True))
    return Layout(ids, mask, positions, torch.full_like(ids, -1))


def _joined(texts: Sequence[list[int]], gap: list[int]) -> list[int]:
    return [token for n, text in enumerate(texts) for token in [*(gap if n else []), *text]]


def divergence(teacher: Tensor, student: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """Mean `KL(teacher || student)` `()` in nats over the tokens of the contexts, and the share where both prefer the same
    next token; logits `(B, L, V)` of any dtype, computed in float32.
    """
    lengths = torch.tensor([len(c.ids) for c in batch.contexts], device=student.device)
    return divergence_at(teacher, student, torch.arange(batch.longest, device=student.device)[None, :] < lengths[:, None])


def divergence_at(teacher: Tensor, student: Tensor, places: Tensor) -> tuple[Tensor, float]:
    """The same over the tokens that `places` `(B, L)` is true for."""
    theirs, ours = (t[places].float().log_softmax(-1) for t in (teacher, student))
    kl = functional.kl_div(ours, theirs, log_target=True, reduction="sum") / len(ours)
    return kl, float((theirs.argmax(-1) == ours.argmax(-1)).float().mean())


def label_loss(student: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """Mean cross-entropy `()` of the target tokens from logits `(B, L, V)`, and the share of them that are predicted; zeros
    where no context of the batch has both a target and its own reference.
    """
    rows = [
        (b, place - 1, context.ids[place])
        for b, context in enumerate(batch.contexts)
        for place in range(context.target_start, len(context.ids))
        if batch.about[b] in batch.read[b]
    ]
    if not rows:
        return student.new_zeros(()), 0.0
    at, before, labels = torch.tensor(rows, device=student.device).T
    logits = student[at, before].float()
    return functional.cross_entropy(logits, labels), float((logits.detach().argmax(-1) == labels).float().mean())


# ---- what learns, and what it is compared with ----


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685): the learned change of a matrix is `alpha / rank * B A`, `B` zero at first.

    Args:
        rank: of the change.
        alpha: its scale.
        targets: names of the linear layers that learn, such as `q_proj`; by default all but the output embeddings, and in a
            mixture of experts those of the attention.
        dropout: of the adapters' input while they train.
        seed: of their first weights.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    seed: int = 0


@contextmanager
def adapters(decoder: Decoder, lora: Lora, save: Path | None = None, base: str | None = None) -> Iterator[Teacher]:
    """Inside, only adapters learn, and the teacher is the model with its adapters off. Leaving merges them into the weights,
    unless by an exception: then the model is what it was.

    With `save` they become an ordinary peft adapter in that folder first, of the model that `base` names; no name is the model
    that ships, wherever it lies. Merging computes the same sums in another order: in float32, logits of size 5 were seen to move by less than 1e-4.

    Raises:
        TrainError: peft is missing, or no layer bears a target's name.
    """
    try:
        from peft import LoraConfig, PeftModel
    except ImportError:
        raise TrainError("found no peft, expected it for LoRA: pip install 'memory3[train]'") from None
    learned = [(p, p.requires_grad) for p in decoder.model.parameters()]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base or "",  # for `None`, peft would write where the model lies on this machine
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets or linear_layers(decoder.model)),
    )
    with torch.random.fork_rng(devices=[]), old_words():  # adapters are drawn on the CPU, then moved
        torch.manual_seed(lora.seed)
        try:
            wrapped = PeftModel(decoder.model, config)  # adapters of a bf16 model learn in float32
        except ValueError as error:
            raise TrainError(
                f"found no layer to adapt ({error}), expected names such as q_proj: give other targets, or none for all"
            ) from None
    tuner, merge = wrapped.base_model, False
    try:
        yield partial(_adapters_off, decoder, tuner)
        if save is not None:
            wrapped.save_pretrained(save, save_embedding_layers=False)
        merge = True
    finally:
        tuner.merge_and_unload() if merge else tuner.unload()
        with torch.no_grad():
            for parameter, learns in learned:
                parameter.requires_grad_(learns)
                parameter.mul_(1)  # peft writes through `.data`, which torch does not count: the fingerprint must notice


def linear_layers(model: Any) -> list[str]:
    """Names of a model's linear layers, the output embeddings left out. In a mixture of experts only those of the attention:
    peft takes names of MLP layers there for the experts' own, which are no linear layers.
    """
    output, experts = model.get_output_embeddings(), any(p.ndim > 2 for p in model.parameters())
    return [
        f"{name}.{part}" if name else part
        for name, module in model.named_modules()
        for part, layer in module.named_children()
        if isinstance(layer, nn.Linear) and layer is not output and (not experts or hasattr(module, "layer_idx"))
    ]


@contextmanager
def _adapters_off(decoder: Decoder, tuner: Any) -> Iterator[Decoder]:
    was_training = decoder.model.training
    decoder.model.eval()
    tuner.disable_adapter_layers()
    try:
        yield decoder
    finally:
        tuner.enable_adapter_layers()
        decoder.model.train(was_training)


@contextmanager
def frozen_copy(decoder: Decoder) -> Iterator[Teacher]:
    """Inside, all weights may learn, and the teacher is a copy of the model as it was: twice the memory of its weights."""
    teacher = copy.copy(decoder)
    teacher.model = copy.deepcopy(decoder.model).requires_grad_(False).eval()

    @contextmanager
    def lent() -> Iterator[Decoder]:
        teacher.model.to(decoder.device)
        yield teacher

    yield lent


# ---- the run ----

HELD_BATCHES = 8


def converted(
    decoder: Decoder,
    objective: Conversion,
    settings: Settings,
    *,
    lora: Lora | None = None,
    held: Sequence[Lesson] = (),
    report: Report = lambda line: None,
) -> tuple[Decoder, int]:
    """Run or resume a conversion of the decoder's model in place; adapters are merged at the end, also where time is up.

    A run that goes on must start from the model as it was, for that is the teacher; the checkpoint brings what was learned.

    Args:
        decoder: attached to the model before conversion, under the spec whose layers, heads and selection are wanted.
        objective: what to learn; its teacher is put in here.
        settings: of the loop.
        lora: adapters learn; by default all weights.
        held: lessons that a report before the first step and one at the end are made of (`held_out`), as the last row of
            `thinning` reads them; both stand in the log too.
        report: told of figures.

    Returns:
        The decoder under the spec it was converted for, and the steps done.

    Raises:
        TrainError: see `Conversion`, `adapters` and `memory3.train.loop.run`.
    """
    lent: AbstractContextManager[Teacher | None]
    lent = adapters(decoder, lora) if lora else frozen_copy(decoder) if objective.distillation > 0 else nullcontext()
    with lent as teacher:
        done = run(decoder, replace(objective, teacher=teacher, held=held), settings, report)
    return thinned(decoder, objective.thinning), done


@torch.no_grad()
def held_out(decoder: Decoder, objective: Conversion, held: Sequence[Lesson], batches: int = HELD_BATCHES) -> dict[str, float]:
    """Figures of `Conversion.loss` on lessons kept apart, beside the control: the student with others' references in memory.

    `held_kl` and `held_agreement` compare with the teacher that has the right text; `held_accuracy` counts target tokens;
    `wrong_…` are those of the control.
    """
    lessons = Lessons(decoder, held, replace(objective.mixture, wrong=0.0), objective.seed)
    view = thinned(decoder, objective.thinning)
    was_training = decoder.model.training
    decoder.model.eval()
    sums: dict[str, float] = {}
    for batch in map(lessons.batch, range(batches)):
        for name, read in (("held", batch), ("wrong", batch.misled())):
            student = memory_logits(view, read)
            found = {"accuracy": label_loss(student, batch)[1]}
            if objective.teacher is not None:
                kl, found["agreement"] = divergence(objective.taught(batch), student, batch)
                found["kl"] = float(kl)
            for figure, value in found.items():
                sums[f"{name}_{figure}"] = sums.get(f"{name}_{figure}", 0.0) + value / batches
    decoder.model.train(was_training)
    return sums


def recipe(
    decoder: Decoder, pool: Sequence[Lesson], folder: Path, *, steps: int = 2000, lora: bool = True, seed: int = 0
) -> tuple[Conversion, Lora | None, Settings]:
    """A conversion of a chat or base model of 0.1 to 3 billion parameters, by distillation, dense memory first.

    Data: 20,000 references or more of the kind that the bank will hold (documents are enough; questions help), 500 of them
    kept apart for `held`. A batch is 16 references and at most 32 contexts, so 2,000 steps see each reference about once or
    twice. Hardware: one GPU that holds the weights twice; teacher and student together cost about three forward and two backward
    passes over 32 contexts of 64 tokens, of which the teacher's hold up to five references as text (about 700 tokens).
    Hours, and the number reached, have not been measured at this size; look at `held_kl` and `held_agreement` against
    `wrong_kl` in the reports: conversion has worked when `held_kl` has left its first value far behind and `wrong_kl` has not
    followed. What a toy gives stands in tests/test_convert.py.

    Args:
        decoder: attached under the wanted spec.
        pool: lessons.
        folder: of the checkpoints.
        steps: the one dial; the thinning stretches with it.
        lora: adapters of rank 16 in all linear layers at rate 2e-4; else all weights at 2e-5.
        seed: of batches and adapters.
    """
    spec = decoder.spec
    objective = Conversion(
        decoder, pool, halvings(spec.reference_length, spec.tokens_per_head, steps), Mixture(batch=16), seed=seed
    )
    schedule = Schedule(2e-4 if lora else 2e-5, steps, warmup=max(1, steps // 20), decay=steps // 5)
    return objective, Lora(seed=seed) if lora else None, Settings(folder, schedule, seed=seed)
