"""Any Hugging Face decoder with memory: attach, encode references, run with memories, detach."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from memory3.attention import KEYWORD, ORIGINALS, Hook, MemoryStack, Reading, Trace, registered_name
from memory3.cache import growing_cache
from memory3.context import GAP
from memory3.encoding import Writing, WritingInContext
from memory3.family import SPEC_FILE, Geometry, checked_family, probed, run_until_stop, trained_spec
from memory3.identity import tokenizer_fingerprint, weights_fingerprint, weights_state
from memory3.rotation import CaughtRotations, checked_limit, frequencies, position_limit
from memory3.selection import selection
from memory3.spec import REFERENCE_PREFIX, Memory, MemorySpec, SpecError, UnsupportedModel

_DEFAULT_WINDOW, _LARGEST_WINDOW = 2048, 8192


@dataclass(frozen=True)
class Layout:
    """A batch of contexts as the model is given it, all `(B, L)`.

    `chunks` is each token's chunk; -1 for the reference BOS and padding. `memory` tells whether the context stands behind
    the references' interval, or at 0 as in the plain model.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    chunks: Tensor
    memory: bool = True


class Decoder:
    """A decoder with explicit memory; made by `attach`, a context manager that detaches on leaving.

    Attributes:
        model: the user's model; outside of calls that carry memory it computes what it always did.
        spec: the resolved memory spec.
        prefix_ids: token ids of the reference BOS `<s>Reference:`.
        trained: whether the model says that it was trained for memory.
        adapters: fingerprints of the adapters that were merged into the model when it was loaded.
    """

    adapters: Sequence[str] = ()

    def __init__(self, model: Any, tokenizer: Any, spec: MemorySpec, geometry: Geometry, original: str, trained: bool) -> None:
        self.model, self.tokenizer, self.trained = model, tokenizer, trained
        self.spec = spec.resolved(geometry.num_layers, geometry.num_kv_heads)
        self.geometry = geometry
        self.prefix_ids = self.bos_ids + self.tokens(REFERENCE_PREFIX)
        self._original = original
        self._limit = position_limit(model.config.get_text_config())
        self.cache_keyword = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
        self._fingerprint: tuple[object, str] | None = None

    # ---- life ----

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def detach(self) -> None:
        """Give the model its own attention back; the decoder is of no use afterwards."""
        self.model.set_attn_implementation(self._original)

    def using(self, spec: MemorySpec) -> Decoder:
        """The same attached model under another spec; its memory layers must not lie above the probed ones' last."""
        last = spec.resolved(self.geometry.num_layers, self.geometry.num_kv_heads).layers
        assert last is not None
        geometry = self.geometry
        if last[-1] not in geometry.rotates:
            geometry = probed(self.model, self.tokenizer, geometry.num_layers, last[-1])
        view = Decoder(self.model, self.tokenizer, spec, geometry, self._original, self.trained)
        if view._weights_state() == self._weights_state():
            view._fingerprint = self._fingerprint
        view.adapters = self.adapters
        return view

    # ---- facts ----

    @property
    def head_dim(self) -> int:
        """`D`."""
        return self.geometry.head_dim

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        found: torch.dtype = self.model.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        found: torch.device = self.model.get_input_embeddings().weight.device
        return found

    @property
    def bos_ids(self) -> list[int]:
        """`<s>` where the tokenizer has one."""
        return [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]

    @property
    def context_start(self) -> int:
        """Position of the first context token: behind the reference BOS and the references' interval."""
        return len(self.prefix_ids) + self.spec.reference_length

    @property
    def name(self) -> str:
        """Name of the model for people."""
        return Path(str(self.model.config.name_or_path or type(self.model).__name__)).name

    def remember_fingerprint(self, fingerprint: str) -> None:
        """Take the fingerprint of unchanged files as this model's own, so that opening a bank need not hash.

        It holds as long as torch counts no change of a parameter that it covers.
        """
        self._fingerprint = (self._weights_state(), fingerprint)

    def _weights_state(self) -> object:
        assert self.spec.layers is not None
        return weights_state(self.model, self.spec.layers[-1])

    def identity(self) -> dict[str, Any]:
        """What a bank must share with its reader, as JSON values: weights, tokenizer, rotation, spec and head dim."""
        assert self.spec.layers is not None
        if self._fingerprint is None or self._fingerprint[0] != self._weights_state():
            self.remember_fingerprint(weights_fingerprint(self.model, self.spec.layers[-1]))
        assert self._fingerprint is not None
        return {
            "model": self.name,
            "weights": self._fingerprint[1],
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "rotation": frequencies(self.model),
            "spec": self.spec.to_json(),
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    # ---- text ----

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def context(self, text: str) -> list[int]:
        """Token ids of a context: `<s>`, where the tokenizer has one, and the text."""
        return self.bos_ids + self.tokens(text)

    # ---- write ----

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Memory]:
        """One memory per text, in one padded batch; `SpecError` where a text is empty or over-long."""
        return self.encode_tokens([self.tokens(text) for text in texts])

    @torch.no_grad()
    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> list[Memory]:
        """One memory per row of token ids, without gradient and without filler."""
        was_training = self.model.training
        self.model.eval()
        try:
            return self.stack(rows).unstacked() if rows else []
        finally:
            self.model.train(was_training)

    def stack(self, rows: Sequence[Sequence[int]]) -> MemoryStack:
        """Memories of references given as token ids, with gradient where it is enabled.

        Only the layers up to the last memory layer run. Raises `SpecError` on an empty or over-long row.
        """
        return self.stack_with_states(rows, through=False)[0]

    def stack_with_states(self, rows: Sequence[Sequence[int]], through: bool = True) -> tuple[MemoryStack, Tensor | None]:
        """`stack`, and with `through` the last hidden states `(N, T, d)` of the references from a pass through all layers."""
        _checked_lengths(rows, self.spec.reference_length)
        token_ids, lengths, mask = self._batched(rows)
        kept, found = self._written(token_ids, mask, stop=not through)
        keys, values, positions = (torch.cat(parts, 1) for parts in zip(*kept, strict=True))
        return MemoryStack(keys, values, lengths.clamp(max=self.spec.slots), positions), found

    def _written(
        self, token_ids: Tensor, mask: Tensor, stop: bool
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor | None]:
        count, prefix = token_ids.shape[0], torch.tensor(self.prefix_ids, device=self.device, dtype=torch.long)
        input_ids = torch.cat([prefix.expand(count, -1), token_ids], 1)
        attention = torch.cat([torch.ones(count, len(prefix), dtype=torch.long, device=self.device), mask.long()], 1)
        positions = torch.arange(input_ids.shape[1], device=self.device).expand(count, -1)
        checked_limit(positions, self._limit)
        caught = CaughtRotations()
        writing = Writing(self.spec, self.geometry, len(prefix), token_ids, mask, caught, stop)
        with caught.catching(self.model):
            output = run_until_stop(self.model.base_model, input_ids, attention, positions, writing)
        return writing.kept, None if output is None else output.last_hidden_state[:, len(prefix) :]

    @property
    def window(self) -> int:
        """Most tokens of one sequence behind the reference BOS: what the model takes, and at most 8,192 for the sake of memory."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or _DEFAULT_WINDOW
        return min(int(most), self._limit or int(most), _LARGEST_WINDOW) - len(self.prefix_ids)

    @torch.no_grad()
    def encode_in_context(self, texts: Sequence[str]) -> list[Memory]:
        """One memory per text, each of which saw the texts before it (design 3, Remark 3); between two stands a blank line.

        Raises:
            SpecError: a text is empty or over-long, or all of them do not fit the model's window.
        """
        rows, gap = [self.tokens(text) for text in texts], self.tokens(GAP)
        _checked_lengths(rows, self.spec.reference_length)
        sequence: list[int] = []
        starts = []
        for row in rows:
            sequence += gap if sequence else []
            starts.append(len(self.prefix_ids) + len(sequence))
            sequence += row
        if len(sequence) > self.window:
            raise SpecError(f"found {len(sequence)} tokens in one sequence, expected at most {self.window}: give fewer texts")
        was_training = self.model.training
        self.model.eval()
        try:
            return self._kept_of(rows, starts, [*self.prefix_ids, *sequence]).unstacked()
        finally:
            self.model.train(was_training)

    def _kept_of(self, rows: Sequence[Sequence[int]], starts: Sequence[int], sequence: Sequence[int]) -> MemoryStack:
        token_ids, lengths, mask = self._batched(rows)
        places = torch.tensor(starts, device=self.device)[:, None] + torch.arange(mask.shape[1], device=self.device)
        places = torch.where(mask, places, 0)
        input_ids = torch.tensor([list(sequence)], device=self.device)
        positions = torch.arange(input_ids.shape[1], device=self.device)[None]
        checked_limit(positions, self._limit)
        caught = CaughtRotations()
        writing = WritingInContext(places, self.spec, self.geometry, len(self.prefix_ids), token_ids, mask, caught, True)
        with caught.catching(self.model):
            run_until_stop(self.model.base_model, input_ids, torch.ones_like(input_ids), positions, writing)
        keys, values, kept = (torch.cat(parts, 1) for parts in zip(*writing.kept, strict=True))
        return MemoryStack(keys, values, lengths.clamp(max=self.spec.slots), kept)

    def _batched(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids `(N, T)`, lengths `(N,)` and mask `(N, T)` of rows that are padded at the right."""
        longest = max(map(len, rows))
        token_ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return token_ids, lengths, torch.arange(longest, device=self.device)[None, :] < lengths[:, None]

    # ---- read ----

    def layout(
        self,
        contexts: Sequence[Sequence[int]],
        *,
        padding_side: str = "left",
        grid: Sequence[Sequence[int]] | None = None,
        memory: bool = True,
    ) -> Layout:
        """Contexts of token ids (with their `<s>`) as one batch.

        Args:
            contexts: token ids of each sequence.
            padding_side: `left` or `right`; decoding needs left.
            grid: chunk of each context token; by default every `chunk_length` tokens from the first.
            memory: with memory the reference BOS stands at 0 and the context behind the references' interval; without,
                the context starts at 0 and nothing precedes it.
        """
        prefix, start = (self.prefix_ids, self.context_start) if memory else ([], 0)
        longest = max(len(c) for c in contexts) + len(prefix)
        rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
        for b, context in enumerate(contexts):
            chunk = list(grid[b]) if grid is not None else [i // self.spec.chunk_length for i in range(len(context))]
            row_ids = [*prefix, *context]
            row_places = [*range(len(prefix)), *range(start, start + len(context))]
            fill = longest - len(row_ids)
            rows.append(
                (
                    _padded(row_ids, fill, 0, padding_side),
                    _padded([1] * len(row_ids), fill, 0, padding_side),
                    _padded(row_places, fill, 0, padding_side),
                    _padded([-1] * len(prefix) + (chunk if memory else [-1] * len(context)), fill, -1, padding_side),
                )
            )
        ids, mask, places, chunks = (
            torch.tensor(list(column), device=self.device, dtype=torch.long) for column in zip(*rows, strict=True)
        )
        return Layout(ids, mask, places, chunks, memory)

    def reading(
        self, chunks: Tensor, memories: Sequence[Sequence[Sequence[Memory]]], trace: Trace | None = None
    ) -> Reading | None:
        """Memories for each chunk of each sequence, any number of them; the same object is loaded once.

        Args:
            chunks: `(B, Q)` as in `Layout`.
            memories: `memories[b][c]` are read by chunk `c` of sequence `b`.

        Returns:
            What `forward` takes; `None` where there is nothing to read.
        """
        distinct: dict[int, Memory] = {}
        row_of: dict[int, int] = {}
        for memory in (m for sequence in memories for chunk in sequence for m in chunk):
            if id(memory) not in row_of:
                row_of[id(memory)] = len(row_of)
                distinct[id(memory)] = memory
        if not distinct:
            return None
        chunk_count = max(len(s) for s in memories)
        most = max(len(c) for s in memories for c in s)
        table = torch.full((len(memories), chunk_count, most), -1, dtype=torch.long)
        for b, sequence in enumerate(memories):
            for c, chunk in enumerate(sequence):
                table[b, c, : len(chunk)] = torch.tensor([row_of[id(m)] for m in chunk], dtype=torch.long)
        stack = MemoryStack.of(list(distinct.values()), self.dtype, self.device)
        return Reading(stack, table.to(self.device), chunks, self.spec, trace)

    def fresh_cache(self) -> Any:
        """An empty key-value cache of transformers for this model; `forward` fills it."""
        return growing_cache(self.model.config)

    def forward(
        self, layout: Layout, reading: Hook | None = None, *, base: bool = False, cache: Any = None, **options: Any
    ) -> Any:
        """The model's own output for a batch, reading memories; `options` go to the model (logits_to_keep, ...).

        With `base` the model without its output embeddings runs, and gives hidden states instead of logits. With `cache`
        the layout goes on from what the cache holds, and is added to it.

        Raises:
            UnsupportedModel: a context behind memories reaches beyond the positions that pinned frequencies cover.
        """
        if layout.memory:
            checked_limit(layout.position_ids, self._limit)
        extra: dict[str, Any] = {} if reading is None else {KEYWORD: reading}
        extra |= {"use_cache": False} if cache is None else {self.cache_keyword: cache, "use_cache": True}
        return (self.model.base_model if base else self.model)(
            input_ids=layout.input_ids,
            attention_mask=layout.attention_mask,
            position_ids=layout.position_ids,
            **extra,
            **options,
        )


def _padded(row: list[int], fill: int, value: int, side: str) -> list[int]:
    return [value] * fill + row if side == "left" else row + [value] * fill


def _checked_lengths(rows: Sequence[Sequence[int]], most: int) -> None:
    for n, row in enumerate(rows):
        if not 1 <= len(row) <= most:
            raise SpecError(
                f"found reference {n} with {len(row)} tokens, expected 1 to {most}: split it with memory3.references(SOURCE, decoder)"
            )


# ---- attach ----


def attach(model: Any, tokenizer: Any, spec: MemorySpec | None = None) -> Decoder:
    """Give a transformers causal LM explicit memory.

    Args:
        model: any decoder whose layers all attend through transformers' attention interface.
        tokenizer: its tokenizer.
        spec: by default the spec the model was trained with (`memory_spec.json` beside its weights), else `MemorySpec()`.

    Raises:
        UnsupportedModel: the model cannot read memory; the message names why.

    Warns:
        UserWarning: the model was never trained for memory, or its own spec is overruled.
    """
    checked_family(model)
    own = trained_spec(model)
    chosen = _chosen_spec(own, spec, model)
    selection(chosen.selection)
    config = model.config.get_text_config()
    original = str(config._attn_implementation)
    if original.startswith(registered_name("")):
        raise UnsupportedModel("found a model that has memory already, expected one without: detach it first, or use `using`")
    if original not in ORIGINALS:
        raise UnsupportedModel(
            f"found attention {original!r}, expected one of {', '.join(ORIGINALS)}: load the model with attn_implementation='sdpa'"
        )
    num_layers = int(config.num_hidden_layers)
    last = replace(chosen, heads=None).resolved(num_layers, 1).layers
    assert last is not None
    model.set_attn_implementation(registered_name(original))
    try:
        geometry = probed(model, tokenizer, num_layers, last[-1])
        return Decoder(model, tokenizer, chosen, geometry, original, own is not None)
    except BaseException:
        model.set_attn_implementation(original)
        raise


def _chosen_spec(own: MemorySpec | None, given: MemorySpec | None, model: Any) -> MemorySpec:
    if own is None:
        warnings.warn(
            f"found no {SPEC_FILE} with {type(model).__name__}: it was never trained for memory and will hardly read any; "
            "train it with `memory3 train`",
            stacklevel=3,
        )
        return given or MemorySpec()
    if given is not None and given != own:
        warnings.warn(f"the given memory spec overrules the one the model was trained with: {own}", stacklevel=3)
    return given or own
