"""Every stage by its command at toy size: it trains, stops, goes on, and leaves a folder that loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families import tiny_model, tiny_tokenizer
from golden_losses import check_losses
from toy_world import toy_world
from typer.testing import CliRunner

from memory3.cli import app
from memory3.decoder import attach
from memory3.loading import load
from memory3.spec import MemorySpec
from memory3.train.loop import run
from memory3.train.recipe import Reader
from memory3.train.recipes import RECIPES, Inputs, recipe_of
from memory3.train.settings import TrainError
from memory3.train.stages import save_model

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16, reference_length=32)
TEXT = "The red fox lives in a den near Arven. It was dug in 1812 by an old badger. " * 12


def command(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(attach(tiny_model("llama"), tiny_tokenizer(), SPEC), tmp_path / "start", SPEC)
    return tmp_path / "start"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def bank(tmp_path: Path, model: Path, text: Path) -> Path:
    done = command("write", text, "--bank", tmp_path / "bank", "--model", model, "--embedder", "none")
    assert done.exit_code == 0, done.output
    return tmp_path / "bank"


def rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(out: Path, *words: str | Path) -> Path:
    done = command("train", *words, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["steps"] == last["planned"] and last["model"] == str(out / "model")
    return out / "model"


def changed(before: Path, after: Path) -> bool:
    first, second = load(before), load(after)
    old = dict(first.model.named_parameters())
    return any(not p.equal(old[name]) for name, p in second.model.named_parameters())


@pytest.mark.filterwarnings("ignore:found no memory_spec.json")
def test_warmup_from_nothing_makes_a_plain_model_that_does_not_claim_to_read_memory(tmp_path: Path, text: Path) -> None:
    made = trained(
        tmp_path / "out", "warmup", "small", "--data", text, "--size", "2", "--steps", "2", "--batch", "1", "--length", "64"
    )
    assert not (made / "memory_spec.json").exists()
    assert not load(made).trained
    assert load(made).geometry.num_layers == 2


@pytest.mark.parametrize("recipe", list(RECIPES["continual"]))
def test_continual_trains_on_a_banks_references_and_saves_its_spec(
    tmp_path: Path, text: Path, model: Path, bank: Path, recipe: str
) -> None:
    words = ("--data", text, "--model", model, "--bank", bank, "--steps", "3", "--batch", "1", "--length", "64")
    made = trained(tmp_path / "out", "continual", recipe, *words)
    assert load(made).spec == load(model).spec
    assert changed(model, made)


@pytest.mark.parametrize("recipe", list(RECIPES["convert"]))
def test_conversion_needs_no_more_than_documents(tmp_path: Path, text: Path, model: Path, recipe: str) -> None:
    words = ("--data", text, "--model", model, "--steps", "3", "--batch", "2")
    made = trained(tmp_path / "out", "convert", recipe, *words)
    assert load(made).trained
    assert changed(model, made)


@pytest.mark.parametrize("with_memory", [True, False])
def test_finetuning_with_and_without_a_bank(tmp_path: Path, model: Path, bank: Path, with_memory: bool) -> None:
    data = rows(
        tmp_path / "sft.jsonl",
        {"prompt": "Where does the fox live?", "response": "near Arven"},
        {"question": "Who dug the den?", "answers": ["an old badger"]},
    )
    words = ("--data", data, "--model", model, "--steps", "2", "--batch", "2", *(("--bank", bank) if with_memory else ()))
    assert changed(model, trained(tmp_path / "out", "sft", *words))


def test_preferences_with_a_bank(tmp_path: Path, model: Path, bank: Path) -> None:
    data = rows(tmp_path / "dpo.jsonl", {"prompt": "Where is the den?", "chosen": "near Arven", "rejected": "on the moon"})
    words = ("--data", data, "--model", model, "--bank", bank, "--steps", "2", "--rate", "1e-2")
    assert changed(model, trained(tmp_path / "out", "dpo", *words))


def test_the_reader_in_small_is_trained_on_tables_of_ones_own(tmp_path: Path) -> None:
    asked = {"dataset": "own", "split": "train", "question": "When was the den dug?", "answers": ["1812"], "title": "Den"}
    world = tmp_path / "world"
    world.mkdir()
    pq.write_table(pa.Table.from_pylist([{**asked, "passage": TEXT[:400]}] * 4), world / "qa.parquet")
    pq.write_table(pa.Table.from_pylist([{"title": "Arven", "text": TEXT[:600]}] * 3), world / "passages.parquet")
    made = trained(tmp_path / "out", "reader", "small", "--data", world, "--steps", "5", "--tokens-per-head", "24")
    decoder = load(made)
    assert decoder.trained
    assert decoder.spec.tokens_per_head == 24
    assert len(decoder.tokenizer) <= 2048


def test_a_stopped_stage_says_so_and_goes_on(tmp_path: Path, text: Path, model: Path) -> None:
    words = ("train", "warmup", "model", "--data", text, "--model", model, "--length", "64", "--out", tmp_path / "out")
    stopped = command(*words, "--steps", "3", "--minutes", "0")
    assert "run the same command again" in stopped.stdout
    assert not (tmp_path / "out" / "model").exists()
    assert "3 of 3 steps done" in command(*words, "--steps", "3").stdout


def test_every_recipe_promises_its_data_and_hardware_and_is_listed() -> None:
    listed = command("train", "--list").stdout
    for stage, recipes in RECIPES.items():
        for name, recipe in recipes.items():
            assert f"{stage} {name}\n" in listed
            assert "data" in (recipe.__doc__ or "").lower(), (stage, name)


def test_what_is_missing_or_unknown_is_one_clear_sentence(tmp_path: Path, text: Path, model: Path) -> None:
    inputs = Inputs((str(text),), tmp_path / "out", model=str(model))
    with pytest.raises(TrainError, match="expected one of warmup, continual, convert"):
        recipe_of("pretrain", None)
    with pytest.raises(TrainError, match="expected one of thinned, paper"):
        recipe_of("continual", "fast")
    with pytest.raises(TrainError, match="found no --bank"):
        recipe_of("continual", None)(inputs)
    with pytest.raises(TrainError, match="starts from fresh weights"):
        recipe_of("warmup", "small")(inputs)
    pq.write_table(
        pa.table({k: ["x"] for k in ("dataset", "split", "question", "title", "passage")} | {"answers": [["y"]]}),
        tmp_path / "qa.parquet",
    )
    pq.write_table(pa.table({"title": ["x"], "text": ["short"]}), tmp_path / "passages.parquet")
    with pytest.raises(TrainError, match="found 0 passages with train questions and 0 others"):
        recipe_of("reader", "small")(Inputs((str(tmp_path),), tmp_path / "out"))
    with pytest.raises(TrainError, match="found nothing for --data"):
        command("train", "warmup", "--out", tmp_path)


def test_ten_steps_of_the_reader_lose_what_they_lost_before(tmp_path: Path) -> None:
    """All phases but the last are gone through in ten steps; the tokenizer is one token per byte, so that none has to be made."""
    toy_world(tmp_path / "world", 24)
    tiny_tokenizer().save_pretrained(tmp_path / "run" / "tokenizer")
    reader = Reader(steps=10, texts_for_meaning=0)
    decoder, objective, settings, _ = reader.run(tmp_path / "world", tmp_path / "run")
    losses: list[float] = []
    run(decoder, objective, replace(settings, log_every=1, precision="no"), lambda line: losses.append(line["loss"]))
    check_losses("reader", losses)
