"""A question in, a cited answer out, as plain JSON values (docs/json.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memory3.decoder import Decoder
from memory3.generation import Completion, Prompt, complete
from memory3.recall import Recall, Recalled
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
    if not question.strip():
        raise SourceError("found an empty question, expected some words")
    front = "".join(f"{text}\n\n" for text in texts)
    if getattr(decoder.tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": front + question}]
        rendered = str(decoder.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        return Prompt.of(decoder, rendered, question if question in rendered else None)
    return Prompt.of(decoder, front + QUESTION.format(question=question), question)


def answer(
    decoder: Decoder, questions: Sequence[str], recall: Recall | None, *, as_text: bool = False, **options: Any
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
    found = [Recalled(q) for q in questions] if recall is None else recall([q.strip() for q in questions])
    going = [n for n, r in enumerate(found) if r.hits or recall is None or recall.min_score is None]
    prompts = [question_prompt(decoder, questions[n], [r.text for r in found[n].references] if as_text else ()) for n in going]
    reading = None if as_text else recall
    completions = complete(decoder, prompts, recall=reading, effect=reading is not None, **options) if prompts else []
    done = dict(zip(going, completions, strict=True))
    return [document(q, done.get(n), found[n], as_text) for n, q in enumerate(questions)]


def document(question: str, completion: Completion | None, searched: Recalled, as_text: bool = False) -> dict[str, Any]:
    """The JSON document of one answer; without a completion, that nothing relevant was found."""
    if completion is None:
        return {
            "question": question,
            "answer": NOTHING,
            "citations": [],
            "recalls": [],
            "memory": _memory([], None),
            "timings": {"recall_s": 0.0, "prefill_s": 0.0, "decode_s": 0.0},
        }
    effect = completion.effect
    recalls = [("prompt 0", searched)] if as_text else list(completion.recalls)
    cited: list[tuple[str, Reference, float | None]] = (
        [(c.id, c.reference, c.share) for c in effect.citations] if effect else []
    )
    if as_text:
        cited = [(h.id, r, None) for h, r in zip(searched.hits, searched.references, strict=True)]
    return {
        "question": question,
        "answer": completion.text.strip(),
        "citations": [
            {"id": id, "source": r.source, "start": r.start, "end": r.end, "text": r.text, "share": share}
            for id, r, share in cited
        ],
        "recalls": [
            {"chunk": chunk, "query": r.query, "ids": [h.id for h in r.hits], "scores": [h.score for h in r.hits]}
            for chunk, r in recalls
        ],
        "memory": _memory([] if as_text else [r for _, r in recalls], effect),
        "timings": asdict(completion.timings),
    }


def _memory(recalls: Sequence[Recalled], effect: Any) -> dict[str, Any]:
    return {
        "references": len({h.id for r in recalls for h in r.hits}),
        "bytes_read": sum(r.bytes_read for r in recalls),
        "attention_mass": {} if effect is None else {str(layer): mass for layer, mass in effect.attention_mass.items()},
        "logit_shift": None if effect is None else effect.logit_shift,
    }


def questions_of(path: Path) -> list[str]:
    """Questions of a file, one a line: plain text, or a JSON object with `question`; `SourceError` says which line is not."""
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
    if not line.lstrip().startswith("{"):
        return line.strip()
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise SourceError(
            f"found broken JSON at {where} ({error.msg}), expected an object with a question, or plain text"
        ) from None
    if not isinstance(value.get("question"), str):
        raise SourceError(f"found no question at {where}, expected a JSON object with a string under 'question'")
    return str(value["question"])
