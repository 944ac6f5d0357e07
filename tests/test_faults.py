"""The fault campaign in small; `make faults` runs it in full."""

from __future__ import annotations

import gc
import subprocess
from pathlib import Path

import pytest
from fakes import FakeDecoder, FakeEmbedder
from faults import campaign

from memory3.archive import export_bank
from memory3.bank import Bank
from memory3.recall import Recall
from memory3.spec import BankError, Reference
from memory3.verifying import traces_of, verify


def test_no_fault_loses_a_memory_serves_a_wrong_byte_or_leaves_what_was_deleted() -> None:
    tallies = campaign(small=True, seed=1)
    assert len(tallies) >= 3
    assert [tally for tally in tallies if not tally.clean] == []
    assert all(tally.faults for tally in tallies)


def test_a_read_only_disk_and_a_path_with_spaces_and_emoji(tmp_path: Path) -> None:
    """What is there is read, searched, verified and looked at in earlier states; each attempt to change it is one sentence."""
    mount = tmp_path / "my disk 🦊"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("no right to mount a disk here")
    try:
        decoder, texts = FakeDecoder(), ["The tower stands.", "Salt melts."]
        bank = Bank(mount / "ein Gedächtnis", decoder, create=True, embedder=FakeEmbedder())
        bank.add([Reference(text, "notes.txt", 0, 9) for text in texts], decoder.encode(texts))
        bank.refresh()
        kept = bank.versions()[-1][1]
        bank.close()
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        with Bank(mount / "ein Gedächtnis", decoder, embedder=FakeEmbedder()) as again:
            assert [len(memories) for memories in (again.read(again.ids()), again.ids())] == [2, 2]
            assert Recall(again, retriever="lexical")(["tower"])[0].references[0].text == texts[0]
            assert verify(again).problems == [] and traces_of(again, texts[0]) != []
            assert len(Bank(again.path, decoder, at=kept)) == 2
            changes = (
                lambda: again.add([Reference("x")], decoder.encode(["x"])),
                lambda: again.delete(again.ids()),
                again.compact,
                lambda: again.embed(None),
                lambda: again.tag("x"),
                lambda: export_bank(again, mount / "bank.tar"),
                lambda: Bank(mount / "new", decoder, create=True),
            )
            for change in changes:
                with pytest.raises(BankError, match=r"cannot be (written|made|tagged)"):
                    change()
            again.close()
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", str(mount)], check=True)
