"""An option of a measurement is followed or refused, and what it ends with is checked before it begins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import tiny_model, tiny_tokenizer
from toy_world import toy_world
from typer.testing import CliRunner

from memory3.cli import app
from memory3.decoder import attach
from memory3.evaluate import ablations, reading, retraining
from memory3.evaluate.ablations import HONOURED, Inputs, check_options
from memory3.evaluate.beginning import Plan, beginning_study
from memory3.evaluate.outcomes import Outcome
from memory3.evaluate.reading import Case, Score, measure, score_of
from memory3.evaluate.retraining import Training, Variant, trained
from memory3.recall import EVALUATION_OVERLAP
from memory3.spec import Memory3Error, MemorySpec, SourceError
from memory3.train.recipe import Reader
from memory3.train.settings import TrainError


class Reached(Exception):
    """So far the command came, and no farther."""


def reached(*words: Any, **options: Any) -> Any:
    raise Reached(options)


def run(*words: str | Path) -> str:
    return CliRunner().invoke(app, ["eval", *map(str, words)], catch_exceptions=False).stdout


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads one has passed every check."""
    monkeypatch.setattr("memory3.loading.load", reached)


# ---- options ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["warmup", "--device", "cpu"], "found --device for ablation warmup, expected none: it trains models of its own"),
        (["warmup", "--tokens-per-head", "4"], "found --tokens-per-head for ablation warmup"),
        (["layers", "--dtype", "float32"], "found --dtype for ablation layers"),
        (["layers", "--text-field", "body"], "found --text-field for ablation layers"),
        (["tokens", "--steps", "3", "--model", "m"], "found --model for ablation tokens with --steps"),
        (["tokens", "--minutes", "3"], "found --minutes for ablation tokens, expected none: it asks a finished model"),
        (["selection", "--tokens-per-head", "4"], "found --tokens-per-head for ablation selection, "),
        (["references", "--steps", "3"], "found --steps for ablation references, .* follows --limit, --model, --device"),
        (["references", "--bank", "b"], "found --bank for ablation references"),
        (["chunk", "--size", "3"], "found --size for ablation chunk"),
    ],
)
def test_an_ablation_refuses_what_it_cannot_follow(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        run("ablation", *words, "--data", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ablation_takes_every_option_that_it_says_it_follows() -> None:
    for name, options in HONOURED.items():
        given = dict.fromkeys(options, 1) | ({"steps": 3} if "steps" in name else {})
        check_options(name.split()[0], replace(Inputs(("data",)), **given))
    assert {name.split()[0] for name in HONOURED} == set(ablations.ABLATIONS)


def test_a_finished_model_is_loaded_where_and_as_it_is_said(tmp_path: Path) -> None:
    for name in ("tokens", "selection", "references"):
        with pytest.raises(Reached, match="'device': 'cpu', 'dtype': 'bfloat16'"):
            run("ablation", name, "--data", tmp_path, "--device", "cpu", "--dtype", "bfloat16")


def test_the_limit_of_warmup_is_that_of_its_held_out_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(ablations, "beginning_study", lambda sources, folder, plan, **options: plans.append(plan) or reached())
    for more in (["--limit", "7", "--size", "2"], []):
        with pytest.raises(Reached):
            run("ablation", "warmup", "--data", tmp_path, "--out", tmp_path / "out", *more)
    assert [(p.held, p.depth) for p in plans] == [(7, 2), (Plan.held, Plan.depth)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qa", "--gold", "--retriever", "dense"], "found both --gold and --retriever"),
        (["lm", "--dataset", "squad"], "found --dataset for lm"),
        (["factor", "--length", "99"], "found --length for factor"),
    ],
)
def test_a_benchmark_refuses_what_it_cannot_follow(words: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        run(*words, "--data", "data.jsonl")


@pytest.mark.parametrize("command", ["use", "utility"])
def test_the_overlap_filter_is_on_until_it_is_switched_off(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory3.cli.evaluate.decoder_of", lambda *words: nullcontext(SimpleNamespace(name="toy")))
    monkeypatch.setattr("memory3.cli.evaluate.recall_of", reached)
    for more, expected in (([], EVALUATION_OVERLAP), (["--no-overlap-filter"], None)):
        with pytest.raises(Reached) as found:
            run(command, tmp_path / "asked.jsonl", *more)
        assert found.value.args[0]["max_overlap"] == expected


# ---- what a measurement ends with ----


@pytest.mark.parametrize(
    "words", [["reading"], ["slots"], ["selections"], ["context"], ["retrieval"], ["qa", "--gold"], ["lm"], ["halueval"]]
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_measuring(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to(out: Path) -> None:
        run(*words, "--data", tmp_path, "--out", out)

    with pytest.raises(Memory3Error, match=r"found a picture named a\.foo, expected one that ends in .*\.png"):
        to(tmp_path / "a.foo")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="file cannot be made"):
        to(tmp_path / "file" / "a.png")
    with pytest.raises(Reached):
        to(tmp_path / "new" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Memory3Error, match="found no matplotlib"):
        to(tmp_path / "a.png")


@pytest.mark.parametrize("words", [["heads", "--out"], ["masking", "--out"], ["utility", "--out"], ["utility", "--drop"]])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(words: list[str], tmp_path: Path) -> None:
    command, option = words
    asked = ["a.jsonl"] if command == "utility" else ["--data", str(tmp_path)]
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="file cannot be made .*: give another file"):
        run(command, *asked, option, tmp_path / "file" / "a.json")
    with pytest.raises(SourceError, match="cannot be written"):
        run(command, *asked, option, tmp_path)
    with pytest.raises(Reached):
        run(command, *asked, option, tmp_path / "new" / "a.json")
    assert (tmp_path / "new").is_dir()


def test_the_folder_of_an_ablation_is_made_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be made .* with --out"):
        run("ablation", "references", "--data", tmp_path, "--out", tmp_path / "file" / "out")


def test_a_table_is_printed_before_its_picture_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong there, hours of measuring are not lost."""
    found = [Outcome("sparse memory", 5.0, {"accuracy": (1.0, 0.0)}), Outcome("closed book", 0.0, {"accuracy": (0.0, 0.0)})]
    monkeypatch.setattr("memory3.cli.evaluate.decoder_of", lambda *words: nullcontext(SimpleNamespace(name="toy")))
    monkeypatch.setattr("memory3.evaluate.qa.measure_arms", lambda *words: found)
    monkeypatch.setattr("memory3.evaluate.picture.draw_arms", reached)
    done = CliRunner().invoke(app, ["eval", "qa", "--gold", "--data", "a.jsonl", "--out", "a.png"])
    assert isinstance(done.exception, Reached)
    assert "| closed book | 2 |" in done.stdout


@pytest.mark.parametrize("what", ["reading", "selections", "context", "slots"])
def test_every_table_of_reading_is_printed_and_drawn(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = [Score("one", (1.0, 0.0), (1.0, 0.5)), Score("two", (0.0, 0.0), (0.5, 0.5))]
    made: Callable[..., Any] = lambda *words: scores  # noqa: E731
    for name in ("formats", "selections", "contexts"):
        monkeypatch.setattr(reading, name, made)
    monkeypatch.setattr(reading, "curve", lambda *words: [(8, scores[0]), (None, scores[1])])
    monkeypatch.setattr(reading, "dev_cases", lambda *words, **options: [])
    decoder: Any = SimpleNamespace(spec=SimpleNamespace(reference_length=64, pairs=4, chunk_length=64))
    assert measure(decoder, tmp_path, what, 2, tmp_path / "a.png", 0, lambda done, total: None) == scores
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OSError, match="Is a directory|Permission"):
        measure(decoder, tmp_path, what, 2, tmp_path / "b.png", 0, lambda done, total: None)
    assert capsys.readouterr().out.count("| two | 2 |") == 2


# ---- what is compared ----


def test_text_beyond_the_models_window_is_refused_before_any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a model cannot be compared with its memories, which take no positions."""
    monkeypatch.setattr(reading, "complete", reached)
    case = Case("", "When?", ("1900",), "gold", tuple(f"The tower number {n} was built long ago." for n in range(40)))
    with attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(tokens_per_head=4)) as decoder:
        with pytest.raises(SourceError, match=r"found a prompt of 1\d{3} tokens .* expected at most 989 .*: give fewer"):
            score_of("text", decoder, [case], lambda c: c.others, as_text=True)
        with pytest.raises(Reached):
            score_of("text", decoder, [case], lambda c: c.others[:20], as_text=True)


def test_a_folder_of_readers_of_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by another ablation, which would take their tokenizer for its own."""
    monkeypatch.setattr(retraining, "finished", lambda *words: 1)
    for name, count in (("a", 24), ("b", 20), ("again", 24)):
        toy_world(tmp_path / name, count)
    variant = Variant("one", Reader(steps=1, layers=(1, 2), tokens_per_head=8, vocabulary=320, texts_for_meaning=0))
    trained(variant, Training(tmp_path / "a", tmp_path / "out"))
    trained(variant, Training(tmp_path / "again", tmp_path / "out"))
    with pytest.raises(TrainError, match="made of other data .* another --out"):
        trained(variant, Training(tmp_path / "b", tmp_path / "out"))
    with pytest.raises(TrainError, match="made of other data .* another --out"):
        beginning_study([str(tmp_path / "a" / "passages.parquet")], tmp_path / "out", Plan(depth=2, vocabulary=300, held=2))
    other = replace(variant, reader=replace(variant.reader, optimizer="muon"))
    assert other.folder(0) != variant.folder(0)
