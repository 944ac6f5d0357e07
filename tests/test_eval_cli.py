"""Every measurement by its command, at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model, tiny_tokenizer
from toy_world import toy_world
from typer.testing import CliRunner

from memory3.cli import app
from memory3.cli.evaluate import eval_app
from memory3.decoder import attach
from memory3.spec import MemorySpec
from memory3.train.stages import save_model

SPEC = MemorySpec(tokens_per_head=4, reference_length=64, chunk_length=64, references_per_chunk=2)


def said(*words: str | Path) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, questions, notes and a bank of them."""
    folder = tmp_path_factory.mktemp("eval")
    save_model(attach(tiny_model("llama"), tiny_tokenizer(), SPEC), folder / "model", SPEC)
    rows = toy_world(folder / "data", 40)
    (folder / "notes.txt").write_text("\n\n".join(r["passage"] for r in rows))
    (folder / "asked.jsonl").write_text(
        "".join(json.dumps({k: r[k] for k in ("question", "answers")}) + "\n" for r in rows[:6])
    )
    said("write", folder / "notes.txt", "--bank", folder / "bank", "--model", folder / "model", "--embedder", "none")
    return folder


def common(place: Path) -> tuple[str | Path, ...]:
    return "--model", place / "model"


def test_questions_in_every_arm_with_gold_and_with_a_bank(place: Path, tmp_path: Path) -> None:
    file = place / "data" / "qa.parquet"
    shown = said("eval", "qa", "--data", file, "--gold", "--limit", "4", "--out", tmp_path / "arms.png", *common(place))
    for arm in ("closed book", "text in the prompt", "dense memory", "sparse memory", "wrong", "untrained"):
        assert arm in shown, arm
    assert (tmp_path / "arms.png").read_bytes().startswith(b"\x89PNG")
    made = said("eval", "qa", "--data", file, "--bank", place / "bank", "--limit", "4", "--json", *common(place))
    document = json.loads(made.strip().splitlines()[-1])
    assert document["task"] == "qa"
    assert len(document["arms"]) >= 6


def test_likelihood_tasks(place: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "The river was made in 1900. " * 12}) + "\n")
    bank = ("--bank", place / "bank", *common(place))
    assert "bits" in said("eval", "lm", "--data", text, "--length", "160", "--limit", "1", *bank)


def test_speed_prints_ratios_of_one_run(place: Path) -> None:
    shown = said("eval", "speed", "--length", "128", "--repeats", "1", *common(place))
    assert "time beside warmup" in shown


def test_use_after_the_first_chunk(place: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The tower\nThe bridge\n")
    shown = said("eval", "use", tmp_path / "prompts.txt", "--bank", place / "bank", "--tokens", "70", *common(place))
    assert "all after the first" in shown


def test_masking_writes_a_spec_that_training_takes(place: Path, tmp_path: Path) -> None:
    spec = tmp_path / "memory_spec.json"
    words = ("--keep", "3", "--window", "4", "--limit", "3", "--out", spec)
    shown = said("eval", "masking", "--data", place / "data", *words, *common(place))
    assert "rise of the loss" in shown
    chosen = MemorySpec.from_json(json.loads(spec.read_text()))
    assert chosen.heads is not None
    assert sum(map(len, chosen.heads)) == 3


def test_utility_ranks_references_and_names_those_to_drop(place: Path, tmp_path: Path) -> None:
    words = ("--bank", place / "bank", "--drop", tmp_path / "drop.txt", "--least", "99", "--out", tmp_path / "worth.json")
    shown = said("eval", "utility", place / "asked.jsonl", *words, *common(place))
    assert "nats per token" in shown
    worth: dict[str, Any] = json.loads((tmp_path / "worth.json").read_text())
    assert (tmp_path / "drop.txt").read_text().split() == [r["id"] for r in reversed(worth["references"])]


def test_an_ablation_leaves_its_table(place: Path, tmp_path: Path) -> None:
    words = ("--data", place / "data", "--out", tmp_path, "--limit", "30")
    shown = said("eval", "ablation", "references", *words, *common(place))
    assert (tmp_path / "references.md").read_text() in shown


def test_every_measurement_says_what_it_is() -> None:
    listed = said("eval", "--help")
    for command in eval_app.registered_commands:
        assert command.callback is not None and command.callback.__doc__
        assert (command.name or command.callback.__name__) in listed
