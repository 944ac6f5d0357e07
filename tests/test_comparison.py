"""A consolidation measured: what is apart stays apart, and the document says what the run did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from memory3.bank import Bank
from memory3.cli import app
from memory3.hierarchy.comparison import ids_in, most_used, planned_ids, sides_of
from memory3.hierarchy.planning import Plan, Planned
from memory3.loading import ModelError, base_of, load
from memory3.recall import Recall
from memory3.spec import BankError, BankMismatch, MemorySpec, Reference, SourceError
from memory3.writing import write

NAMES = ("tower", "canal", "bridge", "castle", "school", "church", "station", "museum")
TEXTS = [
    f"The {name} was completed by Gustave{n} in 18{n}9, and it stands near the river with iron legs and stairs to see."
    for n, name in enumerate(NAMES)
]
IDS = [Reference(text).id for text in TEXTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "memory_spec.json").write_text(json.dumps(MemorySpec(layers=(0, 1), tokens_per_head=4).to_json()))
    return folder


@pytest.fixture(scope="module")
def bank(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight references; the canal was asked for most often, then the school."""
    folder = tmp_path_factory.mktemp("banks") / "bank"
    with load(model) as decoder:
        opened = Bank(folder, decoder, create=True)
        write(decoder, [Reference(text) for text in TEXTS], opened)
        Recall(opened, count=1)(["the canal"] * 9 + ["the school"] * 4)
    return folder


@pytest.fixture(scope="module")
def both(bank: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out")
    return document("--bank", bank, "--model", model, "--top", 2, "--layers", "both", "--steps", 2, "--batch", 2, "--out", out)


def document(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["consolidate", *map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- which references ----


def test_the_most_used_come_first(bank: Path) -> None:
    with Bank(bank) as opened:
        assert most_used(opened, 2) == [IDS[1], IDS[4]]


def test_ids_come_from_a_file_each_once(tmp_path: Path) -> None:
    file = tmp_path / "ids"
    file.write_text(f"{IDS[2]}\n\n{IDS[0]}\n{IDS[2]}\n")
    assert ids_in(file) == [IDS[2], IDS[0]]
    file.write_text("\n")
    with pytest.raises(SourceError, match="is empty, expected one id"):
        ids_in(file)
    with pytest.raises(SourceError, match="cannot be read"):
        ids_in(tmp_path / "none")


def test_a_plan_names_what_it_puts_into_parameters(bank: Path, tmp_path: Path) -> None:
    def planned(*tiers: str, made: str | None = None) -> Path:
        rows = tuple(Planned(id, 9, 1.0, tier) for id, tier in zip(IDS, tiers, strict=False))
        Plan(made or opened.manifest.created, 30.0, "FLOP", rows, 0.0, {}).save(tmp_path / "plan")
        return tmp_path / "plan"

    with Bank(bank) as opened:
        assert planned_ids(planned("memory", "low-rank", "parameters", "text"), opened) == [IDS[1], IDS[2]]
        with pytest.raises(SourceError, match="puts no reference into parameters"):
            planned_ids(planned("memory"), opened)
        with pytest.raises(BankMismatch):
            planned_ids(planned("parameters", made="long ago"), opened)


def test_no_text_is_on_two_sides(bank: Path) -> None:
    with Bank(bank) as opened:
        sides = sides_of(opened, IDS[:2])
        parts = [[s.text for s in sides.subjects], [s.text for s in sides.control], sides.replayed, sides.held]
        assert sorted(text for part in parts for text in part) == sorted(TEXTS)
        assert (parts[0], len(parts[1])) == (TEXTS[:2], 2)
        given = sides_of(opened, IDS[:2], ["one", "two", TEXTS[0], sides.control[0].text, "three", "one"])
        assert sorted([*given.replayed, *given.held]) == ["one", "three", "two"]
        with pytest.raises(BankError, match="give documents with --replay"):
            sides_of(opened, IDS)


# ---- what it does ----


def test_both_choices_start_from_the_same_model_and_only_one_keeps_the_bank(both: dict[str, Any]) -> None:
    above, everywhere = both["modes"]
    assert [above["layers"], above["banks_readable"]] == ["above", True]
    assert [everywhere["layers"], everywhere["banks_readable"]] == ["all", False]
    assert (above["paid"]["first_layer"], everywhere["paid"]["first_layer"]) == (2, 0)
    assert everywhere["paid"]["parameters"] == 2 * above["paid"]["parameters"]
    assert everywhere["paid"]["flops"] > above["paid"]["flops"]
    assert everywhere["saving"]["rebuild_flops"] > above["saving"]["rebuild_flops"] == 0


def test_recall_is_measured_before_and_after_with_and_without_memory_and_on_a_control(both: dict[str, Any]) -> None:
    arms = ["closed book", "control, closed book", "in memory", "control, in memory"]
    kinds = ["questions", "continuations"]
    assert [(r["layers"], r["arm"], r["kind"]) for r in both["recall"]] == [
        (when, arm, kind) for when in (None, "above", "all") for arm in arms for kind in kinds
    ]
    counts = {r["arm"]: r["count"] for r in both["recall"] if r["kind"] == "continuations"}
    assert set(counts.values()) == {2}
    moved = [r["probability"] for r in both["recall"] if r["arm"] == "closed book" and r["kind"] == "continuations"]
    assert len(set(moved)) == 3


def test_a_saving_pays_back_after_the_uses_that_it_names(both: dict[str, Any]) -> None:
    for mode in both["modes"]:
        saving = mode["saving"]
        spent = mode["paid"]["flops"] + saving["rebuild_flops"]
        assert saving["break_even_uses"] * both["references"] * saving["per_use_flops"] == pytest.approx(spent)
        assert saving["flops"] == pytest.approx(both["uses"] * saving["per_use_flops"])
        assert saving["break_even_text_uses"] < saving["break_even_uses"]


def test_an_adapter_is_a_model_for_every_command(both: dict[str, Any], bank: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bank"
    shutil.copytree(bank, copy)

    def ask(mode: dict[str, Any]) -> Any:
        call = ["ask", "Where is the canal?", "--bank", str(copy), "--model", mode["adapter"], "--max-tokens", "2"]
        return CliRunner().invoke(app, call)

    above, everywhere = both["modes"]
    assert ask(above).exit_code == 0
    assert isinstance(ask(everywhere).exception, BankMismatch)
    done = CliRunner().invoke(app, ["bank", "rebuild", str(copy), "--model", everywhere["adapter"]])
    assert done.exit_code == 0, done.output
    assert ask(everywhere).exit_code == 0
    assert isinstance(ask(above).exception, BankMismatch)


def test_the_table_says_what_the_document_says(bank: Path, model: Path, both: dict[str, Any], tmp_path: Path) -> None:
    call = ["consolidate", "--bank", bank, "--model", model, "--top", "2", "--steps", "2", "--batch", "2", "--out", tmp_path]
    done = CliRunner().invoke(app, list(map(str, call)))
    assert done.exit_code == 0, done.output
    assert "banks stay readable" in done.stdout and "bank rebuild" not in done.stdout
    assert f"{both['unrelated_loss']:.3f} nats a token before" in done.stdout
    assert sum(line.startswith("above ") for line in done.stdout.splitlines()) == len(both["recall"]) / 3


# ---- adapters that cannot be loaded ----


def test_adapters_of_other_kinds_or_models_are_refused(both: dict[str, Any], tmp_path: Path) -> None:
    def changed(**fields: object) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(both["modes"][0]["adapter"], folder)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
        return folder

    with pytest.raises(ModelError, match="expected a LORA"):
        base_of(changed(peft_type="IA3"))
    with pytest.raises(ModelError, match="does not fit"):
        load(changed(base_model_name_or_path=None))  # the model that ships has another shape
    with pytest.raises(ModelError, match="found no model at 'nowhere'"):
        load(changed(base_model_name_or_path="nowhere"))
    folder = changed()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load(folder)
    folder = changed()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        load(folder)
    folder = changed()
    changed_config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**changed_config, "base_model_name_or_path": str(folder)}))
    with pytest.raises(ModelError, match="its own base"):
        base_of(folder)


def test_an_adapter_without_a_named_model_is_of_the_one_that_ships(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    for base in (None, ""):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
        assert base_of(tmp_path) == (base_of()[0], [tmp_path])
