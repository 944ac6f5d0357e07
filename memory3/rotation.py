"""Undo a family's own rotary embedding, and find out which layers rotate at all.

Nothing about families is listed here: the cosines and sines that a layer was given are caught on their way in, and the
family's own `apply_rotary_pos_emb` is called with the sine negated.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memory3.spec import UnsupportedModel

PINNED = ("dynamic", "longrope")
"""Rotations whose frequencies change with the length at run time (design 2.6)."""


@dataclass
class CaughtRotations:
    """Cosine and sine of each attention module during one forward pass."""

    found: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @contextmanager
    def catching(self, model: nn.Module) -> Iterator[None]:
        """Watch every module of the model that takes `position_embeddings`, for as long as the block runs."""
        handles = [
            module.register_forward_pre_hook(self._catch, with_kwargs=True)
            for module in model.modules()
            if hasattr(module, "layer_idx") and "position_embeddings" in inspect.signature(module.forward).parameters
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        pair = bound.get("position_embeddings", bound.get("kwargs", {}).get("position_embeddings"))
        if pair is not None:
            self.found[module] = pair

    def undo(self, module: nn.Module, query: Tensor, key: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Unrotated query `(B, H * G, T, D)` and key `(B, H, T, D)` in float32; as they are where nothing was caught.

        Of some rows of the batch alone where `rows` says which they are.
        """
        if module not in self.found:
            return query.float(), key.float()
        cosine, sine = ((t if len(t) == 1 else t[rows]).float() for t in self.found[module])
        # A rotation may scale (yarn, longrope): R(s cos, s sin) is s R, and its inverse R(cos, -sin) / s.
        square = cosine.square() + sine.square()
        queries, keys = _family_rotation(module)(query.float(), key.float(), cosine / square, -sine / square)
        return queries, keys

    def undo_at(self, module: nn.Module, key: Tensor, positions: Tensor) -> Tensor:
        """Keys `(H, K, D)` that were rotated to `positions` `(H, K)`, without rotation, in float32; as they are where nothing was caught."""
        if module not in self.found:
            return key.float()
        cosine, sine = (t.float()[0][positions] for t in self.found[module])
        square, alone = cosine.square() + sine.square(), key.float()[:, None]
        return _family_rotation(module)(alone, alone, cosine / square, -sine / square)[1][:, 0]

    def rotate(self, module: nn.Module, key: Tensor, start: int) -> Tensor:
        """Unrotated keys `(N, H, T, D)` rotated to positions `start` and on, in float32; as they are where nothing was caught."""
        if module not in self.found:
            return key
        cosine, sine = (t.float()[:1, start : start + key.shape[2]] for t in self.found[module])
        return _family_rotation(module)(key, key, cosine, sine)[1]


def _family_rotation(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    rotation = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if rotation is None:
        raise UnsupportedModel(
            f"found {type(module).__name__} without apply_rotary_pos_emb beside it, expected a rotation that can be undone: "
            "memory3 cannot write with this family"
        )
    found: Callable[..., tuple[Tensor, Tensor]] = rotation
    return found


def rotates(kept: tuple[Tensor, Tensor], undone: tuple[Tensor, Tensor], layer: int) -> bool:
    """Whether a layer rotates its keys, judged from one text at two places.

    Args:
        kept: keys `(H, T, D)` of the text at either place.
        undone: the same keys after the undone rotation.
        layer: its index, for the message.

    Raises:
        UnsupportedModel: neither form is the same at both places, so positions enter in some other way.
    """
    difference_kept, difference_undone = _difference(*kept), _difference(*undone)
    if min(difference_kept, difference_undone) > 0.1:
        raise UnsupportedModel(
            f"found keys of layer {layer} that depend on the position in an unknown way "
            f"(relative difference {min(difference_kept, difference_undone):.2f}), expected rotary or no positions: "
            "memory3 cannot write with this family"
        )
    return difference_undone < difference_kept


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first.float() - second.float()).norm() / first.float().norm().clamp(min=1e-20))


def frequencies(model: nn.Module) -> dict[str, list[float]]:
    """The frequency tables of a model by buffer name, in radians per token.

    Rotations that change with the length at run time keep their first table beside the current one; the first is meant.
    """
    buffers = dict(model.named_buffers())
    tables: dict[str, list[float]] = {}
    for name, buffer in sorted(buffers.items()):
        folder, _, last = name.rpartition(".")
        if last.endswith("inv_freq") and "original_" not in last:
            first = buffers.get(f"{folder}.{last.removesuffix('inv_freq')}original_inv_freq")
            if first is None:
                first = buffers.get(f"{folder}.original_{last}", buffer)
            tables[name] = [round(float(v), 9) for v in first.detach().float().cpu()]
    return tables


def position_limit(config: Any) -> int | None:
    """First position that pinned frequencies do not cover; `None` where frequencies never change (design 2.6)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    limits = []
    for rope in nested:
        if rope.get("rope_type") in PINNED:
            original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            limits.append(int(original or config.max_position_embeddings))
    return min(limits, default=None)


def checked_limit(position_ids: Tensor, limit: int | None) -> None:
    """Refuse positions at or beyond the limit."""
    if limit is None:
        return
    last = int(torch.max(position_ids))
    if last >= limit:
        raise UnsupportedModel(
            f"found position {last} under a rotation whose frequencies change at {limit}, expected positions below {limit}: "
            "memories written with the first frequencies cannot be read beyond; use a shorter text or another rope_type"
        )
