"""The plan of a bank: never dearer than one form for all, never down with more uses, and whole in its file."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from memory3.bank import Bank
from memory3.cli import app
from memory3.cost import PRESETS, formats, text_read_flops
from memory3.decoder import attach
from memory3.hierarchy.planning import Plan, Text, plan, uses_in
from memory3.hierarchy.sizes import sizes_of
from memory3.recall import Recall
from memory3.spec import BankMismatch, MemorySpec, Reference, SourceError
from memory3.writing import write

WORDS = ("The tower was completed in 1889.", "Salt melts at 801 degrees.", "A group of crows is a murder.")
TOWER, SALT, CROWS = (Reference(text).id for text in WORDS)
TIERS = ["text", "memory", "low-rank", "parameters"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Three references; the tower was asked for, and the salt once."""
    with attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=4)) as decoder:
        opened = Bank(tmp_path / "bank", decoder, create=True)
        write(decoder, [Reference(text, f"{n}.txt", 0, len(text)) for n, text in enumerate(WORDS)], opened)
        Recall(opened, count=1)(["the tower"] * 9 + ["does salt melt"])
    return tmp_path / "bank"


def document(bank: Path, model: Path, *more: object) -> dict[str, Any]:
    done = CliRunner().invoke(
        app, ["plan", *map(str, ("--bank", bank, "--model", model, *more, "--json"))], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def refusal(bank: Path, *more: object) -> str:
    done = CliRunner().invoke(app, ["plan", "--bank", str(bank), *map(str, more)])
    assert done.exception is not None and "\n" not in str(done.exception)
    return f"{type(done.exception).__name__}: {done.exception}"


# ---- equation 1 over a bank ----

counts = st.lists(st.floats(0, 1e6), min_size=1, max_size=12)


def paper(text: Text) -> Any:
    spec = MemorySpec(reference_length=text.tokens)
    return formats(PRESETS["paper-2.4b"], spec, record_bytes=1000, text_bytes=text.bytes, rank=16)


def planned(uses: list[float]) -> Plan:
    texts = [Text(str(n), 1 + n * 11 % 128, n) for n in range(len(uses))]
    return plan(texts, {text.id: n for text, n in zip(texts, uses, strict=True)}, paper)


@given(counts)
def test_a_plan_never_costs_more_than_one_form_for_all(uses: list[float]) -> None:
    made = planned(uses)
    assert list(made.alone) == TIERS
    assert all(made.planned <= cost * (1 + 1e-12) for cost in made.alone.values())


@given(counts)
def test_a_reference_with_more_uses_never_has_a_lower_tier(uses: list[float]) -> None:
    texts = [Text(str(n), 100, 400) for n in range(len(uses))]
    made = plan(texts, {str(n): value for n, value in enumerate(uses)}, paper)
    assert [r.uses for r in made.references] == sorted(uses, reverse=True)
    places = [TIERS.index(r.tier) for r in made.references]
    assert all(a >= b for a, b in pairwise(places))


def test_each_form_has_its_references_and_uses() -> None:
    made = planned([0.0, 0.1, 50.0, 1e6])
    assert made.tiers == {"text": (2, 0.1), "memory": (1, 50.0), "low-rank": (1, 1e6), "parameters": (0, 0)}


# ---- the file ----


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    made = planned([0.0, 0.3, 1e5])
    made.save(tmp_path / "new" / "plan.json")
    assert Plan.load(tmp_path / "new" / "plan.json") == made


def test_files_that_are_no_plan_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for words in ("", "[]", "{}", '{"plan_version": 1, "references": [{}]}'):
        file.write_text(words)
        with pytest.raises(SourceError, match="is no plan"):
            Plan.load(file)
    planned([1.0]).save(file)
    file.write_text(file.read_text().replace('"plan_version": 1', '"plan_version": 2'))
    with pytest.raises(SourceError, match="version 2, expected 1"):
        Plan.load(file)
    with pytest.raises(SourceError, match="cannot be written"):
        planned([1.0]).save(tmp_path)


def test_a_plan_of_another_bank_is_refused(bank: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    document(bank, model, "--out", file)
    with Bank(bank) as opened:
        made = Plan.load(file, opened)
        replace(made, bank="yesterday").save(file)
        with pytest.raises(BankMismatch, match="made yesterday"):
            Plan.load(file, opened)


# ---- the command ----


def test_a_plan_follows_the_recalls_of_the_bank(bank: Path, model: Path, tmp_path: Path) -> None:
    made = document(bank, model, "--out", tmp_path / "plan.json")
    assert (made["references"], made["unit"], made["days"]) == (3, "FLOP", 30)
    assert [t["name"] for t in made["tiers"]] == ["text", "memory", "parameters"]
    assert made["cost"] <= min(t["cost_of_all"] for t in made["tiers"])
    assert [r.id for r in Plan.load(tmp_path / "plan.json").references] == [TOWER, SALT, CROWS]
    assert document(bank, model, "--horizon", 60)["uses"] == pytest.approx(2 * made["uses"], rel=1e-3)


def test_given_uses_take_the_place_of_the_history(bank: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "uses.jsonl"
    file.write_text(f'{{"id": "{CROWS}", "uses": 1e9}}\n\n{{"id": "{SALT}", "uses": 2}}\n{{"id": "{SALT}", "uses": 1}}\n')
    made = document(bank, model, "--uses", file, "--out", tmp_path / "plan.json")
    assert made["uses"] == 1e9 + 3
    rows = Plan.load(tmp_path / "plan.json").references
    assert [(r.id, r.uses, r.tier) for r in rows][::2] == [(CROWS, 1e9, "parameters"), (TOWER, 0.0, "text")]


def test_written_memories_cost_nothing_more_to_write(bank: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "uses.jsonl"
    file.write_text(f'{{"id": "{SALT}", "uses": 0.01}}\n')
    plain, paid = (document(bank, model, "--uses", file, *more) for more in ([], ["--written"]))
    assert [t["references"] for t in plain["tiers"]] == [3, 0, 0]
    assert paid["tiers"][1]["cost_of_all"] < plain["tiers"][1]["cost_of_all"] / 10 and paid["cost"] < plain["cost"]


def test_storage_that_costs_is_weighed(bank: Path, model: Path) -> None:
    priced = ["--tflops", 1, "--price-hour", 1, "--price-gb-month"]
    free, dear = (document(bank, model, *priced, price) for price in (0, 1e6))
    assert free["unit"] == dear["unit"] == "money"
    assert dear["tiers"][1]["cost_of_all"] > free["tiers"][1]["cost_of_all"]


def test_costs_are_those_of_each_references_own_tokens_and_bytes(bank: Path, model: Path, tmp_path: Path) -> None:
    file, sizes = tmp_path / "uses.jsonl", sizes_of(model)
    file.write_text(f'{{"id": "{SALT}", "uses": 2}}\n')
    own = replace(sizes.spec, reference_length=len(WORDS[1]))  # the tiny tokenizer has a token for each byte
    text = document(bank, model, "--uses", file)["tiers"][0]
    assert text["cost_of_all"] == 2 * text_read_flops(sizes.shape, own)
    stored = ["--tflops", 1, "--price-hour", 0, "--price-gb-month", 1e9]
    kept = document(bank, model, "--uses", file, *stored)["tiers"][0]
    assert kept["cost_of_all"] == pytest.approx(sum(map(len, WORDS)))


def test_a_half_life_can_be_set(bank: Path, model: Path) -> None:
    document(bank, model, "--half-life", 7)
    with Bank(bank) as opened:
        assert opened.uses.history().half_life_days == 7


def test_what_cannot_be_planned_is_refused_in_one_sentence(bank: Path, model: Path, tmp_path: Path) -> None:
    assert "no bank at" in refusal(tmp_path / "nothing", "--model", model)
    assert "do not fit the model that ships: give the model that wrote it" in refusal(bank)
    (tmp_path / "uses.jsonl").write_text('{"id": "x", "uses": 1}')
    assert "found 1.0 uses of 'x' in line 1" in refusal(bank, "--model", model, "--uses", tmp_path / "uses.jsonl")
    (bank / "uses.sqlite").unlink()
    assert "found no recalls in the history of this bank" in refusal(bank, "--model", model)
    with Bank(bank) as opened, opened.exclusive():
        opened.delete_where("tokens > 0")
    assert "is empty, expected references" in refusal(bank, "--model", model)


@pytest.mark.parametrize(
    "line",
    ["no JSON", "3", '{"id": "a"}', '{"id": "a", "uses": "many"}', '{"id": "a", "uses": -1}', '{"id": "a", "uses": NaN}'],
)
def test_lines_that_are_no_uses_are_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "uses.jsonl"
    file.write_text(f'{{"id": "a", "uses": 1}}\n{line}\n')
    with pytest.raises(SourceError, match="line 2"):
        uses_in(file, [Text("a", 3, 9)])


def test_the_table_and_the_picture_are_made(bank: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plan.png"
    done = CliRunner().invoke(
        app, ["plan", "--bank", str(bank), "--model", str(model), "--picture", str(out)], catch_exceptions=False
    )
    assert "the plan costs" in done.stdout and TOWER in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")
