"""The measurements of reading, retrieval, benchmarks and choices by their commands, at toy size."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import FakeEmbedder
from families import tiny_model, tiny_tokenizer
from toy_world import PLACES
from typer.testing import CliRunner

from memory3.cli import app
from memory3.decoder import attach
from memory3.evaluate import ablations
from memory3.evaluate.beginning import Plan
from memory3.evaluate.fusion import CONSTANTS
from memory3.evaluate.reading import SLOTS
from memory3.selection import SELECTIONS
from memory3.spec import MemorySpec
from memory3.train.recipe import Reader
from memory3.train.stages import save_model

SPEC = MemorySpec(tokens_per_head=4, reference_length=64, chunk_length=64, references_per_chunk=2)
SHORT = replace(SPEC, chunk_length=16)
PNG = b"\x89PNG"
MOST, MORE = 32, 40


def said(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["eval", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def rows_of(table: str) -> dict[str, list[str]]:
    """Cells behind the name of each row of a Markdown table."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|") and "---" not in line]
    return {name: cells for name, *cells in lines[1:]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and questions whose answers stand in the second reference of their passages."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "data").mkdir()
    save_model(attach(tiny_model("llama"), tiny_tokenizer(), SPEC), folder / "model", SPEC)
    rows = [
        {
            "dataset": ("squad", "popqa")[n % 2],
            "split": ("dev", "dev", "train")[n % 3],
            "question": f"When was {PLACES[n % 6]} {n} made?",
            "answers": [f"in {1900 + n}"],
            "title": f"P{n}",
            "passage": f"The {PLACES[n % 6]} {n} lies in the old town near the water. The {PLACES[n % 6]} {n} was made in {1900 + n}.",
            "key": f"/{n}",
        }
        for n in range(MOST)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "qa.parquet")
    texts = [{"key": r["key"], "title": r["title"], "text": r["passage"]} for r in rows]
    texts += [
        {
            "key": f"/more/{n}",
            "title": f"Place {n}",
            "text": f"The {PLACES[n % 6]} number {n} is near the {PLACES[n % 5]}. " * 4,
        }
        for n in range(MORE)
    ]
    pq.write_table(pa.Table.from_pylist(texts), folder / "data" / "passages.parquet")
    (folder / "notes.txt").write_text("\n\n".join(str(r["passage"]) for r in rows[:12]))
    words = ("write", folder / "notes.txt", "--bank", folder / "bank", "--model", folder / "model", "--embedder", "none")
    assert CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False).exit_code == 0
    return folder


def common(place: Path, limit: int) -> tuple[str | Path, ...]:
    return "--data", place / "data", "--limit", str(limit), "--model", place / "model"


# ---- reading ----


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("reading", ["closed book", "sparse memory, 4 tokens per head", "text in the prompt, gold alone"]),
        ("slots", [f"{slots or 'all'} tokens per head" for slots in SLOTS]),
        ("selections", list(SELECTIONS)),
        ("context", ["encoded alone, gold alone", "encoded in context, gold among four others"]),
    ],
)
def test_reading_is_measured_on_every_question(place: Path, tmp_path: Path, what: str, expected: Sequence[str]) -> None:
    picture = tmp_path / "slots.png"
    found = rows_of(said(what, *common(place, 3), *(("--out", picture) if what == "slots" else ())))
    assert what != "slots" or picture.read_bytes().startswith(PNG)
    assert set(expected) <= set(found)
    assert {found[name][0] for name in expected} == {"3"}


def test_heads_are_ranked_and_written(place: Path, tmp_path: Path) -> None:
    shown = said("heads", "--out", tmp_path / "heads.json", *common(place, 8))
    ranked = re.findall(r"\| layer (\d+), query head (\d+) \|", shown)
    assert ranked and "words alone, other half" in shown
    chosen = json.loads((tmp_path / "heads.json").read_text())
    assert {(str(layer), str(head)) for layer, head in chosen} <= set(ranked)


# ---- retrieval ----


def test_retrieval_then_fusion_and_the_approximate_index_over_its_tables(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory3.embedding.SentenceEmbedder", lambda *_: FakeEmbedder())
    work = ("--work", tmp_path / "work")
    one = ("--retriever", "lexical", "--retriever", "hybrid", "--out", tmp_path / "found.png")
    shown = said("retrieval", *one, *work, *common(place, MOST))
    assert f"{MOST + MORE} documents" in shown and "lexical" in shown and "hybrid" in shown
    assert (tmp_path / "found.png").read_bytes().startswith(PNG)
    assert set(rows_of(said("fusion", *work, *common(place, 6)))) >= {str(c) for c in CONSTANTS}
    measured = said("ann", "--data", place / "data", "--limit", "40", *work)
    assert float(rows_of(measured)["40"][1].split()[0]) > 0.5


# ---- benchmarks ----


TEXTS = [f"The tower number {n} was built in {1900 + n}, they say." for n in range(3)]
BENCHMARKS: dict[str, list[dict[str, Any]]] = {
    "factor": [{"prefix": t[:30], "completion": t[30:], "contradictions": ["in 1800.", "by Ann."]} for t in TEXTS],
    "halueval": [{"question": "When?", "right_answer": "19", "hallucinated_answer": "never", "knowledge": t} for t in TEXTS],
}


@pytest.mark.parametrize("task", list(BENCHMARKS))
def test_benchmarks_by_likelihood(place: Path, tmp_path: Path, task: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in BENCHMARKS[task]))
    given = ("--gold",) if task == "halueval" else ("--bank", place / "bank")
    words = ("--data", file, *given, "--model", place / "model", "--untrained", "none", "--json")
    document = json.loads(said(task, *words).strip().splitlines()[-1])
    assert document["task"] == task
    assert {len(arm["metrics"]["accuracy"]["values"]) for arm in document["arms"]} == {3}
    assert len(document["arms"]) >= 5


# ---- ablations ----


@dataclass(frozen=True)
class ToyPlan(Plan):
    """Two runs of four steps."""

    steps: int = 4
    depth: int = 2
    vocabulary: int = 300
    length: int = 48
    batch: int = 2
    held: int = 4
    points: int = 1
    spec: MemorySpec = SHORT


def ablation(name: str, out: Path, *words: str | Path) -> dict[str, list[str]]:
    shown = said("ablation", name, "--out", out, *words)
    assert (out / f"{name}.md").read_text().strip() in shown
    document = json.loads((out / f"{name}.json").read_text())
    found = rows_of(shown)
    assert [row["arm"] for row in document] == list(found)
    return found


def test_when_memory_begins(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "Plan", ToyPlan)
    found = ablation("warmup", tmp_path, "--data", place / "data" / "passages.parquet")
    assert list(found) == ["warmup 2 steps, then continual 2", "continual from the first step, 4"]
    assert (tmp_path / "warmup.png").read_bytes().startswith(PNG)


def test_which_layers_hold_memory(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "SMALL", Reader(steps=1, tokens_per_head=8, vocabulary=320, texts_for_meaning=0))
    found = ablation("layers", tmp_path, "--data", place / "data", "--limit", "2", "--steps", "1")
    assert [name.split(" (")[0] for name in found][::3] == ["first half", "middle half", "all layers"]
    assert [cells[0] for cells in found.values()] == ["2"] * 9


@pytest.mark.parametrize(("name", "expected"), [("tokens", "1 token per head"), ("selection", "random")])
def test_a_finished_model_is_taken_through_one_choice(place: Path, tmp_path: Path, name: str, expected: str) -> None:
    found = ablation(name, tmp_path, *common(place, 2))
    assert found[expected][0] == "2"
    assert len(found) >= len(SELECTIONS)


def test_how_often_is_recalled(place: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("They came to the old bridge and saw that it was made by men. " * 20)
    words = ("--data", tmp_path / "held.txt", "--bank", place / "bank", "--limit", "2", "--model", place / "model")
    found = ablation("chunk", tmp_path / "out", *words)
    assert [name.split(",")[0] for name in found][1::2] == [f"{size}-token chunks" for size in (32, 64, 128)]
    assert {cells[0] for cells in found.values()} == {"2"}
