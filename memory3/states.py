"""Earlier states of the two tables of a bank, and tags that keep them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from memory3.spec import BankError
from memory3.tables import Table

Version = tuple[int, int]
"""Versions of `memories` and `sources` that belong together."""
_TAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class States:
    """What is kept of two tables beside their newest versions.

    Args:
        folder: of the tables, for messages.
        tables: `memories` and `sources`.
    """

    folder: str
    tables: tuple[Table, Table]

    def versions(self) -> list[tuple[datetime, Version]]:
        """The states that can still be looked at, oldest first: when each began (UTC), and the versions of the tables.

        Tagged ones, and all from where neither table lacks a version in between.
        """
        rows = [{int(row["version"]): row["timestamp"].astimezone(UTC) for row in t.dataset().versions()} for t in self.tables]
        found = {v: max(times[n] for times, n in zip(rows, v, strict=True)) for v in self.tags().values() if _kept(rows, v)}
        tails = [_unbroken(times) for times in rows]
        commits = sorted((made, n, version) for n, tail in enumerate(tails) for version, made in tail.items())
        now = [0, 0]
        for made, n, version in commits:
            now[n] = version
            if all(now):
                found.setdefault((now[0], now[1]), made)
        return [(made, version) for version, made in sorted(found.items())]

    def tags(self) -> dict[str, Version]:
        """Names of kept states."""
        memories, sources = self._tagged()
        return {name: (version, sources[name]) for name, version in sorted(memories.items()) if name in sources}

    def tag(self, name: str) -> Version:
        """Name the present state, so that it is kept; `BankError` where the name is taken or is no name, or the disk refuses."""
        if not _TAG.fullmatch(name) or name.endswith(".lock") or name in self.tags():
            taken = "is taken" if name in self.tags() else "is no name"
            raise BankError(
                f"found the tag {name!r}, which {taken}, expected a new one: a letter, then letters, digits, '-', '_' and single '.'"
            )
        version = (self.tables[0].version, self.tables[1].version)
        try:
            for table, number in zip(self.tables, version, strict=True):
                table.set_tag(name, number)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BankError(
                f"{self.folder} cannot be tagged ({reason}), expected a disk that is writable and has hard links"
            ) from None
        return version

    def untag(self, name: str) -> None:
        """Let a state go; `BankError` where no state has the name."""
        if name not in self.tags():
            raise BankError(f"found no tag {name!r}, expected one of {', '.join(self.tags()) or 'none, for there is none'}")
        for table in self.tables:
            table.dataset().tags.delete(name)

    def tidy(self) -> None:
        """Drop tags that a kill left on one table only."""
        whole = self.tags()
        for table, tagged in zip(self.tables, self._tagged(), strict=True):
            for name in tagged:
                if name not in whole:
                    table.dataset().tags.delete(name)

    def _tagged(self) -> tuple[dict[str, int], dict[str, int]]:
        memories, sources = (
            {name: int(tag["version"]) for name, tag in table.dataset().tags.list().items()} for table in self.tables
        )
        return memories, sources


def _kept(rows: list[dict[int, datetime]], version: Version) -> bool:
    return all(number in times for times, number in zip(rows, version, strict=True))


def _unbroken(times: dict[int, datetime]) -> dict[int, datetime]:
    """The newest versions, back to the first one that is missing."""
    number = max(times)
    while number - 1 in times:
        number -= 1
    return {version: made for version, made in times.items() if version >= number}
