"""A consolidation measured: which references, what is known before and after, what it cost, and what it will save."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory3.bank import Bank
from memory3.cost import Shape, memory_read_flops, memory_write_flops, text_read_flops
from memory3.decoder import Decoder
from memory3.hierarchy.applying import Learned
from memory3.hierarchy.consolidation import Consolidation, Paid, consolidated, first_layer, schedule_of
from memory3.hierarchy.phrasings import Subject, subject_of
from memory3.hierarchy.planning import TRAINED_TIERS, Plan, uses_of
from memory3.hierarchy.recollection import Recollection, loss_of, recall_of
from memory3.reader import BankReader
from memory3.spec import BankError, BankMismatch, SourceError
from memory3.train.convert import Lora
from memory3.train.loop import Report, Settings

MOST_HELD = 64
"""Texts that the loss is measured on, at most."""
Tell = Callable[[str, int, int | None], None]


# ---- which references ----


def ids_in(file: Path) -> list[str]:
    """Ids from a file, one a line; `SourceError` where it cannot be read or names none."""
    try:
        found = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read ({error}), expected one id of a memory in each line") from None
    if not found:
        raise SourceError(f"{file} is empty, expected one id of a memory in each line")
    return list(dict.fromkeys(found))


def most_used(bank: Bank, count: int, days: float = 30.0) -> list[str]:
    """Ids of the references that can expect the most uses, the most used first; `BankError` without a use history."""
    expected = uses_of(bank, days)
    return sorted(expected, key=lambda id: (-expected[id], id))[:count]


def planned_ids(file: Path, bank: BankReader) -> list[str]:
    """Ids that a plan of this bank puts into parameters; `SourceError` where it puts none there."""
    found = [row.id for row in Plan.load(file, bank).references if row.tier in TRAINED_TIERS]
    if not found:
        raise SourceError(
            f"{file} puts no reference into parameters, expected some: expect more uses (--horizon of memory3 plan), or choose with --top"
        )
    return found


@dataclass(frozen=True)
class Sides:
    """What is consolidated, and what is not.

    Args:
        subjects: to be known.
        control: as many others of the bank, or fewer: neither learned nor replayed.
        replayed: texts to keep.
        held: texts whose loss is measured, never replayed.
    """

    subjects: list[Subject]
    control: list[Subject]
    replayed: list[str]
    held: list[str]


def sides_of(bank: BankReader, ids: Sequence[str], replay: Iterable[str] | None = None, seed: int = 0) -> Sides:
    """The references of a bank as sides of a consolidation.

    Args:
        bank: whose references.
        ids: what is consolidated.
        replay: other texts to replay and to measure the loss on, a fifth of them; by default the bank's own others.
        seed: of the draws.

    Raises:
        BankError: ids that the bank does not have, or nothing to replay.
    """
    wanted = set(ids)
    if unknown := bank.missing(wanted):
        raise BankError(f"{bank.address} has no memory {unknown[0]!r} ({len(unknown)} in all), expected ids of this bank")
    texts = {row["id"]: row["text"] for row in bank.where()}
    rng, others = random.Random(seed), sorted(set(texts) - wanted)
    rng.shuffle(others)
    count = min(len(wanted), len(others) // 2)
    apart = {texts[id] for id in (*wanted, *others[:count])}
    free = [texts[id] for id in others[count:]] if replay is None else [t for t in dict.fromkeys(replay) if t not in apart]
    rng.shuffle(free)
    held = min(MOST_HELD, max(1, len(free) // 5))
    if len(free) < held + 2:
        raise BankError(
            f"{bank.address} leaves {len(free)} texts to replay against forgetting, expected at least 3: give documents with --replay"
        )
    return Sides(
        [subject_of(id, texts[id]) for id in dict.fromkeys(ids)],
        [subject_of(id, texts[id]) for id in others[:count]],
        free[held:],
        free[:held],
    )


# ---- what it does ----


@dataclass(frozen=True)
class Options:
    """How to consolidate.

    Args:
        out: folder; each choice of layers gets one of its own inside, with adapter and checkpoints.
        base: folder or hub name of the model, `None` for the one that ships.
        steps: of the optimizer.
        rate: peak learning rate.
        rank: of the adapters.
        replay: weight of the replay.
        batch_size: references of a step.
        seed: of everything drawn.
        precision: of the passes, `no` or `bf16`.
    """

    out: Path
    base: str | None = None
    steps: int = 300
    rate: float = 5e-3
    rank: int = 16
    replay: float = 1.0
    batch_size: int = 8
    seed: int = 0
    precision: str = "no"


def compared(
    lend: Callable[[], Decoder],
    bank: Bank,
    sides: Sides,
    modes: Sequence[str],
    options: Options,
    *,
    uses: float | None = None,
    days: float | None = None,
    tell: Tell = lambda what, done, total: None,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Consolidate with each choice of layers, from the same start, and measure: the document of docs/json.md.

    Recall in memory is with each reference's own memory alone, as the model at that moment writes it.

    Args:
        lend: loads the model as it was, attached, in float32.
        bank: for whether it can still be read.
        sides: see `sides_of`.
        modes: names of `LAYERS`.
        options: how.
        uses: that the references can expect together in `days`.
        days: see `uses`.
        tell: told what is going on, how far it is, and of how much.
        report: told of figures of the training.
    """
    made: dict[str, Any] = {}
    for mode in modes:
        with lend() as decoder:
            if not made:
                for name in modes:
                    first_layer(decoder, name)  # refuse before any work is done
                recall, loss = _known(decoder, sides, None, tell), loss_of(decoder, sides.held)
                made = {**_facts(decoder, bank, sides, uses, days), "recall": recall, "unrelated_loss": loss, "modes": []}
            folder = options.out / mode
            paid = _trained(decoder, sides, mode, folder, options, report)
            Learned(bank.manifest.created, mode, tuple(s.id for s in sides.subjects)).save(folder)
            made["recall"] += _known(decoder, sides, mode, tell)
            made["modes"].append(
                {
                    "layers": mode,
                    "adapter": str(folder),
                    "banks_readable": _readable(bank, decoder),
                    "unrelated_loss": loss_of(decoder, sides.held),
                    "paid": asdict(paid),
                    "saving": _saving(decoder, bank, sides, paid, uses),
                }
            )
    return made


def _facts(decoder: Decoder, bank: Bank, sides: Sides, uses: float | None, days: float | None) -> dict[str, Any]:
    return {
        "model": decoder.name,
        "bank": bank.address,
        "references": len(sides.subjects),
        "tokens": sum(len(decoder.tokens(s.text)) for s in sides.subjects),
        "uses": uses,
        "days": days if uses is not None else None,
        "control": len(sides.control),
        "replayed": len(sides.replayed),
        "unrelated": len(sides.held),
    }


def _trained(decoder: Decoder, sides: Sides, mode: str, folder: Path, options: Options, report: Report) -> Paid:
    objective = Consolidation(
        decoder, sides.subjects, sides.replayed, options.batch_size, replay=options.replay, seed=options.seed
    )
    schedule = schedule_of(options.steps, options.rate)
    settings = Settings(folder, schedule, weight_decay=0.0, precision=options.precision, seed=options.seed)
    lora = Lora(rank=options.rank, alpha=2.0 * options.rank, seed=options.seed)
    return consolidated(decoder, objective, settings, folder, layers=mode, lora=lora, base=options.base, report=report)


def _known(decoder: Decoder, sides: Sides, mode: str | None, tell: Tell) -> list[dict[str, Any]]:
    """A row for each arm and kind."""
    rows = []
    for arm, subjects, memory in (
        ("closed book", sides.subjects, False),
        ("control, closed book", sides.control, False),
        ("in memory", sides.subjects, True),
        ("control, in memory", sides.control, True),
    ):
        found = recall_of(decoder, subjects, memory=memory, tell=lambda done, total, arm=arm: tell(arm, done, total))  # type: ignore[misc]
        rows += [_row(mode, arm, kind, one) for kind, one in vars(found).items()]
    return rows


def _row(mode: str | None, arm: str, kind: str, found: Recollection) -> dict[str, Any]:
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(found).items()}
    return {"layers": mode, "arm": arm, "kind": kind, **fields}


def _readable(bank: Bank, decoder: Decoder) -> bool:
    """Whether a bank of the model as it was can be read by the model as it is."""
    try:
        bank.manifest.check(bank.address, decoder.identity())
    except BankMismatch:
        return False
    return True


def _saving(decoder: Decoder, bank: Bank, sides: Sides, paid: Paid, uses: float | None) -> dict[str, float | None]:
    """What a use saves that needs no memory any more, and the uses of each reference that pay for the training, and for writing
    the bank again where that is needed.
    """
    shape, spec = Shape.of(decoder.model.config), decoder.spec
    memory, text = memory_read_flops(shape, spec), text_read_flops(shape, spec)
    rebuild = 0.0 if _readable(bank, decoder) else len(bank) * memory_write_flops(shape, spec)
    each = (paid.flops + rebuild) / len(sides.subjects)
    return {
        "rebuild_flops": rebuild,
        "per_use_flops": memory,
        "per_use_bytes": bank.record_bytes,
        "per_use_text_flops": text,
        "flops": None if uses is None else uses * memory,
        "bytes": None if uses is None else uses * bank.record_bytes,
        "break_even_uses": each / memory,
        "break_even_text_uses": each / text,
    }
