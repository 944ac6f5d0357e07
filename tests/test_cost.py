"""The paper's figures come out, sizes are those of real models, and the hull of the lines is what equation 1 says."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf, isclose

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from memory3.cost import (
    PRESETS,
    SCORED,
    TRAIN_LENGTH,
    Format,
    Prices,
    Shape,
    Timed,
    cheapest,
    formats,
    intervals,
    least_total,
    low_rank_write_flops,
    memory_read_flops,
    memory_write_flops,
    parameters_write_flops,
    preset,
    text_read_flops,
    timed,
    total,
)
from memory3.selection import SELECTIONS
from memory3.spec import MemorySpec, SpecError, UnsupportedModel
from memory3.train.figures import flops_per_token
from memory3.train.shapes import paper

PAPER = PRESETS["paper-2.4b"]
SPEC = MemorySpec().resolved(44, 8)
THREE = formats(PAPER, record_bytes=452_032)
SMALL = Shape(6, 256, 8, 4, 32, 640, 8192)


def three_digits(value: float) -> float:
    return float(f"{value:.3g}")


# ---- the paper's figures (design section 5; arXiv 2407.01178, Appendix A) ----


def test_the_papers_costs_come_out_to_three_digits() -> None:
    text, memory, parameters = THREE
    assert text.write == 0 and three_digits(text.read) == 0.624e12
    assert three_digits(memory.write) == 0.308e12 and three_digits(memory.read) == 1.44e8
    assert three_digits(parameters.write) == 2.24e12 and parameters.read == 0


def test_the_papers_interval_of_explicit_memory_comes_out_to_three_digits() -> None:
    text, memory, parameters = intervals(THREE)
    assert [i.name for i in (text, memory, parameters)] == ["text", "memory", "parameters"]
    assert (text.least, three_digits(text.most)) == (0, 0.494)
    assert (memory.least, three_digits(memory.most)) == (text.most, 13_400)
    assert (parameters.least, parameters.most) == (memory.most, inf)


def test_presets_are_the_shapes_that_the_recipes_train() -> None:
    assert {name: Shape.of(paper(name)) for name in PRESETS} == PRESETS


# ---- any decoder ----


def tiny(name: str) -> tuple[Shape, torch.nn.Module]:
    """A config of the family with sizes that all differ, and its model without weights."""
    family = FAMILIES[name]
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": family.kv_heads,
        "head_dim": 12 if family.kind == "gpt_neox" else 16,
        "tie_word_embeddings": False,
        **dict(family.extra),
    }
    config = AutoConfig.for_model(family.kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    with torch.device("meta"):
        return Shape.of(config), AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_costs_what_the_weights_of_each_family_say(name: str) -> None:
    """Against a count of the parameters of a real model; routers and the biases of experts (2 of 4 chosen) are left out."""
    shape, model = tiny(name)
    spec = MemorySpec().resolved(shape.layers, shape.kv_heads)
    named = dict(model.named_parameters())
    routers = sum(p.numel() for n, p in named.items() if n.endswith((".gate.weight", ".router.weight")))
    biases = sum(p.numel() / 2 for n, p in named.items() if "experts" in n and n.endswith("bias"))
    counted = flops_per_token(model, TRAIN_LENGTH) - 6 * (routers + biases)
    assert isclose(parameters_write_flops(shape, spec), 128 * counted, rel_tol=1e-9)


def test_a_low_rank_of_everything_costs_more_than_frozen_weights_and_less_than_all() -> None:
    full = parameters_write_flops(PAPER, SPEC)
    costs = [low_rank_write_flops(PAPER, SPEC, rank) for rank in (1, 16, 256)]
    assert 4 / 6 * full < costs[0] < costs[1] < costs[2] < full
    assert costs[1] - costs[0] == 15 * 44 * 6 * 128 * PAPER.low_rank_weights(1)


def test_adapters_of_the_upper_layers_alone_save_the_backward_pass_below() -> None:
    costs = [low_rank_write_flops(PAPER, SPEC, 16, from_layer=layer) for layer in range(44)]
    assert costs == sorted(costs, reverse=True)
    forward = parameters_write_flops(replace(PAPER, vocabulary=1), SPEC) / 3
    assert costs[-1] > forward


def test_adapters_have_the_weights_of_both_factors_of_every_matrix() -> None:
    shape = Shape(1, 48, 4, 2, 16, 80, 97)
    matrices = [(48, 64), (48, 32), (48, 32), (64, 48), (48, 80), (48, 80), (80, 48)]
    assert shape.low_rank_weights(3) == sum(3 * (a + b) for a, b in matrices)
    assert shape.attention_weights + shape.mlp_weights == sum(a * b for a, b in matrices)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("t5", "with an encoder"),
        ("deepseek_v3", "compressed key-values"),
        ("mamba", "linear_attention layers"),
        ("convnext", "without hidden_size, num_attention_heads, vocab_size"),
        ("gemma4_text", "for each layer"),
    ],
)
def test_configs_that_the_formulas_do_not_fit_are_refused(kind: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        Shape.of(AutoConfig.for_model(kind))


def test_kv_heads_that_all_queries_share_are_one() -> None:
    assert Shape.of(AutoConfig.for_model("falcon")).kv_heads == 1
    assert Shape.of(AutoConfig.for_model("gpt2")).kv_heads == 12


def test_a_token_passes_its_chosen_experts_and_the_shared_one() -> None:
    config = AutoConfig.for_model(
        "qwen2_moe", moe_intermediate_size=10, shared_expert_intermediate_size=7, num_experts_per_tok=3
    )
    assert Shape.of(config).mlp == 3 * 10 + 7


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(SpecError, match="found layers=0"):
        replace(SMALL, layers=0)
    with pytest.raises(SpecError, match="8 query heads for 3 kv heads"):
        replace(SMALL, kv_heads=3)
    with pytest.raises(SpecError, match=r"paper-2\.4b, paper-0\.9b"):
        preset("paper")


# ---- any spec ----


def test_memory_costs_what_the_spec_asks_for() -> None:
    """Reading grows with heads, kept tokens and chunk alone; writing with the last memory layer."""
    few = replace(SPEC, layers=(3, 21), heads=((0,), (1, 2)))
    assert memory_read_flops(PAPER, few) * SPEC.pairs == memory_read_flops(PAPER, SPEC) * 3
    assert memory_read_flops(PAPER, replace(SPEC, tokens_per_head=16)) == 2 * memory_read_flops(PAPER, SPEC)
    assert memory_read_flops(PAPER, replace(SPEC, chunk_length=32)) == memory_read_flops(PAPER, SPEC) / 2
    scores = 2 * (SPEC.pairs - 3) * 128**2 * 5 * 80
    assert memory_write_flops(PAPER, SPEC) - memory_write_flops(PAPER, few) == scores
    assert memory_write_flops(PAPER, replace(few, layers=(3, 10))) < memory_write_flops(PAPER, few)


def test_scores_are_paid_only_by_selections_that_compute_them() -> None:
    assert set(SCORED) <= set(SELECTIONS)
    scored = memory_write_flops(PAPER, SPEC)
    for name in SELECTIONS:
        cost = memory_write_flops(PAPER, replace(SPEC, selection=name))
        assert cost == scored if name in SCORED else cost == scored - 2 * 22 * 128**2 * 3200
    assert memory_write_flops(PAPER, replace(SPEC, tokens_per_head=None)) < scored


def test_texts_of_one_prompt_attend_to_those_before_them() -> None:
    alone, five = text_read_flops(PAPER, SPEC), text_read_flops(PAPER, SPEC, references=5)
    assert five - alone == 2 * 44 * 2 * 128 * (4 * 128 / 2) * 3200


def test_a_second_pass_of_training_costs_as_much_as_the_first() -> None:
    once, twice = (formats(PAPER, record_bytes=1, rank=4, passes=n) for n in (1, 2))
    assert [f.name for f in once] == ["text", "memory", "low-rank", "parameters"]
    assert [b.write for b in twice] == [a.write * (2 if n > 1 else 1) for n, a in enumerate(once)]


def test_bytes_are_the_text_and_for_memory_its_record_too() -> None:
    assert [f.bytes for f in formats(SMALL, record_bytes=1000, text_bytes=300)] == [300, 1300, 0]
    assert [f.bytes for f in formats(SMALL, record_bytes=1000)] == [512, 1512, 0]


@pytest.mark.parametrize("name", ["references", "train_length", "passes", "record_bytes", "rank"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name}.*0, expected"):
        formats(SMALL, **{"record_bytes": 1, name: 0})


# ---- equation 1, for any formats ----

amounts = st.integers(0, 10**12).map(float)
"""Whole numbers, whose products and sums are exact: rounding may decide between two formats that cost the same."""
some_formats = st.lists(st.builds(Format, st.uuids().map(str), amounts, amounts), min_size=1, max_size=6)
some_uses = st.integers(0, 1000).map(float)
shapes = st.builds(
    lambda layers, kv, group, dim, width, mlp, words: Shape(layers, width, kv * group, kv, dim, mlp, words),
    st.integers(1, 60),
    st.integers(1, 16),
    st.integers(1, 8),
    st.integers(8, 128),
    st.integers(16, 8192),
    st.integers(16, 20000),
    st.integers(100, 200_000),
)


@given(some_formats, some_uses, some_uses)
def test_more_uses_never_move_knowledge_down_the_hierarchy(some: list[Format], a: float, b: float) -> None:
    few, many = sorted((a, b))
    assert cheapest(many, some).read <= cheapest(few, some).read


@given(shapes, st.integers(1, 256), some_uses, some_uses)
def test_more_uses_never_move_a_reference_of_any_decoder_down(shape: Shape, tokens: int, a: float, b: float) -> None:
    spec = MemorySpec(tokens_per_head=tokens)
    tiers = formats(shape, spec, record_bytes=1, rank=8)
    few, many = (tiers.index(cheapest(n, tiers)) for n in sorted((a, b)))
    reads = [f.read for f in tiers]
    assert reads[many] <= reads[few]


@given(some_formats, st.lists(some_uses, max_size=20))
def test_the_plan_never_costs_more_than_any_single_format(some: list[Format], uses: list[float]) -> None:
    for one in some:
        assert least_total(uses, some) <= sum(total(n, one) for n in uses)


@given(some_formats, some_uses)
def test_intervals_say_what_cheapest_says(some: list[Format], uses: float) -> None:
    parts = intervals(some)
    assert (parts[0].least, parts[-1].most) == (0, inf)
    assert all(a.most == b.least for a, b in pairwise(parts))
    there = next(i for i in parts if i.least <= uses <= i.most)
    named = next(f for f in some if f.name == there.name)
    assert isclose(total(uses, named), total(uses, cheapest(uses, some)), rel_tol=1e-9)


def test_a_format_that_is_never_cheapest_has_no_interval() -> None:
    dear = Format("dear", 10.0, 10.0)
    assert [i.name for i in intervals([Format("text", 0.0, 1.0), dear, Format("memory", 5.0, 0.0)])] == ["text", "memory"]


def test_a_format_that_is_cheapest_at_one_point_alone_has_none_either() -> None:
    meeting = [Format("text", 0.0, 2.0), Format("memory", 2.0, 1.0), Format("parameters", 4.0, 0.0)]
    assert [(i.name, i.least) for i in intervals(meeting)] == [("text", 0), ("parameters", 2)]


def test_ties_go_to_the_first() -> None:
    assert cheapest(2, [Format("a", 0.0, 1.0), Format("b", 2.0, 0.0)]).name == "a"


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(SpecError, match="of 0 formats"):
        cheapest(1, [])
    with pytest.raises(SpecError, match="found no format"):
        intervals([])
    with pytest.raises(SpecError, match="found -1 uses"):
        cheapest(-1, [Format("a", 0.0, 1.0)])


# ---- seconds and money ----


def test_seconds_and_free_storage_change_no_interval() -> None:
    seconds = [timed(f, 1e12) for f in THREE]
    money = [Prices(hour=2.0).of(t) for t in seconds]
    assert three_digits(seconds[0].read) == 0.624
    for found in (intervals(seconds), intervals(money)):
        assert [i.name for i in found] == ["text", "memory", "parameters"]
        assert all(isclose(i.least, j.least) for i, j in zip(found, intervals(THREE), strict=True))


def test_storage_is_paid_by_byte_and_time() -> None:
    memory = Timed("memory", 3600.0, 36.0, bytes=2 * 10**9)
    priced = Prices(hour=5.0, gb_month=0.25, days=60).of(memory)
    assert (priced.write, priced.read) == (5.0 + 2 * 0.25 * 2, 0.05)


def test_dear_storage_keeps_knowledge_text_for_longer() -> None:
    seconds = [timed(f, 1e12) for f in THREE]
    free, dear = (intervals([Prices(2.0, gb_month).of(t) for t in seconds]) for gb_month in (0.0, 0.1))
    assert free[0].name == dear[0].name == "text" and dear[0].most > 2 * free[0].most


def test_prices_and_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(SpecError, match="found 0 FLOPs per second"):
        timed(THREE[0], 0)
    with pytest.raises(SpecError, match="hour=-1"):
        Prices(hour=-1)
    assert TRAIN_LENGTH == 2048
