"""A deletion under way, noted on disk before it begins, so that a kill cannot leave it half done (docs/bank.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from memory3.catalogue import Span
from memory3.shards import Place, sync_folder
from memory3.spec import BankError

JOURNAL = "journal.json"


@dataclass(frozen=True)
class Deletion:
    """What goes: rows of `sources`, and memories with the places of their records. Doing it twice is doing it once."""

    spans: Sequence[Span]
    places: Mapping[str, Place]

    def save(self, folder: Path) -> None:
        """Note it, whole or not at all."""
        fields = {
            "spans": [list(span) for span in self.spans],
            "places": {id: list(place) for id, place in self.places.items()},
        }
        fresh = folder / f"{JOURNAL}.new"
        try:
            with fresh.open("w", encoding="utf-8") as file:
                json.dump(fields, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(folder / JOURNAL)
            sync_folder(folder)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise BankError(
                f"{folder} cannot note a deletion ({error.strerror}), nothing was deleted: free some space"
            ) from error

    @classmethod
    def load(cls, folder: Path) -> Deletion | None:
        """The deletion that a kill interrupted; `None` where there is none. `BankError` where the note is ill-formed."""
        path = folder / JOURNAL
        if not path.is_file():
            return None
        try:
            fields = json.loads(path.read_text("utf-8"))
            places = {str(id): (int(shard), int(slot)) for id, (shard, slot) in fields["places"].items()}
            spans = [(str(id), str(source), int(start), int(end)) for id, source, start, end in fields["spans"]]
            return cls(spans, places)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BankError(
                f"{path} is ill-formed ({type(error).__name__}): an interrupted deletion cannot be finished; remove the file, then "
                "delete again what was to go"
            ) from None

    @staticmethod
    def clear(folder: Path) -> None:
        """It is done."""
        (folder / JOURNAL).unlink(missing_ok=True)
        sync_folder(folder)
