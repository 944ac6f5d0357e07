"""Writing is timed on whole references, and its share of the peak is that of the design's FLOPs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from families import tiny_model, tiny_tokenizer

import memory3.bench.encoding as encoding
import memory3.bench.machine as machine
from memory3.bench.encoding import Load, bench_write
from memory3.cost import Shape, memory_write_flops
from memory3.decoder import Decoder, attach
from memory3.spec import MemorySpec, SpecError

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16, reference_length=32, references_per_chunk=2)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


def test_the_work_is_that_of_the_design_for_each_text_by_its_own_length(decoder: Decoder) -> None:
    """Formulas and their golden values are those of `memory3.cost`."""
    one, two = encoding._work(decoder, [[5] * 32]), encoding._work(decoder, [[5] * 16])
    assert one == memory_write_flops(Shape.of(decoder.model.config), decoder.spec)
    assert encoding._work(decoder, [[5] * 16, [5] * 32, [5] * 32]) == two + 2 * one
    assert two < one / 2  # attention grows faster than the length


def test_encoding_and_writing_take_turns_on_the_same_references(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = encoding.write

    def noted(*args: object, **options: object) -> object:
        report = original(*args, **options)  # type: ignore[arg-type]
        written.append(report.references)
        return report

    monkeypatch.setattr(encoding, "write", noted)
    monkeypatch.setattr(machine, "PEAK_SIZES", (32, 64))
    found = bench_write(decoder, Load(references=5, batch=2, repeats=2)).document()
    assert written == [5, 5, 5]  # each turn into a new bank
    assert found["settings"]["tokens"] <= 5 * SPEC.reference_length
    for way in ("encode", "write"):
        share = found["flops"] / 5 * found["references_per_s"][way] / found["peak_flops"]
        assert found["ratios"][f"{way}_share_of_peak"] == pytest.approx(share)


def test_loads_that_mean_nothing_are_refused() -> None:
    with pytest.raises(SpecError, match="found references=0"):
        Load(references=0)
