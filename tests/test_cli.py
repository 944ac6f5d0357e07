"""The command line: every command on a tiny model, and one clear sentence for whatever goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from memory3 import cli
from memory3.spec import Memory3Error

FACTS = ("The tower was completed in 1889.", "Salt melts at 801 degrees.", "A group of crows is a murder.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORY3_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bank(tmp_path: Path, model: Path) -> Path:
    notes = tmp_path / "notes"
    notes.mkdir()
    for n, fact in enumerate(FACTS):
        (notes / f"{n}.txt").write_text(fact)
    run("write", notes, "--bank", tmp_path / "bank", "--model", model, "--embedder", "none")
    return tmp_path / "bank"


def run(*arguments: object, text: str | None = None) -> str:
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], input=text, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: object) -> str:
    with pytest.raises(Memory3Error) as error:
        run(*arguments)
    message = str(error.value)
    assert "\n" not in message
    assert "expected" in message or ":" in message
    return message


def documents(*arguments: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(*arguments, "--json").splitlines()]


def test_an_expected_error_is_one_sentence_on_stderr_and_exit_code_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memory3", "bank", "stats", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("BankError: no bank at")
    assert done.stderr.count("\n") == 1


def test_a_bank_remembers_its_codec(tmp_path: Path, bank: Path, model: Path) -> None:
    made = ("write", tmp_path / "notes/0.txt", "--bank", tmp_path / "small", "--model", model, "--embedder", "none")
    [report] = documents(*made, "--codec", "rotated:key_bits=3,value_bits=2")
    [raw] = documents("bank", "stats", bank)
    assert report["references"] == 1 and report["bytes_per_reference"] < raw["bytes_per_reference"] / 4
    [again] = documents("write", tmp_path / "notes/1.txt", *made[2:])
    assert (again["references"], again["bytes_per_reference"]) == (1, report["bytes_per_reference"])
    assert documents("bank", "stats", tmp_path / "small")[0]["codec"] == "rotated"
    assert documents("bank", "verify", tmp_path / "small")[0]["problems"] == []
    [answer] = documents("ask", "When was the tower completed?", "--bank", tmp_path / "small", "--model", model)
    assert answer["memory"]["bytes_read"] == answer["memory"]["references"] * report["bytes_per_reference"] > 0
    message = refused("write", tmp_path / "notes/2.txt", *made[2:], "--codec", "int8")
    assert "has codec rotated" in message and "expected int8" in message
    assert "expected one of" in refused(
        "write", tmp_path / "notes/0.txt", "--bank", tmp_path / "new", *made[4:], "--codec", "zip"
    )
    assert not (tmp_path / "new").exists()
    documents("bank", "rebuild", tmp_path / "small", "--model", model)
    assert documents("bank", "stats", tmp_path / "small")[0]["codec"] == "rotated"
    documents("bank", "rebuild", tmp_path / "small", "--model", model, "--codec", "int8")
    assert documents("bank", "stats", tmp_path / "small")[0]["codec"] == "int8"


def test_a_codebook_wants_enough_memories_and_its_codec_wants_a_codebook(tmp_path: Path, bank: Path, model: Path) -> None:
    assert "expected at least" in refused("bank", "codebook", bank, tmp_path / "book")
    assert not (tmp_path / "book").exists()
    notes = ("write", tmp_path / "notes", "--bank", tmp_path / "new", "--model", model, "--embedder", "none")
    assert "memory3 bank codebook" in refused(*notes, "--codec", "product")
    assert "is no codebook" in refused(*notes, "--codec", "product", "--codebook", tmp_path / "notes/0.txt")
    assert "expected --codec product" in refused(*notes, "--codebook", tmp_path / "notes/0.txt")
    assert not (tmp_path / "new").exists()


def test_questions_of_a_file_are_answered_in_order_whatever_the_batch(tmp_path: Path, bank: Path, model: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_text('When was the tower completed?\n{"question": "At what does salt melt?"}\nWhat are crows?\n')
    common = ["ask", "--questions", file, "--bank", bank, "--model", model, "--max-tokens", 3]
    alone, together = (documents(*common, "--batch-size", n) for n in (1, 3))
    assert [d["question"] for d in together] == [
        "When was the tower completed?",
        "At what does salt melt?",
        "What are crows?",
    ]
    assert [d["answer"] for d in alone] == [d["answer"] for d in together]
    assert [d["citations"][0]["source"][-5:] for d in together] == ["0.txt", "1.txt", "2.txt"]
    lines = run(*common).splitlines()
    assert lines[0] == f"When was the tower completed?\t{together[0]['answer']}"


def test_several_banks_are_recalled_from_together(tmp_path: Path, bank: Path, model: Path) -> None:
    run("write", "-", "--bank", tmp_path / "own", "--model", model, "--embedder", "none", text="Pepper was weighed in a tower.")
    [both] = documents("ask", "Which tower?", "--bank", bank, "--bank", tmp_path / "own", "--model", model, "--max-tokens", 2)
    assert {c["text"] for c in both["citations"]} == {FACTS[0], "Pepper was weighed in a tower."}
    assert {Path(c["source"]).name for c in both["citations"]} == {"0.txt", "stdin"}


def test_a_model_that_does_not_read_memory_is_told_of(
    bank: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memory3.decoder import Decoder

    monkeypatch.setattr(Decoder, "reading", lambda *arguments: None)
    found = CliRunner().invoke(
        cli.app, ["ask", "Which tower?", "--bank", str(bank), "--model", str(model), "--max-tokens", "2", "--json"]
    )
    assert "the recalled memories changed nothing" in found.stderr
    nothing = CliRunner().invoke(cli.app, ["ask", "zzzz", "--bank", str(bank), "--model", str(model), "--max-tokens", "2"])
    assert "nothing was recalled" in nothing.stderr
    assert json.loads(found.stdout.splitlines()[-1])["memory"]["logit_shift"] == 0.0


def test_an_answer_streamed_is_the_answer_of_the_document(bank: Path, model: Path) -> None:
    common = ["ask", "Which tower?", "--bank", bank, "--model", model, "--max-tokens", 6]
    [document] = documents(*common)
    streamed = run(*common)
    assert streamed.split("\n  [1]")[0].strip() == document["answer"]
    assert "memory: 1 references" in streamed
    assert run(*common, "--min-score", 1e9).strip() == "nothing relevant found"


def test_text_and_closed_book_read_no_memory(bank: Path, model: Path) -> None:
    common = ["ask", "Which tower?", "--bank", bank, "--model", model, "--max-tokens", 2]
    [text], [closed] = documents(*common, "--text"), documents(*common, "--no-memory")
    assert [c["text"] for c in text["citations"]] == [FACTS[0]]
    assert closed["citations"] == []
    assert text["memory"]["references"] == closed["memory"]["references"] == 0


def test_a_continuation_recalls_for_every_chunk(bank: Path, model: Path) -> None:
    [made] = documents(
        "generate", "The tower was completed", "--bank", bank, "--model", model, "--max-tokens", 70, "--temperature", 2
    )
    assert [r["chunk"] for r in made["recalls"]] == ["prompt 0", "answer 0"]


def test_a_source_that_is_not_there_makes_no_bank(tmp_path: Path, model: Path) -> None:
    assert "nowhere" in refused("write", tmp_path / "nowhere", "--bank", tmp_path / "bank", "--model", model)
    assert not (tmp_path / "bank").exists()


def test_bad_input_gets_one_sentence(tmp_path: Path, bank: Path, model: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no questions\n")
    ask = ["ask", "Why?", "--model", model]
    assert "found no --bank" in refused(*ask)
    assert "no bank at" in refused(*ask, "--bank", tmp_path / "none")
    assert "found both --no-memory and --text" in refused(*ask, "--bank", bank, "--no-memory", "--text")
    assert "found neither a question nor --questions" in refused("ask", "--model", model, "--bank", bank)
    assert "found an empty question" in refused("ask", " ", "--model", model, "--bank", bank)
    assert "no readable questions" in refused("ask", "--questions", tmp_path / "none", "--model", model, "--bank", bank)
    assert "found no model at" in refused("ask", "Why?", "--model", tmp_path, "--bank", bank)
    assert "found dtype" in refused(*ask, "--bank", bank, "--dtype", "int8")
    assert "found no device" in refused(*ask, "--bank", bank, "--device", "nowhere")
    assert "cannot be made" in refused("train", "warmup", "--data", file, "--out", file, "--model", model)
    assert "found stage" in refused("train", "nothing", "--data", file, "--out", tmp_path / "out", "--model", model)


def test_damaged_model_files_get_one_sentence(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "memory_spec.json").write_text("{broken")
    assert "broken" in refused("ask", "Why?", "--model", tmp_path, "--no-memory")
    (tmp_path / "memory_spec.json").write_text('{"selection": "best"}')
    assert "found selection 'best'" in refused("ask", "Why?", "--model", tmp_path, "--no-memory")
    (tmp_path / "memory_spec.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    assert "found no model at" in refused("ask", "Why?", "--model", tmp_path, "--no-memory")
