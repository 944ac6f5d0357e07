"""One softmax over [memories | context], entered through transformers' own attention interface.

`attend` is registered under one name per original implementation. Without the keyword argument `memory3` it *is* the
original; with it, the object given decides at every layer: `Reading` adds memories, `decoder` has two that write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memory3.fused import attention as fused_attention
from memory3.fused import available
from memory3.spec import Memory, MemorySpec

Attended = tuple[Tensor, Tensor | None]
Original = Callable[..., Attended]
KEYWORD = "memory3"
"""The keyword argument of the model's forward that carries a `Hook` to every attention layer."""


class Hook(Protocol):
    """What a forward pass may carry to the attention of every layer."""

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        """Output `(B, Q, H * G, D)` of one layer, and its weights where the original gives them."""


@dataclass(frozen=True)
class States:
    """Rotated queries `(B, H * G, Q, D)`, keys and values `(B, H, Q + past, D)` and the mask of one layer."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    def through(self, original: Original, module: nn.Module, options: dict[str, Any]) -> Attended:
        """The model's own attention on these states."""
        return original(module, self.query, self.key, self.value, self.mask, **options)


def attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Attended:
    """The original attention, or what the `memory3` keyword's hook makes of it."""
    hook: Hook | None = options.pop(KEYWORD, None)
    original = _original(implementation, module)
    states = States(query, key, value, attention_mask)
    return states.through(original, module, options) if hook is None else hook.attend(original, module, states, options)


def _original(implementation: str, module: nn.Module) -> Original:
    """`eager` is a function of the file that defines the module; the others are registered."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Original = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return found


ORIGINALS = ("eager", "sdpa")
"""Attention implementations that memory can enter; their masks say which key each query may see."""


def registered_name(original: str) -> str:
    """Name under which memory's attention over `original` is known to transformers."""
    return f"memory3_{original}"


def register() -> None:
    """Tell transformers of our attention and, under the same name, of the mask it needs (else it gets none)."""
    for original in ORIGINALS:
        AttentionInterface.register(registered_name(original), partial(attend, original))
        AttentionMaskInterface.register(registered_name(original), ALL_MASK_ATTENTION_FUNCTIONS[original])


register()


@dataclass(frozen=True)
class MemoryStack:
    """Memories of several references, filled up to the longest.

    Args:
        keys: `(N, P, K, D)`; values: the same.
        counts: `(N,)` kept tokens of each memory; the places behind them are filler.
        positions: `(N, P, K)` places inside the references.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    positions: Tensor

    @classmethod
    def of(cls, memories: Sequence[Memory], dtype: torch.dtype, device: torch.device) -> MemoryStack:
        """Stack single memories on a device; at least one."""
        longest = max(m.count for m in memories)

        def padded(rows: list[Tensor], kind: torch.dtype) -> Tensor:
            if all(row.shape[1] == longest for row in rows):
                return torch.stack(rows).to(device=device, dtype=kind)
            full = rows[0].new_zeros((len(rows), rows[0].shape[0], longest, *rows[0].shape[2:]))
            for target, row in zip(full, rows, strict=True):
                target[:, : row.shape[1]] = row
            return full.to(device=device, dtype=kind)

        return cls(
            padded([m.keys for m in memories], dtype),
            padded([m.values for m in memories], dtype),
            torch.tensor([m.count for m in memories], device=device),
            padded([m.positions for m in memories], torch.long),
        )

    def unstacked(self) -> list[Memory]:
        """Single memories without filler, detached and contiguous."""
        rows = []
        for n, count in enumerate(self.counts.tolist()):
            keys, values, positions = (t[n, :, :count].detach() for t in (self.keys, self.values, self.positions))
            rows.append(Memory(keys.clone(), values.clone(), positions.to(torch.uint8).clone()))
        return rows


@dataclass
class Trace:
    """What the queries of one forward pass paid to their memories: weights of the joint softmax.

    `references[layer]` is `(B, Q, R)`, the mean over the layer's memory query heads; with `tokens_too`,
    `tokens[layer]` is `(B, Q, heads, R, K)` for those heads; with `gradient` they are part of the graph. `layers` names
    the layers to watch, by default all memory layers.
    """

    tokens_too: bool = False
    gradient: bool = False
    layers: tuple[int, ...] | None = None
    references: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)

    def note(self, layer: int, weights: Tensor) -> None:
        """Take the weights `(B, Q, heads, R, K)` of one layer."""
        weights = weights if self.gradient else weights.detach()
        self.references[layer] = weights.sum(-1).mean(2)
        if self.tokens_too:
            self.tokens[layer] = weights


@dataclass(frozen=True)
class _Groups:
    """The chunks that have memories: `M` of them, each at most `S` queries long."""

    sequence: Tensor  # (M,) which sequence the chunk belongs to
    query: Tensor  # (M, S) its queries; filler repeats the first
    real: Tensor  # (M, S) bool
    memory: Tensor  # (M, R) rows of the stack; filler is 0
    present: Tensor  # (M, R) bool
    stepping: bool  # every sequence has one query, and all of them read


@dataclass(frozen=True)
class Reading:
    """Memories for the chunks of a batch, read at the memory layers.

    Args:
        stack: the distinct memories of the batch.
        table: `(B, C, R)` int64, rows of the stack that each chunk reads; -1 for none.
        chunks: `(B, Q)` int64, the chunk of each query; -1 reads nothing (reference BOS and padding),
            nor does a chunk beyond the table.
        spec: resolved spec that the memories were written with.
        trace: takes the attention that memories received.
    """

    stack: MemoryStack
    table: Tensor
    chunks: Tensor
    spec: MemorySpec
    trace: Trace | None = None
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    """What one token of a chunk gathered for the next, by layer."""

    @cached_property
    def groups(self) -> _Groups:
        """Queries gathered by chunk; one sort per forward pass, shared by all layers."""
        chunk_count = self.table.shape[1]
        wanted = (self.table >= 0).any(-1)  # (B, C)
        inside = (self.chunks >= 0) & (self.chunks < chunk_count)
        reads = inside & wanted.gather(1, self.chunks.clamp(0, chunk_count - 1))
        rows, queries = reads.nonzero(as_tuple=True)
        group = rows * chunk_count + self.chunks[rows, queries]
        order = torch.argsort(group, stable=True)
        ids, sizes = torch.unique_consecutive(group[order], return_counts=True)
        longest = int(sizes.max()) if len(sizes) else 0
        place = torch.arange(longest, device=ids.device)[None, :]
        start = sizes.cumsum(0) - sizes
        real = place < sizes[:, None]
        index = (start[:, None] + place).where(real, start[:, None])
        memory = self.table.flatten(0, 1)[ids]
        sequence = ids // chunk_count
        stepping = self.chunks.shape[1] == 1 and len(sequence) == len(self.chunks)
        return _Groups(sequence, queries[order][index], real, memory.clamp(min=0), memory >= 0, stepping)

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        """At memory layers one softmax over memories and context; elsewhere, or with nothing to read, the original."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        assert self.spec.layers is not None
        if layer not in self.spec.layers or not len(self.groups.sequence):
            return Stepping().attend(original, module, states, options)
        score = _Scoring.of(module, states, options)
        context, context_lse = _over_context(states, score, options.get("s_aux"))
        memory, memory_lse, weights = self._over_memories(layer, states, score)
        output, share = merge(context, context_lse, memory, memory_lse)
        if self.trace is not None and (self.trace.layers is None or layer in self.trace.layers):
            self._note(layer, weights, share)
        return output.transpose(1, 2).contiguous(), None

    def _over_memories(self, layer: int, states: States, score: _Scoring) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over the memories alone, batched over chunks.

        Returns the output `(B, H * G, Q, D)`, its log-sum-exp `(B, H * G, Q)` (minus infinity where nothing is read) and
        the weights `(M, H, G, S, R * K)`, where `H` are the layer's memory heads.
        """
        if self.groups.stepping:
            return self._over_memories_of_one(layer, states, score)
        groups = self.groups
        heads = torch.tensor(self.spec.heads_of(layer), device=states.query.device)
        batch, query_heads, length, dim = states.query.shape
        grouped = states.query.unflatten(1, (states.key.shape[1], -1))[:, heads]  # (B, H, G, Q, D)
        query = grouped.permute(0, 3, 1, 2, 4)[groups.sequence[:, None], groups.query].permute(0, 2, 3, 1, 4)
        keys, values = self._gathered(layer, query.dtype)
        logits = score.logits(query.flatten(2, 3), keys).unflatten(2, query.shape[2:4])  # (M, H, G, S, R * K)
        weights, lse = _softmax(self._hidden(logits))
        output = score.mixed(weights.flatten(2, 3), values).unflatten(2, query.shape[2:4])
        target = groups.sequence[:, None].expand_as(groups.real)[groups.real], groups.query[groups.real]
        spread = output.permute(0, 3, 1, 2, 4)[groups.real]  # (queries, H, G, D)
        full = spread.new_zeros((batch, length, states.key.shape[1], grouped.shape[2], dim))
        full_lse = lse.new_full(full.shape[:-1], float("-inf"))
        at = (target[0][:, None], target[1][:, None], heads[None, :])
        full = full.index_put(at, spread)
        full_lse = full_lse.index_put(at, lse.permute(0, 3, 1, 2)[groups.real])
        flat = (batch, length, query_heads)
        return full.reshape(*flat, dim).transpose(1, 2), full_lse.reshape(flat).transpose(1, 2), weights

    def _over_memories_of_one(self, layer: int, states: States, score: _Scoring) -> tuple[Tensor, Tensor, Tensor]:
        """The same where every sequence has one query, and it reads: there is nothing to gather or to put back.

        The memories of a layer are gathered at the first token of a chunk and kept for the others.
        """
        heads, all_heads = self.spec.heads_of(layer), states.key.shape[1]
        query = states.query.flatten(1, 2).unflatten(1, (all_heads, -1))  # (B, H, G, D)
        some = len(heads) < all_heads
        if layer not in self.kept:
            self.kept[layer] = self._gathered(layer, query.dtype)
        keys, values = self.kept[layer]
        logits = score.logits(query[:, list(heads)] if some else query, keys)[:, :, :, None]  # (B, H, G, 1, R * K)
        weights, lse = _softmax(self._hidden(logits))
        output, lse = score.mixed(weights[:, :, :, 0], values), lse[..., 0]
        if some:
            index = torch.tensor(heads, device=query.device)
            output = torch.zeros_like(query).index_copy(1, index, output)
            lse = lse.new_full(query.shape[:-1], float("-inf")).index_copy(1, index, lse)
        return output.flatten(1, 2)[:, :, None], lse.flatten(1)[..., None], weights

    def _gathered(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values `(M, H, R * K, D)` of the memories that each chunk reads at a layer."""
        rows = self.spec.rows_of(layer)
        keys, values = (
            t[:, rows][self.groups.memory].transpose(1, 2).flatten(2, 3).to(dtype) for t in (self.stack.keys, self.stack.values)
        )
        return keys, values

    def _hidden(self, logits: Tensor) -> Tensor:
        """Logits `(M, H, G, S, R * K)` with filler at minus infinity, in place."""
        return logits if self.filler is None else logits.masked_fill_(self.filler, float("-inf"))

    @cached_property
    def filler(self) -> Tensor | None:
        """`(M, 1, 1, 1, R * K)`, true where no memory is; `None` where every place has one."""
        slot = torch.arange(self.stack.keys.shape[2], device=self.stack.counts.device)
        valid = self.groups.present[..., None] & (slot < self.stack.counts[self.groups.memory][..., None])  # (M, R, K)
        return None if bool(valid.all()) else ~valid.flatten(1)[:, None, None, None, :]

    def _note(self, layer: int, weights: Tensor, share: Tensor) -> None:
        """Joint weights to the trace, back in the order of the queries."""
        assert self.trace is not None
        groups, references = self.groups, self.table.shape[-1]
        batch, _, length = share.shape
        chosen = share.unflatten(1, (-1, weights.shape[2]))[:, list(self.spec.heads_of(layer))].flatten(1, 2)  # (B, heads, Q)
        full = weights.new_zeros((batch, length, chosen.shape[1], weights.shape[-1]))
        at = groups.sequence[:, None].expand_as(groups.real)[groups.real], groups.query[groups.real]
        full = full.index_put(at, weights.flatten(1, 2).transpose(1, 2)[groups.real])
        joint = full * chosen.transpose(1, 2)[..., None]
        self.trace.note(layer, joint.unflatten(-1, (references, -1)))


@dataclass(frozen=True)
class Stepping:
    """Attention of a model that decodes, without memories: its own, but for single queries on the CPU.

    There torch's kernel takes one query head after the other, and reads keys and values once for each. All query heads of a kv
    head in one matrix product read them once (docs/performance.md).
    """

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        """The original attention, or the same softmax in one product per kv head."""
        if states.query.shape[2] > 1 or states.query.device.type != "cpu":
            return states.through(original, module, options)
        output, _ = _over_context(states, _Scoring.of(module, states, options), options.get("s_aux"))
        return output.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Scoring:
    """How a family turns queries and keys into logits, and weights into outputs."""

    scaling: float
    softcap: float | None
    dropout: float

    @classmethod
    def of(cls, module: nn.Module, states: States, options: dict[str, Any]) -> _Scoring:
        scaling = options.get("scaling")
        default = states.query.shape[-1] ** -0.5
        return cls(default if scaling is None else scaling, options.get("softcap"), float(options.get("dropout") or 0.0))

    @property
    def plain(self) -> bool:
        """Whether there is nothing but the scaling."""
        return self.softcap is None and not self.dropout

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Scaled and capped `query @ key.T`, a fresh tensor of float32 or more.

        The query is scaled, not the product: that is less work, and half precision does not overflow on the way.
        """
        product = torch.matmul(query * self.scaling, key.transpose(-1, -2))
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def mixed(self, weights: Tensor, value: Tensor) -> Tensor:
        """`weights @ value` in the dtype of the values, with the module's dropout while it trains."""
        return torch.matmul(functional.dropout(weights, self.dropout, self.dropout > 0).to(value.dtype), value)


def _over_context(states: States, score: _Scoring, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The causal attention, as the masks of transformers define it: output `(B, H * G, Q, D)` and log-sum-exp."""
    if sinks is None and score.plain and available(states.query):
        return fused_attention(states.query, states.key, states.value, states.mask, score.scaling)
    query_heads, length = states.query.shape[1:3]
    query = states.query.reshape(len(states.query), states.key.shape[1], -1, states.query.shape[-1])  # (B, H, G * Q, D)
    logits = score.logits(query, states.key).reshape(len(query), query_heads, length, -1)
    weights, lse = _softmax(_masked(logits, states.mask))
    if sinks is not None:  # a logit per query head that takes weight and gives nothing: counted here, and only here
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None].expand_as(lse))
        weights, lse = weights * torch.exp(lse - total)[..., None], total
    mixed = score.mixed(weights.reshape(*query.shape[:3], -1), states.value)
    return mixed.reshape(*states.query.shape[:3], -1), lse


class _Softmax(torch.autograd.Function):
    """Softmax over the last axis together with its log-sum-exp, with one exponential and few passes over memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top).exp_()
        total = weights.sum(-1, keepdim=True)
        weights.div_(total)
        ctx.save_for_backward(weights)
        return weights, (top + total.log()).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        of_weights, of_lse = gradients
        gradient: Tensor = of_weights * weights
        return gradient.addcmul_(weights, of_lse[..., None] - gradient.sum(-1, keepdim=True))


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _Softmax.apply(logits)  # type: ignore[no-untyped-call]
    return found


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits, masked in place; no mask means plain causal, as transformers leaves it out where the kernel knows it."""
    lowest = torch.finfo(logits.dtype).min
    if mask is None:
        queries, keys = logits.shape[-2:]
        if queries == 1:
            return logits
        later = torch.ones(queries, keys, dtype=torch.bool, device=logits.device).triu(1)
        return logits.masked_fill_(later, lowest)
    if mask.dtype == torch.bool:
        return logits.masked_fill_(~mask[..., : logits.shape[-1]], lowest)
    return logits.add_(mask[..., : logits.shape[-1]]).clamp_(min=lowest)


def merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over disjoint keys as one softmax over both (design 7.5).

    Args:
        first: `(..., D)` output of the first softmax, whose log-sum-exp `(...)` is finite.
        second: output of the second; its log-sum-exp may be minus infinity where it has no keys.

    Returns:
        The joint output `(..., D)` in the dtype of `first`, and the share `(...)` of the second in the joint softmax.
    """
    share = torch.sigmoid(second_lse - first_lse)
    weight, wide = share[..., None], torch.promote_types(first.dtype, share.dtype)
    if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
        joint = first * (1 - weight) + second * weight
    else:  # one dtype and no fresh tensor a step: four times as fast
        joint = first.to(wide, copy=True).mul_(1 - weight).addcmul_(second.to(wide), weight)
    return joint.to(first.dtype), share
