"""Memory under any plain forward pass, as Trainer, trl and others call it, by hooks that are gone when the block ends.

What is given to the model (`input_ids`, `attention_mask`, `labels`) is laid out behind the references' interval, each
chunk recalls, and the reference BOS is cut out of the output again, so that the caller sees the shapes it expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from memory3.attention import KEYWORD
from memory3.decoder import Decoder
from memory3.generation import Prompt
from memory3.rotation import checked_limit, position_limit
from memory3.spec import SpecError
from memory3.train.grid import Answered, Recalls, layout_of, reading_of, recalled
from memory3.train.recalled import IGNORED

_REFUSED = ("position_ids", "inputs_embeds", "past_key_values", "cache_position", "shift_labels", "token_type_ids")


@dataclass(frozen=True)
class Call:
    """What one forward pass was given: `input_ids`, `attention_mask` and, where there are any, `labels`, all `(B, L)`."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None


Prompts = Callable[[Call], Sequence[int | Prompt]]
"""What of each row is prompt: how many tokens, padding not counted, or the `Prompt` itself, which knows the user's words from
those of a template. The tokens behind it are the response."""


def before_labels(call: Call) -> list[int]:
    """The prompt of a row ends where its labels begin, as in supervised and preference training; without labels nowhere."""
    real = call.attention_mask.bool()
    if call.labels is None:
        return real.sum(1).tolist()
    answered = ((call.labels != IGNORED) & real).cumsum(1) > 0
    return (real & ~answered).sum(1).tolist()


@contextmanager
def memory_in_forward(
    decoder: Decoder, recall: Recalls, *, prompts: Prompts | None = None, model: Any = None
) -> Iterator[None]:
    """Inside the block every call of the model reads memory; afterwards it computes bit for bit what it did before.

    The output has a place for each token given. At padding it holds nothing of use, as in the plain model. A row's first
    token is never a target. References that a recall brings as texts are encoded in the pass, with gradient where it is
    enabled; memories are read as they are.

    Args:
        decoder: an attached decoder.
        recall: called once per pass with a query per chunk and the words of the chunk's whole row. A `Recall` brings
            memories; a function `(queries, texts) -> lists of texts` (`train.grid.RecalledTexts`) brings texts.
        prompts: where the prompt of each row ends and its response begins (`before_labels`); by default the whole row is
            prompt. Rows that do not begin with `<s>` get none.
        model: the module that is called, where that is not `decoder.model` itself but a wrapper of it (peft).

    Raises:
        SpecError: on entering, memories of another model would be read; in a call, something that memory cannot be combined
            with: a key-value cache, positions or embeddings of the caller's own, attention weights, padding inside a row.
    """
    if hasattr(recall, "check"):
        recall.check(decoder)
    target = decoder.model if model is None else model
    hooks = _Hooks(decoder, recall, prompts, position_limit(decoder.model.config.get_text_config()))
    handles = [
        target.register_forward_pre_hook(hooks.before, with_kwargs=True),
        target.register_forward_hook(hooks.after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Hooks:
    """Both ends of one forward pass at a time."""

    def __init__(self, decoder: Decoder, recall: Recalls, prompts: Prompts | None, limit: int | None) -> None:
        self.decoder, self.recall, self.prompts, self.limit = decoder, recall, prompts, limit
        self.cut: _Cut | None = None

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """The call with memory: the same rows behind the reference BOS, and what their chunks read."""
        self.cut = None
        given = kwargs | dict(zip(signature(module.forward).parameters, args, strict=False))
        _checked(given)
        ids = given["input_ids"]
        mask = given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        call = Call(ids, mask, given.get("labels"))
        spans = _spans(mask)
        rows = self._rows(call, spans)
        side = "left" if any(start for start, _ in spans) else "right"
        layout = layout_of(self.decoder, rows, side)
        checked_limit(layout.position_ids, self.limit)
        reading = reading_of(self.decoder, layout, recalled(self.decoder, rows, self.recall))
        places = _places(layout.chunks, spans, ids.shape[1])
        self.cut = _Cut(places, layout.chunks.shape[1], given.pop("logits_to_keep", 0))
        given |= {"input_ids": layout.input_ids, "attention_mask": layout.attention_mask, "use_cache": False}
        given |= {"position_ids": layout.position_ids} | ({} if reading is None else {KEYWORD: reading})
        if call.labels is not None:
            given["labels"] = _moved(call.labels, spans, places, layout.chunks.shape[1])
        return (), given

    def after(self, module: Any, args: Any, output: Any) -> Any:
        """The output without the reference BOS."""
        assert self.cut is not None, "the hook before has run"
        return self.cut(output)

    def _rows(self, call: Call, spans: Sequence[tuple[int, int]]) -> list[Answered]:
        """The rows without padding, each cut into prompt and response."""
        ids = [row[start:end] for row, (start, end) in zip(call.input_ids.tolist(), spans, strict=True)]
        prompts = [len(row) for row in ids] if self.prompts is None else self.prompts(call)
        return [_row(n, row, prompt) for n, (row, prompt) in enumerate(zip(ids, prompts, strict=True))]


def _row(number: int, ids: list[int], prompt: int | Prompt) -> Answered:
    length = prompt if isinstance(prompt, int) else len(prompt.ids)
    if not 1 <= length <= len(ids):
        raise SpecError(
            f"found a prompt of {length} tokens in row {number} of {len(ids)}, expected 1 to {len(ids)}: padding does not count"
        )
    if isinstance(prompt, int):
        prompt = Prompt(tuple(ids[:length]), (True,) * length)
    if list(prompt.ids) != ids[:length]:
        raise SpecError(f"found other tokens in row {number} than in its prompt, expected a row that begins with its prompt")
    return Answered(prompt, tuple(ids[length:]))


@dataclass(frozen=True)
class _Cut:
    """Takes the caller's places out of an output.

    Args:
        places: `(B, L)` column of each of the caller's tokens; 0, a token of the reference BOS, for padding.
        width: columns that the model was given.
        keep: the caller's `logits_to_keep`.
    """

    places: Tensor
    width: int
    keep: int | Tensor

    def __call__(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._tensor(output)
        if isinstance(output, dict):
            for name, value in list(output.items()):
                output[name] = self._kept(self(value)) if name == "logits" else self(value)
            return output
        return type(output)(self(value) for value in output) if isinstance(output, tuple | list) else output

    def _tensor(self, value: Tensor) -> Tensor:
        """`(B, width, ...)` to `(B, L, ...)`; values of next tokens, one fewer, to `(B, L - 1, ...)`."""
        if value.ndim < 2 or value.shape[0] != self.places.shape[0] or value.shape[1] not in (self.width, self.width - 1):
            return value
        places = self.places.to(value.device)
        if value.shape[1] < self.width:  # the last place predicts nothing; the reference BOS, at 0, has no target either
            places = places[:, :-1].where(places[:, :-1] < value.shape[1], 0)
        rows = torch.arange(len(places), device=value.device)[:, None]
        return value[rows, places]

    def _kept(self, logits: Tensor) -> Tensor:
        if isinstance(self.keep, Tensor):
            return logits[:, self.keep]
        return logits[:, -self.keep :] if self.keep else logits


def _checked(given: dict[str, Any]) -> None:
    """Refuse what memory cannot be combined with."""
    if given.get("use_cache"):
        raise SpecError(
            "found use_cache=True in a forward pass that reads memory, expected use_cache=False: memory3.generate keeps a cache"
        )
    found = [name for name in _REFUSED if given.get(name) is not None]
    if found or not isinstance(given.get("input_ids"), Tensor) or given["input_ids"].ndim != 2:
        what = f"{found[0]} given" if found else "no input_ids of two dimensions"
        raise SpecError(
            f"found {what} in a forward pass that reads memory, expected input_ids, attention_mask and labels alone"
        )
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != given["input_ids"].shape):
        raise SpecError("found an attention_mask of another shape than input_ids, expected one number for each token")
    if given.get("output_attentions") or given.get("return_dict") is False:
        raise SpecError("found output_attentions or return_dict=False, expected neither where memory is read: leave them out")


def _spans(mask: Tensor) -> list[tuple[int, int]]:
    """Where the tokens of each row begin and end between padding."""
    spans = []
    for number, row in enumerate(mask.bool().tolist()):
        count = sum(row)
        start = row.index(True) if count else 0
        if not count or not all(row[start : start + count]):
            raise SpecError(f"found padding inside row {number}, or nothing else, expected tokens with padding at one side")
        spans.append((start, start + count))
    return spans


def _places(chunks: Tensor, spans: Sequence[tuple[int, int]], length: int) -> Tensor:
    """`(B, L)`: the column in the layout of each of the caller's tokens; 0 for padding."""
    places = torch.zeros((len(spans), length), dtype=torch.long, device=chunks.device)
    for row, (start, end) in enumerate(spans):
        places[row, start:end] = (chunks[row] >= 0).nonzero()[:, 0]
    return places


def _moved(labels: Tensor, spans: Sequence[tuple[int, int]], places: Tensor, width: int) -> Tensor:
    """`(B, width)` labels in the layout; the first token of a row follows the reference BOS and is no target."""
    moved = labels.new_full((len(spans), width), IGNORED)
    for row, (start, end) in enumerate(spans):
        moved[row, places[row, start + 1 : end]] = labels[row, start + 1 : end]
    return moved
