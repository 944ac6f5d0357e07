"""The model's own attention finds references: keys without position, scores by the formula, lexical hits ranked again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer

from memory3.bank import Bank
from memory3.decoder import attach
from memory3.evaluate.heads import Ranking, choose
from memory3.internal import HEADS_FILE, Attention
from memory3.retrieval import Internal, Lexical, standardised
from memory3.spec import BankError, MemorySpec, Reference, SpecError
from memory3.writing import write

FACTS = ("The tower was completed in 1889.", "Salt melts at 801 degrees.", "A group of crows is a murder of crows.")
DENSE = MemorySpec(layers=(0, 1), tokens_per_head=None)
CLOSE = 1e-4
"""float32, sizes of about 1: a rotation there and back."""


def test_unrotated_keys_do_not_depend_on_the_place(model: Any, tokenizer: Any) -> None:
    """At layer 0 a key depends on its token and its place alone: the same token at two places has one key without position."""
    with attach(model, tokenizer, DENSE) as decoder:
        attention, rows = Attention(decoder), decoder.spec.rows_of(0)
        token = decoder.tokens(FACTS[0])[0]
        [memory] = decoder.encode_tokens([[token] * 9])
        keys = attention._unrotated(memory.keys[rows], memory.positions[rows], 0)
        assert float((keys - keys[:, :1]).abs().max()) < CLOSE
        if decoder.geometry.rotates[0]:
            assert float((memory.keys[rows] - memory.keys[rows][:, :1]).abs().max()) > 100 * CLOSE


def test_a_score_is_the_mean_over_tokens_of_the_best_logit(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, DENSE) as decoder:
        attention, memories = Attention(decoder), decoder.encode(FACTS)
        found = attention.by_head("When was it?", memories)
        queries = attention._asked("When was it?")
        scaling = attention._rotations()[1][1][1] or decoder.head_dim**-0.5
        group = queries[1].shape[0] // decoder.geometry.num_kv_heads
        for (layer, head), scores in found.items():
            if layer != 1:
                continue
            for memory, score in zip(memories, scores.tolist(), strict=True):
                rows = decoder.spec.rows_of(1)
                keys = attention._unrotated(memory.keys[rows], memory.positions[rows], 1)[head // group]
                slow = [max(float(query @ key) for key in keys) * scaling for query in queries[1][head]]
                assert score == pytest.approx(sum(slow) / len(slow), abs=1e-3)
        assert len(found) == 2 * queries[1].shape[0]
        alone = attention.by_head("When was it?", memories[1:2], [1])
        assert all(float(alone[pair][0]) == pytest.approx(float(found[pair][1]), abs=1e-4) for pair in alone)
        assert attention.scores("When was it?", []) == []


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    decoder = attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=4))
    made = Bank(tmp_path / "bank", decoder, create=True)
    write(decoder, [Reference(text) for text in (*FACTS, "The tower fell.", "Nothing of the tower remains.")], made)
    return made


def test_lexical_hits_are_ranked_again_by_words_and_attention(bank: Bank) -> None:
    asked = ["When was the tower completed?", "zzzz"]
    words = Lexical(bank).search(asked, 9)
    plain, ranked = Internal(bank, weight=0.0).search(asked, 9), Internal(bank).search(asked, 9)
    assert [[h.id for h in row] for row in plain] == [[h.id for h in row] for row in words]
    assert [sorted(h.id for h in row) for row in ranked] == [sorted(h.id for h in row) for row in words]
    ids = [hit.id for hit in words[0]]
    attended = standardised(Internal(bank).attention.scores(asked[0], bank.read(ids)))
    scores = dict(
        zip(ids, (a + b for a, b in zip(standardised([h.score for h in words[0]]), attended, strict=True)), strict=True)
    )
    assert {hit.id: hit.score for hit in ranked[0]} == pytest.approx(scores)
    assert len(Internal(bank).search(asked[:1], 2)[0]) == 2


def test_a_bank_without_its_model_cannot_ask_attention(bank: Bank) -> None:
    with pytest.raises(BankError, match="expected one whose attention can be asked"):
        Internal(Bank(bank.path))


def test_the_heads_of_a_model_stand_beside_it(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    from memory3.loading import load

    (tmp_path / HEADS_FILE).write_text("[[0, 1]]")
    with load(tmp_path) as decoder:
        attention = Attention(decoder)
        assert attention.heads == [(0, 1)]
        memories = decoder.encode(FACTS)
        assert attention.scores("tower", memories) == pytest.approx(attention.by_head("tower", memories)[0, 1].tolist())
        (tmp_path / HEADS_FILE).write_text("[[3, 0]]")
        with pytest.raises(SpecError, match=r"found the asking head \(3, 0\).*memory3 eval heads"):
            Attention(decoder)
        (tmp_path / HEADS_FILE).write_text("{")
        with pytest.raises(SpecError, match="found a broken"):
            Attention(decoder)


def test_the_model_that_ships_names_heads_that_find_better_than_all_of_them() -> None:
    from memory3.loading import default_model

    heads = json.loads((default_model() / HEADS_FILE).read_text())
    assert 0 < len(heads) <= 8 and all(layer in (1, 2, 3, 4) for layer, _ in heads)


def test_standardised_scores_have_mean_0_and_deviation_1() -> None:
    scores = standardised([1.0, 2.0, 6.0])
    assert sum(scores) == pytest.approx(0) and math.sqrt(sum(s * s for s in scores) / 3) == pytest.approx(1)
    assert standardised([3.0, 3.0]) == [0.0, 0.0] and standardised([]) == []


def test_heads_are_chosen_as_long_as_they_help() -> None:
    good, noise = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 3.0])
    rankings = [Ranking({(0, 0): noise, (0, 1): good}, noise, (True, False, False))] * 2
    assert choose(rankings) == [(0, 1)]
    assert rankings[0].reciprocal([(0, 1)]) == 1 and rankings[0].reciprocal([]) == 1 / 3


def test_a_model_without_a_name_takes_no_file_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / HEADS_FILE).write_text("[[0, 0]]")
    with attach(tiny_model("llama"), tiny_tokenizer(), DENSE) as decoder:
        assert Attention(decoder).heads == []
