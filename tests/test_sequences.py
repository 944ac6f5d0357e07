"""Chunks read what the paper says, retrieval kept from before changes nothing, and gradients reach references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model, tiny_tokenizer
from golden_losses import check_losses
from test_corpus import Trap

from memory3.bank import Bank
from memory3.decoder import Decoder, attach
from memory3.spec import MemorySpec, Reference
from memory3.train.corpus import Corpus
from memory3.train.loop import Schedule, Settings, TrainError, run
from memory3.train.recalled import read_texts, vocabulary_logits
from memory3.train.retrieved import Asking, ChunkReferences, chunk_spans
from memory3.train.sequences import Continual, Warmup, shared
from memory3.train.thinning import thinned
from memory3.writing import write

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16)
TEXTS = [
    "The quick brown fox jumps over the lazy dog and then it sleeps in the warm sun until noon. ",
    "A bank holds the memories of many references, and a chunk recalls the best one of them all. ",
    "Rain fell on the mountain for a week, so the river rose and took the old bridge with it. ",
]
NOTES = ["A fox is a small wild dog.", "Dogs are lazy in the sun.", "A river is water that runs.", "A bridge crosses a river."]


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


def bank_of(decoder: Decoder, folder: Path, texts: Sequence[str]) -> Bank:
    with Bank(folder, decoder, create=True) as bank:
        write(decoder, [Reference(text) for text in texts], bank)
    return Bank(folder)


class Given:
    """The same references for every row."""

    def __init__(self, own: list[str | None]) -> None:
        self.own = own

    def texts(self, rows: Sequence[int]) -> list[list[str | None]]:
        return [self.own for _ in rows]


def continual(decoder: Decoder, references: Any, **options: Any) -> Continual:
    return Continual(decoder, TEXTS, references, length=64, batch=1, seed=0, **options)


def losses_of(decoder: Decoder, objective: Any, folder: Path, steps: int = 10) -> list[float]:
    lines: list[dict[str, float]] = []
    settings = Settings(folder, Schedule(1e-2, steps, warmup=2, decay=3), log_every=1, save_every=100, precision="no")
    run(decoder, objective, settings, lines.append)
    return [line["loss"] for line in lines]


# ---- rows ----


def test_every_epoch_goes_through_all_rows_in_its_own_order_and_a_batch_is_a_function_of_its_number(decoder: Decoder) -> None:
    stage = Warmup(decoder, TEXTS, length=20, batch=3, seed=1)
    assert stage.count == 13
    picked = [row for n in range(13) for row in stage.rows(n)]
    epochs = [picked[13 * e : 13 * e + 13] for e in range(3)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = Warmup(decoder, TEXTS, length=20, batch=3, seed=1)
    assert [other.batch(n) for n in (9, 2, 4)] == [stage.batch(n) for n in (9, 2, 4)]
    assert [Warmup(decoder, TEXTS, length=20, batch=3, seed=2).rows(n) for n in range(4)] != [stage.rows(n) for n in range(4)]
    assert stage.tokens(stage.batch(0)) == 60


def test_a_stage_on_a_corpus_and_one_on_its_texts_see_the_same_rows(decoder: Decoder) -> None:
    corpus = Corpus.of_texts(TEXTS, decoder.tokenizer)
    assert Warmup(decoder, corpus, 20, 2, 0).batch(3) == Warmup(decoder, TEXTS, 20, 2, 0).batch(3)


def test_too_little_text_is_refused(decoder: Decoder) -> None:
    with pytest.raises(TrainError, match="expected at least 2048"):
        Warmup(decoder, ["short"], length=2048, batch=1, seed=0)


# ---- chunks ----


def test_a_chunk_reads_its_reference_and_those_of_the_four_before() -> None:
    own = ["a", "b", None, "c", "d", "e", "b"]
    assert shared(own) == [
        ["a"],
        ["b", "a"],
        ["b", "a"],
        ["c", "b", "a"],
        ["d", "c", "b", "a"],
        ["e", "d", "c", "b"],
        ["b", "e", "d", "c"],
    ]


@pytest.mark.parametrize("bos", [True, False])
def test_the_chunks_that_retrieve_are_the_chunks_that_read(bos: bool) -> None:
    with attach(tiny_model("llama"), tiny_tokenizer(bos), SPEC) as decoder:
        row = list(range(10, 60))
        layout = decoder.layout([[*decoder.bos_ids, *row]], padding_side="right")
        read: dict[int, list[int]] = {}
        for token, chunk in zip(layout.input_ids[0].tolist(), layout.chunks[0].tolist(), strict=True):
            if chunk >= 0:
                read.setdefault(chunk, []).append(token)
        read[0] = read[0][len(decoder.bos_ids) :]
        assert [row[a:b] for a, b in chunk_spans(50, 16, len(decoder.bos_ids))] == list(read.values())
        assert len(read[0]) == (15 if bos else 16)


def test_a_chunk_is_changed_by_its_own_reference_and_changes_nothing_before_it(decoder: Decoder) -> None:
    stage = continual(decoder, Given([None, "a fox and a dog", None, None, None, None, None]))
    [row] = stage.batch(0).rows
    layout = decoder.layout([[*decoder.bos_ids, *row]], padding_side="right")
    with torch.no_grad():
        reading = read_texts(decoder, layout, [shared([None, "a fox and a dog"])])
        change = (decoder.forward(layout, reading).logits - decoder.forward(layout).logits).abs().amax(-1)[0]
    first = len(decoder.prefix_ids) + 16
    assert float(change[:first].max()) < 1e-4  # another kernel sums in another order
    assert float(change[first : first + 16].min()) > 1e-2


# ---- retrieval ----


def test_each_chunk_retrieves_by_its_own_words(decoder: Decoder, tmp_path: Path) -> None:
    text = "the fox is here " + "a river runs on " + "nothing, no word"
    corpus = Corpus.of_texts([text], decoder.tokenizer)
    asked = ChunkReferences(decoder, corpus, bank_of(decoder, tmp_path / "bank", NOTES), 47)
    [[first, second, third]] = asked.texts([0])
    assert (first, third) == (NOTES[0], None)
    assert second in NOTES[2:]


def test_a_reference_that_the_sequence_repeats_is_filtered(decoder: Decoder, tmp_path: Path) -> None:
    repeated, other = "the fox sat by a river", "of a fox there are many kinds"
    corpus = Corpus.of_texts([f"{repeated} {'and so it went on ' * 4}"], decoder.tokenizer)
    bank = bank_of(decoder, tmp_path / "bank", [repeated, other])
    [[strict, *_]] = ChunkReferences(decoder, corpus, bank, 64).texts([0])
    [[lax, *_]] = ChunkReferences(decoder, corpus, bank, 64, Asking(max_overlap=None)).texts([0])
    assert (strict, lax) == (other, repeated)


def test_own_documents_can_be_excluded_also_where_the_row_does_not_hold_the_reference(decoder: Decoder, tmp_path: Path) -> None:
    away, foreign = "The fox at night sleeps in a deep den", "the fox of another page"
    document = f"a fox in a den, {'and so on it went, ' * 6} {away.replace(' ', '  ')}"
    document += "." * (-(len(document) + 1) % 15)
    corpus = Corpus.of_texts([document, "a fox in a den, nothing else"], decoder.tokenizer)
    second = int(corpus.starts[1]) // 15
    assert second * 15 == corpus.starts[1]  # a row of one chunk for each document
    bank = bank_of(decoder, tmp_path / "bank", [away, foreign])
    free, excluding = (
        ChunkReferences(decoder, corpus, bank, 15, Asking(exclude_own=own)).texts([0, second]) for own in (False, True)
    )
    assert free == [[away], [away]]
    assert excluding == [[foreign], [away]]


def test_a_run_is_the_same_with_kept_and_fresh_retrieval(tmp_path: Path) -> None:
    found: list[list[float]] = []
    for kept in (False, True):
        with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as decoder:
            place = tmp_path / "bank"
            bank = bank_of(decoder, place, NOTES) if not place.exists() else Bank(place)
            corpus = Corpus.of_texts(TEXTS, decoder.tokenizer)
            references = ChunkReferences(decoder, corpus, bank, 64, cache=tmp_path / "cache" if kept else None)
            if kept:
                references.prepare()
                references._retriever = None  # type: ignore[assignment]  # nothing is asked any more
            stage = Continual(decoder, corpus, references, 64, 2, 0)
            found.append(losses_of(decoder, stage, tmp_path / f"run{kept}", steps=3))
    assert found[0] == found[1]


def test_preparing_goes_on_behind_the_last_whole_part_and_tells_of_every_row(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory3.train.retrieved.PART", 2)
    corpus, bank = Corpus.of_texts(TEXTS, decoder.tokenizer), bank_of(decoder, tmp_path / "bank", NOTES)
    asked = ChunkReferences(decoder, corpus, bank, 32, cache=tmp_path)
    rows: list[int] = []
    original = asked._asked

    def noted(row: int) -> list[str]:
        rows.append(row)
        if len(rows) == 4:
            raise KeyboardInterrupt
        return original(row)

    monkeypatch.setattr(asked, "_asked", noted)
    with pytest.raises(KeyboardInterrupt):
        asked.prepare()
    told: list[tuple[int, int | None]] = []
    asked.prepare(lambda done, total: told.append((done, total)))
    count = corpus.rows(32)
    assert rows == [0, 1, 2, 3, *range(2, count)]
    assert list(dict.fromkeys(told)) == [(n, count) for n in range(2, count + 1)]


def test_a_bank_that_changed_and_other_settings_are_asked_anew(decoder: Decoder, tmp_path: Path) -> None:
    corpus, bank = Corpus.of_texts(TEXTS, decoder.tokenizer), bank_of(decoder, tmp_path / "bank", NOTES)

    def folder(length: int = 64, **options: Any) -> Path | None:
        return ChunkReferences(decoder, corpus, Bank(tmp_path / "bank"), length, Asking(**options), tmp_path).folder

    before = [folder(), folder(32), folder(exclude_own=True), folder(candidates=3), folder(max_overlap=0.5)]
    assert len(set(before)) == 5
    assert folder() == before[0]
    with Bank(bank.path, decoder) as writable:
        write(decoder, [Reference("Another note.")], writable)
        grown = folder()
        writable.delete([Reference("Another note.").id])
        write(decoder, [Reference("A third one.")], writable)
    assert len({*before, grown, folder()}) == 7  # as many memories do not make it the same bank


def test_a_damaged_answer_is_refused_and_never_unpickled(decoder: Decoder, tmp_path: Path) -> None:
    corpus, bank = Corpus.of_texts(TEXTS, decoder.tokenizer), bank_of(decoder, tmp_path / "bank", NOTES)
    asked = ChunkReferences(decoder, corpus, bank, 64, cache=tmp_path / "cache")
    asked.prepare()
    for damage in (np.zeros((1, 5), "S32"), np.zeros(3), np.array([[Trap(tmp_path / "sprung")] * 5] * 3, object)):
        np.save(asked._file(0), damage, allow_pickle=True)
        with pytest.raises(TrainError, match="found a damaged file"):
            asked.texts([2])
    assert not (tmp_path / "sprung").exists()


def test_settings_that_mean_nothing_are_refused(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="expected one of lexical"):
        Asking("telepathy")
    with pytest.raises(TrainError, match="at least 1 reference"):
        Asking(candidates=0)
    bank = bank_of(decoder, tmp_path / "bank", NOTES)
    with pytest.raises(TrainError, match="found no folder"):
        ChunkReferences(decoder, Corpus.of_texts(TEXTS, decoder.tokenizer), bank, 64).prepare()
    for thinning in (((5, None), (5, 8)), ((5, 0),)):
        with pytest.raises(TrainError, match="steps ascending"):
            continual(decoder, bank, thinning=thinning)


# ---- losses ----


def test_gradient_reaches_the_references_of_a_step(decoder: Decoder) -> None:
    stage = continual(decoder, Given(["a fox \x01 met", None, None, None, None]))
    batch = stage.batch(0)
    only_there = decoder.tokens("\x01")[0]
    assert only_there not in [i for row in batch.rows for i in row]
    dense = decoder.using(MemorySpec(tokens_per_head=None, chunk_length=16))
    stage.loss(dense, batch, 0)[0].backward()
    gradient = decoder.model.get_input_embeddings().weight.grad[only_there]
    assert float(gradient.abs().sum()) > 0
    decoder.model.zero_grad()


def test_tokens_are_thinned_by_step_and_the_last_budget_stays(decoder: Decoder) -> None:
    stage = continual(decoder, Given(["a fox met a dog by the river"] * 5), thinning=((2, None), (4, 8), (6, 2)))
    assert [thinned(decoder, stage.thinning, step).spec.tokens_per_head for step in (0, 1, 2, 3, 4, 5, 6, 99)] == [
        None, None, 8, 8, 2, 2, 2, 2,
    ]  # fmt: skip
    batch = stage.batch(0)
    with torch.no_grad():
        losses = [float(stage.loss(decoder, batch, step)[0]) for step in (0, 2, 4)]
        kept = float(continual(decoder, stage.references).loss(decoder, batch, 0)[0])
    assert len({*losses, kept}) == 4  # all, 8, 2, and the decoder's own 4


def test_the_references_own_loss_is_that_of_the_plain_model_behind_the_reference_bos(decoder: Decoder) -> None:
    texts = ["a fox met a dog", "no", "x"]
    own: list[str | None] = [*texts, None, None]
    plain, with_own = (continual(decoder, Given(own), reference_loss=weight) for weight in (0.0, 0.5))
    batch = plain.batch(0)
    with torch.no_grad():
        alone, (both, figures) = plain.loss(decoder, batch, 0)[0], with_own.loss(decoder, batch, 0)
        losses = []
        for text in texts:
            ids = torch.tensor([[*decoder.prefix_ids, *decoder.tokens(text)]])
            scores = decoder.model(ids).logits[0, len(decoder.prefix_ids) : -1].log_softmax(-1)
            losses += (-scores.gather(1, ids[0, len(decoder.prefix_ids) + 1 :, None])).flatten().tolist()
    expected = sum(losses) / len(losses)
    assert figures["reference"] == pytest.approx(expected, rel=1e-5)
    assert figures["text"] == pytest.approx(float(alone), rel=1e-6)
    assert float(both) == pytest.approx(float(alone) + 0.5 * expected, rel=1e-5)


def test_logits_of_states_are_those_of_the_models_own_forward(model: Any) -> None:
    with attach(model, tiny_tokenizer(), SPEC) as decoder, torch.no_grad():
        layout = decoder.layout([decoder.context("A fox.")], memory=False)
        states = decoder.forward(layout, base=True).last_hidden_state
        assert torch.allclose(vocabulary_logits(decoder, states), decoder.forward(layout).logits, atol=1e-5)


def test_without_any_reference_a_continual_step_still_learns(decoder: Decoder) -> None:
    stage = continual(decoder, Given([None] * 5), reference_loss=0.5)
    loss, figures = stage.loss(decoder, stage.batch(0), 0)
    assert figures == {"chunks_with_reference": 0.0}
    assert torch.isfinite(loss)


def test_losses_of_ten_continual_steps(decoder: Decoder, tmp_path: Path) -> None:
    stage = continual(
        decoder, bank_of(decoder, tmp_path / "bank", NOTES), thinning=((4, None), (7, 8), (9, 2)), reference_loss=0.2
    )
    losses = losses_of(decoder, stage, tmp_path / "run")
    assert losses[-1] < losses[0]
    check_losses("continual", losses)
