"""Supervised finetuning: prompts with responses, the loss on the response alone, memory recalled as generation recalls it.

Source: arXiv 2407.01178, 6 (cosine, at most 5e-5, 10 % warmup, 3 epochs); design section 4. Rows are not packed, for each
recalls for itself; batches are of like length instead.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from memory3.answering import QUESTION, question_prompt
from memory3.decoder import Decoder
from memory3.generation import Prompt
from memory3.quiet import without_warnings
from memory3.rows import Row, answers_of, of_split, rows
from memory3.spec import SourceError
from memory3.train.grid import Answered, Found, Recalls, layout_of, reading_of, recalled
from memory3.train.settings import Cosine, TrainError

PEAK, WARMUP_SHARE, EPOCHS = 5e-5, 0.1, 3
"""Of the paper's finetuning: highest learning rate, share of the steps that warm up, passes over the data."""
LONGEST = 1024
"""Tokens of a prompt with its response; what is longer loses the end of its response."""
POOL = 32
"""So many batches are drawn together and sorted by length."""
FORMS = "prompt and response, question and answers, or messages"

Tell = Callable[[int, int], None]
T = TypeVar("T")


def schedule_of(peak: float, steps: int) -> Cosine:
    """The paper's: 10 % of the steps up to the peak, then a cosine down to nothing."""
    return Cosine(peak, steps, warmup=max(1, round(WARMUP_SHARE * steps)), floor=0.0)


def steps_of(rows: int, size: int, epochs: int, per_step: int = 1) -> int:
    """Optimizer steps of so many passes over the rows: batches of at most `size` rows, `per_step` of them in each step."""
    batches = -(-rows // min(size, rows))
    return -(-epochs * batches // per_step)


class LikeLength:
    """Batches of rows of like length: a function of the seed and the batch's number; each epoch has its own order.

    Every batch is full, because processes that work together must have equally many rows: the last of an epoch takes rows
    that were seen in it already.

    Args:
        lengths: of the rows, at least one.
        size: rows of a batch; never more than there are.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        if not lengths or size < 1:
            raise TrainError(f"found {len(lengths)} rows for batches of {size}, expected at least 1 of each: give more data")
        self.lengths, self.size, self.seed = list(lengths), min(size, len(lengths)), seed
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.lengths) // self.size)

    def __call__(self, number: int) -> list[int]:
        """Numbers of the rows of a batch."""
        epoch, place = divmod(number, len(self))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1][place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng, order = random.Random(self.seed * 1_000_003 + epoch), list(range(len(self.lengths)))
        rng.shuffle(order)
        order += order[: len(self) * self.size - len(order)]
        batches = []
        for start in range(0, len(order), self.size * POOL):
            pool = sorted(order[start : start + self.size * POOL], key=lambda n: self.lengths[n])
            batches += [pool[first : first + self.size] for first in range(0, len(pool), self.size)]
        rng.shuffle(batches)
        return batches


class Instruct:
    """An `Objective`: mean cross-entropy of response tokens.

    Args:
        examples: prompts with responses, none empty.
        size: examples of a batch.
        seed: of the order.
        recall: brings the texts that a chunk reads (`RecalledTexts`), which are encoded in the step with gradient; asked
            once for each example. `None` trains without memory and without its layout.
    """

    def __init__(self, examples: Sequence[Answered], size: int, seed: int, recall: Recalls | None = None) -> None:
        self.examples, self.recall = examples, recall
        self.batches = LikeLength([len(example.ids) for example in examples], size, seed)
        self._found: dict[int, list[Found]] = {}

    def batch(self, step: int) -> list[int]:
        """Numbers of the examples of a step, the same whenever asked."""
        return self.batches(step)

    def tokens(self, batch: Sequence[int]) -> int:
        """Tokens of prompts and responses, padding and references not counted."""
        return sum(len(self.examples[n].ids) for n in batch)

    def loss(self, decoder: Decoder, batch: Sequence[int], step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean `()` over the response tokens of the batch; the share of them that are predicted, and of chunks with references."""
        rows = [self.examples[n] for n in batch]
        if self.recall is None:
            layout = decoder.layout([row.ids for row in rows], padding_side="right", memory=False)
            return target_loss(decoder, layout, None, rows)
        found = self._recalled(decoder, batch, self.recall)
        layout = layout_of(decoder, rows)
        loss, figures = target_loss(decoder, layout, reading_of(decoder, layout, found), rows)
        chunks = [bool(chunk) for row in found for chunk in row]
        return loss, figures | {"chunks_with_reference": sum(chunks) / len(chunks)}

    def _recalled(self, decoder: Decoder, batch: Sequence[int], recall: Recalls) -> list[list[Found]]:
        fresh = [n for n in batch if n not in self._found]
        found = recalled(decoder, [self.examples[n] for n in fresh], recall)
        self._found.update(zip(fresh, found, strict=True))
        return [self._found[n] for n in batch]


def target_loss(decoder: Decoder, layout: Any, reading: Any, rows: Sequence[Answered]) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy `()` of the responses in right-padded rows; logits are made from the first response on only."""
    width, front = layout.input_ids.shape[1], len(decoder.prefix_ids) if layout.memory else 0
    target = torch.zeros((len(rows), width), dtype=torch.bool)
    for mask, row in zip(target, rows, strict=True):
        mask[front + len(row.prompt.ids) : front + len(row.ids)] = True
    columns = torch.arange(int(target.any(0).nonzero()[0]) - 1, width - 1, device=decoder.device)
    logits = decoder.forward(layout, reading, logits_to_keep=columns).logits
    chosen = target.to(decoder.device)[:, columns + 1]
    predicted, labels = logits[chosen].float(), layout.input_ids[:, columns + 1][chosen]
    accuracy = float((predicted.detach().argmax(-1) == labels).float().mean())
    return functional.cross_entropy(predicted, labels), {"accuracy": accuracy}


# ---- rows ----


def examples_of(
    decoder: Decoder, path: Path, *, split: str = "train", longest: int = LONGEST, tell: Tell | None = None
) -> list[Answered]:
    """Examples of a file of rows; those whose prompt alone is too long are left out.

    A row has `prompt` and `response` (plain text, as it is), `question` and `answers` (or `answer`; the first is learned), or `messages`
    (in the tokenizer's chat template, else as `Question: … Answer: …`; the last message is the response). An empty response is the end token alone.

    Args:
        decoder: gives the tokenizer.
        path: a table, see `memory3.rows.rows`.
        split: rows that have a `split` of another name are left out.
        longest: most tokens of an example; a longer response is cut, and loses its end token.
        tell: told of the rows of the split that are done.

    Raises:
        SourceError: the file, or a row of it, cannot be read.
        TrainError: no row is left.
    """

    def made(where: str, row: Row) -> Answered | None:
        return cut(answered(decoder, row, where), longest)

    found, count = gathered(path, made, split, tell)
    if not found:
        raise TrainError(f"found no example among {count} rows of {path}, expected some of split {split!r}: give others")
    return found


def gathered(
    source: str | os.PathLike[str], made: Callable[[str, Row], T | None], split: str, tell: Tell | None
) -> tuple[list[T], int]:
    """What `made` makes of each row of a split and its place where that is anything, and how many rows there were of all
    splits; quietly, for texts are cut afterwards.
    """
    every, found = list(rows(source)), []
    kept = list(of_split(every, split))
    with without_warnings():
        for number, (where, row) in enumerate(kept, 1):
            if (one := made(where, row)) is not None:
                found.append(one)
            if tell:
                tell(number, len(kept))
    return found, len(every)


def answered(decoder: Decoder, row: dict[str, Any], where: str) -> Answered:
    """The example of a row; `SourceError` names the place where it is of none of the three forms."""
    if row.get("messages") is not None:
        return conversation(decoder, row["messages"], where)
    if row.get("question") is not None:
        answers = answers_of(row, where)
        if not answers:
            raise SourceError(f"found a question without an answer at {where}, expected a list of texts under 'answers'")
        return conversation(decoder, [_said("user", row["question"]), _said("assistant", answers[0])], where)
    return plain(decoder, row.get("prompt"), row.get("response"), where)


def plain(decoder: Decoder, prompt: Any, response: Any, where: str) -> Answered:
    """A prompt and its response as plain text, as they are, and the end token; an empty response is the end token alone."""
    for text, some in ((prompt, True), (response, False)):
        if not isinstance(text, str) or (some and not text.strip()):
            raise SourceError(f"found {text!r} for a text at {where}, expected {FORMS}, as text; a prompt that is not empty")
    return Answered(Prompt.of(decoder, prompt), (*decoder.tokens(response), *_end(decoder)))


def conversation(decoder: Decoder, messages: Any, where: str) -> Answered:
    """The last message as the response to those before it; only what users said is ever searched with.

    Args:
        decoder: gives the tokenizer; without a chat template the turns become `Question: … Answer: …`.
        messages: `role` and `content` of each.
        where: place that an error names.
    """
    said = _checked(messages, where)
    if getattr(decoder.tokenizer, "chat_template", None):
        return _templated(decoder, said, where)
    front = "".join(f"{m['content']}\n\n" for m in said if m["role"] == "system")
    turns = [m for m in said if m["role"] != "system"]
    if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise SourceError(f"found roles {[m['role'] for m in turns]} at {where}, expected user and assistant in turn")
    asked, answers = [m["content"] for m in turns[::2]], [m["content"] for m in turns[1::2]]
    for question, answer in zip(asked[:-1], answers, strict=False):
        front += f"{QUESTION.format(question=question)} {answer}\n\n"
    systems = [m for m in said if m["role"] == "system"]
    prompt = marked(decoder, front + QUESTION.format(question=asked[-1]), [*systems, *turns[:-1]], where)
    response = f" {answers[-1]}" if answers[-1] else ""
    return Answered(prompt, (*decoder.tokens(response), *_end(decoder)))


def _templated(decoder: Decoder, said: list[dict[str, str]], where: str) -> Answered:
    """In the chat template; the response ends with the template's own end of turn where it has one."""

    def rendered(some: list[dict[str, str]], more: bool) -> str:
        return str(decoder.tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=more))

    users = [m["content"] for m in said if m["role"] == "user"]
    before, whole = rendered(said[:-1], True), rendered(said, False)
    response = whole[len(before) :].rstrip() if whole.startswith(before) else said[-1]["content"]
    ids = decoder.tokens(response)
    end = [] if ids and ids[-1] in decoder.tokenizer.all_special_ids else _end(decoder)
    if len(users) == 1 and len(said) == 2:
        return Answered(question_prompt(decoder, users[0]), (*ids, *end))
    return Answered(marked(decoder, before, said[:-1], where), (*ids, *end))


def marked(decoder: Decoder, text: str, said: Sequence[Mapping[str, str]], where: str) -> Prompt:
    """A prompt of a text in which messages stand in this order; its content is what users said."""
    whole, end, words = Prompt.of(decoder, text), len(text), []
    for message in reversed(said):  # from the end: each before the one behind it, whose words may repeat its own
        start, mine = text.rfind(message["content"], 0, end), message["role"] == "user"
        if start < 0 and mine:
            raise SourceError(f"found a chat template that changes what users said at {where}, expected one that keeps it")
        if mine:
            words.append((start, start + len(message["content"])))
        end = start if start >= 0 else end
    places = decoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = [any(a < end and b > start for start, end in words) for a, b in places]
    return Prompt(whole.ids, (*[False] * (len(whole.ids) - len(inside)), *inside))


def _checked(messages: Any, where: str) -> list[dict[str, str]]:
    """Messages with their contents stripped, as a chat template may strip them too."""
    expected = "expected role and content of each, a user's first and an assistant's last"
    if not isinstance(messages, list) or len(messages) < 2:
        raise SourceError(f"found no conversation at {where}, {expected}")
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(content, str) or role not in _ROLES or not (content.strip() or role == "assistant"):
            raise SourceError(f"found the message {str(message)[:60]!r} at {where}, {expected}")
    said = [_said(message["role"], message["content"]) for message in messages]
    if said[-1]["role"] != "assistant" or "user" not in [m["role"] for m in said[:-1]]:
        raise SourceError(f"found roles {[m['role'] for m in said]} at {where}, {expected}")
    return said


_ROLES = ("system", "user", "assistant")


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content.strip() if isinstance(content, str) else content}


def _end(decoder: Decoder) -> list[int]:
    end = decoder.tokenizer.eos_token_id
    return [] if end is None else [int(end)]


def cut(example: Answered, longest: int) -> Answered | None:
    """At most so many tokens of it; `None` where that leaves no response."""
    left = longest - len(example.prompt.ids)
    return Answered(example.prompt, example.response[:left]) if left > 0 and example.response else None
