"""What a converted model learns from, without labels: references of documents, and contexts that want them in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memory3.answering import question_prompt
from memory3.context import GAP
from memory3.decoder import Decoder
from memory3.documents import Document
from memory3.rows import answers_of
from memory3.spec import SourceError
from memory3.splitting import split
from memory3.train.loop import TrainError
from memory3.train.passages import Context, ContextMaker, Passage, Window

KINDS = ("continuation", "completion", "asked", "question", "cloze")
TRIES = 20
"""Of so many lessons for each one wanted, some allow a context; where none does, the mixture does not fit the data."""


@dataclass(frozen=True)
class Lesson:
    """A reference, what its document goes on with, and questions about it, each with its answer or an empty text."""

    reference: str
    after: str = ""
    questions: tuple[tuple[str, str], ...] = ()


def lessons(
    decoder: Decoder, documents: Iterable[Document], tell: Callable[[int, int], None] = lambda done, total: None
) -> list[Lesson]:
    """Documents as lessons: each reference, and the reference that follows it as its continuation. They are held in memory.

    Args:
        decoder: gives tokenizer and `reference_length`.
        documents: as of `memory3.documents.documents`.
        tell: told of the documents cut so far; nobody knows how many there are, so the total is the same number.
    """
    found: list[Lesson] = []
    for count, document in enumerate(documents, 1):
        length, markdown = decoder.spec.reference_length, document.markdown
        texts = [r.text for r in split(document.text, decoder.tokenizer, document.name, length, markdown=markdown)]
        found += [Lesson(text, after) for text, after in zip(texts, [*texts[1:], ""], strict=True)]
        tell(count, count)
    return merged(found)


def asked(decoder: Decoder, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Lesson]:
    """Rows with a `question`, its `passage` (or `text`) and perhaps `answers` (or `answer`: a text or several) as lessons.

    The reference is the first piece of the passage that holds an answer. Without an answer only a passage of one piece is
    taken, for nobody knows which piece is meant.

    Args:
        decoder: gives tokenizer and `reference_length`.
        rows: each with the place that an error names, as `memory3.rows.rows` gives them.

    Raises:
        SourceError: a row without a question or a passage, or with answers that are no texts.
    """
    return merged(lesson for where, row in rows for lesson in _asked(decoder, row, where))


def _asked(decoder: Decoder, row: Mapping[str, Any], where: str) -> list[Lesson]:
    question, passage = row.get("question"), row.get("passage", row.get("text"))
    if not isinstance(question, str) or not question.strip() or not isinstance(passage, str):
        raise SourceError(
            f"found the fields {', '.join(map(repr, row)) or 'none'} at {where}, expected texts under 'question' and 'passage' or "
            "'text': name the columns so"
        )
    answers = answers_of(row, where)
    pieces = [p.text for p in split(passage, decoder.tokenizer, length=decoder.spec.reference_length)]
    held = next(((p, a) for p in pieces for a in answers if a in p), None)
    if held is not None:
        return [Lesson(held[0], questions=((question.strip(), held[1]),))]
    return [] if answers or len(pieces) != 1 else [Lesson(pieces[0], questions=((question.strip(), ""),))]


def merged(found: Iterable[Lesson]) -> list[Lesson]:
    """One lesson for each reference, with all its questions and its first continuation: no reference is its own distractor."""
    kept: dict[str, Lesson] = {}
    for lesson in found:
        known = kept.get(lesson.reference)
        kept[lesson.reference] = lesson if known is None else _joined(known, lesson)
    return list(kept.values())


def _joined(first: Lesson, second: Lesson) -> Lesson:
    questions = tuple(dict.fromkeys([*first.questions, *second.questions]))
    return Lesson(first.reference, first.after or second.after, questions)


def parted(found: Sequence[Lesson], held: int, seed: int = 0) -> tuple[list[Lesson], list[Lesson]]:
    """The lessons in a drawn order, but for `held` of them, and those: what a run is measured on and never learns from.

    Whole documents are held, in a drawn order; where the last is too long, it is cut in two. No lesson goes on across the
    border: a continuation that the other side knows is left out.
    """
    rng = random.Random(seed)
    chains = _chains(found)
    rng.shuffle(chains)
    order = [lesson for chain in chains for lesson in chain]
    kept, apart = order[held:], order[:held]
    sides = ({lesson.reference for lesson in kept}, {lesson.reference for lesson in apart})
    starts = ({lesson.after for lesson in kept}, {lesson.after for lesson in apart})
    known = (sides[0] | starts[0], sides[1] | starts[1])
    return rng.sample(_without(kept, known[1]), len(kept)), rng.sample(_without(apart, known[0]), len(apart))


def _chains(found: Sequence[Lesson]) -> list[list[Lesson]]:
    """Lessons that stand together because one goes on with the other: those of a document, in its order."""
    first = {lesson.reference: lesson.reference for lesson in found}

    def root(reference: str) -> str:
        while first[reference] != reference:
            first[reference] = reference = first[first[reference]]
        return reference

    for lesson in found:
        if lesson.after in first:
            first[root(lesson.after)] = root(lesson.reference)
    chains: dict[str, list[Lesson]] = {}
    for lesson in found:
        chains.setdefault(root(lesson.reference), []).append(lesson)
    return list(chains.values())


def _without(lessons: Sequence[Lesson], texts: Collection[str]) -> list[Lesson]:
    return [replace(lesson, after="") if lesson.after in texts else lesson for lesson in lessons]


@dataclass(frozen=True)
class Mixture:
    """How lessons become batches. `tasks` are `(kind, weight)` pairs.

    Kinds: `continuation` is what the document says next; `completion` begins a sentence of the reference, to be completed
    from it; `asked` is a question of the lesson in the form that `memory3 ask` gives it. `question` and `cloze`, made by
    rule from English sentences, can be mixed in.

    Args:
        batch: references of a batch.
        contexts: most contexts for each of them.
        length: most tokens of a context.
        references: most that one context reads; by default the spec's `references_per_chunk`.
        crowded: share of contexts that read others' references beside their own, as many as `references` says.
        wrong: share that read others' references only.

    Raises:
        TrainError: an unknown kind, a weight of 0 or less, a share outside 0 to 1, or a count below 1.
    """

    tasks: tuple[tuple[str, float], ...] = (("continuation", 0.4), ("completion", 0.3), ("asked", 0.3))
    batch: int = 8
    contexts: int = 2
    length: int = 64
    references: int | None = None
    crowded: float = 0.75
    wrong: float = 0.1

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task[0] not in KINDS or task[1] <= 0]
        if unknown or not self.tasks:
            raise TrainError(f"found the tasks {unknown or 'none'}, expected some of {', '.join(KINDS)}, with weights above 0")
        for name in ("crowded", "wrong"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainError(f"found {name}={getattr(self, name)!r}, expected a share from 0 to 1")
        for name in ("batch", "contexts", "length", "references"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainError(f"found {name}={value!r}, expected a whole number of at least 1")


@dataclass(frozen=True)
class Batch:
    """References, contexts, which reference each context is about, and which it reads, in the order of the teacher's text."""

    references: list[str]
    contexts: list[Context]
    about: list[int]
    read: list[list[int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return max(len(context.ids) for context in self.contexts)

    def texts(self, context: int) -> list[str]:
        """The references that a context reads."""
        return [self.references[n] for n in self.read[context]]

    def misled(self) -> Batch:
        """The same contexts, each reading as many references as before, but only such as are about others (control)."""
        others = [[n for n in range(len(self.references)) if n != own] for own in self.about]
        turned = [
            row[own % max(1, len(row)) :] + row[: own % max(1, len(row))] for own, row in zip(self.about, others, strict=True)
        ]
        return replace(self, read=[row[: len(read)] for row, read in zip(turned, self.read, strict=True)])


class Lessons:
    """Batches of lessons, each drawn from `(seed, number)` alone.

    Args:
        decoder: gives tokenizer, chat template and `references_per_chunk`.
        pool: lessons of distinct references (`merged`).
        mixture: what is drawn.
        seed: of the draws.

    Raises:
        TrainError: no lesson, no `</s>`, or (of `batch`) no context that the mixture allows.
    """

    def __init__(self, decoder: Decoder, pool: Sequence[Lesson], mixture: Mixture, seed: int = 0) -> None:
        if not pool:
            raise TrainError("found no lesson to convert with, expected some: give documents of at least two references")
        if decoder.tokenizer.eos_token_id is None:
            raise TrainError(
                "found a tokenizer without an end token, expected one: set tokenizer.eos_token, answers end with it"
            )
        self.decoder, self.pool, self.mixture, self.seed = decoder, pool, mixture, seed
        self.read = mixture.references or decoder.spec.references_per_chunk
        self.maker = ContextMaker(decoder)

    def batch(self, number: int) -> Batch:
        """A batch by its number, the same whenever asked."""
        rng = random.Random(self.seed * 1_000_003 + number)
        references: list[str] = []
        contexts: list[Context] = []
        about: list[int] = []
        for n in rng.sample(range(len(self.pool)), min(len(self.pool), TRIES * self.mixture.batch)):
            made = self._made(self.pool[n], rng)
            if made:
                contexts += made
                about += [len(references)] * len(made)
                references.append(self.pool[n].reference)
            if len(references) == self.mixture.batch:
                break
        if not contexts:
            kinds = ", ".join(kind for kind, _ in self.mixture.tasks)
            raise TrainError(
                f"found {len(self.pool)} lessons that allow no context of the kinds {kinds}, expected some: give longer documents or questions"
            )
        return Batch(references, contexts, about, [self._drawn(own, len(references), rng) for own in about])

    def _made(self, lesson: Lesson, rng: random.Random) -> list[Context]:
        """Distinct contexts about one lesson, none longer than the mixture allows."""
        made = [self._one(lesson, rng) for _ in range(self.mixture.contexts)]
        fitting = [c for c in made if c is not None and c.target_start < self.mixture.length]
        return list({tuple(c.ids): replace(c, ids=c.ids[: self.mixture.length]) for c in fitting}.values())

    def _one(self, lesson: Lesson, rng: random.Random) -> Context | None:
        """A context of a drawn kind, or of the next where the lesson allows none of it (Efraimidis and Spirakis 2006)."""
        kinds = sorted(self.mixture.tasks, key=lambda task: -(rng.random() ** (1 / task[1])))
        made = (self._context(kind, lesson, rng) for kind, _ in kinds)
        return next((context for context in made if context is not None), None)

    def _context(self, kind: str, lesson: Lesson, rng: random.Random) -> Context | None:
        if kind == "continuation":
            bos, after = self.decoder.bos_ids, self.decoder.tokens(lesson.after)
            return Context([*bos, *after], max(1, len(bos)), []) if after else None
        if kind == "asked":
            return asked_context(self.decoder, *rng.choice(lesson.questions)) if lesson.questions else None
        return self.maker.made(kind, Passage("", lesson.reference), Window.of(self.decoder, lesson.reference), rng)

    def _drawn(self, own: int, count: int, rng: random.Random) -> list[int]:
        """What a context reads: its own reference, alone or among others, or others only; in a drawn order."""
        others = rng.sample([n for n in range(count) if n != own], min(count - 1, self.read))
        draw = rng.random()
        if others and draw < self.mixture.wrong:
            return others
        row = [own, *(others[: self.read - 1] if rng.random() < self.mixture.crowded else [])]
        rng.shuffle(row)
        return row


def asked_context(decoder: Decoder, question: str, answer: str) -> Context:
    """The prompt as it will be asked, with the answer and the end behind it where one is known."""
    prompt = list(question_prompt(decoder, question).ids)
    if not answer:
        return Context(prompt, len(prompt), [])
    space = "" if getattr(decoder.tokenizer, "chat_template", None) else " "
    return Context([*prompt, *decoder.tokens(space + answer), int(decoder.tokenizer.eos_token_id)], len(prompt), [])


def longest_text(decoder: Decoder, mixture: Mixture) -> int:
    """Most tokens of a teacher's prompt behind the reference BOS: all references as text, and the context."""
    count = mixture.references or decoder.spec.references_per_chunk
    return count * (decoder.spec.reference_length + len(decoder.tokens(GAP))) + mixture.length
