"""A plan carried out on a bank: every reference gets its form, and nothing is changed where that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeDecoder
from families import tiny_model, tiny_tokenizer
from tiered import TEXTS, WORDS, banked, kept, references
from typer.testing import CliRunner

from memory3.bank import Bank
from memory3.cli import app
from memory3.hierarchy.applying import LEARNED, Applied, Learned, apply
from memory3.hierarchy.planning import Plan, Planned
from memory3.loading import ADAPTER_WEIGHTS, adapter_fingerprint
from memory3.recall import Recall
from memory3.spec import BankError, BankMismatch, SourceError
from memory3.tiers import Settings, Tiers
from memory3.verifying import verify
from memory3.writing import write


def planned(bank: Bank, **tiers: str) -> Plan:
    """Words and the forms of their references."""
    ids = {word: reference.id for word, reference in zip(WORDS, references(), strict=True)}
    rows = tuple(Planned(ids[word], 9, 1.0, tier) for word, tier in tiers.items())
    return Plan(bank.manifest.created, 30.0, "FLOP", rows, 0.0, {})


def adapter_of(folder: Path, bank: Bank, *words: str, layers: str = "above", made: str | None = None) -> Path:
    """The folder of an adapter that says it has learned these."""
    folder.mkdir()
    (folder / ADAPTER_WEIGHTS).write_bytes(b"weights")
    ids = [reference.id for word, reference in zip(WORDS, references(), strict=True) if word in words]
    Learned(made or bank.manifest.created, layers, tuple(ids)).save(folder)
    return folder


def test_every_reference_gets_its_form(tmp_path: Path) -> None:
    bank, decoder = banked(tmp_path / "bank")
    write(decoder, references()[:2], bank)
    assert kept(bank) == {"tower", "salt"}
    adapter = adapter_of(tmp_path / "adapter", bank, "rain", "salt")
    told: list[tuple[int, int | None]] = []
    plan = planned(bank, tower="text", salt="parameters", crows="memory", rain="text")
    done = apply(plan, bank, adapter, lambda done, total: told.append((done, total)))
    assert done == Applied(encoded=1, dropped=1, given=1, waiting=0, freed_bytes=2 * bank.record_bytes)
    assert (kept(bank), told) == ({"crows"}, [(1, 1)])
    assert Tiers(bank).report()["tiers"] == {"text": 2, "memory": 1, "parameters": 1}
    assert bank.known([r.id for r in references()]) == []
    knowing = FakeDecoder()
    knowing.adapters = [adapter_fingerprint(adapter)]
    assert Bank(bank.path, knowing).known(bank.ids()) == [references()[1].id]
    assert verify(bank).problems == []
    again = apply(plan, bank, adapter)
    assert again == Applied(0, 0, 0, 0, 0)


def test_without_an_adapter_what_is_planned_for_parameters_is_memory(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    assert apply(planned(bank, tower="parameters", salt="low-rank"), bank).waiting == 2
    assert kept(bank) == {"tower", "salt"}


def test_what_was_deleted_since_and_what_is_not_planned_is_passed_over(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    plan = planned(bank, tower="memory", salt="memory")
    bank.delete([references()[1].id])
    assert apply(plan, bank).encoded == 1
    assert kept(bank) == {"tower"}


def test_a_plan_that_does_not_fit_under_the_limit_changes_nothing(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    bank.refresh(keep_versions=False)
    room = bank.total_bytes() + bank.table_bytes() + 2 * (2**16 + 64 * len(bank))
    Settings(max_bytes=room + 3 * bank.record_bytes // 2).save(tmp_path)
    with pytest.raises(BankError, match="the plan has 2 more memories of .* expected at most 1 under the limit"):
        apply(planned(bank, tower="memory", salt="memory"), bank)
    assert kept(bank) == set()
    assert apply(planned(bank, tower="memory"), bank).encoded == 1


def test_adapters_that_do_not_fit_are_refused_before_anything_is_changed(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path / "bank", lazy=False)
    plan = planned(bank, tower="text", salt="parameters")
    cases: list[tuple[Path, type[Exception], str]] = [
        (adapter_of(tmp_path / "other", bank, "salt", made="long ago"), BankMismatch, "of a bank made long ago"),
        (adapter_of(tmp_path / "all", bank, "salt", layers="all"), BankMismatch, "when it was rebuilt"),
        (tmp_path / "nothing", SourceError, LEARNED),
    ]
    for folder, kind, reason in cases:
        with pytest.raises(kind, match=reason):
            apply(plan, bank, folder)
        assert kept(bank) == set(WORDS)


def test_a_kill_while_texts_are_encoded_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, decoder = banked(tmp_path)
    monkeypatch.setattr("memory3.hierarchy.applying.AT_ONCE", 1)
    plan = planned(bank, tower="memory", salt="memory", crows="memory")

    def die(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(plan, bank, on_progress=die)
    assert len(kept(bank)) == 1
    fresh = Bank(tmp_path, decoder)
    assert apply(plan, fresh).encoded == 2
    assert sorted(decoder.encoded) == sorted(TEXTS[:3])


def test_another_dtype_is_refused_and_what_saw_its_surroundings_stays(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path / "bank")
    with pytest.raises(BankMismatch, match="--dtype bfloat16"):
        apply(planned(bank, tower="memory"), Bank(bank.path, FakeDecoder(dtype=torch.float32)))
    decoder = FakeDecoder()
    whole = Bank(tmp_path / "whole", decoder, create=True)
    write(decoder, references(), whole, context=True)
    ids = dict(zip(WORDS, (span[0] for span in sorted(whole.spans_of(["notes"]), key=lambda span: span[2])), strict=True))
    rows = tuple(
        Planned(ids[word], 9, 1.0, tier) for word, tier in zip(WORDS, ("text", "text", "parameters", "text"), strict=True)
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / ADAPTER_WEIGHTS).write_bytes(b"weights")
    Learned(whole.manifest.created, "above", (ids["crows"],)).save(adapter)
    done = apply(Plan(whole.manifest.created, 30.0, "FLOP", rows, 0.0, {}), whole, adapter)
    assert (done.dropped, done.given, len(whole.places())) == (1, 0, 3)


def test_a_new_adapter_takes_the_place_of_the_old_one_and_a_plan_takes_back(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path / "bank")
    first, second = adapter_of(tmp_path / "one", bank, "tower"), adapter_of(tmp_path / "two", bank, "tower", "salt")
    (second / ADAPTER_WEIGHTS).write_bytes(b"other weights")
    plan = planned(bank, tower="parameters", salt="parameters")
    assert apply(plan, bank, first).given == 1
    assert apply(plan, bank).given == 0
    assert apply(plan, bank, second).given == 2
    assert set(bank.adapters_of(bank.ids()).values()) == {adapter_fingerprint(second)}
    assert apply(planned(bank, tower="memory", salt="text"), bank).encoded == 1
    assert (kept(bank), bank.adapters_of(bank.ids())) == ({"tower"}, {})


def test_after_a_kill_before_the_space_was_given_back_the_same_call_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, decoder = banked(tmp_path, lazy=False)
    plan = planned(bank, tower="text", salt="text")
    bank.drop([r.id for r in references()[:2]])
    assert apply(plan, Bank(tmp_path, decoder)).freed_bytes == 2 * bank.record_bytes


# ---- the commands ----


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_from_a_lazy_write_to_an_adapter(model: Path, tmp_path: Path) -> None:
    """The whole way of a reference: text, memory by its use, parameters by a plan."""
    notes, bank = tmp_path / "notes.jsonl", tmp_path / "bank"
    texts = [f"{text} It is told again and again by those who came to see it in the year {n}." for n, text in enumerate(TEXTS)]
    notes.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = json.loads(
        run("write", notes, "--bank", bank, "--lazy", "--embedder", "none", "--model", model, "--json").stdout.splitlines()[-1]
    )
    assert (report["references"], report["bytes"]) == (4, 0)
    listed = run("bank", "list", bank).stdout
    assert listed.count("  text  ") == 4
    tower = next(line.split()[0] for line in listed.splitlines() if "tower" in line)
    assert "text: no key-values are kept" in run("bank", "show", bank, tower).stdout

    def ask(with_model: Path) -> Any:
        asked = ("ask", "the tower", "--bank", bank, "--model", with_model, "--max-tokens", "2", "--count", 1, "--json")
        return json.loads(run(*asked).stdout.splitlines()[-1])

    first, second = ask(model), ask(model)
    assert (first["memory"]["encoded"], second["memory"]["encoded"]) == (1, 0)
    assert (first["memory"]["bytes_read"], first["answer"]) == (0, second["answer"])
    assert "text: 3  memory: 1  parameters: 0" in run("bank", "stats", bank).stdout
    assert "2 recalls cost" in run("bank", "tiers", bank).stdout
    uses, plan = tmp_path / "uses", tmp_path / "plan"
    uses.write_text(json.dumps({"id": tower, "uses": 1e12}))
    run("plan", "--bank", bank, "--uses", uses, "--out", plan, "--model", model)
    assert (
        "1 references are planned for parameters and stay memories"
        in run("apply", plan, "--bank", bank, "--model", model).stdout
    )
    other = tmp_path / "other.txt"
    other.write_text(
        "\n\n".join(f"On day {n} nobody knew what the river would bring, and the mat stayed wet." for n in range(9))
    )
    out = ("--out", tmp_path / "out", "--replay", other, "--steps", 1, "--batch", 2)
    run("consolidate", "--bank", bank, "--plan", plan, "--model", model, *out)
    adapter = tmp_path / "out" / "above"
    assert (
        "1 references are in parameters now"
        in run("apply", plan, "--bank", bank, "--adapter", adapter, "--model", model).stdout
    )
    known, read = ask(adapter), ask(model)
    assert (known["recalls"][0]["known"], known["memory"]["references"], known["citations"]) == ([tower], 0, [])
    assert (read["recalls"][0]["known"], read["memory"]["references"]) == ([], 1)
    quiet = CliRunner().invoke(app, ["ask", "the tower", "--bank", str(bank), "--model", str(adapter), "--count", "1"])
    assert "nothing was recalled" not in quiet.output
    shutil.rmtree(tmp_path / "out")


def test_limits_are_set_and_kept_on_the_command_line(model: Path, tmp_path: Path) -> None:
    notes, bank = tmp_path / "notes.jsonl", tmp_path / "bank"
    notes.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    run("write", notes, "--bank", bank, "--embedder", "none", "--model", model)
    prices = ("--price-gb-month", 1e6, "--price-hour", 1, "--tflops", 1)
    assert "4 memories fell back to text" in run("bank", "tiers", bank, *prices).stdout
    assert json.loads(run("bank", "tiers", bank, "--max-bytes", 10**9, "--json").stdout)["max_bytes"] == 10**9
    assert json.loads(run("bank", "tiers", bank, "--max-bytes", 0, "--json").stdout)["max_bytes"] is None
    assert Settings.load(bank).rent > 0
    wrong = CliRunner().invoke(app, ["bank", "tiers", str(bank), "--tflops", "1"])
    assert "found a part of the prices" in str(wrong.exception)


def test_a_bank_whose_texts_fill_it_keeps_no_memory(tmp_path: Path) -> None:
    bank, _ = banked(tmp_path)
    Settings(max_bytes=1).save(tmp_path)
    [found] = Recall(bank, count=1)(["tower"])
    assert (found.encoded, kept(bank)) == (1, set())
