"""A question in, a cited answer out, as plain JSON values (docs/json.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from memory3.decoder import Decoder
from memory3.generation import Completion, Prompt, complete
from memory3.recall import Recall, Recalled, Recaller
from memory3.spec import Reference, SourceError

QUESTION = "Question: {question}\nAnswer:"
"""Prompt where the tokenizer has no chat template; the one the model that ships was trained with."""

NOTHING = "nothing relevant found"
"""The answer where `min_score` left nothing to recall."""


def question_prompt(decoder: Decoder, question: str, texts: Sequence[str] = ()) -> Prompt:
    """The prompt of a question, in the tokenizer's chat template where it has one; only the question is ever searched with.

    Args:
        decoder: gives the tokenizer.
        question: the question.
        texts: references that go before it as plain text (RAG).
    """
    question = question.strip()  # a chat template may strip it too, and its tokens must be told from the template's
    if not question:
        raise SourceError("found an empty question, expected some words")
    front = "".join(f"{text}\n\n" for text in texts)
    if getattr(decoder.tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": front + question}]
        rendered = str(decoder.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        if question not in rendered:
            raise SourceError(
                "found a chat template that changes the question's text, expected one that keeps it: only the user's words may "
                "be searched with; remove tokenizer.chat_template to use the plain prompt"
            )
        return Prompt.of(decoder, rendered, question)
    return Prompt.of(decoder, front + QUESTION.format(question=question), question)


def answer(
    decoder: Decoder, questions: Sequence[str], recall: Recaller | None, *, as_text: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Answer a batch of questions.

    Args:
        decoder: an attached decoder.
        questions: one or more.
        recall: where references come from; `None` is closed book.
        as_text: give the references as plain text in the prompt instead of as memories (the control).
        options: go to `memory3.stream`.

    Returns:
        For each question the document of docs/json.md.
    """
    if as_text and recall is None:
        raise SourceError("found no recall to take text from, expected one: closed book has no text in the prompt")
    began = perf_counter()
    found = searched(questions, recall, as_text)
    search_s = perf_counter() - began
    going = [n for n, r in enumerate(found) if r is None or r.hits or r.known or as_text]
    texts = {n: [r.text for r in one.references] for n in going if (one := found[n]) is not None and as_text}
    prompts = [question_prompt(decoder, questions[n], texts.get(n, ())) for n in going]
    reading = None if as_text else recall
    completions = complete(decoder, prompts, recall=reading, effect=reading is not None, **options) if prompts else []
    done = dict(zip(going, completions, strict=True))
    return [document(q, done.get(n), found[n], search_s, as_text) for n, q in enumerate(questions)]


def searched(questions: Sequence[str], recall: Recaller | None, as_text: bool) -> list[Recalled | None]:
    """What is found for whole questions before they are answered: the text of the prompt, or whether there is anything at
    all above `min_score`. `None` where the answer's own chunks do all the searching.
    """
    if recall is None or not (as_text or recall.min_score is not None):
        return [None] * len(questions)
    look = recall.texts if as_text and isinstance(recall, Recall) else recall
    return list(look([q.strip() for q in questions]))


def document(
    question: str, completion: Completion | None, found: Recalled | None, search_s: float = 0.0, as_text: bool = False
) -> dict[str, Any]:
    """The JSON document of one answer; without a completion, that nothing relevant was found.

    `found` is what a search before the answer brought and `search_s` the seconds that it took; they are counted too.
    """
    if completion is None:
        return {
            "question": question,
            "answer": NOTHING,
            "citations": [],
            "recalls": [],
            "memory": _memory([], None),
            "timings": {"recall_s": search_s, "prefill_s": 0.0, "decode_s": 0.0},
        }
    effect = completion.effect
    recalls = [("prompt 0", found)] if as_text and found is not None else list(completion.recalls)
    cited: list[tuple[str, Reference, float | None]] = (
        [(c.id, c.reference, c.share) for c in effect.citations] if effect else []
    )
    if as_text and found is not None:
        cited = [(h.id, r, None) for h, r in zip(found.hits, found.references, strict=True)]
    return {
        "question": question,
        "answer": completion.text.strip(),
        "citations": [
            {"id": id, "source": r.source, "start": r.start, "end": r.end, "text": r.text, "share": share}
            for id, r, share in cited
        ],
        "recalls": [
            {
                "chunk": chunk,
                "query": r.query,
                "ids": [h.id for h in r.hits],
                "scores": [h.score for h in r.hits],
                "known": list(r.known),
                "versions": list(r.versions),
            }
            for chunk, r in recalls
        ],
        "memory": _memory([] if as_text else [r for _, r in recalls], effect, found),
        "timings": {**asdict(completion.timings), "recall_s": completion.timings.recall_s + search_s},
    }


def _memory(recalls: Sequence[Recalled], effect: Any, found: Recalled | None = None) -> dict[str, Any]:
    searched = [] if found is None or not recalls else [found]
    return {
        "references": len({h.id for r in recalls for h in r.hits}),
        "bytes_read": sum(r.bytes_read for r in (*searched, *recalls)),
        "encoded": sum(r.encoded for r in (*searched, *recalls)),
        "attention_mass": {} if effect is None else {str(layer): mass for layer, mass in effect.attention_mass.items()},
        "logit_shift": None if effect is None else effect.logit_shift,
    }


def questions_of(path: Path) -> list[str]:
    """Questions of a file, one a line: plain text, or a JSON object with `question`; `SourceError` says which line is wrong."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"found no readable questions in {path} ({error}), expected UTF-8 text, one question a line"
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found.append(_question_of(line, f"{path}:{number}"))
    if not found:
        raise SourceError(f"found no question in {path}, expected one a line")
    return found


def _question_of(line: str, where: str) -> str:
    if not line.lstrip().startswith(("{", "[{", '["')):
        return line.strip()
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise SourceError(
            f"found broken JSON at {where} ({error.msg}), expected an object with a question, or plain text"
        ) from None
    question = value.get("question") if isinstance(value, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise SourceError(f"found no question at {where}, expected a JSON object with some words under 'question'")
    return question
