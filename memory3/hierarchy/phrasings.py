"""What a model asks itself about a reference: questions and continuations by rule, some kept apart to measure with."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from memory3.decoder import Decoder
from memory3.train.passages import Context, ContextMaker, Passage, Window
from memory3.train.questions import as_typed, questions_of
from memory3.train.teaching import asked_context

KINDS = (("asked", 0.4), ("completion", 0.4), ("cloze", 0.2))
"""What is drawn while learning, with weights; a kind that a reference does not allow gives way to the next."""
BEGINNING_WORDS, CONTINUED_TOKENS = 8, 8
"""A held continuation: so many words of a sentence, more than any beginning that is learned from, and so many tokens to foretell."""
TRIES = 8

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(A-Z0-9])")
_SUBJECT = re.compile(r"(.{2,60}?),?(?: \([^)]*\))?,? (?:is|was|are|were)\b")


@dataclass(frozen=True)
class Subject:
    """A reference, and the questions that its sentences answer by rule.

    Args:
        id: of its memory.
        text: of the reference.
        asked: questions with answers, to learn from.
        held: other wordings of questions that are learned, never learned themselves.
    """

    id: str
    text: str
    asked: tuple[tuple[str, str], ...] = ()
    held: tuple[tuple[str, str], ...] = ()


def subject_of(id: str, text: str) -> Subject:
    """A reference with its questions; of the wordings that ask for one answer, one is held where there are several."""
    title, body = _titled(text)
    groups: dict[str, list[tuple[str, str]]] = {}
    for sentence in _SENTENCE.split(body):
        for question, answer in questions_of(title, sentence):
            key = next((known for known in groups if answer in known or known in answer), answer)
            groups.setdefault(key, [])
            if all(question != q for some in groups.values() for q, _ in some):
                groups[key].append((question, answer))
    rng = random.Random(text)
    held = [rng.choice(some) for some in groups.values() if len(some) > 1]
    return Subject(id, text, tuple(q for some in groups.values() for q in some if q not in held), tuple(held))


def _titled(text: str) -> tuple[str, str]:
    """What a reference is about, and its sentences: a heading, or the grammatical subject of the first sentence."""
    head, _, rest = text.strip().partition("\n")
    if rest.strip() and len(head) <= 80 and not head.endswith((".", "!", "?")):
        return head.lstrip("# ").strip(), rest.strip()
    found = _SUBJECT.match(text.strip())
    return re.sub(r"^(?:The|A|An) ", "", found[1]) if found else "", text.strip()


# ---- contexts ----


def drawn(maker: ContextMaker, subject: Subject, length: int, rng: random.Random) -> Context | None:
    """A context about a reference to learn from, of at most `length` tokens, and never one that is held.

    Clozes are prompts of `Question: …`, so they are left out where a chat template asks in another form.
    """
    decoder = maker.decoder
    chat = getattr(decoder.tokenizer, "chat_template", None)
    kinds = [kind for kind, _ in sorted(KINDS, key=lambda k: -(rng.random() ** (1 / k[1]))) if not (chat and kind == "cloze")]
    held = {tuple(c.ids[: c.target_start]) for c in held_questions(decoder, subject)}
    passage, window = Passage("", subject.text), Window.of(decoder, subject.text)
    for _ in range(TRIES):
        for kind in kinds:
            made = _asked(decoder, subject, rng) if kind == "asked" else maker.made(kind, passage, window, rng)
            if made is not None and made.target_start < length and tuple(made.ids[: made.target_start]) not in held:
                return replace(made, ids=made.ids[:length])
    return None


def _asked(decoder: Decoder, subject: Subject, rng: random.Random) -> Context | None:
    if not subject.asked:
        return None
    question, answer = rng.choice(subject.asked)
    return asked_context(decoder, as_typed(question, rng), answer)


def held_questions(decoder: Decoder, subject: Subject) -> list[Context]:
    """The wordings that are never learned, with their answers and the end."""
    return [asked_context(decoder, question, answer) for question, answer in subject.held]


def held_continuations(decoder: Decoder, subject: Subject, most: int = 2) -> list[Context]:
    """Beginnings of its first sentences, longer than any that is learned from, to be continued."""
    found = []
    for sentence in _SENTENCE.split(_titled(subject.text)[1]):
        words = list(re.finditer(r"\S+", sentence))
        if len(words) > BEGINNING_WORDS:
            end = words[BEGINNING_WORDS - 1].end()
            prompt, rest = decoder.context(sentence[:end]), decoder.tokens(sentence[end:])[:CONTINUED_TOKENS]
            found.append(Context([*prompt, *rest], len(prompt), []))
    return found[:most]


def plain_context(decoder: Decoder, text: str, length: int) -> Context:
    """A text as the model reads it without memory, all of it to be foretold."""
    ids = decoder.context(text)[:length]
    return Context(ids, max(1, len(decoder.bos_ids)), [])
