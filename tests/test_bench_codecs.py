"""Codecs are compared on the same memories, queries and questions, and the control has no error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import tiny_model, tiny_tokenizer

import memory3.bench.codecs as codecs
from memory3.answering import question_prompt
from memory3.bench.codecs import Coded, Compared, Row, Sizes, attention_errors, bench_codec, chosen_codecs, draw_codecs
from memory3.codec import RawCodec
from memory3.decoder import Decoder, attach
from memory3.evaluate.reading import Score, dev_cases, encoded, mixed
from memory3.integers import Int8Codec
from memory3.rotated import RotatedCodec
from memory3.spec import BankError, Memory, MemorySpec, SpecError

SPEC = MemorySpec(tokens_per_head=8, chunk_length=16, reference_length=64)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {
            "dataset": "squad",
            "split": "dev",
            "question": f"When is {n}?",
            "answers": [f"in {1900 + n}"],
            "title": f"Page_{n}",
            "passage": f"The thing number {n} was made in {1900 + n} and that is all there is to say of it.",
        }
        for n in range(7)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "qa.parquet")
    return tmp_path


def test_the_control_is_raw_bf16_and_coarser_codecs_are_smaller_and_worse(decoder: Decoder, data: Path) -> None:
    names = ("int8", "rotated:key_bits=2,value_bits=2", "rotated:key_bits=1,value_bits=1")
    told: list[tuple[int, int]] = []
    report = bench_codec(decoder, data, names, sizes=Sizes(5, 3, 4, 1), tell=lambda done, total: told.append((done, total)))
    raw, *others = report.document()["codecs"]
    shape = (decoder.spec.pairs, decoder.spec.slots, decoder.head_dim)
    assert raw["bytes"] == RawCodec("bfloat16").record_bytes(*shape)
    assert (raw["smaller"], raw["attention"], raw["change"], raw["interval"]) == (1, 0, 0, (0, 0))
    assert [row["codec"] for row in others] == list(names)
    assert raw["bytes"] > others[0]["bytes"] > others[1]["bytes"] > others[2]["bytes"]
    assert 0 < others[0]["attention"] < others[1]["attention"] < others[2]["attention"]
    assert all(row["encode"] > 0 and row["decode"] > 0 for row in (raw, *others))
    assert told[-1] == (20, 20)
    assert report.document()["settings"]["questions"] == 5


def test_questions_are_answered_from_what_the_codec_gives_back(
    decoder: Decoder, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[Memory]] = {}
    cases = dev_cases(decoder, data, 5)
    texts = list(mixed(cases[0]))

    def noted(name: str, *_: object, encode: object, **__: object) -> Score:
        found[name] = encode(texts)  # type: ignore[operator]
        return Score(name, (1.0, 0.0, 1.0, 1.0, 1.0) if name == "raw" else (1.0, 0.0, 0.0, 1.0, 1.0), (0.0,) * 5)

    monkeypatch.setattr(codecs, "score_of", noted)
    report = bench_codec(decoder, data, ("int8",), sizes=Sizes(5, 1, 1, 1))
    written = decoder.encode(texts)
    for name, codec in (("raw", RawCodec("bfloat16")), ("int8", Int8Codec())):
        coded = Coded.of(name, codec, decoder, dict(zip(texts, written, strict=True)))
        for ours, theirs in zip(found[name], coded.decode(texts, decoder.device), strict=True):
            assert torch.equal(ours.keys.float(), theirs.keys.float())
    row = report.document()["codecs"][1]
    assert row["exact"] == pytest.approx(0.6)
    assert row["change"] == pytest.approx(-0.2)
    assert row["interval"][0] < -0.2 < row["interval"][1] <= 0
    assert report.document()["within_one_point"] == "raw"


@torch.no_grad()
def test_the_error_of_attention_is_that_of_its_output_at_the_same_queries(decoder: Decoder, data: Path) -> None:
    """At the first memory layer nothing has been read before it: there a run of its own with the other memories has the same queries."""
    cases = dev_cases(decoder, data, 3)
    memories = encoded(decoder.encode, (t for c in cases for t in mixed(c)))
    layout = decoder.layout([question_prompt(decoder, c.question).ids for c in cases])
    chunks = int(layout.chunks.max()) + 1

    def reading(scale: float):  # type: ignore[no-untyped-def]
        scaled = {t: replace(m, values=m.values * scale) for t, m in memories.items()}
        return decoder.reading(layout.chunks, [[[scaled[t] for t in mixed(c)]] * chunks for c in cases])

    outputs = []
    assert decoder.spec.layers is not None
    first = decoder.model.base_model.layers[decoder.spec.layers[0]].self_attn.o_proj
    taken = first.register_forward_pre_hook(lambda module, given: outputs.append(given[0]))
    for hook in (reading(1), reading(3)):
        decoder.forward(layout, hook, base=True)
    compared = Compared(reading(1), {"same": reading(1), "thrice": reading(3)})
    decoder.forward(layout, compared, base=True)
    taken.remove()
    assert torch.equal(outputs[2], outputs[0])
    plain, thrice = (o[layout.chunks >= 0].double() for o in outputs[:2])
    sums = compared.squares[decoder.spec.layers[0]]
    assert sums["same"] == 0
    assert sums["thrice"] / sums[""] == pytest.approx(float((thrice - plain).square().sum() / plain.square().sum()), rel=1e-5)
    assert list(compared.squares) == list(decoder.spec.layers)


def test_errors_of_attention_do_not_depend_on_which_codecs_are_measured_together(decoder: Decoder, data: Path) -> None:
    cases = dev_cases(decoder, data, 4)
    memories = encoded(decoder.encode, (t for c in cases for t in mixed(c)))
    raw, fine, coarse = (
        Coded.of(name, codec, decoder, memories)
        for name, codec in (("raw", RawCodec()), ("fine", RotatedCodec(4, 4)), ("coarse", RotatedCodec(1, 1)))
    )
    together = attention_errors(decoder, cases, raw, [fine, coarse])
    assert together == {**attention_errors(decoder, cases, raw, [fine]), **attention_errors(decoder, cases, raw, [coarse])}


def test_the_smallest_within_a_point_is_chosen_by_the_lower_bound() -> None:
    def row(name: str, smaller: float, change: float, low: float) -> Row:
        return Row(name, 100, smaller, 1, 1, 0.1, 0.5, change, (low, 0.1))

    rows = [row("raw", 1, 0, 0), row("good", 4, -0.005, -0.009), row("doubtful", 8, 0.0, -0.011)]
    assert codecs.smallest_within(rows).codec == "good"


def test_the_picture_shows_every_codec(tmp_path: Path) -> None:
    row = {"codec": "raw", "bytes": 10, "smaller": 1.0, "attention": 0.0, "change": 0.0, "interval": (-0.1, 0.1)}
    draw_codecs([row, {**row, "codec": "int8", "bytes": 5}], tmp_path / "new" / "codecs.png")
    assert (tmp_path / "new" / "codecs.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="found limit=0"):
        Sizes(limit=0)
    with pytest.raises(BankError, match="found codec 'zip'"):
        chosen_codecs(decoder, ["zip"], [])
    from codec_examples import codebook

    from memory3.record import RecordShape

    recipe = f"OPQ2_{decoder.head_dim},PQ2x1"
    (tmp_path / "book").write_bytes(codebook(RecordShape.of(decoder.spec, decoder.head_dim), recipe, recipe))
    with pytest.raises(BankError, match=r"found .*book for another model"):
        chosen_codecs(decoder, [], [tmp_path / "book"])
