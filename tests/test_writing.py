"""Writing encodes each content once, in batches of similar length, and goes on after a stop."""

from pathlib import Path

import pytest
from fakes import FakeDecoder, count, same, tokenizer

from memory3 import writing
from memory3.bank import Bank
from memory3.spec import BankError, BankMismatch, Memory, Reference, SourceError
from memory3.splitting import references
from memory3.verifying import traces_of
from memory3.writing import WriteReport, write


def many(number: int) -> list[Reference]:
    return [Reference("word " * (1 + i % 7) + str(i), "list", i, i + 1) for i in range(number)]


def test_equal_content_is_encoded_once_within_a_write_and_across_writes(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    twice = [
        Reference("one", "a", 0, 3),
        Reference("two", "a", 4, 7),
        Reference("one", "a", 8, 11),
        Reference("one", "a", 0, 3),
    ]
    report = write(decoder, twice, bank)
    assert (report.references, report.skipped) == (2, 2)
    assert report.bytes == 2 * report.bytes_per_reference == bank.stats()["shard_bytes"]
    report = write(decoder, [*twice, Reference("two", "b", 0, 3), Reference("new", "b", 4, 7)], bank)
    assert (report.references, report.skipped) == (1, 5)
    assert sorted(decoder.encoded) == ["new", "one", "two"]
    assert bank.sources() == {"a": 3, "b": 2}


def test_a_changed_document_replaces_only_the_references_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is asked to; otherwise what is stale is counted. Windows and the order of references do not matter."""
    monkeypatch.setattr(writing, "WINDOW", 2)
    decoder = FakeDecoder()
    bank = Bank(tmp_path / "bank", decoder, create=True)
    file, other = tmp_path / "notes.md", tmp_path / "other.md"

    def again(*sources: Path, update: bool = False) -> WriteReport:
        read: list[str] = []
        return write(decoder, references(sources, decoder, on_read=read.append), bank, read=read, update=update)

    paragraphs = [f"Paragraph {n} says something else." for n in range(6)]
    file.write_text("\n\n".join(paragraphs))
    other.write_text(paragraphs[2])
    assert again(file, other).stale == 0
    places, shared = bank.places(), Reference(paragraphs[2]).id
    paragraphs[2:4] = ["A newer paragraph says more."]
    file.write_text("\n\n".join(paragraphs))
    now = list(references(file, decoder))
    first = again(file)
    assert first.references == 1
    assert first.stale > 0
    assert first.removed == 0
    assert len(bank) == 7
    report = again(file, other, update=True)
    assert (report.references, report.stale, report.removed) == (
        0,
        0,
        1,
    )  # of the two that went, one stands in another document
    assert {id for id in bank.ids() if id != shared} == {r.id for r in now}
    assert set(bank.spans_of([str(file)])) == {(r.id, r.source, r.start, r.end) for r in now}
    assert shared in bank
    assert all(bank.places()[id] == place for id, place in places.items() if id in bank)
    assert traces_of(bank, "Paragraph 3") == []
    assert write(decoder, now[:1], bank, update=True).removed == 0  # nothing was read to its end, nothing is stale


def test_what_an_emptied_file_or_a_lost_row_said_is_stale_and_what_could_not_be_read_is_not(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path / "bank", decoder, create=True)
    rows, text = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    rows.write_text('{"text": "first row"}\n{"text": "second row"}\n{"text": "third row"}\n')
    text.write_text("some words")

    def again() -> WriteReport:
        read: list[str] = []
        errors: list[SourceError] = []
        found = references([rows, text], decoder, on_read=read.append, on_unreadable=errors.append)
        return write(decoder, found, bank, read=read, update=True)

    assert (again().references, len(bank)) == (4, 4)
    rows.write_text('{"text": "first row"}\nno JSON at all\n')
    text.write_text("")
    assert again().removed == 1  # the file with the broken row keeps everything
    rows.write_text('{"text": "first row"}\n{"text": "third row"}\n')
    assert again().removed == 1
    assert {spans[0].text for spans in bank.references(bank.ids()).values()} == {"first row", "third row"}


@pytest.mark.parametrize("size", [1, 3, 64])
def test_batch_size_changes_nothing_that_is_stored(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "WINDOW", 10)
    monkeypatch.setattr(writing, "REFRESHED", 20)
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    write(decoder, iter(many(33)), bank, batch_size=size)
    assert max(decoder.batches) <= size
    stored = bank.read([r.id for r in many(33)])
    assert all(same(a, b) for a, b in zip(stored, decoder.encode([r.text for r in many(33)]), strict=True))
    assert bank.references([many(33)[9].id]) == {many(33)[9].id: [many(33)[9]]}


def test_a_byte_budget_stops_a_write_before_it_is_exceeded(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    limit = bank.total_bytes() + 60_000
    with pytest.raises(BankError, match=r"expected at most .* in all: \d+ new references were written, the rest was not"):
        write(decoder, many(60), bank, batch_size=4, max_bytes=limit)
    assert 0 < len(bank) < 60
    assert bank.total_bytes() <= limit
    assert len(decoder.encoded) == len(bank)  # nothing was encoded in vain
    held = len(bank)
    assert write(decoder, many(60), bank, batch_size=4, max_bytes=10**9).references == 60 - held


def test_batches_hold_texts_of_similar_length(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    write(decoder, many(40), Bank(tmp_path, decoder, create=True), batch_size=4)
    lengths = [count(text) for text in decoder.encoded]
    assert lengths == sorted(lengths)


def test_after_a_stop_writing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Stopping(FakeDecoder):
        def encode(self, texts: list[str]) -> list[Memory]:  # type: ignore[override]
            if len(self.batches) == 3:
                raise KeyboardInterrupt
            return super().encode(texts)

    stopping, going_on = Stopping(), FakeDecoder()
    with pytest.raises(KeyboardInterrupt):
        write(stopping, many(30), Bank(tmp_path, stopping, create=True), batch_size=5)
    bank = Bank(tmp_path, going_on)
    assert len(bank) == 15
    assert write(going_on, many(30), bank, batch_size=5).references == 15
    assert set(stopping.encoded).isdisjoint(going_on.encoded)
    assert bank.missing(r.id for r in many(30)) == []


def test_progress_counts_up_to_the_total_where_it_is_known(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    for stream, total in ((many(20), 20), (iter(many(20)), None)):
        seen: list[tuple[int, int | None]] = []
        write(decoder, stream, bank, batch_size=8, on_progress=lambda *now, seen=seen: seen.append(now))
        assert seen == sorted(seen, key=lambda now: now[0])
        assert seen[-1] == (20, total)


def test_nothing_to_write_is_no_error(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    report = write(decoder, [], Bank(tmp_path, decoder, create=True))
    assert (report.references, report.skipped, report.bytes) == (0, 0, 0)


def test_a_bank_of_another_model_or_in_use_is_refused(tmp_path: Path) -> None:
    decoder = FakeDecoder()
    bank = Bank(tmp_path, decoder, create=True)
    with pytest.raises(BankMismatch, match="weights"):
        write(FakeDecoder(weights="00" * 32), many(1), bank)
    with bank.exclusive(), pytest.raises(BankError, match="another process"):
        write(decoder, many(1), Bank(tmp_path, decoder))


def test_nobody_else_writes_between_two_batches(tmp_path: Path) -> None:
    decoder, refused = FakeDecoder(), []
    bank, other = Bank(tmp_path, decoder, create=True), Bank(tmp_path, decoder)

    def intrude(done: int, total: int | None) -> None:
        with pytest.raises(BankError, match="another process"):
            other.refresh()
        refused.append(done)

    write(decoder, many(4), bank, batch_size=2, on_progress=intrude)
    assert refused == [2, 4, 4]


def test_documents_become_memories_that_are_found_again(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/tower.md").write_text("# Tower\n\nThe tower of Vell has 213 steps.\n")
    (tmp_path / "notes/river.txt").write_text("The river Umba freezes in May.")
    decoder = FakeDecoder()
    with Bank(tmp_path / "bank", decoder, create=True) as bank:
        write(decoder, references(tmp_path / "notes", tokenizer(), length=32), bank)
        [hit] = bank.search("How many steps has the tower?", 1)
        [reference] = bank.references([hit.id])[hit.id]
    assert reference.source.endswith("tower.md")
    text = Path(reference.source).read_text()
    assert text[reference.start : reference.end] == reference.text
