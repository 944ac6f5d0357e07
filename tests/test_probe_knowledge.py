"""Separable and imitable: sums over branches, verdicts by thresholds, and probabilities that are the model's own."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import memory3
from memory3.decoder import Decoder, attach
from memory3.probe.facts import Fact, Realization, facts_of
from memory3.probe.knowledge import MEMORY, TEXT, Steps, Thresholds, Verdict, described, document, judged, summed, table
from memory3.spec import MemorySpec, SourceError, SpecError

EXAMPLES = Path(__file__).parents[1] / "examples" / "facts.jsonl"
FACT = Fact(
    "tower",
    "year",
    "The tower was completed in 1889.",
    (Realization("When was it completed?", ("1889", "in 1889")), Realization("The tower was completed in", ("1889",))),
)
LOW, HIGH = (0.95, 0.5), (0.9, 0.99)


def verdict(without: tuple[Steps, ...], given: dict[str, tuple[Steps, ...]], **options: Any) -> Verdict:
    nothing = {TEXT: (LOW, LOW), MEMORY: (LOW, LOW), "realization 0": (LOW, LOW), "realization 1": (LOW, LOW)}
    return Verdict(FACT, without, nothing | given, {TEXT: ("a", "b"), MEMORY: ("in 1889", "1889.")}, **options)


# ---- branches ----


def test_one_branch_gives_the_probabilities_of_its_tokens() -> None:
    assert summed([([5, 6, 7], [log(0.5), log(0.25), log(0.8)])]) == pytest.approx((0.5, 0.25, 0.8))


def test_branches_are_summed_step_by_step_and_a_finished_one_stays() -> None:
    apart = [([1, 2], [log(0.5), log(0.8)]), ([3], [log(0.3)])]
    assert summed(apart) == pytest.approx((0.8, (0.5 * 0.8 + 0.3) / 0.8))
    forked = [([1, 2], [log(0.6), log(0.5)]), ([1, 3], [log(0.6), log(0.4)])]
    assert summed(forked) == pytest.approx((0.6, 0.9))  # the common first token counts once


def test_a_branch_that_goes_on_from_a_finished_one_says_nothing_new() -> None:
    short = ([1], [log(0.9)])
    assert summed([short, ([1, 2], [log(0.9), log(0.01)])]) == pytest.approx((0.9,))
    assert summed([short, short]) == pytest.approx((0.9,))


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.integers(0, 2**27 - 1))
def test_the_product_of_the_steps_is_the_probability_of_any_accepted_branch(weights: list[float], chosen: int) -> None:
    """Tokens are drawn alone, with the weights of three: all branches of three tokens, any subset of them accepted."""
    share = [w / sum(weights) for w in weights]
    every = [branch for n, branch in enumerate(product(range(3), repeat=3)) if chosen >> n & 1]
    if every:
        steps = summed([(branch, [log(share[t]) for t in branch]) for branch in every])
        expected = sum(share[a] * share[b] * share[c] for a, b, c in every)
        assert torch.tensor(steps).prod().item() == pytest.approx(expected, rel=1e-5)
        assert max(steps) <= 1 + 1e-9


# ---- verdicts ----


def test_separable_needs_an_unlikely_token_in_every_realization_and_one_prefix_that_serves_them_all() -> None:
    served = {MEMORY: (HIGH, HIGH)}
    assert verdict((LOW, LOW), served).serving == (MEMORY,)
    assert verdict((LOW, LOW), served).separable
    assert not verdict((LOW, (0.6, 0.7)), served).separable  # one realization was known
    assert not verdict((LOW, LOW), {TEXT: (HIGH, LOW), MEMORY: (LOW, HIGH)}).separable  # each serves one, none both
    assert not verdict((LOW, LOW), {MEMORY: (HIGH, (0.99, 0.89))}).separable  # every token


def test_imitable_is_every_ordered_pair_of_different_realizations() -> None:
    both = {"realization 0": (LOW, HIGH), "realization 1": (HIGH, LOW)}
    one = verdict((LOW, LOW), both)
    assert one.imitable and one.separable
    assert one.itself == (0.5, 0.5)  # reported, and not held against it
    assert not verdict((LOW, LOW), both | {"realization 1": (LOW, HIGH)}).imitable
    assert not verdict((HIGH, LOW), both).imitable


def test_bounds_belong_to_the_verdict_and_can_be_set() -> None:
    at_bounds = verdict(((0.5,), (0.5,)), {TEXT: ((0.9,), (0.9,))})
    assert at_bounds.separable
    assert not verdict(((0.5,), (0.5,)), {TEXT: ((0.9,), (0.9,))}, thresholds=Thresholds(0.49, 0.9)).separable
    assert not verdict(((0.5,), (0.5,)), {TEXT: ((0.9,), (0.9,))}, thresholds=Thresholds(0.5, 0.91)).separable
    with pytest.raises(SpecError, match="found a threshold given=1.5"):
        Thresholds(given=1.5)


def test_outputs_agree_where_they_are_the_same_or_all_accepted() -> None:
    one = verdict((LOW, LOW), {})
    assert one.agree(MEMORY) and not one.agree(TEXT)
    assert replace(one, said={TEXT: ("b", "B.")}).agree(TEXT)
    apart = Fact("n", "r", "t", (Realization("a", ("1",)), Realization("b", ("2",))))
    assert not replace(one, fact=apart, said={TEXT: ("1", "2")}).agree(TEXT)  # an abstract one


# ---- measured ----


def by_hand(decoder: Decoder, front: str, prompt: str, answer: str, memory: bool = False) -> list[float]:
    before = [*decoder.bos_ids, *decoder.tokens(front), *decoder.tokens(prompt)]
    ids = decoder.tokens(answer)
    context = [*before, *ids]
    layout = decoder.layout([context], grid=[[0] * len(context)], memory=memory)
    reading = decoder.reading(layout.chunks, [[decoder.encode([FACT.text])]]) if memory else None
    with torch.no_grad():
        logits = decoder.forward(layout, reading).logits[0, -len(ids) - 1 : -1].softmax(-1)
    return [float(row[i]) for row, i in zip(logits, ids, strict=True)]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe", "gpt-neox", "gpt-oss"])
def test_probabilities_are_those_of_the_model_behind_each_prefix(name: str) -> None:
    with attach(tiny_model(name), tiny_tokenizer(), MemorySpec(tokens_per_head=None, reference_length=64)) as decoder:
        [found] = judged(decoder, [FACT])
        prompt = "The tower was completed in"
        assert set(found.given) == {TEXT, "realization 0", "realization 1", MEMORY}
        assert found.without[1] == pytest.approx(by_hand(decoder, "", prompt, " 1889"), rel=1e-3)
        assert found.given[TEXT][1] == pytest.approx(by_hand(decoder, FACT.text + "\n\n", prompt, " 1889"), rel=1e-3)
        assert found.given[MEMORY][1] == pytest.approx(by_hand(decoder, "", prompt, " 1889", memory=True), rel=1e-3)
        behind = by_hand(decoder, "When was it completed? 1889\n\n", prompt, " 1889")
        assert found.given["realization 0"][1] == pytest.approx(behind, rel=1e-3)


def test_a_model_without_bos_is_judged_too_and_progress_reaches_the_end() -> None:
    told: list[tuple[int, int]] = []
    with attach(tiny_model("llama"), tiny_tokenizer(False), MemorySpec(reference_length=64)) as decoder:
        [found] = judged(decoder, [FACT], tell=lambda done, total: told.append((done, total)))
    assert not found.separable
    rows = 3 * (1 + 1 + 2) + 3  # branches of both realizations, without a prefix, behind three, and behind memory
    assert told[-1] == (rows, rows)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_fact_that_does_not_fit_the_model_is_refused_by_its_id() -> None:
    spec, refused = MemorySpec(reference_length=64), pytest.raises(SourceError, match="of fact 'tower', expected .* at most")
    with attach(tiny_model("llama"), tiny_tokenizer(), spec) as decoder, refused:
        judged(decoder, [replace(FACT, text="long " * 400)])


def test_the_shipped_model_takes_invented_facts_from_memory() -> None:
    """`docs/probe.md` has all of them; on other CPUs the numbers differ a little."""
    facts = {fact.id: fact for fact in facts_of(EXAMPLES)}
    with memory3.load(device="cpu") as decoder:
        one, abstract = judged(decoder, [facts["oskerra-founder"], facts["next-year"]])
    assert one.unknown and one.separable and MEMORY in one.serving
    assert one.agree(MEMORY) and one.said[MEMORY][0] == "Milo Tarrant"
    assert not abstract.separable


def test_table_and_document_say_what_the_verdicts_say() -> None:
    served, not_served = verdict((LOW, LOW), {MEMORY: (HIGH, HIGH)}), verdict((LOW, LOW), {})
    other = replace(not_served, fact=replace(FACT, id="other", relation="place"))
    lines = table([served, not_served, other]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| year", "| place", "| all"]
    assert lines[2].startswith("| year | 2 | 2 | 50.0 [") and lines[2].endswith("| 0 | 0 | 1 | 0 | 2 |")
    made = json.loads(json.dumps(document([served, other], "m")))
    assert [one["separable"] for one in made["relations"]] == [1.0, 0.0]
    assert made["facts"][0]["serving"] == [MEMORY]
    assert made["facts"][0]["given"][MEMORY] == [list(HIGH), list(HIGH)]
    text = described(served)
    assert text.startswith("tower (year, specific): unknown, separable\n")
    assert sum(line.endswith(" serves") for line in text.splitlines()) == 1
