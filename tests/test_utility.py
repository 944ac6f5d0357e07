"""A reference is worth what its absence costs, the others kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer

from memory3.answering import question_prompt
from memory3.bank import Bank
from memory3.decoder import Decoder, attach
from memory3.evaluate.utility import (
    Use,
    Utility,
    Worth,
    measure_utility,
    question_use,
    text_uses,
    uses_of,
    utilities,
)
from memory3.generation import Prompt
from memory3.recall import Recall, Recalled
from memory3.spec import Memory, MemorySpec, Reference, SourceError
from memory3.writing import write

SPEC = MemorySpec(tokens_per_head=4, chunk_length=40, reference_length=32, references_per_chunk=2)
FOX, DOG, SKY = (Reference(t) for t in ("A fox is a wild dog.", "Dogs are lazy.", "The sky is blue."))


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


@pytest.fixture
def bank(decoder: Decoder, tmp_path: Path) -> Iterator[Bank]:
    with Bank(tmp_path / "bank", decoder, create=True) as opened:
        write(decoder, [FOX, DOG, SKY], opened)
        yield opened


def use(decoder: Decoder, question: str, answer: str) -> Use:
    found = question_use(decoder, question, answer)
    assert found is not None
    return found


def loss(decoder: Decoder, use: Use, memories: Sequence[Memory]) -> float:
    """The slow way: one sequence, everything scored, the answer picked."""
    layout = decoder.layout([[*use.prompt.ids, *use.answer]], grid=[[0] * (len(use.prompt.ids) + len(use.answer))])
    with torch.no_grad():
        scores = decoder.forward(layout, decoder.reading(layout.chunks, [[memories]])).logits[0].log_softmax(-1)
    places = range(scores.shape[0] - len(use.answer) - 1, scores.shape[0] - 1)
    return -sum(float(scores[p, t]) for p, t in zip(places, use.answer, strict=True)) / len(use.answer)


def test_utility_is_the_loss_without_a_reference_less_the_loss_with_all(decoder: Decoder, bank: Bank) -> None:
    asked = use(decoder, "Is a fox a dog?", "Yes")
    recall = Recall(bank, references=[FOX.id, DOG.id])
    fox, dog = bank.read([FOX.id, DOG.id])
    worth = utilities(decoder, recall, [asked], 1)
    both, of_fox, of_dog, none = (loss(decoder, asked, m) for m in ([fox, dog], [fox], [dog], []))
    found = {one.id: one.mean for one in worth.ranked}
    assert found == pytest.approx({FOX.id: of_dog - both, DOG.id: of_fox - both}, abs=1e-4)
    assert worth.with_memory == pytest.approx([both], abs=1e-4)
    assert worth.without == pytest.approx([none], abs=1e-4)
    assert abs(found[FOX.id] - found[DOG.id]) > 1e-3


def test_uses_are_counted_and_averaged_and_batches_change_nothing(decoder: Decoder, bank: Bank) -> None:
    uses = [use(decoder, "Is the dog lazy?", "Yes"), use(decoder, "The fox?", "No"), use(decoder, "Which sky is lazy?", "blue")]
    recall, told = Recall(bank, retriever="lexical"), []
    together = utilities(decoder, recall, uses, 3, lambda done, total: told.append((done, total)), batch=2)
    alone = [utilities(decoder, recall, [one], 1, batch=1) for one in uses]
    values: dict[str, list[float]] = {}
    for one in (u for worth in alone for u in worth.ranked):
        values.setdefault(one.id, []).append(one.mean)
    assert {one.id: one.uses for one in together.ranked} == {id: len(v) for id, v in values.items()}
    assert max(one.uses for one in together.ranked) == 2
    assert {o.id: o.mean for o in together.ranked} == pytest.approx({i: sum(v) / len(v) for i, v in values.items()}, abs=1e-4)
    assert [o.mean for o in together.ranked] == sorted((o.mean for o in together.ranked), reverse=True)
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_the_prompt_alone_is_searched_with(decoder: Decoder, bank: Bank) -> None:
    recall = Recall(bank, retriever="lexical")
    worth = utilities(decoder, recall, [use(decoder, "Is it lazy?", "the blue sky")], 1)
    assert [one.id for one in worth.ranked] == [DOG.id]
    nothing = Use(Prompt((1,), (False,)), (5,), "")
    with pytest.raises(SourceError, match="no reference that any prompt recalls"):
        utilities(decoder, recall, [nothing], 1)


def test_a_text_is_cut_into_chunks_and_what_follows_each(decoder: Decoder) -> None:
    text = "".join(chr(97 + n % 26) for n in range(100))
    uses = text_uses(decoder, text)
    words = [(decoder.tokenizer.decode(u.prompt.ids[1:]), decoder.tokenizer.decode(u.answer)) for u in uses]
    assert words == [(text[:39], text[39:79]), (text[39:78], text[78:100])]
    assert [u.whole for u in uses] == [text, text[39 - 32 :]]  # a reference of 32 tokens on each side
    assert all(u.prompt.ids[0] == decoder.bos_ids[0] and len(u.prompt.ids) == len(u.prompt.content) for u in uses)
    assert text_uses(decoder, "short") == []


def test_a_file_of_questions_is_measured_ranked_and_written(decoder: Decoder, bank: Bank, tmp_path: Path, capsys: Any) -> None:
    rows = [{"question": "The fox?", "answer": "a dog"}, {"question": "The sky?", "answers": ["blue"]}]
    long = {"question": "long " * 20, "answer": "x"}
    file, out, drop = (tmp_path / name for name in ("asked.jsonl", "new/worth.json", "other/drop.txt"))
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, long]))
    worth = measure_utility(decoder, Recall(bank, retriever="lexical"), file, out, drop, least=1e9)
    written = json.loads(out.read_text())
    assert written["prompts"] == 2
    assert [r["id"] for r in written["references"]] == [one.id for one in worth.ranked]
    assert {r["id"]: r["utility"] for r in written["references"]}[SKY.id] == pytest.approx(
        next(one.mean for one in worth.ranked if one.id == SKY.id)
    )
    assert drop.read_text().split() == [one.id for one in reversed(worth.ranked)]
    assert f"| {SKY.id} | 1 |" in capsys.readouterr().out
    assert bank.delete(drop.read_text().split()) == len(worth.ranked)


class Noting:
    """Recalls nothing, and notes what the overlap filter would compare with."""

    min_score = None

    def __init__(self) -> None:
        self.texts: list[str] = []

    def check(self, decoder: Any) -> None:
        pass

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        self.texts += texts or ()
        return [Recalled(query) for query in queries]


def test_a_text_of_the_bank_is_not_copied_from_it(decoder: Decoder) -> None:
    """However the bank has cut it: the overlap filter sees every reference that holds a scored token as a whole."""
    text = "".join(f"{n:03d}" for n in range(100))
    uses, noting = text_uses(decoder, text), Noting()
    for n, one in enumerate(uses, 1):
        first, end = 39 * n, 39 * n + len(one.answer)
        touching = range(first - 31, min(end, len(text) - 31))
        assert all(text[start : start + 32] in one.whole for start in touching)
        assert len(one.whole) <= 39 + 40 + 2 * 32
    asked = use(decoder, "Is a fox a dog?", "Yes")
    with pytest.raises(SourceError, match="no reference that any prompt recalls"):
        utilities(decoder, noting, [*uses, asked], 1)
    assert noting.texts == [*(one.whole for one in uses), "Is a fox a dog? Yes"]


def test_only_what_is_below_the_least_is_dropped() -> None:
    worth = Worth((Utility("a", 1, 0.5), Utility("b", 2, 0.0), Utility("c", 1, -0.5)), (), ())
    assert worth.below(0.0) == ["c"]
    assert worth.below(0.1) == ["c", "b"]


@pytest.mark.parametrize(
    "line", ['{"question": "a?"}', '{"question": "", "answer": "b"}', "a?", '{"question": "a", "answers": []}', "[1]"]
)
def test_a_line_without_question_and_answer_is_refused(decoder: Decoder, tmp_path: Path, line: str) -> None:
    (tmp_path / "asked.jsonl").write_text(f'{{"question": "q", "answer": "a"}}\n{line}\n')
    with pytest.raises(SourceError, match=r"asked\.jsonl:2"):
        uses_of(decoder, tmp_path / "asked.jsonl")


def test_a_file_that_holds_nothing_to_measure_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(SourceError, match="nothing to measure"):
        uses_of(decoder, tmp_path / "short.txt")
    with pytest.raises(SourceError, match="no readable"):
        uses_of(decoder, tmp_path / "none.txt")
    assert question_prompt(decoder, "q").ids  # the prompt that question_use builds on
