"""Arms differ in the form of knowledge and in nothing else; their controls are controls, and their intervals paired."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from torch import Tensor

from memory3.bank import Bank
from memory3.codec import CODECS, RawCodec
from memory3.decoder import Decoder, attach
from memory3.evaluate.arms import CLOSED, SPARSE, TEXT, WRONG, Arm, arms, quantising_codecs, side_by_side, untrained_of
from memory3.evaluate.asking import Question
from memory3.evaluate.given import Brought, gold_among_others, holds, retrieved, with_wrong
from memory3.evaluate.likelihood import Row, log_probabilities
from memory3.evaluate.outcomes import Outcome, document, table
from memory3.evaluate.picture import draw_arms
from memory3.record import Codec, RecordShape
from memory3.spec import MemorySpec, Reference, SourceError
from memory3.writing import write

SPEC = MemorySpec(tokens_per_head=4, reference_length=48, chunk_length=32, references_per_chunk=2)
TEXTS = [f"The tower number {n} was built in {1900 + n}, they say." for n in range(6)]


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


@dataclass(frozen=True)
class Bytes(Codec):
    """A codec of one byte a number, with a scale per record: made for these tests."""

    name: ClassVar[str] = "toy"

    def payload_bytes(self, shape: RecordShape) -> int:
        return 4 + 2 * shape.pairs * shape.slots * shape.head_dim

    def pack(self, keys: Tensor, values: Tensor) -> bytes:
        both = torch.stack((keys, values)).float()
        scale = both.abs().max() / 127
        return scale.reshape(1).numpy().tobytes() + (both / scale).round().to(torch.int8).numpy().tobytes()

    def unpack(self, payloads: Tensor, shape: RecordShape) -> tuple[Tensor, Tensor]:
        scale = payloads[:, :4].contiguous().view(torch.float32)[:, :, None, None, None]
        numbers = payloads[:, 4:].view(torch.int8).reshape(-1, 2, shape.pairs, shape.slots, shape.head_dim)
        keys, values = (numbers.float() * scale).unbind(1)
        return keys, values

    def relative_error(self, head_dim: int) -> float:
        return 1.0

    def accepts(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float32


@dataclass(frozen=True)
class Trained(Bytes):
    """A codec that cannot be made without what it was trained on."""

    name: ClassVar[str] = "trained"
    book: bytes = b""

    def __post_init__(self) -> None:
        if not self.book:
            raise TypeError("no book")


def test_a_registered_quantising_codec_is_a_row_by_itself_and_one_that_must_be_trained_is_not(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [codec.name for codec in quantising_codecs(decoder)]
    assert there == ["int8", "int4", "rotated"]
    monkeypatch.setitem(CODECS, "toy", Bytes)
    monkeypatch.setitem(CODECS, "trained", Trained)
    rows = arms(decoder, codecs=quantising_codecs(decoder))
    named = [f"{SPARSE}, codec {name}" for name in (*there, "toy")]
    assert [a.name for a in rows] == [CLOSED, TEXT, "dense memory, all layers", SPARSE, *named, WRONG]


def test_the_codec_arm_reads_what_the_record_holds(decoder: Decoder) -> None:
    plain, raw, coarse = (Arm("", decoder, codec=codec).encode(TEXTS[:2])[1] for codec in (None, RawCodec("float32"), Bytes()))
    assert torch.equal(plain.keys, raw.keys)
    assert torch.equal(plain.values, raw.values)
    error = (plain.keys - coarse.keys).abs().max()
    assert 0 < error <= max(plain.keys.abs().max(), plain.values.abs().max()) / 127 / 2 * 1.01
    assert torch.equal(plain.positions, coarse.positions)


def test_closed_book_is_the_plain_model_and_dense_memory_is_the_text_in_its_context(decoder: Decoder) -> None:
    ids, text = decoder.context("When was it?"), "A tower of forty-eight letters was built in 1907."[:48]
    own = decoder.tokens(text)
    assert len(own) == 48
    _, _, dense, *_ = arms(decoder)
    found = log_probabilities(dense, [Row(ids, 1, len(ids), [[text]])])[0]
    behind = [*decoder.prefix_ids, *own, *ids]
    with torch.no_grad():
        in_context = decoder.model(torch.tensor([behind])).logits[0].log_softmax(-1)
        plain = decoder.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = torch.tensor(ids[1:])
    expected = in_context[len(behind) - len(ids) : -1].gather(1, wanted[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)
    closed = log_probabilities(Arm(CLOSED, decoder, "nothing"), [Row(ids, 1, len(ids), [[text]])])[0]
    torch.testing.assert_close(torch.tensor(closed), plain[:-1].gather(1, wanted[:, None])[:, 0], atol=1e-6, rtol=0)
    assert max(abs(a - b) for a, b in zip(found, closed, strict=True)) > 0.01


def test_likelihoods_do_not_depend_on_what_else_is_in_the_batch(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = Arm(SPARSE, decoder)
    rows = []
    for n, text in enumerate(TEXTS):
        ids = decoder.context(text * (1 + n % 3))
        rows.append(Row(ids, 3 + n, len(ids) - n, [TEXTS[:n]]))
    together = log_probabilities(arm, rows)
    told: list[int] = []
    monkeypatch.setattr("memory3.evaluate.likelihood.TOKENS", 1)
    alone = log_probabilities(arm, rows, lambda done, total: told.append(done))
    assert told == [1, 2, 3, 4, 5, 6]
    for a, b, row in zip(together, alone, rows, strict=True):
        assert len(a) == row.end - row.start
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=0)


def test_wrong_references_are_anothers_as_many_and_never_hold_the_answer() -> None:
    questions = [Question("", f"tower {n}?", (f"{1900 + n}",)) for n in range(5)]
    given = [(TEXTS[n], TEXTS[(n + 1) % 5]) for n in range(5)]
    for n, brought in enumerate(with_wrong(questions, given)):
        assert brought.right == given[n]
        assert len(brought.wrong) == 2
        assert not set(brought.wrong) & set(given[n])
        assert not any(holds(text, questions[n].answers) for text in brought.wrong)
    everywhere = with_wrong([Question("", "?", ("tower",)), Question("", "?", ())], [(TEXTS[0],), (TEXTS[1],)])
    assert [b.wrong for b in everywhere] == [(), (TEXTS[0],)]
    assert holds("Built in 1901.", ["1901"])
    assert not holds("Built in 19012.", ["1901"])


def test_a_reference_that_the_question_repeats_is_not_recalled_unless_the_filter_is_off(
    decoder: Decoder, tmp_path: Path
) -> None:
    bank = Bank(tmp_path / "bank", decoder, create=True)
    write(decoder, [Reference(t) for t in TEXTS], bank)
    question = [Question("", f"Is it so? {TEXTS[3]}"), Question("", "Which tower was built in 1904?")]
    told: list[tuple[int, int]] = []
    filtered = retrieved(bank, question, retriever="lexical", count=6, tell=lambda *step: told.append(step))
    off = retrieved(bank, question, retriever="lexical", count=6, max_overlap=None)
    assert TEXTS[3] in off[0].right
    assert TEXTS[3] not in filtered[0].right
    assert TEXTS[4] in filtered[1].right
    assert told == [(2, 2)]
    assert len(retrieved(bank, question, retriever="lexical", count=1)[1].right) == 1
    whole = [Question("", "Which tower was built?", whole=TEXTS[3])]
    assert TEXTS[3] not in retrieved(bank, whole, retriever="lexical", count=6)[0].right


def test_gold_is_among_others_that_do_not_hold_the_answer(decoder: Decoder) -> None:
    def asked(n: int) -> Question:
        return Question("", f"When was tower {n} built" + "?" * n, (f"{1900 + n}",), passage=TEXTS[n])

    lost = Question("", "Who?", ("nobody at all",), passage=TEXTS[0])
    kept, brought = gold_among_others(decoder, [*map(asked, range(6)), lost], count=3)
    assert kept == [asked(n) for n in range(6)]
    places = set()
    for n, b in enumerate(brought):
        golds = [t for t in b.right if f"{1900 + n}" in t]
        assert len(b.right) == len(b.wrong) == 3
        assert len(golds) == 1
        places.add(b.right.index(golds[0]))
        assert not any(f"{1900 + n}" in t for t in b.wrong)
    assert places == {0, 1, 2}
    assert gold_among_others(decoder, kept, count=3)[1] == brought
    common = Question("", "What was done to it?", ("built",), passage=TEXTS[0])
    assert gold_among_others(decoder, [common, *kept], count=3)[1][0] == Brought((TEXTS[0],), ())
    with pytest.raises(SourceError, match="found no passage that holds its answer"):
        gold_among_others(decoder, [lost])


def test_a_question_with_choices_has_its_whole_passage_and_gold_that_the_question_repeats_is_dropped(decoder: Decoder) -> None:
    long = Question("", "True?", choices=("a", "b"), passage=f"{TEXTS[0]}\n\n{TEXTS[1]}")
    _, brought = gold_among_others(decoder, [long], count=2)
    assert "".join(brought[0].right).count("tower") == 2
    repeated = Question("", TEXTS[2], choices=("a", "b"), passage=TEXTS[2])
    assert gold_among_others(decoder, [repeated], count=1)[1] == [Brought()]
    assert "2" in "".join(gold_among_others(decoder, [repeated], count=1, max_overlap=None)[1][0].right)


def test_the_untrained_control_has_the_same_shape_and_other_weights_and_leaves_the_generator_alone(
    decoder: Decoder, tmp_path: Path
) -> None:
    state = torch.random.get_rng_state()
    control, again, third = (untrained_of(decoder, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    of = [dict(d.model.named_parameters()) for d in (decoder, control, again, third)]
    assert all({n: p.shape for n, p in ps.items()} == {n: p.shape for n, p in of[0].items()} for ps in of)
    wide = [n for n, p in of[0].items() if p.ndim > 1]
    assert all(torch.equal(of[1][n], of[2][n]) for n in wide)
    assert not any(torch.equal(of[1][n], of[m][n]) for n in wide for m in (0, 3))
    assert control.spec == decoder.spec
    assert arms(decoder, untrained=control)[-1].name == "sparse memory, untrained (random weights)"
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path)
    tiny_tokenizer(bos=False).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="another tokenizer"):
        untrained_of(decoder, str(tmp_path))
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = untrained_of(decoder, str(tmp_path))
    assert torch.equal(loaded.model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    with attach(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer(), decoder.spec) as half:
        assert {untrained_of(half, path).dtype for path in (str(tmp_path), None)} == {torch.bfloat16}


def test_differences_are_paired() -> None:
    """A difference that every question shares is certain, however much the questions differ."""
    values = tuple(float(n % 7) / 10 for n in range(50))
    low, high = Outcome("a", 1, {"accuracy": values}), Outcome("b", 1, {"accuracy": tuple(v + 0.25 for v in values)})
    mean, bounds = high.minus(low, "accuracy")
    assert mean == pytest.approx(0.25)
    assert bounds == pytest.approx((0.25, 0.25))
    own = high.interval("accuracy")
    assert own[1] - own[0] > 0.05
    assert low.minus(low, "accuracy") == (0, (0, 0))


def test_arms_run_side_by_side_into_a_table_a_document_and_a_picture(decoder: Decoder, tmp_path: Path) -> None:
    brought = [Brought(("x", "y"), ("z",)), Brought(("x",), ())]
    steps: list[tuple[int, int]] = []

    def score(arm: Arm, told: object) -> dict[str, list[float]]:
        told(2, 2)  # type: ignore[operator]
        return {"accuracy": [1.0, float(arm.brings == "right")]}

    outcomes = side_by_side(arms(decoder), brought, score, lambda done, total: steps.append((done, total)))
    assert steps == [(2, 10), (4, 10), (6, 10), (8, 10), (10, 10)]
    lines = table(outcomes, (SPARSE, CLOSED)).splitlines()
    assert (
        lines[0] == "| arm | n | references | accuracy, % | accuracy, %: minus sparse memory | accuracy, %: minus closed book |"
    )
    assert lines[2].startswith("| closed book | 2 | 0.0 | 50.0 [0.0, 100.0] | -50.0 [-100.0, 0.0] |  |")
    assert lines[5].startswith("| sparse memory | 2 | 1.5 | 100.0 [100.0, 100.0] |  | 50.0 [0.0, 100.0] |")
    assert lines[6].startswith("| sparse memory, wrong references | 2 | 0.5 | 50.0 ")
    assert len(lines) == 7
    assert document(outcomes)[3]["metrics"]["accuracy"] == {"mean": 1.0, "interval": [1.0, 1.0], "values": [1.0, 1.0]}
    draw_arms(outcomes, "a title with $ and \n", tmp_path / "arms.png")
    assert (tmp_path / "arms.png").read_bytes().startswith(b"\x89PNG")
