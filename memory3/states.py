"""Earlier states of the two tables of a bank, and tags that keep them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from memory3.spec import BankError
from memory3.tables import Table

Version = tuple[int, int]
"""Versions of `memories` and `sources` that belong together."""
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
        """The states that can still be looked at, oldest first: when each began, and the versions of the tables."""
        commits = [
            (row["timestamp"], n, int(row["version"]))
            for n, table in enumerate(self.tables)
            for row in table.dataset().versions()
        ]
        found, now = [], [0, 0]
        for made, n, version in sorted(commits):
            now[n] = version
            if all(now):
                found.append((made, (now[0], now[1])))
        return found

    def tags(self) -> dict[str, Version]:
        """Names of kept states."""
        memories, sources = ({name: int(tag["version"]) for name, tag in t.dataset().tags.list().items()} for t in self.tables)
        return {name: (version, sources[name]) for name, version in sorted(memories.items()) if name in sources}

    def tag(self, name: str) -> Version:
        """Name the present state, so that it is kept; `BankError` where the name is taken or is no name, or the disk refuses."""
        if not _TAG.fullmatch(name) or name in self.tags():
            taken = "is taken" if name in self.tags() else "is no name"
            raise BankError(f"found the tag {name!r}, which {taken}, expected a new one of letters, digits, '.', '-' and '_'")
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
