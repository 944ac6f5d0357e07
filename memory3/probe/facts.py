"""Facts as files: a text that states the fact, and realizations, which are beginnings that it completes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory3.scoring import normalised
from memory3.spec import SourceError


@dataclass(frozen=True)
class Realization:
    """A beginning, and the continuations that express the fact, its branches.

    Between the two stands a space, unless the beginning ends with white space of its own.
    """

    prompt: str
    answers: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, tuple[str, ...]]:
        """The beginning without white space at its end, and every branch behind that white space."""
        front = self.prompt.rstrip()
        space = self.prompt[len(front) :] or " "
        return front, tuple(space + answer for answer in self.answers)

    @property
    def text(self) -> str:
        """Beginning and first branch as running text: what serves as the prefix of another realization."""
        front, branches = self.parts
        return front + branches[0]


@dataclass(frozen=True)
class Fact:
    """One piece of knowledge: a text that states it, and at least two realizations."""

    id: str
    relation: str
    text: str
    realizations: tuple[Realization, ...]

    @property
    def specific(self) -> bool:
        """Whether the realizations agree in an output (arXiv 2407.01178, Definition 4); else the knowledge is abstract.

        Answers are compared as `memory3.scoring.normalised` leaves them.
        """
        accepted = [{normalised(answer) for answer in realization.answers} for realization in self.realizations]
        return bool(set.intersection(*accepted))


def facts_of(path: Path) -> list[Fact]:
    """Facts of a JSONL file, one a line: `id`, `relation`, `text`, and `realizations` with `prompt` and `answers`.

    Raises:
        SourceError: there is no such file or no fact in it, or a line is not of this form; the message names the line.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"found no readable facts in {path} ({error}), expected UTF-8 JSON, one fact a line") from None
    found = [_fact_of(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise SourceError(f"found no fact in {path}, expected one a line")
    ids = [fact.id for fact in found]
    if double := sorted({id for id in ids if ids.count(id) > 1}):
        raise SourceError(f"found two facts with the id {double[0]!r} in {path}, expected a different one for each")
    return found


def _fact_of(line: str, where: str) -> Fact:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise SourceError(f"found broken JSON at {where} ({error.msg}), expected one fact") from None
    id, relation, text = (_words(value, name, where) for name in ("id", "relation", "text"))
    given = value.get("realizations")
    if not isinstance(given, list) or len(given) < 2:
        raise SourceError(f"found fewer than two realizations at {where}, expected a list: one alone shows nothing of a fact")
    return Fact(id, relation, text, tuple(_realization_of(one, where) for one in given))


def _realization_of(value: Any, where: str) -> Realization:
    prompt = _words(value, "prompt", where)
    answers = value.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise SourceError(f"found no answers of {prompt[:60]!r} at {where}, expected a list of texts under 'answers'")
    return Realization(prompt, tuple(answer.strip() for answer in answers))


def _words(value: Any, name: str, where: str) -> str:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found.strip():
        raise SourceError(f"found no {name!r} at {where}, expected some words")
    return found


def relations(facts: Sequence[Fact]) -> list[str]:
    """Names of the relations in the order of the file."""
    return list(dict.fromkeys(fact.relation for fact in facts))
