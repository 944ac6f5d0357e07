"""Which rows a run learns from, and which answers a row accepts."""

from __future__ import annotations

from typing import Any

import pytest

from memory3.rows import answers_of, of_split
from memory3.spec import SourceError


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answers": ["Paris", " the city ", " "]}, ["Paris", "the city"]),
        ({"answers": "Paris"}, ["Paris"]),
        ({"answer": "Paris"}, ["Paris"]),
        ({"answer": ["Paris"], "answers": None}, ["Paris"]),
        ({"answers": {"text": ["Paris"], "answer_start": [3]}}, ["Paris"]),
        ({"answers": {"text": [], "answer_start": []}}, []),
        ({"question": "Where?"}, []),
    ],
)
def test_answers_are_a_text_a_list_of_texts_or_those_of_squad(row: dict[str, Any], answers: list[str]) -> None:
    assert answers_of(row, "rows:1") == answers


@pytest.mark.parametrize("given", [1812, ["1812", 1812], [None], {"start": [3]}, {"text": "Paris"}, True])
def test_answers_of_any_other_kind_are_refused_with_their_place(given: Any) -> None:
    with pytest.raises(SourceError, match="found answers .* at rows:1, expected a text or a list of texts under 'answers'"):
        answers_of({"answers": given}, "rows:1")


def test_a_row_without_a_split_is_of_every_split() -> None:
    rows = [(str(n), {"split": split} if split else {}) for n, split in enumerate(("train", "dev", None))]
    assert [where for where, _ in of_split(rows)] == ["0", "2"]
    assert [where for where, _ in of_split(rows, "dev")] == ["1", "2"]
