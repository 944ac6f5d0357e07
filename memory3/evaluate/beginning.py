"""When should memory begin? Runs of equal tokens that differ in nothing but the step from which chunks read references.

Source of the question: arXiv 2407.01178, Figure 11, where memory from the very start is ignored and stays useless.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memory3.bank import Bank
from memory3.decoder import Decoder, attach
from memory3.documents import Document, documents
from memory3.evaluate.outcomes import Metric, Outcome
from memory3.evaluate.retraining import ends_in, finished
from memory3.evaluate.variations import Study
from memory3.reader import BankReader
from memory3.spec import MemorySpec, Reference, SourceError
from memory3.splitting import split
from memory3.train.corpus import Corpus, data_key, tokenised
from memory3.train.kept import kept_tokenizer
from memory3.train.recalled import read_texts
from memory3.train.retrieved import Asking, ChunkReferences
from memory3.train.sequences import Continual, Retrieved, Warmup, shared
from memory3.train.settings import Report, Schedule, Settings, TrainError
from memory3.train.shapes import shape
from memory3.writing import write

HELD_EVERY = 10
"""One document of so many is held out, until the held-out rows are full."""
CHARACTERS = 4
"""Of a token, about, with tokenizers of a few thousand tokens: how much text is read for the tokens wanted."""
BATCH = 8
"""Held-out rows of a forward pass."""
LOSSES = {
    "gain": Metric("gain: without less retrieved", float, 4),
    "right against wrong": Metric("wrong less retrieved", float, 4),
    "none": Metric("loss without references", float, 3),
    "right": Metric("loss, retrieved references", float, 3),
    "wrong": Metric("loss, wrong references", float, 3),
}
"""What is measured on each held-out row, in nats per token."""
Tell = Callable[[str, int, int | None], None]
Own = Sequence[Sequence[str | None]]
"""For each row the reference of each of its chunks."""


@dataclass(frozen=True)
class Plan:
    """A comparison: every variant takes the same steps over the same rows in the same order, with one schedule.

    Args:
        steps: optimizer steps of each variant.
        begins: steps at which memory begins, a variant each; by default half of the steps, and the first.
        depth: the size dial of the model (`memory3.train.shapes.shape`).
        vocabulary: tokens of the tokenizer made from the training text.
        length: tokens of a row; batch: rows of a step; rate: peak learning rate.
        held: held-out rows that are measured, at most.
        points: how often they are measured, evenly over the steps.
        spec: of memory.
        seed: of weights and order.

    Raises:
        TrainError: a step at which memory begins is not within the run.
    """

    steps: int = 600
    begins: tuple[int, ...] = ()
    depth: int = 4
    vocabulary: int = 4096
    length: int = 512
    batch: int = 8
    rate: float = 1e-3
    held: int = 64
    points: int = 4
    spec: MemorySpec = field(default_factory=MemorySpec)
    seed: int = 0

    def __post_init__(self) -> None:
        begins = self.begins or (self.steps // 2, 0)
        object.__setattr__(self, "begins", tuple(dict.fromkeys(begins)))
        if min(begins) < 0 or max(begins) > self.steps:
            raise TrainError(
                f"found memory beginning at step {begins}, expected 0 to {self.steps}: 0 is from the first step on"
            )

    @property
    def stops(self) -> list[int]:
        """Steps after which the held-out rows are measured; the last is the end."""
        return sorted({max(1, self.steps * n // self.points) for n in range(1, self.points + 1)})

    def name(self, begin: int) -> str:
        """Of a variant."""
        if begin == self.steps:
            return f"warmup alone, {self.steps} steps"
        return (
            f"warmup {begin} steps, then continual {self.steps - begin}"
            if begin
            else f"continual from the first step, {self.steps}"
        )

    def settings(self, folder: Path) -> Settings:
        """Of every variant's run, its folder apart."""
        schedule = Schedule(self.rate, self.steps, warmup=max(1, self.steps // 20), decay=self.steps // 5)
        return Settings(folder, schedule, seed=self.seed)


class Begun:
    """Plain language modelling before a micro-batch number, chunks that read references from it on.

    Rows are numbered through both, so two of these see the same rows at the same step, whenever memory begins.
    """

    def __init__(self, warmup: Warmup, continual: Continual, begin: int) -> None:
        self.warmup, self.continual, self.begin, self.length = warmup, continual, begin, warmup.length

    def batch(self, number: int) -> Any:
        """Of the stage that this number belongs to."""
        return (self.warmup if number < self.begin else self.continual).batch(number)

    def tokens(self, batch: Any) -> int:
        """Tokens trained on; references are not counted, so both stages have as many."""
        return self._stage(batch).tokens(batch)

    def loss(self, decoder: Decoder, batch: Any, step: int) -> tuple[Tensor, dict[str, float]]:
        """The stage's own loss `()`."""
        return self._stage(batch).loss(decoder, batch, step)

    def _stage(self, batch: Any) -> Warmup | Continual:
        return self.continual if isinstance(batch, Retrieved) else self.warmup


# ---- material ----


@dataclass(frozen=True)
class Material:
    """What all variants share: tokenizer, training text, and held-out rows with the references of their chunks.

    Held-out documents are whole, and none of their references is in the bank.
    """

    tokenizer: Any
    corpus: Corpus
    references: ChunkReferences
    held: list[list[int]]
    own: Own


def material(plan: Plan, sources: Sequence[str], folder: Path, text_field: str, tell: Tell) -> Material:
    """Made from documents once, and kept in `folder`: the bank holds the training documents, cut into references.

    A chunk retrieves by its own words, never from a document that it is part of, and nothing that its row repeats (overlap
    above 0.9): what it gets in training is of the kind that held-out text gets.

    Raises:
        SourceError: the sources hold fewer than two held-out rows, or nothing is retrieved for them.
        TrainError: less training text than a row, or the folder has a tokenizer of other data.
    """
    texts, held = parted(documents(list(sources), text_field=text_field), plan)
    tokenizer = kept_tokenizer(folder / "tokenizer", data_key(sources), lambda: (d.text for d in texts), plan.vocabulary)
    decoder = fresh(plan, tokenizer)
    training = _text_file(folder / "training.jsonl", texts)
    corpus = tokenised([training], tokenizer, folder / "corpus", tell=lambda done, total: tell("tokenising", done, total))
    bank = _bank(decoder, texts, folder / "bank", tell)
    asking = Asking(exclude_own=True)
    references = ChunkReferences(decoder, corpus, bank, plan.length, asking)
    references.prepare(lambda done, total: tell("retrieving", done, total))
    unseen = Corpus.of_texts([d.text for d in held], tokenizer)
    rows = range(min(plan.held, unseen.rows(plan.length)))
    if len(rows) < 2:
        raise SourceError(
            f"found {len(unseen.ids)} tokens of held-out text, expected two rows of {plan.length} or more: give more documents"
        )
    own = ChunkReferences(decoder, unseen, bank, plan.length, asking).texts(rows)
    if not any(text for row in own for text in row):
        raise SourceError("found no reference for any held-out chunk, expected some: give documents with words in common")
    return Material(tokenizer, corpus, references, [unseen.row(n, plan.length) for n in rows], own)


def parted(found: Iterable[Document], plan: Plan) -> tuple[list[Document], list[Document]]:
    """Documents to train on and held-out ones, no more of each than the plan takes."""
    wanted = {True: plan.held * plan.length * CHARACTERS, False: plan.steps * plan.batch * plan.length * CHARACTERS}
    parts: dict[bool, list[Document]] = {True: [], False: []}
    for n, document in enumerate(found):
        held = n % HELD_EVERY == HELD_EVERY - 1
        if wanted[held] > 0:
            parts[held].append(document)
            wanted[held] -= len(document.text)
        elif wanted[not held] <= 0:
            break
    return parts[False], parts[True]


def fresh(plan: Plan, tokenizer: Any) -> Decoder:
    """A decoder of random weights, the same for every variant."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(plan.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is about to be trained for memory
        return attach(LlamaForCausalLM(shape(plan.depth, len(tokenizer))), tokenizer, plan.spec)


def _text_file(path: Path, texts: Iterable[Document]) -> Path:
    """The training text as JSON lines; left as it is where it exists, so that what was made of it stays valid."""
    if not path.exists():
        unfinished = path.with_suffix(".new")
        with unfinished.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"text": d.text}) + "\n" for d in texts)
        unfinished.rename(path)
    return path


def _bank(decoder: Decoder, texts: Sequence[Document], folder: Path, tell: Tell) -> BankReader:
    """A bank of the texts for its search alone: one token of one layer is written. Made whole before it has its name."""
    if not folder.exists():
        writer = decoder.using(MemorySpec((0,), tokens_per_head=1, reference_length=decoder.spec.reference_length))
        unfinished, length = folder.with_name("bank.new"), decoder.spec.reference_length
        pieces: list[Reference] = [r for d in texts for r in split(d.text, decoder.tokenizer, d.name, length)]
        with Bank(unfinished, writer, create=True) as bank:
            write(writer, pieces, bank, on_progress=lambda done, total: tell("writing references", done, total))
        unfinished.rename(folder)
    return Bank(folder)


# ---- measure ----


@torch.no_grad()
def held_losses(decoder: Decoder, rows: Sequence[Sequence[int]], own: Own) -> dict[str, tuple[float, ...]]:
    """Loss of each held-out row without references, with retrieved and with wrong ones, and differences: see `LOSSES`.

    All three have the layout of memory, so that nothing differs but what is read. As in training, a chunk reads its own
    reference and those of the four chunks before; wrong ones are those of another row, as many.
    """
    was_training = decoder.model.training
    decoder.model.eval()
    try:
        none, right, wrong = (
            [
                loss
                for n in range(0, len(rows), BATCH)
                for loss in _row_losses(decoder, rows[n : n + BATCH], read[n : n + BATCH])
            ]
            for read in ([()] * len(rows), own, of_others(own))
        )
    finally:
        decoder.model.train(was_training)
    return {
        "gain": tuple(a - b for a, b in zip(none, right, strict=True)),
        "right against wrong": tuple(a - b for a, b in zip(wrong, right, strict=True)),
        "none": tuple(none),
        "right": tuple(right),
        "wrong": tuple(wrong),
    }


def _row_losses(decoder: Decoder, rows: Sequence[Sequence[int]], own: Own) -> list[float]:
    layout = decoder.layout([[*decoder.bos_ids, *row] for row in rows], padding_side="right")
    reading = read_texts(decoder, layout, [shared(chunks) for chunks in own])
    logits = decoder.forward(layout, reading).logits
    first = len(decoder.prefix_ids) + len(decoder.bos_ids)
    wanted = layout.input_ids[:, first:]
    losses = functional.cross_entropy(logits[:, first - 1 : -1].transpose(1, 2).float(), wanted, reduction="none")
    found: list[float] = losses.mean(1).tolist()
    return found


def of_others(own: Own) -> list[list[str | None]]:
    """For each chunk that has a reference that of the same chunk of the next row, unless the row reads that one itself."""
    found: list[list[str | None]] = []
    for n, row in enumerate(own):
        following = [own[(n + k) % len(own)] for k in range(1, len(own))]
        found.append([text and next((o[c] for o in following if o[c] and o[c] not in row), None) for c, text in enumerate(row)])
    return found


# ---- compare ----


def beginning_study(
    sources: Sequence[str],
    folder: Path,
    plan: Plan | None = None,
    *,
    text_field: str = "text",
    minutes: float | None = None,
    report: Report = lambda line: None,
    tell: Tell = lambda what, done, total: None,
) -> Study:
    """Train every variant, measure the held-out rows as it goes, and compare; resumable.

    Args:
        sources: files or folders of documents; whole documents of them are held out.
        folder: of everything that is made.
        plan: what is compared.
        text_field: column of the text.
        minutes: most wall time of the trainings of this call.
        report: takes the lines of the training logs.
        tell: told of the preparation.

    Raises:
        TrainError: the folder is of another plan, or the time was up: run the same again to go on.
        SourceError: too little text.
    """
    plan = plan or Plan()
    _same_plan(plan, sources, folder)
    made, ends = material(plan, sources, folder, text_field, tell), ends_in(minutes)
    curves = {plan.name(begin): _curve(plan, begin, made, folder, ends, report) for begin in plan.begins}
    rows = [points[-1][1] for points in curves.values()]
    return Study(rows, losses_table(rows), curves, (), ("gain", LOSSES["gain"]), "steps", doubling=False)


def _same_plan(plan: Plan, sources: Sequence[str], folder: Path) -> None:
    """Note the plan in the folder, or refuse a folder of another one."""
    facts = json.loads(json.dumps({"plan": asdict(plan), "sources": [str(s) for s in sources]}))
    file = folder / "plan.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    elif _read(file) != facts:
        raise TrainError(f"found another comparison in {folder}, expected this one's: give another --out, or the same options")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise TrainError(f"found a damaged file {file} ({error}), expected JSON of an earlier run: remove it") from None


def _curve(
    plan: Plan, begin: int, made: Material, folder: Path, ends: float | None, report: Report
) -> list[tuple[float, Outcome]]:
    """Held-out losses after each stop of one variant."""
    decoder, place = fresh(plan, made.tokenizer), folder / f"memory-from-{begin}"
    stages = (
        Warmup(decoder, made.corpus, plan.length, plan.batch, plan.seed),
        Continual(decoder, made.corpus, made.references, plan.length, plan.batch, plan.seed),
    )
    read = sum(len(chunk) for row in made.own for chunk in shared(row)) / sum(map(len, made.own))
    points: list[tuple[float, Outcome]] = []
    for stop in plan.stops:
        file = place / f"held-out-{stop}.json"
        if not file.exists():
            settings = replace(plan.settings(place), stop_at=stop)
            done = finished(decoder, Begun(*stages, begin), settings, plan.name(begin), ends, report)
            if done != stop:
                raise TrainError(f"found step {done} in {place}, expected step {stop} to measure: remove that folder")
            _keep(file, held_losses(decoder, made.held, made.own))
        points.append((stop, Outcome(plan.name(begin), read, {k: tuple(v) for k, v in _read(file).items()})))
    return points


def _keep(file: Path, values: Mapping[str, Sequence[float]]) -> None:
    unfinished = file.with_suffix(".new")
    unfinished.write_text(json.dumps(values), "utf-8")
    unfinished.rename(file)


def losses_table(rows: Sequence[Outcome]) -> str:
    """A Markdown table: a row per variant, means and 95 % intervals over held-out rows, and the paired difference of the gain."""
    last = rows[-1]
    heads = ["nats per token", "rows", "references", *(m.heading for m in LOSSES.values()), f"gain: minus {last.arm}"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        cells = [metric.cell(row.mean(name), row.interval(name)) for name, metric in LOSSES.items()]
        difference = "" if row is last else LOSSES["gain"].cell(*row.minus(last, "gain"))
        lines.append([row.arm, str(len(row.values["gain"])), f"{row.references:.1f}", *cells, difference])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
