"""Lessons of a conversion: cut from documents, taken from rows of questions, merged, and parted so that what is held is not learned."""

from __future__ import annotations

from typing import Any

import pytest
from families import tiny_model, tiny_tokenizer

from memory3.decoder import Decoder, attach
from memory3.documents import Document
from memory3.spec import MemorySpec, SourceError
from memory3.train.teaching import Lesson, asked, lessons, merged, parted

POOL = [*(Lesson(f"Line {n} stands here.", f"Line {n} goes on.") for n in range(3)), Lesson("A last line stands alone.")]


def cutting() -> Decoder:
    """A decoder whose references are 40 tokens at most."""
    return attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=4, reference_length=40))


def test_documents_become_references_that_the_next_one_continues() -> None:
    with cutting() as decoder:
        text = "One sentence stands here alone. Another sentence comes behind it. A third one ends the text."
        told: list[int] = []
        made = lessons(
            decoder, [Document("a", text), Document("b", "Short."), Document("c", text)], lambda n, _: told.append(n)
        )
    assert told == [1, 2, 3]
    assert [lesson.after for lesson in made] == [*(lesson.reference for lesson in made[1:3]), "", ""]
    assert " ".join(lesson.reference for lesson in made[:3]) == text
    assert made[3].reference == "Short."


def test_questions_take_the_piece_that_answers_and_are_left_out_where_nobody_knows() -> None:
    with cutting() as decoder:
        long = "One sentence stands here alone. Another sentence comes behind it. A third one ends the text."
        rows: list[dict[str, Any]] = [
            {"question": "What ends it?", "passage": long, "answers": ["nothing", "third one"]},
            {"question": "What comes last?", "passage": long, "answer": "third one"},
            {"question": "What is it?", "passage": long},
            {"question": "Is it in there?", "passage": long, "answers": ["no such words"]},
            {"question": "How long is it?", "text": "Quite short."},
        ]
        made = asked(decoder, ((f"rows:{n}", row) for n, row in enumerate(rows)))
        assert [(lesson.reference, lesson.questions) for lesson in made] == [
            ("A third one ends the text.", (("What ends it?", "third one"), ("What comes last?", "third one"))),
            ("Quite short.", (("How long is it?", ""),)),
        ]
        with pytest.raises(SourceError, match=r"found the fields 'query' at rows:0, expected texts under 'question'"):
            asked(decoder, [("rows:0", {"query": "what?"})])


def test_no_reference_is_its_own_distractor_and_held_lessons_are_not_learned() -> None:
    joined = merged([*POOL, Lesson(POOL[3].reference, "More.", (("Why?", ""),)), POOL[0]])
    assert [lesson.reference for lesson in joined] == [lesson.reference for lesson in POOL]
    assert (joined[3].after, joined[3].questions) == ("More.", (("Why?", ""),))
    learned, held = parted(POOL, 1, seed=3)
    assert sorted(learned + held, key=POOL.index) == POOL
    assert len(held) == 1


@pytest.mark.parametrize("documents", [1, 40])
def test_nothing_that_held_lessons_are_measured_on_is_learned_as_a_continuation_or_a_reference(documents: int) -> None:
    """Of many documents whole ones are held; a single one is cut in two."""
    with cutting() as decoder:
        texts = [" ".join(f"Line {n} {k} tells of {n * 31 + k}." for k in range(40 // documents + 9)) for n in range(documents)]
        found = lessons(decoder, [Document(f"d{n}", text) for n, text in enumerate(texts)])
        learned, held = parted(found, len(found) // 10)
    assert len(held) == len(found) // 10 and len(learned) + len(held) == len(found)
    known = [{text for one in side for text in (one.reference, one.after) if text} for side in (learned, held)]
    assert not known[0] & known[1]
    assert sum(bool(one.after) for one in held) >= len(held) // 2
