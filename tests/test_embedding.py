"""Vectors: one space per bank, checked by a probe; found by meaning; kept in step with the texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from fakes import CORPUS, FakeDecoder, FakeEmbedder
from typer.testing import CliRunner

from memory3 import embedding, tables
from memory3.bank import Bank
from memory3.catalogue import FOLDER, Catalogue, Entry
from memory3.cli import app
from memory3.embedding import OFFLINE, SentenceEmbedder, VectorSpace
from memory3.rebuilding import rebuild
from memory3.recall import Recall
from memory3.retrieval import Dense, Hybrid, Lexical, default_retriever, fused
from memory3.spec import BankError, BankMismatch, Reference, SpecError
from memory3.verifying import traces_of, verify
from memory3.writing import write

TEXTS = [
    "The bakery opens before dawn and sells rye bread.",
    "Whales breathe air and feed their young with milk.",
    "The bridge was built of steel in 1932.",
    "Copper conducts electricity better than iron.",
]
MEANT = {
    "Where can I buy a loaf early in the morning?": 0,
    "Which sea mammal nurses its calves?": 1,
    "A metal for electrical cables": 3,
}


@pytest.fixture(scope="module")
def sentences() -> SentenceEmbedder:
    return SentenceEmbedder()


def made(path: Path, embedder: Any, texts: list[str] = CORPUS) -> Bank:
    decoder = FakeDecoder()
    bank = Bank(path, decoder, create=True, embedder=embedder)
    write(decoder, [Reference(text, f"{n}.txt") for n, text in enumerate(texts)], bank)
    return bank


def test_a_question_finds_the_text_that_means_it_without_sharing_a_word(tmp_path: Path, sentences: SentenceEmbedder) -> None:
    bank = made(tmp_path / "bank", sentences, TEXTS)
    found = Dense(bank).search(list(MEANT), 1)
    assert [hits[0].id for hits in found] == [Reference(TEXTS[n]).id for n in MEANT.values()]
    assert Lexical(bank).search(list(MEANT)[:1], 1) == [[]]
    again = Bank(tmp_path / "bank", FakeDecoder())  # loads its embedder by name
    assert Recall(again).retriever == "hybrid"
    assert Dense(again).search(list(MEANT), 1) == found
    assert again.stats()["embedder"] == OFFLINE


def test_offline_vectors_are_unit_and_the_same_alone_or_in_a_batch(sentences: SentenceEmbedder) -> None:
    together = sentences.embed([*TEXTS, "word " * 400])
    assert together.dtype == np.float32 and together.shape == (5, 384)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for n, text in enumerate(TEXTS):
        np.testing.assert_allclose(sentences.embed([text])[0], together[n], atol=1e-5)


def test_half_precision_is_the_same_space(sentences: SentenceEmbedder) -> None:
    VectorSpace.of(sentences).check("bank", SentenceEmbedder(dtype="bfloat16"))


def test_nearest_is_the_cosine_in_descending_order(tmp_path: Path) -> None:
    embedder = FakeEmbedder()
    bank = made(tmp_path, embedder)
    [hits] = bank.nearest([CORPUS[1]], len(CORPUS))
    cosines = dict(zip((Reference(t).id for t in CORPUS), embedder.embed(CORPUS) @ embedder.embed([CORPUS[1]])[0], strict=True))
    assert [hit.id for hit in hits] == sorted(cosines, key=lambda id: (-round(float(cosines[id]), 6), id))
    assert [hit.score for hit in hits] == pytest.approx([cosines[hit.id] for hit in hits], abs=2e-3)  # float16
    assert bank.nearest([], 3) == [] and bank.nearest(["x"], 0) == [[]]


def test_fusion_is_the_sum_of_reciprocal_ranks() -> None:
    from memory3.retrieval import Hit

    first, second = [Hit("a", 9.0), Hit("b", 8.0)], [Hit("b", 0.9), Hit("c", 0.8)]
    assert fused([first, second], 9) == [Hit("b", 1 / 5 + 1 / 4), Hit("a", 1 / 4), Hit("c", 1 / 5)]
    assert fused([first, []], 1, 60) == [Hit("a", 1 / 61)]


def test_hybrid_finds_what_either_list_finds(tmp_path: Path) -> None:
    bank = made(tmp_path, FakeEmbedder())
    [hits] = Hybrid(bank).search([CORPUS[0]], 3)
    assert hits[0].id == Reference(CORPUS[0]).id and hits[0].score == pytest.approx(2 / 4)


def test_another_embedder_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    made(tmp_path / "bank", FakeEmbedder())
    with pytest.raises(BankMismatch, match="has vectors of fake .* memory3 bank embed"):
        Bank(tmp_path / "bank", FakeDecoder(), embedder=FakeEmbedder("other", seed=1))
    made(tmp_path / "plain", None)
    with pytest.raises(BankError, match="has no vectors, expected some of fake"):
        Bank(tmp_path / "plain", FakeDecoder(), embedder=FakeEmbedder())
    with pytest.raises(BankError, match="memory3 bank embed"):
        Dense(Bank(tmp_path / "plain", FakeDecoder())).search(["tower"], 1)


def test_a_bank_without_vectors_gets_them_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, embedder = made(tmp_path, None), FakeEmbedder()
    assert default_retriever([bank]) == "lexical"

    class Killed(Exception):
        pass

    def killed(done: int, total: int | None) -> None:
        raise Killed

    with pytest.raises(Killed):
        bank.embed(embedder, batch_size=2, on_progress=killed)
    again = Bank(tmp_path, FakeDecoder(), embedder=embedder)
    assert again.embed(embedder, batch_size=2) == len(CORPUS) - 2
    assert again.nearest([CORPUS[2]], 1) == made(tmp_path / "new", embedder).nearest([CORPUS[2]], 1)
    assert again.embed(embedder) == 0
    other = FakeEmbedder("other", seed=1)
    assert again.embed(other) == len(CORPUS)
    assert again.space == VectorSpace.of(other)
    assert again.embed(None) == 0 and again.space is None
    assert Lexical(again).search([CORPUS[0]], 1)[0][0].id == Reference(CORPUS[0]).id


def test_new_memories_of_a_bank_with_vectors_are_found_at_once_and_deleted_ones_never(tmp_path: Path) -> None:
    bank = made(tmp_path, FakeEmbedder())
    extra = Reference("a brand new sentence", "new.txt")
    assert bank.decoder is not None
    write(bank.decoder, [extra], bank)
    [[hit]] = bank.nearest([extra.text], 1)
    assert hit.id == extra.id
    bank.delete([extra.id])
    assert extra.id not in {hit.id for hit in bank.nearest([extra.text], 9)[0]}
    bank.compact()
    assert bank.nearest([CORPUS[0]], 1)[0][0].id == Reference(CORPUS[0]).id
    assert verify(bank).problems == []


def test_an_approximate_index_finds_the_same_and_forgets_with_the_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FEWEST_FOR_ANN", 256)
    embedder, random = FakeEmbedder(), np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.integers(0, 500, 12)) for _ in range(400)]
    bank = made(tmp_path, embedder, texts)
    columns = [column for index in bank._catalogue._memories.raw.list_indices() for column in index.columns]
    assert tables.VECTOR in columns
    for text in texts[:20]:
        assert bank.nearest([text], 1)[0][0].id == Reference(text).id
    gone = Reference(texts[7])
    bank.delete([gone.id])
    assert gone.id not in {hit.id for hit in bank.nearest([texts[7]], 50)[0]}
    assert traces_of(bank, texts[7]) == []


def test_an_approximate_index_keeps_its_parts_until_it_is_outgrown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FEWEST_FOR_ANN", 256)
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.integers(0, 500, 12)) for _ in range(460)]
    bank = made(tmp_path, FakeEmbedder(), texts[:400])

    def parts() -> tuple[int, int]:
        table = bank._catalogue._memories
        [name] = [index.name for index in table.raw.list_indices() if tables.VECTOR in index.columns]
        [segment] = table.dataset().stats.index_stats(name)["indices"]
        return segment["num_partitions"], table.raw.index_stats(name).num_unindexed_rows

    assert parts() == (20, 0)
    assert bank.decoder is not None
    for count, expected in ((420, (20, 20)), (460, (21, 0))):  # a sixteenth of 400 is 25
        write(bank.decoder, [Reference(text, "more") for text in texts[:count]], bank)
        bank.refresh()
        assert parts() == expected
        assert all(bank.nearest([text], 1)[0][0].id == Reference(text).id for text in texts[count - 20 : count])


def test_a_rebuilt_bank_keeps_its_embedder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = FakeEmbedder()
    made(tmp_path / "bank", embedder).close()
    monkeypatch.setattr("memory3.reader.embedder_named", lambda name: embedder)
    other = FakeDecoder(weights="other")
    rebuild(tmp_path / "bank", other)
    with Bank(tmp_path / "bank", other) as bank:
        assert bank.space == VectorSpace.of(embedder)
        assert bank.nearest([CORPUS[-1]], 1)[0][0].id == Reference(CORPUS[-1]).id


def test_without_the_extra_words_still_find_and_one_sentence_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, SentenceEmbedder(), TEXTS)
    embedding.embedder_named.cache_clear()
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    bank = Bank(tmp_path, FakeDecoder())
    with pytest.warns(UserWarning, match=r"by words alone: .* pip install 'memory3\[dense\]'"):
        recall = Recall(bank)
    assert recall.retriever == "lexical"
    with pytest.raises(BankError, match=r"pip install 'memory3\[dense\]'"):
        Recall(bank, retriever="dense")(["bread"])
    assert not embedding.offline_available()
    embedding.embedder_named.cache_clear()


def test_what_is_no_embedder_or_no_retriever_is_named(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="found no embedder"):
        SentenceEmbedder(str(tmp_path / "nothing")).embed(["x"])
    with pytest.raises(SpecError, match="expected one of lexical, dense, hybrid"):
        Recall(made(tmp_path / "bank", None), retriever="psychic")


def test_a_vector_column_without_its_embedder_is_a_clear_error(tmp_path: Path) -> None:
    column = pa.field(tables.VECTOR, pa.list_(pa.float16(), 8), metadata={"embedder": "fake"})
    tables.create(lancedb.connect(tmp_path), column)
    with pytest.raises(BankError, match="vector column without its embedder"):
        _ = Catalogue(tmp_path).space


def test_entries_carry_a_vector_each(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / FOLDER, create=True, space=VectorSpace.of(FakeEmbedder()))
    with pytest.raises(AssertionError, match="a vector for each"):
        catalogue.add_memories([Entry(Reference("x"), 1, (0, 0))])


def test_the_command_line_gives_a_bank_vectors_and_takes_them_away(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("\n\n".join(TEXTS))
    bank = str(tmp_path / "bank")
    runner = CliRunner()
    plain = ["write", str(tmp_path / "notes.md"), "--bank", bank, "--embedder", "none"]
    assert runner.invoke(app, plain, catch_exceptions=False).exit_code == 0
    assert "embedder             None" in runner.invoke(app, ["bank", "stats", bank]).stdout
    assert runner.invoke(app, ["bank", "embed", bank]).stdout.startswith(f"1 vectors made, embedder: {OFFLINE}")
    assert OFFLINE in runner.invoke(app, ["bank", "stats", bank]).stdout
    assert "0 vectors" in runner.invoke(app, ["bank", "embed", bank, "--embedder", "none"]).stdout


def test_an_open_bank_follows_when_another_process_changes_the_embedder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = FakeEmbedder(), FakeEmbedder("second", seed=1)
    monkeypatch.setattr("memory3.reader.embedder_named", {"fake": first, "second": second}.__getitem__)
    writer, reader = made(tmp_path, first), Bank(tmp_path, FakeDecoder())
    [[before]] = reader.nearest([CORPUS[0]], 1)
    Bank(tmp_path).embed(second)
    [[after]] = reader.nearest([CORPUS[0]], 1)
    assert after.id == before.id and after.score == pytest.approx(1, abs=2e-3)  # it was asked in the new space
    extra = Reference("quite another text", "new.txt")
    assert writer.decoder is not None
    write(writer.decoder, [extra], writer)
    assert Bank(tmp_path, embedder=second).nearest([extra.text], 1)[0][0].id == extra.id
    Bank(tmp_path).embed(None)
    write(writer.decoder, [Reference("a text without a vector")], writer)
    assert len(writer) == len(CORPUS) + 2 and writer.space is None
    assert default_retriever([reader]) == "lexical"
    assert writer.embed(first) == len(writer)


def test_half_made_vectors_are_not_searched_unasked(tmp_path: Path) -> None:
    bank, embedder = made(tmp_path, None), FakeEmbedder()

    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bank.embed(embedder, batch_size=1, on_progress=stop)
    missing = len(CORPUS) - 1
    assert bank.stats()["vectors_missing"] == missing
    with pytest.warns(UserWarning, match=f"by words alone: {missing} memories have no vector yet.*memory3 bank embed"):
        assert default_retriever([bank]) == "lexical"
    bank.embed(embedder)
    assert default_retriever([bank]) == "hybrid" and bank.stats()["vectors_missing"] == 0


def test_a_fixed_recall_needs_no_embedder(tmp_path: Path) -> None:
    made(tmp_path, FakeEmbedder("nowhere"))
    recall = Recall(Bank(tmp_path, FakeDecoder()), references=[Reference(CORPUS[0]).id])
    assert recall(["x"])[0].references[0].text == CORPUS[0]


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_one_sentence(device: str) -> None:
    with pytest.raises(BankError, match="found no embedder"):
        SentenceEmbedder(device=device).embed(["x"])
