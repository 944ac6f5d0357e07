"""Attention edges by their effect on a log-likelihood (arXiv 2407.01178, Definition 1): by ablation and by gradient.

An edge leads from a key to a query at one query head of one layer. Its gate multiplies the exponential of its logit in the
softmax: 1 is the model, 0 masks the edge. Keys are numbered over [slots of the memories | columns of the context].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from memory3.attention import KEYWORD, Attended, Hook, Original, Reading, States
from memory3.decoder import Decoder, Layout
from memory3.spec import Memory, SpecError

LARGEST = 2**25
"""Most gates of one layer in one forward pass; more cuts take more passes."""
_SATURATED = 0.01
"""Nearer to 1 a weight is not resolved: float32 would divide its own rounding by it."""


@dataclass(frozen=True)
class Subject:
    """One sequence, what it reads, and whose log-likelihood counts.

    Args:
        layout: a single row of `L` columns without padding.
        first: column of the first token that counts; it and all behind it do.
        reading: memories of its chunks.
    """

    layout: Layout
    first: int
    reading: Reading | None = None

    @classmethod
    def of(cls, decoder: Decoder, ids: Sequence[int], first: int, memories: Sequence[Memory] = ()) -> Subject:
        """Token ids with their `<s>`, of which those from `first` on count; all of them read `memories`.

        Raises:
            SpecError: no token counts, or nothing stands before the first that does.
        """
        if not 1 <= first < len(ids):
            raise SpecError(f"found first={first} of {len(ids)} tokens, expected 1 to {len(ids) - 1}: some have to count")
        layout = decoder.layout([ids], grid=[[0] * len(ids)], memory=bool(memories))
        before = layout.input_ids.shape[1] - len(ids)
        return cls(layout, before + first, decoder.reading(layout.chunks, [[memories]]))

    @property
    def slots(self) -> int:
        """Keys of memories, filler included: slot `n * K + k` is the k-th kept token of memory `n`."""
        return 0 if self.reading is None else self.reading.stack.counts.shape[0] * self.reading.stack.keys.shape[2]

    @property
    def columns(self) -> int:
        """`L`, the columns of the context, the reference BOS among them."""
        return int(self.layout.input_ids.shape[1])

    def pairs(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """`(L, slots + L)`, true at some (query column, key)."""
        where = torch.zeros(self.columns, self.slots + self.columns, dtype=torch.bool, device=self.layout.input_ids.device)
        if pairs:
            queries, keys = torch.tensor(pairs, device=where.device).T
            where[queries, keys] = True
        return where

    def memories(self) -> Tensor:
        """`(L, slots + L)`, true at every edge from a memory."""
        where = self.pairs([])
        where[:, : self.slots] = True
        return where

    def repeated(self, count: int) -> Subject:
        """The same sequence `count` times as one batch."""
        ids, mask, places, chunks = (
            t.expand(count, -1)
            for t in (self.layout.input_ids, self.layout.attention_mask, self.layout.position_ids, self.layout.chunks)
        )
        layout = Layout(ids, mask, places, chunks, self.layout.memory)
        if self.reading is None:
            return replace(self, layout=layout)
        return replace(
            self, layout=layout, reading=replace(self.reading, table=self.reading.table.expand(count, -1, -1), chunks=chunks)
        )


@dataclass(frozen=True)
class Edges:
    """Edges of one query head: those where `where` `(L, slots + L)` is true."""

    layer: int
    head: int
    where: Tensor


@dataclass(frozen=True)
class Gated:
    """A `Hook` that runs the model's own attention over [memories | context] with a gate on every edge.

    Memories become keys before the context's, and visibility and gates one additive mask. So soft caps, sinks and windows are the
    model's own; it costs a full mask for each head, and rows must be without padding.

    Args:
        subject: what is read.
        log_gates: for some layers `(B, H * G, L, slots + L)`, added to the logits.
    """

    subject: Subject
    log_gates: Mapping[int, Tensor]

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        """The original attention on joined keys; as it is where there is neither a gate nor a memory."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        gates = self.log_gates.get(layer)
        if gates is None and not _remembers(self.subject, layer):
            return states.through(original, module, options)
        joined, slots = whole(self.subject, layer, states)
        if gates is not None:
            assert joined.mask is not None
            joined = replace(joined, mask=_gated(joined.mask, gates[..., self.subject.slots - slots :]))
        return joined.through(original, module, options)


@dataclass(frozen=True)
class Weighed:
    """A `Hook` that notes the attention weights of every edge, whatever the implementation: keys get one-hot values.

    `found[layer]` is `(H * G, L, slots + L)`; a sink's share is missing from its sums.
    """

    subject: Subject
    found: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        """The original attention on joined keys, and once more for the weights."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        joined, slots = whole(self.subject, layer, states)
        keys = joined.key.shape[2]
        hot = torch.eye(keys, dtype=joined.value.dtype, device=joined.value.device).expand(*joined.value.shape[:2], -1, -1)
        weights = replace(joined, value=hot).through(original, module, options)[0][0].transpose(0, 1)  # (H * G, L, keys)
        self.found[layer] = nn.functional.pad(weights, (self.subject.slots - slots, 0))
        return joined.through(original, module, options)


def _remembers(subject: Subject, layer: int) -> bool:
    return subject.reading is not None and layer in (subject.reading.spec.layers or ())


def whole(subject: Subject, layer: int, states: States) -> tuple[States, int]:
    """States of one layer with its memories among the keys and all visibility in an additive mask, and how many slots it has."""
    visible = _additive(states)
    if subject.reading is None or not _remembers(subject, layer):
        return replace(states, mask=visible), 0
    states, seen = _joined(subject.reading, layer, states)
    return replace(states, mask=torch.cat([seen, visible.expand(*seen.shape[:3], -1)], -1)), subject.slots


def _additive(states: States) -> Tensor:
    """The mask of the context as numbers to add, `(B or 1, 1, Q, keys)`; none means plain causal."""
    keys, lowest = states.key.shape[2], torch.finfo(states.query.dtype).min
    mask = states.mask
    if mask is None:
        queries = states.query.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=states.key.device).tril(keys - queries)[None, None]
    mask = mask[..., :keys]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=states.query.dtype, device=mask.device).masked_fill(~mask, lowest)


def _joined(reading: Reading, layer: int, states: States) -> tuple[States, Tensor]:
    """States whose first keys are the slots of all memories, and which query sees which slot, `(B, H * G, Q, slots)`.

    A kv head that is no memory head has zeros there that nobody sees.
    """
    stack, heads = reading.stack, list(reading.spec.heads_of(layer))
    batch, kv_heads, _, dim = states.key.shape

    def slots(kept: Tensor) -> Tensor:
        flat = states.key.new_zeros(batch, kv_heads, kept.shape[0] * kept.shape[2], dim)
        flat[:, heads] = kept[:, reading.spec.rows_of(layer)].transpose(0, 1).flatten(1, 2).to(flat.dtype)
        return flat

    real = torch.arange(stack.keys.shape[2], device=stack.counts.device) < stack.counts[:, None]  # (N, K)
    reads = (_read_by_chunk(reading)[..., None] & real).flatten(2)  # (B, Q, slots)
    memory_head = torch.zeros(kv_heads, dtype=torch.bool, device=reads.device)
    memory_head[heads] = True
    per_query_head = memory_head.repeat_interleave(states.query.shape[1] // kv_heads)
    seen = reads[:, None] & per_query_head[:, None, None]
    visible = torch.zeros(seen.shape, dtype=states.query.dtype, device=seen.device)
    visible = visible.masked_fill(~seen, torch.finfo(states.query.dtype).min)
    key, value = torch.cat([slots(stack.keys), states.key], 2), torch.cat([slots(stack.values), states.value], 2)
    return replace(states, key=key, value=value), visible


def _read_by_chunk(reading: Reading) -> Tensor:
    """`(B, Q, N)`: whether the chunk of a query reads a memory."""
    table, chunks, count = reading.table, reading.chunks, reading.stack.counts.shape[0]
    named = torch.nn.functional.one_hot(table.clamp(min=0), count).bool() & (table >= 0)[..., None]  # (B, C, R, N)
    by_chunk = named.any(2)
    inside = (chunks >= 0) & (chunks < table.shape[1])
    index = chunks.clamp(0, table.shape[1] - 1)[..., None].expand(-1, -1, count)
    return by_chunk.gather(1, index) & inside[..., None]


def _gated(visible: Tensor, gates: Tensor) -> Tensor:
    lowest = torch.finfo(visible.dtype).min
    mask = (visible + gates.to(visible.dtype)).clamp(min=lowest)
    if not gates.requires_grad and bool(((mask <= lowest).all(-1) & ~(visible <= lowest).all(-1)).any()):
        raise SpecError("found a cut that leaves a query nothing to attend to, expected some key left: cut fewer edges")
    return mask


def log_likelihoods(decoder: Decoder, subject: Subject, log_gates: Mapping[int, Tensor] | None = None) -> Tensor:
    """Log-probability in nats of each token that counts, `(B, T)`, float32 or more; `B` is that of the gates."""
    gates = log_gates or {}
    batch = subject.repeated(next((len(g) for g in gates.values()), 1))
    return _foretold(decoder, batch, Gated(batch, gates))


def _foretold(decoder: Decoder, batch: Subject, hook: Hook) -> Tensor:
    was_training = decoder.model.training
    options: dict[str, Any] = {KEYWORD: hook}
    decoder.model.eval()
    try:
        logits = decoder.forward(batch.layout, **options).logits[:, batch.first - 1 : -1]
    finally:
        decoder.model.train(was_training)
    wanted = batch.layout.input_ids[:, batch.first :, None]
    precise: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return precise.gather(-1, wanted)[..., 0]


@torch.no_grad()
def weights(decoder: Decoder, subject: Subject) -> Tensor:
    """Attention weight of every edge under the joint softmax, `(layers, H * G, L, slots + L)`."""
    hook = Weighed(subject)
    _foretold(decoder, subject, hook)
    return torch.stack([hook.found[layer] for layer in range(decoder.geometry.num_layers)])


def query_heads(decoder: Decoder) -> int:
    """`H * G`, the query heads of a layer."""
    return int(decoder.model.config.get_text_config().num_attention_heads)


def gradients(decoder: Decoder, subject: Subject) -> Tensor:
    """First-order estimate of what every edge adds to the log-likelihood, `(layers, H * G, L, slots + L)`, in nats.

    The derivative by the edge's gate at 1; where gates are small changes it equals what ablation measures. Edges that do
    not exist have 0.
    """
    shape = (1, query_heads(decoder), subject.columns, subject.slots + subject.columns)
    with torch.enable_grad():
        gates = {
            layer: torch.zeros(shape, dtype=decoder.dtype, device=decoder.device, requires_grad=True)
            for layer in range(decoder.geometry.num_layers)
        }
        total = log_likelihoods(decoder, subject, gates).sum()
        return torch.cat(torch.autograd.grad(total, list(gates.values())))


def estimates(decoder: Decoder, subject: Subject) -> Tensor:
    """What masking every edge alone would cost in nats, estimated from one backward pass, `(layers, H * G, L, slots + L)`.

    Where one key has nearly all the attention, its gate's derivative is nearly 0, though the head has nothing without it.
    Masking an edge of weight w moves the head's output by 1 / (1 - w) times what the derivative says; that is made good
    here, and the rest of the model is taken as linear.
    """
    return gradients(decoder, subject) / (1 - weights(decoder, subject)).clamp(min=_SATURATED)


@torch.no_grad()
def ablated(decoder: Decoder, subject: Subject, cuts: Sequence[Sequence[Edges]]) -> list[float]:
    """Log-likelihood in nats with the edges of each cut masked; those that are left share the attention.

    Raises:
        SpecError: a cut leaves a query without any key.
    """
    size = max(1, LARGEST // (query_heads(decoder) * subject.columns * (subject.slots + subject.columns)))
    found: list[float] = []
    for start in range(0, len(cuts), size):
        gates = _closed(decoder, subject, cuts[start : start + size])
        found += log_likelihoods(decoder, subject, gates).sum(-1).expand(len(cuts[start : start + size])).tolist()
    return found


def _closed(decoder: Decoder, subject: Subject, cuts: Sequence[Sequence[Edges]]) -> dict[int, Tensor]:
    lowest = torch.finfo(decoder.dtype).min
    shape = (len(cuts), query_heads(decoder), subject.columns, subject.slots + subject.columns)
    gates: dict[int, Tensor] = {}
    for n, edges in _numbered(cuts):
        if edges.layer not in gates:
            gates[edges.layer] = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        gates[edges.layer][n, edges.head].masked_fill_(edges.where, lowest)
    return gates


def _numbered(cuts: Sequence[Sequence[Edges]]) -> Iterator[tuple[int, Edges]]:
    for n, cut in enumerate(cuts):
        for edges in cut:
            yield n, edges


def effects(decoder: Decoder, subject: Subject, cuts: Sequence[Sequence[Edges]]) -> list[float]:
    """What each group of edges adds to the log-likelihood by ablation: the fall in nats where it is masked."""
    whole, *without = ablated(decoder, subject, [[], *cuts])
    return [whole - one for one in without]
