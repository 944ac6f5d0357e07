"""A key-value cache whose new tokens are written into room that is there, instead of copying everything behind them at each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that a full buffer is enlarged by: one copy of the cache a chunk, not one a token."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values `(B, H, L, D)` of one layer: views of buffers that have room for more."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.keys: Tensor
        self.values: Tensor
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Take new states `(B, H, Q, D)` in; all keys and all values. With gradient they are concatenated as ever."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **options)
            return found
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._fits(end):
            self.buffers = [
                _with_room(old, new, start, end) for old, new in ((self.keys, key_states), (self.values, value_states))
            ]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def _fits(self, end: int) -> bool:
        """Whether the buffers hold what the cache holds, which others may have replaced, and have room up to `end`."""
        return bool(self.buffers) and all(
            view.data_ptr() == buffer.data_ptr() and view.shape[:2] == buffer.shape[:2] and end <= buffer.shape[2]
            for view, buffer in zip((self.keys, self.values), self.buffers, strict=True)
        )


def _with_room(old: Tensor, new: Tensor, start: int, end: int) -> Tensor:
    """A buffer that begins with the old states."""
    buffer = new.new_empty((*new.shape[:2], end + ROOM, new.shape[-1]))
    if start:
        buffer[:, :, :start] = old
    return buffer


def growing_cache(config: Any) -> Any:
    """An empty cache of transformers for a model of this config; layers of other kinds (windowed, …) stay its own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
