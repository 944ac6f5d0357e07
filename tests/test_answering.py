"""Questions come from files or templates, and only the user's words are searched with."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import tiny_model, tiny_tokenizer

from memory3.answering import answer, question_prompt, questions_of
from memory3.bank import Bank
from memory3.decoder import attach
from memory3.recall import Recall
from memory3.spec import MemorySpec, Reference, SourceError
from memory3.writing import write


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


def test_the_bytes_that_an_answer_took_from_disk_are_counted_once(tmp_path: Path) -> None:
    """Also where a search for anything above the least score went before."""
    texts = ["The tower was completed in 1889.", "The tower is in Paris."]
    with attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=4)) as decoder:
        bank = Bank(tmp_path / "bank", decoder, create=True)
        write(decoder, [Reference(text) for text in texts], bank)
        for least in (None, 0.0):
            recall = Recall(bank, min_score=least)
            first, second = (answer(decoder, ["Which tower?"], recall, max_new_tokens=2)[0] for _ in range(2))
            assert first["memory"]["references"] == second["memory"]["references"] == 2
            assert first["memory"]["bytes_read"] == 2 * bank.record_bytes
            assert second["memory"]["bytes_read"] == 0  # the RAM cache holds them
        with pytest.raises(SourceError, match="no recall to take text from"):
            answer(decoder, ["Which tower?"], None, as_text=True)


def test_a_question_is_told_from_a_template_that_strips_it() -> None:
    tokenizer = tiny_tokenizer()
    with attach(tiny_model("llama"), tokenizer, MemorySpec()) as decoder:
        try:
            tokenizer.chat_template = "<SYS>Help.</SYS>[USER] {{ messages[0]['content'] | trim }} [BOT]"
            assert question_prompt(decoder, "  Why? ").query(decoder, 0, 999) == "Why?"
            tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
            with pytest.raises(SourceError, match="changes the question's text"):
                question_prompt(decoder, "Why?")
        finally:
            tokenizer.chat_template = None


def test_questions_are_lines_or_json_objects_and_errors_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "q"
    file.write_text('Why?\n\n{"question": "When?"}\n')
    assert questions_of(file) == ["Why?", "When?"]
    for text, message in (
        ('Why?\n{"q": 1}\n', "q:2"),
        ("{broken\n", "broken JSON"),
        ('Why?\n{"question": " "}\n', "q:2"),
        ('["a"]\n', "q:1"),
        ("\n", "found no question"),
    ):
        file.write_text(text)
        with pytest.raises(SourceError, match=message):
            questions_of(file)
    with pytest.raises(SourceError, match="no readable questions"):
        questions_of(tmp_path / "none")
