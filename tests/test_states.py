"""Earlier states can be looked at, tags keep them, and a deletion ends them all."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path

import lance
import pytest
from fakes import FakeDecoder, same
from test_bank import filled
from typer.testing import CliRunner

from memory3.bank import Bank
from memory3.cli import app
from memory3.reader import version_name
from memory3.recall import Recall
from memory3.spec import BankError, Reference
from memory3.tables import age_to_drop
from memory3.verifying import traces_of, verify

SECRET = "The zanzibarquux opens at midnight."


def test_an_earlier_state_can_be_looked_at_and_asked_but_not_written(tmp_path: Path) -> None:
    bank, (one, two) = filled(tmp_path, "one word", "two words")
    assert bank.decoder is not None
    before, then = bank.version, bank.versions()[-1][1]
    bank.add([Reference("three words", "notes.txt", 90, 99)], bank.decoder.encode(["three words"]))
    bank.compact()
    earlier = Bank(tmp_path, FakeDecoder(), at=then)
    assert earlier.version == before != bank.version
    assert earlier.ids() == sorted([one.id, two.id])
    assert [hit.id for hit in Recall(earlier)(["two three"])[0].hits] == [two.id]
    assert Recall(earlier)(["words"])[0].versions == (then,)
    assert same(earlier.read([one.id])[0], bank.read([one.id])[0])
    for change in (lambda: earlier.delete([one.id]), earlier.compact, lambda: earlier.tag("x")):
        with pytest.raises(BankError, match="an earlier state, to be looked at"):
            change()
    with pytest.raises(BankError, match="has no state 'gone'.*memory3 bank versions"):
        Bank(tmp_path, at="gone")


def test_compact_keeps_what_a_tag_names_with_the_records_where_they_went(tmp_path: Path) -> None:
    bank, (one, two) = filled(tmp_path, "one word", "two words")
    named = bank.tag("release-1")
    assert bank.decoder is not None
    bank.add([Reference("three words", "notes.txt", 90, 99)], bank.decoder.encode(["three words"]))
    for _ in range(2):
        bank.compact()
        bank.refresh(keep_versions=False)
    assert named in [version for _, version in bank.versions()]
    kept = Bank(tmp_path, FakeDecoder(), at="release-1")
    assert kept.ids() == sorted([one.id, two.id]) and len(bank) == 3
    assert same(kept.read([two.id])[0], bank.read([two.id])[0])
    assert bank.tags() == {"release-1": named}
    assert verify(bank).problems == []
    with pytest.raises(BankError, match="found the tag 'release-1', which is taken"):
        bank.tag("release-1")
    with pytest.raises(BankError, match="which is no name"):
        bank.tag("no name / at all")
    bank.untag("release-1")
    with pytest.raises(BankError, match="found no tag 'release-1'"):
        bank.untag("release-1")
    bank.refresh(keep_versions=False)
    assert named not in [version for _, version in bank.versions()]


def test_a_deletion_drops_tags_and_says_so_to_who_asks_for_them(tmp_path: Path) -> None:
    bank, (one, _) = filled(tmp_path, SECRET, "two words")
    bank.tag("kept")
    held = Bank(tmp_path, FakeDecoder(), at="kept")
    bank.delete([one.id])
    assert bank.tags() == {} and traces_of(bank, SECRET) == []
    with pytest.raises(BankError):
        held.read([one.id])
    with pytest.raises(BankError, match="none outlives a deletion"):
        Bank(tmp_path, at="kept")


def test_a_deletion_of_nothing_leaves_tags_and_states(tmp_path: Path) -> None:
    bank, _ = filled(tmp_path, "one word", "two words")
    bank.tag("release")
    states = bank.versions()
    assert (bank.delete([]), bank.delete_where("tokens > 100000")) == (0, 0)
    assert (list(bank.tags()), bank.versions()) == (["release"], states)


def test_versions_and_tags_on_the_command_line(tmp_path: Path) -> None:
    bank, _ = filled(tmp_path / "bank", "one word", "two words")
    runner, at = CliRunner(), str(tmp_path / "bank")
    assert runner.invoke(app, ["bank", "tag", at, "first"]).stdout.startswith("first is version ")
    last = runner.invoke(app, ["bank", "versions", at]).stdout.splitlines()[-1]
    assert last.endswith("first") and last.split()[0] == bank.versions()[-1][1]
    assert "no tag any more" in runner.invoke(app, ["bank", "tag", at, "first", "--remove"]).stdout


def test_an_old_tag_stops_nothing_and_is_kept(tmp_path: Path) -> None:
    """Lance itself refuses to tidy up once a tagged version is older than the limit."""
    bank, _ = filled(tmp_path, "one word")
    named = bank.tag("first")
    assert bank.decoder is not None
    for n in range(3):
        bank.add([Reference(f"more {n}")], bank.decoder.encode([f"more {n}"]))
        time.sleep(0.005)
        bank._catalogue.optimise(timedelta(milliseconds=1))
    assert len(Bank(tmp_path, FakeDecoder(), at="first")) == 1 and bank.tags() == {"first": named}


def test_a_state_is_kept_until_an_hour_after_the_next_one() -> None:
    now, hour = datetime(2026, 1, 1, 12), timedelta(hours=1)
    made = [now - timedelta(minutes=minutes) for minutes in (900, 300, 200, 40, 1)]
    age = age_to_drop(made, now, hour)
    assert [now - time < age for time in made] == [
        False,
        False,
        True,
        True,
        True,
    ]  # 200 minutes ago it began, until 40 ago it was
    assert age_to_drop([now - timedelta(minutes=5)], now, hour) == hour


def test_states_are_those_that_were_also_behind_gaps(tmp_path: Path) -> None:
    bank, _ = filled(tmp_path, "one word")
    assert bank.decoder is not None
    tagged = [bank.tag("t1")]
    for n in range(3):
        bank.add([Reference(f"more {n}", "a.txt", n, n + 1)], bank.decoder.encode([f"more {n}"]))
    tagged.append(bank.tag("t2"))
    bank.add([Reference("last", "a.txt", 9, 10)], bank.decoder.encode(["last"]))
    bank.refresh(keep_versions=False)
    now = version_name(bank.version)
    assert [version for _, version in bank.versions()] == [*tagged, now]


@pytest.mark.parametrize("name", ["3.1", "a..b", "x.", "a.lock", "", "-x", "a/b"])
def test_a_tag_is_no_version_and_no_name_that_lance_refuses(tmp_path: Path, name: str) -> None:
    bank, _ = filled(tmp_path, "one word")
    with pytest.raises(BankError, match="which is no name"):
        bank.tag(name)


def test_half_a_tag_is_tidied_up(tmp_path: Path) -> None:
    bank, _ = filled(tmp_path, "one word")
    stored = lance.dataset(str(tmp_path / "index.lance/memories.lance"))
    stored.tags.create("half", stored.version)
    assert bank.tags() == {}
    bank.compact()
    assert lance.dataset(str(tmp_path / "index.lance/memories.lance")).tags.list() == {}
    assert bank.tag("half") in {version for _, version in bank.versions()}


def test_a_state_that_went_says_so(tmp_path: Path) -> None:
    bank, (one, _) = filled(tmp_path, "one", "two")
    earlier = Bank(tmp_path, FakeDecoder(), at=bank.versions()[-1][1])
    bank.delete([one.id])
    with pytest.raises(BankError, match="not kept any more"):
        earlier.search("one", 1)
