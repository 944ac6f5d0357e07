"""Each step of a recall is timed on the same references as the raw read beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from families import tiny_model, tiny_tokenizer

import memory3.bench.recalls as recalls
from memory3.bench.recalls import STEPS, Plan, RandomVectors, Steps, bench_recall
from memory3.decoder import Decoder, attach
from memory3.spec import MemorySpec, SpecError

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16, reference_length=32, references_per_chunk=2)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


def test_every_bank_is_recalled_from_warm_and_cold(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    raw: list[int] = []
    dropped: list[str] = []
    original, drop = recalls.read_raw, recalls.drop_page_cache

    def noted(places: object, size: int) -> int:
        raw.append(original(places, size))  # type: ignore[arg-type]
        return raw[-1]

    def forgotten(folder: object) -> None:
        dropped.append(str(folder))
        drop(folder)  # type: ignore[arg-type]

    monkeypatch.setattr(recalls, "read_raw", noted)
    monkeypatch.setattr(recalls, "drop_page_cache", forgotten)
    plan = Plan((6, 9), ("raw", "int8"), batch=2, repeats=2)
    told: list[tuple[int, int]] = []
    report = bench_recall(decoder, plan, lambda done, total: told.append((done, total)))
    found = report.document()["recalls"]
    assert [(one["references"], one["codec"], one["cold"]) for one in found] == [
        (count, codec, cold) for count in (6, 9) for codec in ("raw", "int8") for cold in (False, True)
    ]
    assert all(len(one["seconds"][step]) == 2 for one in found for step in STEPS)
    assert raw == [4 * one["record_bytes"] for one in found for _ in range(3)]
    assert len(dropped) == 4 * 3 * 2  # before each load and each raw read of the four cold rows
    assert told[-1][0] <= told[-1][1] == 400
    assert set(report.ratios) == {
        f"load_over_raw_{c}_{w}_{n}" for n in (6, 9) for c in ("raw", "int8") for w in ("warm", "cold")
    } | {"recall_at_9_over_6"}


def test_banks_that_stay_are_found_again(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan((6,), ("raw",), batch=2, repeats=1, cold=False, banks=tmp_path / "banks")
    report = bench_recall(decoder, plan)
    assert report.document()["settings"]["banks"] == str(tmp_path / "banks")
    [kept] = (tmp_path / "banks").iterdir()
    made = {path: path.stat().st_mtime_ns for path in kept.rglob("*.kv")}
    monkeypatch.setattr(recalls.Bank, "add", None)  # nothing is made again
    [again] = bench_recall(decoder, replace(plan, repeats=2)).document()["recalls"]
    assert len(again["seconds"]["load"]) == 2
    assert made == {path: path.stat().st_mtime_ns for path in kept.rglob("*.kv")}


def test_a_whole_recall_is_the_sum_of_its_steps_without_the_control() -> None:
    seconds = {step: [float(n + 1)] * 3 for n, step in enumerate(STEPS)}
    steps = Steps(10, "raw", False, 100, 4, seconds)
    assert steps.whole == 1 + 2 + 3 + 4
    assert steps.rate("raw") == 400 / 5
    assert steps.percentile("load", 95) == 3


def test_random_vectors_are_unit_vectors_that_depend_on_the_text_alone() -> None:
    first, second = RandomVectors().embed(["a", "b"])
    assert first @ first == pytest.approx(1, abs=1e-5)
    assert abs(first @ second) < 0.3
    assert (RandomVectors().embed(["a"], query=True)[0] == first).all()


def test_plans_that_mean_nothing_are_refused() -> None:
    with pytest.raises(SpecError, match="found repeats=0"):
        Plan(repeats=0)
    with pytest.raises(SpecError, match="expected some of each"):
        Plan(references=())
