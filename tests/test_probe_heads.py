"""Heads by what cutting their edges costs: those of a circuit that was built by hand are found, and no others."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny_model, tiny_tokenizer

from memory3.decoder import attach
from memory3.probe.heads import PATTERNS, Heads, document, heads_of, repeated, table
from memory3.spec import SpecError
from memory3.train.initialise import induction_prior


def copier() -> Any:
    """A Llama of two layers whose induction circuit is written down, not learned: layer 0 notes predecessors at heads 0 and 2
    (two query heads per kv head), layer 1 copies at heads 0, 2, 4 and 6."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 32}
    like = {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, max_position_embeddings=512, **shape, **like, **special)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    induction_prior(model, 1, torch.nn.functional.normalize(torch.randn(VOCABULARY, 256), dim=-1))
    return model


@cache
def of_copier(pattern: str) -> Heads:
    with attach(copier(), tiny_tokenizer()) as decoder:
        return heads_of(decoder, pattern, length=16, texts=4)


def test_the_induction_heads_of_a_circuit_built_by_hand_are_found_and_no_others() -> None:
    found = of_copier("induction")
    assert {(head.layer, head.head) for head in found.found} == {(1, 0), (1, 2), (1, 4), (1, 6)}
    assert found.second > found.first + 0.5  # it completes
    assert found.cut < found.first + 0.25 * (found.second - found.first)  # and they are why


def test_its_previous_token_heads_are_found_and_no_others() -> None:
    assert {(head.layer, head.head) for head in of_copier("previous").found} == {(0, 0), (0, 2)}


def test_cut_edges_cost_and_as_many_others_do_not() -> None:
    found = of_copier("induction").found
    assert len(found) == 4
    for head in found:
        assert min(head.effects) > 10 * max(map(abs, head.controls))
        assert min(head.estimates) > 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "gpt-oss"])
def test_a_random_model_has_no_induction_heads(name: str) -> None:
    with attach(tiny_model(name), tiny_tokenizer()) as decoder:
        heads = heads_of(decoder, length=8, texts=3)
    assert len(heads.heads) == 16
    assert heads.found == ()
    assert heads.cut == heads.second


def test_patterns_lie_inside_the_text_and_look_back() -> None:
    start, length = 1, 6
    text = [10, 11, 12, 13, 14, 15]
    ids = [1, *text, *text]
    for pattern in PATTERNS.values():
        pairs = pattern.pairs(start, length)
        assert all(start <= key < query < start + 2 * length for query, key in pairs)
    assert all(ids[query + 1] == ids[key] for query, key in PATTERNS["induction"].pairs(start, length))
    assert all(key == query - 1 for query, key in PATTERNS["previous"].pairs(start, length))


def test_a_random_text_stands_twice_behind_the_bos_and_holds_no_special_token() -> None:
    for bos in (True, False):
        with attach(tiny_model("llama"), tiny_tokenizer(bos)) as decoder:
            ids = repeated(decoder, 9, random.Random(0))
            text = ids[len(decoder.bos_ids) :]
            assert ids[: len(decoder.bos_ids)] == decoder.bos_ids
            assert text[:9] == text[9:] and len(set(text)) == 9
            assert not set(text) & set(decoder.tokenizer.all_special_ids)


def test_the_seed_decides_and_the_document_says_what_the_table_says() -> None:
    with attach(copier(), tiny_tokenizer()) as decoder:
        one, same = (heads_of(decoder, length=8, texts=2, seed=3) for _ in range(2))
        assert one == same
        assert one != heads_of(decoder, length=8, texts=2, seed=4)
    made = json.loads(json.dumps(document(one, "copier", 8, 3)))
    assert [h["found"] for h in made["heads"]] == [head.found for head in one.heads]
    lines = table(one, most=3).splitlines()
    assert [line.count("|") for line in lines[:5]] == [8] * 5
    assert lines[2].startswith(
        f"| {made['heads'][0]['layer']} | {made['heads'][0]['head']} | {made['heads'][0]['effect']:+.3f}"
    )


def test_what_cannot_be_measured_is_refused_with_the_reason() -> None:
    with attach(tiny_model("llama"), tiny_tokenizer()) as decoder:
        for options, reason in (
            ({"pattern": "copying"}, "found pattern 'copying', expected one of induction, previous"),
            ({"texts": 0}, "found 0 texts"),
            ({"length": 3}, "found texts of 3 tokens, expected 4 to"),
            ({"length": 2000}, "expected 4 to"),
        ):
            with pytest.raises(SpecError, match=reason):
                heads_of(decoder, **options)
