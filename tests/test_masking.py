"""Hiding distant tokens from heads: nothing where nothing is hidden, a sliding window where all heads are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, tiny_model, tiny_tokenizer

from memory3.attention import KEYWORD
from memory3.decoder import attach
from memory3.evaluate.masking import (
    DistantMask,
    Rise,
    Sample,
    document_samples,
    kept,
    losses,
    measure_masking,
    question_samples,
    ranking,
)
from memory3.spec import MemorySpec, SourceError

WINDOW = 7
ROWS = [[1, *(3 + (n * 7 + k) % 250 for n in range(length))] for k, length in ((0, 23), (5, 15))]


def everywhere(heads: int) -> dict[int, list[int]]:
    return {layer: list(range(heads)) for layer in range(LAYERS)}


def logits(decoder: Any, hook: DistantMask | None, rows: list[list[int]] = ROWS) -> torch.Tensor:
    layout = decoder.layout(rows, padding_side="right", memory=False)
    with torch.no_grad():
        found: torch.Tensor = decoder.forward(layout, **({} if hook is None else {KEYWORD: hook})).logits
    return found


def test_masking_nothing_changes_nothing_bit_for_bit(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer) as decoder:
        plain, heads = logits(decoder, None), decoder.geometry.num_kv_heads
        assert torch.equal(logits(decoder, DistantMask({}, 3)), plain)
        assert torch.equal(logits(decoder, DistantMask(everywhere(heads), len(ROWS[0]))), plain)
        assert torch.equal(logits(decoder, DistantMask(everywhere(heads), len(ROWS[0]) - 1)), plain)


def test_only_tokens_with_something_distant_change(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer) as decoder:
        for rows in (ROWS, ROWS[:1]):
            hook = DistantMask({1: [decoder.geometry.num_kv_heads - 1]}, WINDOW)
            change = (logits(decoder, hook, rows) - logits(decoder, None, rows)).abs().amax(-1)
            assert float(change[:, : WINDOW + 1].max()) < 1e-4
            assert float(change[0, WINDOW + 1 : len(ROWS[0])].min()) > 1e-6


def test_masking_all_heads_of_all_layers_is_a_sliding_window() -> None:
    windowed = tiny_model("mistral", sliding_window=WINDOW + 1)
    assert windowed.config.sliding_window == WINDOW + 1
    with attach(tiny_model("mistral", sliding_window=None), tiny_tokenizer()) as decoder:
        for rows in (ROWS, ROWS[:1]):
            layout = decoder.layout(rows, padding_side="right", memory=False)
            with torch.no_grad():
                wanted = windowed(layout.input_ids, attention_mask=layout.attention_mask).logits
            found, real = logits(decoder, DistantMask(everywhere(2), WINDOW), rows), layout.attention_mask.bool()
            torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-4)
            assert float((found - logits(decoder, None, rows))[real].abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["llama", "llama-eager"])
def test_the_query_heads_of_a_kv_head_are_masked_and_no_others(name: str) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, :32] = 0  # the two query heads of kv head 0 say nothing
    with attach(model, tiny_tokenizer()) as decoder:
        plain = logits(decoder, None)
        unheard, heard = (logits(decoder, DistantMask({1: [head]}, WINDOW)) for head in (0, 1))
    torch.testing.assert_close(unheard, plain, atol=1e-5, rtol=1e-4)
    assert float((heard - plain).abs().max()) > 1e-3


def test_the_first_tokens_stay_visible() -> None:
    """Where only `<s>` is distant, keeping it hides nothing."""
    row = [ROWS[0][: WINDOW + 2]]
    with attach(tiny_model("llama"), tiny_tokenizer()) as decoder:
        plain = logits(decoder, None, row)
        hidden, shown = (logits(decoder, DistantMask(everywhere(2), WINDOW, first), row) for first in (0, 1))
    torch.testing.assert_close(shown, plain, atol=1e-5, rtol=1e-4)
    assert float((hidden - plain).abs().max()) > 1e-3


def test_a_batch_loses_what_each_sample_loses_alone_and_only_counted_tokens() -> None:
    samples = [Sample(tuple(ROWS[0]), 10), Sample(tuple(ROWS[1]), 12)]
    with attach(tiny_model("llama"), tiny_tokenizer()) as decoder:
        hook = DistantMask({0: [0], 2: [1]}, WINDOW)
        together, alone = losses(decoder, samples, hook, batch=2), losses(decoder, samples, hook, batch=1)
        scores = logits(decoder, hook, ROWS[:1])[0].log_softmax(-1)
    assert together == pytest.approx(alone, abs=1e-5)
    wanted = [-float(scores[place - 1, ROWS[0][place]]) for place in range(10, len(ROWS[0]))]
    assert together[0] == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)


def test_a_head_that_is_not_heard_ranks_at_zero_and_the_spec_keeps_the_best(tmp_path: Path, capsys: Any) -> None:
    model, told = tiny_model("llama"), []
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[:, 32:] = 0
    with attach(model, tiny_tokenizer(), MemorySpec(tokens_per_head=4)) as decoder:
        samples = document_samples(
            decoder, ["short", *("A long text about nothing at all. " * n for n in (4, 5))], 9, 40, WINDOW
        )
        ranked = measure_masking(
            decoder, samples, 3, tmp_path / "memory_spec.json", WINDOW, lambda done, total: told.append((done, total))
        )
        spec = MemorySpec.from_json(json.loads((tmp_path / "memory_spec.json").read_text()))
        made = len(told)
        with pytest.raises(SourceError, match="found keep=9, expected 1 to 8 heads"):
            measure_masking(decoder, samples, 9, None, WINDOW, lambda done, total: told.append((done, total)))
        assert len(told) == made  # said before anything is measured
        assert decoder.using(spec).spec == spec
    assert [len(sample.ids) for sample in samples] == [40, 40]
    assert len(ranked) == LAYERS * 2
    assert [r.mean for r in ranked] == sorted((r.mean for r in ranked), reverse=True)
    assert next(r.mean for r in ranked if r.heads == ((2, 1),)) == pytest.approx(0.0, abs=1e-5)
    assert max(abs(r.mean) for r in ranked) > 1e-3
    best = {head for rise in ranked[:3] for head in rise.heads}
    assert spec.layers is not None and spec.heads is not None and spec.tokens_per_head == 4
    assert {(layer, head) for layer, row in zip(spec.layers, spec.heads, strict=True) for head in row} == best
    assert told[-1] == (LAYERS * 2 + 1, LAYERS * 2 + 1)
    assert "| all heads | 2 |" in capsys.readouterr().out


def test_a_share_of_the_heads_can_be_kept_and_no_more_than_there_are() -> None:
    ranked = [Rise("", (head,), (1.0,)) for head in ((3, 0), (0, 1), (3, 1), (1, 0))]
    spec = kept(MemorySpec(), ranked, 0.75)
    assert (spec.layers, spec.heads) == ((0, 3), ((1,), (0, 1)))
    for keep in (0, 5, 1.5, 0.01):
        with pytest.raises(SourceError, match="expected 1 to 4 heads"):
            kept(MemorySpec(), ranked, keep)


def test_questions_count_their_answer_alone(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {
        "dataset": "squad",
        "split": "train",
        "question": "Who?",
        "answers": ["Ann"],
        "title": "T",
        "passage": "Ann sang. " * 4,
    }
    rows = [row, row | {"split": "dev"}, row | {"dataset": "boolq"}, row | {"passage": "Short."}, row | {"answers": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "qa.parquet")
    with attach(tiny_model("llama"), tiny_tokenizer()) as decoder:
        (sample,) = question_samples(decoder, tmp_path, 9, window=20)
        assert decoder.tokenizer.decode(sample.ids[sample.first :]) == " Ann"
        with pytest.raises(SourceError, match=r"qa\.parquet"):
            question_samples(decoder, tmp_path / "nowhere", 9)


def test_samples_without_anything_distant_are_refused() -> None:
    with attach(tiny_model("llama"), tiny_tokenizer()) as decoder:
        for samples in ([], [Sample((1, 2, 3), 1)]):
            with pytest.raises(SourceError, match="longer than 65"):
                ranking(decoder, samples)
