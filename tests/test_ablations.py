"""An ablation varies what it says and nothing else, has its control in its table, and goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from toy_world import toy_world

from memory3.answering import question_prompt
from memory3.bank import Bank
from memory3.decoder import Decoder, attach
from memory3.documents import documents
from memory3.evaluate import retraining, variations
from memory3.evaluate.ablations import ABLATIONS, Inputs, cases_of, measure_ablation
from memory3.evaluate.arms import CLOSED, SPARSE, WRONG
from memory3.evaluate.beginning import Begun, Plan, beginning_study, fresh, held_losses, losses_table, of_others, parted
from memory3.evaluate.reading import Case, score_of
from memory3.evaluate.retraining import Training, Variant, layer_variants, retrained_study, selection_variants, trained
from memory3.evaluate.variations import answered, chunk_study, gold_and, references_study, tokens_study, with_others
from memory3.generation import complete
from memory3.selection import SELECTIONS
from memory3.spec import MemorySpec, Reference, SourceError
from memory3.train.recipe import Reader
from memory3.train.sequences import Continual, Retrieved, Warmup
from memory3.train.settings import Settings, TrainError
from memory3.writing import write

SPEC = MemorySpec(tokens_per_head=4, reference_length=64, chunk_length=64, references_per_chunk=2)
PLAN = Plan(
    steps=4, begins=(2, 0), depth=2, vocabulary=300, length=48, batch=2, held=6, points=2, spec=replace(SPEC, chunk_length=16)
)
PNG = b"\x89PNG\r\n"


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    toy_world(folder, 36)
    return folder


def cases(decoder: Decoder, data: Path, limit: int = 24) -> list[Case]:
    found = cases_of(decoder, Inputs((str(data),), limit=limit))
    assert len(found) == limit
    return found


# ---- a finished model ----


Asked = list[tuple[str, int | None, list[list[str]]]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Name, kept tokens and given references of everything that is asked."""
    seen: Asked = []

    def noted(name: str, decoder: Decoder, cases: Sequence[Case], given: Any, **options: Any) -> Any:
        seen.append((name, decoder.spec.tokens_per_head, [list(given(c)) if given else [] for c in cases]))
        return score_of(name, decoder, cases, given, **options)

    monkeypatch.setattr(variations, "score_of", noted)
    return seen


def test_each_number_of_tokens_is_asked_with_the_same_references(decoder: Decoder, data: Path, asked: Asked) -> None:
    some = cases(decoder, data, 8)
    study = tokens_study(decoder, some, (1, 64, 128))
    assert [o.arm for o in study.outcomes] == ["1 token per head", "64 tokens per head", CLOSED, WRONG]
    mixed = [list(gold_and(4)(c)) for c in some]
    assert asked == [
        ("1 token per head", 1, mixed),
        ("64 tokens per head", 64, mixed),
        (CLOSED, 4, [[]] * 8),
        (WRONG, 4, [list(c.others) for c in some]),
    ]
    assert all(c.gold in given and set(c.others) < set(given) for c, given in zip(some, mixed, strict=True))
    assert [o.references for o in study.outcomes] == [5, 5, 0, 4]


def test_what_is_answered_is_scored(decoder: Decoder, data: Path) -> None:
    [case] = cases(decoder, data, 1)
    prompt = question_prompt(decoder, case.question)
    [said] = complete(decoder, [prompt], max_new_tokens=24)
    right = replace(case, answers=(said.text.strip().split("\n")[0],))
    outcome = answered("", decoder, [right, case], None)
    assert outcome.values["exact match"] == (1.0, 0.0)


def test_a_smaller_set_of_references_is_part_of_every_larger_one_and_holds_gold_once(decoder: Decoder, data: Path) -> None:
    crowded = with_others(cases(decoder, data), 12)
    for case in crowded:
        sets = [set(gold_and(n - 1)(case)) for n in (1, 5, 13)]
        assert [len(s) for s in sets] == [1, 5, 13]
        assert sets[0] < sets[1] < sets[2]
        assert sets[0] == {case.gold}
        assert list(gold_and(12)(case)).count(case.gold) == 1
        assert not any(case.answers[0] in other for other in case.others)
    assert crowded == with_others(cases(decoder, data), 12) != with_others(cases(decoder, data), 12, seed=1)


def test_no_other_reference_holds_an_accepted_answer(decoder: Decoder, data: Path) -> None:
    first, second, *rest = cases(decoder, data)
    shared = replace(first, answers=(*first.answers, second.answers[0]))
    [case, *_] = with_others([shared, second, *rest], 22)
    assert set(case.others) == {c.gold for c in rest}


def test_too_few_questions_for_so_many_references_are_refused(decoder: Decoder, data: Path) -> None:
    with pytest.raises(SourceError, match="found 7 other references .* expected 20: give a larger --limit"):
        references_study(decoder, cases(decoder, data, 8))


def test_references_are_added_to_gold_one_by_one(decoder: Decoder, data: Path, asked: Asked) -> None:
    some = cases(decoder, data)[:8]
    study = references_study(decoder, some, (1, 4), seed=3)
    crowded = with_others(some, 4, seed=3)
    assert asked == [
        ("gold alone", 4, [[c.gold] for c in some]),
        ("gold among 4 references", 4, [list(gold_and(3)(c)) for c in crowded]),
        (CLOSED, 4, [[]] * 8),
        ("4 wrong references", 4, [list(c.others) for c in crowded]),
    ]
    assert [o.references for o in study.outcomes] == [1, 4, 4, 0]
    assert [(x, o.arm) for x, o in study.curves["gold among others"]] == [(1, "gold alone"), (4, "gold among 4 references")]


NOTES = [f"The {word} of the old town was built by a man in {1900 + n}." for n, word in enumerate(("bridge", "tower", "gate"))]
HELD = ["".join(f"They came to the {w} of the town and saw it was old. " for w in ("bridge", "gate", "tower", "wall")) * 4]


@pytest.fixture
def bank(decoder: Decoder, tmp_path: Path) -> Iterator[Bank]:
    with Bank(tmp_path / "bank", decoder, create=True) as opened:
        write(decoder, [Reference(text) for text in NOTES], opened)
        yield opened


def test_every_chunk_length_is_scored_on_the_same_tokens_and_differs_by_its_references_alone(
    decoder: Decoder, bank: Bank
) -> None:
    study = chunk_study(decoder, bank, HELD, sizes=(16, 64), length=150, max_overlap=None)
    nothing = chunk_study(decoder, bank, HELD, sizes=(16, 64), length=150, max_overlap=0.0)
    read = [o.values["bits per token"] for o in study.outcomes[1:]]
    assert len(set(read)) == 4
    assert all(o.references > 0 for o in study.outcomes[1:])
    assert {o.references for o in nothing.outcomes} == {0}
    unread = [o.values["bits per token"] for o in nothing.outcomes[1:]]
    assert all(row == pytest.approx(unread[0], rel=1e-5) for row in unread)
    assert min(abs(row[0] - unread[0][0]) for row in read) > 1e-3


def test_closed_book_of_the_chunks_is_the_plain_model_behind_the_longest_first_chunk(decoder: Decoder, bank: Bank) -> None:
    study = chunk_study(decoder, bank, HELD, sizes=(16, 64), length=150, limit=1)
    ids = [*decoder.bos_ids, *decoder.tokens(HELD[0])]
    starts = range(0, len(ids) - 149, 149)
    found = []
    for start in starts:
        row = torch.tensor([[*decoder.bos_ids, *ids[1 + start : 150 + start]]])
        with torch.no_grad():
            logs = decoder.model(row).logits[0].log_softmax(-1)
        kept = [float(logs[n - 1, row[0, n]]) for n in range(65, 150)]
        found.append(-sum(kept) / len(kept) / torch.tensor(2.0).log().item())
    [bits] = study.outcomes[0].values["bits per token"]
    assert min(abs(bits - other) for other in found) < 1e-4


# ---- when memory begins ----


class Given:
    """The same references for every row."""

    def __init__(self, own: list[str | None]) -> None:
        self.own = own

    def texts(self, rows: Sequence[int]) -> list[list[str | None]]:
        return [self.own for _ in rows]


def stages(decoder: Decoder, own: list[str | None], batch: int = 2) -> tuple[Warmup, Continual]:
    text = ["The quick brown fox jumps over the lazy dog and sleeps in the sun. " * 8]
    return Warmup(decoder, text, 48, batch, 0), Continual(decoder, text, Given(own), 48, batch, 0)


def test_the_rows_of_a_step_and_their_tokens_do_not_depend_on_when_memory_begins(decoder: Decoder) -> None:
    both = stages(decoder, ["a fox"])
    begun = [Begun(*both, begin) for begin in (0, 3, 6)]
    for number in range(6):
        batches = [b.batch(number) for b in begun]
        assert [isinstance(b, Retrieved) for b in batches] == [number >= begin for begin in (0, 3, 6)]
        rows = [b.rows if isinstance(b, Retrieved) else b for b in batches]
        assert rows[0] == rows[1] == rows[2]
        assert {b.tokens(batch) for b, batch in zip(begun, batches, strict=True)} == {96}
    plain, read = begun[2].batch(0), begun[0].batch(0)
    assert torch.equal(begun[1].loss(decoder, plain, 0)[0], both[0].loss(decoder, plain, 0)[0])
    assert torch.equal(begun[1].loss(decoder, read, 0)[0], both[1].loss(decoder, read, 0)[0])


def test_the_measured_losses_are_those_of_the_stage_and_their_differences_are_the_gains(decoder: Decoder) -> None:
    own: list[str | None] = ["a fox is wild"]
    _, stage = stages(decoder, own, batch=4)
    rows = stage.batch(0).rows
    found = held_losses(decoder, rows, [own] * 4)
    with torch.no_grad():
        right, none = (float(stage.loss(decoder, Retrieved(rows, [o] * 4), 0)[0]) for o in (own, [None]))
    assert sum(found["right"]) / 4 == pytest.approx(right, rel=1e-5)
    assert sum(found["none"]) / 4 == pytest.approx(none, rel=1e-5)
    assert abs(right - none) > 1e-3
    assert found["gain"] == tuple(n - r for n, r in zip(found["none"], found["right"], strict=True))
    assert found["wrong"] == pytest.approx(found["none"], rel=1e-5)  # all rows read the same, so there is no wrong one
    other = held_losses(decoder, rows, [["a fox"], ["a dog"], ["a cat"], ["a cow"]])
    assert min(abs(d) for d in other["right against wrong"]) > 1e-6


def test_without_references_there_is_no_gain(decoder: Decoder) -> None:
    _, stage = stages(decoder, [None])
    found = held_losses(decoder, stage.batch(0).rows, [[None], [None]])
    assert set(found["gain"]) == {0.0}


def test_wrong_references_are_of_another_row_in_the_same_chunks_and_never_ones_own() -> None:
    own = [["a", None, "b"], ["b", "c", "d"], ["e", "a", "a"]]
    assert of_others(own) == [["e", None, "d"], ["e", "a", "a"], ["b", "c", "b"]]


def test_held_out_documents_are_whole_and_apart(data: Path) -> None:
    texts, held = parted(documents([str(data / "passages.parquet")]), replace(PLAN, steps=100))
    assert (len(texts), len(held)) == (54, 6)
    assert not {d.name for d in texts} & {d.name for d in held}
    few, some = parted(documents([str(data / "passages.parquet")]), replace(PLAN, steps=1, begins=(0,), held=2))
    assert len(few) < 10
    assert few == texts[: len(few)]
    assert some == held[: len(some)]


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, int]:
    folder = tmp_path_factory.mktemp("warmup")
    plan, lines = replace(PLAN, begins=(2, 4, 0)), []
    study = beginning_study([str(data / "passages.parquet")], folder, plan, report=lines.append)
    return study, folder, len(lines)


def test_two_runs_are_one_until_memory_begins_and_differ_afterwards(compared: Any) -> None:
    study, _, _ = compared
    halfway, never, always = study.curves.values()
    assert [step for step, _ in halfway] == [2, 4]
    assert halfway[0][1].values == never[0][1].values != always[0][1].values
    assert len({points[1][1].values["none"] for points in (halfway, never, always)}) == 3
    assert [o.arm for o in study.outcomes] == [
        "warmup 2 steps, then continual 2",
        "warmup alone, 4 steps",
        "continual from the first step, 4",
    ]
    for outcome in study.outcomes:
        low, high = outcome.interval("gain")
        assert low <= outcome.mean("gain") <= high
        assert 0 < outcome.references <= 5
    assert study.table == losses_table(study.outcomes)
    assert study.table.count("\n") == 4


def test_a_finished_comparison_is_read_and_not_run_again(compared: Any, data: Path) -> None:
    study, folder, reports = compared
    assert reports > 0

    def forbidden(line: dict[str, float]) -> None:
        raise AssertionError(line)

    again = beginning_study([str(data / "passages.parquet")], folder, replace(PLAN, begins=(2, 4, 0)), report=forbidden)
    assert again.table == study.table


def test_a_comparison_that_ran_out_of_time_goes_on_and_ends_the_same(compared: Any, data: Path, tmp_path: Path) -> None:
    plan, source = replace(PLAN, begins=(2, 4, 0)), [str(data / "passages.parquet")]
    for stopped_at in (1, 3, 1):  # a call makes one step of a segment, and the segments end at 2 and 4
        with pytest.raises(TrainError, match=f"the time was up at step {stopped_at} of .* run the same command again"):
            beginning_study(source, tmp_path, plan, minutes=0)
    study = beginning_study(source, tmp_path, plan)
    assert [o.values for o in study.outcomes] == [o.values for o in compared[0].outcomes]


def test_a_folder_of_another_comparison_is_refused(compared: Any, data: Path) -> None:
    with pytest.raises(TrainError, match="found another comparison in .* give another --out"):
        beginning_study([str(data / "passages.parquet")], compared[1], replace(PLAN, begins=(1,)))


def test_memory_that_begins_outside_of_the_run_is_refused() -> None:
    with pytest.raises(TrainError, match=r"found memory beginning at step \(9,\), expected 0 to 4"):
        replace(PLAN, begins=(9,))


def test_too_little_text_to_hold_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"Some words of number {n}. " * 9}) for n in range(9)))
    with pytest.raises(SourceError, match="found 0 tokens of held-out text, expected two rows of 48"):
        beginning_study([str(tmp_path / "a.jsonl")], tmp_path / "out", PLAN)


def test_every_variant_starts_from_the_same_weights() -> None:
    one, two = (fresh(PLAN, tiny_tokenizer()) for _ in range(2))
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = fresh(replace(PLAN, seed=1), tiny_tokenizer())
    assert not torch.equal(next(other.model.parameters()), next(one.model.parameters()))


# ---- trained readers ----

TOY = Reader(steps=1, layers=(1, 2), tokens_per_head=8, vocabulary=320, texts_for_meaning=0)


def test_the_layer_variants_keep_equally_many_slots() -> None:
    variants = layer_variants(replace(TOY, tokens_per_head=64))
    assert [v.reader.layers for v in variants] == [(0, 1, 2), (1, 2, 3), (0, 1, 2, 3, 4, 5)]
    assert {len(v.reader.layers) * v.reader.tokens_per_head for v in variants if v.reader.tokens_per_head} == {192}
    assert [v.name for v in variants][2] == "all layers (0, 1, 2, 3, 4, 5), 32 tokens per head"
    for kept in (7, None):
        with pytest.raises(TrainError, match="expected slots that 6 layers share evenly"):
            layer_variants(replace(TOY, tokens_per_head=kept))


def test_a_reader_is_trained_with_its_own_layers_and_selection_and_asked_with_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Settings]] = []

    def finished(learner: Decoder, objective: Any, settings: Settings, *rest: Any) -> int:
        seen.append((learner.spec, settings))
        return 1

    monkeypatch.setattr(retraining, "finished", finished)
    variant = selection_variants(TOY)[2]
    decoder = trained(variant, Training(data, tmp_path))
    assert variant.name == list(SELECTIONS)[2] == seen[0][0].selection == decoder.spec.selection
    assert (seen[0][0].layers, seen[0][0].tokens_per_head) == ((1, 2), None)
    assert (decoder.spec.layers, decoder.spec.tokens_per_head) == ((1, 2), 8)
    trained(replace(variant, selection="key_norm"), Training(data, tmp_path))
    assert len({settings.folder for _, settings in seen}) == len(seen)


def test_a_variant_has_its_row_and_its_controls_and_is_not_trained_twice(data: Path, tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []
    told: list[tuple[int, int]] = []
    training = Training(data, tmp_path, limit=5, report=lines.append, tell=lambda *done: told.append(done))
    variants = [Variant("one", TOY), Variant("two", replace(TOY, layers=(0, 1)))]
    study = retrained_study(variants, training)
    ways = ("", ": wrong references", ": closed book")
    assert [o.arm for o in study.outcomes] == [f"{name}{way}" for name in ("one", "two") for way in ways]
    assert [o.references for o in study.outcomes] == [5, 4, 0] * 2
    assert [line["step"] for line in lines] == [1, 1]
    assert told[-1][0] == told[-1][1]
    assert [done / of for done, of in told] == sorted(done / of for done, of in told)
    assert retrained_study(variants, training).table == study.table
    assert len(lines) == 2


# ---- the command ----


def run(name: str, decoder: Decoder, inputs: Inputs) -> Any:
    return measure_ablation(name, lambda: decoder, inputs)


@pytest.mark.parametrize("name", ["tokens", "selection", "references"])
def test_an_ablation_of_questions_prints_and_keeps_its_table(
    name: str, decoder: Decoder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = run(name, decoder, Inputs((str(data),), tmp_path, limit=24))
    shown = capsys.readouterr().out
    assert shown == (tmp_path / f"{name}.md").read_text() == study.table + "\n"
    assert all("[" in line and "]" in line for line in shown.splitlines()[2:])
    values = json.loads((tmp_path / f"{name}.json").read_text())
    assert [v["arm"] for v in values] == [o.arm for o in study.outcomes]
    assert (tmp_path / f"{name}.png").exists() == bool(study.curves) == (name != "selection")
    assert all(o.arm in SELECTIONS for o in study.outcomes) == (name == "selection")


def test_the_chunk_ablation_recalls_from_a_bank_and_draws_a_curve(decoder: Decoder, bank: Bank, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text(" ".join(HELD * 2))
    study = run("chunk", decoder, Inputs((str(held),), tmp_path / "out", bank=str(bank.path), limit=2))
    assert [o.arm for o in study.outcomes][:3] == [CLOSED, f"32-token chunks, {SPARSE}", f"32-token chunks, {WRONG}"]
    assert len(study.outcomes) == 7
    assert (tmp_path / "out" / "chunk.png").read_bytes().startswith(PNG)


def test_the_ablations_that_train_need_no_model(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Variant]] = []
    monkeypatch.setattr(
        "memory3.evaluate.ablations.retrained_study", lambda variants, training: asked.append(variants) or unchanged
    )
    monkeypatch.setattr(
        "memory3.evaluate.ablations.retrained_tokens_study", lambda variants, training: asked.append(variants) or unchanged
    )
    unchanged = beginning_study([str(data / "passages.parquet")], tmp_path / "w", PLAN)

    def no_model() -> Decoder:
        raise AssertionError("no model is needed")

    for name in ("layers", "tokens", "selection"):
        measure_ablation(name, no_model, Inputs((str(data),), tmp_path, steps=7))
    assert [len(v) for v in asked] == [3, 8, len(SELECTIONS)]
    assert {v.reader.steps for variants in asked for v in variants} == {7}
    assert [v.reader.tokens_per_head for v in asked[1]] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert (tmp_path / "tokens.png").read_bytes().startswith(PNG)


def test_what_is_missing_is_said(decoder: Decoder, data: Path, tmp_path: Path) -> None:
    assert list(ABLATIONS) == ["warmup", "layers", "tokens", "selection", "references", "chunk"]
    for name, inputs, message in (
        ("heads", Inputs((str(data),)), "found ablation 'heads', expected one of warmup, layers"),
        ("layers", Inputs((str(data),)), "found no --out"),
        ("warmup", Inputs((str(data),)), "found no --out"),
        ("chunk", Inputs((str(data),)), "found no --bank"),
        ("tokens", Inputs((str(data), "b")), "found 2 sources of questions, expected one folder"),
    ):
        with pytest.raises(SourceError, match=message):
            run(name, decoder, inputs)
