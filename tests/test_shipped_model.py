"""The model that ships: it loads offline, reads a note that training never saw, and says nothing of it without memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import memory3
from memory3.cli import app

NOTE = Path(__file__).parent.parent / "examples" / "invented.md"
QUESTION, ANSWER = "When was the glass horn invented?", "1812"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORY3_CACHE", str(tmp_path / "cache"))


def asked(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_an_invented_fact_is_read_back_through_ask_and_is_unknown_without_memory(tmp_path: Path) -> None:
    bank = str(tmp_path / "bank")
    asked("write", str(NOTE), "--bank", bank, "--json")
    with_memory = asked("ask", QUESTION, "--bank", bank, "--json")
    closed = asked("ask", QUESTION, "--no-memory", "--json")
    assert with_memory["answer"] == ANSWER
    assert with_memory["citations"][0]["source"].endswith("invented.md")
    assert with_memory["memory"]["logit_shift"] > 0.1
    assert closed["answer"] != ANSWER


def test_the_shipped_model_is_ordinary_transformers_files_in_small_shards() -> None:
    folder = memory3.default_model()
    shards = list(folder.glob("*.safetensors"))
    assert shards
    assert max(s.stat().st_size for s in shards) < 16 * 10**6
    assert not list(folder.glob("*.bin"))
    with memory3.load() as decoder:
        assert decoder.trained
        assert 5e6 < sum(p.numel() for p in decoder.model.parameters()) < 8e6
