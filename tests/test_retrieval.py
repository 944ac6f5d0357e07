"""Retrieval finds texts by their words, in a settled order, and takes any query for plain words."""

from pathlib import Path

import pytest
from fakes import CORPUS, FakeDecoder, FakeEmbedder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory3.bank import Bank
from memory3.retrieval import RETRIEVERS, Lexical
from memory3.spec import Reference
from memory3.writing import write


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    decoder = FakeDecoder()
    made = Bank(tmp_path_factory.mktemp("bank"), decoder, create=True, embedder=FakeEmbedder())
    equal = [f"equal {letter}{letter}" for letter in "bcdefghjkp"]
    write(decoder, [Reference(text) for text in [*CORPUS, *equal, "rare word word word"]], made)
    return made


@pytest.mark.parametrize("name", sorted(set(RETRIEVERS) - {"internal"}))  # that one needs a real model: test_internal.py
def test_the_text_that_shares_the_words_comes_first(bank: Bank, name: str) -> None:
    found = RETRIEVERS[name](bank).search([f"I ask: {text[:30]}" for text in CORPUS], 2)
    assert [hits[0].id for hits in found] == [Reference(text).id for text in CORPUS]


def test_any_shared_word_is_enough(bank: Bank) -> None:
    [[hit]] = Lexical(bank).search(["unheard rare nonsense"], 5)
    assert hit.id == Reference("rare word word word").id


def test_hits_come_by_score_and_equal_ones_by_id(bank: Bank) -> None:
    [hits] = Lexical(bank).search(["equal"], 5)
    assert len({hit.score for hit in hits}) == 1
    assert [hit.id for hit in hits] == sorted(Reference(f"equal {letter}{letter}").id for letter in "bcdefghjkp")[:5]
    [hits] = Lexical(bank).search(["equal bb rare word"], 50)
    assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.id))
    assert len(hits) == 11


@pytest.mark.parametrize("query", ["", "  \n", "!?", "the of and", "zzzz"])
def test_a_query_without_known_words_finds_nothing(bank: Bank, query: str) -> None:
    assert Lexical(bank).search([query], 5) == [[]]


@pytest.mark.parametrize(
    "query", ['+tower -"', "tower AND (", "text:tower^9~", "tower OR NOT '; DROP", "{tower} [TO *]", "tower\ud800\x00"]
)
def test_signs_of_query_languages_are_plain_text(bank: Bank, query: str) -> None:
    [hits] = Lexical(bank).search([query], 1)
    assert [hit.id for hit in hits] == [Reference(CORPUS[0]).id]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60), st.integers(-2, 4))
def test_no_query_breaks_the_search(bank: Bank, query: str, k: int) -> None:
    [hits] = Lexical(bank).search([query], k)
    assert len(hits) <= max(k, 0)


def test_a_new_text_is_found_before_and_after_the_index_is_refreshed(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    write(decoder, [Reference("first text")], bank)
    bank.add([Reference("second text")], decoder.encode(["second text"]))
    before = bank.search("second", 3)
    bank.refresh()
    assert [hit.id for hit in before] == [hit.id for hit in bank.search("second", 3)] == [Reference("second text").id]
