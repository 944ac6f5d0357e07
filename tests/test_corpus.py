"""Text is tokenised once, cached whole or not at all, and the cache is used only where nothing changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families import tiny_tokenizer

import memory3.train.corpus
from memory3.spec import SourceError
from memory3.train.corpus import Corpus, hub_name, tokenised
from memory3.train.loop import TrainError

TEXTS = ["One fox.", "Two dogs, and a cat.", "Three."]
END = tiny_tokenizer().eos_token_id


def ids_of(text: str) -> list[int]:
    return [*tiny_tokenizer()(text, add_special_tokens=False)["input_ids"], END]


@dataclass(frozen=True)
class Trap:
    """Makes a folder when it is unpickled."""

    place: Path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.place),)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    file = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": TEXTS, "body": TEXTS[::-1]}), file)
    return file


@pytest.fixture
def count_tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is tokenised for a corpus."""
    seen: list[str] = []
    original = memory3.train.corpus._tokenised

    def noted(texts: Any, *rest: Any) -> Iterator[Any]:
        def each() -> Iterator[str]:
            for text in texts:
                seen.append(text)
                yield text

        return original(each(), *rest)

    monkeypatch.setattr(memory3.train.corpus, "_tokenised", noted)
    return seen


def test_documents_are_joined_by_the_end_token_and_a_corpus_on_disk_says_what_one_in_memory_says(
    parquet: Path, tmp_path: Path
) -> None:
    disk, memory = tokenised(parquet, tiny_tokenizer(), tmp_path / "cache"), Corpus.of_texts(TEXTS, tiny_tokenizer())
    assert isinstance(disk.ids, np.memmap) and disk.ids.dtype == np.uint16
    for corpus in (disk, memory):
        assert corpus.ids.tolist() == [i for text in TEXTS for i in ids_of(text)]
        assert [corpus.document(n) for n in range(corpus.documents)] == [ids_of(text) for text in TEXTS]


def test_a_large_vocabulary_takes_four_bytes() -> None:
    class Large:
        eos_token_id = None
        bos_token_id = None

        def get_vocab(self) -> dict[str, int]:
            return {"a": 3, "z": 70_000}

        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[3, 70_000] for _ in texts]}

    corpus = Corpus.of_texts(["a z"], Large())
    assert corpus.ids.dtype == np.int32 and corpus.ids.tolist() == [3, 70_000]


def test_rows_are_packed_and_each_knows_the_documents_that_it_spans() -> None:
    corpus = Corpus.of_texts(TEXTS, tiny_tokenizer())
    lengths = [len(ids_of(text)) for text in TEXTS]  # 9, 21, 7
    assert lengths == [9, 21, 7]
    assert corpus.rows(10) == 3
    assert [row for n in range(3) for row in corpus.row(n, 10)] == corpus.ids[:30].tolist()
    assert [corpus.documents_of(10 * n, 10 * n + 10) for n in range(3)] == [range(0, 2), range(1, 2), range(1, 2)]
    assert corpus.documents_of(0, 9) == range(0, 1)
    assert corpus.documents_of(9, 10) == range(1, 2)
    assert corpus.documents_of(8, 31) == range(0, 3)


def test_text_lines_files_folders_and_hub_datasets_give_the_same_tokens(parquet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for n, text in enumerate(TEXTS):
        (folder / f"{n}.txt").write_text(text)
    lines = tmp_path / "hub" / "train.jsonl"
    lines.parent.mkdir()
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    several = [folder / "0.txt", folder / "1.txt", folder / "2.txt"]
    wanted = [i for text in TEXTS for i in ids_of(text)]
    for source in (parquet, folder, lines, several, f"hub:{lines.parent}", [f"hub:{lines.parent}@train"]):
        assert tokenised(source, tiny_tokenizer(), tmp_path / "cache").ids.tolist() == wanted, source


def test_what_did_not_change_is_not_tokenised_again_and_what_changed_is(
    parquet: Path, tmp_path: Path, count_tokenised: list[str]
) -> None:
    cache = tmp_path / "cache"

    def fresh(**options: Any) -> int:
        count_tokenised.clear()
        tokenised(parquet, tiny_tokenizer(), cache, **options)
        return len(count_tokenised)

    assert [fresh(), fresh()] == [3, 0]
    assert [fresh(text_field="body"), fresh(text_field="body")] == [3, 0]
    stat = parquet.stat()
    os.utime(parquet, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert [fresh(), fresh()] == [3, 0]
    count_tokenised.clear()
    tokenised(parquet, tiny_tokenizer(bos=False), cache)
    assert len(count_tokenised) == 3


def test_a_hub_dataset_that_changed_is_tokenised_again(tmp_path: Path, count_tokenised: list[str]) -> None:
    file = tmp_path / "hub" / "train.jsonl"
    file.parent.mkdir()
    for text in ("first", "second"):
        file.write_text(json.dumps({"text": text}) + "\n")
        os.utime(file, (1, len(text)))
        corpus = tokenised(f"hub:{file.parent}", tiny_tokenizer(), tmp_path / "cache")
        assert corpus.document(0) == ids_of(text)
    assert count_tokenised == ["first", "second"]


def test_text_is_streamed_and_progress_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory3.train.corpus, "_AT_ONCE", 2)
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(5)))
    told: list[tuple[int, int | None]] = []
    corpus = tokenised(file, tiny_tokenizer(), tmp_path / "cache", tell=lambda done, total: told.append((done, total)))
    assert told == [(2, None), (4, None), (5, None)]
    assert [corpus.document(n) for n in range(5)] == [ids_of(f"text {n}") for n in range(5)]


def test_a_failure_leaves_nothing_and_unreadable_rows_can_be_left_out(tmp_path: Path) -> None:
    file, cache = tmp_path / "lines.jsonl", tmp_path / "cache"
    file.write_text('{"text": "good"}\n{"other": 1}\n')
    with pytest.raises(SourceError, match="lines.jsonl:2 has no text"):
        tokenised(file, tiny_tokenizer(), cache)
    assert [p.name for p in cache.iterdir()] == ["lock"]
    left_out: list[SourceError] = []
    assert tokenised(file, tiny_tokenizer(), cache, on_unreadable=left_out.append).documents == 1
    assert len(left_out) == 1
    with pytest.raises(SourceError, match="lines.jsonl:2 has no text"):  # what left rows out is not taken for the whole
        tokenised(file, tiny_tokenizer(), cache)


def test_what_a_kill_left_is_made_anew(parquet: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    whole = tokenised(parquet, tiny_tokenizer(), cache)
    (cache / whole.key / "corpus.json").unlink()
    (cache / f"{whole.key}.new").mkdir()
    (cache / f"{whole.key}.new" / "ids.npy").write_bytes(b"half")
    assert tokenised(parquet, tiny_tokenizer(), cache).ids.tolist() == whole.ids.tolist()
    assert sorted(p.name for p in cache.iterdir()) == sorted([whole.key, "lock"])


def test_a_damaged_cache_is_refused_and_never_unpickled(parquet: Path, tmp_path: Path) -> None:
    corpus = tokenised(parquet, tiny_tokenizer(), tmp_path / "cache")
    assert corpus.folder is not None
    np.save(corpus.folder / "ids.npy", np.zeros(3, np.uint16))
    with pytest.raises(TrainError, match="found a damaged corpus"):
        tokenised(parquet, tiny_tokenizer(), tmp_path / "cache")
    trap = [Trap(tmp_path / "sprung")] * len(corpus.ids)
    np.save(corpus.folder / "ids.npy", np.array(trap, object), allow_pickle=True)
    with pytest.raises(TrainError, match="found a damaged corpus"):
        tokenised(parquet, tiny_tokenizer(), tmp_path / "cache")
    assert not (tmp_path / "sprung").exists()


def test_sources_that_cannot_be_read_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"text": null, "title": "a"}\n')
    for source, found in {
        str(tmp_path / "none.txt"): "no file or folder",
        str(tmp_path / "empty.txt"): "found no text",
        "-": "stdin",
        "hub:": "expected the name of a dataset",
        f"hub:{tmp_path / 'nowhere'}": "cannot be read",
        f"hub:{tmp_path / 'hub'}": "row 1 has no text in 'text'",
        f"hub:{tmp_path / 'hub'}@test": "cannot be read",
    }.items():
        with pytest.raises(SourceError, match=found):
            tokenised(source, tiny_tokenizer(), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_refused(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="cannot be written"):
        tokenised(parquet, tiny_tokenizer(), tmp_path / "file" / "cache")


def test_names_of_hub_datasets() -> None:
    assert hub_name("hub:a/b") == ("a/b", None, None)
    assert hub_name("hub:a/b:c@test[:10%]") == ("a/b", "c", "test[:10%]")
