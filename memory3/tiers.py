"""Which tier each reference of a bank is in, and how use moves it: text, memory, or the parameters of an adapter (design 1, Eq. 1).

A text that is recalled is encoded for that recall, as its memory was or would be: that costs half as much as reading it in the prompt
(design 5), and answers do not depend on the tier. Whether the memory is then kept is decided here: where there is room and keeping
is free, always; else by what a place is worth. The rule is that of `memory3.hierarchy.policies.Adaptive`, which plays it over traces.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory3.bank import Bank
from memory3.cost import Costed, Shape, memory_read_flops, memory_write_flops, text_read_flops
from memory3.reader import BankReader, MemoryWriter
from memory3.spec import BankError, Memory3Error, MemorySpec, SpecError, UnsupportedModel
from memory3.uses import DAY_S, History, Use, exposure, posterior_rate

SETTINGS = "tiers.json"
HORIZON_DAYS = 60.0
"""Days over which keeping a memory has to pay."""
LOOK_S, POOL = 60.0, 16
"""How long a look at the whole bank is gone by, at least, and of how many of the least useful memories the uses since are asked."""
REFRESHED = 128
"""Moves between two refreshes of the indexes."""
NAMES = ("text", "memory", "parameters")
_COMMIT_BYTES = 2**16


@dataclass(frozen=True)
class Costs:
    """What one reference costs, all in one unit: FLOPs, seconds or money.

    Args:
        text: a use as text.
        encoding: text to memory.
        memory: a use as memory.
        consolidation: into parameters, once.
        parameters: a use from parameters.
        rent: keeping one memory for a day.
    """

    text: float
    encoding: float
    memory: float
    consolidation: float
    parameters: float = 0.0
    rent: float = 0.0

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0 or not all(map(math.isfinite, vars(self).values())):
            raise SpecError(f"found {self}, expected finite costs of at least 0")

    @property
    def once(self) -> float:
        """A use of what is kept as text: as text, or encoded for this use alone."""
        return min(self.text, self.encoding + self.memory)

    @property
    def saving(self) -> float:
        """What a use saves where a memory was kept."""
        return self.once - self.memory

    @property
    def entry(self) -> float:
        """What keeping a memory costs more, at the use that begins it, than reading it the cheaper way."""
        return self.encoding + self.memory - self.once


def costs_of(formats: Sequence[Costed], rent: float = 0.0) -> Costs:
    """The costs of the tiers from `memory3.cost.formats`; of the formats inside the parameters, the one that is written cheapest."""
    by_name = {format.name: format for format in formats}
    missing = {"text", "memory"} - set(by_name)
    inside = [format for name, format in by_name.items() if name not in ("text", "memory")]
    if missing or not inside:
        raise SpecError(f"found the formats {', '.join(by_name)}, expected text, memory, and one inside the parameters")
    best, text, memory = min(inside, key=lambda format: format.write), by_name["text"], by_name["memory"]
    return Costs(text.read, memory.write, memory.read, best.write, best.read, rent)


@dataclass(frozen=True)
class Settings:
    """What decides over the tiers of a bank; it lies in `tiers.json` inside the folder.

    Args:
        shape: of the decoder that writes the bank; `None` where its cost is unknown.
        max_bytes: most bytes of the bank's folder; `None` sets no limit.
        rent: FLOPs that keeping one memory for a day is worth.
    """

    shape: Shape | None = None
    max_bytes: int | None = None
    rent: float = 0.0

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise SpecError(f"found a budget of {self.max_bytes} bytes, expected at least 1")
        if not 0 <= self.rent < float("inf"):
            raise SpecError(f"found a rent of {self.rent} FLOPs a day, expected at least 0")
        if self.rent and self.shape is None:
            raise SpecError("found a rent and no shape of the model, expected both: what a memory saves has to be known")

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Of a bank; those of one without the file are the defaults.

        Raises:
            BankError: the file is damaged.
        """
        file = folder / SETTINGS
        try:
            fields = json.loads(file.read_text("utf-8"))
            shape = fields.pop("shape")
            return cls(None if shape is None else Shape(**shape), **fields)
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise BankError(
                f"{file} cannot be read ({error}), expected what memory3 bank tiers wrote: remove it, and set it again"
            ) from None

    def save(self, folder: Path) -> None:
        """Note it in a bank, whole or not at all; `BankError` where the folder cannot be written."""
        file, fresh = folder / SETTINGS, folder / f"{SETTINGS}.new"
        try:
            with fresh.open("w", encoding="utf-8") as written:
                written.write(json.dumps(asdict(self)))
                written.flush()
                os.fsync(written.fileno())
            os.replace(fresh, file)
        except OSError as error:
            raise BankError(f"{file} cannot be written ({error.strerror}): make the folder writable") from error


def rent_of(bytes: int, gb_month: float, hour: float, tflops: float) -> float:
    """FLOPs that cost as much as keeping so many bytes for a day.

    Args:
        bytes: of one memory.
        gb_month: price of keeping 1e9 bytes for 30 days.
        hour: price of an hour of the machine.
        tflops: what the machine does, in 1e12 FLOPs a second; 1e-12 gives the rent in its seconds.
    """
    if hour <= 0 or tflops <= 0 or gb_month < 0:
        raise SpecError(f"found an hour for {hour}, {tflops} TFLOPs and a GB-month for {gb_month}, expected prices above 0")
    return bytes / 1e9 * gb_month / 30 / (hour / 3600) * tflops * 1e12


def prepare(bank: Bank, decoder: MemoryWriter, max_bytes: int | None = None) -> None:
    """Note the shape of the decoder that writes a bank, and a limit where one is given."""
    there = Settings.load(bank.path)
    wanted = replace(there, shape=shape_of(decoder), max_bytes=max_bytes or there.max_bytes)
    if wanted != there:
        wanted.save(bank.path)


def shape_of(decoder: MemoryWriter) -> Shape | None:
    """The shape that costs are counted for; `None` where the formulas do not hold for the model."""
    try:
        return Shape.of(decoder.model.config)  # type: ignore[attr-defined]
    except (UnsupportedModel, AttributeError):
        return None


@dataclass(frozen=True)
class _Rows:
    """Some references of a bank, `(N,)` each: what keeping their memories saves a day, and what it costs to begin with."""

    ids: Sequence[str]
    savings: NDArray[np.float64]
    entries: NDArray[np.float64]


@dataclass
class _Look:
    """What was seen of a whole bank, which takes a while where it is large: uses a day of a mean reference, days that count, bytes of the
    tables, and the memories, those that save least first.
    """

    mean: float
    seen: float
    tables: int
    order: list[str] = field(default_factory=list)
    savings: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    lasts_until: float = 0.0

    @property
    def fresh(self) -> bool:
        return monotonic() < self.lasts_until

    def below(self, rent: float) -> int:
        """Memories that saved less than that a day."""
        return int((self.savings < rent).sum())


class Tiers:
    """The tiers of a bank.

    Args:
        bank: opened with the model that writes it; without one nothing can be moved.
        max_bytes: in place of the limit that the bank has.
    """

    def __init__(self, bank: Bank, max_bytes: int | None = None) -> None:
        self.bank, self._max_bytes = bank, max_bytes
        self.spec = MemorySpec.from_json(bank.manifest.identity["spec"])
        self._look: _Look | None = None
        self._loaded: Settings | None = None
        self._costs: dict[int, Costs] = {}

    @property
    def settings(self) -> Settings:
        """As they are in the bank; `BankError` where they are damaged."""
        there = Settings.load(self.bank.path)
        if self._max_bytes is not None:
            there = replace(there, max_bytes=self._max_bytes)
        if self._loaded is None or there.shape != self._loaded.shape:
            self._costs = {}
        self._loaded = there
        return there

    def settle(self, records: Mapping[str, bytes]) -> int | None:
        """Keep those memories that are worth their place, of texts that were just encoded for a recall; how many.

        Where there is no room, memories that save less fall back to text. `None` where another process writes, nothing can be written,
        or the model is in another dtype than the bank: what was recalled does not depend on it.
        """
        try:
            with self.bank.exclusive(wait_s=0):
                return self._settled({id: records[id] for id in self.bank.texts_among(records)})
        except Memory3Error:
            return None

    def fit(self, further_bytes: int = 0) -> int:
        """Let memories fall back to text that are below the rent, or that leave no room for so many bytes under the limit, and give
        their space back; how many. For a moment their records are there twice.
        """
        with self.bank.exclusive():
            settings, look = self.settings, self._looked()
            dropped = self.bank.drop(look.order[: max(look.below(settings.rent), -self._room(settings, further_bytes))])
            if dropped:
                self.bank.compact()
            self._look = None
            return dropped

    def _settled(self, records: Mapping[str, bytes]) -> int:
        settings = self.settings
        room, rent = self._room(settings), settings.rent
        if room >= len(records) and not rent:
            return self._keep(records, (), settings)
        look = self._look if self._look is not None and self._look.fresh else self._looked()
        if (room := self._room(settings)) < 0:
            self.fit()
            look, room = self._looked(), self._room(settings)
        if room < 0:
            return 0
        new, kept = self._rows(list(records), look), self._worst(look, POOL + 2 * len(records))
        fallen = int((kept.savings < rent).sum())
        room += fallen
        chosen = dict[str, bytes]()
        for n in np.argsort(-new.savings, kind="stable").tolist():
            displaced = room <= 0
            if displaced and fallen == len(kept.ids):
                break
            price = max(rent, float(kept.savings[fallen])) if displaced else rent
            if HORIZON_DAYS * (new.savings[n] - price) <= new.entries[n]:
                break
            chosen[new.ids[n]] = records[new.ids[n]]
            room, fallen = (room, fallen + 1) if displaced else (room - 1, fallen)
        look.order[:0] = kept.ids[fallen:]
        return self._keep(chosen, kept.ids[:fallen], settings)

    def _looked(self) -> _Look:
        """All memories that may fall by what they save; under a limit older versions of the tables go first."""
        began = monotonic()
        if self.settings.max_bytes is not None:
            self.bank.refresh(keep_versions=False)
        history, table, bound = self.bank.uses.history(), self.bank.tiers(), set(self.bank.in_context())
        scores = sum(use.score for use in history.uses.values())
        seen = exposure((history.now - (history.began or history.now)) / DAY_S, history.half_life_days)
        look = self._look = _Look(max(scores, 1e-9) / seen / max(1, len(table)), seen, self.bank.table_bytes())
        columns = (table[name].to_pylist() for name in ("id", "tokens", "shard"))
        kept = {id: tokens for id, tokens, shard in zip(*columns, strict=True) if shard >= 0 and id not in bound}
        rows = self._rated(list(kept), list(kept.values()), history, look)
        order = np.argsort(rows.savings, kind="stable")
        look.order, look.savings = [rows.ids[n] for n in order], rows.savings[order]
        look.lasts_until = monotonic() + max(LOOK_S, 20 * (monotonic() - began))
        return look

    def _worst(self, look: _Look, count: int) -> _Rows:
        """Those that saved least at the last look, as they are now; they leave the look."""
        some, look.order = look.order[:count], look.order[count:]
        gone = set(self.bank.unwritten(some))
        rows = self._rows([id for id in some if id not in gone], look)
        order = np.argsort(rows.savings, kind="stable")
        return _Rows([rows.ids[n] for n in order], rows.savings[order], rows.entries[order])

    def _rows(self, ids: Sequence[str], look: _Look) -> _Rows:
        lengths = self.bank.lengths(ids)
        return self._rated(ids, [lengths.get(id, 1) for id in ids], self.bank.uses.history(ids), look)

    def _rated(self, ids: Sequence[str], tokens: Sequence[int], history: History, look: _Look) -> _Rows:
        scores = np.array([use.score if (use := history.uses.get(id)) else 0.0 for id in ids])
        lengths = np.array(tokens, np.int64)
        costs = [self.costs(n) for n in range(1, int(lengths.max(initial=1)) + 1)]
        saving, entry = (np.array([getattr(c, name) for c in costs])[lengths - 1] for name in ("saving", "entry"))
        return _Rows(ids, posterior_rate(scores, look.seen, look.mean) * saving, entry)

    def _keep(self, records: Mapping[str, bytes], instead_of: Sequence[str], settings: Settings) -> int:
        """Move, and bring the indexes up to date now and then, or where the limit is near."""
        if not records and not instead_of:
            return 0
        limit, before = settings.max_bytes, self.bank.version[0]
        added = max(0, len(records) - len(instead_of)) * self.bank.record_bytes
        if limit is not None and self.bank.total_bytes() + added + 2 * self._commit_bytes > limit:
            self.bank.refresh(keep_versions=False)
        kept = self.bank.keep(records, instead_of)
        if self.bank.version[0] // REFRESHED > before // REFRESHED:
            self.bank.refresh(keep_versions=limit is None)
        return kept

    def room(self) -> int:
        """Further records that fit under the limit; below 0 where there are too many."""
        return self._room(self.settings)

    def _room(self, settings: Settings, further_bytes: int = 0) -> int:
        """A rewriting of the tables has to fit too; versions of them since the last look do not count, for they can go."""
        if settings.max_bytes is None:
            return 2**62
        now = self.bank.table_bytes()
        tables = self._look.tables if self._look is not None and self._look.fresh else now
        held = self.bank.total_bytes() - now + 2 * (tables + self._commit_bytes)
        return (settings.max_bytes - further_bytes - held) // self.bank.record_bytes

    @property
    def _commit_bytes(self) -> int:
        """What a move adds to the tables: a column of places is written again."""
        return _COMMIT_BYTES + 64 * len(self.bank)

    def costs(self, tokens: int) -> Costs:
        """What a reference of so many tokens costs in FLOPs; by its tokens alone where the model's shape is unknown."""
        if tokens not in self._costs:
            shape = self._loaded.shape if self._loaded is not None else self.settings.shape
            spec = replace(self.spec, reference_length=max(1, tokens))
            if shape is None:
                self._costs[tokens] = Costs(2.0 * tokens, 1.0 * tokens, 0.0, 0.0)
            else:
                write, read = memory_write_flops(shape, spec), memory_read_flops(shape, spec)
                self._costs[tokens] = Costs(text_read_flops(shape, spec), write, read, 0.0)
        return self._costs[tokens]

    def report(self) -> dict[str, Any]:
        """References in each tier, and what their recalls cost and would have cost as text, as plain JSON values.

        Paid is every encoding that is known of, and the reading of memories; a recall as text encodes the reference in the prompt. Costs are
        `None` where the model's shape is unknown.
        """
        table, settings = self.bank.tiers(), self.settings
        columns = [table[name].to_pylist() for name in ("id", "tokens", "shard")]
        history = History({}, None, 0.0)
        with suppress(BankError):  # `verify` says that a history is damaged
            history = self.bank.uses.history()
        paid = as_text = 0.0
        for id, tokens, shard in zip(*columns, strict=True):
            use, costs = history.uses.get(id, _UNUSED), self.costs(tokens)
            encoded = max(use.encoded, int(shard >= 0))
            paid += encoded * costs.encoding + (use.recalls - use.known) * costs.memory
            as_text += use.recalls * costs.text
        known = settings.shape is not None
        return {
            "tiers": counted(self.bank),
            "recalls": sum(use.recalls for use in history.uses.values()),
            "flops_paid": paid if known else None,
            "flops_as_text": as_text if known else None,
            "max_bytes": settings.max_bytes,
            "rent_flops": settings.rent,
        }


def limit(bank: Bank, settings: Settings) -> int:
    """Set what decides over the tiers of a bank, and let memories fall back to text accordingly; how many. After a kill the same call
    goes on.

    Raises:
        BankError: the limit leaves no room for texts and their index (nothing was changed), or another process writes.
    """
    with bank.exclusive():
        if settings.max_bytes is not None:
            bank.refresh(keep_versions=False)
            least = bank.total_bytes() - bank.shard_bytes() + bank.table_bytes()
            if settings.max_bytes < least:
                raise BankError(
                    f"found a limit of {settings.max_bytes:,} bytes for {bank.path}, expected at least {least:,}: its texts and their index "
                    "take so much, and as much again as the tables while they are rewritten"
                )
        settings.save(bank.path)
        return Tiers(bank).fit()


def report(bank: BankReader) -> dict[str, Any]:
    """See `Tiers.report`; of a bank that is only read, and keeps no history, the references in each tier alone."""
    if isinstance(bank, Bank):
        return Tiers(bank).report()
    return {
        "tiers": counted(bank),
        "recalls": 0,
        "flops_paid": None,
        "flops_as_text": None,
        "max_bytes": None,
        "rent_flops": 0.0,
    }


def counted(bank: BankReader) -> dict[str, int]:
    """References in each tier."""
    found = Counter(bank.tier_of_each().values())
    return {name: found[name] for name in NAMES}


_UNUSED = Use(0.0, 0)
