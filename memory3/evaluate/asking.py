"""Benchmark questions from files and hub datasets: whatever their columns are called, one kind of `Question` comes out."""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memory3.rows import Row, rows
from memory3.spec import SourceError

YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """Something to be answered, chosen or continued.

    Args:
        dataset: where it comes from, for tables.
        text: the question, or the text that goes before a completion.
        answers: accepted answers; of a question with choices, those that wrong references must not hold.
        choices: completions to choose from; empty where the answer is to be generated.
        right: place of the right choice.
        title: of the page of the passage.
        passage: a text that holds the answer; empty where the row has none.
        plain: the text is continued as it stands; else it is asked in the model's prompt for questions.
        whole: the text that the overlap filter compares references with; empty for `text`.
    """

    dataset: str
    text: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: int = 0
    title: str = ""
    passage: str = ""
    plain: bool = False
    whole: str = ""


def split_of(source: str, split: str | None = None) -> Iterator[tuple[str, Row]]:
    """Rows with their places: those of one split, by default of all but `train`; a source without splits gives all of them.

    Raises:
        SourceError: as of `rows`, or no row is wanted.
    """
    nothing = True
    for where, row in rows(source):
        if row.get("split") == split if split else row.get("split") != "train":
            nothing = False
            yield where, row
    if nothing:
        which = f"split {split!r}" if split else "a split other than 'train'"
        raise SourceError(f"found no row of {which} in {source}, expected some: give another --split, or NAME@SPLIT")


# ---- questions ----


def questions(
    source: str,
    kind: str = "qa",
    *,
    split: str | None = None,
    datasets: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """Questions of a source in an order that the seed decides.

    Args:
        source: see `rows`.
        kind: `qa`, `factor` or `halueval`: what the rows are.
        split: only rows with this `split`; by default all but those of `train`.
        datasets: only rows whose `dataset` is one of these.
        limit: most questions.
        seed: of the order.

    Raises:
        SourceError: a source or row that cannot be read, or no row that is wanted.
    """
    wanted = [pair for pair in split_of(source, split) if not datasets or pair[1].get("dataset") in datasets]
    if not wanted:
        raise SourceError(f"found no row of the datasets {', '.join(datasets)} in {source}, expected some: give other names")
    random.Random(seed).shuffle(wanted)
    return [QUESTION_OF[kind](row, where) for where, row in wanted[:limit]]


def _of_qa(row: Row, where: str) -> Question:
    """A row of questions: with accepted answers, with choices, or a claim with its label."""
    passage = _joined(_first(row, "passage", "context", "evidence", "knowledge", "support") or "")
    common: dict[str, Any] = {"dataset": str(row.get("dataset") or row.get("subject") or ""), "passage": passage}
    common["title"] = str(row.get("title") or "")
    if _first(row, "claim") is not None:
        return _claim(row, where, common)
    if _first(row, "instruction") is not None:
        return _instruction(row, where, common)
    text = str(_first(row, "question", "query", "goal", "prompt", "ctx") or "").strip()
    if not text:
        raise SourceError(f"{where} has no question among {', '.join(row)}, expected a column question, claim or instruction")
    offered = _first(row, "choices", "options", "endings", "mc1", "mc1_targets")
    if offered is not None:
        return _chosen(text, *_choices(row, offered, where), common)
    answers = _answers(_first(row, "answers", "possible_answers", "answer", "answer_aliases"))
    if not answers:
        raise SourceError(
            f"{where} has no answer among {', '.join(row)}, expected a column answers, possible_answers or answer"
        )
    if {a.lower() for a in answers} <= {"yes", "no", "true", "false"}:
        return _chosen(text, YES_NO, int(answers[0].lower() in ("no", "false")), common)
    return Question(text=text, answers=answers, **common)


def _chosen(text: str, choices: Sequence[str], right: int, common: dict[str, Any]) -> Question:
    return Question(text=text, choices=tuple(choices), right=right, **common)


def _claim(row: Row, where: str, common: dict[str, Any]) -> Question:
    """A claim and its label, as in FEVER: is it true?"""
    label = str(row.get("label")).upper()
    known = {"SUPPORTS": 0, "SUPPORTED": 0, "TRUE": 0, "1": 0, "REFUTES": 1, "REFUTED": 1, "FALSE": 1, "0": 1}
    if label not in known:
        raise SourceError(f"{where} has label {label!r}, expected SUPPORTS or REFUTES: leave other rows out")
    claim = str(row["claim"]).strip()
    return replace(_chosen(f"True or false: {claim}", ["true", "false"], known[label], common), whole=claim)


_OPTION = re.compile(
    r"\b(Answer|Solution|Option|Ending)(\d+):\s*(.*?)\s*(?=\b(?:Answer|Solution|Option|Ending)\d+:|Answer format:|\Z)", re.S
)
_TASK = re.compile(r"\APlease choose the correct [^:]*:\s*")


def _instruction(row: Row, where: str, common: dict[str, Any]) -> Question:
    """`Please choose …: QUESTION Answer1: … Answer2: … Answer format: …` with `answer2` as the answer."""
    text, answer = str(row["instruction"]), str(row.get("answer", ""))
    options = list(_OPTION.finditer(text))
    numbers = [f"{o[1]}{o[2]}".lower() for o in options]
    if answer.lower() not in numbers:
        raise SourceError(f"{where} has answer {answer!r}, expected one of the options {numbers} of its instruction")
    asked = _TASK.sub("", text[: options[0].start()]).strip()
    return _chosen(asked, [o[3] for o in options], numbers.index(answer.lower()), common)


def _choices(row: Row, offered: Any, where: str) -> tuple[list[str], int]:
    """Choices, and the place of the right one; named by letter, number, label or its own text, or marked among them."""
    value = _structured(offered)
    if isinstance(value, dict) and "labels" in value:
        return _checked([str(c) for c in value["choices"]], list(value["labels"]).index(1), where)
    if isinstance(value, dict) and "text" in value:
        texts, names = [str(t) for t in value["text"]], [str(n) for n in value["label"]]
    elif isinstance(value, dict):
        return _checked([str(c) for c in value], list(value.values()).index(1), where)
    else:
        texts, names = [str(t) for t in value], [chr(65 + n) for n in range(len(value))]
    key = str(_first(row, "answerKey", "answer", "label", "gold"))
    place = next((place for place in (names, texts) if key in place), None)
    return _checked(texts, place.index(key) if place else int(key) if key.isdigit() else -1, where)


def _checked(texts: list[str], right: int, where: str) -> tuple[list[str], int]:
    if not 0 <= right < len(texts) or len(texts) < 2:
        raise SourceError(f"{where} has {len(texts)} choices and no right one among them, expected its letter, number or text")
    return texts, right


def _of_factor(row: Row, where: str) -> Question:
    """A text, its true completion and false ones. Source: FACTOR, arXiv 2307.06908."""
    prefix, completion = _text(row, where, "prefix", "full_prefix"), _text(row, where, "completion")
    false = _several(_first(row, "contradictions")) or _several([v for n in range(3) if (v := row.get(f"contradiction_{n}"))])
    if not false:
        raise SourceError(f"{where} has no contradictions, expected false completions: give FACTOR's files")
    name = str(row.get("dataset") or "")
    return Question(name, prefix, choices=(completion, *false), plain=True, whole=f"{prefix} {completion}")


def _of_halueval(row: Row, where: str) -> Question:
    """A question, its right answer and a hallucinated one, with knowledge. Source: HaluEval, arXiv 2305.11747."""
    right, wrong = _text(row, where, "right_answer"), _text(row, where, "hallucinated_answer")
    knowledge = _text(row, where, "knowledge")
    return Question("", _text(row, where, "question"), (right,), (right, wrong), passage=knowledge)


QUESTION_OF: dict[str, Callable[[Row, str], Question]] = {"qa": _of_qa, "factor": _of_factor, "halueval": _of_halueval}


def _text(row: Row, where: str, *names: str) -> str:
    value = _first(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise SourceError(f"{where} has no {names[0]} among {', '.join(row)}, expected a column {names[0]} with some words")
    return value if names[0] == "prefix" else value.strip()


def _first(row: Row, *names: str) -> Any:
    """The first of these columns that holds anything."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _structured(value: Any) -> Any:
    """A list or object; CSV holds them as text, in JSON or as Python prints them."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value)
            except (ValueError, SyntaxError, RecursionError):
                continue
    return value


def _several(value: Any) -> tuple[str, ...]:
    value = _structured(value)
    found = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    return tuple(str(v).strip() for v in found if v is not None and str(v).strip())


def _answers(value: Any) -> tuple[str, ...]:
    """Accepted answers: one, several, or an object of SQuAD (`text`) or TriviaQA (`value`, `aliases`)."""
    value = _structured(value)
    if isinstance(value, dict):
        value = [*_several(value.get("value")), *_several(value.get("aliases")), *_several(value.get("text"))]
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return tuple(dict.fromkeys(_several(value)))


def _joined(value: Any) -> str:
    return "\n".join(v for v in _several(value) if not isinstance(value, dict))
