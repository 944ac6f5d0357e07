"""Recall and ranks are counted by the definition, over references that hold the answer, and building goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import FakeEmbedder, tokenizer
from families import tiny_tokenizer

from memory3 import tables
from memory3.catalogue import FOLDER, Catalogue, Hit
from memory3.evaluate import ann, retrieval
from memory3.evaluate.arms import CLOSED, SPARSE
from memory3.evaluate.asking import Question as ToAsk
from memory3.evaluate.found import GOLD, found_for, measure_found
from memory3.evaluate.fusion import CONSTANTS, measure_fusion
from memory3.evaluate.heads import measure_heads
from memory3.evaluate.picture import draw_retrieval
from memory3.evaluate.reading import dev_cases
from memory3.evaluate.retrieval import Found, Question, Tables, built, documents_and_questions, measure_retrieval, ranks
from memory3.loading import load
from memory3.retrieval import Retriever
from memory3.spec import SourceError, SpecError

NAMES = ("Arden", "Borrow", "Cinder", "Dorrit", "Ember", "Fennel", "Garnet", "Hollow")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    passages = [
        {"key": f"/{name}", "title": name, "text": f"{name} is a town with {40 + n} mills."} for n, name in enumerate(NAMES)
    ]
    pq.write_table(pa.Table.from_pylist(passages), folder / "passages.parquet")
    rows: list[dict[str, Any]] = [
        {
            "dataset": ("squad", "popqa", "hybridqa", "boolq")[n % 4],
            "split": "dev" if n < 4 else "train",
            "question": f"How many mills has {name}?",
            "answers": ["yes"] if n % 4 == 3 else [str(40 + n)],
            "title": name,
            "passage": f"{name} is a town with {40 + n} mills."
            if n
            else "Arden is a village of 40 people, with no mill at all.",
            "key": None if n % 2 else f"/{name}",
        }
        for n, name in enumerate(NAMES)
    ]
    rows[0]["key"] = None
    pq.write_table(pa.Table.from_pylist(rows), folder / "qa.parquet")
    return folder


def test_documents_are_all_passages_and_those_of_questions_that_are_not_among_them(data: Path) -> None:
    documents, questions = documents_and_questions(data)
    assert len(documents) == len(NAMES) + 1  # Arden's other passage
    assert documents[questions[0].document].startswith("# Arden\n\nArden is a village")
    assert questions[1].document == "/Borrow"
    assert [q.dataset for q in questions] == ["squad", "popqa", "hybridqa", "boolq"]
    assert questions[0].is_answered_by("with 40 mills") and not questions[0].is_answered_by("none")
    assert questions[3].is_answered_by("anything of its passage")


class Canned(Retriever):
    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.bank: Any = None
        self.answers = answers

    def search(self, queries: Any, k: int) -> list[list[Hit]]:
        return [[Hit(id, 0.0) for id in self.answers[query]][:k] for query in queries]


def test_a_rank_is_that_of_the_first_right_reference() -> None:
    questions = [Question("squad", text, ("x",), "d") for text in ("first", "third", "never")]
    canned = Canned({"first": ["r"], "third": ["a", "b", "r", "r"], "never": ["a"] * 30})
    found, _ = ranks(canned, questions, [{"r"}, {"r", "s"}, {"r"}])
    assert found == [1, 3, 0]
    row = Found("canned", "squad", tuple(found), 1.5, 0, 2**20)
    assert (row.recall(1), row.recall(5)) == ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    assert (
        "| 0.333 [" in row.row()
        and "| 0.667 [" in row.row()
        and "| 0.444 [" in row.row()
        and row.row().endswith("| 2 | 1 | 0 |")
    )


def test_building_goes_on_where_it_stopped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_AT_ONCE", 3)
    documents, _ = documents_and_questions(data)

    def stop(done: int, total: int | None) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    embedder = FakeEmbedder()
    with pytest.raises(KeyboardInterrupt):
        built(documents, tokenizer(), 64, tmp_path, embedder, stop)
    assert len([t for t in embedder.embedded if t.startswith("#")]) == 6
    catalogue, spent = built(documents, tokenizer(), 64, tmp_path, embedder, lambda done, total: None)
    assert len(catalogue) == len(documents) == len([t for t in embedder.embedded if t.startswith("#")])
    assert spent["done"] == len(documents)


def tables_of(data: Path, work: Path, length: int = 64, embedder: FakeEmbedder | None = None) -> Any:
    documents, _ = documents_and_questions(data)
    return built(documents, tokenizer(), length, work, embedder or FakeEmbedder(), lambda done, total: None)


def test_tables_of_other_texts_are_not_searched(data: Path, tmp_path: Path) -> None:
    """Nor of the same texts cut otherwise; the same call again reads what is there."""
    tables_of(data, tmp_path)
    again = FakeEmbedder()
    tables_of(data, tmp_path, embedder=again)
    assert not any(text.startswith("#") for text in again.embedded)
    documents, _ = documents_and_questions(data)
    for texts, by, length in (
        (documents | {"new": "A grown folder."}, tokenizer(), 64),
        ({name: text + "!" for name, text in documents.items()}, tokenizer(), 64),
        (documents, tiny_tokenizer(), 64),
        (documents, tokenizer(), 32),
    ):
        with pytest.raises(SourceError, match="found tables in .* of other texts, another tokenizer or another .* --work"):
            built(texts, by, length, tmp_path, FakeEmbedder(), lambda done, total: None)
    (tmp_path / "build.json").write_text('{"dense": 1.0, "lexical": 1.0, "done": 9}')
    with pytest.raises(SourceError, match="without a note of what they were made from.*: give another --work"):
        tables_of(data, tmp_path)


def test_the_table_has_a_row_per_retriever_and_dataset(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with load() as decoder:
        rows = measure_retrieval(decoder, data, tmp_path, FakeEmbedder(), None, 5, lambda done, total: None)
        assert [(r.retriever, r.dataset) for r in rows] == [
            (retriever, dataset)
            for retriever in ("lexical", "dense", "hybrid", "internal")
            for dataset in ("boolq", "hybridqa", "popqa", "squad", "squad + popqa + simplequestions")
        ]
        assert all(row.recall(5) == [1.0] * len(row.ranks) for row in rows if row.retriever == "lexical")
        draw_retrieval(rows, tmp_path / "found.png")
        assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].startswith("9 documents, 9 references") and len(printed) == 3 + len(rows)
        with pytest.raises(SpecError, match="found retriever 'psychic'"):
            measure_retrieval(decoder, data, tmp_path, FakeEmbedder(), ["psychic"], 5, lambda done, total: None)
        with pytest.raises(SourceError, match="give the folder that holds qa.parquet with --data"):
            measure_retrieval(decoder, tmp_path, tmp_path, FakeEmbedder(), None, 5, lambda done, total: None)


def test_heads_are_measured_on_train_questions(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with load() as decoder:
        chosen = measure_heads(decoder, data, 50, tmp_path / "heads.json", 0, lambda done, total: None)
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| layer") for line in printed) == 32 and printed[-1].startswith("| words alone")
    assert (tmp_path / "heads.json").read_text() == str([list(head) for head in chosen]) + "\n"


def test_exact_search_is_the_whole_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "_AT_ONCE", 30)
    random = np.random.default_rng(0)
    vectors, asked = random.standard_normal((100, 8)).astype(np.float16), random.standard_normal((5, 8)).astype(np.float32)
    order = np.argsort(-(asked @ vectors.astype(np.float32).T), axis=1)[:, :20]
    assert [set(row) for row in ann._exact(vectors, asked, 20)] == [set(row) for row in order]


def test_synthetic_vectors_begin_with_the_real_ones_and_the_rest_are_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "_AT_ONCE", 30)
    real = FakeEmbedder().embed([f"word {n}" for n in range(40)])
    made = np.concatenate([vectors for _, vectors in ann._batches(real, 70, 0)])
    assert made.shape == (70, 64) and (made[:30] == real[:30]).all()
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)


def test_the_approximate_index_is_measured_against_exact_search(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "FEWEST_FOR_ANN", 256)
    documents, _ = documents_and_questions(data)
    built(documents, tokenizer(), 64, tmp_path, FakeEmbedder(), lambda done, total: None)
    ann.measure_ann(data, tmp_path, FakeEmbedder(), 600, 0, lambda done, total: None)
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[0] == "| 600" and row[1] == "4" and float(row[2].split()[0]) > 0.5 and int(row[5]) >= 0
    ann.measure_ann(data, tmp_path, FakeEmbedder(), 600, 1, lambda done, total: None)
    first, second = (Catalogue(tmp_path / f"ann-600-seed-{seed}" / FOLDER).vectors() for seed in (0, 1))
    assert not np.array_equal(first, second)
    with pytest.raises(SourceError, match="run it first"):
        ann.measure_ann(data, tmp_path / "none", FakeEmbedder(), 600, 0, lambda done, total: None)
    with pytest.raises(SpecError, match="vectors of another embedder than fake"):
        ann.measure_ann(data, tmp_path, FakeEmbedder(seed=1), 600, 0, lambda done, total: None)


def test_constants_of_fusion_are_measured_on_train_questions(data: Path, tmp_path: Path) -> None:
    with load() as decoder:
        documents, _ = documents_and_questions(data)
        built(documents, decoder.tokenizer, 128, tmp_path, FakeEmbedder(), lambda done, total: None)
        found = measure_fusion(decoder, data, tmp_path, FakeEmbedder(), 9, 0, lambda done, total: None)
        assert set(found) == set(CONSTANTS) and all(0 < recall <= 1 for recall in found.values())
        with pytest.raises(SourceError, match="run it first"):
            measure_fusion(decoder, data, tmp_path / "none", FakeEmbedder(), 9, 0, lambda done, total: None)
        with pytest.raises(SpecError, match="vectors of another embedder than fake"):
            measure_fusion(decoder, data, tmp_path, FakeEmbedder(seed=1), 9, 0, lambda done, total: None)
        tables_of(data, tmp_path / "other")
        with pytest.raises(SourceError, match="of other texts, another tokenizer"):
            measure_fusion(decoder, data, tmp_path / "other", FakeEmbedder(), 9, 0, lambda done, total: None)


def test_unfinished_tables_are_not_measured_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_AT_ONCE", 3)

    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    documents, _ = documents_and_questions(data)
    with pytest.raises(KeyboardInterrupt):
        built(documents, tokenizer(), 64, tmp_path, FakeEmbedder(), stop)
    with pytest.raises(SourceError, match="stop at text 3: run memory3 eval retrieval again first"):
        ann.measure_ann(data, tmp_path, FakeEmbedder(), 600, 0, lambda done, total: None)


def test_questions_are_answered_from_what_is_found_for_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with load() as decoder:
        documents, _ = documents_and_questions(data)
        catalogue, _ = built(documents, decoder.tokenizer, 128, tmp_path, FakeEmbedder(), lambda done, total: None)
        outcomes = measure_found(decoder, data, tmp_path, FakeEmbedder(), "lexical", 3, 1)
        asked = [ToAsk(dataset=case.dataset, text=case.question, answers=case.answers) for case in dev_cases(decoder, data, 3)]
        brought = found_for(asked, Tables(catalogue, FakeEmbedder(), decoder), "lexical", 1)
        with pytest.raises(SpecError, match="found retriever 'psychic', expected one of"):
            found_for(asked, Tables(catalogue, FakeEmbedder(), decoder), "psychic", 1)
        with pytest.raises(SourceError, match="run it first"):
            measure_found(decoder, data, tmp_path / "none", FakeEmbedder())
    for question, one in zip(asked, brought, strict=True):
        name = question.text.split()[-1].rstrip("?")
        assert name in one.right[0] and name not in one.wrong[0]
    right = sum(question.answers[0] in one.right[0] for question, one in zip(asked, brought, strict=True))
    assert right > 0
    assert [(o.arm, o.references) for o in outcomes if o.arm in (CLOSED, SPARSE)] == [(CLOSED, 0.0), (SPARSE, 1.0)]
    assert outcomes[-1].arm == GOLD and outcomes[-1].references > 1
    assert {len(o.values["exact match"]) for o in outcomes} == {3}
    printed = capsys.readouterr().out
    assert f"{right} of 3 questions find one that holds an answer (lexical)" in printed and GOLD in printed
