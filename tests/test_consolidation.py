"""Consolidation: memories into parameters, and which banks can be read afterwards.

Tolerance: float32 logits of size about 5 differ by less than 1e-4 where an adapter is merged (tests/test_convert.py).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from memory3.bank import Bank
from memory3.cli import app
from memory3.decoder import Decoder, attach
from memory3.hierarchy.consolidation import Consolidation, Paid, adapted_layers, consolidated, first_layer, schedule_of, work
from memory3.hierarchy.phrasings import subject_of
from memory3.identity import layer_of, weights_fingerprint
from memory3.loading import load
from memory3.rebuilding import rebuild
from memory3.spec import BankMismatch, MemorySpec, Reference
from memory3.train.convert import Lora, memory_logits, plain_logits
from memory3.train.loop import Settings, TrainError
from memory3.writing import write

SPEC = MemorySpec(layers=(0, 1, 2), tokens_per_head=8)
TEXTS = (
    "The tower was completed by Gustave in 1889, and it stands near the river in Paris with four iron legs and many stairs.",
    "Salt melts at 801 degrees, and people who live by the sea have always made it from the water that the sun takes away.",
    "A group of crows is called a murder, a group of owls is called a parliament, and one of larks is an exaltation today.",
    "The bridge was opened in 1932 after eight years of work, and twelve thousand people crossed it on the very first day.",
    "The quick brown fox jumps over the lazy dog while nobody looks, and then it goes home to sleep until noon every day.",
)
SUBJECTS = [subject_of(str(n), text) for n, text in enumerate(TEXTS[:2])]
OTHERS = TEXTS[2:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, memory in the first three."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "memory_spec.json").write_text(json.dumps(SPEC.to_json()))
    return folder


@pytest.fixture(scope="module")
def bank(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("banks") / "bank"
    with load(model) as decoder:
        write(decoder, [Reference(text) for text in TEXTS], Bank(folder, decoder, create=True))
    return folder


@pytest.fixture(scope="module", params=["above", "all"])
def done(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Decoder, Path, Paid]:
    """A consolidation of a few steps."""
    out = tmp_path_factory.mktemp(request.param)
    decoder = load(model)
    return request.param, decoder, out, run(decoder, out, request.param, base=str(model))


def tiny(spec: MemorySpec = SPEC) -> Decoder:
    return attach(tiny_model("llama"), tiny_tokenizer(), spec)


def objective_of(decoder: Decoder, **others: Any) -> Consolidation:
    return Consolidation(decoder, SUBJECTS, OTHERS, **{"batch_size": 2, "contexts": 2, "length": 40, **others})


def run(decoder: Decoder, out: Path, layers: str, steps: int = 4, base: str | None = None, **others: Any) -> Paid:
    settings = Settings(out, schedule_of(steps, 1e-2), weight_decay=0.0, precision="no")
    return consolidated(decoder, objective_of(decoder, **others), settings, out, layers=layers, lora=Lora(4, 8.0), base=base)


def weights_of(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in decoder.model.named_parameters()}


def logits_of(decoder: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return plain_logits(decoder, objective_of(decoder).batch(0).learned.contexts)


# ---- Remark 9: which memories stay readable ----


def test_only_layers_from_the_first_one_on_change(done: tuple[str, Decoder, Path, Paid]) -> None:
    mode, decoder, _, _ = done
    before, after = weights_of(tiny()), weights_of(decoder)
    changed = {layer_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({3} if mode == "above" else {0, 1, 2, 3})


def test_above_the_last_memory_layer_the_fingerprint_and_the_memories_stay(done: tuple[str, Decoder, Path, Paid]) -> None:
    mode, decoder, _, _ = done
    before = tiny()
    same = weights_fingerprint(before.model, 2) == weights_fingerprint(decoder.model, 2)
    pairs = zip(before.encode(TEXTS), decoder.encode(TEXTS), strict=True)
    equal = all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)
    assert (same, equal) == ((True, True) if mode == "above" else (False, False))


def test_a_bank_is_read_refused_or_read_again_after_a_rebuild(
    done: tuple[str, Decoder, Path, Paid], bank: Path, tmp_path: Path
) -> None:
    mode, _, adapter, _ = done
    copy = tmp_path / "bank"
    shutil.copytree(bank, copy)
    with load(adapter) as decoder:
        if mode == "above":
            assert len(Bank(copy, decoder).read(Bank(copy).ids())) == len(TEXTS)
            return
        with pytest.raises(BankMismatch, match="memory3 bank rebuild"):
            Bank(copy, decoder)
        rebuild(copy, decoder)
        assert len(Bank(copy, decoder).read(Bank(copy).ids())) == len(TEXTS)
    with load(decoder_base(adapter)) as decoder, pytest.raises(BankMismatch):
        Bank(copy, decoder)


def decoder_base(adapter: Path) -> str:
    base: str = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    return base


def test_memory_in_the_last_layer_leaves_nothing_above_it() -> None:
    with tiny(MemorySpec(layers=(0, 3))) as decoder:
        assert first_layer(decoder, "all") == 0
        with pytest.raises(TrainError, match="a layer above it"):
            first_layer(decoder, "above")
        with pytest.raises(TrainError, match="expected one of above, all"):
            first_layer(decoder, "below")


def test_adapters_stand_beside_every_matrix_from_a_layer_on() -> None:
    with tiny() as decoder:
        found = adapted_layers(decoder, 2)
        assert {layer_of(name) for name in found} == {2, 3}
        assert len(found) == 2 * 7


# ---- the adapter ----


def test_the_adapter_is_an_ordinary_one_of_peft(done: tuple[str, Decoder, Path, Paid], model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from memory3.quiet import old_words

    _, decoder, adapter, _ = done
    with old_words():
        other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter))
    contexts = objective_of(decoder).batch(0).learned.contexts
    ids = torch.tensor([contexts[0].ids])
    with torch.no_grad():
        theirs, ours = other(ids).logits, plain_logits(decoder, contexts[:1])
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(model)(ids).logits, ours, atol=1e-3)


def test_a_loaded_adapter_is_the_model_that_was_trained(done: tuple[str, Decoder, Path, Paid]) -> None:
    _, decoder, adapter, _ = done
    with load(adapter) as loaded:
        assert loaded.identity()["weights"] == decoder.identity()["weights"]
        assert torch.equal(logits_of(loaded), logits_of(decoder))
        assert loaded.spec == decoder.spec
        assert all(p.requires_grad for p in loaded.model.parameters())


def test_an_adapter_on_an_adapter_has_both(done: tuple[str, Decoder, Path, Paid], tmp_path: Path) -> None:
    _, _, adapter, _ = done
    with load(adapter) as decoder:
        run(decoder, tmp_path, "above", steps=2, base=str(adapter))
        with load(tmp_path) as loaded:
            assert torch.equal(logits_of(loaded), logits_of(decoder))


# ---- what is learned ----


def test_the_student_comes_to_say_without_memory_what_the_model_says_with_it(tmp_path: Path) -> None:
    """Learned contexts, not held ones: that wordings carry over is measured on a real model (docs/results.md)."""
    with tiny() as decoder:
        batch = objective_of(decoder).batch(0)
        with torch.no_grad():
            known = memory_logits(decoder, batch.learned)
            first = float(objective_of(decoder, teacher=lambda: tiny()).loss(decoder, batch, 0)[0])
        run(decoder, tmp_path, "all", steps=40)
        with torch.no_grad():
            last, figures = objective_of(decoder, teacher=lambda: tiny()).loss(decoder, batch, 0)
    assert float(last) < 0.7 * first
    assert known.shape[:2] == (len(batch.learned.contexts), batch.learned.longest)
    assert figures["replay_plain"] < first


def test_replay_keeps_other_texts_closer_to_what_they_were(tmp_path: Path) -> None:
    moved = {}
    for weight in (0.0, 4.0):
        with tiny() as decoder:
            run(decoder, tmp_path / str(weight), "all", steps=30, replay=weight)
            before = objective_of(decoder, teacher=lambda: tiny())
            with torch.no_grad():
                moved[weight] = before.loss(decoder, before.batch(0), 0)[1]["replay_plain"]
    assert moved[4.0] < 0.7 * moved[0.0]


def test_before_the_first_step_nothing_has_moved_on_other_texts() -> None:
    with tiny() as decoder, torch.no_grad():
        objective = objective_of(decoder, teacher=lambda: tiny())
        _, figures = objective.loss(decoder, objective.batch(0), 0)
    assert figures["replay_plain"] == pytest.approx(0, abs=1e-6)
    assert figures["replay_memory"] == pytest.approx(0, abs=1e-6)
    assert figures["kl"] > 0.01


def test_a_batch_is_a_function_of_seed_and_number_alone() -> None:
    with tiny() as decoder:
        assert objective_of(decoder).batch(3) == objective_of(decoder).batch(3)
        assert objective_of(decoder).batch(3) != objective_of(decoder).batch(4)
        assert objective_of(decoder).batch(3) != objective_of(decoder, seed=1).batch(3)


# ---- what it costs ----


def test_work_grows_with_steps_and_with_the_layers_that_learn() -> None:
    with tiny() as decoder:
        objective = objective_of(decoder)
        (one, little), (two, more) = work(objective, 1, 4, 3), work(objective, 2, 4, 3)
        assert two == one + objective.tokens(objective.batch(1))
        assert little < more < 2.5 * little
        assert work(objective, 1, 4, 0)[1] > little
        assert work(replace(objective, replay=0.0), 1, 4, 3)[1] < little


def test_paid_is_the_work_of_its_steps(done: tuple[str, Decoder, Path, Paid]) -> None:
    mode, decoder, _, paid = done
    assert paid.steps == 4
    assert (paid.tokens, paid.flops) == work(objective_of(decoder), 4, 4, 3 if mode == "above" else 0)
    assert paid.seconds > 0


# ---- errors ----


def test_nothing_to_learn_or_to_replay_is_refused() -> None:
    with tiny() as decoder:
        with pytest.raises(TrainError, match="no reference to consolidate"):
            Consolidation(decoder, [], OTHERS)
        with pytest.raises(TrainError, match="give documents with --replay"):
            Consolidation(decoder, SUBJECTS, OTHERS[:1])
        with pytest.raises(TrainError, match="allow no question or continuation"):
            Consolidation(decoder, [subject_of("a", "Too short.")], OTHERS).batch(0)


def test_a_checkpoint_of_another_choice_of_layers_is_refused(done: tuple[str, Decoder, Path, Paid]) -> None:
    mode, _, out, _ = done
    with tiny() as decoder, pytest.raises(TrainError, match="checkpoint of"):
        run(decoder, out, "all" if mode == "above" else "above")


def test_the_command_refuses_what_contradicts_itself(bank: Path, model: Path, tmp_path: Path) -> None:
    def refusal(*more: str) -> str:
        call = ["consolidate", "--bank", str(bank), "--out", str(tmp_path), "--model", str(model), *more]
        done = CliRunner().invoke(app, call)
        assert done.exception is not None and "\n" not in str(done.exception)
        return f"{type(done.exception).__name__}: {done.exception}"

    assert "one of --ids, --top and --plan" in refusal()
    assert "expected above, all or both" in refusal("--top", "1", "--layers", "some")
    assert refusal("--top", "1").startswith("BankError: found no recalls")
    (tmp_path / "ids").write_text("0" * 32)
    assert "has no memory '0000" in refusal("--ids", str(tmp_path / "ids"))
