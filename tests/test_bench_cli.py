"""`memory3 bench …` at toy size, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model, tiny_tokenizer
from toy_world import toy_world
from typer.testing import CliRunner

import memory3.bench.machine as machine
from memory3.cli import app
from memory3.cost import PRESETS, Shape
from memory3.spec import SpecError
from memory3.train.shapes import shape


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "toy", Shape.of(shape(2, 8192)))
    monkeypatch.setattr(machine, "PEAK_SIZES", (64,))


def document(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_decode_takes_a_preset_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "decode.png"
    sizes = ("--batch", "1", "--prompt", "10", "--output", "3", "--repeats", "1")
    found = document("bench", "decode", "--preset", "toy", "--layers", "1", *sizes, "--way", "memory", "--out", picture)
    assert found["settings"]["layers"] == 1
    assert list(found["tokens_per_s"]) == ["none", "memory"]
    assert picture.exists()


def test_write_takes_a_model(model: Path) -> None:
    found = document("bench", "write", "--model", model, "--references", "2", "--batch", "2", "--repeats", "1")
    assert found["ratios"]["write_share_of_peak"] > 0


def test_recall_takes_sizes_and_codecs(model: Path) -> None:
    sizes = ("--references", "4", "--batch", "1", "--repeats", "1", "--codec", "int4", "--no-cold", "--tokens-per-head", "2")
    found = document("bench", "recall", "--model", model, *sizes)
    [one] = found["recalls"]
    assert one["codec"] == "int4" and one["references"] == 4 and not one["cold"]


def test_codec_takes_data_and_draws(model: Path, tmp_path: Path) -> None:
    toy_world(tmp_path / "data", 6)
    picture = tmp_path / "codecs.png"
    words = ("--data", tmp_path / "data", "--limit", "3", "--repeats", "1", "--codec", "int8", "--out", picture)
    found = document("bench", "codec", "--model", model, *words)
    assert [row["codec"] for row in found["codecs"]] == ["raw", "int8"]
    assert found["ratios"]["smaller int8"] > 1
    assert picture.exists()


def test_options_that_contradict_each_other_are_refused(model: Path) -> None:
    for words, reason in (
        (("--layers", "1"), "found --layers 1 without --preset"),
        (("--preset", "toy", "--model", str(model)), "found both --model and --preset"),
    ):
        with pytest.raises(SpecError, match=reason):
            CliRunner().invoke(app, ["bench", "decode", *words], catch_exceptions=False)
