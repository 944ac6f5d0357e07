"""Likelihood of given text in every arm: which completion is the likelier one, and how well held-out text is foretold."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import log

import torch
from torch import Tensor

from memory3.answering import question_prompt
from memory3.decoder import Decoder
from memory3.evaluate.arms import Arm
from memory3.evaluate.asking import Question
from memory3.evaluate.given import Brought, Tell
from memory3.spec import Memory, SourceError

TOKENS, LOGITS, MEMORY_BYTES = 2**13, 2**26, 2**30
"""Most tokens, most logits, and most bytes of distinct memories, of one batch; a row that is larger alone is a batch."""


@dataclass(frozen=True)
class Row:
    """Token ids, `<s>` included, whose log-probabilities count from `start` to `end` (excluded).

    `grid` is the chunk of each token, `given` the references that each chunk reads. Without a grid every token is of chunk 0.
    """

    ids: Sequence[int]
    start: int
    end: int
    given: Sequence[Sequence[str]] = ()
    grid: Sequence[int] | None = None


@torch.no_grad()
def log_probabilities(arm: Arm, rows: Sequence[Row], tell: Tell | None = None) -> list[list[float]]:
    """Log-probability in nats of every token that counts, for each row; rows of like length run together.

    What batches a row shares does not matter beyond rounding.
    """
    was_training = arm.decoder.model.training
    arm.decoder.model.eval()
    found: dict[int, list[float]] = {}
    memories: dict[str, Memory] = {}
    try:
        for batch in _batches(arm, rows):
            some = [rows[n] for n in batch]
            memories = _memories(arm, some, memories)
            for n, row in zip(batch, _run(arm, some, memories), strict=True):
                found[n] = row
            if tell:
                tell(len(found), len(rows))
    finally:
        arm.decoder.model.train(was_training)
    return [found[n] for n in range(len(rows))]


def _batches(arm: Arm, rows: Sequence[Row]) -> Iterator[list[int]]:
    """Numbers of rows, longest first, so many at a time as the limits allow. Rows that read the same follow each other."""
    alike: dict[Hashable, list[int]] = {}
    for n, row in enumerate(rows):
        alike.setdefault(tuple(map(tuple, row.given)) if any(row.given) else n, []).append(n)
    batch: list[int] = []
    groups = sorted(alike.values(), key=lambda some: (-max(len(rows[n].ids) for n in some), some[0]))
    for n in chain.from_iterable(groups):
        if batch and not _fit(arm, [rows[m] for m in (*batch, n)]):
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def _texts(rows: Iterable[Row]) -> dict[str, None]:
    """Distinct texts that some rows read, in order."""
    return dict.fromkeys(text for row in rows for chunk in row.given for text in chunk)


def _fit(arm: Arm, rows: Sequence[Row]) -> bool:
    """Whether rows are small enough for one batch."""
    decoder, spec = arm.decoder, arm.decoder.spec
    tokens, kept = max(len(row.ids) for row in rows), max(len(row.ids) - row.start + 1 for row in rows)
    logits = kept * int(decoder.model.config.get_text_config().vocab_size)
    memory_bytes = 2 * spec.pairs * spec.slots * decoder.head_dim * decoder.dtype.itemsize
    read = len(_texts(rows)) if arm.remembers else 0
    return len(rows) * tokens <= TOKENS and len(rows) * logits <= LOGITS and read * memory_bytes <= MEMORY_BYTES


def _memories(arm: Arm, rows: Sequence[Row], known: Mapping[str, Memory]) -> dict[str, Memory]:
    """Memories of what some rows read, those apart that the batch before had written."""
    texts = _texts(rows) if arm.remembers else {}
    return {t: known[t] for t in texts if t in known} | arm.memories(t for t in texts if t not in known)


def _run(arm: Arm, rows: Sequence[Row], memories: Mapping[str, Memory]) -> list[list[float]]:
    decoder = arm.decoder
    grid = [row.grid or [0] * len(row.ids) for row in rows]
    layout = decoder.layout([row.ids for row in rows], grid=grid, memory=arm.remembers)
    reading = decoder.reading(layout.chunks, [_table(row, memories) for row in rows]) if arm.remembers else None
    keep = max(len(row.ids) - row.start for row in rows) + 1
    logits = decoder.forward(layout, reading, logits_to_keep=keep).logits
    return [_of_row(logits[n], row) for n, row in enumerate(rows)]


def _table(row: Row, memories: Mapping[str, Memory]) -> list[list[Memory]]:
    return [[memories[text] for text in chunk] for chunk in row.given] or [[]]


def _of_row(logits: Tensor, row: Row) -> list[float]:
    """From logits `(keep, V)`, the last of which stand behind the last token; token `i` was foretold by the one before it."""
    behind = len(row.ids) - row.start
    foretold = logits[len(logits) - behind - 1 : len(logits) - 1][: row.end - row.start].float().log_softmax(-1)
    wanted = torch.tensor(list(row.ids[row.start : row.end]), device=logits.device)
    found: list[float] = foretold.gather(1, wanted[:, None])[:, 0].tolist()
    return found


# ---- choices ----


def chosen(arm: Arm, questions: Sequence[Question], brought: Sequence[Brought], tell: Tell | None = None) -> list[float]:
    """1 for each question whose right choice has the largest mean log-probability per token, alone; else 0.

    A context that does not fit the model's window beside the references as text, or behind their interval, loses its
    beginning, alike in all arms.
    """
    rows = [row for question, b in zip(questions, brought, strict=True) for row in _choice_rows(arm, question, b)]
    found = iter(_means(log_probabilities(arm, rows, tell)))
    scores = [[next(found) for _ in question.choices] for question in questions]
    return [float(_wins(row, q.right)) for row, q in zip(scores, questions, strict=True)]


def _means(rows: Iterable[Sequence[float]]) -> list[float]:
    return [sum(row) / len(row) for row in rows]


def _wins(scores: Sequence[float], right: int) -> bool:
    return all(scores[right] > other for n, other in enumerate(scores) if n != right)


def _choice_rows(arm: Arm, question: Question, brought: Brought) -> list[Row]:
    """A row per choice; what is given is read by the context and the choice."""
    decoder, texts = arm.decoder, arm.texts(brought)
    front = texts if arm.as_text else ()
    context, space = _context(decoder, question, front)
    endings = [decoder.tokens(space + choice) for choice in question.choices]
    if not all(endings):
        raise SourceError(f"found an empty choice of the question {question.text[:60]!r}, expected some words in each")
    bos, room = decoder.bos_ids, decoder.window - max(map(len, endings)) - len(decoder.bos_ids)
    interval = decoder.spec.reference_length
    most = (interval + len(decoder.tokens("\n\n"))) * max(len(brought.right), len(brought.wrong))
    own = max(1, room - max(interval, most))
    references, asked = context
    ids = [*bos, *references[:room], *asked[-own:]]
    given = [texts] if arm.remembers else []
    return [Row([*ids, *ending], len(ids), len(ids) + len(ending), given) for ending in endings]


def _context(decoder: Decoder, question: Question, texts: Sequence[str]) -> tuple[tuple[list[int], list[int]], str]:
    """Tokens of the references as text, tokens of what is asked, and what stands before a choice."""
    if question.plain:
        asked = question.text.rstrip()
        return (decoder.tokens("".join(f"{t}\n\n" for t in texts)), decoder.tokens(asked)), question.text[len(asked) :] or " "
    ids = list(question_prompt(decoder, question.text, texts).ids)
    own = len(question_prompt(decoder, question.text).ids)
    ids = ids[len(decoder.bos_ids) :] if ids[: len(decoder.bos_ids)] == decoder.bos_ids else ids
    place = max(0, len(ids) - own + len(decoder.bos_ids))
    return (ids[:place], ids[place:]), "" if getattr(decoder.tokenizer, "chat_template", None) else " "


# ---- held-out text ----


@dataclass(frozen=True)
class Passage:
    """A stretch of held-out text as token ids, `<s>` first; `scored_bytes` are the UTF-8 bytes of the tokens that count."""

    ids: tuple[int, ...]
    text: str
    scored_bytes: int


def passages(
    decoder: Decoder, texts: Iterable[str], *, length: int = 512, limit: int | None = None, seed: int = 0
) -> list[Passage]:
    """Texts joined by newlines and cut into stretches of `length` tokens, `<s>` included; `limit` of them in a seeded order.

    The first chunk of a stretch has no chunk before it that could recall: it is context and counts in no arm.

    Raises:
        SourceError: there is less text than one stretch, a stretch has no second chunk, or it does not fit the model's window
            behind the references' interval.
    """
    size, bos, most = decoder.spec.chunk_length, decoder.bos_ids, decoder.window - decoder.spec.reference_length
    if not size + 1 < length <= most:
        raise SourceError(f"found stretches of {length} tokens, expected {size + 2} to {most}: give another --length")
    whole = "\n".join(texts)
    marked = decoder.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets, step = list(marked["input_ids"]), marked["offset_mapping"], length - len(bos)
    starts = list(range(0, len(ids) - step + 1, step))
    if not starts:
        raise SourceError(f"found {len(ids)} tokens of text, expected at least {step}: give more text, or a smaller --length")
    random.Random(seed).shuffle(starts)
    found = []
    for start in starts[:limit]:
        first, last = start + size + 1 - len(bos), start + step - 1
        scored = whole[offsets[first][0] : offsets[last][1]]
        text = whole[offsets[start][0] : offsets[last][1]]
        found.append(Passage((*bos, *ids[start : start + step]), text, len(scored.encode("utf-8", "surrogatepass"))))
    return found


Chunks = Sequence[Brought]
"""What each chunk of a stretch reads; the first reads nothing."""


def asked_by_chunks(decoder: Decoder, stretches: Sequence[Passage]) -> list[Question]:
    """Every chunk but the last as a question, compared with its whole stretch by the overlap filter.

    First chunk 0 of every stretch, then chunk 1, and so on: so the question that follows, which gives wrong references, is
    of another stretch.
    """
    size, count = decoder.spec.chunk_length, _asking(decoder, stretches)
    decode = decoder.tokenizer.decode
    return [
        Question("", str(decode(s.ids[c * size : (c + 1) * size], skip_special_tokens=True)).strip(), whole=s.text)
        for c in range(count)
        for s in stretches
    ]


def _asking(decoder: Decoder, stretches: Sequence[Passage]) -> int:
    return -(-len(stretches[0].ids) // decoder.spec.chunk_length) - 1


def by_chunk(decoder: Decoder, stretches: Sequence[Passage], brought: Sequence[Brought]) -> list[list[Brought]]:
    """What each chunk of each stretch reads: chunk c what chunk c - 1 recalled, chunk 0 nothing."""
    many = len(stretches)
    return [[Brought(), *(brought[c * many + s] for c in range(_asking(decoder, stretches)))] for s in range(many)]


def foretold(
    arm: Arm, stretches: Sequence[Passage], reads: Sequence[Chunks], tell: Tell | None = None
) -> dict[str, list[float]]:
    """Bits per byte and per token of each stretch, over tokens that chunks behind the first foretell.

    A token of chunk c reads what chunk c - 1 recalled, as generation does, so no token was part of the query that serves
    it. As text, the references of a chunk stand before everything up to that chunk, and the chunk's tokens count: a pass of its own
    for every chunk. Bits per byte take the bytes of the sample as given, so their mean is all bits over all bytes.
    """
    groups = [_rows_of(arm, stretch, chunks) for stretch, chunks in zip(stretches, reads, strict=True)]
    found = iter(log_probabilities(arm, [row for rows in groups for row in rows], tell))
    nats = [[-p for _ in rows for p in next(found)] for rows in groups]
    bits, mean_bytes = [sum(row) / log(2) for row in nats], sum(s.scored_bytes for s in stretches) / len(stretches)
    return {
        "bits per byte": [b / mean_bytes for b in bits],
        "bits per token": [b / len(row) for b, row in zip(bits, nats, strict=True)],
    }


def _rows_of(arm: Arm, stretch: Passage, chunks: Chunks) -> list[Row]:
    decoder, size, ids = arm.decoder, arm.decoder.spec.chunk_length, stretch.ids
    if not arm.as_text:
        given = [arm.texts(b) for b in chunks]
        return [Row(ids, size + 1, len(ids), given, [n // size for n in range(len(ids))])]
    rows, bos = [], decoder.bos_ids
    for c in range(1, len(chunks)):
        end = min((c + 1) * size + 1, len(ids))
        front = decoder.tokens("".join(f"{text}\n\n" for text in arm.texts(chunks[c])))
        room = max(0, decoder.window - end)
        front = front[:room]
        rows.append(Row([*bos, *front, *ids[len(bos) : end]], len(front) + c * size + 1, len(front) + end))
    return rows
