"""What is varied is trained for, too: small readers that differ in memory layers, kept tokens or selection alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from memory3.decoder import Decoder
from memory3.evaluate.arms import CLOSED, SPARSE, WRONG
from memory3.evaluate.given import Tell
from memory3.evaluate.outcomes import Outcome, table
from memory3.evaluate.reading import OTHERS, dev_cases, short_cases
from memory3.evaluate.variations import TOKENS, Study, answered, gold_and, only, part, tokens_found, tokens_name
from memory3.selection import SELECTIONS
from memory3.train.loop import run
from memory3.train.recipe import SMALL, Reader
from memory3.train.settings import Objective, Report, Settings, TrainError

DEPTH = 6
"""Layers of `memory3.train.recipe.fresh_model`."""


def _ignore(line: dict[str, float]) -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """A reader that differs from its neighbours in one thing.

    Args:
        name: of its rows.
        reader: its recipe.
        selection: of its kept tokens, from the first step.
        place: on the axis of a picture.
    """

    name: str
    reader: Reader
    selection: str = "received_attention"
    place: float = 0.0

    def folder(self, seed: int) -> str:
        """Name of its folder of checkpoints, another for everything that makes another model but the data and what is made of
        them for all: the recipe refuses a tokenizer or word vectors of something else."""
        reader, layers = self.reader, "-".join(map(str, self.reader.layers))
        made = f"layers-{layers}-tokens-{reader.tokens_per_head}-{self.selection}"
        return f"{made}-steps-{reader.steps}-rate-{reader.rate:g}-{reader.optimizer}-seed-{seed}"


@dataclass(frozen=True)
class Training:
    """What the readers are trained on and asked.

    Args:
        data: folder with `qa.parquet` and `passages.parquet`.
        folder: of checkpoints, and of the tokenizer that all readers share.
        limit: most questions of the dev split.
        seed: of weights, batches and questions.
        minutes: most wall time of all trainings of this call; what is left is done by the same call again.
        report: takes the lines of the training logs.
        tell: told of the progress of the questions.
    """

    data: Path
    folder: Path
    limit: int = 300
    seed: int = 0
    minutes: float | None = None
    report: Report = _ignore
    tell: Tell | None = None


# ---- what can be varied ----


def layer_variants(reader: Reader = SMALL, depth: int = DEPTH) -> list[Variant]:
    """First half (the paper's), middle half and all layers, at equal key-value slots of a reference.

    `reader.tokens_per_head` is what the halves keep; all layers together keep as many slots, so fewer tokens each.

    Raises:
        TrainError: the slots cannot be shared evenly, or all tokens are kept.
    """
    half, kept = depth // 2, reader.tokens_per_head
    sets = {
        "first half": range(half),
        "middle half": range((depth - half) // 2, (depth - half) // 2 + half),
        "all layers": range(depth),
    }
    if kept is None or kept * half % depth:
        raise TrainError(
            f"found {kept or 'all'} tokens per head in {half} layers, expected slots that {depth} layers share evenly: "
            "give an even --tokens-per-head"
        )
    tokens = {name: kept * half // len(layers) for name, layers in sets.items()}
    return [
        Variant(f"{name} ({_listed(layers)}), {tokens_name(tokens[name])}", _at(reader, layers, tokens[name]))
        for name, layers in sets.items()
    ]


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _at(reader: Reader, layers: Sequence[int], kept: int) -> Reader:
    return replace(reader, layers=tuple(layers), tokens_per_head=kept)


def token_variants(reader: Reader = SMALL, values: Sequence[int] = TOKENS) -> list[Variant]:
    """Each number of tokens per head."""
    return [Variant(f"trained for {tokens_name(n)}", replace(reader, tokens_per_head=n), place=n) for n in values]


def selection_variants(reader: Reader = SMALL) -> list[Variant]:
    """Each registered selection at the reader's tokens per head."""
    return [Variant(name, reader, name) for name in SELECTIONS]


# ---- train and ask ----


def ends_in(minutes: float | None) -> float | None:
    """When so many minutes from now are over, on the monotonic clock in seconds."""
    return None if minutes is None else time.monotonic() + 60 * minutes


def finished(
    decoder: Decoder, objective: Objective, settings: Settings, name: str, ends: float | None = None, report: Report = _ignore
) -> int:
    """Train, or resume, to the last step (or `stop_at`); returns the steps done.

    Args:
        decoder: whose model learns.
        objective: what it learns.
        settings: with the folder of this run.
        name: of the variant, for the message.
        ends: when to stop with a checkpoint, see `ends_in`.
        report: takes the lines of the log.

    Raises:
        TrainError: the time was up before.
    """
    minutes = None if ends is None else max(0.0, ends - time.monotonic()) / 60
    planned = min(settings.schedule.steps, settings.stop_at or settings.schedule.steps)
    done = run(decoder, objective, replace(settings, minutes=minutes), report)
    if done < planned:
        raise TrainError(
            f"the time was up at step {done} of {planned} of {name!r}, expected every variant trained: "
            "run the same command again to go on"
        )
    return done


def trained(variant: Variant, training: Training, ends: float | None = None) -> Decoder:
    """The variant's reader, trained or resumed to its last step, under the spec of the finished model.

    Raises:
        TrainError: as of `finished`; or the folder holds the tokenizer or word vectors of other data.
    """
    made, objective, settings, spec = variant.reader.run(training.data, training.folder, None, training.seed)
    learner = made.using(replace(made.spec, selection=variant.selection))
    settings = replace(settings, folder=training.folder / variant.folder(training.seed))
    finished(learner, objective, settings, variant.name, ends, training.report)
    return made.using(replace(spec, selection=variant.selection))


def trained_and_asked(variants: Sequence[Variant], training: Training) -> list[dict[str, Outcome]]:
    """For each variant its outcomes with gold among four others (`SPARSE`), with the four others (`WRONG`), and `CLOSED` book.

    All are asked the same dev questions: they share a tokenizer.
    """
    ends, found = ends_in(training.minutes), []
    asked = {SPARSE: gold_and(OTHERS), WRONG: only(OTHERS), CLOSED: None}
    for n, variant in enumerate(variants):
        decoder = trained(variant, training, ends)
        cases = short_cases(decoder, dev_cases(decoder, training.data, training.limit, training.seed))
        tells = {way: part(training.tell, 3 * n + k, 3 * len(variants)) for k, way in enumerate(asked)}
        found.append({way: answered(_named(variant, way), decoder, cases, given, tells[way]) for way, given in asked.items()})
    return found


def _named(variant: Variant, way: str) -> str:
    return variant.name if way == SPARSE else f"{variant.name}: {way.removeprefix(f'{SPARSE}, ')}"


def retrained_study(variants: Sequence[Variant], training: Training, against: int = 0) -> Study:
    """A row of each variant with gold among four others, its controls beneath, and paired differences to one variant."""
    found = trained_and_asked(variants, training)
    rows = [outcome for by_way in found for outcome in by_way.values()]
    return Study(rows, table(rows, [variants[against].name]))


def retrained_tokens_study(variants: Sequence[Variant], training: Training) -> Study:
    """The curve over tokens per head of readers that were each trained for theirs; controls are those of the last one."""
    found = trained_and_asked(variants, training)
    curve = [(variant.place, by_way[SPARSE]) for variant, by_way in zip(variants, found, strict=True)]
    return tokens_found(curve, [found[-1][CLOSED], found[-1][WRONG]])
