"""Benchmarks are read whatever their columns are called, run in every arm at toy size, and nothing leaks into what is scored."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import tiny_model, tiny_tokenizer

from memory3.bank import Bank
from memory3.decoder import Decoder, attach
from memory3.evaluate import likelihood
from memory3.evaluate.arms import CLOSED, SPARSE, TEXT, Arm
from memory3.evaluate.asking import QUESTION_OF, Question, questions
from memory3.evaluate.given import Brought
from memory3.evaluate.likelihood import asked_by_chunks, by_chunk, chosen, foretold, log_probabilities, passages
from memory3.evaluate.qa import Settings, answered, measure_arms, report
from memory3.evaluate.use import use_by_chunk, use_table
from memory3.generation import complete
from memory3.recall import Recall
from memory3.rows import rows
from memory3.spec import MemorySpec, Reference, SourceError
from memory3.writing import write

SPEC = MemorySpec(tokens_per_head=4, reference_length=48, chunk_length=16, references_per_chunk=2)
TEXTS = [f"The tower number {n} was built in {1900 + n}, they say." for n in range(5)]
OPTIONS = {"choices": ["red", "blue", "green"]}


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


@pytest.fixture
def bank(decoder: Decoder, tmp_path: Path) -> Bank:
    made = Bank(tmp_path / "bank", decoder, create=True)
    write(decoder, [Reference(t) for t in TEXTS], made)
    return made


def saved(path: Path, found: Sequence[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(found)), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, found)), "utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(found[0]))
            table.writeheader()
            table.writerows(found)
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_every_kind_of_file_and_a_datasets_folder_give_the_same_questions(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = [
        {"split": split, "question": f"When, {n}?", "answers": [f"in {n}", "then, or 'so'"], "passage": "It was."}
        for n, split in enumerate(["train", "dev", "dev"])
    ]
    (tmp_path / "one").mkdir()
    asked = questions(saved(tmp_path / "one" / f"dev{suffix}", found))
    assert sorted(q.text for q in asked) == ["When, 1?", "When, 2?"]
    assert {q.answers[1] for q in asked} == {"then, or 'so'"}
    assert [q.text for q in questions(str(tmp_path / "one" / f"dev{suffix}"), split="train")] == ["When, 0?"]
    assert len(questions(str(tmp_path / "one" / f"dev{suffix}"), limit=1)) == 1
    if suffix == ".jsonl":
        assert questions(f"hub:{tmp_path / 'one'}") == asked


def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "?"}\n[1]')
    (tmp_path / "b.parquet").write_text("no")
    (tmp_path / "c.jsonl").write_bytes(b'{"question": "\xff"}')
    (tmp_path / "d.jsonl").write_text('{"question": "Why?", "split": "train"}')
    (tmp_path / "e.jsonl").write_text('{"question": "Why?"}')
    for name, words in {
        "none.parquet": "found no file",
        "a.jsonl": r"a.jsonl:2 is a JSON list",
        "b.parquet": "is no Parquet file",
        "c.jsonl": "no UTF-8 at byte",
        "d.jsonl": "found no row of a split other than 'train'",
        "e.jsonl": "e.jsonl:1 has no answer among question",
    }.items():
        with pytest.raises(SourceError, match=words):
            questions(str(tmp_path / name))
    with pytest.raises(SourceError, match="found no row of the datasets squad"):
        questions(str(tmp_path / "e.jsonl"), datasets=["squad"])
    with pytest.raises(SourceError, match="cannot be read"):
        list(rows(f"hub:{tmp_path / 'nothing'}"))


ROWS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"question": "Q?", "possible_answers": '["a", "b"]'}, {"answers": ("a", "b")}),
    ({"question": "Q?", "answer": {"value": "a", "aliases": ["a", "b"]}}, {"answers": ("a", "b")}),
    ({"question": "Q?", "answers": {"text": ["a"], "answer_start": [3]}, "context": "P"}, {"answers": ("a",), "passage": "P"}),
    ({"question": "Q?", "answer": True, "passage": "P"}, {"choices": ("yes", "no"), "right": 0, "passage": "P"}),
    ({"question": "Q?", "answers": ["no"]}, {"choices": ("yes", "no"), "right": 1}),
    ({"question": "Q?", "answer": "B"} | OPTIONS, {"choices": ("red", "blue", "green"), "right": 1}),
    ({"question": "Q?", "answer": 2} | OPTIONS, {"right": 2}),
    ({"question": "Q?", "answer": "blue"} | OPTIONS, {"right": 1}),
    ({"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, {"choices": ("x", "y"), "right": 1}),
    ({"question": "Q?", "mc1": '{"x": 0, "y": 1}'}, {"choices": ("x", "y"), "right": 1}),
    ({"question": "Q?", "mc1_targets": {"choices": ["x", "y"], "labels": [1, 0]}}, {"choices": ("x", "y"), "right": 0}),
    ({"claim": "C.", "label": "REFUTES", "evidence": ["E", "F"]}, {"choices": ("true", "false"), "right": 1, "passage": "E\nF", "whole": "C."}),
    (
        {"instruction": "Please choose the correct answer to the question: Q?\n\nAnswer1: x y Answer2: z\n\nAnswer format: answer1/answer2", "answer": "answer2"},
        {"text": "Q?", "choices": ("x y", "z"), "right": 1},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), ROWS)
def test_columns_adapt(row: dict[str, Any], expected: dict[str, Any]) -> None:
    question = QUESTION_OF["qa"](row, "here")
    assert {name: getattr(question, name) for name in expected} == expected


def test_choices_without_a_right_one_are_refused() -> None:
    for answer in ("E", "purple", 7):
        with pytest.raises(SourceError, match="no right one among them"):
            QUESTION_OF["qa"]({"question": "Q?", "answer": answer} | OPTIONS, "here")
    with pytest.raises(SourceError, match="expected SUPPORTS or REFUTES"):
        QUESTION_OF["qa"]({"claim": "C.", "label": "NOT ENOUGH INFO"}, "here")


def test_the_likelier_completion_is_that_of_the_larger_mean_and_a_tie_is_no_win(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = Question("", "A text", choices=("ten tokens", "one", "ten tokens"), plain=True)
    for nats, right, wins in ((-1.0, 1, 0.0), (-3.0, 1, 1.0), (-1.0, 0, 0.0)):

        def given(arm: Arm, rows: Sequence[Any], tell: Any, nats: float = nats) -> list[list[float]]:
            return [[nats] * 10 if row.end - row.start == len(" ten tokens") else [-2.0] for row in rows]

        monkeypatch.setattr(likelihood, "log_probabilities", given)
        asked = Question("", question.text, choices=question.choices, right=right, plain=True)
        assert chosen(Arm(CLOSED, decoder, "nothing"), [asked], [Brought()]) == [wins]


def test_a_choice_is_scored_behind_its_whole_context_with_its_references(decoder: Decoder) -> None:
    """The rows of a choice are the very sequences that the plain model would be given."""
    plain = Question("", "It was built\n", choices=("in 1900.", "by Ann."), plain=True)
    brought = Brought((TEXTS[0],), (TEXTS[1],))
    closed, text, memory = (
        likelihood._choice_rows(arm, plain, brought)
        for arm in (Arm(CLOSED, decoder, "nothing"), Arm(TEXT, decoder, as_text=True), Arm(SPARSE, decoder))
    )
    assert list(closed[0].ids) == decoder.context("It was built\nin 1900.")
    assert list(text[1].ids) == decoder.context(f"{TEXTS[0]}\n\nIt was built\nby Ann.")
    assert list(memory[1].ids) == decoder.context("It was built\nby Ann.")
    assert memory[0].given == [(TEXTS[0],)]
    assert closed[0].start == len(decoder.context("It was built"))
    asked = Question("", "Who?", choices=("Ann", "Bob"))
    found = likelihood._choice_rows(Arm(TEXT, decoder, as_text=True), asked, brought)
    assert list(found[0].ids) == decoder.context(f"{TEXTS[0]}\n\nQuestion: Who?\nAnswer: Ann")
    long = Question("", "abc " * 600 + "end", choices=("x",), plain=True)
    cut = [likelihood._choice_rows(Arm("", decoder, as_text=t), long, brought)[0] for t in (True, False)]
    assert all(len(row.ids) <= decoder.window for row in cut)
    assert list(cut[0].ids)[-300:] == list(cut[1].ids)[-300:]
    assert list(cut[1].ids) == [*decoder.bos_ids, *decoder.context("abc " * 600 + "end x")[-len(cut[1].ids) + 1 :]]


def test_no_chunk_is_recalled_for_by_itself_or_by_what_follows(decoder: Decoder) -> None:
    text = "".join(TEXTS)
    one = passages(decoder, [text[:200]], length=80)
    assert {len(p.ids) for p in one} == {80}
    two = [type(p)((*p.ids[:40], *reversed(p.ids[40:])), p.text, p.scored_bytes) for p in one]
    first, second = (asked_by_chunks(decoder, p) for p in (one, two))
    many = len(one)
    assert len(first) == 4 * many
    assert [q.text for q in first[: 2 * many]] == [q.text for q in second[: 2 * many]]
    assert [q.text for q in first[3 * many :]] != [q.text for q in second[3 * many :]]
    brought = [Brought((q.text,)) for q in first]
    for s, chunks in enumerate(by_chunk(decoder, one, brought)):
        assert chunks[0] == Brought()
        for c in range(1, 5):
            own = decoder.tokenizer.decode(one[s].ids[(c - 1) * 16 : c * 16], skip_special_tokens=True).strip()
            assert chunks[c].right == (own,)


def test_only_the_tokens_that_a_chunk_foretells_read_what_it_was_given(decoder: Decoder) -> None:
    stretch = passages(decoder, ["".join(TEXTS)], length=64, limit=1)
    base = [Brought(), Brought((TEXTS[0],)), Brought((TEXTS[1],)), Brought((TEXTS[2],))]
    other = [*base[:2], Brought((TEXTS[4],)), base[3]]
    arm = Arm(SPARSE, decoder)
    a, b = (log_probabilities(arm, likelihood._rows_of(arm, stretch[0], chunks))[0] for chunks in (base, other))
    assert len(a) == 64 - 17
    assert a[:16] == pytest.approx(b[:16], abs=1e-5)
    assert max(abs(x - y) for x, y in zip(a[16:32], b[16:32], strict=True)) > 1e-3


def test_text_counts_the_same_tokens_as_memory_and_closed_book_is_the_plain_cross_entropy(decoder: Decoder) -> None:
    stretches = passages(decoder, ["".join(TEXTS)], length=64)
    reads = [[Brought(), *(Brought((t,)) for t in TEXTS[:3])] for _ in stretches]
    closed, text = Arm(CLOSED, decoder, "nothing"), Arm(TEXT, decoder, as_text=True)
    scored = [list(row.ids[row.start : row.end]) for row in likelihood._rows_of(text, stretches[0], reads[0])]
    assert [t for part in scored for t in part] == list(stretches[0].ids[17:])
    found = foretold(closed, stretches, reads)
    ids = torch.tensor([s.ids for s in stretches])
    with torch.no_grad():
        logs = decoder.model(ids).logits.log_softmax(-1)
    nats = -logs[:, 16:-1].gather(2, ids[:, 17:, None])[..., 0]
    assert found["bits per token"] == pytest.approx((nats.mean(1) / torch.tensor(2.0).log()).tolist(), abs=1e-4)
    whole = float(nats.sum() / torch.tensor(2.0).log()) / sum(s.scored_bytes for s in stretches)
    assert sum(found["bits per byte"]) / len(stretches) == pytest.approx(whole, abs=1e-5)
    assert stretches[0].scored_bytes == 64 - 17
    assert foretold(text, stretches, reads)["bits per byte"] != found["bits per byte"]


def test_text_too_short_for_a_stretch_is_refused(decoder: Decoder) -> None:
    with pytest.raises(SourceError, match="found 3 tokens of text"):
        passages(decoder, ["abc"], length=64)
    with pytest.raises(SourceError, match="found stretches of 17 tokens"):
        passages(decoder, TEXTS, length=17)


QA = [{"question": f"When was tower {n} built?", "answers": [f"{1900 + n}"], "passage": t} for n, t in enumerate(TEXTS)]
FACTOR = [{"prefix": t[:30], "completion": t[30:], "contradictions": ["in 1800.", "by Ann.", "of salt."]} for t in TEXTS]
HALU = [
    {"question": "When?", "right_answer": f"{n}", "hallucinated_answer": "never", "knowledge": t} for n, t in enumerate(TEXTS)
]
TASKS: list[tuple[str, list[dict[str, Any]], bool, str]] = [
    ("qa", QA, True, "exact match, %"),
    ("qa", QA, False, "exact match, %"),
    (
        "qa",
        [{"question": "Sky?", "answer": "B"} | OPTIONS, {"question": "Sea?", "answer": "B"} | OPTIONS],
        False,
        "accuracy, %",
    ),
    ("factor", FACTOR, False, "accuracy, %"),
    ("halueval", HALU, True, "accuracy, %"),
    ("lm", [{"text": t} for t in TEXTS], False, "bits per byte"),
]


@pytest.mark.parametrize(("task", "found", "gold", "heading"), TASKS)
def test_each_benchmark_runs_in_every_arm(
    decoder: Decoder, bank: Bank, tmp_path: Path, task: str, found: list[dict[str, Any]], gold: bool, heading: str
) -> None:
    source = saved(tmp_path / "data.parquet", found)
    settings = Settings(source, [] if gold else [bank], gold, retriever=None if gold else "lexical", length=48, limit=2)
    steps: list[tuple[int, int | None]] = []
    outcomes = measure_arms(task, decoder, settings, lambda done, total: steps.append((done, total)))
    lines = report(task, settings, outcomes, tmp_path / "arms.png").splitlines()
    assert lines[0].startswith(f"| arm | n | references | {heading} |")
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [
        CLOSED, TEXT, "dense memory, all layers", SPARSE, *(f"{SPARSE}, codec {name}" for name in ("int8", "int4", "rotated")),
        f"{SPARSE}, wrong references", f"{SPARSE}, untrained (random weights)"
    ]  # fmt: skip
    assert steps[-1][0] == steps[-1][1]
    assert (tmp_path / "arms.png").is_file()
    again = measure_arms(task, decoder, settings, lambda *_: None)
    assert [o.values for o in again] == [o.values for o in outcomes]


def test_settings_that_say_nothing_or_two_things_are_refused(decoder: Decoder, bank: Bank, tmp_path: Path) -> None:
    source = saved(tmp_path / "a.jsonl", [*QA, {"question": "Sky?", "answer": "B"} | OPTIONS])
    for task, settings, words in (
        ("speed", Settings(source, [bank]), "found eval 'speed'"),
        ("qa", Settings(source), "found no bank and no --gold"),
        ("qa", Settings(source, [bank], gold=True), "found both"),
        ("lm", Settings(source, gold=True), "found --gold for lm"),
        ("lm", Settings(source, [bank]), "has no text among"),
        ("qa", Settings(source, [bank]), "with and without choices"),
    ):
        with pytest.raises(SourceError, match=words):
            measure_arms(task, decoder, settings, lambda *_: None)


def test_every_chunk_of_a_long_question_reads_what_is_given(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions of the same words and other references do not share them, also when an answer outlives its chunk."""
    asked = [Question("", "Was it built? " * 3, ("x",))] * 2
    seen: list[list[int]] = []
    original = Decoder.reading

    def noted(self: Decoder, chunks: Any, memories: Any, trace: Any = None) -> Any:
        seen.extend([len(chunk) for chunk in row] for row in memories)
        return original(self, chunks, memories, trace)

    def long(decoder: Decoder, prompts: Any, **options: Any) -> Any:
        config = deepcopy(decoder.model.generation_config)
        config.min_new_tokens = 24
        return complete(decoder, prompts, config=config, **options)

    monkeypatch.setattr(Decoder, "reading", noted)
    monkeypatch.setattr("memory3.evaluate.reading.complete", long)
    answered(Arm(SPARSE, decoder), asked, [Brought((TEXTS[0],)), Brought((TEXTS[1], TEXTS[2]))])
    prompt, first, second = len(seen[0]), seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert prompt > 3
    assert first == [[1] * prompt, [1], [1]]  # the prompt, and two chunks of the answer
    assert second == [[2] * prompt, [2], [2]]


def test_use_by_chunk_adds_up_to_the_effect_of_the_whole_answer(decoder: Decoder, bank: Bank) -> None:
    recall = Recall(bank, retriever="lexical")
    prompts = ["Which tower was built in 1903?", "The tower"]
    found = use_by_chunk(decoder, prompts, recall, tokens=40)
    config = decoder.model.generation_config
    config.min_new_tokens = 40
    try:
        whole = complete(decoder, prompts, recall=recall, max_new_tokens=40, effect=True)
    finally:
        config.min_new_tokens = None
    for answer, done in zip(found, whole, strict=True):
        assert done.effect is not None
        assert answer[0].references == 2
        assert len(answer) == 3
        weights = [16 / 40, 16 / 40, 8 / 40]
        mass = sum(done.effect.attention_mass.values()) / len(done.effect.attention_mass)
        assert sum(w * c.mass for w, c in zip(weights, answer, strict=True)) == pytest.approx(mass, abs=1e-5)
        assert sum(w * c.shift for w, c in zip(weights, answer, strict=True)) == pytest.approx(
            done.effect.logit_shift, abs=1e-4
        )
    lines = use_table(found).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| chunk 0", "| chunk 1", "| chunk 2", "| all after the first"]


def test_without_memories_nothing_is_used(decoder: Decoder, bank: Bank) -> None:
    nothing = use_by_chunk(decoder, ["The tower"], Recall(bank, retriever="lexical", min_score=1e9), tokens=17)
    assert [(c.mass, c.shift, c.references) for c in nothing[0]] == [(0.0, 0.0, 0)] * 2
    with pytest.raises(SourceError, match="found no prompt"):
        use_by_chunk(decoder, [], Recall(bank, retriever="lexical"))


def test_a_free_question_that_happens_to_be_answered_with_no_is_a_free_question(decoder: Decoder, tmp_path: Path) -> None:
    found = [
        {"question": f"Is it {n}?", "answers": ["No" if n == 2 else f"word{n}"], "passage": f"It is word{n}, no doubt."}
        for n in range(6)
    ]
    source = saved(tmp_path / "mixed.parquet", found)
    outcomes = measure_arms("qa", decoder, Settings(source, gold=True, untrained=None), lambda done, total: None)
    assert set(outcomes[0].values) == {"exact match", "f1"}
    assert len(outcomes[0].values["f1"]) == 6
    only = saved(tmp_path / "only.parquet", [{**row, "answers": ["no"]} for row in found])
    outcomes = measure_arms("qa", decoder, Settings(only, gold=True, untrained=None), lambda done, total: None)
    assert set(outcomes[0].values) == {"accuracy"}
