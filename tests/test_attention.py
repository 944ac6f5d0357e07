"""Two softmaxes merged by their log-sum-exp are one (design 7.5). Tolerance: float32 sums in another order, 1e-5."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory3.attention import _softmax, merge


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000), st.floats(0.1, 30))
def test_two_merged_softmaxes_are_one_over_the_concatenation(first: int, second: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, values = (
        torch.randn(3, first + second, generator=generator) * scale,
        torch.randn(first + second, 4, generator=generator),
    )
    whole = logits.softmax(-1) @ values
    parts = [(logits[:, :first], values[:first]), (logits[:, first:], values[first:])]
    (a, a_lse), (b, b_lse) = ((part.softmax(-1) @ v, part.logsumexp(-1)) for part, v in parts)
    joint, share = merge(a, a_lse, b, b_lse)
    assert torch.allclose(joint, whole, atol=1e-5)
    assert torch.allclose(share, logits.softmax(-1)[:, first:].sum(-1), atol=1e-5)


def test_nothing_to_merge_leaves_the_first_as_it_is() -> None:
    output, lse = torch.randn(2, 4), torch.randn(2)
    joint, share = merge(output, lse, torch.zeros(2, 4), torch.full((2,), float("-inf")))
    assert torch.equal(joint, output)
    assert torch.equal(share, torch.zeros(2))


def test_the_softmax_with_its_log_sum_exp_has_the_gradients_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    logits[0, 0, 2:] = float("-inf")
    weights, lse = _softmax(logits)
    assert torch.allclose(weights, logits.softmax(-1))
    assert torch.allclose(lse, logits.logsumexp(-1))
    finite = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_softmax, finite)


def test_gradients_are_finite_where_nothing_is_merged() -> None:
    output, lse = torch.randn(2, 4, requires_grad=True), torch.randn(2, requires_grad=True)
    merge(output, lse, torch.zeros(2, 4), torch.full((2,), float("-inf")))[0].sum().backward()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()
    assert lse.grad is not None
    assert torch.isfinite(lse.grad).all()
