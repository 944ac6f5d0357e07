"""Conversion: teacher and student see the same tokens, adapters become ordinary weights, and a reader learns to read sparse memory.

Tolerance: float32 logits of size about 5, as in tests/test_decoder.py; a divergence of 1e-6 nats is what they leave of zero.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny_model, tiny_tokenizer
from golden_losses import check_losses

from memory3.answering import QUESTION
from memory3.decoder import Decoder, attach
from memory3.loading import load
from memory3.spec import MemorySpec
from memory3.train.convert import (
    Conversion,
    Lora,
    adapters,
    converted,
    divergence,
    frozen_copy,
    label_loss,
    memory_logits,
    recipe,
    text_layout,
    text_logits,
)
from memory3.train.initialise import induction_prior
from memory3.train.loop import Schedule, Settings, TrainError, run
from memory3.train.stages import save_model
from memory3.train.teaching import Batch, Lesson, Lessons, Mixture
from memory3.train.thinning import halvings, thinned

CLOSE = 1e-4
EVERYTHING = MemorySpec(layers=(0, 1, 2, 3), tokens_per_head=None)
SPARSE = MemorySpec(tokens_per_head=4, references_per_chunk=3)
ALONE = Mixture(batch=3, contexts=1, length=24, references=1, wrong=0.0)
POOL = [
    Lesson("Salt melts at 801 degrees.", "Water freezes at 0.", (("When does salt melt?", "801 degrees"),)),
    Lesson(
        "The tower was completed in 1889, and it stands near the river in Paris.",
        "It is made of iron.",
        (("Where is it?", ""),),
    ),
    Lesson("A group of crows is called a murder, a group of owls a parliament, and one of larks an exaltation.", "Few say so."),
    Lesson("The quick brown fox jumps over the lazy dog while nobody looks, and then it goes home to sleep until noon."),
]


def tiny(spec: MemorySpec = SPARSE, name: str = "llama") -> Decoder:
    return attach(tiny_model(name), tiny_tokenizer(), spec)


def settings(folder: Path, steps: int = 3, **others: Any) -> Settings:
    return Settings(folder, Schedule(1e-2, steps, warmup=1), log_every=1, save_every=100, precision="no", **others)


def weights_of(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in decoder.model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# ---- teacher and student ----


def test_with_one_dense_reference_in_all_layers_the_student_is_the_teacher(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, EVERYTHING) as decoder, torch.no_grad():
        batch = Lessons(decoder, POOL, ALONE).batch(0)
        assert len({len(c.ids) for c in batch.contexts}) > 1
        assert len({len(batch.texts(b)[0]) for b in range(len(batch.contexts))}) > 1
        teacher, student = text_logits(decoder, batch), memory_logits(decoder, batch)
        wrong = memory_logits(decoder, batch.misled())
    kl, agreement = divergence(teacher, student, batch)
    assert float(kl) < 1e-6
    assert agreement == 1.0
    assert float(divergence(teacher, wrong, batch)[0]) > 1e-4


def test_sparse_memory_and_several_references_move_the_student_away_from_the_teacher() -> None:
    with tiny() as decoder, torch.no_grad():
        batch = Lessons(decoder, POOL, replace(ALONE, references=3, crowded=1.0)).batch(0)
        assert float(divergence(text_logits(decoder, batch), memory_logits(decoder, batch), batch)[0]) > 1e-3


def test_the_text_stands_where_memory_would_be_and_the_context_never_overlaps_it() -> None:
    with tiny() as decoder:
        one = Batch([POOL[0].reference], Lessons(decoder, POOL, ALONE).batch(0).contexts[:1], [0], [[0]])
        layout, front = text_layout(decoder, one), decoder.prefix_ids + decoder.tokens(POOL[0].reference)
        assert layout.input_ids[0].tolist() == front + one.contexts[0].ids
        start = decoder.context_start
        assert layout.position_ids[0].tolist() == [*range(len(front)), *range(start, start + one.longest)]
        both = Batch([p.reference for p in POOL[2:]], one.contexts, [0], [[0, 1]])
        layout = text_layout(decoder, both)
        assert layout.position_ids[0].tolist() == list(range(layout.input_ids.shape[1]))
        assert tiny_tokenizer().decode(layout.input_ids[0, len(decoder.prefix_ids) : -one.longest]) == "\n\n".join(
            both.references
        )


def test_divergence_is_that_of_the_distributions_over_context_tokens_alone() -> None:
    with tiny() as decoder:
        batch = Lessons(decoder, POOL, ALONE).batch(0)
    teacher, student = torch.randn(2, len(batch.contexts), batch.longest, 7).unbind()
    expected = [
        float((p * (p / q).log()).sum())
        for b, context in enumerate(batch.contexts)
        for p, q in zip(teacher[b].softmax(-1)[: len(context.ids)], student[b].softmax(-1), strict=False)
    ]
    assert float(divergence(teacher, student, batch)[0]) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_labels_are_the_targets_of_contexts_that_have_their_own_reference() -> None:
    with tiny() as decoder:
        batch = Lessons(decoder, POOL, ALONE).batch(0)
    logits = torch.full((len(batch.contexts), batch.longest, VOCABULARY), -20.0)
    for b, context in enumerate(batch.contexts):
        for place in range(context.target_start, len(context.ids)):
            logits[b, place - 1, context.ids[place]] = 20.0
    loss, accuracy = label_loss(logits, batch)
    assert float(loss) < 1e-6
    assert accuracy == 1.0
    assert label_loss(logits, batch.misled()) == (0.0, 0.0)
    assert float(label_loss(logits.roll(1, 1), batch)[0]) > 1.0


# ---- what is taught ----


def test_a_batch_is_a_function_of_seed_and_number_alone() -> None:
    with tiny() as decoder:
        made = Lessons(decoder, POOL, Mixture(batch=2, length=40), seed=1)
        late = made.batch(7)
        assert [made.batch(n) for n in range(8)][7] == late == Lessons(decoder, POOL, Mixture(batch=2, length=40), 1).batch(7)
        assert late != made.batch(8)
        assert late != Lessons(decoder, POOL, Mixture(batch=2, length=40), 2).batch(7)


def test_shares_say_who_reads_own_references_others_or_both() -> None:
    with tiny() as decoder:

        def read(**shares: float) -> list[tuple[int, list[int]]]:
            made = Lessons(decoder, POOL, Mixture(batch=4, length=40, **shares))
            return [pair for n in range(20) for b in [made.batch(n)] for pair in zip(b.about, b.read, strict=True)]

        assert all(row == [own] for own, row in read(wrong=0.0, crowded=0.0))
        crowded = read(wrong=0.0, crowded=1.0)
        assert all(own in row and len(set(row)) == 3 for own, row in crowded)
        assert {row.index(own) for own, row in crowded} == {0, 1, 2}
        assert all(own not in row and len(row) == 3 for own, row in read(wrong=1.0))
        mixed = read(wrong=0.3, crowded=0.5)
        assert {(own in row, len(row)) for own, row in mixed} == {(True, 1), (True, 3), (False, 3)}
        batch = Lessons(decoder, POOL, Mixture(batch=4, length=40, wrong=0.0)).batch(0)
        misled = batch.misled()
        assert [len(row) for row in misled.read] == [len(row) for row in batch.read]
        assert all(own not in row for own, row in zip(misled.about, misled.read, strict=True))


@pytest.mark.parametrize("kind", ["continuation", "completion", "asked"])
def test_contexts_continue_complete_or_ask(kind: str) -> None:
    with tiny() as decoder:
        batch = Lessons(decoder, POOL, Mixture(tasks=((kind, 1.0),), batch=4, length=60)).batch(0)
        decode = tiny_tokenizer().decode
        assert batch.contexts
        for own, context in zip(batch.about, batch.contexts, strict=True):
            lesson = next(lesson for lesson in POOL if lesson.reference == batch.references[own])
            before, target = decode(context.ids[1 : context.target_start]), decode(context.ids[context.target_start :])
            assert context.ids[0] == 1
            if kind == "continuation":
                assert (before, target) == ("", lesson.after)
            elif kind == "completion":
                assert before + target in lesson.reference
                assert before
                assert target
            else:
                question, answer = lesson.questions[0]
                assert before == QUESTION.format(question=question)
                assert target == (f" {answer}</s>" if answer else "")


def test_tokens_are_thinned_by_step_and_the_last_row_stays() -> None:
    thinning = halvings(128, 8, 2000)
    assert thinning == ((250, None), (500, 64), (750, 32), (1000, 16), (2000, 8))
    assert halvings(128, None, 100) == ((50, None), (100, None))
    assert halvings(128, 8, 2) == ((1, None), (2, 8))  # too few steps for all parts
    with tiny() as decoder:
        assert [thinned(decoder, thinning, step).spec.tokens_per_head for step in (0, 250, 999, 1000, 5000)] == [
            None,
            64,
            16,
            8,
            8,
        ]
        objective = Conversion(decoder, POOL, ((1, None), (9, 2)))
        assert [thinned(decoder, objective.thinning, step).spec.tokens_per_head for step in (0, 1, None)] == [None, 2, 2]


# ---- adapters and copies ----


def test_every_family_converts_a_step_and_merged_adapters_are_ordinary_weights(family: str, tmp_path: Path) -> None:
    """Tolerance 1e-4 for logits of size about 5: merging adds the same products in another order."""
    with tiny(name=family) as decoder:
        start = weights_of(decoder)
        batch = Lessons(decoder, POOL, ALONE).batch(5)
        objective = Conversion(decoder, POOL, mixture=ALONE, label_loss=0.5)
        with torch.no_grad():
            before = memory_logits(decoder, batch)
        with adapters(decoder, Lora(rank=4)) as teacher:
            run(decoder, replace(objective, teacher=teacher), settings(tmp_path, 1))
            assert all("lora_" in name for name, p in decoder.model.named_parameters() if p.requires_grad)
            with torch.no_grad():
                adapted = memory_logits(decoder, batch)
        with torch.no_grad():
            merged_logits = memory_logits(decoder, batch)
        assert list(weights_of(decoder)) == list(start)
        assert all(p.requires_grad for p in decoder.model.parameters())
    assert float((adapted - before).abs().max()) > 10 * CLOSE
    assert float((adapted - merged_logits).abs().max()) < CLOSE


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_the_teacher_stays_the_model_as_it_was_while_the_student_learns(lora: Lora | None, tmp_path: Path) -> None:
    with tiny() as decoder:
        batch = Lessons(decoder, POOL, ALONE).batch(0)
        with torch.no_grad():
            original = text_logits(decoder, batch)
        with adapters(decoder, lora) if lora else frozen_copy(decoder) as teacher:
            objective = Conversion(decoder, POOL, mixture=ALONE, teacher=teacher)
            run(decoder, objective, settings(tmp_path))
            assert torch.equal(objective.taught(batch), original)
            with torch.no_grad():
                assert not torch.equal(text_logits(decoder, batch), original)


def test_only_adapters_are_checkpointed_and_a_stopped_conversion_equals_an_unbroken_one(tmp_path: Path) -> None:
    from safetensors import safe_open

    def after(folder: Path, stops: tuple[int | None, ...]) -> dict[str, torch.Tensor]:
        for stop in stops:
            with tiny() as decoder:
                objective = Conversion(decoder, POOL, ((2, None), (4, 4)), ALONE)
                converted(decoder, objective, settings(folder, 4, stop_at=stop), lora=Lora(rank=4, dropout=0.1))
                found = weights_of(decoder)
        return found

    whole, broken = after(tmp_path / "a", (None,)), after(tmp_path / "b", (2, None))
    assert same(whole, broken)
    assert not same(whole, dict(tiny_model("llama").named_parameters()))
    with safe_open(tmp_path / "a" / "checkpoint" / "model.safetensors", "pt") as saved:
        assert all("lora_" in name for name in saved.keys())  # noqa: SIM118 (no mapping)


def test_a_conversion_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    with tiny() as decoder:
        start = weights_of(decoder)

        def killed(line: dict[str, float]) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            converted(decoder, Conversion(decoder, POOL, mixture=ALONE), settings(tmp_path), lora=Lora(rank=4), report=killed)
        assert same(weights_of(decoder), start)
        assert all(p.requires_grad for p in decoder.model.parameters())


def test_a_merged_model_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    with tiny() as decoder:
        before = decoder.identity()["weights"]
        view, _ = converted(decoder, Conversion(decoder, POOL, mixture=ALONE), settings(tmp_path), lora=Lora(rank=4))
        after = view.identity()["weights"]
        assert decoder.identity()["weights"] == after != before


@pytest.mark.parametrize("lora", [None, Lora(rank=4, targets=("q_proj", "v_proj"))], ids=["full", "lora"])
def test_a_converted_model_is_saved_as_ordinary_files_with_its_spec(lora: Lora | None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    decoder = tiny()
    objective = Conversion(decoder, POOL, ((1, None), (2, 3)), ALONE)
    view, done = converted(decoder, objective, settings(tmp_path / "run", 2), lora=lora)
    assert done == 2
    learned = weights_of(view)
    changed = {name.split(".")[-2] for name, p in tiny_model("llama").named_parameters() if not torch.equal(p, learned[name])}
    assert changed == {"q_proj", "v_proj"} if lora else changed > {"q_proj", "v_proj", "down_proj", "embed_tokens"}
    save_model(view, tmp_path / "model", view.spec)
    assert same(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters()), learned)
    with load(tmp_path / "model", device="cpu") as again:
        assert again.trained
        assert again.spec == view.spec
        assert again.spec.tokens_per_head == 3


def test_labels_alone_need_no_teacher_and_gradient_reaches_references(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []
    with tiny() as decoder:
        objective = Conversion(decoder, POOL, mixture=ALONE, label_loss=1.0, distillation=0.0)
        _, done = converted(decoder, objective, settings(tmp_path, 6), held=POOL, report=lines.append)
    assert done == 6
    assert "kl" not in lines[1]
    assert lines[-2]["label"] < lines[1]["label"]
    assert lines[-1]["held_accuracy"] > lines[0]["held_accuracy"]
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "held_accuracy" in line] == [0, 6]


# ---- errors ----


def test_what_cannot_be_converted_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with tiny() as decoder:
        with pytest.raises(TrainError, match="no lesson"):
            Conversion(decoder, []).batch(0)
        with pytest.raises(TrainError, match="no weight on labels or distillation"):
            Conversion(decoder, POOL, distillation=0.0)
        with pytest.raises(TrainError, match=r"found up to 1364 tokens .* expected at most 1013"):
            Conversion(decoder, POOL, mixture=Mixture(references=10))
        with pytest.raises(TrainError, match=r"tasks \[\('riddle', 1\.0\)\]"):
            Mixture(tasks=(("riddle", 1.0),))
        with pytest.raises(TrainError, match=r"wrong=1\.5"):
            Mixture(wrong=1.5)
        with pytest.raises(TrainError, match="allow no context of the kinds asked"):
            Conversion(decoder, POOL[3:], mixture=Mixture(tasks=(("asked", 1.0),))).batch(0)
        objective = Conversion(decoder, POOL, mixture=ALONE)
        with pytest.raises(TrainError, match="no teacher"):
            objective.loss(decoder, objective.batch(0), 0)
        start = weights_of(decoder)
        with pytest.raises(TrainError, match="no layer to adapt"):
            converted(decoder, Conversion(decoder, POOL, mixture=ALONE), settings(tmp_path), lora=Lora(targets=("x_proj",)))
        assert same(weights_of(decoder), start)


# ---- numbers ----


def test_ten_steps_of_a_conversion_give_the_golden_losses(tmp_path: Path) -> None:
    losses: list[float] = []
    with tiny() as decoder:
        mixture = Mixture(batch=2, contexts=2, length=32, references=2)
        objective = Conversion(decoder, POOL, ((4, None), (7, 16), (10, 4)), mixture, label_loss=0.5)
        converted(
            decoder, objective, settings(tmp_path, 10), lora=Lora(rank=4), report=lambda line: losses.append(line["loss"])
        )
    check_losses("convert", losses)


def test_the_recipe_is_a_complete_run(tmp_path: Path) -> None:
    with tiny() as decoder:
        objective, lora, how = recipe(decoder, POOL, tmp_path, steps=40)
        assert objective.thinning == ((4, None), (8, 64), (12, 32), (16, 16), (20, 8), (40, 4))
        assert recipe(decoder, POOL, tmp_path, lora=False)[1] is None
        view, done = converted(decoder, objective, replace(how, stop_at=1, precision="no"), lora=lora)
        assert (done, view.spec.tokens_per_head) == (1, 4)


SIGNS = [chr(n) for n in range(33, 127)]


def nonsense(count: int, seed: int) -> list[Lesson]:
    """Sixteen words of three signs each, no sign twice: what follows a sign can only be read, not known."""
    rng = random.Random(seed)
    drawn = [rng.sample(SIGNS, 48) for _ in range(count)]
    return [Lesson(" ".join("".join(signs[n : n + 3]) for n in range(0, 48, 3))) for signs in drawn]


class FromText(Conversion):
    """Plain language modelling on the targets, the references as text: what a model that reads its prompt has learned."""

    def loss(self, decoder: Decoder, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        loss, accuracy = label_loss(text_logits(decoder, batch), batch)
        return loss, {"accuracy": accuracy}


def reader() -> Decoder:
    """A Llama of two layers and a quarter of a million parameters that can copy (memory3.train.initialise)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    like = {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = LlamaConfig(vocab_size=VOCABULARY, **shape, **special, **like, max_position_embeddings=512)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    induction_prior(model, 1, torch.nn.functional.normalize(torch.randn(VOCABULARY, 128), dim=-1))
    return attach(model, tiny_tokenizer(), MemorySpec((0, 1), tokens_per_head=16, reference_length=64, references_per_chunk=2))


def test_conversion_teaches_a_reader_of_text_to_read_sparse_memory(tmp_path: Path) -> None:
    """Held-out references, a quarter of their tokens kept per head, one distractor for every second context.

    Measured: divergence 1.81 to 1.51 nats, accuracy 0.365 to 0.429, with wrong memories 2.48 and 0.225 afterwards. The bounds
    leave half of each effect to other CPUs.
    """
    lines: list[dict[str, float]] = []
    mixture = Mixture(tasks=(("completion", 1.0),), batch=8, length=32, references=2, crowded=0.5, wrong=0.0)
    fast = {"log_every": 1000, "save_every": 1000, "precision": "no", "weight_decay": 0.0}
    with reader() as decoder:
        text = FromText(decoder, nonsense(400, 0), mixture=mixture, label_loss=1.0)
        run(decoder, text, Settings(tmp_path / "reader", Schedule(3e-3, 50, 20, 15), **fast))
        objective = Conversion(decoder, nonsense(400, 0), mixture=mixture)
        how = Settings(tmp_path / "convert", Schedule(3e-3, 40, 5, 13), **fast)
        converted(decoder, objective, how, lora=Lora(), held=nonsense(60, 1), report=lines.append)
    before, after = lines[0], lines[-1]
    assert after["held_kl"] < 0.92 * before["held_kl"]
    assert after["held_accuracy"] > before["held_accuracy"] + 0.03
    assert after["held_kl"] < after["wrong_kl"] - 0.5
    assert after["held_accuracy"] > after["wrong_accuracy"] + 0.1
