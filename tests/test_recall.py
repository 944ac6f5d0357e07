"""Recall: search, fixed lists, cold start, filters, the RAM cache, several banks; and the four KV bugs of others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from memory3.bank import Bank
from memory3.decoder import Decoder, attach
from memory3.generation import complete
from memory3.recall import MemoryCache, Recall
from memory3.spec import BankError, BankMismatch, Memory, MemorySpec, Reference, SpecError
from memory3.writing import write

SPEC = MemorySpec(tokens_per_head=4)
TEXTS = ("The tower was completed in 1889.", "Salt melts at 801 degrees.", "A group of crows is a murder.")
GREEDY = GenerationConfig(do_sample=False, eos_token_id=-1)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


@pytest.fixture
def bank(decoder: Decoder, tmp_path: Path) -> Bank:
    made = Bank(tmp_path / "bank", decoder, create=True)
    write(decoder, [Reference(text, "notes", n, n + len(text)) for n, text in enumerate(TEXTS)], made)
    return made


def test_a_recall_brings_the_reference_that_shares_the_words_and_its_memory(decoder: Decoder, bank: Bank) -> None:
    [found] = Recall(bank)(["When was the tower completed?"])
    assert found.references[0].text == TEXTS[0]
    assert torch.equal(found.memories[0].keys, decoder.encode([TEXTS[0]])[0].keys)
    assert found.bytes_read == len(found.hits) * bank.record_bytes


def test_the_cache_spares_the_disk_and_gives_the_same(bank: Bank) -> None:
    recall = Recall(bank)
    [first], [second] = recall(["tower"]), recall(["tower"])
    assert (first.bytes_read > 0, second.bytes_read) == (True, 0)
    assert torch.equal(first.memories[0].keys, second.memories[0].keys)
    [uncached] = Recall(bank, cache_bytes=0)(["tower"])
    assert uncached.bytes_read == first.bytes_read


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 500))
def test_the_cache_never_holds_more_than_its_limit_and_keeps_the_latest(keys: list[int], limit: int) -> None:
    cache, memory = MemoryCache(limit), Memory(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.uint8))
    for key in keys:
        if cache.get((0, str(key))) is None:
            cache.put((0, str(key)), memory)
        assert cache.nbytes <= limit
        assert (cache.get((0, str(key))) is not None) == (memory.nbytes <= limit)


@pytest.mark.parametrize("fixed", [False, True])
def test_all_queries_are_served_by_one_read_and_each_gets_what_it_gets_alone(
    bank: Bank, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"references": bank.ids()[:2]} if fixed else {"max_overlap": 2 / 3}
    queries = ["tower", "salt and crows", "When was the tower completed?", ""]
    alone = [Recall(bank, **options)([query])[0] for query in queries]
    read: list[list[str]] = []
    loads = bank.load
    monkeypatch.setattr(bank, "load", lambda ids, **words: read.append(list(ids)) or loads(ids, **words))
    together = Recall(bank, **options)(queries)
    assert len(read) == 1
    assert len(set(read[0])) == len(read[0]) == sum(found.bytes_read for found in together) // bank.record_bytes
    for one, other in zip(alone, together, strict=True):
        assert (one.query, one.hits, one.references) == (other.query, other.hits, other.references)
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(one.memories, other.memories, strict=True))


def test_min_score_recalls_nothing_rather_than_noise(bank: Bank) -> None:
    [all_of_it] = Recall(bank)(["tower of salt"])
    [strict] = Recall(bank, min_score=1e9)(["tower of salt"])
    assert all_of_it.hits
    assert strict.hits == ()


def test_the_overlap_filter_drops_a_reference_that_repeats_the_question_and_is_off_by_default(bank: Bank) -> None:
    [plain] = Recall(bank)([TEXTS[0]])
    [filtered] = Recall(bank, max_overlap=2 / 3)([TEXTS[0]])
    assert TEXTS[0] in [r.text for r in plain.references]
    assert TEXTS[0] not in [r.text for r in filtered.references]


def test_a_fixed_list_is_brought_whatever_is_asked_and_unknown_ids_are_refused(bank: Bank) -> None:
    wanted = [Reference(TEXTS[2]).id, Reference(TEXTS[0]).id]
    [found] = Recall(bank, references=wanted)(["anything"])
    assert [h.id for h in found.hits] == wanted
    with pytest.raises(BankError, match="found no memory"):
        Recall(bank, references=["0" * 32])(["anything"])


def test_a_cold_reference_is_encoded_at_its_first_recall_then_stored(bank: Bank) -> None:
    cold = Reference("Ducks race on the river.")
    recall = Recall(bank, references=[cold])
    assert cold.id not in bank
    recall(["x"])
    assert cold.id in bank
    assert len(bank) == 4
    recall(["x"])
    assert len(bank) == 4


def test_several_banks_are_searched_together_best_first(decoder: Decoder, bank: Bank, tmp_path: Path) -> None:
    own = Bank(tmp_path / "own", decoder, create=True)
    write(decoder, [Reference("My own tower is a tower of towers, a tower!"), Reference("Nothing else.")], own)
    [found] = Recall([bank, own])(["tower"])
    assert {r.text[:2] for r in found.references} >= {"My", "Th"}
    scores = [h.score for h in found.hits]
    assert scores == sorted(scores, reverse=True)


def test_what_cannot_be_recalled_from_is_refused(bank: Bank) -> None:
    with pytest.raises(BankError, match="opened without a model"):
        Recall(Bank(bank.path))
    with pytest.raises(BankError, match="found no bank"):
        Recall([])
    with pytest.raises(SpecError, match="found retriever"):
        Recall(bank, retriever="none")
    with pytest.raises(SpecError, match="count=0"):
        Recall(bank, count=0)


# ---- the four KV bugs named in ../shared/landscape.md, as tests of our own code ----


def test_merged_keys_need_no_second_rotation(decoder: Decoder) -> None:
    """MemOS #2315. Every stored key stands at its own place behind the reference BOS, alone or among others."""
    dense = decoder.using(MemorySpec(tokens_per_head=None))
    alone = [dense.encode([text])[0] for text in TEXTS]
    layout = dense.layout([dense.context("When?")])
    reading = dense.reading(layout.chunks, [[alone]])
    assert reading is not None
    for n, memory in enumerate(alone):
        assert torch.equal(reading.stack.keys[n, :, : memory.count], memory.keys)
    shifted = dense.layout([[*dense.prefix_ids, *dense.tokens(TEXTS[0])]], memory=False)
    own = dense.fresh_cache()
    dense.forward(shifted, cache=own)
    skip = len(dense.prefix_ids)
    assert float((own.layers[0].keys[0, :, skip:] - alone[0].keys[dense.spec.rows_of(0)]).detach().abs().max()) < 1e-4


def test_merged_memories_are_never_silently_discarded(decoder: Decoder, bank: Bank) -> None:
    """MemOS #2313. Each recalled memory gets attention, and the answer's logits move."""
    recall = Recall(bank, references=[Reference(t) for t in TEXTS])
    [done] = complete(decoder, ["When?"], recall=recall, config=GREEDY, max_new_tokens=6, effect=True)
    assert done.effect is not None
    assert len(done.effect.citations) == 3
    assert all(c.share > 0 for c in done.effect.citations)
    assert done.effect.logit_shift > 0.001


def test_a_bank_of_another_model_tokenizer_or_selection_is_refused_with_the_command_that_mends_it(
    decoder: Decoder, bank: Bank
) -> None:
    """MemOS #2300."""
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.1)
    turned = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    cases = [
        (other, tiny_tokenizer(), SPEC, "weights"),
        (tiny_model("llama"), tiny_tokenizer(bos=False), SPEC, "tokenizer"),
        (turned, tiny_tokenizer(), SPEC, "rotation"),
        (tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=4, selection="key_norm"), "selection"),
    ]
    for model, tokenizer, spec, reason in cases:
        with attach(model, tokenizer, spec) as stranger, pytest.raises(BankMismatch, match=reason) as refused:
            Bank(bank.path, stranger)
        assert "memory3 bank rebuild" in str(refused.value)
    rounded = tiny_model("llama")
    for parameter in rounded.parameters():  # as from_pretrained(dtype=bfloat16) does: frequencies stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    with attach(rounded, tiny_tokenizer(), SPEC) as same:
        assert len(Bank(bank.path, same)) == 3


def test_a_cold_start_leaves_other_references_of_the_same_document(decoder: Decoder, tmp_path: Path) -> None:
    own = Bank(tmp_path / "own", decoder, create=True)
    references = [Reference(text, "notes.txt", 10 * n, 10 * n + 5) for n, text in enumerate(TEXTS)]
    write(decoder, references[:2], own)
    [found] = Recall(own, references=references)(["When?"])
    assert [h.id for h in found.hits] == [r.id for r in references]
    assert len(own) == len(TEXTS)


def test_generation_never_changes_what_is_stored(decoder: Decoder, bank: Bank) -> None:
    """MemOS #2301."""
    shards = sorted((bank.path / "shards").iterdir())
    before = [s.read_bytes() for s in shards]
    recall = Recall(bank)
    answers = [
        complete(decoder, ["When was the tower?"], recall=recall, config=GREEDY, max_new_tokens=70)[0].ids for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert [s.read_bytes() for s in shards] == before


def test_layers_above_the_last_memory_layer_do_not_count_for_the_fingerprint(bank: Bank) -> None:
    later = tiny_model("llama")
    with torch.no_grad():
        later.model.layers[3].mlp.up_proj.weight.add_(1.0)
        later.lm_head.weight.add_(1.0)
    with attach(later, tiny_tokenizer(), SPEC) as same:
        assert len(Bank(bank.path, same)) == 3
