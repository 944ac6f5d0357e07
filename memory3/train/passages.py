"""Passages and what is asked about them: windows that fit into a reference, and contexts whose answers stand in it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from memory3.answering import QUESTION
from memory3.decoder import Decoder
from memory3.train.questions import as_typed, questions_of

LONGEST_PROMPT = 48
"""Prompts of more tokens are left out, so that the others need not be padded to them."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(A-Z0-9])")
_SPAN = re.compile(r"\b(?:[A-Z][\w'-]+(?: (?:of|the|de|and|von|[A-Z][\w'-]+)){0,2}|\d[\d,.]*\d|\d|[a-z]{5,})\b")


@dataclass(frozen=True)
class Passage:
    """A text to be put in memory, and the questions that people asked about it."""

    title: str
    text: str
    questions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Window:
    """A part of a passage that fits into a reference, as text and as tokens with their character spans."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, decoder: Decoder, text: str) -> Window:
        """The first tokens of a text, at most `reference_length`."""
        most = decoder.spec.reference_length
        made = decoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = made["input_ids"][:most], made["offset_mapping"][:most]
        return cls(text[: spans[-1][1]] if spans else "", ids, spans)

    @cached_property
    def token_at(self) -> list[int]:
        """For each character the token that it belongs to."""
        found = [-1] * (len(self.text) + 1)
        for n, (start, end) in enumerate(self.spans):
            found[start:end] = [n] * (end - start)
        return found

    def sentence_at(self, place: int) -> list[int]:
        """The tokens of the sentence around a character."""
        ends = [0, *(m.end() for m in _SENTENCE.finditer(self.text)), len(self.text)]
        last = next((n for n, end in enumerate(ends) if end > place), len(ends) - 1)
        return sorted({n for n in self.token_at[ends[max(0, last - 1)] : ends[last]] if n >= 0})

    def places_of(self, answer: str) -> list[int]:
        """Where an answer begins, as character offsets."""
        return [m.start() for m in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", self.text)]


@dataclass(frozen=True)
class Context:
    """A prompt with its target, and where in the reference each token of the target stands.

    `pointers[i]` are the reference's tokens that target token `i` may be read from; none for the end of a sequence.
    `sentence` are those of the sentence around the first of them.
    """

    ids: list[int]
    target_start: int
    pointers: list[list[int]]
    sentence: list[int] = field(default_factory=list)


class ContextMaker:
    """Questions, clozes and completions about a window."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.eos = decoder, int(decoder.tokenizer.eos_token_id)

    def made(self, kind: str, passage: Passage, window: Window, rng: random.Random) -> Context | None:
        """One context of a kind (`asked`, `question`, `cloze`, `completion`); `None` where the window allows none."""
        if kind == "asked":
            fitting = [q for q in passage.questions if q[1] in window.text]
            return self.question(*rng.choice(fitting), window, rng) if fitting else None
        if kind == "question":
            return self._by_rule(passage, window, rng)
        return self._completion(window, rng) if kind == "completion" else self._cloze(window, rng)

    def question(self, question: str, answer: str, window: Window, rng: random.Random) -> Context | None:
        """The context of a question whose answer stands in the window."""
        places = window.places_of(answer)
        return self._context(QUESTION.format(question=question), f" {answer}", window, places) if places else None

    def _by_rule(self, passage: Passage, window: Window, rng: random.Random) -> Context | None:
        sentences = _SENTENCE.split(window.text)
        rng.shuffle(sentences)
        for sentence in sentences[:3]:
            made = questions_of(passage.title, sentence)
            if made:
                question, answer = rng.choice(made)
                return self.question(as_typed(question, rng), answer, window, rng)
        return None

    def _cloze(self, window: Window, rng: random.Random) -> Context | None:
        """`Question: <sentence with a gap>?`"""
        sentences = [s for s in _SENTENCE.split(window.text) if 4 <= len(s.split()) <= 35]
        if not sentences:
            return None
        sentence = rng.choice(sentences).strip()
        spans = list(_SPAN.finditer(sentence))
        if not spans:
            return None
        marked = [s for s in spans if not s.group().islower()]
        span = rng.choice(marked if marked and rng.random() < 0.8 else spans)
        left, right = sentence[: span.start()].split(), sentence[span.end() :].split()
        # A shortened clue asks for reading by meaning rather than for a word by word match.
        left, right = left[-rng.randint(2, 10) :], right[: rng.randint(1, 8)]
        gapped = " ".join([*left, "what", *right]).rstrip(".,;: ")
        at = window.text.find(sentence) + span.start()
        return self._context(QUESTION.format(question=gapped + "?"), f" {span.group()}", window, [at])

    def _completion(self, window: Window, rng: random.Random) -> Context | None:
        words = list(re.finditer(r"\S+", window.text))
        if len(words) < 16:
            return None
        start = rng.randrange(0, len(words) - 12)
        given = rng.randint(2, 5)
        at, last = words[start + given].start(), words[min(start + given + 30, len(words) - 1)].end()
        prompt = window.text[words[start].start() : words[start + given - 1].end()]
        between = window.text[words[start + given - 1].end() : at]
        return self._context(prompt, between + window.text[at:last], window, [at - len(between)], end=False, shift=0)

    def _context(
        self, prompt: str, target: str, window: Window, places: Sequence[int], end: bool = True, shift: int = 1
    ) -> Context | None:
        """`shift` characters of the target stand before its place in the window."""
        prompt_ids = self.decoder.context(prompt)
        if len(prompt_ids) > LONGEST_PROMPT:
            return None
        made = self.decoder.tokenizer(target, add_special_tokens=False, return_offsets_mapping=True)
        pointers = []
        for start, stop in made["offset_mapping"]:
            first = start + next((n for n, c in enumerate(target[start:stop]) if not c.isspace()), 0)
            held = [window.token_at[place + first - shift] for place in places if place + first - shift < len(window.text)]
            pointers.append(sorted({n for n in held if n >= 0}))
        ids = [*prompt_ids, *made["input_ids"], *([self.eos] if end else [])][: LONGEST_PROMPT + 8]
        return Context(ids, len(prompt_ids), pointers[: len(ids) - len(prompt_ids)], window.sentence_at(places[0] + 1 - shift))


def window_of(decoder: Decoder, passage: Passage, answer: str | None, rng: random.Random, budget: int) -> Window:
    """Whole sentences of the passage that fit into `budget` tokens, around the answer, in one of the forms that notes have."""
    sentences = _SENTENCE.split(passage.text)
    holding = [n for n, s in enumerate(sentences) if answer is not None and answer in s]
    before = rng.randint(0, 3) if budget > 96 else rng.randint(0, 1)
    chosen = holding[0] if holding else rng.randrange(len(sentences))
    first = 0 if rng.random() < 0.5 and chosen <= before else max(0, chosen - before)
    title = passage.title.replace("_", " ")
    draw = rng.random()
    named = draw < (0.85 if first == 0 else 0.5)
    head = "" if not title or not named else f"# {title}\n\n" if draw < 0.6 else f"{title}\n"
    text = head + sentences[first]
    length = len(decoder.tokens(text))
    for sentence in sentences[first + 1 :]:
        length += len(decoder.tokens(" " + sentence))
        if length > budget:
            break
        text += " " + sentence
    return Window.of(decoder, text)


def drawn(pairs: Sequence[tuple[Any, float]], rng: random.Random) -> Any:
    """One value of `(value, weight)` pairs."""
    return rng.choices([v for v, _ in pairs], [w for _, w in pairs])[0]
