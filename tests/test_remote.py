"""A bank on object storage is read where it lies; a pushed bank comes back the same, and forgets with its original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from fakes import CORPUS, FakeDecoder, FakeEmbedder, same
from huggingface_hub import CommitOperationDelete
from object_store import bucket
from obstore.store import from_url
from test_bank import filled
from typer.testing import CliRunner

from memory3.archive import LISTING, is_ours
from memory3.bank import Bank
from memory3.cli import app
from memory3.recall import Recall
from memory3.remote import RecordCache, RemoteBank, open_bank
from memory3.sharing import card, pull, push
from memory3.spec import BankError, BankMismatch, Reference
from memory3.verifying import verify


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MEMORY3_CACHE", str(tmp_path / "cache"))
    with bucket() as found:
        yield found


def pushed(path: Path, address: str, **options: Any) -> tuple[Bank, list[Reference]]:
    bank, references = filled(path, *CORPUS, **options)
    bank.refresh()
    push(bank, address)
    return bank, references


def test_a_remote_bank_reads_as_the_local_one_does(tmp_path: Path, address: str) -> None:
    embedder = FakeEmbedder()
    bank, references = pushed(tmp_path / "bank", address, embedder=embedder)
    far = RemoteBank(address, FakeDecoder(), embedder=embedder)
    ids = [r.id for r in references]
    assert far.ids() == bank.ids() and far.sources() == bank.sources() and len(far) == len(bank)
    assert far.references(ids) == bank.references(ids)
    assert all(same(a, b) for a, b in zip(far.read(ids), bank.read(ids), strict=True))
    for retriever in ("lexical", "dense", "hybrid"):
        near = Recall(bank, retriever=retriever)([CORPUS[1]])[0]
        assert Recall(far, retriever=retriever)([CORPUS[1]])[0].hits == near.hits != ()
    local, remote = bank.stats(), far.stats()
    assert remote["path"] == address and remote["shard_bytes"] == local["shard_bytes"]
    assert {k: v for k, v in remote.items() if k not in ("path", "bytes")} == {
        k: v for k, v in local.items() if k not in ("path", "bytes")
    }


def test_only_the_wanted_records_are_fetched_and_each_once(tmp_path: Path, address: str) -> None:
    bank, references = pushed(tmp_path / "bank", address)
    far = RemoteBank(address, FakeDecoder())
    far.read([references[0].id])
    assert far.records.bytes_fetched == bank.record_bytes
    far.read([r.id for r in references])
    assert far.records.bytes_fetched == len(references) * bank.record_bytes
    again = RemoteBank(address, FakeDecoder())  # another process finds them on the disk
    again.read([r.id for r in references])
    assert again.records.bytes_fetched == 0


def test_the_cache_keeps_its_bound_and_lets_the_oldest_go(tmp_path: Path, address: str) -> None:
    bank, references = pushed(tmp_path / "bank", address)
    size = bank.record_bytes
    far = RemoteBank(address, FakeDecoder(), cache_folder=tmp_path / "small", cache_bytes=2 * size)
    for reference in references * 2:
        assert same(far.read([reference.id])[0], bank.read([reference.id])[0])
        assert sum(f.stat().st_size for f in (tmp_path / "small").iterdir()) <= 2 * size
    assert far.records.bytes_fetched > len(references) * size  # not all of them could be held
    cache = RecordCache(tmp_path / "lru", 3)
    for key in "abc":
        cache.put(key, b"x")
    assert cache.get("a") == b"x"
    cache.put("d", b"x")
    assert cache.get("b") is None and cache.get("a") == b"x" and cache.get("d") == b"x"
    cache.put("huge", b"xxxx")
    assert cache.get("huge") is None


def test_a_damaged_cache_is_read_past(tmp_path: Path, address: str) -> None:
    bank, references = pushed(tmp_path / "bank", address)
    far = RemoteBank(address, FakeDecoder(), cache_folder=tmp_path / "cached")
    far.read([references[0].id])
    [file] = (tmp_path / "cached").iterdir()
    file.write_bytes(b"\x01" + file.read_bytes()[1:-9] + b"damage!!!")
    assert same(far.read([references[0].id])[0], bank.read([references[0].id])[0])


def test_an_open_remote_bank_follows_a_push_and_what_was_deleted_is_gone_there(tmp_path: Path, address: str) -> None:
    bank, references = pushed(tmp_path / "bank", address)
    far = RemoteBank(address, FakeDecoder())
    recall = Recall(far)
    assert recall([CORPUS[0]])[0].hits[0].id == references[0].id
    bank.delete([references[0].id])
    bank.compact()  # records move to another shard
    assert push(bank, address) > 0
    assert references[0].id not in far and len(far) == len(references) - 1
    assert same(far.read([references[1].id])[0], bank.read([references[1].id])[0])
    assert references[0].id not in {hit.id for hit in recall([CORPUS[0]])[0].hits}
    there = {str(o["path"]) for some in obstore.list(from_url(address)) for o in some}
    assert {name for name in there if name != LISTING} == {
        p.relative_to(bank.path).as_posix() for p in bank.path.rglob("*") if p.is_file() and p.name != "write.lock"
    }
    copy = pull(address, tmp_path / "copy")
    assert verify(copy).problems == [] and copy.ids() == bank.ids()


def test_a_second_push_sends_only_what_changed(tmp_path: Path, address: str) -> None:
    bank, _ = pushed(tmp_path / "bank", address)
    assert push(bank, address) == 0
    assert bank.decoder is not None
    bank.add([Reference("more")], bank.decoder.encode(["more"]))
    assert 0 < push(bank, address) < bank.total_bytes()


def test_a_pulled_bank_is_the_bank(tmp_path: Path, address: str) -> None:
    bank, references = pushed(tmp_path / "bank", address)
    copy = pull(address, tmp_path / "new" / "copy with 🦊") if (tmp_path / "new").mkdir() is None else None
    assert copy is not None and verify(copy).problems == []
    assert all(same(copy.read([r.id])[0], bank.read([r.id])[0]) for r in references)
    with pytest.raises(BankError, match="exists, expected a new folder"):
        pull(address, tmp_path / "bank")


def test_damage_and_foreign_names_far_away_are_refused_and_leave_nothing(tmp_path: Path, address: str) -> None:
    pushed(tmp_path / "bank", address)
    store = from_url(address)
    whole = bytes(obstore.get(store, "shards/00000.kv").bytes())
    for damaged in (whole[:-1], whole + b"x", whole[:-1] + b"\x00"):
        obstore.put(store, "shards/00000.kv", damaged)
        with pytest.raises(BankError, match="missing or damaged"):
            pull(address, tmp_path / "copy")
    obstore.delete(store, "shards/00000.kv")
    with pytest.raises(BankError, match="missing or damaged"):
        pull(address, tmp_path / "copy")
    listing = json.loads(bytes(obstore.get(store, LISTING).bytes()))
    obstore.put(store, LISTING, json.dumps({**listing, "index.lance/../../escape": [1, "00"]}).encode())
    with pytest.raises(BankError, match="do not trust it"):
        pull(address, tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank"]


def test_a_cut_shard_far_away_is_one_sentence(tmp_path: Path, address: str) -> None:
    _, references = pushed(tmp_path / "bank", address)
    store = from_url(address)
    obstore.put(store, "shards/00000.kv", bytes(obstore.get(store, "shards/00000.kv").bytes())[:-1])
    with pytest.raises(BankError, match=r"expected at least .*: push the bank again"):
        RemoteBank(address, FakeDecoder()).read([references[-1].id])


def test_what_is_no_bank_or_another_bank_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(BankError, match=r"no bank at s3://.*memory3 bank push"):
        open_bank(address)
    bank, _ = pushed(tmp_path / "bank", address)
    other, _ = filled(tmp_path / "other", "x")
    with pytest.raises(BankError, match="holds another bank"):
        push(other, address)
    obstore.put(from_url(address + "-taken"), "photo.jpg", b"x")
    with pytest.raises(BankError, match=r"holds 'photo.jpg' and no bank"):
        push(bank, address + "-taken")
    with pytest.raises(BankMismatch, match="was written by"):
        RemoteBank(address, FakeDecoder(weights="another"))
    with pytest.raises(BankError, match="expected s3://BUCKET/PATH or hf://OWNER/NAME"):
        push(bank, "nowhere")
    with pytest.raises(BankError, match="expected s3://BUCKET/PATH or hf://OWNER/NAME"):
        pull("nowhere", tmp_path / "copy")
    with pytest.raises(BankError, match="cannot be opened"):
        open_bank("gopher://x/y")


def test_a_remote_bank_cannot_be_written(tmp_path: Path, address: str) -> None:
    pushed(tmp_path / "bank", address)
    far = RemoteBank(address, FakeDecoder())
    with pytest.raises(BankError, match="cannot be written to"):
        Recall(far, references=[Reference("never seen")])(["x"])


def test_an_earlier_state_far_away_can_be_looked_at(tmp_path: Path, address: str) -> None:
    bank, references = filled(tmp_path / "bank", *CORPUS)
    bank.tag("first")
    assert bank.decoder is not None
    bank.add([Reference("later")], bank.decoder.encode(["later"]))
    push(bank, address)
    assert len(RemoteBank(address)) == len(references) + 1
    assert RemoteBank(address, at="first").ids() == sorted(r.id for r in references)


def test_the_command_line_takes_an_address_for_a_bank(tmp_path: Path, address: str) -> None:
    (tmp_path / "note.txt").write_text("The zeppelin left Lakehurst at nine.")
    bank, runner = str(tmp_path / "bank"), CliRunner()
    for arguments in (
        ["write", str(tmp_path / "note.txt"), "--bank", bank, "--embedder", "none"],
        ["bank", "push", bank, address],
        ["bank", "stats", address],
        ["bank", "list", address],
        ["bank", "versions", address],
    ):
        done = runner.invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0 and done.stdout
    asked = runner.invoke(app, ["ask", "When did the zeppelin leave?", "--bank", address, "--json"], catch_exceptions=False)
    here = runner.invoke(app, ["ask", "When did the zeppelin leave?", "--bank", bank, "--json"], catch_exceptions=False)
    far, near = (json.loads(done.stdout.splitlines()[-1]) for done in (asked, here))
    assert far["answer"] == near["answer"] and far["citations"] == near["citations"] != []


class FakeHub:
    """A hub of folders on this disk, with the calls that a bank needs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.private = folder, dict[str, bool]()

    def create_repo(self, name: str, *, repo_type: str, exist_ok: bool, private: bool) -> None:
        assert repo_type == "dataset" and exist_ok
        self.private.setdefault(name, private)
        (self.folder / name).mkdir(parents=True, exist_ok=True)

    def list_repo_files(self, name: str, *, repo_type: str) -> list[str]:
        return [p.relative_to(self.folder / name).as_posix() for p in (self.folder / name).rglob("*") if p.is_file()]

    def hf_hub_download(self, name: str, file: str, *, repo_type: str) -> str:
        return str(self.folder / name / file)

    def create_commit(self, name: str, operations: list[Any], *, repo_type: str, commit_message: str) -> None:
        assert name in self.private and repo_type == "dataset" and commit_message
        for operation in operations:
            file = self.folder / name / operation.path_in_repo
            if isinstance(operation, CommitOperationDelete):
                file.unlink()
                continue
            data = operation.path_or_fileobj
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data if isinstance(data, bytes) else Path(data).read_bytes())

    def snapshot_download(self, name: str, *, repo_type: str, local_dir: str) -> str:
        if not (self.folder / name).is_dir():
            raise OSError(f"404 for {name}")
        shutil.copytree(self.folder / name, local_dir, symlinks=True, dirs_exist_ok=True)
        return local_dir


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    return fake


def test_a_bank_goes_to_a_hub_with_its_card_and_comes_back(tmp_path: Path, hub: FakeHub) -> None:
    bank, references = filled(tmp_path / "bank", *CORPUS)
    push(bank, "hf://me/notes", licence="cc0-1.0")
    page = (hub.folder / "me/notes/README.md").read_text()
    assert page == card(bank, "me/notes", "cc0-1.0")
    assert page.startswith("---\nlicense: cc0-1.0\n")
    identity = bank.manifest.identity
    for fact in (identity["model"], identity["weights"], "| notes.txt | 3 |", f"{len(bank)}, {bank.record_bytes:,} bytes each"):
        assert fact in page
    copy = pull("hf://me/notes", tmp_path / "copy")
    assert verify(copy).problems == []
    assert all(same(copy.read([r.id])[0], bank.read([r.id])[0]) for r in references)
    bank.delete([references[0].id])
    bank.compact()
    push(bank, "hf://me/notes", public=True)
    assert hub.private == {"me/notes": True}  # what exists keeps who may see it
    there = {n for n in hub.list_repo_files("me/notes", repo_type="dataset") if n.startswith("shards/")}
    assert there == {p.relative_to(bank.path).as_posix() for p in (bank.path / "shards").iterdir()}
    assert pull("hf://me/notes", tmp_path / "copy2").ids() == bank.ids()
    assert "licence | not stated" in (hub.folder / "me/notes/README.md").read_text()


def test_a_hub_repository_of_something_else_is_left_alone(tmp_path: Path, hub: FakeHub) -> None:
    bank, _ = filled(tmp_path / "bank", *CORPUS)
    (hub.folder / "me/photos").mkdir(parents=True)
    (hub.folder / "me/photos/cat.jpg").write_bytes(b"x")
    with pytest.raises(BankError, match=r"hf://me/photos holds 'cat.jpg' and no bank"):
        push(bank, "hf://me/photos")
    other, _ = filled(tmp_path / "other", "x")
    push(other, "hf://me/notes", public=True)
    assert hub.private["me/notes"] is False
    with pytest.raises(BankError, match="holds another bank"):
        push(bank, "hf://me/notes")
    assert pull("hf://me/notes", tmp_path / "copy").ids() == other.ids()


def test_what_a_hub_damaged_or_does_not_have_is_refused(tmp_path: Path, hub: FakeHub) -> None:
    bank, _ = filled(tmp_path / "bank", *CORPUS)
    with pytest.raises(BankError, match=r"hf://me/none cannot be reached \(404"):
        pull("hf://me/none", tmp_path / "copy")
    push(bank, "hf://me/notes")
    shard = hub.folder / "me/notes/shards/00000.kv"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"\x00")
    with pytest.raises(BankError, match="damaged"):
        pull("hf://me/notes", tmp_path / "copy")
    shard.unlink()
    with pytest.raises(BankError, match="lacks shards/00000.kv"):
        pull("hf://me/notes", tmp_path / "copy")
    shard.symlink_to("/etc/hostname")
    with pytest.raises(BankError, match="lacks shards/00000.kv"):
        pull("hf://me/notes", tmp_path / "copy")
    (hub.folder / "me/notes" / LISTING).unlink()
    with pytest.raises(BankError, match="expected a bank that `memory3 bank push` put there"):
        pull("hf://me/notes", tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank", "hub"]


def test_a_store_out_of_reach_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORY3_CACHE", str(tmp_path / "cache"))
    with bucket() as address:
        with pytest.raises(BankError, match=r"no bank at|cannot be reached"):
            open_bank(address.replace("memories", "no-such-bucket"))
        pushed(tmp_path / "bank", address)
        monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        with pytest.raises(BankError, match=r"cannot be reached .*credentials in AWS_"):
            open_bank(address)
        with pytest.raises(BankError, match=r"cannot be reached"):
            pull(address, tmp_path / "copy")


def test_a_push_leaves_what_is_not_of_the_bank(tmp_path: Path, address: str) -> None:
    """Another bank below the address, and a note."""
    bank, references = pushed(tmp_path / "bank", address)
    inner, _ = filled(tmp_path / "inner", "an inner text")
    push(inner, f"{address}/inner")
    obstore.put(from_url(address), "notes/readme.txt", b"mine")
    bank.delete([references[0].id])
    bank.compact()
    push(bank, address)
    assert RemoteBank(f"{address}/inner").ids() == inner.ids()
    assert bytes(obstore.get(from_url(address), "notes/readme.txt").bytes()) == b"mine"


def test_an_older_copy_does_not_replace_a_later_state(tmp_path: Path, address: str) -> None:
    bank, _ = pushed(tmp_path / "bank", address)
    old = pull(address, tmp_path / "old")
    assert bank.decoder is not None
    bank.add([Reference("more")], bank.decoder.encode(["more"]))
    push(bank, address)
    with pytest.raises(BankError, match="holds a later state of this bank"):
        push(old, address)
    assert len(RemoteBank(address)) == len(bank)


def test_deleted_key_values_leave_the_cache_on_disk_too(tmp_path: Path, address: str) -> None:
    bank, references = pushed(tmp_path / "bank", address)
    far = RemoteBank(address, FakeDecoder(), cache_folder=tmp_path / "cached")
    far.read([r.id for r in references])
    held = {file.read_bytes() for file in (tmp_path / "cached").iterdir()}
    assert len(held) == len(references)
    gone = bytes.fromhex(references[0].id)
    assert any(gone in data for data in held)
    bank.delete([references[0].id])
    push(bank, address)
    far.read([references[1].id])
    assert not any(gone in file.read_bytes() for file in (tmp_path / "cached").iterdir())


def test_without_a_place_for_the_cache_records_are_read_all_the_same(tmp_path: Path, address: str) -> None:
    bank, references = pushed(tmp_path / "bank", address)
    (tmp_path / "file").write_text("no folder")
    far = RemoteBank(address, FakeDecoder(), cache_folder=tmp_path / "file")
    assert same(far.read([references[0].id])[0], bank.read([references[0].id])[0])


def test_a_push_between_two_looks_is_followed(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, references = pushed(tmp_path / "bank", address)
    far = RemoteBank(address, FakeDecoder())
    fetch = far.records.fetch

    def pushed_first(places: Any) -> None:
        monkeypatch.setattr(far.records, "fetch", fetch)
        bank.delete([references[0].id])
        bank.compact()
        push(bank, address)
        fetch(places)

    monkeypatch.setattr(far.records, "fetch", pushed_first)
    assert same(far.read([references[2].id])[0], bank.read([references[2].id])[0])


def test_a_local_disk_that_refuses_is_not_blamed_on_the_store(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(tmp_path / "bank", address)

    def full(*arguments: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memory3.sharing.copied", full)
    with pytest.raises(BankError, match=r"copy cannot be made \(No space left on device\)"):
        pull(address, tmp_path / "copy")


@pytest.mark.parametrize("arguments", [["bank", "compact"], ["bank", "tag"], ["write", "note.txt", "--bank"]])
def test_commands_that_write_take_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("A note.")
    with pytest.raises(BankError, match=r"s3://b/bank is an address on object storage.*memory3 bank push BANK s3://b/bank"):
        CliRunner().invoke(app, [*arguments, "s3://b/bank", *(["x"] if "tag" in arguments else [])], catch_exceptions=False)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    "name", ["index.lance/e/modules.json", "index.lance/memories.lance/evil.py", "index.lance/memories.lance/data/../x"]
)
def test_only_files_of_the_tables_belong_to_a_bank(name: str) -> None:
    assert not is_ours(name)
    assert is_ours("index.lance/memories.lance/_refs/tags/first.json")
