"""A bank in one file: the same bank comes out, and nothing else does."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from fakes import same
from test_bank import filled

from memory3.archive import LISTING, export_bank, import_bank
from memory3.spec import BankError
from memory3.verifying import verify


def test_an_archive_gives_the_same_bank(tmp_path: Path) -> None:
    bank, references = filled(tmp_path / "bank", "one", "two", "three", max_shard_bytes=1)
    file = tmp_path / "bank.tar"
    assert export_bank(bank, file) == file.stat().st_size
    other = import_bank(file, tmp_path / "a copy 🗼")
    assert other.ids() == bank.ids()
    assert all(same(a, b) for a, b in zip(other.read(other.ids()), bank.read(bank.ids()), strict=True))
    assert other.references(other.ids()) == bank.references(bank.ids())
    assert other.search("two", 1)[0].id == references[1].id
    assert verify(other).problems == []
    with pytest.raises(BankError, match="exists, expected a new name"):
        export_bank(bank, file)
    with pytest.raises(BankError, match="lies inside the bank"):
        export_bank(bank, tmp_path / "bank" / "x.tar")
    with pytest.raises(BankError, match="has no folder to be in"):
        export_bank(bank, tmp_path / "none" / "x.tar")
    with pytest.raises(BankError, match="exists, expected a new folder"):
        import_bank(file, tmp_path / "bank")


def rewritten(file: Path, name: str, data: bytes | None = None, *, listed: str | None = None, link: bool = False) -> Path:
    """The archive with another member behind its own, or with `listed` in the listing, or one member's bytes changed."""
    made = file.with_name("bad.tar")
    with tarfile.open(file) as old, tarfile.open(made, "w") as new:
        for member in old:
            content = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name == LISTING and listed is not None:
                content = json.dumps(json.loads(content) | {listed: [4, "0"]}).encode()
            if member.name == name and data is not None:
                content = data
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
        if data is None:
            extra = tarfile.TarInfo(name)
            if link:
                extra.type, extra.linkname = tarfile.SYMTYPE, "/etc/passwd"
            new.addfile(extra, io.BytesIO(b""))
    return made


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("../escaped", {}, "holds '../escaped'"),
        ("/tmp/escaped", {}, "holds '/tmp/escaped'"),
        ("manifest.json", {"link": True}, "holds 'manifest.json'"),
        ("x", {"listed": "index.lance/../../escaped"}, "lists 'index.lance/../../escaped'"),
        ("x", {"listed": "shards/evil.py"}, "lists 'shards/evil.py'"),
        ("shards/00000.kv", {"data": b"short"}, "is damaged"),
    ],
)
def test_an_archive_that_was_tampered_with_is_refused_and_leaves_nothing(
    tmp_path: Path, name: str, options: dict[str, object], reason: str
) -> None:
    bank, _ = filled(tmp_path / "bank", "one")
    export_bank(bank, tmp_path / "bank.tar")
    bad = rewritten(tmp_path / "bank.tar", name, **options)  # type: ignore[arg-type]
    with pytest.raises(BankError, match=reason):
        import_bank(bad, tmp_path / "deep/er/new")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "deep") == ["bad.tar", "bank", "bank.tar"]
    assert not (tmp_path / "deep/er/new").exists()


def test_what_is_no_archive_or_lacks_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(BankError, match="is no archive of a bank"):
        import_bank(tmp_path / "text", tmp_path / "new")
    with pytest.raises(BankError, match="cannot be unpacked"):
        import_bank(tmp_path / "none", tmp_path / "new")
    bank, _ = filled(tmp_path / "bank", "one")
    export_bank(bank, tmp_path / "bank.tar")
    manifest = tmp_path / "bank/manifest.json"
    listing = {"manifest.json": [manifest.stat().st_size, hashlib.blake2b(manifest.read_bytes(), digest_size=32).hexdigest()]}
    for bad, reason in ((json.dumps(listing), "cannot be opened"), ('{"manifest.json": [Infinity, "x"]}', "is ill-formed")):
        with tarfile.open(tmp_path / "only.tar", "w") as archive:
            for name, data in ((LISTING, bad.encode()), ("manifest.json", manifest.read_bytes())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        with pytest.raises(BankError, match=reason):
            import_bank(tmp_path / "only.tar", tmp_path / "new")
        assert not (tmp_path / "new").exists()
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "bank.tar").read_bytes()[:-20_000])
    with pytest.raises(BankError, match="lacks|is no archive|damaged"):
        import_bank(cut, tmp_path / "new")
    assert not (tmp_path / "new").exists()
