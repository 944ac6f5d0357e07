"""A bank gives back what it was given, refuses what does not fit, forgets what is deleted, and survives kills."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes import FakeDecoder, same
from hypothesis import given, settings
from hypothesis import strategies as st

from memory3 import shards, tables
from memory3.bank import Bank
from memory3.codec import RawCodec
from memory3.manifest import FORMAT_VERSION
from memory3.spec import BankError, BankMismatch, MemorySpec, Reference


def refs(*texts: str, source: str = "notes.txt") -> list[Reference]:
    return [Reference(text, source, 10 * i, 10 * i + len(text)) for i, text in enumerate(texts)]


def filled(path: Path, *texts: str, **options: object) -> tuple[Bank, list[Reference]]:
    decoder, references = FakeDecoder(), refs(*texts)
    bank = Bank(path, decoder, create=True, **options)  # type: ignore[arg-type]
    bank.add(references, decoder.encode(texts))
    return bank, references


def test_spans_of_many_files_are_those_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [
        "a.jsonl:3",
        "a.jsonl:30",
        "a.jsonl",
        "b'%_.pdf#page=2",
        "c.epub#text/ch:1.xhtml",
        "a.jsonl.txt",
        "d#1.txt",
        "d#1",
    ]
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    references = [Reference(f"text {n}", source, n, n + 6) for n, source in enumerate(sources)]
    bank.add(references, decoder.encode([r.text for r in references]))

    def found(*files: str) -> list[str]:
        return sorted(source for _, source, _, _ in bank.spans_of(files))

    wanted = {
        "a.jsonl": sources[:3],
        "b'%_.pdf": sources[3:4],
        "c.epub": sources[4:5],
        "d#1": sources[7:],
        "d": [],
        "e": [],
        "a": [],
    }
    for most in (128, 1):
        monkeypatch.setattr(tables, "_FILES_BY_QUERY", most)
        assert {file: found(file) for file in wanted} == {file: sorted(names) for file, names in wanted.items()}
        assert found(*wanted) == sorted(name for names in wanted.values() for name in names)
    assert bank.spans_of([]) == []


def test_a_bank_of_many_shards_holds_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    texts = [f"text {n}" for n in range(5)]
    bank, references = filled(tmp_path, *texts, max_shard_bytes=1)
    assert len({shard for shard, _ in bank.places().values()}) == 5
    before = len(os.listdir("/proc/self/fd"))
    for reference in (*references, *references):
        [memory] = bank.read([reference.id])
        assert same(memory, FakeDecoder().encode([reference.text])[0])
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_what_is_no_id_is_not_in_a_bank(tmp_path: Path) -> None:
    bank, [one] = filled(tmp_path, "one")
    assert one.id in bank
    assert "hello" not in bank and 3 not in bank


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), min_size=1, max_size=12),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(1, 3000),
)
def test_what_is_added_is_read_back_bit_for_bit_after_reopening(texts: list[str], dtype: torch.dtype, shard_bytes: int) -> None:
    decoder = FakeDecoder(dtype=dtype)
    references = refs(*texts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a bank 🗼")
        Bank(path, decoder, create=True, max_shard_bytes=shard_bytes).add(references, decoder.encode(texts))
        with Bank(path, decoder) as bank:
            ids = [r.id for r in references]
            assert all(same(a, b) for a, b in zip(bank.read(ids), decoder.encode(texts), strict=True))
            assert {r for spans in bank.references(ids).values() for r in spans} == set(references)
            assert len(bank) == len(bank.ids()) == len(set(ids))
            assert bank.stats()["shard_bytes"] == len(bank) * bank.record_bytes
            assert bank.missing([*ids, "0" * 32]) == ["0" * 32]
            sizes = [file.stat().st_size for file in (path / "shards").iterdir()]
            assert max(sizes) <= max(shard_bytes, bank.record_bytes)


def test_equal_content_is_stored_once_with_all_its_places(tmp_path: Path) -> None:
    bank, [first] = filled(tmp_path, "one")
    elsewhere = Reference("one", "it's/other.txt", 4, 7)
    assert bank.add([elsewhere, first], bank.decoder.encode(["one", "one"])) == 0  # type: ignore[union-attr]
    assert bank.add_sources([elsewhere]) == 0
    assert bank.references([first.id]) == {first.id: [elsewhere, first]}
    assert bank.sources() == {"it's/other.txt": 1, "notes.txt": 1}
    assert bank.stats()["shard_bytes"] == bank.record_bytes


def test_one_batch_may_hold_a_text_twice(tmp_path: Path) -> None:
    bank, references = filled(tmp_path, "one", "two", "one")
    assert (len(bank), bank.sources()) == (2, {"notes.txt": 3})
    assert [r.start for r in bank.references([references[0].id])[references[0].id]] == [0, 20]


def test_a_memory_goes_with_the_last_of_its_sources(tmp_path: Path) -> None:
    bank, [one, two] = filled(tmp_path, "one", "two")
    bank.add_sources([Reference("one", "it's/other.txt", 4, 7)])
    assert bank.delete_source("notes.txt") == 1
    assert (one.id in bank, two.id in bank) == (True, False)
    assert bank.delete_source("it's/other.txt") == 1
    with pytest.raises(BankError, match="has nothing of 'never there'"):
        bank.delete_source("never there")
    assert (len(bank), bank.sources()) == (0, {})


def test_a_deleted_record_is_zeroed_at_once_and_the_others_stay(tmp_path: Path) -> None:
    bank, [one, two, three] = filled(tmp_path, "one", "two", "three")
    size = bank.record_bytes
    assert bank.delete([two.id]) == 1
    data = (tmp_path / "shards/00000.kv").read_bytes()
    assert [any(data[i * size : (i + 1) * size]) for i in range(3)] == [True, False, True]
    assert same(bank.read([three.id])[0], FakeDecoder().encode(["three"])[0])
    assert bank.search("two", 5) == []
    with pytest.raises(BankError, match=f"has no memory {two.id}"):
        bank.read([one.id, two.id])


def test_a_deleted_text_can_be_written_again(tmp_path: Path) -> None:
    bank, [one, _] = filled(tmp_path, "one", "two")
    bank.delete([one.id])
    assert bank.add([one], FakeDecoder().encode(["one"])) == 1
    assert same(bank.read([one.id])[0], FakeDecoder().encode(["one"])[0])


def test_changing_a_read_memory_changes_neither_disk_nor_the_next_read(tmp_path: Path) -> None:
    bank, [one] = filled(tmp_path, "one")
    before = (tmp_path / "shards/00000.kv").read_bytes()
    for tensor in (memory := bank.read([one.id])[0]).keys, memory.values, memory.positions:
        tensor.zero_()
    assert (tmp_path / "shards/00000.kv").read_bytes() == before
    assert same(bank.read([one.id])[0], FakeDecoder().encode(["one"])[0])


@pytest.mark.parametrize("call", ["references", "read", "delete"])
def test_unknown_and_ill_formed_ids_are_refused(tmp_path: Path, call: str) -> None:
    bank, _ = filled(tmp_path, "one")
    with pytest.raises(BankError, match=f"has no memory {'0' * 32} and 1 more"):
        getattr(bank, call)(["0" * 32, "1" * 32])
    for id in ("../x", "' OR '1'='1", "F" * 32, ""):
        with pytest.raises(BankError, match="expected 32 hexadecimal digits"):
            getattr(bank, call)([id])
    assert len(bank) == 1


def test_a_missing_bank_is_not_made_by_looking(tmp_path: Path) -> None:
    for decoder in (None, FakeDecoder()):
        with pytest.raises(BankError, match="no bank at .*; write one: memory3 write"):
            Bank(tmp_path / "none", decoder)
    assert not (tmp_path / "none").exists()


def test_a_foreign_folder_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(BankError, match=r"is no bank, it holds 'thesis.doc'"):
        Bank(tmp_path, FakeDecoder(), create=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.doc"]


def test_an_unfinished_creation_is_finished(tmp_path: Path) -> None:
    bank, _ = filled(tmp_path, "one")
    (tmp_path / "manifest.json").rename(tmp_path / "manifest.json.new")
    Bank(tmp_path, FakeDecoder(), create=True)
    assert len(bank) == 1


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            FakeDecoder(weights="ef" * 32, model="big"),
            r"written by fake \(weights abababab…\), this model is big \(weights efefefef…\)",
        ),
        (
            FakeDecoder(MemorySpec((0, 1), ((0, 1), (1,)), 4, 32), weights="ef" * 32),
            r"spec layers \[0, 2\], this model has \[0, 1\]",
        ),
        (FakeDecoder(tokenizer="01" * 32), r"\(tokenizer cdcdcdcd…\).*\(tokenizer 01010101…\)"),
        (FakeDecoder(rotation={"0": [1.0, 0.2]}), r'rotation \{"0": \[1.0, 0.1\]\}, this model has \{"0": \[1.0, 0.2\]\}'),
        (FakeDecoder(MemorySpec((0, 2), ((0, 1), (1,)), 5, 32)), "spec tokens_per_head 4, this model has 5"),
        (FakeDecoder(MemorySpec((0, 1), ((0, 1), (1,)), 4, 32)), r"spec layers \[0, 2\], this model has \[0, 1\]"),
        (FakeDecoder(MemorySpec((0, 2), ((0, 1), (1,)), 4, 32, selection="random")), 'this model has "random"'),
    ],
)
def test_a_bank_of_another_model_or_spec_is_refused_with_the_reason(tmp_path: Path, other: FakeDecoder, reason: str) -> None:
    filled(tmp_path, "one")
    with pytest.raises(BankMismatch, match=f"{reason}.*memory3 bank rebuild"):
        Bank(tmp_path, other)


def test_what_only_reading_decides_is_no_mismatch(tmp_path: Path) -> None:
    _, [one] = filled(tmp_path, "one")
    spec = MemorySpec((0, 2), ((0, 1), (1,)), 4, 32, chunk_length=7, references_per_chunk=2)
    other = FakeDecoder(spec, model="renamed", rotation={"0": [1.0, 0.1 + 1e-9]}, dtype=torch.float32)
    [memory] = Bank(tmp_path, other).read([one.id])
    assert memory.keys.dtype == torch.float32
    assert torch.equal(memory.keys, FakeDecoder().encode(["one"])[0].keys.float())
    with pytest.raises(BankError, match="float32 keys"):
        Bank(tmp_path, other).add(refs("two"), other.encode(["two"]))


def test_another_codec_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, "one")
    with pytest.raises(BankMismatch, match="has codec raw .*bfloat16.*, expected raw .*float32"):
        Bank(tmp_path, FakeDecoder(), codec=RawCodec("float32"))


def test_without_a_model_a_bank_can_be_looked_at_and_forget_but_learns_nothing(tmp_path: Path) -> None:
    _, [one] = filled(tmp_path, "one")
    bank = Bank(tmp_path)
    assert bank.search("one", 1)[0].id == one.id
    assert same(bank.read([one.id])[0], FakeDecoder().encode(["one"])[0])
    stats = bank.stats()
    assert (stats["references"], stats["sources"], stats["text_bytes"], stats["tokens_per_head"]) == (1, 1, 3, 4)
    assert json.loads(json.dumps(stats)) == stats
    assert stats["bytes"] == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    for write in (lambda: bank.add([one], FakeDecoder().encode(["one"])), lambda: bank.add_sources([one])):
        with pytest.raises(BankError, match="opened without a model"):
            write()
    assert bank.delete([one.id]) == 1  # forgetting needs no model


def edited(**changes: object) -> Callable[[dict[str, object]], str]:
    return lambda fields: json.dumps(fields | changes)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda fields: "{", "cannot be read"),
        (lambda fields: "[]", "format_version None"),
        (edited(format_version=FORMAT_VERSION + 1), f"format_version {FORMAT_VERSION + 1}, expected {FORMAT_VERSION}"),
        (edited(codec={"name": "pickle", "parameters": {}}), "found codec 'pickle'"),
        (edited(codec=3), "ill-formed"),
        (edited(record_bytes=64), "ill-formed .*64 bytes"),
        (edited(records_per_shard=0), "ill-formed"),
        (edited(identity={}), "ill-formed"),
        (edited(shape={"pairs": 10**9}), "ill-formed"),
    ],
)
def test_an_ill_formed_manifest_is_refused(tmp_path: Path, edit: Callable[[dict[str, object]], str], reason: str) -> None:
    filled(tmp_path, "one")
    path = tmp_path / "manifest.json"
    path.write_text(edit(json.loads(path.read_text())))
    with pytest.raises(BankError, match=reason):
        Bank(tmp_path, FakeDecoder())


def test_damage_is_named_and_the_rest_is_still_served(tmp_path: Path) -> None:
    bank, [one, two] = filled(tmp_path, "one", "two")
    shard = tmp_path / "shards/00000.kv"
    data = bytearray(shard.read_bytes())
    data[bank.record_bytes + 100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BankError, match=r"record 1 of .*00000.kv of memory .* is damaged"):
        Bank(tmp_path).read([two.id])
    os.truncate(shard, bank.record_bytes)
    with pytest.raises(BankError, match="it was cut"):
        bank.read([two.id])
    assert same(bank.read([one.id])[0], FakeDecoder().encode(["one"])[0])
    shard.unlink()
    with pytest.raises(BankError, match="cannot be read"):
        bank.read([one.id])
    assert bank.delete([one.id, two.id]) == 2


def test_a_bank_without_its_tables_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, "one")
    (tmp_path / "index.lance").rename(tmp_path / "elsewhere")
    with pytest.raises(BankError, match="index.lance cannot be opened"):
        Bank(tmp_path)


def test_a_second_writer_is_refused_and_the_lock_goes_with_the_block(tmp_path: Path) -> None:
    bank, references = filled(tmp_path, "one")
    other = Bank(tmp_path, FakeDecoder())
    with bank.exclusive(), bank.exclusive():
        bank.refresh()
        with pytest.raises(BankError, match="is being written by another process"):
            other.add_sources(references)
        assert len(other) == 1
    assert other.add_sources(references) == 0


def test_a_reader_sees_what_another_writer_commits(tmp_path: Path) -> None:
    bank, _ = filled(tmp_path, "one")
    reader = Bank(tmp_path)
    assert len(reader) == 1
    [two] = refs("two")
    bank.add([two], FakeDecoder().encode(["two"]))
    assert same(reader.read([two.id])[0], FakeDecoder().encode(["two"])[0])
    assert reader.search("two", 3)[0].id == two.id


def test_a_batch_that_does_not_fit_leaves_the_bank_as_it_was(tmp_path: Path) -> None:
    bank, _ = filled(tmp_path, "one")
    good, bad = FakeDecoder().encode(["two"])[0], FakeDecoder(dtype=torch.float32).encode(["three"])[0]
    with pytest.raises(BankError, match="float32 keys"):
        bank.add(refs("two", "three"), [good, bad])
    with pytest.raises(BankError, match="1 memories for 2 references"):
        bank.add(refs("two", "three"), [good])
    with pytest.raises(BankError, match="lone surrogate"):
        bank.add(refs("\ud800"), [good])
    assert (len(bank), bank.stats()["shard_bytes"], bank.sources()) == (1, bank.record_bytes, {"notes.txt": 1})


def test_a_full_disk_is_one_sentence_and_leaves_the_bank_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, _ = filled(tmp_path, "one", max_shard_bytes=1)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BankError, match=r"could not take 5 records \(No space left on device\)"):
        bank.add(refs(*"abcde"), FakeDecoder().encode("abcde"))
    monkeypatch.undo()
    assert (len(bank), bank.stats()["shard_bytes"]) == (1, bank.record_bytes)
    assert bank.add(refs(*"abcde"), FakeDecoder().encode("abcde")) == 5


KILLED = """
import os, signal, sys
from fakes import FakeDecoder
from memory3.bank import Bank
from memory3.catalogue import Catalogue
from memory3.spec import Reference
decoder = FakeDecoder()
bank = Bank(sys.argv[1], decoder)
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
setattr(Catalogue, sys.argv[2], die)
bank.add([Reference("two", "notes.txt", 0, 3)], decoder.encode(["two"]))
"""


@pytest.mark.parametrize("before", ["add_memories", "add_spans"])
def test_a_kill_leaves_no_row_that_points_at_nothing_and_writing_again_mends(tmp_path: Path, before: str) -> None:
    filled(tmp_path, "one")
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, before], env=os.environ | {"PYTHONPATH": paths}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    bank = Bank(tmp_path, FakeDecoder())
    bank.read(bank.ids())
    assert {spans[0].text for spans in bank.references(bank.ids()).values()} <= {"one", "two"}
    [two] = refs("two")
    bank.add([two], FakeDecoder().encode(["two"]))
    assert bank.references([two.id]) == {two.id: [two]}
    assert same(bank.read([two.id])[0], FakeDecoder().encode(["two"])[0])


def test_a_place_that_was_seen_with_the_text_is_looked_up_again_when_it_moved(tmp_path: Path) -> None:
    bank, [one, two] = filled(tmp_path, "one", "two")
    reader = Bank(tmp_path, FakeDecoder())
    assert list(reader.references([two.id])) == [two.id]
    bank.delete([one.id])
    bank.compact()
    assert same(reader.read([two.id])[0], FakeDecoder().encode(["two"])[0])
    assert list(reader.references([two.id])) == [two.id]
    bank.delete([two.id])
    with pytest.raises(BankError, match="has no memory"):
        reader.read([two.id])


def test_what_was_seen_with_its_text_takes_no_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, [one, two] = filled(tmp_path, "one", "two")
    bank.references([one.id, two.id])
    asked: list[str] = []
    rows_with = bank._catalogue._newest.rows_with
    monkeypatch.setattr(bank._catalogue._newest, "rows_with", lambda *words: asked.append(words[0]) or rows_with(*words))
    bank.read([two.id])
    assert asked == []
    assert reader_of(bank).read([one.id])
    bank.references([one.id])
    bank.read([two.id])
    assert asked == ["id", "id"]


def reader_of(bank: Bank) -> Bank:
    return Bank(bank.path, FakeDecoder())
