"""A bank forgets on command, everywhere; readers go on meanwhile; checks find every kind of damage; archives are safe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import lance
import pytest
from fakes import FakeDecoder, same
from test_bank import filled, refs
from typer.testing import CliRunner

from memory3.bank import Bank
from memory3.cli import app
from memory3.guard import replaced_bank
from memory3.rebuilding import rebuild
from memory3.recall import Recall
from memory3.spec import BankError, BankMismatch, Memory, MemorySpec, Reference
from memory3.verifying import traces_of, verify

SECRET = "The zanzibarquux opens at midnight."


def test_a_deleted_text_is_found_nowhere_and_the_search_for_it_does_find_things(tmp_path: Path) -> None:
    """Lance alone leaves a deleted text in older versions and in the index; the same search finds it there."""
    bank, [_, secret, _] = filled(tmp_path / "lance", "one", SECRET, "three")
    bank.refresh()
    traces = traces_of(bank, SECRET)
    assert any("memories.lance/data" in trace and "1 values" in trace for trace in traces)
    assert any("key-values of" in trace for trace in traces)
    table = lance.dataset(str(tmp_path / "lance/index.lance/memories.lance"))
    table.delete(f"id = '{secret.id}'")
    table.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
    assert bank.search("zanzibarquux", 3) == []
    traces = traces_of(bank, SECRET)
    for place in ("memories.lance/data", "terms of 1 deleted rows", "key-values of"):
        assert any(place in trace for trace in traces)

    bank, [one, secret, _] = filled(tmp_path / "ours", "one", SECRET, "three")
    bank.refresh()
    stored = lance.dataset(str(tmp_path / "ours/index.lance/memories.lance"))
    stored.tags.create("kept", stored.version)
    assert bank.delete([secret.id]) == 1
    assert traces_of(bank, SECRET) == traces_of(bank, "zanzibarquux") == []
    assert bank.search("zanzibarquux", 3) == []
    assert bank.search("one", 3)[0].id == one.id
    assert verify(bank).problems == []


def test_a_source_a_memory_or_a_filter_can_be_deleted(tmp_path: Path) -> None:
    bank, [one, two, three, four] = filled(tmp_path, "one", "two", "three", "four")
    bank.add_sources([Reference("two", "other.txt", 0, 3)])
    assert bank.delete_where("text LIKE 't%ee'") == 1
    assert bank.delete_source("notes.txt") == 2
    assert bank.ids() == [two.id]
    assert bank.sources() == {"other.txt": 1}
    assert traces_of(bank, "notes.txt") == []
    assert traces_of(bank, "other.txt")
    for condition in ("nothing =", "text = 'two' LIMIT 1", "text = 'no'; text = 'two'", "text = 'two' ORDER BY id"):
        with pytest.raises(BankError, match="expected SQL on the columns id, text"):
            bank.delete_where(condition)
    assert bank.delete_where("text = 'no') or (text = 'nor'") == 0
    assert len(bank) == 1
    assert [row["id"] for row in bank.where("text = 'two' -- a remark")] == [two.id]
    assert {one.id, three.id, four.id}.isdisjoint(bank.ids())


def test_a_document_goes_with_its_rows_and_pages_and_another_of_a_like_name_stays(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    sources = ["a.jsonl:1", "a.jsonl:22", "a.jsonl", "a.jsonl.txt", "a.jsonl:notes.txt", "b'%_.pdf#page=3", "b'x_.pdf#page=3"]
    references = [Reference(f"text {n}", source) for n, source in enumerate(sources)]
    bank.add(references, decoder.encode([r.text for r in references]))
    assert bank.delete_source("a.jsonl") == 3
    assert bank.delete_source("b'%_.pdf") == 1
    assert sorted(bank.sources()) == ["a.jsonl.txt", "a.jsonl:notes.txt", "b'x_.pdf#page=3"]
    with pytest.raises(BankError, match="has nothing of 'a.jsonl'"):
        bank.delete_source("a.jsonl.txt", "a.jsonl")
    assert len(bank) == 3


def test_a_long_text_is_absent_only_when_none_of_its_references_is_there(tmp_path: Path) -> None:
    """A text that was split is found by its sentences, and by the references that are pieces of it."""
    sentences = [f"Sentence number {n} of the long text says what it says." for n in range(4)]
    bank, references = filled(tmp_path, *sentences)
    assert traces_of(bank, " ".join(sentences))
    bank.delete(r.id for r in references[1:])
    assert traces_of(bank, " ".join(sentences))
    bank.delete([references[0].id])
    assert traces_of(bank, " ".join(sentences)) == []


def test_a_second_deletion_finishes_the_first_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, [one, two, three] = filled(tmp_path, "one", "two", "three")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with bank.exclusive():
        with monkeypatch.context() as patch:
            patch.setattr("memory3.tables.Table.purge", full)
            with pytest.raises(BankError, match="cannot be written .*No space left"):
                bank.delete([one.id])
        bank.delete([two.id])
    assert bank.ids() == [three.id]
    assert traces_of(bank, "one") == traces_of(bank, "two") == []


def test_compacting_gives_space_back_and_readers_go_on(tmp_path: Path) -> None:
    texts = [f"text number {n}" for n in range(20)]
    bank, references = filled(tmp_path, *texts, max_shard_bytes=2000)
    reader = Bank(tmp_path)
    kept = [r.id for r in references[::2]]
    assert all(same(a, b) for a, b in zip(reader.read(kept), FakeDecoder().encode(texts[::2]), strict=True))
    bank.delete(r.id for r in references[1::2])
    assert bank.stats()["shard_bytes"] == 20 * bank.record_bytes
    assert bank.compact() == 10 * bank.record_bytes
    assert bank.stats()["shard_bytes"] == 10 * bank.record_bytes
    assert bank.compact() == 0
    assert all(same(a, b) for a, b in zip(reader.read(kept), FakeDecoder().encode(texts[::2]), strict=True))
    assert verify(reader).problems == []
    bank.delete(kept)
    bank.compact()
    assert bank.stats()["shard_bytes"] == 0
    [again] = refs("again")
    bank.add([again], FakeDecoder().encode(["again"]))  # the number of a shard comes again
    assert same(reader.read([again.id])[0], FakeDecoder().encode(["again"])[0])


def test_a_reader_between_lookup_and_read_gets_the_moved_record_or_is_told_that_it_is_gone(tmp_path: Path) -> None:
    bank, [one, two] = filled(tmp_path, "one", "two")
    reader = Bank(tmp_path)
    old = reader.places()
    bank.delete([one.id])
    bank.compact()
    assert same(reader._read(two.id, old[two.id], "cpu"), FakeDecoder().encode(["two"])[0])
    with pytest.raises(BankError, match=f"has no memory {one.id}"):
        reader._read(one.id, old[one.id], "cpu")


def test_what_is_deleted_leaves_a_running_readers_ram_at_its_next_recall(tmp_path: Path) -> None:
    bank, [tower, _] = filled(tmp_path, "the tower", "the river")
    reader = Recall(Bank(tmp_path, FakeDecoder()))
    assert {h.id for r in reader(["tower river"]) for h in r.hits} == set(bank.ids())
    held = reader.cache.nbytes
    bank.delete([tower.id])
    assert [h.id for h in reader(["tower river"])[0].hits] == bank.ids()
    assert reader.cache.ids(0) == bank.ids()
    assert 0 < reader.cache.nbytes < held


KILLED = """
import os, signal, sys
from fakes import FakeDecoder
from memory3.bank import Bank
from memory3.catalogue import Catalogue
from memory3.journal import Deletion
from memory3.shards import Shards
owner, name = {"Catalogue": Catalogue, "Shards": Shards, "Deletion": Deletion}[sys.argv[2]], sys.argv[3]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, staticmethod(die) if owner is Deletion else die)
bank = Bank(sys.argv[1])
bank.delete_source("notes.txt") if sys.argv[4] == "delete" else bank.compact()
"""


def killed(path: Path, owner: str, name: str, work: str) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", KILLED, str(path), owner, name, work]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("Catalogue", "delete_spans"),
        ("Catalogue", "delete"),
        ("Shards", "erase"),
        ("Catalogue", "purge"),
        ("Deletion", "clear"),
    ],
)
def test_a_deletion_that_was_killed_is_finished_by_the_next_writer(tmp_path: Path, owner: str, name: str) -> None:
    bank, _ = filled(tmp_path, "one", SECRET)
    bank.add([Reference("kept", "other.txt", 0, 4)], FakeDecoder().encode(["kept"]))
    killed(tmp_path, owner, name, "delete")
    after = Bank(tmp_path, FakeDecoder())
    assert any("deletion was interrupted" in problem for problem in verify(after).problems)
    after.refresh()
    assert [spans[0].text for spans in after.references(after.ids()).values()] == ["kept"]
    assert traces_of(after, SECRET) == []
    assert verify(after).problems == []
    assert same(after.read(after.ids())[0], FakeDecoder().encode(["kept"])[0])


@pytest.mark.parametrize(("owner", "name"), [("Catalogue", "move"), ("Shards", "remove"), ("Catalogue", "optimise")])
def test_a_compaction_that_was_killed_loses_nothing(tmp_path: Path, owner: str, name: str) -> None:
    bank, [_, two, three] = filled(tmp_path, "one", "two", "three", max_shard_bytes=1)
    bank.delete([two.id])
    killed(tmp_path, owner, name, "compact")
    after = Bank(tmp_path, FakeDecoder())
    assert len(after) == 2
    assert same(after.read([three.id])[0], FakeDecoder().encode(["three"])[0])
    after.compact()
    assert after.stats()["shard_bytes"] == 2 * after.record_bytes
    assert verify(after).problems == []


def test_every_kind_of_damage_is_a_problem_of_one_sentence(tmp_path: Path) -> None:
    bank, [one, two, three] = filled(tmp_path, "one", "two", "three")
    shard = tmp_path / "shards/00000.kv"
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[bank.record_bytes + 70] ^= 1
    shard.write_bytes(data)
    [problem] = verify(Bank(tmp_path)).problems
    assert f"memory {two.id} is damaged" in problem
    shard.write_bytes(whole[: 2 * bank.record_bytes])
    [problem] = verify(Bank(tmp_path)).problems
    assert "was cut" in problem
    shard.unlink()
    assert len(verify(Bank(tmp_path)).problems) == 3
    shard.write_bytes(whole)
    tables = tmp_path / "index.lance"
    lance.dataset(str(tables / "sources.lance")).delete(f"memory = '{one.id}'")
    lance.dataset(str(tables / "memories.lance")).delete(f"id = '{three.id}'")
    lance.dataset(str(tables / "memories.lance")).update({"text": "'forged'"}, where=f"id = '{two.id}'")
    found = verify(Bank(tmp_path))
    for expected in (
        f"memory {one.id} has no source",
        f"names memory {three.id}, which is not there",
        f"text of memory {two.id}",
    ):
        assert any(expected in problem for problem in found.problems)
    assert found.unused_bytes == bank.record_bytes
    assert all("\n" not in problem for problem in found.problems)


def test_a_bank_is_rebuilt_for_another_model_and_stays_whole_until_then(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    bank, [short, long] = filled(path, "short", "A text of some length that another reference length has no room for at all.")
    bank.add_sources([Reference("short", "other.txt", 7, 12)])
    other = FakeDecoder(MemorySpec((0,), ((0, 1),), 3, 16), weights="99" * 32)

    class Failing(FakeDecoder):
        def encode(self, texts: Sequence[str]) -> list[Memory]:
            if self.batches:
                raise KeyboardInterrupt
            return super().encode(texts)

    with pytest.raises(KeyboardInterrupt):
        rebuild(path, Failing(other.spec, weights="99" * 32), batch_size=1)
    assert same(Bank(path, FakeDecoder()).read([long.id])[0], FakeDecoder().encode([long.text])[0])
    done = rebuild(path, other, batch_size=1)
    assert done.split == 1
    names = {row["old"]: row["new"] for row in map(json.loads, (path / "renamed.jsonl").read_text().splitlines())}
    assert names[short.id] == [short.id]
    assert len(names[long.id]) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank"]
    after = Bank(path, other)
    assert set(after.ids()) == {id for now in names.values() for id in now}
    assert done.report.references == len(after) - 1  # one was encoded before the stop
    pieces = [after.references([id])[id][0] for id in names[long.id]]
    assert all(long.text[p.start - long.start : p.end - long.start] == p.text for p in pieces)
    assert [r.source for r in after.references([short.id])[short.id]] == ["notes.txt", "other.txt"]
    assert same(after.read([short.id])[0], other.encode(["short"])[0])
    assert verify(after).problems == []
    with pytest.raises(BankMismatch, match="memory3 bank rebuild"):
        Bank(path, FakeDecoder())
    for use in (lambda: bank.read([short.id]), lambda: bank.add_sources([short])):  # opened before the rebuild
        with pytest.raises(BankMismatch, match="was rebuilt or replaced since it was opened"):
            use()


def test_what_is_deleted_while_a_rebuild_waits_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, [_, secret] = filled(tmp_path / "bank", "one", SECRET)
    bank.add([Reference("one", "gone.txt", 0, 3)], FakeDecoder().encode(["one"]))
    other = FakeDecoder(weights="99" * 32)
    with monkeypatch.context() as patch:
        patch.setattr("memory3.rebuilding._forget_what_went", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rebuild(tmp_path / "bank", other)
    bank.delete([secret.id])
    bank.delete_source("gone.txt")
    monkeypatch.chdir(tmp_path / "bank")
    rebuild(Path("."), other)
    after = Bank(tmp_path / "bank", other)
    assert len(after) == 1
    assert after.sources() == {"notes.txt": 1}
    assert traces_of(after, SECRET) == []


def test_a_kill_between_the_two_renames_of_a_rebuild_is_noticed(tmp_path: Path) -> None:
    bank, [one] = filled(tmp_path / "bank", "one")
    bank.close()
    old = replaced_bank(tmp_path / "bank")
    (tmp_path / "bank").rename(old)
    with pytest.raises(BankError, match="a rebuild of it was interrupted"):
        Bank(tmp_path / "bank", FakeDecoder(), create=True)
    rebuild(tmp_path / "bank", FakeDecoder())
    assert not old.exists()
    old.mkdir()  # a kill before the old bank was removed
    after = Bank(tmp_path / "bank", FakeDecoder())
    after.refresh()
    assert not old.exists()
    assert same(after.read([one.id])[0], FakeDecoder().encode(["one"])[0])


def test_the_command_line_lists_shows_deletes_checks_compacts_and_moves(tmp_path: Path) -> None:
    bank, [one, two, three] = filled(tmp_path / "bank", "one", SECRET, "three")
    bank.close()
    folder = str(tmp_path / "bank")

    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["bank", *arguments], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done.stdout

    assert two.id in run("list", folder, "--where", "text LIKE '%zanz%'")
    assert [json.loads(line)["id"] for line in run("list", folder, "--json").splitlines()] == sorted([one.id, two.id, three.id])
    with pytest.raises(BankError, match="has nothing of 'nowhere'"):
        run("list", folder, "--source", "nowhere")
    with pytest.raises(BankError, match="found an empty text"):
        run("verify", folder, "--absent", " ")
    assert SECRET in run("show", folder, two.id)
    assert "from notes.txt:" in run("show", folder, two.id)
    assert "still there" in run("verify", folder, "--absent", "zanzibarquux", code=4)
    assert json.loads(run("delete", folder, two.id, "--json")) == {"deleted": 1}
    assert "is nowhere in the bank" in run("verify", folder, "--absent", "zanzibarquux")
    assert json.loads(run("compact", folder, "--json")) == {"freed_bytes": bank.record_bytes}
    run("export", folder, str(tmp_path / "b.tar"))
    assert json.loads(run("import", str(tmp_path / "b.tar"), str(tmp_path / "c"), "--json"))["references"] == 2
    with pytest.raises(BankError, match="found nothing to delete"):
        run("delete", folder)


def test_missing_tables_are_a_bank_error_for_every_question(tmp_path: Path) -> None:
    bank, (one,) = filled(tmp_path, "one")
    shutil.rmtree(tmp_path / "index.lance" / "memories.lance")
    for look in (bank.versions, bank.tags, lambda: bank.version, lambda: bank.references([one.id]), lambda: bank.space):
        with pytest.raises(BankError, match="the tables cannot be read"):
            look()


def test_files_that_a_killed_writer_left_go_with_the_next_refresh(tmp_path: Path) -> None:
    bank, _ = filled(tmp_path, "one", SECRET)
    bank.refresh()
    table = tmp_path / "index.lance" / "memories.lance"
    data, index = next((table / "data").iterdir()), next(p for p in (table / "_indices").iterdir() if p.is_dir())
    stray = [
        table / "data" / "0101010101010101010101010101010101010101010101010101.lance",
        table / "_indices" / str(uuid.uuid4()),
    ]
    shutil.copy(data, stray[0])
    shutil.copytree(index, stray[1])
    bank.refresh()
    assert not stray[0].exists() and not list(stray[1].rglob("*.lance"))
    assert len(bank) == 2 and verify(bank).problems == []


def test_a_source_of_another_memory_is_an_unreadable_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, (one, two) = filled(tmp_path, "one", "two")
    wrong = [{"memory": two.id, "source": "notes.txt", "start": 0, "end": 1}]
    monkeypatch.setattr(bank._catalogue._sources, "rows_with", lambda *arguments: iter(wrong))
    with pytest.raises(BankError, match=f"names memory {two.id}, which was not asked for"):
        bank.references([one.id])
