"""Is memory used after the first chunk? How much long answers attend to it, and what it changes, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from memory3.attention import Reading, Trace
from memory3.decoder import Decoder, Layout
from memory3.evaluate.given import Tell
from memory3.generation import Completion, Prompt, complete
from memory3.recall import Recaller
from memory3.scoring import interval
from memory3.spec import SourceError

BATCH = 16
SILENT = 1e-4
"""A logit shift below this in nats is no use of memory; `Effect.silent` takes the same."""


@dataclass(frozen=True)
class ChunkUse:
    """What one chunk of one answer did with its memories, as means over its tokens.

    Args:
        mass: attention paid to memories, over all memory layers and heads; 0 where nothing was recalled.
        shift: KL divergence in nats of the next token's distribution from that of the same step with memories masked.
        references: memories that the chunk could read.
    """

    mass: float
    shift: float
    references: int


def use_by_chunk(
    decoder: Decoder,
    prompts: Sequence[str | Prompt],
    recall: Recaller,
    *,
    tokens: int = 256,
    tell: Tell | None = None,
) -> list[list[ChunkUse]]:
    """Generate `tokens` tokens for each prompt, greedily and past any `</s>`, and measure every generated chunk.

    A token counts to the chunk that it is part of. The step that foretells it is the one before, so the first token of a
    chunk still reads what the chunk before read.

    Args:
        decoder: an attached decoder.
        prompts: texts or `Prompt`s.
        recall: brings memories; give it `max_overlap` where the prompts are from the bank's own documents.
        tokens: new tokens of each.
        tell: told of prompts done.

    Raises:
        SourceError: no prompt.
    """
    if not prompts:
        raise SourceError("found no prompt, expected some to go on from")
    config = deepcopy(decoder.model.generation_config)
    config.do_sample, config.min_new_tokens = False, tokens
    found: list[list[ChunkUse]] = []
    for start in range(0, len(prompts), BATCH):
        made = [p if isinstance(p, Prompt) else Prompt.of(decoder, p) for p in prompts[start : start + BATCH]]
        done = complete(decoder, made, recall=recall, config=config, max_new_tokens=tokens)
        found += [_measured(decoder, prompt, one) for prompt, one in zip(made, done, strict=True)]
        if tell:
            tell(len(found), len(prompts))
    return found


@torch.no_grad()
def _measured(decoder: Decoder, prompt: Prompt, done: Completion) -> list[ChunkUse]:
    """One pass over prompt and answer with memories and a trace, one with memories masked."""
    size, count = decoder.spec.chunk_length, len(done.ids)
    before = ceil(len(prompt.ids) / size)
    recalls = [r for _, r in done.recalls]
    read = [*recalls[:before], recalls[before - 1], *recalls[before:]]
    grid = [n // size for n in range(len(prompt.ids))] + [before + n // size for n in range(count - 1)]
    layout, trace = decoder.layout([[*prompt.ids, *done.ids[:-1]]], grid=[grid]), Trace()
    reading = decoder.reading(layout.chunks, [[r.memories for r in read]], trace)
    remembering = _foretold(decoder, layout, reading, count)
    masked = _foretold(decoder, layout, None, count)
    shift = (remembering.exp() * (remembering - masked)).sum(-1).clamp(min=0)
    layers = [t[0, -count:].sum(-1) for t in trace.references.values()]
    mass = torch.stack(layers).mean(0) if layers else torch.zeros_like(shift)
    return [
        ChunkUse(float(m.mean()), float(s.mean()), len(read[min(before + n, len(read) - 1)].memories))
        for n, (m, s) in enumerate(zip(mass.split(size), shift.split(size), strict=True))
    ]


def _foretold(decoder: Decoder, layout: Layout, reading: Reading | None, keep: int) -> Tensor:
    """Log-probabilities `(keep, V)` of the last places."""
    logits: Tensor = decoder.forward(layout, reading, logits_to_keep=keep).logits
    return logits[0].float().log_softmax(-1)


def use_table(found: Sequence[Sequence[ChunkUse]]) -> str:
    """A Markdown table: a row per generated chunk, and one of all chunks after the first, with intervals over answers.

    "Used" is the share of answers whose logits memory shifted by `SILENT` or more.
    """
    lines = [
        "| generated chunk | answers | references | attention mass | logit shift, nats | used, % |",
        "|---|---|---|---|---|---|",
    ]
    for n in range(max(map(len, found))):
        lines.append(_row(f"chunk {n}", [[answer[n]] for answer in found if n < len(answer)]))
    if later := [answer[1:] for answer in found if len(answer) > 1]:
        lines.append(_row("all after the first", later))
    return "\n".join(lines)


def _row(name: str, answers: Sequence[Sequence[ChunkUse]]) -> str:
    def cell(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
        low, high = interval(values)
        numbers = [f"{factor * v:.{digits}f}" for v in (sum(values) / len(values), low, high)]
        return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"

    mass, shift = ([_mean([getattr(c, name) for c in answer]) for answer in answers] for name in ("mass", "shift"))
    references = _mean([_mean([c.references for c in answer]) for answer in answers])
    used = [_mean([float(c.shift >= SILENT) for c in answer]) for answer in answers]
    return f"| {name} | {len(answers)} | {references:.1f} | {cell(mass, 3)} | {cell(shift, 4)} | {cell(used, 1, 100)} |"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
