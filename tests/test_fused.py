"""The fused kernel gives what the logits give: output, log-sum-exp and every gradient."""

from __future__ import annotations

import pytest
import torch

from memory3 import attention, fused
from memory3.attention import States


def states(dtype: torch.dtype, mask: torch.Tensor | None) -> States:
    made = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 32, 8, generator=made, dtype=torch.float64).to(dtype).requires_grad_() for heads in (4, 2, 2)
    )
    return States(query, key, value, mask)


def masks() -> dict[str, torch.Tensor | None]:
    causal = torch.ones(32, 32, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    left, right = causal.clone(), causal.clone()
    left[0, :, :, :9] = False
    right[1, :, :, 25:] = False
    added = torch.zeros(2, 1, 32, 32, dtype=torch.float64).masked_fill(~left, torch.finfo(torch.float64).min)
    window = causal & torch.ones(32, 32, dtype=torch.bool).triu(-7)
    return {"causal": None, "left": left, "right": right, "added": added, "window": window}


def found(given: States, few: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Output, log-sum-exp and gradients of a loss over both, for queries that see something."""
    monkeypatch.setattr(fused, "FEWEST_QUERIES", few)
    score = attention._Scoring(0.3, None, 0.0)
    output, lse = attention._over_context(given, score, None)
    rows = torch.ones(2, 1, 32, dtype=torch.bool) if given.mask is None else _seeing(given.mask)
    loss = (output.sin() * rows[..., None]).sum() + (lse.cos() * rows).sum()
    gradients = torch.autograd.grad(loss, (given.query, given.key, given.value))
    return [output * rows[..., None], lse * rows, *gradients]


def _seeing(mask: torch.Tensor) -> torch.Tensor:
    return mask.any(-1) if mask.dtype == torch.bool else (mask > torch.finfo(mask.dtype).min).any(-1)


@pytest.mark.parametrize("name", list(masks()))
def test_the_kernel_equals_the_logits_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = states(torch.float64, masks()[name])
    calls: list[int] = []
    kernel = attention.fused_attention
    monkeypatch.setattr(attention, "fused_attention", lambda *words: calls.append(1) or kernel(*words))
    slow, fast = found(given, 10**6, monkeypatch), found(given, 1, monkeypatch)
    assert calls == [1]
    for one, other in zip(slow, fast, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradients_of_output_and_log_sum_exp_equal_finite_differences() -> None:
    given = states(torch.float64, None)
    query, key, value = (t.detach()[:1, :, :6].clone().requires_grad_() for t in (given.query, given.key, given.value))
    assert torch.autograd.gradcheck(lambda q, k, v: fused.attention(q, k, v, None, 0.3), (query, key, value))


def test_softcap_sinks_dropout_and_few_queries_take_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object) -> None:
        raise AssertionError("the kernel knows nothing of these")

    monkeypatch.setattr(attention, "fused_attention", refuse)
    given = states(torch.float32, None)
    monkeypatch.setattr(fused, "FEWEST_QUERIES", 33)
    attention._over_context(given, attention._Scoring(0.3, None, 0.0), None)
    monkeypatch.setattr(fused, "FEWEST_QUERIES", 1)
    attention._over_context(given, attention._Scoring(0.3, 5.0, 0.0), None)
    attention._over_context(given, attention._Scoring(0.3, None, 0.5), None)
    attention._over_context(given, attention._Scoring(0.3, None, 0.0), torch.zeros(4))
    with pytest.raises(AssertionError, match="knows nothing"):
        attention._over_context(given, attention._Scoring(0.3, None, 0.0), None)
