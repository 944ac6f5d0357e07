"""The recipes: functions that return a complete run. Adding one: a function, and a row in `RECIPES`.

A recipe's docstring is its promise: data, hardware, time, and the number to expect, or that nobody has measured it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from memory3.decoder import Decoder, attach
from memory3.loading import load
from memory3.remote import open_bank
from memory3.rows import HUB, TABLES, of_split, rows
from memory3.spec import MemorySpec
from memory3.train.convert import converted
from memory3.train.convert import recipe as conversion
from memory3.train.corpus import Corpus, data_key, files_of, read_documents, tokenised
from memory3.train.grid import RecalledTexts
from memory3.train.inputs import Inputs, Recipe, Run, plain_run
from memory3.train.instruct import EPOCHS as SFT_EPOCHS
from memory3.train.instruct import PEAK as SFT_PEAK
from memory3.train.instruct import Instruct, examples_of, schedule_of, steps_of
from memory3.train.kept import kept_tokenizer
from memory3.train.preference import EPOCHS as DPO_EPOCHS
from memory3.train.preference import PEAK as DPO_PEAK
from memory3.train.preference import pairs_of, preference
from memory3.train.prompted import PromptedObjective
from memory3.train.reading import ReadingObjective
from memory3.train.recipe import EMBEDDING_RATE, SMALL, Reader, passages
from memory3.train.retrieved import Asking, ChunkReferences
from memory3.train.sequences import Continual, Warmup
from memory3.train.settings import Report, Schedule, Settings, TrainError
from memory3.train.shapes import paper, shape
from memory3.train.teaching import Lesson, asked, lessons, merged, parted
from memory3.train.thinning import halvings

# ---- warmup ----


def warmup_small(inputs: Inputs) -> Run:
    """Plain language modelling from fresh weights of `--size` layers, with a tokenizer of 8,192 tokens made from the data.

    Data: any text, ten million tokens or more. Hardware: two cores. Time: 1,000 steps of 8 sequences of 512 tokens at size 6
    are four million tokens; docs/results.md has the tokens a second. Expect fluent nonsense: a start for `continual`, no more.
    """
    return _warmup(inputs, lambda vocabulary: shape(inputs.size, vocabulary), 8192, (1000, 1e-3, 8, 512))


def warmup_paper_0_9b(inputs: Inputs) -> Run:
    """The paper's ablation shape: 0.92e9 parameters without embeddings, sequences of 2,048 tokens, vocabulary of 60,416.

    Data: the paper does not say how much its ablation saw; 20 tokens a parameter are 18e9. Hardware: several GPUs, by
    `accelerate launch`. Never run here: no figure to expect.
    """
    return _warmup(inputs, lambda vocabulary: paper("paper-0.9b"), 60416, (10_000, 4e-4, 8, 2048))


def warmup_paper_2_4b(inputs: Inputs) -> Run:
    """The paper's model: 2.43e9 parameters without embeddings, sequences of 2,048 tokens, vocabulary of 60,416.

    Data: the authors' run went on to 3.1e12 tokens before it diverged, which is a
    cluster. Hardware: several nodes of GPUs, by `accelerate launch`. Never run here: no figure to expect.
    """
    return _warmup(inputs, lambda vocabulary: paper("paper-2.4b"), 60416, (10_000, 4e-4, 8, 2048))


def warmup_model(inputs: Inputs) -> Run:
    """Plain language modelling from `--model`: more of what it has had, before memory. Sequences of 2,048 tokens.

    Data: any text. Hardware: what holds the model four times in float32 (weights, gradients, two moments). Nobody has measured
    what it reaches.
    """
    decoder = _loaded(inputs)
    return _language_modelling(inputs, decoder, tokenised_of(inputs, decoder), (1000, 3e-4, 4, 2048))


def _warmup(inputs: Inputs, config: Callable[[int], Any], vocabulary: int, defaults: tuple[int, float, int, int]) -> Run:
    if inputs.model is not None:
        raise TrainError("found --model with a recipe that starts from fresh weights, expected none: use the recipe `model`")
    import torch
    from transformers import LlamaForCausalLM

    def texts() -> Iterator[str]:
        return (d.text for d in read_documents(inputs.data, inputs.text_field))

    made_of = f"{data_key(inputs.data)} {inputs.text_field}"
    tokenizer = kept_tokenizer(inputs.out / "tokenizer", made_of, texts, vocabulary)
    shaped = config(len(tokenizer))
    shaped.vocab_size = max(shaped.vocab_size, len(tokenizer))
    torch.manual_seed(inputs.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is about to be trained for memory
        decoder = attach(LlamaForCausalLM(shaped), tokenizer, MemorySpec())
    return _language_modelling(inputs, decoder, tokenised_of(inputs, decoder), defaults)


def _language_modelling(inputs: Inputs, decoder: Decoder, corpus: Corpus, defaults: tuple[int, float, int, int]) -> Run:
    steps, rate, batch, length = defaults
    objective = Warmup(decoder, corpus, inputs.length or length, inputs.batch or batch, inputs.seed)
    return plain_run(decoder, nullcontext(objective), inputs.settings(inputs.wsd(steps, rate)), None)


# ---- continual ----


def continual_paper(inputs: Inputs) -> Run:
    """The paper's second stage from a warmed-up `--model`: every 64-token chunk of a 2,048-token sequence reads its own
    reference and those of the four chunks before, with the spec's tokens per head from the first step.

    Data: text, and a `--bank` of references. A small model that was trained so for 160 steps did not read
    (docs/results.md); `thinned` is for those. Hardware: what holds the model four times, and 33 references beside each sequence: a step takes
    about twice as long as one of `warmup` (docs/results.md). Nobody has measured what it reaches.
    """
    return _continual(inputs, thinned=False)


def continual_thinned(inputs: Inputs) -> Run:
    """The curriculum of docs/training.md: the same sequences, but memory is dense at first, with language modelling on the
    references too, and is thinned out by halves over the first half of the run. Memory layers are those of the spec throughout.

    Data: text, and a `--bank` of references. Starts from `--model`, warmed up or not. Hardware: as for `paper`; references run through
    all layers here. docs/results.md has 60 steps of it, nobody has measured more.
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
    return plain_run(decoder, nullcontext(objective), inputs.settings(schedule), spec, stretched=thinned)


# ---- convert ----


def convert_lora(inputs: Inputs) -> Run:
    """A decoder learns by adapters (rank 16) to read from memory what it reads from text; no labels, the teacher is itself.

    Data: documents of the kind that the bank will hold, 20,000 references or more; or rows with `question` and `passage`.
    Hardware and expectations: `memory3.train.convert.recipe`.
    """
    return _convert(inputs, lora=True)


def convert_full(inputs: Inputs) -> Run:
    """The same with all weights, and a frozen copy of the model as its teacher.

    Data: as for `lora`. Hardware: what holds the model five times. Nobody has measured what it reaches.
    """
    return _convert(inputs, lora=False)


def convert_labels(inputs: Inputs) -> Run:
    """All weights, without a teacher: cross-entropy of continuations, completions and answers. The control of `full`.

    Data: as for `lora`. Hardware: what holds the model four times. Nobody has measured what it reaches.
    """
    return _convert(inputs, lora=False, labels=True)


def _convert(inputs: Inputs, lora: bool, labels: bool = False) -> Run:
    decoder = _loaded(inputs, learned=not lora)  # adapters learn in float32 by themselves
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

    def train(settings: Settings, report: Report) -> int:
        return converted(decoder, objective, settings, lora=adapters, held=held, report=report)[1]

    return Run(decoder, inputs.settings(schedule), decoder.spec, train, stretched=True)


def lessons_of(inputs: Inputs, decoder: Decoder) -> list[Lesson]:
    """Rows of a table with questions as questions about their passages, everything else as documents."""
    tables = [d for d in inputs.data if _asks(d)]
    rest = [d for d in inputs.data if d not in tables]
    found = asked(decoder, of_split(row for table in tables for row in rows(table)))
    telling = inputs.telling("cutting documents")
    return merged([*found, *lessons(decoder, read_documents(rest, inputs.text_field), telling)])


def _asks(source: str) -> bool:
    """Whether a table, a folder of tables alone or a hub dataset has a question in its first row."""
    files = [source] if source.startswith(HUB) else [str(file) for file in files_of(Path(source))]
    if not files or not all(file.startswith(HUB) or Path(file).suffix.lower() in TABLES for file in files):
        return False
    first = next(iter(rows(files[0])), None)
    return first is not None and "question" in first[1]


# ---- sft, dpo ----


def sft_paper(inputs: Inputs) -> Run:
    """Supervised finetuning by the paper's numbers: cosine, at most 5e-5, 10 % warmup, 3 epochs; memory as in generation.

    Data: JSONL or Parquet with `prompt` and `response`, `question` and `answers`, or `messages`; a `--bank`, or none for
    finetuning without memory. Hardware: what holds the model four times. docs/results.md has 40 steps of it, nobody has measured more.
    """
    decoder = _loaded(inputs)
    found = [e for d in inputs.data for e in examples_of(decoder, Path(d), tell=inputs.telling("reading examples"))]
    objective = Instruct(found, inputs.batch or 8, inputs.seed, recalled_by(inputs, decoder))
    steps = inputs.steps or steps_of(len(found), inputs.batch or 8, SFT_EPOCHS, inputs.accumulate * _processes())
    schedule = schedule_of(inputs.rate or SFT_PEAK, steps)
    return plain_run(decoder, nullcontext(objective), inputs.settings(schedule), _kept_spec(inputs, decoder))


def dpo_paper(inputs: Inputs) -> Run:
    """Preferences by the paper's numbers: DPO at beta 0.01, cosine, at most 4e-6; memory as in generation.

    Data: JSONL or Parquet with `prompt`, `chosen` and `rejected` (texts or messages). Hardware: what holds the model five
    times, for the reference model stays beside it. One epoch: the paper does not say how many.
    docs/results.md has 25 steps of it, nobody has measured more.
    """
    decoder = _loaded(inputs)
    pairs = [p for d in inputs.data for p in pairs_of(decoder, Path(d), tell=inputs.telling("reading pairs"))]
    size = inputs.batch or 4
    made = preference(decoder, pairs, size, inputs.seed, recalled_by(inputs, decoder))
    steps = inputs.steps or steps_of(len(pairs), size, DPO_EPOCHS, inputs.accumulate * _processes())
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
    """The same in small, for data of one's own: 500 steps by Muon, 2,048 tokens, word vectors from the data alone.

    Data: as for `full`. Hardware: two cores. docs/tutorial.md has what it reaches, and in which time.
    """
    small = replace(SMALL, steps=inputs.steps or SMALL.steps, rate=inputs.rate or SMALL.rate)
    return _reader(inputs, small)


def reader_more(inputs: Inputs) -> Run:
    """Goes on from a reader (`--model`) with the mixture of the last phase, by Muon at a third of the rate: 1,600 steps.

    Data: as for `full`; give another `--seed` than the first run had. Hardware: two cores, forty minutes. docs/results.md has
    what it reached.
    """
    return _further(inputs, ReadingObjective)


def reader_text(inputs: Inputs) -> Run:
    """The control of `more`: goes on from a reader (`--model`) by as many steps of about as many tokens, but what it reads is text
    in the prompt, five references of at most 128 tokens and a question; no memory is written or read.

    Data: as for `full`. Hardware: two cores. docs/results.md has what it reached, and in which time, beside `more`.
    """
    return _further(inputs, PromptedObjective)


def _further(inputs: Inputs, kind: type[ReadingObjective]) -> Run:
    """The mixture of a reader's last phase, by another objective or the same."""
    data, decoder = _folder(inputs), _loaded(inputs)
    steps = inputs.steps or 1600
    schedule = Schedule(inputs.rate or 5e-4, steps, warmup=min(20, steps), decay=steps // 2)
    settings = inputs.settings(schedule, embedding_rate=EMBEDDING_RATE, optimizer=inputs.optimizer or "muon")
    per_step = inputs.accumulate * _processes()
    phase = replace(Reader(tokens_per_head=decoder.spec.tokens_per_head).phases[-1], until=steps, pointer_loss=1.0)
    objective = kind(decoder, *passages(data), (phase,), inputs.seed, per_step)
    return plain_run(decoder, nullcontext(objective), settings, decoder.spec, stretched=True)


def _reader(inputs: Inputs, reader: Reader) -> Run:
    if inputs.model is not None or inputs.bank is not None:
        raise TrainError(
            "found --model or --bank for a reader, expected neither: it starts from fresh weights and its own data"
        )
    if inputs.tokens_per_head is not None:
        reader = replace(reader, tokens_per_head=inputs.tokens_per_head)
    if inputs.optimizer:
        reader = replace(reader, optimizer=inputs.optimizer)
    decoder, objective, settings, spec = reader.run(
        _folder(inputs), inputs.out, inputs.minutes, inputs.seed, inputs.accumulate, _processes()
    )
    settings = replace(settings, peak_flops=inputs.peak_flops)
    return plain_run(decoder, nullcontext(objective), settings, spec, stretched=True)


def _folder(inputs: Inputs) -> Path:
    if len(inputs.data) != 1:
        raise TrainError(f"found {len(inputs.data)} sources, expected one folder with qa.parquet and passages.parquet")
    return Path(inputs.data[0])


def _processes() -> int:
    from accelerate import PartialState

    return int(PartialState().num_processes)


def _loaded(inputs: Inputs, learned: bool = True) -> Decoder:
    """The model to start from; weights that are learned in float32 whatever their files hold, for half precision would round
    most updates away. `run_stage` saves them in the files' dtype again.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is about to be trained for memory
        decoder = load(inputs.model, inputs.spec)
    if learned and getattr(decoder.model, "is_quantized", False):
        raise TrainError("found a quantised model, expected one whose weights can learn: use the recipe convert lora")
    if learned:
        decoder.model.float()
    return decoder.using(inputs.wanted(decoder.spec))


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
    "reader": {"full": reader_full, "small": reader_small, "more": reader_more, "text": reader_text},
}
"""Recipes of each stage; the first is the default."""


OPTIONS = {
    "warmup": "size length batch text_field",
    "warmup model": "model length batch text_field",
    "continual": "model bank spec tokens_per_head length batch text_field exclude_own",
    "convert": "model spec tokens_per_head batch text_field",
    "sft": "model bank spec tokens_per_head batch",
    "dpo": "model bank spec tokens_per_head batch",
    "reader": "tokens_per_head",
    "reader more": "model",
    "reader text": "model",
}
"""Fields of `Inputs` that a stage, or one recipe of it, uses beside those that every run does."""


def check_options(stage: str, name: str, inputs: Inputs) -> None:
    """`TrainError` where something was given that the recipe would pass over in silence."""
    used = OPTIONS.get(f"{stage} {name}", OPTIONS[stage]).split()
    for field in fields(Inputs):
        some = any(field.name in names.split() for names in OPTIONS.values())
        if some and field.name not in used and getattr(inputs, field.name) != field.default:
            raise TrainError(
                f"found --{field.name.replace('_', '-')} with {stage} {name}, expected none: it has no use for it, only for "
                f"{', '.join('--' + one.replace('_', '-') for one in used)}"
            )


def recipe_of(stage: str, name: str | None) -> Recipe:
    """The recipe of a stage; `TrainError` says which there are."""
    if stage not in RECIPES:
        raise TrainError(f"found stage {stage!r}, expected one of {', '.join(RECIPES)}")
    of_stage = RECIPES[stage]
    chosen = name or next(iter(of_stage))
    if chosen not in of_stage:
        raise TrainError(f"found recipe {chosen!r} of {stage}, expected one of {', '.join(of_stage)}")
    return of_stage[chosen]
