"""How much a question attends to memories, by the model's own queries and the unrotated keys (design 3, Remark 2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from memory3.attention import Attended, Original, States
from memory3.decoder import Decoder
from memory3.family import Stop, file_beside, run_until_stop
from memory3.rotation import CaughtRotations
from memory3.spec import Memory, SpecError

HEADS_FILE = "asking_heads.json"
"""Beside the weights of a model: the query heads that find references, `[[layer, head], …]`, as `memory3 eval heads` measures them."""


class _Asking:
    """Keeps the unrotated queries of the memory layers and stops behind the last."""

    def __init__(self, layers: Sequence[int], rotates: dict[int, bool], caught: CaughtRotations) -> None:
        self.layers, self.rotates, self.caught = layers, rotates, caught
        self.queries: dict[int, Tensor] = {}
        self.modules: dict[int, tuple[nn.Module, float | None]] = {}

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        layer: int = module.layer_idx  # type: ignore[assignment]
        if layer in self.layers:
            query, key = states.query.float(), states.key.float()
            self.queries[layer] = self.caught.undo(module, query, key)[0] if self.rotates[layer] else query
            self.modules[layer] = module, options.get("scaling")
        if layer == self.layers[-1]:
            raise Stop
        return states.through(original, module, options)


class Attention:
    """Scores memories of a bank for a question.

    The question makes one pass through the layers up to the last memory layer, without memories, at the places where a context
    stands. A head scores a memory by the mean over the question's tokens of the largest logit among the kept keys, both without
    position; the sum over heads is the score.

    Args:
        decoder: the model that wrote the memories.
        heads: (layer, query head) pairs that count; by default those of `asking_heads.json` beside the model, else all.

    Raises:
        SpecError: a head that is not there, or whose keys are no memory.
    """

    def __init__(self, decoder: Decoder, heads: Sequence[tuple[int, int]] | None = None) -> None:
        self.decoder = decoder
        self.layers = decoder.spec.layers or ()
        self.heads = list(_heads_of(decoder) if heads is None else heads)
        here = {pair for layer in self.layers for pair in self._heads(layer)}
        wrong = [pair for pair in self.heads if pair not in here]
        if wrong:
            raise SpecError(
                f"found the asking head {wrong[0]}, expected (layer, query head) of a memory head: measure them with memory3 eval heads"
            )
        self._turns: tuple[CaughtRotations, dict[int, tuple[nn.Module, float | None]]] | None = None

    def scores(self, question: str, memories: Sequence[Memory]) -> list[float]:
        """One score per memory; the larger, the more the chosen heads would attend to it."""
        if not memories:
            return []
        chosen = self.heads or [pair for layer in self.layers for pair in self._heads(layer)]
        found = self.by_head(question, memories, sorted({layer for layer, _ in chosen}))
        return torch.stack([found[pair] for pair in chosen]).sum(0).tolist()

    @torch.no_grad()
    def by_head(
        self, question: str, memories: Sequence[Memory], layers: Sequence[int] | None = None
    ) -> dict[tuple[int, int], Tensor]:
        """Scores `(N,)` of each (layer, query head) over the memory heads of some layers, by default of all."""
        queries, found = self._asked(question), {}
        stacked = _stacked(memories, self.decoder.device)
        for layer in self.layers if layers is None else layers:
            heads = list(self.decoder.spec.heads_of(layer))
            query = queries[layer].unflatten(0, (self.decoder.geometry.num_kv_heads, -1))[heads]
            scaling = self._rotations()[1][layer][1] or self.decoder.head_dim**-0.5
            best = self._best(query, stacked, layer) * scaling
            for n, pair in enumerate(self._heads(layer)):
                found[pair] = best.flatten(1)[:, n]
        return found

    def _best(self, query: Tensor, stacked: tuple[Tensor, Tensor, Tensor], layer: int) -> Tensor:
        """`(N, H, G)`: mean over the question's tokens of the largest product with a kept key."""
        rows = self.decoder.spec.rows_of(layer)
        keys, positions, kept = stacked[0][:, rows], stacked[1][:, rows], stacked[2]
        alone = self._unrotated(keys.flatten(0, 1), positions.flatten(0, 1), layer).unflatten(0, keys.shape[:2])
        logits = torch.einsum("hgtd,nhkd->nhgtk", query, alone)
        return logits.masked_fill(~kept[:, None, None, None, :], float("-inf")).amax(-1).mean(-1)

    def _heads(self, layer: int) -> list[tuple[int, int]]:
        """(layer, query head) of the memory heads, in the order of `by_head`."""
        config = self.decoder.model.config.get_text_config()
        group = int(config.num_attention_heads) // self.decoder.geometry.num_kv_heads
        return [(layer, head * group + n) for head in self.decoder.spec.heads_of(layer) for n in range(group)]

    def _asked(self, question: str) -> dict[int, Tensor]:
        """Unrotated queries `(H * G, T, D)` of the question's tokens, by layer."""
        decoder = self.decoder
        layout = decoder.layout([decoder.context(question)])
        asking, _ = self._pass(layout.input_ids, layout.position_ids)
        skip = len(decoder.prefix_ids) + len(decoder.bos_ids)
        return {layer: query[0][:, skip:] for layer, query in asking.queries.items()}

    def _pass(self, ids: Tensor, positions: Tensor) -> tuple[_Asking, CaughtRotations]:
        decoder, caught = self.decoder, CaughtRotations()
        asking = _Asking(self.layers, decoder.geometry.rotates, caught)
        was_training = decoder.model.training
        decoder.model.eval()
        try:
            with torch.no_grad(), caught.catching(decoder.model):
                run_until_stop(decoder.model.base_model, ids, torch.ones_like(ids), positions, asking)
        finally:
            decoder.model.train(was_training)
        return asking, caught

    def _rotations(self) -> tuple[CaughtRotations, dict[int, tuple[nn.Module, float | None]]]:
        """Rotations of the places where references stand."""
        if self._turns is None:
            places = torch.arange(self.decoder.context_start, device=self.decoder.device)[None]
            ids = torch.full_like(places, self.decoder.prefix_ids[0] if self.decoder.prefix_ids else 0)
            asking, caught = self._pass(ids, places)
            self._turns = caught, asking.modules
        return self._turns

    def _unrotated(self, keys: Tensor, positions: Tensor, layer: int) -> Tensor:
        """Keys `(H, K, D)` that were rotated to `positions` `(H, K)` inside the references' interval, without position."""
        caught, modules = self._rotations()
        if not self.decoder.geometry.rotates[layer]:
            return keys.float()
        return caught.undo_at(modules[layer][0], keys, positions.long() + len(self.decoder.prefix_ids))


def _stacked(memories: Sequence[Memory], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Keys `(N, P, K, D)` and positions `(N, P, K)` with zeros behind short memories, and `(N, K)`: what is kept."""
    counts = torch.tensor([memory.count for memory in memories], device=device)
    keys = pad_sequence([m.keys.transpose(0, 1) for m in memories], batch_first=True).transpose(1, 2)
    positions = pad_sequence([m.positions.T for m in memories], batch_first=True).transpose(1, 2)
    kept = torch.arange(keys.shape[2], device=device)[None] < counts[:, None]
    return keys.to(device).float(), positions.to(device), kept


def _heads_of(decoder: Decoder) -> list[tuple[int, int]]:
    """The heads that the model's own file names; none where there is no such file."""
    file = file_beside(decoder.model, HEADS_FILE)
    if file is None:
        return []
    try:
        return [(int(layer), int(head)) for layer, head in json.loads(file.read_text("utf-8"))]
    except (ValueError, TypeError) as error:
        raise SpecError(f"found a broken {file} ({error}), expected [[layer, head], …]: restore it, or remove it") from None
