"""A bank on object storage is read where it lies; a pushed bank comes back the same, and forgets with its original."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from fakes import CORPUS, FakeDecoder, FakeEmbedder, same
from object_store import bucket
from obstore.store import from_url
from test_bank import filled
from typer.testing import CliRunner

from memory3.archive import LISTING
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
        self.folder, self.created = folder, set[str]()

    def create_repo(self, name: str, *, repo_type: str, exist_ok: bool) -> None:
        assert repo_type == "dataset" and exist_ok
        self.created.add(name)

    def upload_folder(
        self, *, repo_id: str, repo_type: str, folder_path: str, commit_message: str, delete_patterns: str
    ) -> None:
        assert repo_id in self.created and repo_type == "dataset" and delete_patterns == "*" and commit_message
        shutil.rmtree(self.folder / repo_id, ignore_errors=True)
        shutil.copytree(folder_path, self.folder / repo_id)

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
    push(bank, "hf://me/notes")
    assert pull("hf://me/notes", tmp_path / "copy2").ids() == bank.ids()
    assert "licence | not stated" in (hub.folder / "me/notes/README.md").read_text()


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
    with bucket() as address, warnings.catch_warnings():
        monkeypatch.setenv("MEMORY3_CACHE", str(tmp_path / "cache"))
        with pytest.raises(BankError, match=r"cannot be reached|no bank at"):
            open_bank(address.replace("memories", "no-such-bucket"))
