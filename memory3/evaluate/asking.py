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
_VERDICTS = {"yes": 0, "true": 0, "no": 1, "false": 1}


@dataclass(frozen=True)
class Question:
    """Something to be answered, chosen or continued.

    Args:
        dataset: where it comes from, for tables.
        text: the question, or the text that goes before a completion.
        answers: accepted answers, in the row's own words; of a question with choices the right one. FACTOR's have none.
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

    @property
    def quoted(self) -> tuple[str, ...]:
        """Accepted answers that a text can hold: not yes, no, true and false, which texts have for other reasons."""
        return tuple(a for a in self.answers if a.lower() not in _VERDICTS)


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
    asked = _structured(_first(row, "question", "query", "goal", "prompt", "ctx"))
    text = asked.get("text") if isinstance(asked, dict) else asked
    if not isinstance(text, str) or not text.strip():
        raise SourceError(f"{where} has no question among {', '.join(row)}, expected a column question, claim or instruction")
    text = text.strip()
    offered = _first(row, "choices", "options", "endings", "mc1", "mc1_targets") or _several([row.get("sol1"), row.get("sol2")])
    if offered:
        return _chosen(text, *_choices(row, offered, where), common)
    answers = _accepted(row)
    if not answers:
        raise SourceError(
            f"{where} has no answer among {', '.join(row)}, expected a column answers, possible_answers or answer"
        )
    verdicts = {_VERDICTS.get(a.lower()) for a in answers}
    if len(verdicts) == 1 and None not in verdicts:  # answers that contradict each other are no choice between the two
        return _chosen(text, YES_NO, _VERDICTS[answers[0].lower()], common | {"answers": answers})
    return Question(text=text, answers=answers, **common)


def _chosen(text: str, choices: Sequence[str], right: int, common: dict[str, Any]) -> Question:
    """A question with choices; the right one is its answer, unless the row has an answer in words of its own."""
    return Question(text=text, choices=tuple(choices), right=right, **{"answers": (choices[right],), **common})


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
    """Choices, and the place of the right one: marked among them, or named by label, letter, number or its own text."""
    value = _structured(offered)
    if not isinstance(value, dict):
        texts = _listed(value, where)
        return _checked(texts, _named(row, texts, where), where)
    if "text" in value:
        texts, labels = _listed(value["text"], where), [str(name) for name in value.get("label") or ()]
        key = str(_right(row)[1])
        return _checked(texts, labels.index(key) if key in labels else _named(row, texts, where), where)
    if "labels" in value:
        return _marked(_listed(value.get("choices"), where), value["labels"], where)
    return _marked([str(text) for text in value], list(value.values()), where)


def _listed(value: Any, where: str) -> list[str]:
    """Choices as texts."""
    if not isinstance(value, list | tuple) or not all(isinstance(v, str | int | float) for v in value):
        raise SourceError(f"{where} has the choices {str(value)[:60]!r}, expected a list of texts: split them")
    return [str(v) for v in value]


def _marked(texts: list[str], marks: Any, where: str) -> tuple[list[str], int]:
    """Choices of which one is marked with 1, as in TruthfulQA."""
    if not isinstance(marks, list | tuple) or len(marks) != len(texts) or list(marks).count(1) != 1:
        raise SourceError(f"{where} has {len(texts)} choices marked {str(marks)[:60]}, expected a 0 or 1 for each, and one 1")
    return _checked(texts, list(marks).index(1), where)


def _right(row: Row) -> tuple[str, Any]:
    """Column that says which choice is right, and its value; nothing where there is none."""
    columns = ("answerKey", "answer", "label", "gold")
    return next(((name, row[name]) for name in columns if _holds_something(row.get(name))), ("", None))


def _named(row: Row, texts: Sequence[str], where: str) -> int:
    """Place of the right choice, -1 where none is named.

    A number counts from 0, and so do digits in the columns `label` and `gold`. Other text is a letter, else digits or the choice
    itself: where these name two choices, as `2` among the choices 1, 2 and 3, nothing is guessed.
    """
    column, value = _right(row)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    key, letters = str(value), [chr(65 + n) for n in range(len(texts))]
    number = int(key) if key.isdecimal() and len(key) < 9 else -1
    if key in letters:
        return letters.index(key)
    if column in ("label", "gold") and number >= 0:
        return number
    places = {n for n in (number, texts.index(key) if key in texts else -1) if 0 <= n < len(texts)}
    if len(places) > 1:
        raise SourceError(
            f"{where} has {column} {key!r}, the text of choice {texts.index(key)} and the number of another, expected one of them: "
            "give the number, from 0, in a column label"
        )
    return places.pop() if places else -1


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
    return next((row[name] for name in names if _holds_something(row.get(name))), None)


def _holds_something(value: Any) -> bool:
    """Whether a cell is more than a missing value, a blank text or an empty list; 0 and false are something."""
    return value is not None and value != [] and value != {} and not (isinstance(value, str) and not value.strip())


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


def _accepted(row: Row) -> tuple[str, ...]:
    """Accepted answers of a row, its aliases among them."""
    columns = (_answers(row.get(name)) for name in ("answers", "possible_answers", "answer"))
    return tuple(dict.fromkeys([*next(filter(None, columns), ()), *_answers(row.get("answer_aliases"))]))


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
