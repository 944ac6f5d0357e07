"""Measurements, demo and pictures run on a tiny model, and count what they say they count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families import tiny_model, tiny_tokenizer

from memory3.decoder import Decoder, attach
from memory3.evaluate.demo import run_demo
from memory3.evaluate.reading import SLOTS, Score, dev_cases, measure, short_cases
from memory3.generation import Completion
from memory3.selection import SELECTIONS
from memory3.spec import MemorySpec, SourceError

PNG = b"\x89PNG\r\n"


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=4)) as attached:
        yield attached


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {
            "dataset": dataset,
            "split": split,
            "question": f"When is {n}?",
            "answers": [f"in {1900 + n}", ""],
            "title": f"Page_{n}",
            "passage": f"The thing number {n} was made in {1900 + n} and that is all there is to say of it.",
        }
        for n, (dataset, split) in enumerate(
            [("squad", "dev")] * 6 + [("boolq", "dev"), ("popqa", "dev"), ("squad", "train"), ("popqa", "dev")]
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "qa.parquet")
    return tmp_path


def test_cases_are_dev_questions_whose_reference_holds_the_answer_and_whose_others_do_not(decoder: Decoder, data: Path) -> None:
    cases = dev_cases(decoder, data, 100)
    assert sorted(c.dataset for c in cases) == ["popqa"] * 2 + ["squad"] * 6
    assert cases == dev_cases(decoder, data, 100) != dev_cases(decoder, data, 100, seed=1)
    assert len(dev_cases(decoder, data, 3)) == 3
    for case in cases:
        assert len(decoder.tokens(case.gold)) <= 128
        assert case.answers[0] in case.gold
        assert len(case.others) == 4
        assert not any(case.answers[0] in other for other in case.others)
    with pytest.raises(SourceError, match=r"found no .*qa.parquet"):
        dev_cases(decoder, data / "none", 3)
    (data / "broken").mkdir()
    (data / "broken" / "qa.parquet").write_text("nothing")
    with pytest.raises(SourceError, match="found a damaged .*qa.parquet"):
        dev_cases(decoder, data / "broken", 3)
    pq.write_table(pa.table({"question": ["Who?"], "answers": [["I"]]}), data / "broken" / "qa.parquet")
    with pytest.raises(SourceError, match="found no column dataset in .*, expected dataset, split, question"):
        dev_cases(decoder, data / "broken", 3)


def test_each_measurement_prints_its_rows_with_intervals(
    decoder: Decoder, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "curve.png"
    scores = {
        what: measure(decoder, data, what, 100, picture, 0, lambda *_: None) for what in ("reading", "slots", "selections")
    }
    names = [s.name for s in scores["reading"]]
    for expected in (
        "closed book",
        "wrong memory",
        "sparse memory, only popqa",
        "all tokens, all layers",
        "text in the prompt",
    ):
        assert any(expected in name for name in names)
    assert [s.count for s in scores["reading"] if "only" in s.name] == [2, 6]
    assert len(scores["slots"]) == len(SLOTS)
    assert [s.name for s in scores["selections"]] == list(SELECTIONS)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == sum(map(len, scores.values())) + 3
    assert picture.read_bytes().startswith(PNG)


def test_the_gold_text_is_read_where_it_is_put(decoder: Decoder, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that always repeats the year of the reference it was given is right with gold and wrong without."""
    import memory3.evaluate.reading as reading

    def repeating(decoder: Decoder, prompts: list[object], recall: object = None, **options: object) -> list[Completion]:
        found = [r.references for r in recall([""] * len(prompts))] if recall else [()] * len(prompts)  # type: ignore[operator]
        texts = [next((r.text for r in row if f"number {n}" in r.text), "") for row, n in zip(found, numbers, strict=True)]
        return [Completion(t[t.find("in 19") :][:7] if t else "?", (), "stop", (), None) for t in texts]  # type: ignore[arg-type]

    cases = short_cases(decoder, dev_cases(decoder, data, 100))
    numbers = [c.question.removeprefix("When is ").rstrip("?") for c in cases]
    monkeypatch.setattr(reading, "complete", repeating)
    assert reading.score_of("gold", decoder, cases, lambda c: [c.gold]).exact == 1.0
    assert reading.score_of("mixed", decoder, cases, reading.mixed).exact == 1.0
    assert reading.score_of("wrong", decoder, cases, lambda c: c.others).exact == 0.0
    assert reading.score_of("closed", decoder, cases, None).f1 == 0.0
    with pytest.raises(SourceError, match="found no question"):
        reading.score_of("none", decoder, [], None)


def test_a_part_of_a_score_has_its_own_mean() -> None:
    score = Score("all", (1.0, 0.0, 1.0), (1.0, 0.5, 1.0))
    assert score.part("some", [True, True, False]).exact == 0.5
    assert score.part("some", [False, True, False]).row() == "| some | 1 | 0.0 [0.0, 0.0] | 50.0 [50.0, 50.0] |"


def test_the_demo_writes_asks_and_draws_and_starts_anew_for_another_model(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory3.evaluate.demo.offline_available", lambda: False)  # a hit is counted: words alone
    notes, questions, picture = tmp_path / "notes", tmp_path / "questions.jsonl", tmp_path / "demo.png"
    notes.mkdir()
    (notes / "tower.md").write_text("# Tower\n\nThe tower was completed in 1889.")
    (notes / "salt.md").write_text("# Salt\n\nSalt melts at 801 degrees.")
    questions.write_text("\n".join(json.dumps({"question": q, "answers": ["1889"]}) for q in ("When was the tower?", "Salt?")))
    asked = run_demo(decoder, notes, questions, tmp_path / "bank", picture)
    assert [a.question for a in asked] == ["When was the tower?", "Salt?"]
    assert asked[0].remembered.effect is not None
    assert asked[0].remembered.effect.citations[0].reference.source.endswith("tower.md")
    assert picture.read_bytes().startswith(PNG)
    run_demo(decoder.using(MemorySpec(tokens_per_head=5)), notes, questions, tmp_path / "bank", picture)
    with pytest.raises(SourceError, match="expected the demo's questions"):
        run_demo(decoder, notes, tmp_path / "none", tmp_path / "bank", picture)
