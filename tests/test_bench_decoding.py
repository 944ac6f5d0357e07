"""Every way of decoding answers the same prompts with as many tokens, and reads what the table says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer

import memory3.bench.decoding as decoding
from memory3.bench.decoding import WAYS, Protocol, Scene, bench_decode
from memory3.decoder import Decoder, attach
from memory3.spec import MemorySpec, SpecError

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16, reference_length=32, references_per_chunk=2)
SMALL = Protocol(batch=2, prompt=20, output=18, repeats=2)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


def test_the_report_has_every_way_and_its_ratios_are_those_of_the_medians(decoder: Decoder) -> None:
    told: list[tuple[int, int]] = []
    report = bench_decode(decoder, SMALL, tell=lambda done, total: told.append((done, total)))
    found = report.document()
    assert list(found["tokens_per_s"]) == list(WAYS)
    rate = found["tokens_per_s"]
    assert found["ratios"]["memory_over_none"] == rate["memory"] / rate["none"]
    assert found["ratios"]["memory_over_text_each_refresh"] == rate["memory"] / rate["text-each-refresh"]
    first = found["first_token_s"]
    assert found["ratios"]["first_token_text_once_over_memory"] == first["text-once"] / first["memory"]
    assert told[-1] == (3 * len(WAYS), 3 * len(WAYS))
    assert found["settings"]["recalls"] == 3  # two chunks of the prompt, and the first of two of the answer
    assert len(report.rows) == len(report.bars) == len(WAYS)
    assert all(bar.low <= bar.value <= bar.high for bar in report.bars)


def test_the_cost_of_a_refresh_stands_beside_the_least_it_could_be(decoder: Decoder) -> None:
    found = bench_decode(decoder, SMALL, ("none", "memory", "memory-codec")).document()
    for way in ("memory", "memory-codec"):
        row = found["refresh"][way]
        assert row["bytes"] == found["record_bytes"][way] * 2 * 2
        bound = row["bytes"] / found["peaks"]["copy_bytes_per_s"] + row["flops"] / found["peaks"]["matmul_flops"]
        assert row["bound_s"] == pytest.approx(bound)
        recall = found["ratios"][f"recall_{way.replace('-', '_')}_over_bound"]
        assert recall == pytest.approx(found["refresh"][way]["recall_s"] / found["refresh"][way]["bound_s"])
        ratio = found["ratios"][f"refresh_{way.replace('-', '_')}_over_bound"]
        assert ratio == pytest.approx(row["added_s"] / row["bound_s"])
    assert found["refresh"]["memory-codec"]["bytes"] < found["refresh"]["memory"]["bytes"]


def test_the_work_of_reading_is_that_of_the_design(decoder: Decoder) -> None:
    """2 M * 2 * chunk * mem * d for each reference (section 5)."""
    found = bench_decode(decoder, SMALL, ("none", "memory")).document()
    config = decoder.model.config
    layers, width = len(decoder.spec.layers or ()), config.num_attention_heads * decoder.head_dim
    assert found["refresh"]["memory"]["flops"] == 2 * layers * 2 * 16 * 4 * width * (2 * 2)


def test_recalls_of_a_turn_bring_different_references_and_a_turn_repeats_the_one_before(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[list[str]] = []
    original = decoding.stream

    def noted(decoder: Decoder, prompts: Any, **options: Any) -> Any:
        ids: list[str] = []
        for token in original(decoder, prompts, **options):
            if token.completion is not None:
                assert len(token.completion.ids) == SMALL.output
                ids += [hit.id for _, recalled in token.completion.recalls for hit in recalled.hits]
            yield token
        turns.append(ids)

    monkeypatch.setattr(decoding, "stream", noted)
    bench_decode(decoder, SMALL, ("none", "memory"))
    plain, reading = turns[0::2], turns[1::2]
    assert plain == [[], [], []]
    assert all(len(ids) == len(set(ids)) == 12 for ids in reading)
    assert reading[0] == reading[1] == reading[2]


def seen(decoder: Decoder, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Token ids of every pass of a text way over more than one token."""
    passes: list[list[list[int]]] = []
    original = decoding._Plain.read

    def noted(self: Any, ids: torch.Tensor) -> None:
        passes.append(ids.tolist())
        original(self, ids)

    monkeypatch.setattr(decoding._Plain, "read", noted)
    scene = Scene.of(decoder, SMALL, tmp_path)
    WAYS[way](scene, way)(0)
    texts, prompts = scene.texts.tolist(), scene.prompts.tolist()
    expected = {
        "text-once": [[[*p[:1], *t, *p[1:]] for p, t in zip(prompts, texts[0], strict=True)]],
        "text-each-refresh": [
            [[*p[:1], *t, *p[1:16]] for p, t in zip(prompts, texts[0], strict=True)],
            [[*p[:1], *t, *p[1:]] for p, t in zip(prompts, texts[1], strict=True)],
        ],
        "text-cached": [
            [[*p[:1], *t, *p[1:16]] for p, t in zip(prompts, texts[0], strict=True)],
            [[*t, *p[16:]] for p, t in zip(prompts, texts[1], strict=True)],
        ],
    }[way]
    long = [rows for rows in passes if len(rows[0]) > 1]
    assert long[: len(expected)] == expected
    answered = sum(len(rows[0]) == 1 for rows in passes)
    assert answered == SMALL.output - 1 - (way != "text-once")  # the pass of a refresh gives a token too
    return long[len(expected) :]


def test_text_encoded_once_reads_the_first_references_and_nothing_later(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seen(decoder, "text-once", tmp_path, monkeypatch) == []


def test_text_encoded_again_reads_new_references_and_the_whole_context(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [last] = seen(decoder, "text-each-refresh", tmp_path, monkeypatch)
    assert {len(row) for row in last} == {2 * 32 + 20 + 16}


def test_a_prefix_cache_reads_new_references_alone(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [last] = seen(decoder, "text-cached", tmp_path, monkeypatch)
    assert {len(row) for row in last} == {1 + 2 * 32}  # behind the last token of the answer so far


def test_the_plain_loop_chooses_what_generation_chooses(decoder: Decoder, tmp_path: Path) -> None:
    scene = Scene.of(decoder, SMALL, tmp_path)
    reader = decoding._Plain(scene)
    reader.read(scene.prompts)
    written = reader.write(SMALL.output)
    own = decoder.model.generate(scene.prompts, max_new_tokens=SMALL.output, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert written.tolist() == own[:, scene.prompts.shape[1] :].tolist()


def test_dense_memory_keeps_every_token_of_every_layer(decoder: Decoder, tmp_path: Path) -> None:
    scene = Scene.of(decoder, SMALL, tmp_path)
    WAYS["dense"](scene, "dense")
    config = decoder.model.config
    values = config.num_hidden_layers * config.num_key_value_heads * 32 * 2 * decoder.head_dim
    assert scene.record_bytes["dense"] > 4 * values > scene.record_bytes.get("memory", 0)


def test_the_rate_is_that_of_the_median_turn(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = {"none": (1.0, 4.0, 2.0), "memory": (2.0, 5.0, 8.0)}

    def timed(ways: dict[str, Any], *args: Any) -> dict[str, tuple[float, ...]]:
        for run in ways.values():
            run(0)
            run(1)
        return turns

    monkeypatch.setattr(decoding, "in_turns", timed)
    found = bench_decode(decoder, SMALL, ("none", "memory")).document()
    assert found["tokens_per_s"] == {way: 2 * 18 / median(seconds) for way, seconds in turns.items()}


def test_ways_and_sizes_that_mean_nothing_are_refused(decoder: Decoder) -> None:
    with pytest.raises(SpecError, match="found ways none, sleep"):
        bench_decode(decoder, SMALL, ("none", "sleep"))
    with pytest.raises(SpecError, match="expected none and any others"):
        bench_decode(decoder, SMALL, ("memory",))
    with pytest.raises(SpecError, match="found batch=0"):
        Protocol(batch=0)
    with pytest.raises(SpecError, match="found prompt=1"):
        bench_decode(decoder, Protocol(prompt=1))
