"""What a reader trains on: questions whose answers stand in their sentences, and pointers that lead to the answers."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from fakes import tokenizer
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from memory3.attention import Reading, Trace
from memory3.decoder import Decoder, attach
from memory3.spec import MemorySpec
from memory3.train.initialise import word_vectors
from memory3.train.passages import ContextMaker, Passage, Window, window_of
from memory3.train.questions import questions_of
from memory3.train.reading import Batch, Phase, ReadingObjective, pointer_loss, table_of

PAGE = Passage(
    "Eiffel_Tower",
    "The Eiffel Tower is a lattice tower in Paris. It was completed in 1889 by Gustave Eiffel. It stands 330 metres tall. "
    "Gustave Eiffel designed the tower and moved to Paris in 1850. It is named after the engineer Gustave Eiffel.",
    (("When was it done?", "1889"), ("Who made it?", "Gustave Eiffel")),
)
PHASE = Phase(
    until=9,
    references=((2, 1.0),),
    slots=((None, 1.0),),
    tasks=(("asked", 1.0), ("question", 1.0), ("cloze", 1.0), ("completion", 1.0)),
    asked_share=0.5,
    reference_loss=0.1,
    neighbour=0.5,
    batch=4,
)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    endless = tokenizer()
    endless.eos_token = "<s>"
    with attach(tiny_model("llama", vocab_size=400), endless, MemorySpec(tokens_per_head=None)) as attached:
        yield attached


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("It was completed in 1889 by Gustave Eiffel.", "When was Eiffel Tower completed?", "1889"),
        ("It was completed in 1889 by Gustave Eiffel.", "Who completed Eiffel Tower?", "Gustave Eiffel"),
        ("Ada Lovelace (10 December 1815 - 27 November 1852) was a writer.", "When did Eiffel Tower die?", "27 November 1852"),
        ("The Eiffel Tower is a lattice tower in Paris.", "What is Eiffel Tower?", "lattice tower"),
        ("Alexander Fleming discovered penicillin in 1928.", "Who discovered penicillin?", "Alexander Fleming"),
        ("She moved to Paris in 1850.", "Where did Eiffel Tower move to?", "Paris"),
        ("The film was directed by Jane Doe.", "Who was the director of Eiffel Tower?", "Jane Doe"),
        ("It stands 330 metres tall.", "How tall is Eiffel Tower?", "330 metres"),
        ("It is named after Gustave Eiffel.", "What is Eiffel Tower named after?", "Gustave Eiffel"),
    ],
)
def test_each_rule_asks_for_what_a_sentence_says(sentence: str, question: str, answer: str) -> None:
    """One case a rule; the subject of a pronoun is the title of the page."""
    assert (question, answer) in questions_of("Eiffel_Tower", sentence)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            "It was born in Paris , . ( ) 1889 by the Jane Doe is a of and who May 3 named after moved to".split()  # noqa: SIM905
        )
    ).map(" ".join)
)
def test_an_answer_stands_in_its_sentence_and_not_in_its_question(sentence: str) -> None:
    for question, answer in questions_of("Some Page (place)", sentence):
        assert answer in sentence
        assert answer not in question
        assert question.strip()


def test_pointers_lead_to_the_tokens_of_the_answer(decoder: Decoder) -> None:
    maker, window = ContextMaker(decoder), Window.of(decoder, PAGE.text)
    rng = random.Random(0)
    for kind in ("asked", "question", "cloze", "completion"):
        made = [maker.made(kind, PAGE, window, rng) for _ in range(20)]
        fitting = [context for context in made if context is not None]  # others have too long a prompt
        assert fitting
        for context in fitting:
            target = context.ids[context.target_start :]
            pointed = [(t, p) for t, places in zip(target, context.pointers, strict=False) for p in places]
            assert pointed
            same = [
                decoder.tokenizer.decode([t]).strip() == decoder.tokenizer.decode([window.ids[p]]).strip() for t, p in pointed
            ]
            assert sum(same) / len(same) > 0.7  # at a word's edge the tokenizer may cut differently
    twice = maker.question("Who?", "Gustave Eiffel", window, rng)
    assert twice is not None
    assert len(twice.pointers[0]) == PAGE.text.count("Gustave Eiffel")


def test_a_window_holds_the_answer_within_its_budget(decoder: Decoder) -> None:
    rng = random.Random(0)
    for budget in (30, 60, 128):
        for _ in range(20):
            window = window_of(decoder, PAGE, "1889", rng, budget)
            assert "1889" in window.text or budget < 60
            assert len(window.ids) <= 128
            assert decoder.tokenizer.decode(window.ids) == window.text


def test_a_batch_is_a_function_of_its_step_and_each_context_reads_its_own_reference(decoder: Decoder) -> None:
    objective = ReadingObjective(decoder, [PAGE], [PAGE], (PHASE,))
    assert objective.batch(3) == objective.batch(3) != objective.batch(4)
    batch = objective.batch(3)
    table = table_of(batch)
    assert table.shape == (len(batch.contexts), 2)
    assert all(own in row for own, row in zip(batch.about, table.tolist(), strict=True))
    loss, figures = objective.loss(decoder, batch, 3)
    loss.backward()
    assert torch.isfinite(loss)
    assert figures["pointer"] > 0
    decoder.model.zero_grad()


def test_the_pointer_loss_is_the_attention_that_a_plain_sum_finds(decoder: Decoder) -> None:
    """One context with one pointed token: the loss is minus the logarithm of the mean weight of the first query heads."""
    maker, window = ContextMaker(decoder), Window.of(decoder, "Done in 1889.")
    made = maker.question("When was it done?", "1889", window, random.Random(0))
    assert made is not None
    made = type(made)(made.ids, made.target_start, [made.pointers[0]])
    other = decoder.tokens("Salt.")
    batch = Batch([other, window.ids], [made], [1], 2, None, "memory", 0)
    table, layer = torch.tensor([[0, 1]]), decoder.spec.layers[-1]  # type: ignore[index]
    layout, trace = decoder.layout([made.ids]), Trace(tokens_too=True, gradient=True, layers=(layer,))
    reading = Reading(decoder.stack(batch.references), table[:, None], layout.chunks, decoder.spec, trace)
    decoder.forward(layout, reading)
    assert set(trace.tokens) == {layer}
    start = len(decoder.prefix_ids) + made.target_start
    [token] = made.pointers[0]
    weights = trace.tokens[layer][0, start - 1, ::2, 1, token]  # two query heads for each of two kv heads
    loss = pointer_loss(decoder, reading, batch, table, [start])
    assert float(loss.detach()) == pytest.approx(-float(weights.mean().log().detach()), rel=1e-5)
    loss.backward()
    assert float(decoder.model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum()) > 0
    decoder.model.zero_grad()


def test_words_used_alike_get_like_vectors() -> None:
    """`cat` and `dog` stand in the same places, `stone` in others."""
    rng = random.Random(0)
    cat, dog, stone, runs, eats, lies, cold = range(1, 8)
    texts = [[rng.choice([cat, dog]), rng.choice([runs, eats]), 0] for _ in range(300)]
    texts += [[stone, rng.choice([lies, cold]), 0] for _ in range(300)]
    vectors = word_vectors([torch.tensor(t).numpy() for t in texts], vocabulary=9, dim=4, reach=2)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(9), atol=1e-5)
    assert float(vectors[cat] @ vectors[dog]) > float(vectors[cat] @ vectors[stone]) + 0.3
