"""Tiers: what is text alone answers like memory, use and plans move it, and no kill loses any of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import FakeDecoder, count, same
from families import tiny_model, tiny_tokenizer
from tiered import SHAPE, TEXTS, WORDS, banked, broken, kept, references
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
from memory3.tiers import Settings, Tiers
from memory3.uses import DAY_S, expected_uses
from memory3.verifying import traces_of, verify
from memory3.writing import write


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


def test_what_an_adapter_knows_is_not_encoded_again_by_a_write(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path, lazy=False)
    bank.give([references()[0].id], "ab" * 16)
    encoded = len(decoder.encoded)
    report = write(decoder, [*references(), Reference(TEXTS[0], "elsewhere", 0, 9)], bank)
    assert (report.references, len(decoder.encoded)) == (0, encoded)
    assert bank.sources()["elsewhere"] == 1
    assert Tiers(bank).report()["tiers"] == {"text": 0, "memory": 3, "parameters": 1}


@pytest.mark.parametrize("text", ["tower " * 100, ""])
def test_a_text_that_no_recall_could_encode_is_refused_when_it_is_written(tmp_path: Path, text: str) -> None:
    bank, decoder = banked(tmp_path)
    wrong = Reference(text, "notes/long.md", 7, 8)
    with pytest.raises(BankError, match=rf"found a reference at 'notes/long.md':7 with {count(text)} tokens, expected 1 to 32"):
        write(decoder, [Reference("Another text.", "more"), wrong], bank, lazy=True)
    assert (len(bank), bank.sources()) == (4, {"notes": 4})


def test_what_cannot_be_settled_now_is_settled_at_its_next_use_and_not_encoded_again(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path)
    recall = Recall(bank, count=1)
    with Bank(tmp_path, FakeDecoder()).locked():
        for _ in range(3):
            [found] = recall(["tower"])
            assert same(found.memories[0], decoder._memory(TEXTS[0]))
        assert (decoder.encoded, kept(bank)) == (TEXTS[:1], set())
    recall(["salt"])
    assert kept(bank) == {"salt"}
    recall(["tower"])
    assert (decoder.encoded, kept(bank)) == (TEXTS[:2], {"tower", "salt"})


def test_records_that_wait_are_few_and_go_with_what_is_deleted(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    recall = Recall(bank, count=1, cache_bytes=5 * bank.record_bytes)
    with Bank(tmp_path, FakeDecoder()).locked():
        for word in WORDS:
            recall([word])
    assert [id for _, id in recall._waiting] == [r.id for r in references()[2:]]
    bank.delete([references()[2].id])
    recall(["tower"])
    assert [id for _, id in recall._waiting] == [references()[3].id]
    with pytest.raises(SpecError, match="found cache_bytes=-1"):
        Recall(bank, cache_bytes=-1)


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


def test_another_dtype_reads_texts_and_keeps_nothing_of_its_own(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    [found] = Recall(Bank(tmp_path, FakeDecoder(dtype=torch.float32)), count=1)(["tower"])
    assert found.memories[0].keys.dtype == torch.float32
    assert kept(bank) == set()


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


def test_what_could_not_be_kept_is_tried_again(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    recall = Recall(bank, count=1)
    with Bank(tmp_path, FakeDecoder()).exclusive():
        recall(["tower"])
    recall(["tower"])
    assert kept(bank) == {"tower"}


def test_the_history_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, _ = banked(tmp_path, lazy=False)
    bank.uses.count(bank.ids())
    timeouts, connect = [], sqlite3.connect
    with connect(bank.uses.path, isolation_level=None) as other:
        monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: timeouts.append(k["timeout"]) or connect(*a, **k))
        other.execute("begin immediate")
        bank.drop(bank.ids()[:1])
        other.execute("rollback")
    assert timeouts == [0]


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


def test_texts_name_the_state_that_was_searched(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    recall = Recall(bank, count=1)
    [before] = recall.texts(["tower"])
    bank.delete([references()[1].id])
    [after] = recall.texts(["tower"])
    assert before.versions != after.versions == (bank.versions()[-1][1],)
