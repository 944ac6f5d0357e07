"""Every stage by its command at toy size: it trains, stops, goes on, and leaves a folder that loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import tiny_model, tiny_tokenizer
from golden_losses import RELATIVE, check_losses
from toy_world import toy_world
from typer.testing import CliRunner

from memory3.cli import app
from memory3.decoder import attach
from memory3.loading import load
from memory3.spec import MemorySpec
from memory3.train import kept
from memory3.train.inputs import Inputs
from memory3.train.loop import run
from memory3.train.recipe import Reader
from memory3.train.recipes import RECIPES, lessons_of, recipe_of
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


def den(world: Path, plain: str = TEXT[:600]) -> Path:
    asked = {"dataset": "own", "split": "train", "question": "When was the den dug?", "answers": ["1812"], "title": "Den"}
    world.mkdir()
    pq.write_table(pa.Table.from_pylist([{**asked, "passage": TEXT[:400]}] * 4), world / "qa.parquet")
    pq.write_table(pa.Table.from_pylist([{"title": "Arven", "text": plain}] * 3), world / "passages.parquet")
    return world


def test_the_reader_in_small_is_trained_on_tables_of_ones_own_and_goes_on(tmp_path: Path) -> None:
    world = den(tmp_path / "world")
    made = trained(tmp_path / "out", "reader", "small", "--data", world, "--steps", "5", "--tokens-per-head", "24")
    decoder = load(made)
    assert decoder.trained
    assert decoder.spec.tokens_per_head == 24
    assert len(decoder.tokenizer) <= 2048
    more = trained(tmp_path / "more", "reader", "more", "--data", world, "--model", made, "--steps", "3", "--seed", "1")
    assert load(more).spec == decoder.spec
    assert changed(made, more)
    text = trained(tmp_path / "text", "reader", "text", "--data", world, "--model", made, "--steps", "3", "--seed", "1")
    assert changed(made, text) and changed(more, text)
    den(tmp_path / "other", TEXT[:500])
    with pytest.raises(TrainError, match="found a tokenizer made of other data"):
        recipe_of("reader", "small")(Inputs((str(tmp_path / "other"),), tmp_path / "out"))
    (tmp_path / "out" / "tokenizer" / kept.MADE_OF).unlink()
    with pytest.raises(TrainError, match="found word vectors made of other data"):
        recipe_of("reader", "small")(Inputs((str(tmp_path / "other"),), tmp_path / "out"))


def test_a_stopped_stage_says_so_and_goes_on(tmp_path: Path, text: Path, model: Path) -> None:
    words = ("train", "warmup", "model", "--data", text, "--model", model, "--length", "64", "--out", tmp_path / "out")
    stopped = command(*words, "--steps", "3", "--minutes", "0")
    assert "run the same command again" in stopped.stdout
    assert not (tmp_path / "out" / "model").exists()
    assert "3 of 3 steps done" in command(*words, "--steps", "3").stdout


# ---- a run is one run ----


@pytest.mark.filterwarnings("ignore:found a model in bfloat16 on a CPU")
@pytest.mark.parametrize(("stage", "recipe"), [("sft", "paper"), ("convert", "lora")])
def test_a_half_precision_model_learns_in_float32_and_is_saved_as_it_was(tmp_path: Path, stage: str, recipe: str) -> None:
    from safetensors.torch import load_file

    start = tmp_path / "half"
    save_model(attach(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer(), SPEC), start, SPEC)
    (tmp_path / "text.txt").write_text(TEXT)
    data = rows(tmp_path / "sft.jsonl", *({"prompt": f"Where is {n}?", "response": f"near {n}"} for n in range(8)))
    given = data if stage == "sft" else tmp_path / "text.txt"
    made = trained(tmp_path / "out", stage, recipe, "--data", given, "--model", start, "--steps", "3", "--batch", "4")
    learned = load_file(tmp_path / "out" / "checkpoint" / "model.safetensors")
    assert {t.dtype for t in learned.values()} == {torch.float32}
    assert load(made).dtype == torch.bfloat16
    if stage == "sft":
        before = dict(load(start).model.named_parameters())
        moved = [float((t != before[name].float()).float().mean()) for name, t in learned.items() if "proj" in name]
        assert min(moved) > 0.95  # at 5e-5 bf16 rounds nine of ten updates away


def test_a_folder_of_another_run_is_refused_and_a_longer_run_goes_on(tmp_path: Path, text: Path, model: Path) -> None:
    out = tmp_path / "out"
    words = {"--data": text, "--model": model, "--length": 64, "--batch": 1, "--steps": 2, "--rate": 1e-3, "--seed": 0}

    def done(stage: str = "warmup", recipe: str = "model", **other: Any) -> str:
        given = words | {f"--{name}": value for name, value in other.items()}
        pairs = [pair for pair in given.items() if pair[1] is not None]
        return str(command("train", stage, recipe, *(w for pair in pairs for w in pair), "--out", out).stdout)

    assert "2 of 2 steps done" in done()
    (tmp_path / "other.txt").write_text(TEXT.replace("1812", "1813"))
    other = tiny_model("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.1)
    save_model(attach(other, tiny_tokenizer(), SPEC), tmp_path / "other", SPEC)
    refused: dict[str, dict[str, Any]] = {
        "stage warmup model": {"stage": "convert", "recipe": "labels", "length": None},
        "data": {"data": tmp_path / "other.txt"},
        "model": {"model": tmp_path / "other"},
        "seed 0": {"seed": 1},
        "batch 1": {"batch": 2},
        "length 64": {"length": 128},
        "rate 0.001": {"rate": 2e-3},
    }
    for fact, other_words in refused.items():
        with pytest.raises(TrainError, match=f"found a checkpoint of .*{fact}.* expected .*: use another --out"):
            done(**other_words)
    moved = text.rename(tmp_path / "moved.txt")
    assert "3 of 3 steps done" in done(steps=3, data=moved, minutes=10)
    with pytest.raises(TrainError, match="found a checkpoint of 3 steps"):
        done(data=moved)


def test_a_run_whose_phases_stretch_with_its_steps_keeps_their_number(tmp_path: Path, text: Path, model: Path) -> None:
    words = ("convert", "labels", "--data", text, "--model", model, "--batch", "2")
    trained(tmp_path / "out", *words, "--steps", "2")
    with pytest.raises(TrainError, match="found a checkpoint of steps 2 .* expected steps 3"):
        trained(tmp_path / "out", *words, "--steps", "3")


def test_a_run_does_not_write_among_its_data(tmp_path: Path, text: Path, model: Path) -> None:
    with pytest.raises(TrainError, match="found --out .* inside --data .*, expected a folder beside it"):
        command("train", "warmup", "model", "--data", tmp_path, "--model", model, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "recipe", "words"),
    [
        ("convert", "lora", ("--bank", "/no/such/bank")),
        ("convert", "full", ("--exclude-own",)),
        ("reader", "small", ("--batch", "8")),
        ("sft", "paper", ("--length", "512")),
        ("warmup", "model", ("--tokens-per-head", "8")),
    ],
)
def test_an_option_that_a_recipe_has_no_use_for_is_refused(
    tmp_path: Path, text: Path, stage: str, recipe: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(TrainError, match=f"found {words[0]} with {stage} {recipe}, expected none"):
        command("train", stage, recipe, "--data", text, "--out", tmp_path / "out", *words)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_epochs_count_examples_whatever_a_step_holds(tmp_path: Path, model: Path, accumulate: int) -> None:
    sft = rows(tmp_path / "sft.jsonl", *({"prompt": f"Where {n}?", "response": f"{n}"} for n in range(8)))
    dpo = rows(tmp_path / "dpo.jsonl", *({"prompt": f"Where {n}?", "chosen": f"{n}", "rejected": "no"} for n in range(8)))
    for stage, data, epochs in (("sft", sft, 3), ("dpo", dpo, 1)):
        inputs = Inputs((str(data),), tmp_path / "out", model=str(model), batch=2, accumulate=accumulate)
        assert recipe_of(stage, None)(inputs).settings.schedule.steps * accumulate * 2 == epochs * 8


def test_tokens_per_head_overrule_those_of_the_model_and_nothing_else(tmp_path: Path) -> None:
    data = rows(tmp_path / "sft.jsonl", {"prompt": "Where?", "response": "here"})
    inputs = Inputs((str(data),), tmp_path / "out", tokens_per_head=5)
    with load() as shipped:
        assert shipped.spec.tokens_per_head != 5
        wanted = replace(shipped.spec, tokens_per_head=5)
    assert recipe_of("sft", None)(inputs).decoder.spec == wanted
    assert recipe_of("sft", None)(replace(inputs, spec=SPEC)).decoder.spec.tokens_per_head == 5


@pytest.mark.parametrize(
    "options", [{"rate": 0.0}, {"rate": -1.0}, {"rate": float("nan")}, {"steps": 0}, {"tokens_per_head": 0}]
)
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match=f"found --{next(iter(options)).replace('_', '-')} .*expected"):
        Inputs(("text",), tmp_path, **options)


def test_a_tokenizer_is_there_whole_or_not_at_all_and_belongs_to_its_data(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs((str(text),), tmp_path / "out", size=2, length=64)

    class Killed(BaseException):
        pass

    class Dying:
        def save_pretrained(self, place: Path) -> None:
            place.mkdir(parents=True)
            (place / "tokenizer.json").write_text('{"half')
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(kept, "trained_tokenizer", lambda texts, vocabulary: Dying())
        with pytest.raises(Killed):
            recipe_of("warmup", "small")(inputs)
    assert recipe_of("warmup", "small")(inputs).decoder.tokens("The red fox")
    text.write_text("αβγδε ζηθικ λμνξο " * 50)
    with pytest.raises(TrainError, match="found a tokenizer made of other data"):
        recipe_of("warmup", "small")(inputs)
    (tmp_path / "out" / "tokenizer" / "tokenizer.json").write_text('{"half')
    (tmp_path / "out" / "tokenizer" / kept.MADE_OF).unlink()
    with pytest.raises(TrainError, match="found a damaged tokenizer"):
        recipe_of("warmup", "small")(inputs)


# ---- data ----


def test_questions_are_found_in_every_kind_of_table_and_only_those_of_the_train_split_are_learned(
    tmp_path: Path, model: Path
) -> None:
    asked = [
        {"question": f"What is {name}?", "answers": name, "passage": f"Here {name} is, and more.", "split": name}
        for name in ("train", "dev")
    ]
    pytest.importorskip("datasets")
    tables = [
        rows(tmp_path / "a.jsonl", *asked),
        rows(tmp_path / "a.JSONL", *asked),
        tmp_path / "a.csv",
        tmp_path / "a.parquet",
    ]
    tables[2].write_text(
        "question,answers,passage,split\n"
        + "".join(f'"{a["question"]}",{a["answers"]},"{a["passage"]}",{a["split"]}\n' for a in asked)
    )
    pq.write_table(pa.Table.from_pylist(asked), tables[3])
    (tmp_path / "folder").mkdir()
    rows(tmp_path / "folder" / "train.jsonl", *asked)
    sources = [*map(str, tables), str(tmp_path / "folder"), f"hub:{tmp_path / 'folder'}"]
    with load(model) as decoder:
        for source in sources:
            found = lessons_of(Inputs((source,), tmp_path / "out"), decoder)
            assert [one.questions for one in found] == [(("What is train?", "train"),)], source


def test_a_hub_dataset_of_texts_starts_a_warmup_and_a_conversion(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    rows(tmp_path / "hub" / "train.jsonl", *({"text": f"{TEXT} {n}"} for n in range(3)))
    inputs = Inputs((f"hub:{tmp_path / 'hub'}",), tmp_path / "out", size=2, length=64)
    assert recipe_of("warmup", "small")(inputs).decoder.tokens("fox")
    with load(model) as decoder:
        assert len(lessons_of(inputs, decoder)) > 3


def test_every_recipe_promises_its_data_and_hardware_and_is_listed() -> None:
    listed = command("train", "--list").stdout
    for stage, recipes in RECIPES.items():
        for name, recipe in recipes.items():
            assert f"{stage} {name}\n" in listed
            promise = recipe.__doc__ or ""
            assert "Data: " in promise and ("Hardware: " in promise or "Hardware and expectations: " in promise), (stage, name)
            measured = ("xpect", "nobody has measured", "Nobody has measured", "docs/results.md has", "docs/tutorial.md has")
            assert any(word in promise for word in measured), (stage, name)


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


@pytest.mark.parametrize(("optimizer", "name"), [("adamw", "reader"), ("muon", "reader-muon")])
def test_ten_steps_of_the_reader_lose_what_they_lost_before(tmp_path: Path, optimizer: str, name: str) -> None:
    """All phases but the last are gone through in ten steps; the tokenizer is one token per byte, so that none has to be made.

    Muon makes its steps orthogonal in bf16, which other CPUs round in another way. With AdamW a CPU with AVX2 alone and one with AVX-512
    differ by 2e-6 at the third step and by 6e-3 at the tenth: long steps from fresh weights let roundings grow.
    """
    toy_world(tmp_path / "world", 24)
    tiny_tokenizer().save_pretrained(tmp_path / "run" / "tokenizer")
    reader = Reader(steps=10, texts_for_meaning=0, optimizer=optimizer)
    decoder, objective, settings, _ = reader.run(tmp_path / "world", tmp_path / "run")
    losses: list[float] = []
    run(decoder, objective, replace(settings, log_every=1, precision="no"), lambda line: losses.append(line["loss"]))
    check_losses(name, losses, relative=2e-2 if optimizer == "muon" else RELATIVE, later=2e-2)
