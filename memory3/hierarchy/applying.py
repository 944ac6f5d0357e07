"""A plan carried out: texts are encoded, memories fall back to text, and what an adapter has learned is read no more."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memory3.bank import Bank
from memory3.hierarchy.planning import TRAINED_TIERS, Plan
from memory3.loading import adapter_fingerprint
from memory3.reader import AT_ONCE
from memory3.spec import BankError, BankMismatch, SourceError
from memory3.tiers import Settings, Tiers

LEARNED = "consolidated.json"
"""In the folder of an adapter that `memory3 consolidate` made: which references it has learned."""


@dataclass(frozen=True)
class Learned:
    """What an adapter has learned.

    Args:
        bank: when the bank of the references was made, to the microsecond.
        layers: that were changed, a row of `memory3.hierarchy.consolidation.LAYERS`.
        ids: of the references.
    """

    bank: str
    layers: str
    ids: tuple[str, ...]

    def save(self, adapter: Path) -> None:
        """Note it beside the weights of the adapter."""
        (adapter / LEARNED).write_text(json.dumps(vars(self) | {"ids": list(self.ids)}), "utf-8")

    @classmethod
    def load(cls, adapter: Path, bank: Bank) -> Learned:
        """What the adapter in a folder has learned of a bank.

        Raises:
            SourceError: nothing that `consolidate` made.
            BankMismatch: of another bank, or with layers that the bank's memories depend on.
        """
        try:
            fields = json.loads((adapter / LEARNED).read_text("utf-8"))
            found = cls(fields["bank"], fields["layers"], tuple(map(str, fields["ids"])))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SourceError(
                f"{adapter / LEARNED} cannot be read ({error}), expected the folder of an adapter that memory3 consolidate made"
            ) from None
        if found.bank != bank.manifest.created:
            raise BankMismatch(
                f"{adapter} has learned references of a bank made {found.bank}, {bank.address} was made {bank.manifest.created}: "
                "consolidate this one"
            )
        if found.layers != "above":
            raise BankMismatch(
                f"{adapter} has changed layers that memories depend on, expected one of --layers above: a model with this adapter "
                f"reads {bank.address} only when it was rebuilt for it"
            )
        return found


@dataclass(frozen=True)
class Applied:
    """What carrying out a plan did.

    Args:
        encoded: texts that became memories.
        dropped: memories that became text.
        given: references that moved into the parameters of the adapter.
        waiting: references that are planned for parameters which no adapter here has; they are memories.
        freed_bytes: bytes of records that went.
    """

    encoded: int
    dropped: int
    given: int
    waiting: int
    freed_bytes: int


def apply(
    plan: Plan,
    bank: Bank,
    adapter: Path | None = None,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Applied:
    """Bring a bank to a plan; references that the plan does not name stay, what went since is passed over, and what saw its
    surroundings stays memory. What is planned for parameters and inside those of another adapter stays there, unless this one has it too.

    Each batch of texts is committed by itself; after a kill the same call goes on.

    Args:
        plan: of this bank.
        bank: opened with the model that writes it.
        adapter: folder of an adapter that `memory3 consolidate` made for references of the plan.
        on_progress: told the texts encoded so far, and their number.

    Raises:
        BankError: the planned memories do not fit under the limit of the bank (nothing was changed), or another process writes.
        BankMismatch: an adapter of another bank, or one that this bank cannot be read with, or a model in another dtype than the bank.
        SourceError: a folder without an adapter of `consolidate`.
    """
    with bank.exclusive():
        bank.refuse_other_dtype()
        learned = set() if adapter is None else set(Learned.load(adapter, bank).ids)
        name = None if adapter is None else adapter_fingerprint(adapter)
        there, inside = set(bank.places()), bank.adapters_of(bank.ids())
        bound = set(bank.in_context())  # what saw its surroundings is a memory, whatever is planned
        tiers = {row.id: row.tier for row in plan.references if row.id not in bound}
        present = set(bank.ids())
        trained = {id for id, tier in tiers.items() if tier in TRAINED_TIERS and id in present}
        given = sorted(id for id in trained & learned if inside.get(id) != name)
        waiting = sorted(trained - learned - set(inside))
        back = sorted(id for id in inside if tiers.get(id) in ("text", "memory"))
        memories = [id for id, tier in tiers.items() if tier == "memory" and id in present] + waiting
        texts = [id for id, tier in tiers.items() if tier == "text" and id in there]
        wanted = [id for id in memories if id not in there]
        freed = bank.compact()  # also what a run that was killed has left
        _refuse_beyond_limit(bank, len(wanted) - len(texts) - len(there & set(given)))
        if back:
            bank.give(back, None)
        dropped = bank.drop(texts)
        if given:
            bank.give(given, name)
        freed += bank.compact() if texts or given else 0
        _encode(bank, wanted, on_progress)
        bank.refresh(keep_versions=Settings.load(bank.path).max_bytes is None)
    return Applied(len(wanted), dropped, len(given), len(waiting), freed)


def _refuse_beyond_limit(bank: Bank, more: int) -> None:
    room = Tiers(bank).room()
    if more > room:
        raise BankError(
            f"the plan has {more} more memories of {bank.record_bytes:,} bytes than now, expected at most {max(0, room)} under the limit of "
            f"{bank.address}: raise it (memory3 bank tiers {bank.address} --max-bytes N), or plan with a price for storage"
        )


def _encode(bank: Bank, ids: Sequence[str], on_progress: Callable[[int, int | None], None]) -> None:
    for start in range(0, len(ids), AT_ONCE):
        some = ids[start : start + AT_ONCE]
        loaded = zip(some, bank.load(some), strict=True)
        made = {id: one.record for id, one in loaded if one.record is not None}
        bank.uses.note_encoded(made)
        bank.keep(made)
        on_progress(start + len(some), len(ids))
