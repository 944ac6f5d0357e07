"""Small banks whose references are text or memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import FakeDecoder

from memory3.bank import Bank
from memory3.cost import Shape
from memory3.spec import MemorySpec, Reference
from memory3.tiers import Settings
from memory3.writing import write

TEXTS = [
    "The tower was completed in 1889.",
    "Salt melts at 801 degrees.",
    "Crows gather in a murder.",
    "Rain falls on the mat.",
]
WORDS = ["tower", "salt", "crows", "rain"]
SHAPE = Shape(3, 32, 4, 2, 8, 64, 400)


def references(texts: list[str] = TEXTS) -> list[Reference]:
    return [Reference(text, "notes", n, n + len(text)) for n, text in enumerate(texts)]


def banked(path: Path, lazy: bool = True, **options: Any) -> tuple[Bank, FakeDecoder]:
    decoder = FakeDecoder()
    bank = Bank(path, decoder, create=True, codec=options.pop("codec", None))
    write(decoder, references(), bank, lazy=lazy, **options)
    return bank, decoder


def kept(bank: Bank) -> set[str]:
    """Words of the references whose records are there."""
    there = bank.places()
    return {word for word, reference in zip(WORDS, references(), strict=True) if reference.id in there}


def limit_for(bank: Bank, records: int) -> int:
    """Bytes of a folder that has room for so many records and half another."""
    bank.refresh(keep_versions=False)
    moves = 2**16 + 64 * len(bank)
    return int(2 * (bank.table_bytes() + moves) + (records + 0.5) * bank.record_bytes)


def limited(path: Path, records: int) -> Bank:
    """A lazy bank whose records are large beside its tables."""
    decoder = FakeDecoder(
        MemorySpec(layers=tuple(range(16)), heads=((0, 1, 2, 3),) * 16, tokens_per_head=64, reference_length=128)
    )
    bank = Bank(path, decoder, create=True)
    write(decoder, references(), bank, lazy=True)
    Settings(max_bytes=limit_for(bank, records)).save(path)
    return bank


def broken(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    def die(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, die)
