"""Exact match and F1 as SQuAD's evaluation has them, and intervals that hold the mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory3.scoring import exact_match, f1, interval, normalised


def test_case_punctuation_and_articles_do_not_count() -> None:
    assert normalised("The  Eiffel Tower.") == "eiffel tower"
    assert exact_match(" the eiffel tower", ["Big Ben", "Eiffel Tower!"]) == 1
    assert exact_match("Eiffel", ["Eiffel Tower"]) == 0


def test_f1_is_the_best_overlap_of_words() -> None:
    assert f1("Eiffel", ["Eiffel Tower"]) == pytest.approx(2 / 3)
    assert f1("", ["Eiffel"]) == 0
    assert f1("c b", ["x", "b c"]) == pytest.approx(1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_an_interval_holds_its_mean_and_lies_in_range(values: list[float]) -> None:
    low, high = interval(values, samples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_no_values_have_no_interval() -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        interval([])
