"""The plan of a bank: which form each reference should have for the uses that it can expect, and what that saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

from memory3.bank import Bank
from memory3.cost import Costed, cheapest, total
from memory3.reader import BankReader
from memory3.spec import BankError, BankMismatch, SourceError
from memory3.uses import expected_uses

PLAN_VERSION = 1
TRAINED_TIERS = ("low-rank", "parameters")
"""Forms that are inside parameters."""


@dataclass(frozen=True)
class Text:
    """What the cost of a reference depends on: its tokens, and its bytes in UTF-8."""

    id: str
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Planned:
    """A reference, the uses that it can expect, and its cheapest form: `text`, `memory`, `low-rank` or `parameters`."""

    id: str
    tokens: int
    uses: float
    tier: str


@dataclass(frozen=True)
class Plan:
    """Every reference of a bank in its cheapest form (design, Eq. 1).

    Args:
        bank: when the bank was made, to the microsecond, which tells banks apart.
        days: how far it looks ahead.
        unit: of the costs: `FLOP`, `s` or `money`.
        references: by expected uses, the most used first.
        planned: the cost of this plan.
        alone: the cost of each form alone, by its name.
    """

    bank: str
    days: float
    unit: str
    references: tuple[Planned, ...]
    planned: float
    alone: Mapping[str, float]

    @property
    def tiers(self) -> dict[str, tuple[int, float]]:
        """References and expected uses of each form, also of those that nothing is planned for."""
        some = {name: [r.uses for r in self.references if r.tier == name] for name in self.alone}
        return {name: (len(uses), sum(uses)) for name, uses in some.items()}

    def save(self, file: Path) -> None:
        """Write the plan, for whoever applies it. `SourceError` where the file cannot be written."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"plan_version": PLAN_VERSION, **asdict(self)}), "utf-8")
        except OSError as error:
            raise SourceError(
                f"{file} cannot be written ({error.strerror}), expected a place for the plan: give another"
            ) from None

    @classmethod
    def load(cls, file: Path, bank: BankReader | None = None) -> Plan:
        """The plan in a file.

        Raises:
            SourceError: no plan, or of another version.
            BankMismatch: of another bank than the given one.
        """
        try:
            fields: dict[str, Any] = json.loads(file.read_text("utf-8"))
            version = fields.pop("plan_version")
            plan = cls(**{**fields, "references": tuple(Planned(**row) for row in fields["references"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SourceError(
                f"{file} is no plan ({error}), expected a file that memory3 plan --out made: make it again"
            ) from None
        if version != PLAN_VERSION:
            raise SourceError(
                f"{file} is a plan of version {version}, expected {PLAN_VERSION}: make it again with memory3 plan"
            )
        if bank is not None and plan.bank != bank.manifest.created:
            raise BankMismatch(
                f"{file} is the plan of a bank made {plan.bank}, {bank.address} was made {bank.manifest.created}: "
                f"make its own with memory3 plan --bank {bank.address}"
            )
        return plan


def plan(
    texts: Sequence[Text],
    uses: Mapping[str, float],
    forms: Callable[[Text], Sequence[Costed]],
    *,
    bank: str = "",
    days: float = 30.0,
    unit: str = "FLOP",
) -> Plan:
    """Give each reference its cheapest form.

    Args:
        texts: the references.
        uses: that each can expect; 0 where it is not named.
        forms: what a reference costs in each form, the same forms for all.
        bank: see `Plan`.
        days: see `Plan`.
        unit: see `Plan`.
    """
    rows, planned, alone = list[Planned](), 0.0, dict[str, float]()
    for text in texts:
        count, costs = uses.get(text.id, 0.0), forms(text)
        best = cheapest(count, costs)
        rows.append(Planned(text.id, text.tokens, count, best.name))
        planned += total(count, best)
        for form in costs:
            alone[form.name] = alone.get(form.name, 0.0) + total(count, form)
    rows.sort(key=lambda row: (-row.uses, row.id))
    return Plan(bank, days, unit, tuple(rows), planned, alone)


def texts_of(bank: BankReader) -> list[Text]:
    """All references of a bank; `BankError` where it has none."""
    found = [Text(row["id"], row["tokens"], len(row["text"].encode())) for row in bank.where()]
    if not found:
        raise BankError(f"{bank.address} is empty, expected references to plan for: write some first")
    return found


def uses_of(bank: Bank, days: float) -> dict[str, float]:
    """The uses that each reference can expect in the coming days, by the bank's own history.

    Raises:
        BankError: nothing was recalled yet, or the history is damaged.
        SpecError: no time ahead.
    """
    created = {row["id"]: row["created"].replace(tzinfo=UTC).timestamp() for row in bank.where()}
    return expected_uses(bank.uses.history(), created, days)


def uses_in(file: Path, texts: Sequence[Text]) -> dict[str, float]:
    """Expected uses from a file with a JSON object of `id` and `uses` in each line.

    Raises:
        SourceError: a line is no such object, or names a reference that is not there.
    """
    known, found = {text.id for text in texts}, dict[str, float]()
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read ({error}), expected JSON lines with id and uses") from None
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            id, uses = row["id"], float(row["uses"])
        except (ValueError, TypeError, KeyError):
            raise SourceError(f'found {line[:60]!r} in line {n} of {file}, expected {{"id": "…", "uses": 3}}') from None
        if id not in known or not 0 <= uses < float("inf"):
            raise SourceError(
                f"found {uses} uses of {id!r} in line {n} of {file}, expected at least 0 of a reference of the bank"
            )
        found[id] = found.get(id, 0.0) + uses
    return found
