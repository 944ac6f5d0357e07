"""Memories that saw their surroundings: encoded in one sequence, rotated to the common interval, named by text and context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeDecoder, count
from typer.testing import CliRunner

from memory3.bank import Bank
from memory3.cli import app
from memory3.context import GAP, Stretch, stretches
from memory3.decoder import attach
from memory3.rebuilding import rebuild
from memory3.spec import MemorySpec, Reference, SpecError
from memory3.verifying import verify
from memory3.writing import write

FACTS = ("The tower was completed in 1889.", "Salt melts at 801 degrees.", "A group of crows is a murder.")
EVERYTHING = MemorySpec(layers=(0, 1), tokens_per_head=None)
CLOSE = 1e-4
"""Of keys and values of size 1 in float32: the same sums in another order, and a rotation back and forth."""


def document(*texts: str, source: str = "a.txt") -> list[Reference]:
    found, at = [], 0
    for text in texts:
        found.append(Reference(text, source, at, at + len(text)))
        at += len(text) + 2
    return found


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_the_first_reference_of_a_sequence_is_as_if_alone(model: Any, tokenizer: Any) -> None:
    for spec in (EVERYTHING, MemorySpec(layers=(0, 1), tokens_per_head=4)):
        with attach(model, tokenizer, spec) as decoder:
            [alone], [first, *_] = decoder.encode(FACTS[:1]), decoder.encode_in_context(FACTS)
        assert torch.equal(alone.positions, first.positions)
        assert furthest(alone.keys, first.keys) < CLOSE and furthest(alone.values, first.values) < CLOSE


def test_keys_are_rotated_to_the_common_interval(model: Any, tokenizer: Any) -> None:
    """The keys of layer 0 depend on the token and its place alone: moved to the common places, they are those of plain writing."""
    with attach(model, tokenizer, EVERYTHING) as decoder:
        plain, seen = decoder.encode(FACTS), decoder.encode_in_context(FACTS)
        rows = decoder.spec.rows_of(0)
        for a, b in zip(plain, seen, strict=True):
            assert furthest(a.keys[rows], b.keys[rows]) < CLOSE
            assert furthest(a.values[rows], b.values[rows]) < CLOSE
        upper = decoder.spec.rows_of(1)
        assert furthest(plain[1].values[upper], seen[1].values[upper]) > 100 * CLOSE  # it did see what stands before


def test_a_dense_memory_in_context_is_what_the_whole_sequence_holds(model: Any, tokenizer: Any) -> None:
    """Values of the plain model at the same tokens of the same sequence."""
    with attach(model, tokenizer, EVERYTHING) as decoder:
        rows = [decoder.tokens(t) for t in FACTS]
        gap = decoder.tokens(GAP)
        whole = [*rows[0], *gap, *rows[1], *gap, *rows[2]]
        [dense] = decoder.encode_tokens([whole])
        start = len(rows[0]) + len(gap)
        assert furthest(dense.values[:, start : start + len(rows[1])], decoder.encode_in_context(FACTS)[1].values) < CLOSE


def test_what_stands_behind_is_not_seen(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, EVERYTHING) as decoder:
        a, b = decoder.encode_in_context(FACTS)[1], decoder.encode_in_context(FACTS[:2])[1]
        assert furthest(a.keys, b.keys) < CLOSE and furthest(a.values, b.values) < CLOSE


def test_more_than_the_window_is_refused(model: Any, tokenizer: Any) -> None:
    with (
        attach(model, tokenizer, EVERYTHING) as decoder,
        pytest.raises(SpecError, match="tokens in one sequence, expected at most"),
    ):
        decoder.encode_in_context(FACTS * decoder.window)


def test_stretches_fit_the_window_cover_all_once_and_each_but_the_first_sees_something() -> None:
    decoder = FakeDecoder()
    texts = [f"sentence number {n} has some words" for n in range(40)]
    references = [*document(*texts), *document(*texts[:3], source="b.txt")]
    found = list(stretches(references, decoder))
    new = [reference for stretch in found for reference in stretch.new]
    assert [(r.text, r.source) for r in new] == [(r.text, r.source) for r in references]
    assert [r.context == "" for r in new] == [r.start == 0 for r in references]
    for stretch in found:
        assert sum(count(r.text) for r in stretch.references) <= decoder.window
        assert len({r.source for r in stretch.references}) == 1
    assert len(found) > 3


def test_identity_is_text_and_context() -> None:
    decoder = FakeDecoder()
    [one], [two] = stretches(document("a b", "c d"), decoder), stretches(document("x y", "c d"), decoder)
    assert one.new[0].id == Reference("a b").id
    assert len({one.new[1].id, two.new[1].id, Reference("c d").id}) == 3
    [again] = stretches(document("a b", "c d", source="other.txt"), decoder)
    assert [r.id for r in again.new] == [r.id for r in one.new]


def test_a_stretch_gives_the_memories_of_its_new_references_only() -> None:
    decoder, references = FakeDecoder(), document("a b", "c d", "e f")
    assert len(Stretch(tuple(references), 2).encode(decoder)) == 1
    assert decoder.encoded == ["a b", "c d", "e f"]


def written(path: Path, decoder: FakeDecoder, references: list[Reference], **options: Any) -> Bank:
    bank = Bank(path, decoder, create=True)
    write(decoder, references, bank, context=True, batch_size=2, **options)
    return bank


def test_writing_in_context_is_resumable_and_an_edit_changes_what_stands_behind_it(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = written(tmp_path, decoder, document("one a", "two b", "three c"))
    assert len(bank) == 3 and len(bank.in_context()) == 2
    encoded = len(decoder.encoded)
    report = write(decoder, document("one a", "two b", "three c"), bank, context=True)
    assert (report.references, report.skipped, len(decoder.encoded)) == (0, 3, encoded)
    report = write(decoder, document("one a", "two B", "three c"), bank, context=True, read=["a.txt"], update=True)
    assert (report.references, report.removed) == (2, 2)
    assert verify(bank).problems == []
    assert [r.text for id in bank.ids() for r in bank.references([id])[id]].count("three c") == 1


def test_plain_and_contextual_memories_of_one_text_live_side_by_side(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = written(tmp_path, decoder, document("one a", "two b"))
    write(decoder, [Reference("two b", "plain.txt", 0, 5)], bank)
    assert len(bank) == 3
    assert {r.context != "" for id in bank.ids() for r in bank.references([id])[id] if r.text == "two b"} == {True, False}
    assert verify(bank).problems == []


def test_a_rebuild_encodes_documents_in_context_again(tmp_path: Path) -> None:
    decoder, other = FakeDecoder(), FakeDecoder(weights="other")
    bank = written(tmp_path / "bank", decoder, [*document("one a", "two b", "three c"), *document("x y", source="b.txt")])
    write(decoder, [Reference("plain one", "plain.txt", 0, 9)], bank)
    ids, sources = bank.ids(), bank.sources()
    bank.close()
    rebuild(tmp_path / "bank", other)
    with Bank(tmp_path / "bank", other) as again:
        assert again.ids() == ids and again.sources() == sources  # the splitting is the same, so identities are
        assert verify(again).problems == []
        id = next(i for i in again.in_context() if again.references([i])[i][0].text == "three c")
        expected = FakeDecoder(weights="other").encode_in_context(["one a", "two b", "three c"])[2]
        assert torch.equal(again.read([id])[0].keys, expected.keys)


def test_the_command_line_writes_in_context(tmp_path: Path) -> None:
    words = "The mill stood by the river and ground wheat for the town until the flood. "
    (tmp_path / "note.txt").write_text("\n\n".join(words.replace("mill", f"mill {n}") * 5 for n in range(4)))
    bank, runner = str(tmp_path / "bank"), CliRunner()
    arguments = ["write", str(tmp_path / "note.txt"), "--bank", bank, "--context", "--embedder", "none"]
    done = runner.invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(Bank(bank).in_context()) == len(Bank(bank)) - 1 > 1


def test_a_rebuild_keeps_every_text_where_two_states_of_a_document_are_there(tmp_path: Path) -> None:
    decoder, other = FakeDecoder(), FakeDecoder(weights="other")
    bank = written(tmp_path / "bank", decoder, document("one a", "two b"))
    write(decoder, document("one X", "two b"), bank, context=True)  # the same places, without --update
    texts = sorted(r.text for rows in bank.references(bank.ids()).values() for r in rows)
    assert texts.count("one a") == texts.count("one X") == 1
    bank.close()
    rebuild(tmp_path / "bank", other)
    with Bank(tmp_path / "bank", other) as again:
        assert {r.text for rows in again.references(again.ids()).values() for r in rows} == set(texts)
        assert verify(again).problems == []


def test_a_wide_gap_is_counted() -> None:
    class Wide(FakeDecoder):
        """A tokenizer that spends ten tokens on a blank line, as some do three."""

        def __init__(self) -> None:
            super().__init__()
            own = self.tokenizer

            def counted(texts: Any, **options: Any) -> dict[str, list[list[int]]]:
                return {"input_ids": [[0] * 10 if text == GAP else own(text, **options)["input_ids"] for text in texts]}

            self.tokenizer = counted  # type: ignore[assignment]

    wide = Wide()
    for stretch in stretches(document(*[f"word {n} and more" for n in range(30)]), wide):
        assert sum(count(r.text) + 10 for r in stretch.references) <= wide.window
