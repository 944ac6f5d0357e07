"""A row of a benchmark names its right answer in one way, or is refused: nothing is guessed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from memory3.evaluate.asking import QUESTION_OF, Question, questions
from memory3.evaluate.given import with_wrong
from memory3.evaluate.qa import _of_one_kind
from memory3.spec import SourceError


def read(**row: Any) -> Question:
    return QUESTION_OF["qa"]({"question": "2 + 2?"} | row, "here")


def refused(words: str, **row: Any) -> None:
    with pytest.raises(SourceError, match=words):
        read(**row)


NUMBERS = ["1", "2", "3", "4"]


@pytest.mark.parametrize("place", range(4))
def test_a_number_is_the_place_of_a_choice_also_among_numbers(place: int) -> None:
    """MMLU names the right choice by its place."""
    for choices in (NUMBERS, ["4", "1", "0", "2"]):
        assert read(choices=choices, answer=place).right == place
        assert read(endings=choices, label=str(place)).right == place


def test_text_that_names_two_choices_is_refused_and_a_letter_is_a_letter() -> None:
    refused("here has answer '2', the text of choice 1 and the number of another", choices=NUMBERS, answer="2")
    assert read(choices=["4", "1", "0", "2"], answer="4").right == 0
    assert read(choices=["L", "R", "1/C", "C"], answer="C").right == 2
    assert read(choices=["True", "False"], answer=False).right == 1


def test_labels_of_the_choices_come_before_their_places() -> None:
    assert read(choices={"text": ["x", "y"], "label": ["1", "2"]}, answerKey="1").right == 0
    assert read(choices={"text": ["x", "y"]}, answerKey="B").right == 1


def test_marks_and_choices_of_another_form_are_refused() -> None:
    for labels in ([0, 0], [1, 1], [1], 1):
        refused("expected a 0 or 1 for each, and one 1", mc1_targets={"choices": ["x", "y"], "labels": labels})
    refused("expected a list of texts", options="A) red B) blue", answer="B")
    refused("expected a list of texts", options=[{"text": "red"}, {"text": "blue"}], answer="A")
    refused("expected a list of texts", choices={"text": "red or blue", "label": ["A", "B"]}, answerKey="A")
    refused("no right one among them", endings=["a", "b"], label="")
    refused("no right one among them", choices=NUMBERS, answer=-1)


def test_wrong_references_do_not_hold_the_right_choice() -> None:
    asked = [read(choices=["Ann", "Bob"], answer="B"), read(choices=["Eve", "Dan"], answer="A")]
    assert [q.quoted for q in asked] == [("Bob",), ("Eve",)]
    assert [b.wrong for b in with_wrong(asked, [("Ann came.",), ("Bob left.", "Ann left.")])] == [
        ("Ann left.",),
        ("Ann came.",),
    ]
    assert QUESTION_OF["qa"]({"claim": "C.", "label": "SUPPORTS"}, "here").quoted == ()


def test_questions_of_natural_questions_and_piqa() -> None:
    assert read(question={"text": "Who? ", "tokens": ["Who"]}, answer="Bob").text == "Who?"
    refused("here has no question among question, answer", question={"tokens": ["Who"]}, answer="Bob")
    piqa = QUESTION_OF["qa"]({"goal": "Open a jar", "sol1": "Pull.", "sol2": "Turn.", "label": 1}, "here")
    assert (piqa.text, piqa.choices, piqa.right) == ("Open a jar", ("Pull.", "Turn."), 1)


def test_a_column_that_holds_nothing_is_passed_over(tmp_path: Path) -> None:
    assert read(answers=[], answer="NYC").answers == ("NYC",)
    assert read(answers={"text": [], "answer_start": []}, answer="NYC").answers == ("NYC",)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["claim", "question", "choices", "answer"], ["", "Where?", " ", "NYC"]])
    assert questions(str(tmp_path / "a.csv")) == [Question("", "Where?", ("NYC",))]


def test_aliases_are_accepted_beside_the_answer() -> None:
    assert read(answer="NYC", answer_aliases=["New York City", "NYC"]).answers == ("NYC", "New York City")
    assert read(answer_aliases=["New York City"]).answers == ("New York City",)


def test_a_verdict_keeps_the_words_of_its_row_and_two_that_contradict_are_no_choice() -> None:
    verdict = read(answer="False")
    assert (verdict.choices, verdict.right, verdict.answers, verdict.quoted) == (("yes", "no"), 1, ("False",), ())
    assert read(answers=["No", "false"]).right == 1
    both = read(answers=["No", "Yes"])
    assert (both.choices, both.answers) == ((), ("No", "Yes"))
    assert read(answers=["no", "Noah"]).quoted == ("Noah",)


def test_among_free_questions_a_verdict_is_matched_by_the_words_of_its_row() -> None:
    asked = [read(answer="False"), read(answer="Bob"), read(choices=["yes", "no"], answer="B")]
    assert [(q.choices, q.answers) for q in _of_one_kind(asked)] == [((), ("False",)), ((), ("Bob",)), ((), ("no",))]
    assert _of_one_kind([asked[0], asked[2]]) == [asked[0], asked[2]]
