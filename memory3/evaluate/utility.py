"""What is each reference worth? The loss of the words behind a recall, with it and without it, the others kept (Remark 7).

One recall is one use: a prompt of one chunk and what follows it, at most a chunk. Both read what the prompt recalled, as in
generation, so that the words that are scored are never searched with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from memory3.answering import question_prompt
from memory3.decoder import Decoder
from memory3.generation import Prompt
from memory3.recall import Recalled, Recaller
from memory3.scoring import interval
from memory3.spec import Memory, SourceError

BATCH = 16
"""Sequences of a forward pass."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Use:
    """A prompt of one chunk with its `<s>`, and the tokens behind it whose loss counts.

    `whole` is what the overlap filter compares references with: prompt and answer, and of a text so much around them that a
    reference of this very text is in it however it was cut.
    """

    prompt: Prompt
    answer: tuple[int, ...]
    whole: str


@dataclass(frozen=True)
class Utility:
    """A reference: how often it was recalled, and the mean drop of the loss in nats per token that it brought there."""

    id: str
    uses: int
    mean: float

    def row(self) -> str:
        """A row of a Markdown table."""
        return f"| {self.id} | {self.uses} | {self.mean:+.4f} |"


@dataclass(frozen=True)
class Worth:
    """References by utility, largest first, and the loss of each use that recalled any: with all of them, and with none."""

    ranked: tuple[Utility, ...]
    with_memory: tuple[float, ...]
    without: tuple[float, ...]

    def below(self, least: float) -> list[str]:
        """Ids whose utility is smaller, least useful first: what `memory3 bank delete` takes."""
        return [one.id for one in reversed(self.ranked) if one.mean < least]


def question_use(decoder: Decoder, question: str, answer: str) -> Use | None:
    """A question in the model's own prompt and its answer; `None` where the prompt is longer than a chunk."""
    prompt = question_prompt(decoder, question)
    ids = decoder.tokens(f" {answer.strip()}")[: decoder.spec.chunk_length]
    whole = f"{question.strip()} {answer.strip()}"
    return Use(prompt, tuple(ids), whole) if ids and len(prompt.ids) <= decoder.spec.chunk_length else None


def text_uses(decoder: Decoder, text: str) -> list[Use]:
    """Each chunk of a text before the next one."""
    bos, size, ids = decoder.bos_ids, decoder.spec.chunk_length, decoder.tokens(text)
    step, around = max(1, size - len(bos)), decoder.spec.reference_length
    marks = (*[False] * len(bos), *[True] * step)
    return [
        Use(
            Prompt((*bos, *ids[start : start + step]), marks),
            tuple(ids[start + step :][:size]),
            str(decoder.tokenizer.decode(ids[max(0, start - around) : start + step + size + around], skip_special_tokens=True)),
        )
        for start in range(0, len(ids) - step, step)
    ]


def uses_of(decoder: Decoder, path: Path) -> list[Use]:
    """Uses of a file: JSON lines with `question` and `answer` or `answers` (the first counts), or UTF-8 text.

    Questions longer than a chunk are left out.

    Raises:
        SourceError: it cannot be read, a line lacks a question or an answer, or nothing is left.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"found no readable {path} ({error}), expected JSON lines of questions, or UTF-8 text") from None
    if path.suffix == ".jsonl":
        asked = [_pair(line, f"{path}:{n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        found = [use for question, answer in asked if (use := question_use(decoder, question, answer)) is not None]
    else:
        found = text_uses(decoder, text)
    if not found:
        raise SourceError(
            f"found nothing to measure in {path}, expected questions of at most a chunk, or text of more than one"
        )
    return found


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        answers = row["answers"] if "answers" in row else [row["answer"]]
        question, answer = row["question"].strip(), answers[0].strip()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        question = answer = ""
    if not question or not answer:
        raise SourceError(f"found no question with its answer at {where}, expected a JSON object with 'question' and 'answers'")
    return question, answer


def utilities(
    decoder: Decoder, recall: Recaller, uses: Iterable[Use], total: int, tell: Tell | None = None, batch: int = BATCH
) -> Worth:
    """Measure every reference that the uses recall.

    Args:
        decoder: an attached decoder.
        recall: what would be recalled in earnest, its overlap filter included.
        uses: prompts and what follows them.
        total: how many, for `tell`.
        tell: told of progress: uses done, of how many.
        batch: sequences of a forward pass.

    Raises:
        BankMismatch: memories of another model would be read.
        SourceError: nothing was recalled at all.
    """
    recall.check(decoder)
    drops: dict[str, list[float]] = {}
    kept: list[float] = []
    without: list[float] = []
    for done, (use, recalled) in enumerate(_recalled(decoder, recall, uses, batch), 1):
        if recalled.hits:
            whole, none, *lacking = _losses(decoder, use, _variants(recalled.memories), batch)
            kept.append(whole)
            without.append(none)
            for hit, loss in zip(recalled.hits, lacking, strict=True):
                drops.setdefault(hit.id, []).append(loss - whole)
        if tell:
            tell(done, total)
    if not drops:
        raise SourceError("found no reference that any prompt recalls, expected some: give another bank, or other questions")
    ranked = [Utility(id, len(values), sum(values) / len(values)) for id, values in drops.items()]
    return Worth(tuple(sorted(ranked, key=lambda one: (-one.mean, one.id))), tuple(kept), tuple(without))


def _recalled(decoder: Decoder, recall: Recaller, uses: Iterable[Use], batch: int) -> Iterator[tuple[Use, Recalled]]:
    """Each use with what its prompt brings; a prompt without words brings nothing."""
    waiting: list[Use] = []
    for use in uses:
        waiting.append(use)
        if len(waiting) == batch:
            yield from _searched(decoder, recall, waiting)
            waiting = []
    yield from _searched(decoder, recall, waiting)


def _searched(decoder: Decoder, recall: Recaller, uses: Sequence[Use]) -> Iterator[tuple[Use, Recalled]]:
    queries = [use.prompt.query(decoder, 0, len(use.prompt.ids)) for use in uses]
    asking = [(use, query) for use, query in zip(uses, queries, strict=True) if query]
    found = iter(recall([query for _, query in asking], [use.whole for use, _ in asking]) if asking else [])
    return ((use, next(found) if query else Recalled("")) for use, query in zip(uses, queries, strict=True))


def _variants(memories: Sequence[Memory]) -> list[Sequence[Memory]]:
    """All memories, none, and all but each."""
    return [memories, (), *([*memories[:n], *memories[n + 1 :]] for n in range(len(memories)))]


@torch.no_grad()
def _losses(decoder: Decoder, use: Use, variants: Sequence[Sequence[Memory]], batch: int) -> list[float]:
    """Mean loss in nats per token of a use's answer under each variant."""
    ids = [*use.prompt.ids, *use.answer]
    target = torch.tensor(use.answer, device=decoder.device)
    found: list[float] = []
    for start in range(0, len(variants), batch):
        part = variants[start : start + batch]
        layout = decoder.layout([ids[:-1]] * len(part), grid=[[0] * (len(ids) - 1)] * len(part))
        reading = decoder.reading(layout.chunks, [[memories] for memories in part])
        logits = decoder.forward(layout, reading, logits_to_keep=len(target)).logits.float()
        found += [float(functional.cross_entropy(row, target)) for row in logits]
    return found


def measure_utility(
    decoder: Decoder,
    recall: Recaller,
    path: Path,
    out: Path | None = None,
    drop: Path | None = None,
    least: float = 0.0,
    limit: int | None = None,
    tell: Tell | None = None,
) -> Worth:
    """Print the ranking over a file of questions or text.

    Args:
        decoder: an attached decoder.
        recall: what would be recalled in earnest.
        path: as of `uses_of`.
        out: a JSON file for all of it: the losses, and id, uses and utility of each reference.
        drop: a plain file for the ids whose utility is below `least`, one a line.
        least: in nats per token.
        limit: at most so many uses.
        tell: told of progress.
    """
    uses = uses_of(decoder, path)[:limit]
    worth = utilities(decoder, recall, uses, len(uses), tell)
    gains = [n - w for w, n in zip(worth.with_memory, worth.without, strict=True)]
    low, high = interval(gains)
    mean = sum(gains) / len(gains)
    print(f"{len(gains)} of {len(uses)} prompts recalled; together their memories lower the loss by")
    print(f"{mean:.4f} [{low:.4f}, {high:.4f}] nats per token\n")
    print("| reference | uses | utility, nats per token |\n|---|---|---|")
    for one in worth.ranked:
        print(one.row())
    if out is not None:
        _keep(out, json.dumps(_document(worth), indent=1) + "\n")
    if drop is not None:
        _keep(drop, "".join(f"{id}\n" for id in worth.below(least)))
    return worth


def _keep(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")


def _document(worth: Worth) -> dict[str, Any]:
    """The JSON of a measurement."""
    return {
        "prompts": len(worth.with_memory),
        "loss_with_memory": sum(worth.with_memory) / len(worth.with_memory),
        "loss_without": sum(worth.without) / len(worth.without),
        "references": [{"id": one.id, "uses": one.uses, "utility": one.mean} for one in worth.ranked],
    }
