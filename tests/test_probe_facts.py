"""Files of facts: what is read, what stands between a beginning and its answer, and what is refused by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memory3.probe.facts import Fact, Realization, facts_of, relations
from memory3.spec import SourceError

EXAMPLES = Path(__file__).parents[1] / "examples" / "facts.jsonl"
GOOD: dict[str, Any] = {
    "id": "a",
    "relation": "founder",
    "text": "A was founded by B.",
    "realizations": [
        {"prompt": "Who founded A?", "answers": ["B", "old B"]},
        {"prompt": "Founder of A:\n", "answers": [" B "]},
    ],
}


def read(folder: Path, *lines: Any) -> list[Fact]:
    file = folder / "facts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return facts_of(file)


def test_a_space_stands_between_beginning_and_answer_unless_the_beginning_has_its_own(tmp_path: Path) -> None:
    first, second = read(tmp_path, GOOD)[0].realizations
    assert first.parts == ("Who founded A?", (" B", " old B"))
    assert second.parts == ("Founder of A:", ("\nB",))
    assert (first.text, second.text) == ("Who founded A? B", "Founder of A:\nB")


def test_a_fact_is_specific_where_the_realizations_share_an_answer() -> None:
    def of(*answers: tuple[str, ...]) -> Fact:
        return Fact("a", "r", "text", tuple(Realization("p", one) for one in answers))

    assert of(("1889", "in 1889"), ("In 1889.",)).specific
    assert not of(("1889",), ("1890",)).specific
    assert not of(("x", "y"), ("y", "z"), ("z", "x")).specific  # any two agree, all three do not


def test_empty_lines_are_passed_over_and_relations_keep_their_order(tmp_path: Path) -> None:
    facts = read(tmp_path, GOOD, "", {**GOOD, "id": "b", "relation": "age"}, {**GOOD, "id": "c"})
    assert [fact.id for fact in facts] == ["a", "b", "c"]
    assert relations(facts) == ["founder", "age"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ((), "found no fact in"),
        ((GOOD, "{"), "facts.jsonl:2"),
        ((["x"],), "found no 'id' at .*:1"),
        (({**GOOD, "text": " "},), "found no 'text' at"),
        (({**GOOD, "realizations": GOOD["realizations"][:1]},), "fewer than two realizations at"),
        (({**GOOD, "realizations": "some"},), "fewer than two realizations at"),
        (({**GOOD, "realizations": [{"prompt": "p", "answers": "B"}] * 2},), "found no answers of 'p' at"),
        (({**GOOD, "realizations": [{"prompt": "p", "answers": ["B", ""]}] * 2},), "found no answers of 'p' at"),
        (({**GOOD, "realizations": [{"answers": ["B"]}] * 2},), "found no 'prompt' at"),
        ((GOOD, GOOD), "two facts with the id 'a'"),
    ],
)
def test_a_file_that_is_no_list_of_facts_is_refused_with_the_line(tmp_path: Path, lines: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        read(tmp_path, *lines)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="found no readable facts in"):
        facts_of(tmp_path / "nowhere.jsonl")


def test_the_examples_are_facts_whose_first_answer_stands_in_the_text_where_they_are_specific() -> None:
    facts = facts_of(EXAMPLES)
    assert len(facts) > 10
    assert len(relations(facts)) > 3
    assert {fact.specific for fact in facts} == {True, False}
    assert all(one.answers[0] in fact.text for fact in facts if fact.specific for one in fact.realizations)
