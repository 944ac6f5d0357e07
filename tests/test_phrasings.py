"""Self-made questions and continuations: what is measured is never learned."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from families import tiny_model, tiny_tokenizer

from memory3.decoder import Decoder, attach
from memory3.hierarchy.phrasings import drawn, held_continuations, held_questions, plain_context, subject_of
from memory3.spec import MemorySpec
from memory3.train.passages import ContextMaker

TOWER = "# Eiffel Tower\n\nThe Eiffel Tower was completed in 1889 by Gustave Eiffel. It is visited by seven million people every single year, most of them in the summer."


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(reference_length=256)) as decoder:
        yield decoder


def test_a_held_wording_asks_for_an_answer_that_other_wordings_teach() -> None:
    subject = subject_of("a", TOWER)
    assert ("Who completed the Eiffel Tower?", "Gustave Eiffel") in (*subject.asked, *subject.held)
    assert subject.held
    assert not {q for q, _ in subject.held} & {q for q, _ in subject.asked}
    taught = {answer for _, answer in subject.asked}
    assert all(any(answer in other or other in answer for other in taught) for _, answer in subject.held)


def test_a_reference_is_about_its_heading_or_about_the_subject_of_its_first_sentence() -> None:
    without = subject_of("a", "The Suez Canal is a waterway in Egypt. It was opened in 1869.")
    named = subject_of("a", "Suez Canal\nIt was opened in 1869.")
    assert any(q.startswith("When was Suez Canal opened") for q, _ in (*named.asked, *named.held))
    assert any("Suez Canal" in q for q, _ in (*without.asked, *without.held))


def test_what_is_held_is_never_drawn(decoder: Decoder) -> None:
    subject, maker = subject_of("a", TOWER), ContextMaker(decoder)
    held = {tuple(c.ids[: c.target_start]) for c in held_questions(decoder, subject)}
    found = [drawn(maker, subject, 400, random.Random(n)) for n in range(300)]
    prompts = {tuple(c.ids[: c.target_start]) for c in found if c is not None}
    assert held and len(prompts) > 20
    assert not held & prompts


def test_drawn_contexts_are_of_all_kinds_and_no_longer_than_asked(decoder: Decoder) -> None:
    subject, maker = subject_of("a", TOWER), ContextMaker(decoder)
    found = [c for n in range(60) if (c := drawn(maker, subject, 70, random.Random(n))) is not None]
    assert max(len(c.ids) for c in found) == 70
    texts = [decoder.tokenizer.decode(c.ids) for c in found]
    assert any("Question:" in t for t in texts) and any("Question:" not in t for t in texts)


def test_a_text_without_questions_or_words_allows_nothing(decoder: Decoder) -> None:
    short = subject_of("a", "Too short.")
    assert (short.asked, short.held) == ((), ())
    assert drawn(ContextMaker(decoder), short, 64, random.Random(0)) is None


def test_held_continuations_begin_sentences_and_go_on_as_the_text_does(decoder: Decoder) -> None:
    first, second = held_continuations(decoder, subject_of("a", TOWER))
    said = decoder.tokenizer.decode(first.ids[first.target_start :])
    assert (
        decoder.tokenizer.decode(first.ids[len(decoder.bos_ids) : first.target_start])
        == "The Eiffel Tower was completed in 1889 by"
    )
    assert " Gustave Eiffel.".startswith(said) and len(first.ids) - first.target_start == 8
    assert decoder.tokenizer.decode(second.ids[len(decoder.bos_ids) :]).startswith(
        "It is visited by seven million people every"
    )


def test_a_plain_context_is_the_text_behind_its_beginning(decoder: Decoder) -> None:
    context = plain_context(decoder, "Salt melts.", 6)
    assert context.ids == decoder.context("Salt melts.")[:6]
    assert context.target_start == max(1, len(decoder.bos_ids))
