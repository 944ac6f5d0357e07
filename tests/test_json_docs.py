"""docs/json.md says of every JSON document what is in it, and of nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model, tiny_tokenizer
from object_store import bucket
from typer.testing import CliRunner

from memory3.answering import answer
from memory3.bank import Bank
from memory3.cli import INCOMPLETE, app
from memory3.cli.bank import FAULTY
from memory3.decoder import attach
from memory3.recall import Recall
from memory3.spec import MemorySpec, Reference
from memory3.tiers import SETTINGS, report
from memory3.writing import write

PAGE = Path(__file__).parent.parent / "docs" / "json.md"
FACTS = ("The tower was completed in 1889.", "Salt melts at 801 degrees.", "A group of crows is a murder.")
QUESTION = "When was the tower completed?"
COMMANDS = (
    "write",
    "ask",
    "generate",
    "bank stats",
    "bank tiers",
    "bank list",
    "bank delete",
    "bank verify",
    "bank rebuild",
    "bank codebook",
    "bank embed",
    "bank versions",
    "bank tag",
    "bank push",
    "bank pull",
    "bank compact",
    "bank export",
    "bank import",
    "cost",
    "plan",
    "consolidate",
    "apply",
    "simulate",
    "train",
    "eval qa",
    "probe facts",
    "probe heads",
    "probe answer",
    "bench peers",
)
TABLES: dict[str, dict[str, str]] = {
    heading: dict(re.findall(r"^\| `([^`]+)` \| ([a-z ]+) \|", section, re.M))
    for heading, section in re.findall(r"^## `([a-z ]+?)(?: --json)?`\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S)
}
NAMED_BY_CONTENT = {
    "memory.attention_mass": "LAYER",
    "arms[].metrics": "METRIC",
    "ratios": "RATIO",
    "facts[].given": "PREFIX",
    "facts[].said": "PREFIX",
    "facts[].agree": "PREFIX",
}
"""Objects whose keys are data, and the word that the page has for them."""


def kind(value: Any) -> str:
    for name, types in (("integer", int), ("number", float), ("string", str), ("array", list), ("object", dict)):
        if isinstance(value, types) and not isinstance(value, bool):
            return name
    return "boolean" if isinstance(value, bool) else "null"


def items(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a document with the type of its value, arrays of objects without their items themselves."""
    if path and not (path.endswith("[]") and isinstance(value, dict)):
        yield path, kind(value)
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from items(inner, f"{path}.{NAMED_BY_CONTENT.get(path, name)}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from items(inner, f"{path}[]")


def objects(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a document, itself included, with its path."""
    if isinstance(value, dict):
        yield path, value
        for name, inner in value.items():
            yield from objects(inner, f"{path}.{NAMED_BY_CONTENT.get(path, name)}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from objects(inner, f"{path}[]")


def allowed(documented: str) -> set[str]:
    """The types that a cell of the page allows; JSON may write any number without a fraction."""
    names = set(documented.split(" or "))
    return names | {"integer"} if "number" in names else names


def consolidated(run: Any, folder: Path, common: list[str]) -> None:
    """With a use history and without, with questions that are held and without."""
    lines, ids, other, quiet = (folder / name for name in ("replayed.jsonl", "ids", "other.jsonl", folder / "quiet"))
    lines.write_text(
        "".join(json.dumps({"text": f"{fact} So it was, {n} times over."}) + "\n" for n, fact in enumerate(FACTS * 3))
    )
    more = ["--replay", str(lines), "--steps", "1", "--batch", "2", *common]
    run("consolidate", "--bank", str(folder / "bank"), "--top", "1", "--out", str(folder / "adapters"), *more)
    told = "The tower was completed by Gustave in 1889, and it stands near the river with iron legs and stairs to see."
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in (told, *FACTS)))
    run("write", str(other), "--bank", str(quiet), "--embedder", "none", *common)
    ids.write_text(Reference(told).id)
    run("consolidate", "--bank", str(quiet), "--ids", str(ids), "--layers", "both", "--out", str(folder / "both"), *more)


def applied(run: Any, folder: Path, common: list[str]) -> None:
    """One reference into the parameters of an adapter, the others to text, and what is read then."""
    quiet, uses, plan, above = (str(folder / name) for name in ("quiet", "many", "plan", "both/above"))
    Path(uses).write_text(json.dumps({"id": (folder / "ids").read_text(), "uses": 1e12}))
    run("plan", "--bank", quiet, "--uses", uses, "--out", plan, *common)
    run("apply", plan, "--bank", quiet, "--adapter", above, *common)
    for model in (above, common[1]):
        run("ask", "Who completed the tower near the river?", "--bank", quiet, "--model", model, "--max-tokens", "2", "--json")
    run("bank list", quiet, "--json")
    run("bank tiers", quiet, "--json")
    run("bank tiers", quiet, "--max-bytes", "100000000", "--json")
    run("bank stats", quiet, "--json")
    (folder / "copy" / SETTINGS).unlink()
    run("bank tiers", str(folder / "copy"), "--json")
    run("generate", "The tower near the river", "--bank", quiet, "--model", above, "--max-tokens", "2", "--json")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Documents of each command, from Python and from the command line, memory on and off."""
    folder = tmp_path_factory.mktemp("json")
    bank, dense, model, notes = (folder / name for name in ("bank", "dense", "model", "notes"))
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    notes.mkdir()
    for n, fact in enumerate(FACTS):
        (notes / f"{n}.txt").write_text(fact)
    common = ["--model", str(model), "--json"]
    asking = ["--bank", str(bank), "--max-tokens", "4", *common]
    found: dict[str, list[Any]] = {command: [] for command in COMMANDS}

    def run(command: str, *arguments: str, code: int = 0) -> None:
        done = CliRunner().invoke(app, [*command.split(), *arguments], catch_exceptions=False)
        assert done.exit_code == code, done.output
        found[command].append(json.loads(done.stdout.splitlines()[-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMORY3_CACHE", str(folder / "cache"))
        run("write", str(notes), "--bank", str(bank), *common)
        (notes / "bad.jsonl").write_text("no JSON")
        run("write", str(notes), "--bank", str(bank), *common, code=INCOMPLETE)
        for more in ([], ["--text"], ["--no-memory"], ["--min-score", "1e9"]):
            run("ask", QUESTION, *asking, *more)
        for more in ([], ["--no-memory"], ["--min-score", "1e9"]):
            run("generate", "The tower", *asking, *more)
        run("bank stats", str(bank), "--json")
        run("bank list", str(bank), "--json")
        run("bank embed", str(bank), "--embedder", "none", "--json")
        run("bank stats", str(bank), "--json")
        run("bank embed", str(bank), "--json")
        run("bank tag", str(bank), "first", "--json")
        run("bank versions", str(bank), "--json")
        run("bank tag", str(bank), "first", "--remove", "--json")
        with bucket() as address:
            run("bank push", str(bank), address, "--json")
            run("bank stats", address, "--json")
            run("bank pull", address, str(folder / "pulled"), "--json")
        run("bank export", str(bank), str(folder / "bank.tar"), "--json")
        run("bank import", str(folder / "bank.tar"), str(folder / "copy"), "--json")
        run("write", str(notes), "--bank", str(folder / "long"), "--tokens-per-head", "32", *common, code=INCOMPLETE)
        few = ["--keys", "OPQ2_16,PQ2x1", "--values", "OPQ2_16,PQ2x1"]
        run("bank codebook", str(folder / "long"), str(folder / "codebook"), *few, "--json")
        run("bank verify", str(bank), "--json")
        run("bank rebuild", str(folder / "copy"), *common)
        shard = folder / "copy" / "shards" / "00000.kv"
        shard.write_bytes(shard.read_bytes()[:-1])
        run("bank verify", str(folder / "copy"), "--absent", "tower", "--json", code=FAULTY)
        run("bank delete", str(folder / "copy"), "--where", "tokens > 0", "--json")
        run("bank compact", str(folder / "copy"), "--json")
        run("cost", *common)
        run("cost", "--preset", "paper-2.4b", "--rank", "8", "--json")
        run("plan", "--bank", str(bank), *common)
        consolidated(run, folder, common)
        applied(run, folder, common)
        uses = folder / "uses.jsonl"
        uses.write_text("".join(json.dumps({"time": 3600 * n, "id": n % 2}) + "\n" for n in range(30)))
        playing = ("--budget", "0.5", "--price-gb-month", "0.1", "--json")
        run("simulate", "--preset", "paper-2.4b", "--trace", str(uses), *playing)
        run("simulate", "--bank", str(bank), "--uses", "50", "--budget", "0.5", *common)
        text, asked = folder / "text.txt", folder / "asked.jsonl"
        text.write_text(" ".join(FACTS) * 4)
        row = {"question": QUESTION, "answers": ["in 1889"], "dataset": "a", "split": "dev"}
        asked.write_text(f"{json.dumps(row)}\n" * 2)
        training = ["--data", str(text), "--length", "64", "--batch", "1", "--out", str(folder / "out"), *common]
        run("train", "warmup", "model", *training, "--steps", "2", "--minutes", "0")
        run("train", "warmup", "model", *training, "--steps", "2")
        asking_again = ("--retriever", "lexical", "--count", "1", "--dataset", "a", "--split", "dev", "--limit", "1")
        run("eval qa", "--data", str(asked), "--bank", str(bank), *common)
        run(
            "eval qa",
            "--data",
            str(asked),
            "--bank",
            str(bank),
            "--untrained",
            "none",
            "--no-overlap-filter",
            *asking_again,
            *common,
        )
        realization = {"prompt": QUESTION, "answers": ["1889"]}
        (folder / "facts.jsonl").write_text(
            json.dumps({"id": "a", "relation": "year", "text": FACTS[0], "realizations": [realization] * 2})
        )
        run("probe facts", str(folder / "facts.jsonl"), "--without", "1", "--given", "0", *common)
        run("probe heads", "--length", "4", "--texts", "1", *common)
        run("probe answer", QUESTION, *asking)
        few = ("--prompts", "1", "--prompt", "4", "--output", "3", "--repeats", "1")
        run("bench peers", "--model", str(model), "--venvs", str(folder / "venvs"), *few)
    with attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=None)) as decoder:
        opened = Bank(dense, decoder, create=True)
        write(decoder, [Reference(fact) for fact in FACTS], opened)
        found["ask"] += answer(decoder, [QUESTION, "Salt?", "zzzz"], Recall(opened), max_new_tokens=4)
        found["bank stats"].append(opened.stats() | report(opened))
    return found


def test_the_page_has_one_table_per_command() -> None:
    assert tuple(TABLES) == COMMANDS
    rows = PAGE.read_text("utf-8").count("\n| `")
    assert sum(map(len, TABLES.values())) == rows  # no row is listed twice or passed over


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_of_a_document_is_documented_with_its_type(documents: dict[str, list[Any]], command: str) -> None:
    for document in documents[command]:
        wrong = [(key, was) for key, was in items(document) if was not in allowed(TABLES[command].get(key, ""))]
        assert wrong == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_object_has_all_of_its_documented_keys(documents: dict[str, list[Any]], command: str) -> None:
    for document in documents[command]:
        for path, value in objects(document):
            if path not in NAMED_BY_CONTENT:
                front = f"{path}." if path else ""
                inside = {key.removeprefix(front) for key in TABLES[command] if key.startswith(front)}
                assert {name for name in inside if not re.search(r"[.\[]", name)} == set(value), path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_key_and_type_occurs(documents: dict[str, list[Any]], command: str) -> None:
    """Also null where the page says so; a number without a fraction is as good as one with."""
    seen = {pair for document in documents[command] for pair in items(document)}
    stated = {(key, name) for key, cell in TABLES[command].items() for name in cell.split(" or ")}
    assert {(key, name) for key, name in stated - seen if (key, "integer") not in seen or name != "number"} == set()


def test_documents_survive_json(documents: dict[str, list[Any]]) -> None:
    for document in (d for some in documents.values() for d in some):
        assert json.loads(json.dumps(document, allow_nan=False)) == document
