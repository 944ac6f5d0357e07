"""Splitting loses nothing, stays within the length and starts anew at paragraphs; overlap is what Eq. 6 says."""

import random
import time
from pathlib import Path

import pytest
from fakes import CORPUS, count, tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memory3.spec import Reference, SourceError
from memory3.splitting import overlap, references, split

TEXTS = st.one_of(
    st.text(max_size=300),
    st.lists(
        st.sampled_from([*CORPUS, "# Title\n\n", "\n\n", "\r\n\r\n", "日本語。", "x" * 90, "\x1c \u2028", "- item\n"])
    ).map("".join),
)


def read(*sources: Path | str, **options: object) -> list[Reference]:
    return list(references(list(sources), tokenizer(), **options))  # type: ignore[arg-type]


def paragraph(seed: int, sentences: int = 3) -> str:
    words = ["bank", "tower", "river", "rain", "memory", "morning", "cat", "paper", "record", "stone"]
    return " ".join(" ".join(random.Random(f"{seed} {i}").choices(words, k=7)).capitalize() + "." for i in range(sentences))


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(6, 40), st.booleans())
@example("a" * 700 + " b", 8, False)
@example("\ufeff\x00\x01 \x85", 8, True)
def test_references_cover_the_text_in_order_within_the_length(text: str, length: int, markdown: bool) -> None:
    end = 0
    for reference in split(text, tokenizer(), "s", length, markdown=markdown):
        assert reference.text == text[reference.start : reference.end]
        assert reference.text.strip()
        assert count(reference.text) <= length
        assert reference.start >= end
        assert not text[end : reference.start].strip()
        end = reference.end
    assert not text[end:].strip()


def test_a_note_that_fits_is_one_reference() -> None:
    note = f"# The Eiffel Tower\n\n{CORPUS[0]}\n\n# More\n\nSource: a book about Paris\n"
    [reference] = split(note, tokenizer(), "eiffel.md", count(note.strip()), markdown=True)
    assert (reference.text, reference.source, reference.start) == (note.strip(), "eiffel.md", 0)


def test_a_text_is_cut_at_sentences() -> None:
    for reference in split(paragraph(1, 40), tokenizer(), length=60):
        assert reference.text.endswith(".")


def test_editing_one_paragraph_changes_few_references() -> None:
    paragraphs = [paragraph(seed, 2) for seed in range(60)]
    before = {r.id for r in split("\n\n".join(paragraphs), tokenizer(), length=128)}
    changed = []
    for place in range(0, 60, 5):
        edited = [*paragraphs[:place], "A new beginning. And more words.", *paragraphs[place:]]
        changed.append(len({r.id for r in split("\n\n".join(edited), tokenizer(), length=128)} - before))
    assert len(before) > 20
    assert sum(changed) / len(changed) < 3.5


def test_a_heading_starts_a_new_reference_together_with_what_follows() -> None:
    text = f"{paragraph(1, 1)}\n\n{paragraph(2, 1)}\n\n# Next\n\n{paragraph(3, 6)}"
    for length in (60, 100, 150):
        found = split(text, tokenizer(), length=length, markdown=True)
        assert any(r.text.startswith("# Next\n\nMorning") for r in found)


def test_where_library_and_tokenizer_disagree_our_own_count_decides() -> None:
    class Strict:
        """Counts three tokens for one, while the library asks the tokenizer underneath."""

        backend_tokenizer = tokenizer().backend_tokenizer

        def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [ids * 3 for ids in tokenizer()(texts, **options)["input_ids"]]}

    found = split(paragraph(1, 20), Strict(), length=30)
    assert all(3 * count(r.text) <= 30 for r in found)
    assert "".join("".join(r.text for r in found).split()) == "".join(paragraph(1, 20).split())


def test_long_text_without_spaces_takes_linear_time() -> None:
    started = time.perf_counter()
    found = split("日本語" * 8000, tokenizer(), length=128)
    assert "".join(r.text for r in found) == "日本語" * 8000
    assert time.perf_counter() - started < 4


def test_a_character_that_cannot_fit_and_a_lone_surrogate_are_refused() -> None:
    with pytest.raises(SourceError, match="more than 1 tokens"):
        split("日", tokenizer(), length=1)
    with pytest.raises(SourceError, match="lone surrogate at character 1"):
        split("a\ud800", tokenizer())


def slow_lcs(a: list[int], b: list[int]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        row = _next_row(row, x, b)
    return row[-1]


def _next_row(row: list[int], x: int, b: list[int]) -> list[int]:
    new = [0]
    for j, y in enumerate(b):
        new.append(row[j] + 1 if x == y else max(row[j + 1], new[j]))
    return new


def slow_overlap(t: list[int], r: list[int]) -> float:
    windows = (t[start : start + 2 * len(r)] for start in range(len(t)))
    return max((slow_lcs(window, r) for window in windows), default=0) / len(r) if r else 0.0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40), st.lists(st.integers(0, 5), max_size=12))
def test_overlap_equals_the_obvious_algorithm(t: list[int], r: list[int]) -> None:
    assert overlap(t, r) == slow_overlap(t, r)


@pytest.mark.parametrize("size", [63, 64, 65, 128, 130])
@pytest.mark.parametrize("kinds", [2, 40])
def test_overlap_carries_over_machine_words(size: int, kinds: int) -> None:
    source = random.Random(size)
    t, r = ([source.randrange(kinds) for _ in range(n)] for n in (size + 60, size))
    assert overlap(t, r) == slow_overlap(t, r)


def test_a_copied_reference_overlaps_wholly_and_a_scattered_one_does_not() -> None:
    r = list(range(1, 65))
    assert overlap([0] * 500 + r + [0] * 500, r) == 1.0
    assert overlap([x for token in r for x in (token, 0, 0, 0)], r) == 0.5


def test_overlap_of_a_full_sequence_is_quick() -> None:
    source = random.Random(0)
    t, r = ([source.randrange(300) for _ in range(n)] for n in (2048, 128))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        overlap(t, r)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.05
