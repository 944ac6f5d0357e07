"""Costs of a model from its config, in FLOPs, seconds and money, as table, picture and document."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from memory3.bank import Bank
from memory3.cli import app
from memory3.codec import CODECS
from memory3.cost import Shape
from memory3.decoder import attach
from memory3.hierarchy.measuring import measured_formats
from memory3.hierarchy.sizes import changed, sizes_of
from memory3.loading import ModelError
from memory3.spec import MemorySpec, SpecError, UnsupportedModel

ANOTHER = MemorySpec(layers=(1, 2), heads=((0,), (0, 1)), tokens_per_head=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that was trained for another spec than the default."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "memory_spec.json").write_text(json.dumps(ANOTHER.to_json()))
    return folder


def document(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["cost", *map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_a_models_config_says_what_its_decoder_is(model: Path) -> None:
    found = sizes_of(model)
    with attach(tiny_model("llama"), tiny_tokenizer(), ANOTHER) as decoder:
        assert found.shape == Shape.of(decoder.model.config)
        assert found.spec == decoder.spec
        assert (found.shape.head_dim, found.dtype) == (decoder.head_dim, torch.float32)


@pytest.mark.parametrize("codec", sorted(set(CODECS) - {"product"}))
def test_record_bytes_are_those_of_a_bank(model: Path, codec: str, tmp_path: Path) -> None:
    found = sizes_of(model)
    chosen = found.codec(codec)
    with attach(tiny_model("llama"), tiny_tokenizer(), ANOTHER) as decoder:
        assert Bank(tmp_path / "bank", decoder, create=True, codec=chosen).record_bytes == found.record_bytes(chosen)


def test_the_papers_codec_has_its_bytes_without_a_codebook() -> None:
    """39,424 bytes of 176 heads, 8 tokens, keys and values, 14 bytes each (design 2.7), and a header."""
    made = document("--preset", "paper-2.4b", "--codec", "product")
    assert made["formats"][1]["bytes"] - made["formats"][0]["bytes"] == 39_424 + 1472


def test_fields_of_the_spec_can_be_overruled(model: Path) -> None:
    found = sizes_of(model)
    assert changed(found, tokens_per_head=9, chunk_length=None) == replace(found, spec=replace(found.spec, tokens_per_head=9))
    with pytest.raises(SpecError, match="reference_length=0"):
        changed(found, reference_length=0)


def test_a_config_that_is_not_there_or_fits_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found no config at"):
        sizes_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UnsupportedModel, match="t5 with an encoder"):
        sizes_of(tmp_path)


def test_measured_forms_cost_time_and_the_banks_bytes(model: Path) -> None:
    with attach(tiny_model("llama"), tiny_tokenizer(), ANOTHER) as decoder:
        before = [p.clone() for p in decoder.model.parameters()]
        told: list[tuple[int, int]] = []
        text, memory, parameters = measured_formats(decoder, batch=3, repeats=1, tell=lambda *n: told.append(n))
        twice = measured_formats(decoder, batch=3, repeats=1, passes=10**6)[2]
        assert all(torch.equal(a, b) for a, b in zip(before, decoder.model.parameters(), strict=True))
        assert all(p.grad is None for p in decoder.model.parameters())
    found = sizes_of(model)
    assert (text.name, text.write, parameters.read, parameters.bytes) == ("text", 0, 0, 0)
    assert text.read > 0 and memory.write > 0 and parameters.write > 0 and memory.read >= 0
    assert memory.bytes - text.bytes == found.record_bytes(found.codec("raw"))
    assert twice.write > 1000 * parameters.write
    assert told[-1] == (12, 12)


def test_the_command_says_the_papers_intervals() -> None:
    made = document("--preset", "paper-2.4b")
    assert [(i["name"], f"{i['least']:.3g}") for i in made["intervals"]] == [
        ("text", "0"),
        ("memory", "0.494"),
        ("parameters", "1.34e+04"),
    ]
    assert made["intervals"][-1]["most"] is None and made["unit"] == "FLOP"


def test_options_reach_the_formulas(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps({"layers": [3], "tokens_per_head": 16}))
    made = document("--preset", "paper-0.9b", "--spec", tmp_path / "spec.json", "--chunk-length", 32, "--rank", 4)
    assert (made["memory_layers"], made["memory_heads"], made["tokens_per_head"], made["chunk_length"]) == (1, 8, 16, 32)
    assert [f["name"] for f in made["formats"]] == ["text", "memory", "low-rank", "parameters"]
    assert made["formats"][1]["read"] == 2 * 2 * 32 * 16 * 2048
    plain, twice = document("--preset", "paper-0.9b"), document("--preset", "paper-0.9b", "--passes", 2, "--references", 5)
    assert twice["formats"][2]["write"] == 2 * plain["formats"][2]["write"]
    assert twice["formats"][0]["read"] > plain["formats"][0]["read"]


def test_money_needs_a_rate_and_makes_storage_cost(model: Path) -> None:
    made = document("--model", model, "--tflops", 0.001, "--price-hour", 3.6, "--price-gb-month", 1.0, "--days", 30)
    assert made["unit"] == "money"
    text, memory, _ = made["formats"]
    assert text["write"] == pytest.approx(text["bytes"] / 1e9)
    flops = document("--model", model)["formats"][1]["write"]
    assert memory["write"] == pytest.approx(flops / 1e9 / 1000 + memory["bytes"] / 1e9)
    assert document("--model", model, "--tflops", 1)["unit"] == "s"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "found preset 'huge'"),
        (["--preset", "paper-2.4b", "--model", "m"], "found both --model m and --preset"),
        (["--preset", "paper-2.4b", "--measured"], "found --measured with --preset"),
        (["--measured", "--rank", "3"], "found --measured with --rank"),
        (["--price-hour", "1"], "found --price-hour alone"),
        (["--price-gb-month", "1"], "found --price-gb-month alone"),
        (["--out", "picture.txt"], "found a picture named picture.txt"),
    ],
)
def test_options_that_contradict_each_other_are_refused_in_one_sentence(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["cost", *arguments])
    assert message in str(done.exception) and "\n" not in str(done.exception)


def test_the_table_and_the_picture_are_made(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "cost.png"
    done = CliRunner().invoke(app, ["cost", "--preset", "paper-2.4b", "--out", str(out)], catch_exceptions=False)
    assert "from 0.494 to 13,400" in done.stdout and "from 13,400 on" in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")
    done = CliRunner().invoke(app, ["cost", "--model", str(model), "--measured", "--batch", "2"], catch_exceptions=False)
    assert "write, s" in done.stdout
