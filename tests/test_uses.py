"""Every recall counts, less with time; a count never stands in the way, and what is forgotten has no history."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from families import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from memory3.bank import Bank
from memory3.decoder import Decoder, attach
from memory3.evaluate.asking import Question
from memory3.evaluate.given import retrieved
from memory3.rebuilding import rebuild
from memory3.recall import Recall
from memory3.spec import BankError, MemorySpec, Reference, SpecError
from memory3.uses import DAY_S, USES, History, Use, Uses, expected_uses
from memory3.verifying import traces_of, verify
from memory3.writing import write

TEXTS = ("The tower was completed in 1889.", "Salt melts at 801 degrees.", "A group of crows is a murder.")
TOWER, SALT, CROWS = (Reference(text).id for text in TEXTS)


class Clock:
    """A time that tests turn."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def uses(tmp_path: Path, clock: Clock) -> Uses:
    return Uses(tmp_path / USES, clock)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=4)) as attached:
        yield attached


@pytest.fixture
def bank(decoder: Decoder, tmp_path: Path) -> Bank:
    opened = Bank(tmp_path / "bank", decoder, create=True)
    write(decoder, [Reference(text, f"{n}.txt", 0, len(text)) for n, text in enumerate(TEXTS)], opened)
    return opened


def recalls(bank: Bank) -> dict[str, int]:
    return {id: use.recalls for id, use in bank.uses.history().uses.items()}


def killed_in_a_change(uses: Uses, statement: str) -> None:
    """Another process begins to change the history, and dies before it has committed."""
    code = (
        "import os, pathlib, sys; from memory3.uses import Uses\n"
        "with Uses(pathlib.Path(sys.argv[1]))._changed() as open_: open_.execute(sys.argv[2]); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(uses.path), statement]).returncode == 9


# ---- counting ----


def test_a_recall_counts_half_after_each_half_life(uses: Uses, clock: Clock) -> None:
    assert uses.count(["a", "a", "b"])
    clock.now += 30 * DAY_S
    assert uses.count(["a"])
    clock.now += 30 * DAY_S
    found = uses.history()
    assert found.uses == {"a": Use(2 / 4 + 1 / 2, 3), "b": Use(1 / 4, 1)}
    assert (found.began, found.now) == (1_000_000, clock.now)


def test_another_half_life_holds_from_now_on(uses: Uses, clock: Clock) -> None:
    uses.count(["a"])
    clock.now += 30 * DAY_S
    uses.set_half_life(10)
    clock.now += 10 * DAY_S
    assert uses.history().uses["a"].score == pytest.approx(1 / 4)
    assert uses.history().half_life_days == 10
    with pytest.raises(SpecError, match="half-life of 0 days"):
        uses.set_half_life(0)
    with pytest.raises(SpecError, match="found a half-life of inf days"):
        uses.set_half_life(float("inf"))


def test_a_clock_that_runs_backwards_takes_no_count(uses: Uses, clock: Clock) -> None:
    uses.count(["a"])
    clock.now -= DAY_S
    uses.count(["a"])
    assert uses.history().uses["a"].score == 2
    clock.now += DAY_S
    assert uses.history().uses["a"].score == 2


def test_counts_of_several_processes_add_up(uses: Uses) -> None:
    code = f"from pathlib import Path; from memory3.uses import Uses; u = Uses(Path({str(uses.path)!r}))\nn = 0\nwhile n < 50: n += u.count(['a'])"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert uses.history().uses["a"].recalls == 150


# ---- never in the way ----


def test_a_locked_history_loses_the_count_at_once(uses: Uses) -> None:
    uses.count(["a"])
    with sqlite3.connect(uses.path) as other:
        other.execute("begin immediate")
        assert not uses.count(["a"])
    other.close()
    assert uses.count(["a"]) and uses.history().uses["a"].recalls == 2


def test_a_recall_goes_on_where_its_count_cannot_be_noted(bank: Bank) -> None:
    bank.uses.path.mkdir()
    assert [h.id for h in Recall(bank, count=1)(["When was the tower completed?"])[0].hits] == [TOWER]
    bank.uses.path.rmdir()
    bank.uses.path.write_bytes(b"no database" * 100)
    assert Recall(bank, count=1)(["When was the tower completed?"])[0].hits
    with pytest.raises(BankError, match="cannot be read .*remove it"):
        bank.uses.history()
    assert any(USES in problem for problem in verify(bank).problems)


def test_a_history_is_read_where_nothing_can_be_written(uses: Uses) -> None:
    uses.count(["a"])
    uses.path.chmod(0o400)
    uses.path.parent.chmod(0o500)
    try:
        assert uses.history().uses["a"].recalls == 1
    finally:
        uses.path.parent.chmod(0o700)


def test_a_count_that_was_killed_leaves_a_history_that_can_be_read(uses: Uses) -> None:
    uses.count(["a"])
    killed_in_a_change(uses, "delete from uses")
    assert uses.journal.exists()
    assert uses.history().uses["a"].recalls == 1
    assert not uses.journal.exists()


def test_a_recall_goes_on_where_the_bank_cannot_say_what_it_lacks(uses: Uses) -> None:
    def broken(ids: list[str]) -> list[str]:
        raise BankError("the bank was taken away")

    assert not uses.count(["a"], broken)


# ---- of a bank ----


def test_every_recall_counts_what_it_brought(bank: Bank) -> None:
    recall = Recall(bank, count=1)
    recall(["When was the tower completed?", "Where does salt melt?"])
    recall(["the tower"])
    assert recalls(bank) == {TOWER: 2, SALT: 1}
    Recall(bank, references=[CROWS])(["anything"])
    assert recalls(bank)[CROWS] == 1


def test_a_measurement_does_not_count(bank: Bank) -> None:
    assert Recall(bank, counted=False)(["the tower"])[0].hits
    asked = [
        Question("notes", "When was the tower completed?", ("1889",)),
        Question("notes", "Where does salt melt?", ("801",)),
    ]
    assert all(brought.right for brought in retrieved(bank, asked))
    assert recalls(bank) == {}


def test_a_look_at_an_earlier_state_does_not_count(bank: Bank, decoder: Decoder) -> None:
    state = bank.versions()[-1][1]
    Recall(Bank(bank.path, decoder, at=state), count=1)(["the tower"])
    assert recalls(bank) == {}


def test_what_is_deleted_has_no_history_in_any_byte(bank: Bank) -> None:
    Recall(bank, count=3)(["tower salt crows group"])
    assert set(recalls(bank)) == {TOWER, SALT, CROWS}
    assert TOWER.encode() in bank.uses.path.read_bytes()
    bank.delete([TOWER])
    assert set(recalls(bank)) == {SALT, CROWS}
    assert TOWER.encode() not in bank.uses.path.read_bytes()
    assert traces_of(bank, TEXTS[0]) == [] and verify(bank).problems == []


def test_a_trace_of_a_deleted_memory_in_the_history_is_found_and_removed(bank: Bank) -> None:
    bank.delete([TOWER])
    bank.uses.count([TOWER])
    assert any(USES in trace and TOWER in trace for trace in traces_of(bank, TEXTS[0]))
    assert any("uses of 1 memories that are not there" in problem for problem in verify(bank).problems)
    bank.compact()
    assert traces_of(bank, TEXTS[0]) == [] and verify(bank).problems == []


def test_a_trace_in_the_journal_of_a_killed_count_is_found(bank: Bank) -> None:
    bank.uses.count([TOWER])
    killed_in_a_change(bank.uses, "delete from uses")
    assert f"{bank.uses.journal.name}: uses of {TOWER}" in traces_of(bank, TEXTS[0])
    bank.delete([TOWER])
    assert traces_of(bank, TEXTS[0]) == [] and verify(bank).problems == []


def test_what_is_deleted_while_it_is_recalled_is_not_counted(bank: Bank) -> None:
    """The count comes after the deletion, as if another process had recalled it just before."""
    before = bank.version
    bank.delete([TOWER])
    bank.count_uses([TOWER, SALT], before)
    assert recalls(bank) == {SALT: 1}


def test_a_damaged_history_does_not_keep_a_bank_from_forgetting(bank: Bank) -> None:
    bank.uses.path.write_bytes(b"no database" * 100)
    bank.delete([TOWER])
    assert not bank.uses.path.exists() and TOWER not in bank


def test_a_rebuilt_bank_goes_on_with_its_history(bank: Bank, decoder: Decoder) -> None:
    Recall(bank, count=1)(["the tower"])
    rebuild(bank.path, decoder)
    assert recalls(Bank(bank.path)) == {TOWER: 1}


# ---- what is to be expected ----

DAYS = st.floats(1, 2000)
CREATED = dict.fromkeys("abcdefgh", 0.0)


def history(scores: dict[str, float], days: float = 60) -> History:
    return History({id: Use(score, round(score)) for id, score in scores.items()}, 0.0, days * DAY_S)


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 1000), min_size=1), DAYS, DAYS)
def test_more_recalls_never_lower_what_is_expected(scores: dict[str, float], days: float, ahead: float) -> None:
    found = expected_uses(history(scores, days), CREATED, ahead)
    by_score = sorted(CREATED, key=lambda id: scores.get(id, 0.0))
    values = [found[id] for id in by_score]
    assert all(a <= b * (1 + 1e-9) + 1e-12 for a, b in pairwise(values))
    assert all(value >= 0 for value in values)


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 1000), min_size=1), DAYS)
def test_smoothing_moves_uses_between_memories_and_makes_none(scores: dict[str, float], days: float) -> None:
    """The sum over all memories is the sum of their own rates."""
    exposure = (1 - 0.5 ** (days / 30)) / (0.6931471805599453 / 30)
    assert sum(expected_uses(history(scores, days), CREATED, 1.0).values()) == pytest.approx(sum(scores.values()) / exposure)


def test_the_unseen_are_expected_to_be_used_less_than_the_seen_but_not_never() -> None:
    found = expected_uses(history({"a": 30.0, "b": 2.0}), CREATED, 10)
    assert found["a"] > found["b"] > found["c"] == found["h"] > 0
    assert expected_uses(history({"a": 30.0, "b": 2.0}), CREATED, 20)["c"] == pytest.approx(2 * found["c"])


def test_differences_that_chance_explains_are_smoothed_away() -> None:
    found = expected_uses(history({id: 1.0 + (id < "e") * 0.1 for id in CREATED}), CREATED, 10)
    assert len({round(value, 9) for value in found.values()}) == 1


def test_the_estimate_is_the_credibility_formula() -> None:
    """After a time without end: exposure 1 / k, its variance 1 / (2 k), and the mean of four rates 3 k."""
    found = expected_uses(history({"a": 10.0, "b": 2.0}, days=1e6), dict.fromkeys("abcd", 0.0), 1.0)
    k = 0.6931471805599453 / 30
    mean, noise = 3 * k, 3 * k * k / 2
    between = k * k * (7**2 + 1**2 + 3**2 + 3**2) / 4 - noise
    weight = between / (between + noise)
    assert found["a"] == pytest.approx(mean + weight * 7 * k)
    assert found["c"] == pytest.approx(mean - weight * 3 * k)


def test_what_is_a_minute_old_is_judged_as_if_it_were_a_day() -> None:
    minute, day = (expected_uses(history({"a": 3.0}, days), CREATED, 1.0) for days in (1 / 1440, 1))
    assert minute == pytest.approx(day)


def test_a_steady_use_is_expected_to_go_on(uses: Uses, clock: Clock) -> None:
    """Ten recalls a day of one memory of many, over three half-lives: ten a day again, in 5 %."""
    for _ in range(90):
        uses.count(["a"] * 10)
        clock.now += DAY_S
    found = expected_uses(uses.history(), dict.fromkeys(map(str, range(99)), 0.0) | {"a": 0.0}, 1.0)
    assert found["a"] == pytest.approx(10, rel=0.05)


def test_the_young_are_judged_by_their_own_time() -> None:
    """The same score in a tenth of the time means more uses to come."""
    created = CREATED | {"b": 54 * DAY_S}
    found = expected_uses(history({"a": 20.0, "b": 20.0, "c": 1.0}), created, 10)
    assert found["b"] > 2 * found["a"]


def test_an_empty_history_is_refused() -> None:
    with pytest.raises(BankError, match="found no recalls"):
        expected_uses(History({}, None, 0.0), CREATED, 10)
    with pytest.raises(BankError, match="found no recalls"):
        expected_uses(history({"z": 1.0}), CREATED, 10)
    with pytest.raises(SpecError, match="horizon of 0 days"):
        expected_uses(history({"a": 1.0}), CREATED, 0)
