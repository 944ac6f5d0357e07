"""Limits and rents: which memories fall back to text, and that no writer and no kill leaves a bank above its limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import FakeDecoder, count, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiered import SHAPE, TEXTS, WORDS, banked, kept, limit_for, limited, references

from memory3.bank import Bank
from memory3.rebuilding import rebuild
from memory3.recall import Recall
from memory3.spec import BankError, MemorySpec, Reference, SpecError
from memory3.tiers import SETTINGS, Settings, Tiers, limit
from memory3.verifying import verify
from memory3.writing import write


def test_under_a_limit_the_most_used_are_kept_and_the_others_fall_back(tmp_path: Path) -> None:
    bank = limited(tmp_path, 2)
    recall = Recall(bank, count=1, cache_bytes=0)
    limit = Settings.load(tmp_path).max_bytes or 0
    assert bank.record_bytes > 4 * bank.table_bytes() / 10
    for word in ["tower", "salt", *["crows"] * 4, "salt", "salt", "rain"]:
        recall([word])
        assert bank.total_bytes() <= limit
        assert len(kept(bank)) <= 2
    assert kept(bank) == {"crows", "salt"}
    assert bank.stats()["shard_bytes"] == 2 * bank.record_bytes
    assert verify(bank).problems == []


def test_what_was_used_since_the_look_at_the_bank_is_not_displaced(tmp_path: Path) -> None:
    bank = limited(tmp_path, 2)
    assert count(TEXTS[0]) < count(TEXTS[1])  # so that the tower saves least at equal use
    recall = Recall(bank, count=1, cache_bytes=0)
    for word in (*["tower"] * 4, *["salt"] * 4, "crows"):
        recall([word])
    look = recall._tiers[0]._look  # type: ignore[union-attr]
    assert look is not None
    assert look.fresh
    assert look.order[0] == references()[0].id
    for word in [*["tower"] * 12, *["crows"] * 5]:
        recall([word])
    assert recall._tiers[0]._look is look  # type: ignore[union-attr]
    assert kept(bank) == {"tower", "crows"}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=14))
def test_whatever_is_recalled_reads_the_same_and_the_limit_holds(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    bank = limited(tmp_path_factory.mktemp("bank"), 1)
    limit = Settings.load(bank.path).max_bytes or 0
    assert bank.decoder is not None
    recall = Recall(bank, count=1, cache_bytes=0)
    for word in words:
        [found] = recall([word])
        assert same(found.memories[0], bank.decoder.encode([found.references[0].text])[0])
        assert len(kept(bank)) <= 1
        assert bank.total_bytes() <= limit
    assert verify(bank).problems == []


def test_a_rent_lets_fall_what_is_hardly_used(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path, lazy=False)
    for _ in range(9):
        Recall(bank, count=1)(["tower"])
    Settings(SHAPE).save(tmp_path)
    rent = float(Tiers(bank)._looked().savings[-1]) / 2
    Settings(SHAPE, rent=rent).save(tmp_path)
    assert Tiers(bank).fit() == 3
    assert kept(bank) == {"tower"}
    assert bank.stats()["shard_bytes"] == bank.record_bytes
    Recall(bank, count=1)(["salt"])
    assert kept(bank) == {"tower"}


def test_a_lazy_write_makes_room_for_texts(tmp_path: Path) -> None:
    bank = limited(tmp_path, 2)
    decoder = bank.decoder
    assert isinstance(decoder, FakeDecoder)
    recall = Recall(bank, count=1)
    for word in (*["tower"] * 9, "salt"):
        recall([word])
    assert kept(bank) == {"tower", "salt"}
    limit = Settings.load(tmp_path).max_bytes or 0
    room = limit - bank.total_bytes() - bank.table_bytes()
    more = [Reference(f"Number {n} " + "ox " * 40, "more", n, n + 1) for n in range(room // 4 // 100 + 60)]
    write(decoder, more, bank, lazy=True, max_bytes=limit)
    assert bank.total_bytes() <= limit
    assert "salt" not in kept(bank)
    assert len(bank) == 4 + len(more)


def test_a_limit_that_not_even_the_texts_fit_is_one_clear_error(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    with pytest.raises(BankError, match="expected at most 1,000 in all"):
        write(decoder, references(), bank, lazy=True, max_bytes=1000)
    assert len(bank) == 0


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"shape": 3}', '{"shape": null, "rent": -1}', '{"shape": null, "max_bytes": 0}', '{"shape": null, "x": 1}'],
)
def test_damaged_settings_are_one_clear_error(tmp_path: Path, text: str) -> None:
    bank, _ = banked(tmp_path)
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises((BankError, SpecError), match="expected"):
        Tiers(bank).report()
    [found] = Recall(bank, count=1)(["tower"])  # goes on without
    assert (found.encoded, kept(bank)) == (1, set())


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    for made in (Settings(), Settings(SHAPE, 10**9, 2.5)):
        made.save(tmp_path)
        assert Settings.load(tmp_path) == made
        assert json.loads((tmp_path / SETTINGS).read_text())["rent"] == made.rent


def test_a_refused_lazy_write_lets_nothing_fall_and_sets_no_limit(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path, lazy=False)
    with pytest.raises(BankError, match="expected at most 1,000 in all"):
        write(decoder, [Reference("Another text.", "more", 0, 13)], bank, lazy=True, max_bytes=1000)
    assert kept(bank) == set(WORDS)
    assert Settings.load(tmp_path).max_bytes is None


def test_older_versions_of_the_tables_cost_no_memory(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    for n in range(12):  # a version each, kept for an hour
        write(decoder, [Reference(f"Text number {n} of some.", "s", n, n + 1)], bank)
    stale = bank.table_bytes()
    copy = Settings(max_bytes=bank.total_bytes() - stale + stale // 2 + 2 * (2**16 + 64 * 12))
    assert limit(bank, copy) == 0
    assert bank.table_bytes() < stale // 4
    assert len(bank.places()) == 12


def test_a_lazy_write_lets_no_more_fall_than_it_needs(tmp_path: Path) -> None:
    bank = limited(tmp_path, 3)
    decoder = bank.decoder
    assert decoder is not None
    for word in WORDS[:3]:
        Recall(bank, count=1)([word])
    assert len(kept(bank)) == 3
    budget = bank.total_bytes() + bank.table_bytes() + 300  # not enough for the text below
    write(decoder, [Reference("ox " * 60, "more", 0, 180)], bank, lazy=True, max_bytes=budget)
    assert len(kept(bank)) == 2


def test_a_text_that_another_process_kept_meanwhile_displaces_nothing(tmp_path: Path) -> None:
    bank = limited(tmp_path, 2)
    recall = Recall(bank, count=1, cache_bytes=0)
    recall(["rain"])
    other = Bank(tmp_path, bank.decoder)
    [loaded] = other.load([references()[0].id])
    assert loaded.record is not None
    recall(["tower"])
    assert kept(bank) == {"rain", "tower"}
    assert Tiers(other).settle({references()[0].id: loaded.record}) == 0
    assert kept(bank) == {"rain", "tower"}


def test_memories_that_saw_their_surroundings_are_not_counted_as_room(tmp_path: Path) -> None:
    bank = limited(tmp_path, 2)
    decoder = bank.decoder
    assert decoder is not None
    Settings().save(tmp_path)
    bound = [Reference(f"Part {n} of it.", "story", 10 * n, 10 * n + 9) for n in range(3)]
    write(decoder, bound, bank, context=True)
    assert len(bank.in_context()) == 2
    Settings(max_bytes=limit_for(bank, 3)).save(tmp_path)
    for word in WORDS:
        Recall(bank, count=1)([word])
        assert bank.total_bytes() <= (Settings.load(tmp_path).max_bytes or 0)
    assert set(bank.in_context()) <= set(bank.places())


def test_the_limit_of_a_bank_holds_for_every_writer(tmp_path: Path) -> None:
    bank = limited(tmp_path, 1)
    decoder, most = bank.decoder, Settings.load(tmp_path).max_bytes or 0
    assert decoder is not None
    more = [Reference(f"Text number {n}.", "more", n, n + 1) for n in range(3)]
    with pytest.raises(BankError, match="expected at most"):
        write(decoder, more, bank)
    assert bank.total_bytes() <= most
    fixed = Recall(bank, references=more, cache_bytes=0)
    assert [len(found.memories) for found in fixed(["one", "two"])] == [3, 3]
    assert bank.total_bytes() <= most
    assert len(bank.places()) <= 1
    write(decoder, [Reference("A lazy text.", "more", 9, 21)], bank, lazy=True)
    assert bank.total_bytes() <= most


def test_a_rebuild_fits_under_the_limit(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path / "bank", lazy=False)
    Settings(SHAPE, limit_for(bank, 4), 1e-9).save(bank.path)
    spec = MemorySpec(layers=tuple(range(16)), heads=((0, 1, 2, 3),) * 16, tokens_per_head=64, reference_length=64)
    other = FakeDecoder(spec, weights="ef" * 32)
    size = bank.record_bytes
    rebuild(tmp_path / "bank", other)
    fresh = Bank(tmp_path / "bank", other)
    there = Settings.load(fresh.path)
    assert fresh.record_bytes > size
    assert fresh.total_bytes() <= (there.max_bytes or 0)
    assert there.rent == 0  # the shape of this decoder is unknown


def test_a_bank_above_its_limit_comes_back_under_it(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path / "bank", lazy=False)
    for n in range(2):  # set once and killed before it was carried out, then set again
        now = Settings(max_bytes=limit_for(bank, 2))
        now.save(bank.path) if n == 0 else limit(bank, now)
    assert len(kept(bank)) <= 2
    with pytest.raises(BankError, match=r"found a limit of 1,000 bytes .* its texts and their index"):
        limit(bank, Settings(max_bytes=1000))
    assert Settings.load(bank.path) == now


def test_a_recall_that_runs_sees_a_limit_that_is_set_later(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    recall = Recall(bank, count=1)
    Settings(max_bytes=1).save(tmp_path)
    recall(["tower"])
    assert kept(bank) == set()


def test_a_lasting_limit_keeps_no_older_versions_of_the_tables(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path)
    Settings(max_bytes=10**9).save(tmp_path)
    write(decoder, [Reference("Another text.", "more", 0, 13)], bank)
    assert len(bank.versions()) == 1
