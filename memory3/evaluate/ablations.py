"""`memory3 eval ablation NAME`: each is one command whose table says what a choice of the method is worth, and whose control is in it.

Adding one: a function of `(Load, Inputs)` that returns a `Study`, and a row in `ABLATIONS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from memory3.decoder import Decoder
from memory3.documents import Document, documents
from memory3.evaluate.beginning import Plan, beginning_study
from memory3.evaluate.outcomes import document
from memory3.evaluate.reading import Case, dev_cases, short_cases
from memory3.evaluate.retraining import (
    Training,
    layer_variants,
    retrained_study,
    retrained_tokens_study,
    selection_variants,
    token_variants,
)
from memory3.evaluate.variations import Study, chunk_study, references_study, selection_study, tokens_study
from memory3.remote import open_bank
from memory3.spec import SourceError
from memory3.train.recipe import SMALL, Reader
from memory3.train.settings import Report


@dataclass(frozen=True)
class Inputs:
    """What a user gives to an ablation. `None` leaves the choice to it; what it cannot honour is refused, see `HONOURED`.

    Args:
        data: for `layers`, `tokens`, `selection` and `references` the folder with `qa.parquet` (and `passages.parquet` where
            readers are trained); for `warmup` and `chunk` files or folders of documents.
        out: folder of the table, its values, the picture, and checkpoints; needed where something is trained.
        bank: of `chunk`.
        limit: most questions, or stretches of text; by default 300, and held-out rows of `warmup` as its `Plan` has them.
        steps: optimizer steps of each variant. With it `tokens` and `selection` train a reader for each setting, instead of
            taking one finished model through all of them.
        tokens_per_head: of the trained readers' halves in `layers`, and of each in `selection`.
        size: `warmup`: depth of the model, by default the plan's.
        minutes: most wall time of the trainings of this call.
        seed: of weights, order and questions.
        text_field: of documents, the column of the text; by default `text`.
        model, device, dtype: what `load` was made with, so that it can be refused where no finished model is loaded.
        tell: told of progress in questions or stretches; preparing: of the preparation; report: takes the training log.
    """

    data: tuple[str, ...]
    out: Path | None = None
    bank: str | None = None
    limit: int | None = None
    steps: int | None = None
    tokens_per_head: int | None = None
    size: int | None = None
    minutes: float | None = None
    seed: int = 0
    text_field: str | None = None
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    tell: Callable[[int, int], None] = lambda done, total: None
    preparing: Callable[[str, int, int | None], None] = lambda what, done, total: None
    report: Report = lambda line: None

    @property
    def folder(self) -> Path:
        """Where something is trained."""
        if self.out is None:
            raise SourceError("found no --out, expected a folder: this ablation trains, and goes on there when it is run again")
        return self.out

    @property
    def questions(self) -> Path:
        """The one folder of questions."""
        if len(self.data) != 1:
            raise SourceError(f"found {len(self.data)} sources of questions, expected one folder with qa.parquet: --data")
        return Path(self.data[0])

    @property
    def most(self) -> int:
        """Questions, or stretches of text."""
        return self.limit or 300

    def texts(self) -> Iterator[Document]:
        """The documents."""
        return documents(list(self.data), text_field=self.text_field or "text")

    def reader(self) -> Reader:
        """The recipe of the readers that are trained."""
        return replace(SMALL, steps=self.steps or SMALL.steps, tokens_per_head=self.tokens_per_head or SMALL.tokens_per_head)

    def training(self) -> Training:
        """What they are trained on and asked."""
        return Training(self.questions, self.folder, self.most, self.seed, self.minutes, self.report, self.tell)


Load = Callable[[], Decoder]
"""Loads the finished model; not called where everything is trained."""
Ablation = Callable[[Load, Inputs], Study]


def warmup(load: Load, inputs: Inputs) -> Study:
    """Is a warmup without memory needed? (the paper's Figure 11): the gain from retrieved references on held-out text, when memory
    begins half-way or at the first step of equally many tokens."""
    plan = Plan(
        depth=inputs.size or Plan.depth,
        seed=inputs.seed,
        steps=inputs.steps or Plan.steps,
        held=inputs.limit or Plan.held,
    )
    return beginning_study(
        inputs.data,
        inputs.folder,
        plan,
        text_field=inputs.text_field or "text",
        minutes=inputs.minutes,
        report=inputs.report,
        tell=inputs.preparing,
    )


def layers(load: Load, inputs: Inputs) -> Study:
    """First half, middle half or all layers as memory layers, at equal key-value slots; a small reader is trained for each."""
    return retrained_study(layer_variants(inputs.reader()), inputs.training())


def tokens(load: Load, inputs: Inputs) -> Study:
    """1 to 128 tokens per head, of one finished model or with `steps` of a reader trained for each."""
    if inputs.steps is None:
        decoder = load()
        return tokens_study(decoder, cases_of(decoder, inputs), tell=inputs.tell)
    return retrained_tokens_study(token_variants(inputs.reader()), inputs.training())


def selection(load: Load, inputs: Inputs) -> Study:
    """Each registered selection at equal tokens per head, of one finished model or with `steps` of a reader trained for each."""
    if inputs.steps is None:
        decoder = load()
        return selection_study(decoder, cases_of(decoder, inputs), inputs.tell)
    return retrained_study(selection_variants(inputs.reader()), inputs.training())


def references(load: Load, inputs: Inputs) -> Study:
    """1 to 20 references at once, one of them gold."""
    decoder = load()
    return references_study(decoder, cases_of(decoder, inputs), seed=inputs.seed, tell=inputs.tell)


def chunk(load: Load, inputs: Inputs) -> Study:
    """Recall every 32, 64 or 128 tokens: bits per byte of held-out text."""
    if inputs.bank is None:
        raise SourceError(
            "found no --bank, expected one whose references the chunks recall: memory3 write SOURCES --bank FOLDER"
        )
    decoder = load()
    with open_bank(inputs.bank, decoder) as bank:
        texts = (document.text for document in inputs.texts())
        return chunk_study(decoder, bank, texts, limit=inputs.most, seed=inputs.seed, tell=inputs.tell)


def cases_of(decoder: Decoder, inputs: Inputs) -> list[Case]:
    """Dev questions of one chunk, gold in a reference."""
    return short_cases(decoder, dev_cases(decoder, inputs.questions, inputs.most, inputs.seed))


ABLATIONS: dict[str, Ablation] = {
    "warmup": warmup,
    "layers": layers,
    "tokens": tokens,
    "selection": selection,
    "references": references,
    "chunk": chunk,
}

ASKED = ("limit", "model", "device", "dtype")
TRAINED = ("limit", "steps", "minutes")
HONOURED = {
    "warmup": (*TRAINED, "size", "text_field"),
    "layers": (*TRAINED, "tokens_per_head"),
    "tokens": ASKED,
    "tokens with --steps": TRAINED,
    "selection": ASKED,
    "selection with --steps": (*TRAINED, "tokens_per_head"),
    "references": ASKED,
    "chunk": (*ASKED, "bank", "text_field"),
}
"""Options that each ablation follows, beside data, out and seed; it refuses the others. What is trained starts from fresh weights in
float32, and accelerate places it: on a GPU where there is one, in bf16 autocast where the machine
computes in it."""


def check_options(name: str, inputs: Inputs) -> None:
    """Raise a `SourceError` where an option is given that the ablation would not follow."""
    of = f"{name} with --steps" if inputs.steps is not None and f"{name} with --steps" in HONOURED else name
    optional = dict.fromkeys(option for options in HONOURED.values() for option in options)
    for option in optional:
        if getattr(inputs, option) not in (None, ()) and option not in HONOURED[of]:
            named, followed = (_option(option), ", ".join(map(_option, HONOURED[of])))
            why = "it trains models of its own" if "steps" in HONOURED[of] else "it asks a finished model"
            raise SourceError(f"found {named} for ablation {of}, expected none: {why}, and follows {followed}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def measure_ablation(name: str, load: Load, inputs: Inputs) -> Study:
    """Run an ablation, print its table, and leave `NAME.md`, `NAME.json` and, where there is a curve, `NAME.png` in `out`.

    Args:
        name: row of `ABLATIONS`.
        load: gives the finished model, called where one is needed.
        inputs: data, folder and sizes.

    Raises:
        SourceError: an unknown name, data that cannot be read or is too little, an option that is missing or cannot be
            followed, or an `out` that cannot be written.
        TrainError: a training that cannot start or go on, or whose time was up.
    """
    if name not in ABLATIONS:
        raise SourceError(f"found ablation {name!r}, expected one of {', '.join(ABLATIONS)}")
    check_options(name, inputs)
    if inputs.out is not None:
        _make(inputs.out)
    study = ABLATIONS[name](load, inputs)
    print(study.table)
    if inputs.out is not None:
        keep(study, name, inputs.out)
    return study


def _make(folder: Path) -> None:
    """The folder, before hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"{folder} cannot be made ({error.strerror}): give a folder that can be written with --out") from None


def keep(study: Study, name: str, folder: Path) -> None:
    """The table as Markdown, the values as JSON, the curves as a picture."""
    (folder / f"{name}.md").write_text(study.table + "\n", "utf-8")
    (folder / f"{name}.json").write_text(json.dumps(document(study.outcomes), indent=1) + "\n", "utf-8")
    if study.curves:
        from memory3.evaluate.picture import draw_study

        draw_study(study, folder / f"{name}.png")
