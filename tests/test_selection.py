"""Every registered selection keeps the contract, and each is what its name says."""

from __future__ import annotations

import pytest
import torch

from memory3.selection import SELECTIONS, LayerStates, kept_positions, selection
from memory3.spec import SpecError


def states(lengths: tuple[int, ...] = (9, 5, 2), seed: int = 0) -> LayerStates:
    generator, longest = torch.Generator().manual_seed(seed), max(lengths)
    mask = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    queries = torch.randn(len(lengths), 2, 3, longest, 4, generator=generator)
    keys = torch.randn(len(lengths), 2, longest, 4, generator=generator)
    ids = torch.randint(3, 99, mask.shape, generator=generator)
    return LayerStates(queries, keys, mask, ids, 0.5, 1)


def of_one(whole: LayerStates, n: int) -> LayerStates:
    keep = slice(n, n + 1), slice(0, int(whole.mask[n].sum()))
    q, k = whole.queries[keep[0], :, :, keep[1]], whole.keys[keep[0], :, keep[1]]
    return LayerStates(q, k, whole.mask[keep], whole.token_ids[keep], whole.scaling, whole.layer)


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_kept_places_are_distinct_ascending_and_inside_whatever_the_padding(name: str) -> None:
    whole, rule = states(), selection(name)
    positions, counts = kept_positions(rule.score(whole), whole.mask, 4)
    assert counts.tolist() == [4, 4, 2]
    for n, count in enumerate(counts.tolist()):
        alone, _ = kept_positions(rule.score(of_one(whole, n)), of_one(whole, n).mask, 4)
        for head in range(2):
            kept = positions[n, head, :count].tolist()
            assert kept == sorted(set(kept))
            assert max(kept) < int(whole.mask[n].sum())
            assert kept == alone[0, head].tolist()


def test_received_attention_is_the_plain_sum_over_all_queries() -> None:
    whole = of_one(states(), 0)
    expected = torch.zeros(2, 9)
    for head in range(2):
        for group in range(3):
            for i in range(9):
                logits = torch.tensor(
                    [float(whole.queries[0, head, group, i] @ whole.keys[0, head, j]) * 0.5 for j in range(9)]
                )
                expected[head] += logits.softmax(-1)
    assert torch.allclose(SELECTIONS["received_attention"]().score(whole)[0], expected, atol=1e-5)


def test_the_unnormalised_variant_is_the_logarithm_of_the_plain_sum_of_exponentials() -> None:
    whole = of_one(states(), 1)
    logits = torch.einsum("hgid,hjd->hgij", whole.queries[0], whole.keys[0]) * 0.5
    assert torch.allclose(
        SELECTIONS["received_attention_unnormalised"]().score(whole)[0], logits.exp().sum((1, 2)).log(), atol=1e-5
    )


def test_first_and_last_and_the_smallest_keys() -> None:
    whole = of_one(states(), 0)
    assert kept_positions(SELECTIONS["first_and_last"]().score(whole), whole.mask, 4)[0][0, 0].tolist() == [0, 1, 7, 8]
    smallest = whole.keys[0, 0].norm(dim=-1).topk(3, largest=False).indices.sort().values
    assert kept_positions(SELECTIONS["key_norm"]().score(whole), whole.mask, 3)[0][0, 0].tolist() == smallest.tolist()


def test_random_is_reproducible_and_differs_between_references_and_layers() -> None:
    first, other = of_one(states(), 0), of_one(states(seed=1), 0)
    rule = SELECTIONS["random"]()
    assert torch.equal(rule.score(first), rule.score(first))
    assert not torch.equal(rule.score(first), rule.score(other))


def test_an_unknown_selection_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match="received_attention"):
        selection("best")
