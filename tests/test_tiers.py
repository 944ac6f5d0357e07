"""Tiers: what is text alone answers like memory, use moves it, and a limit holds at every step."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeDecoder, count, same
from families import tiny_model, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from memory3.archive import export_bank, import_bank
from memory3.bank import Bank
from memory3.codec import codec_named
from memory3.cost import Shape, memory_read_flops, memory_write_flops, text_read_flops
from memory3.decoder import attach
from memory3.generation import complete
from memory3.rebuilding import rebuild
from memory3.recall import Recall
from memory3.spec import BankError, MemorySpec, Reference, SpecError
from memory3.tiers import SETTINGS, Settings, Tiers, limit
from memory3.uses import DAY_S, PATIENCE_S, expected_uses
from memory3.verifying import traces_of, verify
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


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_text_is_encoded_at_its_first_recall_and_reads_like_a_memory(tmp_path: Path, codec: str) -> None:
    made = codec_named(codec, torch.bfloat16)
    lazy, decoder = banked(tmp_path / "lazy", codec=made)
    eager, _ = banked(tmp_path / "eager", lazy=False, codec=made)
    assert (decoder.encoded, lazy.stats()["shard_bytes"], len(lazy)) == ([], 0, 4)
    for bytes_read, encoded in ((0, 1), (lazy.record_bytes, 0)):
        [found] = Recall(lazy, count=1, cache_bytes=0)(["tower"])
        [warm] = Recall(eager, count=1)(["tower"])
        assert found.hits[0].id == warm.hits[0].id
        assert same(found.memories[0], warm.memories[0])
        assert (found.bytes_read, found.encoded, decoder.encoded) == (bytes_read, encoded, TEXTS[:1])
    assert kept(lazy) == {"tower"}


def test_answers_do_not_depend_on_the_tier(tmp_path: Path) -> None:
    with attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=4)) as decoder:
        config = GenerationConfig(do_sample=False, eos_token_id=-1)
        answers = []
        for lazy in (True, False):
            bank = Bank(tmp_path / str(lazy), decoder, create=True)
            write(decoder, references(), bank, lazy=lazy)
            for _ in range(2):
                [one] = complete(decoder, ["The tower and the salt"], recall=Recall(bank), config=config, max_new_tokens=20)
                answers.append(one.ids)
        assert len(set(answers)) == 1


def test_measurements_move_nothing(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    Recall(bank, count=1, counted=False)(["tower"])
    assert kept(bank) == set()


def test_a_recall_beside_another_writer_answers_and_keeps_nothing(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    with Bank(tmp_path, FakeDecoder()).exclusive():
        [found] = Recall(bank, count=1)(["tower"])
        assert found.encoded == 1
    assert kept(bank) == set()


def test_looks_at_an_earlier_state_move_nothing(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    bank.tag("before")
    with Bank(tmp_path, FakeDecoder(), at="before") as earlier:
        [found] = Recall(earlier, count=1)(["tower"])
        assert found.encoded == 1
    assert kept(bank) == set()


def limit_for(bank: Bank, records: int) -> int:
    """Bytes of a folder that has room for so many records and half another."""
    bank.refresh(keep_versions=False)
    moves = 2**16 + 64 * len(bank)
    return int(2 * (bank.table_bytes() + moves) + (records + 0.5) * bank.record_bytes)


def limited(path: Path, records: int) -> Bank:
    """A lazy bank whose records are large beside its tables."""
    decoder = FakeDecoder(
        MemorySpec(layers=tuple(range(16)), heads=((0, 1, 2, 3),) * 16, tokens_per_head=64, reference_length=64)
    )
    bank = Bank(path, decoder, create=True)
    write(decoder, references(), bank, lazy=True)
    Settings(max_bytes=limit_for(bank, records)).save(path)
    return bank


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


@pytest.mark.parametrize("step", ["append", "move"])
def test_a_kill_while_a_text_is_kept_leaves_it_text(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, decoder = banked(tmp_path)
    owner = bank._shards if step == "append" else bank._catalogue
    broken(monkeypatch, owner, step)
    with pytest.raises(KeyboardInterrupt):
        Recall(bank, count=1)(["tower"])
    fresh = Bank(tmp_path, decoder)
    assert kept(fresh) == set()
    assert verify(fresh).problems == []
    fresh.compact()
    assert fresh.stats()["shard_bytes"] == 0


def test_a_kill_while_a_memory_makes_room_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, decoder = banked(tmp_path, lazy=False)
    [tower, salt, *_] = references()
    bank.drop([salt.id])
    [loaded] = bank.load([salt.id])
    assert loaded.record is not None
    broken(monkeypatch, bank._shards, "replace")
    with pytest.raises(KeyboardInterrupt):
        bank.keep({salt.id: loaded.record}, [tower.id])
    fresh = Bank(tmp_path, decoder)
    assert kept(fresh) == {"crows", "rain"}
    assert verify(fresh).problems == []
    assert same(fresh.read([tower.id])[0], decoder.encode([tower.text])[0])


def broken(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    def die(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, die)


def test_the_record_of_one_takes_the_place_of_another_and_a_reader_finds_both(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path, lazy=False)
    [tower, salt, *_] = references()
    bank.drop([salt.id])
    reader = Bank(tmp_path, decoder)
    place = reader.places()[tower.id]
    locate = reader._catalogue.locate
    stale = iter([{tower.id: place}])  # a look just before the writer moved it
    reader._catalogue.locate = lambda ids: next(stale, None) or locate(ids)  # type: ignore[method-assign]
    [loaded] = bank.load([salt.id])
    assert loaded.record is not None
    bank.keep({salt.id: loaded.record}, [tower.id])
    assert bank.places()[salt.id] == place
    assert same(reader.read([tower.id])[0], decoder.encode([tower.text])[0])


def test_dropping_erases_and_compact_gives_the_space_back(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path, lazy=False)
    [tower, *_] = references()
    assert bank.drop([tower.id, tower.id]) == 1
    assert bank.drop([tower.id]) == 0
    assert bytes.fromhex(tower.id) not in (tmp_path / "shards/00000.kv").read_bytes()
    assert bank.compact() == bank.record_bytes
    assert [hit.id for hit in bank.search("tower", 1)] == [tower.id]


def test_memories_that_saw_their_surroundings_stay(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    write(decoder, references(), bank, context=True)
    assert bank.drop(bank.ids()) == 1  # the first of a document saw nothing before it
    assert len(bank.places()) == 3
    with pytest.raises(BankError, match="saw its surroundings"):
        bank.give(bank.in_context(), "ab" * 16)


def test_a_lazy_write_in_context_is_refused(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    with pytest.raises(SpecError, match="cannot be encoded alone"):
        write(decoder, references(), bank, lazy=True, context=True)
    with pytest.raises(BankError, match="saw its surroundings"):
        bank.add_texts([Reference("text", context="ab" * 16)])


def test_writing_again_encodes_what_is_text(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path)
    report = write(decoder, references(), bank)
    assert (report.references, report.skipped, kept(bank)) == (4, 0, set(WORDS))
    assert sorted(decoder.encoded) == sorted(TEXTS)
    assert write(decoder, references(), bank, lazy=True).skipped == 4
    assert kept(bank) == set(WORDS)
    assert verify(bank).problems == []


def test_add_to_a_text_stores_its_memory_once(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path)
    [tower, *_] = references()
    assert bank.add([tower], decoder.encode([tower.text])) == 1
    assert bank.add([tower], decoder.encode([tower.text])) == 0
    assert bank.stats()["shard_bytes"] == bank.record_bytes
    assert len(bank) == 4


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


def test_texts_are_deleted_verified_and_travel_like_memories(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path / "bank", max_bytes=10**9)
    Recall(bank, count=1)(["tower"])
    [tower, salt, crows, _] = references()
    assert bank.delete([salt.id, tower.id]) == 2
    assert verify(Bank(tmp_path / "bank")).problems == []
    export_bank(bank, tmp_path / "bank.tar")
    with import_bank(tmp_path / "bank.tar", tmp_path / "copy") as copy:
        assert copy.texts_among(copy.ids()) == copy.ids() == sorted(r.id for r in (crows, references()[3]))
        assert Settings.load(copy.path).max_bytes == 10**9
        with pytest.raises(BankError, match="opened without a model and keeps 1 references as text"):
            copy.read([crows.id])
    assert same(bank.read([crows.id])[0], decoder.encode([crows.text])[0])


def test_a_rebuild_keeps_the_tiers(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path / "bank", max_bytes=10**9)
    Recall(bank, count=1)(["tower"])
    other = FakeDecoder(weights="ef" * 32)
    rebuild(tmp_path / "bank", other)
    fresh = Bank(tmp_path / "bank", other)
    assert (kept(fresh), len(fresh), other.encoded) == ({"tower"}, 4, TEXTS[:1])
    assert Settings.load(fresh.path).max_bytes == 10**9


def test_who_has_the_adapter_reads_nothing_and_who_has_not_reads_the_text(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path, lazy=False)
    [tower, salt, *_] = references()
    bank.give([tower.id, salt.id], "ab" * 16)
    knowing = FakeDecoder()
    knowing.adapters = ["12" * 16, "ab" * 16]
    [found] = Recall(Bank(tmp_path, knowing), count=1)(["tower"])
    assert (found.hits, found.memories, found.known, knowing.encoded) == ((), (), (tower.id,), [])
    [read] = Recall(bank, count=1)(["tower"])
    assert (read.known, read.encoded) == ((), 1)
    assert same(read.memories[0], decoder.encode([tower.text])[0])
    write(decoder, [Reference("Another text.", "more", 0, 13)], bank)  # rows without the column
    assert Tiers(bank).report()["tiers"] == {"text": 0, "memory": 3, "parameters": 2}
    assert bank.uses.history().uses[tower.id].known == 1
    assert verify(bank).problems == []
    with pytest.raises(BankError, match="has no memory"):
        bank.give(["ef" * 16], "ab" * 16)


def test_the_report_counts_what_was_paid_and_what_texts_would_have_cost(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path)
    Settings(shape=SHAPE).save(tmp_path)
    recall = Recall(bank, count=1, cache_bytes=0)
    for word in ("tower", "tower", "salt"):
        recall([word])
    write(decoder, references()[2:3], bank)  # crows: encoded and never recalled
    Settings(shape=SHAPE).save(tmp_path)
    [tower, salt, crows, _] = references()
    spec = decoder.spec.resolved(3, 2)

    def sized(formula: Callable[[Shape, MemorySpec], float], reference: Reference) -> float:
        return formula(SHAPE, replace(spec, reference_length=count(reference.text)))

    paid = sum(sized(memory_write_flops, r) for r in (tower, salt, crows)) + 3 * memory_read_flops(SHAPE, spec)
    report = Tiers(bank).report()
    assert report["flops_paid"] == pytest.approx(paid)
    assert report["flops_as_text"] == pytest.approx(2 * sized(text_read_flops, tower) + sized(text_read_flops, salt))
    assert (report["recalls"], report["tiers"]) == (3, {"text": 1, "memory": 3, "parameters": 0})
    bank.drop([tower.id, crows.id])  # what was paid stays paid
    assert Tiers(bank).report()["flops_paid"] == pytest.approx(paid)


def test_a_bank_of_an_unknown_shape_reports_no_costs(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    assert {Tiers(bank).report()[name] for name in ("flops_paid", "flops_as_text")} == {None}


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


def test_another_dtype_reads_texts_and_keeps_nothing_of_its_own(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    [found] = Recall(Bank(tmp_path, FakeDecoder(dtype=torch.float32)), count=1)(["tower"])
    assert found.memories[0].keys.dtype == torch.float32
    assert kept(bank) == set()


# ---- what a review found ----


@pytest.mark.parametrize("step", ["rent", "drop", "keep"])
def test_what_fell_or_was_half_moved_is_gone_when_it_is_deleted(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, decoder = banked(tmp_path, lazy=step == "keep")
    [tower, *_] = references()
    if step == "rent":  # more fall than come, so no new record takes the place of the old one
        bank.keep({}, [tower.id])
    else:
        owner, name = (bank._shards, "erase") if step == "drop" else (bank._catalogue, "move")
        moves = {"drop": lambda: bank.drop([tower.id]), "keep": lambda: Recall(bank, count=1)(["tower"])}
        with monkeypatch.context() as patch:
            broken(patch, owner, name)
            with pytest.raises(KeyboardInterrupt):
                moves[step]()
    fresh = Bank(tmp_path, decoder)
    assert kept(fresh) == set(WORDS[1:] if step != "keep" else [])
    fresh.delete([tower.id])
    assert traces_of(fresh, tower.text) == []


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


def test_what_could_not_be_kept_is_tried_again(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    recall = Recall(bank, count=1)
    with Bank(tmp_path, FakeDecoder()).exclusive():
        recall(["tower"])
    recall(["tower"])
    assert kept(bank) == {"tower"}


def test_the_history_is_not_waited_for(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path, lazy=False)
    bank.uses.count(bank.ids())
    with sqlite3.connect(bank.uses.path, isolation_level=None) as other:
        other.execute("begin immediate")
        began = time.monotonic()
        bank.drop(bank.ids()[:1])
        waited = time.monotonic() - began
        other.execute("rollback")
    assert waited < PATIENCE_S / 2


def test_text_in_the_prompt_encodes_nothing(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path)
    [found] = Recall(bank, count=1).texts(["tower"])
    assert (found.references[0].text, found.memories, decoder.encoded) == (TEXTS[0], (), [])
    assert bank.uses.history().uses[references()[0].id].recalls == 1


def test_written_again_what_is_in_parameters_stays_there(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path, lazy=False)
    [tower, *_] = references()
    bank.give([tower.id], "ab" * 16)
    write(decoder, references(), bank)
    bank.add([tower], decoder.encode([tower.text]))
    Recall(bank, count=1)(["tower"])
    assert kept(bank) == set(WORDS[1:])
    bank.give([tower.id], None)
    assert Tiers(bank).report()["tiers"] == {"text": 1, "memory": 3, "parameters": 0}


def test_a_history_of_nothing_but_encodings_is_empty(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path, lazy=False)
    [tower, salt, *_] = references()
    Recall(bank, count=1)(["tower"])
    bank.delete([tower.id])
    bank.drop([salt.id])
    with pytest.raises(BankError, match="found no recalls"):
        expected_uses(bank.uses.history(), {salt.id: bank.uses.history().now - DAY_S}, 1.0)


def test_encodings_are_counted_wherever_they_happen(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path / "bank")
    [tower, salt, *_] = references()
    write(decoder, [tower], bank)
    assert bank.uses.history().uses[tower.id].encoded == 1
    Recall(bank, count=1)(["salt"])
    bank.drop([salt.id])
    rebuild(tmp_path / "bank", FakeDecoder(weights="ef" * 32))
    there = Bank(tmp_path / "bank").uses.history().uses
    assert (there[tower.id].encoded, there[salt.id].encoded) == (1, 1)


def test_a_row_that_points_nowhere_is_found(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    bank._catalogue.move({references()[0].id: (-7, 0)})
    assert "1 rows point at shards such as -7" in " ".join(verify(bank).problems)


def test_repeated_ids_have_storage_of_their_own(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path, lazy=False)
    [tower, *_] = references()
    one, two = bank.read([tower.id, tower.id])
    one.keys.zero_()
    assert two.keys.abs().sum() > 0
