"""What memory layers keep of references while the model runs over them: alone, or inside the text around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from memory3.attention import Attended, Original, States
from memory3.family import Geometry, Stop
from memory3.rotation import CaughtRotations
from memory3.selection import LayerStates, kept_positions, selection
from memory3.spec import MemorySpec

AT_ONCE = 8 * 2**20
"""Bytes of logits that a selection makes at a time on a CPU: they are passed over several times, and fit in the cache of a core."""
Kept = tuple[Tensor, Tensor, Tensor]
"""Keys, values `(N, heads, K, D)` and positions `(N, heads, K)` of one layer."""


class Writing:
    """Keeps the key-values of references at the memory layers and stops behind the last.

    Args:
        spec: resolved.
        geometry: of the model.
        skip: tokens of the reference BOS.
        token_ids: `(N, T)` of the references.
        mask: `(N, T)`, true where a token is part of a reference.
        caught: rotations of the pass.
        stop: whether layers above the last memory layer are left out.
    """

    def __init__(
        self,
        spec: MemorySpec,
        geometry: Geometry,
        skip: int,
        token_ids: Tensor,
        mask: Tensor,
        caught: CaughtRotations,
        stop: bool,
    ) -> None:
        self.spec, self.geometry, self.skip = spec, geometry, skip
        self.token_ids, self.mask, self.caught, self.stop = token_ids, mask, caught, stop
        self.kept: list[Kept] = []

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        layer: int = module.layer_idx  # type: ignore[assignment]
        layers = self.spec.layers
        assert layers is not None
        if layer in layers:
            self.kept.append(self._keep(layer, module, states, options.get("scaling")))
        if self.stop and layer == layers[-1]:
            raise Stop
        return states.through(original, module, options)

    def _keep(self, layer: int, module: nn.Module, states: States, scaling: float | None) -> Kept:
        heads = list(self.spec.heads_of(layer))
        keys, values = (t[:, heads, self.skip :] for t in (states.key, states.value))
        with torch.no_grad():
            positions = self._positions(layer, module, states, scaling)[:, heads]
        return _gathered(keys, values, positions)

    def _positions(self, layer: int, module: nn.Module, states: States, scaling: float | None) -> Tensor:
        """Places `(N, H, K)` that the selection keeps; all of them need no score.

        A few references at a time: what a selection makes of them is large, and stays in the processor's cache.
        """
        if self.spec.slots >= self.mask.shape[1]:
            return self._every_place(states.key)
        found = []
        for rows in _pieces(states.query, self.mask.shape[1]):
            query, key = (t[..., self.skip :, :] for t in self._unrotated(layer, module, states, rows))
            found.append(self._selected(layer, query, key, scaling, rows))
        return torch.cat(found)

    def _every_place(self, key: Tensor) -> Tensor:
        length = self.mask.shape[1]
        return torch.arange(length, device=key.device).expand(self.mask.shape[0], key.shape[1], length)

    def _unrotated(self, layer: int, module: nn.Module, states: States, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        query, key = states.query[rows].float(), states.key[rows].float()
        return self.caught.undo(module, query, key, rows) if self.geometry.rotates[layer] else (query, key)

    def _selected(self, layer: int, query: Tensor, key: Tensor, scaling: float | None, rows: slice = slice(None)) -> Tensor:
        """Places that the selection keeps, from unrotated queries `(N, H * G, T, D)` and keys `(N, H, T, D)` of some references."""
        grouped = query.unflatten(1, (key.shape[1], -1))
        scale = key.shape[-1] ** -0.5 if scaling is None else scaling
        mask = self.mask[rows]
        scored = LayerStates(grouped, key, mask, self.token_ids[rows], scale, layer)
        return kept_positions(selection(self.spec.selection).score(scored), mask, self.spec.slots)[0]


class WritingInContext(Writing):
    """The references are stretches of one sequence, and saw what stands before them (design 3, Remark 3).

    Their keys are rotated again, from their places in the sequence to the interval that all references share. A selection
    scores each reference by itself, as it does one that was encoded alone.

    Args:
        places: `(N, T)` places of the references' tokens in the sequence; any where the mask is false.
        rest: as of `Writing`.
    """

    def __init__(self, places: Tensor, *rest: Any) -> None:
        super().__init__(*rest)
        self.places = places

    def _keep(self, layer: int, module: nn.Module, states: States, scaling: float | None) -> Kept:
        heads = list(self.spec.heads_of(layer))
        query, key = (self._cut(t) for t in self._unrotated(layer, module, states))
        everything = self.spec.slots >= self.mask.shape[1]
        positions = self._every_place(key) if everything else self._selected(layer, query, key, scaling)
        if self.geometry.rotates[layer]:
            key = self.caught.rotate(module, key, self.skip)
        return _gathered(key[:, heads].to(states.key.dtype), self._cut(states.value)[:, heads], positions[:, heads])

    def _cut(self, states: Tensor) -> Tensor:
        """`(1, heads, L, D)` of the sequence to `(N, heads, T, D)` of the references."""
        return states[0][:, self.places].transpose(0, 1)


def _pieces(query: Tensor, length: int) -> Iterator[slice]:
    """Rows of a batch `(N, heads, T, D)` whose logits in float32 fit in `AT_ONCE` bytes, on a CPU; elsewhere all of them."""
    count, heads = query.shape[:2]
    most = max(1, AT_ONCE // (4 * heads * length * length)) if query.device.type == "cpu" else count
    return (slice(start, start + most) for start in range(0, count, most))


def _gathered(keys: Tensor, values: Tensor, positions: Tensor) -> Kept:
    index = positions[..., None].expand(*positions.shape, keys.shape[-1])
    return keys.gather(2, index), values.gather(2, index), positions
