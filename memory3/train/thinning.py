"""How many tokens of a reference the heads keep as training goes on: all at first, then fewer (design section 4)."""

from __future__ import annotations

from dataclasses import replace

from memory3.decoder import Decoder
from memory3.train.settings import TrainError

Thinning = tuple[tuple[int, int | None], ...]
"""`(until step, tokens per head)`, `None` for all; the last row stays. Empty leaves the spec's own."""


def checked(thinning: Thinning) -> Thinning:
    """The same thinning; `TrainError` where its steps do not ascend, or a head would keep nothing."""
    steps = [until for until, _ in thinning]
    if steps != sorted(set(steps)) or any(kept is not None and kept < 1 for _, kept in thinning):
        raise TrainError(
            f"found thinning {thinning}, expected pairs of a step and the tokens per head (at least 1, or all) until then, "
            "steps ascending: ((1000, None), (2000, 32), (3000, 8))"
        )
    return thinning


def thinned(decoder: Decoder, thinning: Thinning, step: int | None = None) -> Decoder:
    """The decoder with the tokens per head of a step, by default of the end."""
    if not thinning:
        return decoder
    kept = next((kept for until, kept in thinning if step is not None and step < until), thinning[-1][1])
    return decoder.using(replace(decoder.spec, tokens_per_head=kept))


def halvings(length: int, kept: int | None, steps: int) -> Thinning:
    """All of `length` tokens first, then half of them, a quarter and so on, in equal parts of the first half of the run; then
    the `kept` ones. A run of fewer steps than parts passes the last parts over.
    """
    sizes: list[int | None] = [None]
    while kept is not None and (length := length // 2) > kept:
        sizes.append(length)
    part = max(1, steps // 2 // len(sizes))
    parts = tuple((part * n, size) for n, size in enumerate(sizes, 1) if part * n < steps)
    return (*parts, (steps, kept))
