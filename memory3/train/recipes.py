"""The recipes: functions that return a complete run. Adding one: a function, and a row in `RECIPES`.

A recipe's docstring is its promise: data, hardware, time, and the number to expect, or that nobody has measured it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memory3.decoder import Decoder, attach
from memory3.documents import documents
from memory3.loading import load
from memory3.remote import open_bank
from memory3.rows import rows
from memory3.spec import MemorySpec
from memory3.train.convert import converted
from memory3.train.convert import recipe as conversion
from memory3.train.corpus import Corpus, tokenised
from memory3.train.grid import RecalledTexts
from memory3.train.instruct import PEAK as SFT_PEAK
from memory3.train.instruct import Instruct, examples_of, schedule_of
from memory3.train.loop import run
from memory3.train.preference import EPOCHS as DPO_EPOCHS
from memory3.train.preference import PEAK as DPO_PEAK
from memory3.train.preference import pairs_of, preference
from memory3.train.recipe import Reader
from memory3.train.retrieved import Asking, ChunkReferences
from memory3.train.sequences import Continual, Warmup
from memory3.train.settings import Objective, Report, Schedule, Settings, TrainError
from memory3.train.shapes import paper_0_9b, paper_2_4b, shape
from memory3.train.teaching import Lesson, asked, lessons, merged, parted
from memory3.train.thinning import halvings
from memory3.train.tokenizer import trained_tokenizer

Tell = Callable[[str, int, int | None], None]
"""Told what is being prepared, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Inputs:
    """What a user gives to a recipe. `None` leaves the choice to it.

    Args:
        data: files, folders or hub datasets (`hub:NAME`); for `reader` one folder.
        out: folder of caches, checkpoints and the finished model.
        model: where to start from; by default the model that ships, or fresh weights for `warmup`.
        bank: whose references are recalled.
        spec: overrules the model's own memory spec.
        size: the dial of fresh models: their depth (`memory3.train.shapes.shape`).
        steps: optimizer steps; rate: peak learning rate; batch: sequences or examples of a micro-batch; length: tokens of a
            sequence; accumulate: micro-batches of a step.
        minutes: most wall time of this call.
        seed: of weights, order and batches.
        text_field: column of the text.
        exclude_own: `continual`: a chunk never reads references of its own document.
        peak_flops: of one process's device, for the share that is used.
        tell: told of the preparation.
    """

    data: tuple[str, ...]
    out: Path
    model: str | None = None
    bank: str | None = None
    spec: MemorySpec | None = None
    size: int = 6
    steps: int | None = None
    rate: float | None = None
    batch: int | None = None
    length: int | None = None
    accumulate: int = 1
    minutes: float | None = None
    seed: int = 0
    text_field: str = "text"
    exclude_own: bool = False
    peak_flops: float | None = None
    tell: Tell = field(default=lambda what, done, total: None)

    def settings(self, schedule: Any, **options: Any) -> Settings:
        """Of the loop, in the folder of this run."""
        known = {"minutes": self.minutes, "accumulate": self.accumulate, "seed": self.seed, "peak_flops": self.peak_flops}
        return Settings(self.out, schedule, **(known | options))

    def wsd(self, steps: int, rate: float) -> Schedule:
        """Warmup-stable-decay: a twentieth up, the last fifth down."""
        steps, rate = self.steps or steps, self.rate or rate
        return Schedule(rate, steps, warmup=max(1, steps // 20), decay=steps // 5)

    def telling(self, what: str) -> Callable[[int, int | None], None]:
        """Progress of one part of the preparation."""
        return lambda done, total: self.tell(what, done, total)


@dataclass(frozen=True)
class Run:
    """A complete run.

    Args:
        decoder: whose model learns.
        settings: of the loop.
        spec: goes beside the finished weights; `None` where the model has not learned to read memory yet.
        train: runs or resumes it, and returns the steps done.
    """

    decoder: Decoder
    settings: Settings
    spec: MemorySpec | None
    train: Callable[[Report], int]


def plain_run(
    decoder: Decoder, objective: AbstractContextManager[Objective], settings: Settings, spec: MemorySpec | None
) -> Run:
    """A run of the loop on an objective, which is made when it begins and left when it ends (it may keep a reference model)."""

    def train(report: Report) -> int:
        with objective as made:
            return run(decoder, made, settings, report)

    return Run(decoder, settings, spec, train)


Recipe = Callable[[Inputs], Run]


# ---- warmup ----


def warmup_small(inputs: Inputs) -> Run:
    """Plain language modelling from fresh weights of `--size` layers, with a tokenizer of 8,192 tokens made from the data.

    Data: any text, ten million tokens or more. Hardware: two cores. Time: 1,000 steps of 8 sequences of 512 tokens at size 6
    are four million tokens; the tutorial has the minutes. Expect fluent nonsense: a start for `continual`, no more.
    """
    return _warmup(inputs, lambda vocabulary: shape(inputs.size, vocabulary), 8192, (1000, 1e-3, 8, 512))


def warmup_paper_0_9b(inputs: Inputs) -> Run:
    """The paper's ablation shape: 0.92e9 parameters without embeddings, sequences of 2,048 tokens, vocabulary of 60,416.

    Data: the paper does not say how much its ablation saw; 20 tokens a parameter are 18e9. Hardware: several GPUs, by
    `accelerate launch`. Never run here: no figure to expect.
    """
    return _warmup(inputs, lambda vocabulary: paper_0_9b(), 60416, (10_000, 4e-4, 8, 2048))


def warmup_paper_2_4b(inputs: Inputs) -> Run:
    """The paper's model: 2.43e9 parameters without embeddings, sequences of 2,048 tokens, vocabulary of 60,416.

    Data: the authors' run went on to 3.1e12 tokens before it diverged (design section 4), which is a
    cluster. Hardware: several nodes of GPUs, by `accelerate launch`. Never run here: no figure to expect.
    """
    return _warmup(inputs, lambda vocabulary: paper_2_4b(), 60416, (10_000, 4e-4, 8, 2048))


def warmup_model(inputs: Inputs) -> Run:
    """Plain language modelling from `--model`: more of what it has had, before memory. Sequences of 2,048 tokens.

    Data: any text. Hardware: what holds the model four times (weights, gradients, two moments).
    """
    decoder = _loaded(inputs)
    return _language_modelling(inputs, decoder, tokenised_of(inputs, decoder), (1000, 3e-4, 4, 2048))


def _warmup(inputs: Inputs, config: Callable[[int], Any], vocabulary: int, defaults: tuple[int, float, int, int]) -> Run:
    if inputs.model is not None:
        raise TrainError("found --model with a recipe that starts from fresh weights, expected none: use the recipe `model`")
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    place = inputs.out / "tokenizer"
    if not (place / "tokenizer.json").exists():
        made = trained_tokenizer((d.text for d in documents(list(inputs.data), text_field=inputs.text_field)), vocabulary)
        made.save_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    shaped = config(len(tokenizer))
    shaped.vocab_size = max(shaped.vocab_size, len(tokenizer))
    torch.manual_seed(inputs.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is about to be trained for memory
        decoder = attach(LlamaForCausalLM(shaped), tokenizer, inputs.spec or MemorySpec())
    return _language_modelling(inputs, decoder, tokenised_of(inputs, decoder), defaults)


def _language_modelling(inputs: Inputs, decoder: Decoder, corpus: Corpus, defaults: tuple[int, float, int, int]) -> Run:
    steps, rate, batch, length = defaults
    objective = Warmup(decoder, corpus, inputs.length or length, inputs.batch or batch, inputs.seed)
    return plain_run(decoder, nullcontext(objective), inputs.settings(inputs.wsd(steps, rate)), None)


# ---- continual ----


def continual_paper(inputs: Inputs) -> Run:
    """The paper's second stage from a warmed-up `--model`: every 64-token chunk of a 2,048-token sequence reads its own
    reference and those of the four chunks before, with the spec's tokens per head from the first step.

    Data: text, and a `--bank` of references. A small model does not learn to read this way within 300 steps (design section
    4); `thinned` is for those.
    """
    return _continual(inputs, thinned=False)


def continual_thinned(inputs: Inputs) -> Run:
    """The curriculum of design section 4: the same sequences, but memory is dense at first, with language modelling on the
    references too, and is thinned out by halves over the first half of the run. Memory layers are those of the spec throughout.

    Data: text, and a `--bank` of references. Starts from `--model`, warmed up or not.
    """
    return _continual(inputs, thinned=True)


def _continual(inputs: Inputs, thinned: bool) -> Run:
    if inputs.bank is None:
        raise TrainError(
            "found no --bank, expected one whose references the chunks recall: memory3 write SOURCES --bank FOLDER"
        )
    decoder, length = _loaded(inputs), inputs.length or 2048
    schedule, spec = inputs.wsd(2000, 3e-4), decoder.spec
    corpus = tokenised_of(inputs, decoder)
    asking = Asking(exclude_own=inputs.exclude_own)
    references = ChunkReferences(decoder, corpus, open_bank(inputs.bank), length, asking)
    references.prepare(inputs.telling("retrieving"))
    thinning = halvings(spec.reference_length, spec.tokens_per_head, schedule.steps) if thinned else ()
    objective = Continual(
        decoder,
        corpus,
        references,
        length,
        inputs.batch or 4,
        inputs.seed,
        thinning=thinning,
        reference_loss=0.3 if thinned else 0.0,
    )
    return plain_run(decoder, nullcontext(objective), inputs.settings(schedule), spec)


# ---- convert ----


def convert_lora(inputs: Inputs) -> Run:
    """A decoder learns by adapters (rank 16) to read from memory what it reads from text; no labels, the teacher is itself.

    Data: documents of the kind that the bank will hold, 20,000 references or more; or rows with `question` and `passage`.
    Hardware and expectations: `memory3.train.convert.recipe`.
    """
    return _convert(inputs, lora=True)


def convert_full(inputs: Inputs) -> Run:
    """The same with all weights, and a frozen copy of the model as its teacher. Data: as for `lora`."""
    return _convert(inputs, lora=False)


def convert_labels(inputs: Inputs) -> Run:
    """All weights, without a teacher: cross-entropy of continuations, completions and answers. The control of `full`; data as for it."""
    return _convert(inputs, lora=False, labels=True)


def _convert(inputs: Inputs, lora: bool, labels: bool = False) -> Run:
    decoder = _loaded(inputs)
    found = lessons_of(inputs, decoder)
    pool, held = parted(found, min(500, len(found) // 10), inputs.seed)
    objective, adapters, settings = conversion(
        decoder, pool, inputs.out, steps=inputs.steps or 2000, lora=lora, seed=inputs.seed
    )
    if labels:
        mixture = replace(objective.mixture, wrong=0.0)  # contexts without their reference carry no label
        objective = replace(objective, label_loss=1.0, distillation=0.0, mixture=mixture)
    if inputs.batch:
        objective = replace(objective, mixture=replace(objective.mixture, batch=inputs.batch))
    schedule = replace(settings.schedule, peak=inputs.rate or settings.schedule.peak)
    settings = inputs.settings(schedule)

    def train(report: Report) -> int:
        return converted(decoder, objective, settings, lora=adapters, held=held, report=report)[1]

    return Run(decoder, settings, decoder.spec, train)


def lessons_of(inputs: Inputs, decoder: Decoder) -> list[Lesson]:
    """Rows of a table with questions as questions about their passages, everything else as documents."""
    tables = [Path(d) for d in inputs.data if _asks(Path(d))]
    rest = [d for d in inputs.data if Path(d) not in tables]
    found = asked(decoder, (row for table in tables for row in rows(table)))
    if rest:
        telling = inputs.telling("cutting documents")
        found += lessons(decoder, documents(rest, text_field=inputs.text_field), telling)
    return merged(found)


def _asks(table: Path) -> bool:
    """Whether a file is a table whose first row has a question."""
    if table.suffix not in (".jsonl", ".parquet"):
        return False
    first = next(iter(rows(table)), None)
    return first is not None and "question" in first[1]


# ---- sft, dpo ----


def sft_paper(inputs: Inputs) -> Run:
    """Supervised finetuning by the paper's numbers: cosine, at most 5e-5, 10 % warmup, 3 epochs; memory as in generation.

    Data: JSONL or Parquet with `prompt` and `response`, `question` and `answers`, or `messages`; a `--bank`, or none for
    finetuning without memory. Hardware: what holds the model four times.
    """
    decoder = _loaded(inputs)
    found = [e for d in inputs.data for e in examples_of(decoder, Path(d), tell=inputs.telling("reading examples"))]
    objective = Instruct(found, inputs.batch or 8, inputs.seed, recalled_by(inputs, decoder))
    schedule = schedule_of(inputs.rate or SFT_PEAK, inputs.steps or objective.steps())
    return plain_run(decoder, nullcontext(objective), inputs.settings(schedule), _kept_spec(inputs, decoder))


def dpo_paper(inputs: Inputs) -> Run:
    """Preferences by the paper's numbers: DPO at beta 0.01, cosine, at most 4e-6; memory as in generation.

    Data: JSONL or Parquet with `prompt`, `chosen` and `rejected` (texts or messages). Hardware: what holds the model five
    times, for the reference model stays beside it. One epoch: the paper does not say how many.
    """
    decoder = _loaded(inputs)
    pairs = [p for d in inputs.data for p in pairs_of(decoder, Path(d), tell=inputs.telling("reading pairs"))]
    size = inputs.batch or 4
    made = preference(decoder, pairs, size, inputs.seed, recalled_by(inputs, decoder))
    steps = inputs.steps or DPO_EPOCHS * -(-len(pairs) // min(size, len(pairs)))
    schedule = schedule_of(inputs.rate or DPO_PEAK, steps)
    return plain_run(decoder, made, inputs.settings(schedule), _kept_spec(inputs, decoder))


def recalled_by(inputs: Inputs, decoder: Decoder) -> RecalledTexts | None:
    """The recall of a bank's texts; none without a bank."""
    if inputs.bank is None:
        return None
    return RecalledTexts(open_bank(inputs.bank), decoder.tokens, decoder.spec.references_per_chunk)


def _kept_spec(inputs: Inputs, decoder: Decoder) -> MemorySpec | None:
    """Training with memory makes a model that says how; without, it stays what it was."""
    return decoder.spec if inputs.bank is not None or decoder.trained else None


# ---- the reader that ships ----


def reader_full(inputs: Inputs) -> Run:
    """A reader of 8.3 M parameters on real questions, 6,000 steps; `memory3.train.recipe` has its shape, data and phases.

    Data: one folder with `qa.parquet` (columns dataset, split, question, answers, title, passage) and `passages.parquet`
    (title, text). Hardware: two cores, which took 173 minutes while other work ran on them. Expect what docs/results.md
    says of it, beside its controls: as much as the model that ships, which an earlier state of this recipe made.
    """
    return _reader(inputs, Reader(steps=inputs.steps or Reader.steps, rate=inputs.rate or Reader.rate))


def reader_small(inputs: Inputs) -> Run:
    """The same in small, for data of one's own: 600 steps, 2,048 tokens, word vectors from the data alone.

    Data: as for `shipped`. Hardware: two cores. docs/tutorial.md has what it reaches, and in which time.
    """
    small = Reader(steps=inputs.steps or 600, vocabulary=2048, texts_for_meaning=0, rate=inputs.rate or Reader.rate)
    return _reader(inputs, small)


def _reader(inputs: Inputs, reader: Reader) -> Run:
    if len(inputs.data) != 1:
        raise TrainError(f"found {len(inputs.data)} sources, expected one folder with qa.parquet and passages.parquet")
    from accelerate import PartialState

    if inputs.model is not None or inputs.bank is not None:
        raise TrainError(
            "found --model or --bank for a reader, expected neither: it starts from fresh weights and its own data"
        )
    if inputs.spec is not None:
        reader = replace(reader, tokens_per_head=inputs.spec.tokens_per_head)
    processes = PartialState().num_processes
    decoder, objective, settings, spec = reader.run(
        Path(inputs.data[0]), inputs.out, inputs.minutes, inputs.seed, inputs.accumulate, processes
    )
    return plain_run(decoder, nullcontext(objective), settings, spec)


def _loaded(inputs: Inputs) -> Decoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is about to be trained for memory
        return load(inputs.model, inputs.spec)


def tokenised_of(inputs: Inputs, decoder: Decoder) -> Corpus:
    """The data as a corpus, kept in the run's folder."""
    telling, cache = inputs.telling("tokenising"), inputs.out / "corpus"
    return tokenised(inputs.data, decoder.tokenizer, cache, text_field=inputs.text_field, tell=telling)


RECIPES: dict[str, dict[str, Recipe]] = {
    "warmup": {
        "small": warmup_small,
        "model": warmup_model,
        "paper-0.9b": warmup_paper_0_9b,
        "paper-2.4b": warmup_paper_2_4b,
    },
    "continual": {"thinned": continual_thinned, "paper": continual_paper},
    "convert": {"lora": convert_lora, "full": convert_full, "labels": convert_labels},
    "sft": {"paper": sft_paper},
    "dpo": {"paper": dpo_paper},
    "reader": {"full": reader_full, "small": reader_small},
}
"""Recipes of each stage; the first is the default."""


def recipe_of(stage: str, name: str | None) -> Recipe:
    """The recipe of a stage; `TrainError` says which there are."""
    if stage not in RECIPES:
        raise TrainError(f"found stage {stage!r}, expected one of {', '.join(RECIPES)}")
    of_stage = RECIPES[stage]
    chosen = name or next(iter(of_stage))
    if chosen not in of_stage:
        raise TrainError(f"found recipe {chosen!r} of {stage}, expected one of {', '.join(of_stage)}")
    return of_stage[chosen]
