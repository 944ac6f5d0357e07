"""The growing cache holds what transformers' own holds, and copies less."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from memory3.cache import ROOM, GrowingLayer, growing_cache


def states(length: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, batch, 3, length, 4, generator=torch.Generator().manual_seed(seed))
    return keys, values


def test_it_holds_what_the_concatenating_cache_holds() -> None:
    growing, plain = GrowingLayer(), DynamicLayer()
    for n, length in enumerate([5, 1, 1, ROOM, 1, 3, 2 * ROOM, 1]):
        new = states(length, n)
        for ours, theirs in zip(growing.update(*new), plain.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        assert growing.get_seq_length() == plain.get_seq_length()


def test_a_token_more_does_not_copy_the_others() -> None:
    growing = GrowingLayer()
    growing.update(*states(5, 0))
    place = growing.keys.data_ptr()
    for n in range(ROOM):
        growing.update(*states(1, n))
        assert growing.keys.data_ptr() == place
    growing.update(*states(1, 0))
    assert growing.keys.data_ptr() != place


def test_it_goes_on_after_others_cut_or_chose_from_it() -> None:
    growing, plain = GrowingLayer(), DynamicLayer()
    for layer in (growing, plain):
        layer.update(*states(6, 0))
        layer.crop(-2)
        layer.update(*states(1, 1))
        layer.batch_select_indices(torch.tensor([1]))
        layer.update(*states(1, 2, batch=1))
    assert torch.equal(growing.keys, plain.keys) and torch.equal(growing.values, plain.values)


def test_with_gradient_nothing_is_written_in_place() -> None:
    growing = GrowingLayer()
    first, second = states(2, 0), states(1, 1)
    for t in (*first, *second):
        t.requires_grad_()
    growing.update(*first)
    keys, values = growing.update(*second)
    (keys.sum() + values.sum()).backward()
    assert all(t.grad is not None and bool((t.grad == 1).all()) for t in (*first, *second))


@pytest.mark.parametrize(("family", "grown"), [("llama", True), ("gemma3", False)])
def test_layers_of_other_kinds_stay_transformers_own(family: str, grown: bool) -> None:
    kinds = {type(layer).__name__ for layer in growing_cache(tiny_model(family).config).layers}
    assert "GrowingLayer" in kinds
    assert (kinds == {"GrowingLayer"}) == grown
