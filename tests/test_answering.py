"""Questions come from files or templates, and only the user's words are searched with."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import tiny_model, tiny_tokenizer

from memory3.answering import question_prompt, questions_of
from memory3.decoder import attach
from memory3.spec import MemorySpec, SourceError


def test_only_the_question_is_searched_with_in_our_template_and_in_the_tokenizers_own() -> None:
    tokenizer = tiny_tokenizer()
    with attach(tiny_model("llama"), tokenizer, MemorySpec()) as decoder:
        plain = question_prompt(decoder, "Why is the sky blue?", ["Some text."])
        tokenizer.chat_template = "[USER] {{ messages[0]['content'] }} [BOT]"
        try:
            chat = question_prompt(decoder, "Why is the sky blue?")
        finally:
            tokenizer.chat_template = None
        for prompt in (plain, chat):
            assert prompt.query(decoder, 0, 999) == "Why is the sky blue?"
        assert decoder.tokenizer.decode(plain.ids[1:]).startswith("Some text.\n\nQuestion:")
        assert decoder.tokenizer.decode(chat.ids[1:]).startswith("[USER]")
        with pytest.raises(SourceError, match="empty question"):
            question_prompt(decoder, "  ")


def test_questions_are_lines_or_json_objects_and_errors_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "q"
    file.write_text('Why?\n\n{"question": "When?"}\n')
    assert questions_of(file) == ["Why?", "When?"]
    for text, message in (('Why?\n{"q": 1}\n', "q:2"), ("{broken\n", "broken JSON"), ("\n", "found no question")):
        file.write_text(text)
        with pytest.raises(SourceError, match=message):
            questions_of(file)
    with pytest.raises(SourceError, match="no readable questions"):
        questions_of(tmp_path / "none")
