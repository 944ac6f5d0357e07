"""What a model can say is what greedy decoding says, and its probability that of the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny_model, tiny_tokenizer

from memory3.decoder import Decoder, attach
from memory3.hierarchy.phrasings import held_continuations, held_questions, subject_of
from memory3.hierarchy.recollection import Recollection, loss_of, recall_of
from memory3.spec import MemorySpec

TEXT = "The tower was completed by Gustave in 1889, and it stands near the river in Paris with four iron legs and many stairs."


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=4)) as decoder:
        yield decoder


def test_exact_is_what_greedy_decoding_says(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of("a", TEXT)
    [context] = held_continuations(decoder, subject)
    assert recall_of(decoder, [subject], memory=False).continuations.exact == 0
    with torch.no_grad():
        ids = list(context.ids[: context.target_start])
        for _ in range(8):
            ids.append(int(decoder.model(torch.tensor([ids])).logits[0, -1].argmax()))
    own = replace(context, ids=ids)
    monkeypatch.setattr("memory3.hierarchy.recollection.held_continuations", lambda *_: [own])
    assert recall_of(decoder, [subject], memory=False).continuations.exact == 1


def test_probability_is_the_geometric_mean_over_the_target(decoder: Decoder) -> None:
    subject = subject_of("a", TEXT)
    [question, *_] = contexts = held_questions(decoder, subject)
    with torch.no_grad():
        logits = decoder.model(torch.tensor([question.ids])).logits[0].log_softmax(-1)
    places = range(question.target_start, len(question.ids))
    expected = exp(sum(float(logits[p - 1, question.ids[p]]) for p in places) / len(places))
    found = recall_of(decoder, [replace(subject, held=subject.held[:1])], memory=False).questions
    assert (found.count, len(contexts)) == (1, len(subject.held))
    assert found.probability == pytest.approx(expected, rel=1e-4)


def test_a_batch_says_what_each_context_says_alone_and_memory_makes_a_difference(decoder: Decoder) -> None:
    subjects = [subject_of(str(n), text) for n, text in enumerate((TEXT, TEXT.replace("1889", "1901 or a little later")))]
    for memory in (False, True):
        both = recall_of(decoder, subjects, memory=memory).questions
        alone = [recall_of(decoder, [s], memory=memory).questions for s in subjects]
        weighted = sum((a.probability or 0) * a.count for a in alone) / both.count
        assert both.probability == pytest.approx(weighted, rel=1e-3)
    assert both.probability != pytest.approx(recall_of(decoder, subjects, memory=False).questions.probability, rel=1e-3)


def test_without_targets_there_is_no_figure() -> None:
    assert Recollection.of([]) == Recollection(0)
    assert Recollection.of([(0.5, 1.0), (0.25, 0.0)]).probability == 0.375


def test_the_loss_of_a_model_that_knows_nothing_is_the_logarithm_of_the_vocabulary(decoder: Decoder) -> None:
    head: Any = decoder.model.lm_head
    with torch.no_grad():
        head.weight.zero_()
    assert loss_of(decoder, [TEXT, "Salt."]) == pytest.approx(log(VOCABULARY), rel=1e-4)
