"""Is the right reference found? Recall, rank and cost of every retriever on dev questions over all passages."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory3.catalogue import FOLDER, Catalogue, Entry, Hit
from memory3.decoder import Decoder
from memory3.embedding import Embedder, VectorSpace
from memory3.evaluate.reading import QUESTIONS, document_of, table_rows
from memory3.identity import tokenizer_fingerprint
from memory3.retrieval import RETRIEVERS, Retriever
from memory3.scoring import interval
from memory3.spec import Memory, Reference, SourceError, SpecError
from memory3.splitting import split
from memory3.tables import VECTOR

DEPTH = 20
"""Hits of a question that are looked at."""
TOGETHER = ("squad", "popqa", "simplequestions")
"""Datasets whose questions can be answered from one passage and name what they ask for."""
COUNTED = "build.json"
"""What tables were made from and how far they are: fingerprint of the texts, texts done, and CPU seconds of each part."""
_MOST_HELD = 20_000
_AT_ONCE = 1024
_QUESTIONS_AT_ONCE = 64

Tell = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Question:
    """A dev question, its accepted answers, and the document that answers it."""

    dataset: str
    text: str
    answers: tuple[str, ...]
    document: str

    def is_answered_by(self, text: str) -> bool:
        """Whether an answer stands in a text, whatever the case; a yes or no question is content with its passage."""
        return self.dataset == "boolq" or any(answer.lower() in text.lower() for answer in self.answers)


@dataclass(frozen=True)
class Found:
    """Rank of the first right reference of each question (0: not among the first `DEPTH`), and what searching cost.

    Args:
        retriever: row of `RETRIEVERS`.
        dataset: of the questions.
        ranks: one per question, from 1.
        seconds: wall time of all searches, with embedding the questions.
        build_seconds: CPU time of making what it searches: vectors, indexes.
        index_bytes: of what it searches, beside the texts.
    """

    retriever: str
    dataset: str
    ranks: tuple[int, ...]
    seconds: float
    build_seconds: float
    index_bytes: int

    def recall(self, k: int) -> list[float]:
        """For each question 1 where a right reference is among the first `k`."""
        return [float(0 < rank <= k) for rank in self.ranks]

    def row(self) -> str:
        """A row of a Markdown table."""
        reciprocal = [1 / rank if rank else 0.0 for rank in self.ranks]
        cells = [_with_interval(self.recall(k)) for k in (1, 5, DEPTH)] + [_with_interval(reciprocal)]
        rate = f"{len(self.ranks) / self.seconds:.0f}" if self.seconds else "-"
        cost = f"{rate} | {self.index_bytes / 2**20:.0f} | {self.build_seconds:.0f}"
        return f"| {self.retriever} | {self.dataset} | {len(self.ranks)} | {' | '.join(cells)} | {cost} |"


HEADER = (
    "| retriever | questions of | n | recall@1 | recall@5 | recall@20 | MRR@20 | questions/s | index, MiB | build, CPU s |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def _with_interval(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{sum(values) / len(values):.3f} [{low:.3f}, {high:.3f}]"


def documents_and_questions(data: Path, of: str = "dev") -> tuple[dict[str, str], list[Question]]:
    """All passages and the distinct passages of the questions, by name; and the questions of a split."""
    asked = table_rows(data / "qa.parquet", (*QUESTIONS, "key"))
    documents: dict[str, str] = {}
    for row in table_rows(data / "passages.parquet", ("key", "title", "text")):
        documents[row["key"]] = document_of(row["title"], row["text"])
    named = {text: name for name, text in documents.items()}
    questions = []
    for n, row in enumerate(asked):
        text = document_of(row["title"], row["passage"])
        name = row["key"] if row["key"] in documents else named.get(text)
        if name is None:
            name = named[text] = f"qa/{n}"
            documents[name] = text
        if row["split"] == of:
            answers = tuple(answer.strip() for answer in row["answers"] if answer.strip())
            questions.append(Question(row["dataset"], row["question"].strip(), answers, name))
    return documents, questions


def built(
    documents: dict[str, str], tokenizer: Any, length: int, work: Path, embedder: Embedder, tell: Tell
) -> tuple[Catalogue, dict[str, Any]]:
    """The texts as references in tables with vectors and a full-text index, and CPU seconds of each; goes on where it stopped.

    Raises:
        SourceError: `work` has tables of other texts, or of references cut by another tokenizer or to another length.
        SpecError: it has vectors of another embedder.
    """
    spent = _begun(work, fingerprint(documents, tokenizer, length))
    catalogue = Catalogue(work / FOLDER, create=not (work / FOLDER).exists(), space=VectorSpace.of(embedder))
    _check_space(catalogue, embedder, work)
    names = list(documents)
    for start in range(int(spent["done"]), len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        references = list(references_of(documents, some, tokenizer, length))
        _add(catalogue, references, embedder, spent)
        spent["done"] = start + len(some)
        _note(work, spent)
        tell(start + len(some), len(names))
    if not spent["lexical"]:
        began = time.process_time()
        catalogue.index_words()
        spent["lexical"] = time.process_time() - began
        began = time.process_time()
        catalogue.optimise()
        spent["dense"] += time.process_time() - began
        _note(work, spent)
    return catalogue, spent


def whole_tables(work: Path, embedder: Embedder, texts: str | None = None) -> Catalogue:
    """The tables that `built` finished, for whoever measures on them.

    Args:
        work: their folder.
        embedder: whose vectors they must have.
        texts: `fingerprint` of what they must be made from; `None` takes any.

    Raises:
        SourceError: there are none, they are not finished, or they are of something else.
        SpecError: they have vectors of another embedder.
    """
    if not (work / FOLDER).is_dir():
        raise SourceError(f"found no tables in {work}, expected those of memory3 eval retrieval: run it first")
    spent = _noted(work, texts)
    if not spent["lexical"]:
        raise SourceError(f"found tables in {work} that stop at text {spent['done']}: run memory3 eval retrieval again first")
    catalogue = Catalogue(work / FOLDER)
    _check_space(catalogue, embedder, work)
    return catalogue


def fingerprint(documents: dict[str, str], tokenizer: Any, length: int) -> str:
    """Of texts and how they are cut into references: 32 hex digits."""
    digest = hashlib.blake2b(f"{tokenizer_fingerprint(tokenizer)} {length}".encode(), digest_size=16)
    for name, text in documents.items():
        digest.update(json.dumps([name, text]).encode())
    return digest.hexdigest()


def _begun(work: Path, texts: str) -> dict[str, Any]:
    """What was noted of tables of these texts, or the note of new ones."""
    if not (work / FOLDER).exists():
        work.mkdir(parents=True, exist_ok=True)
        _note(work, {"texts": texts, "dense": 0.0, "lexical": 0.0, "done": 0})
    return _noted(work, texts)


def _noted(work: Path, texts: str | None) -> dict[str, Any]:
    try:
        spent = json.loads((work / COUNTED).read_text("utf-8"))
        of, _, _ = spent["texts"], spent["lexical"], spent["done"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SourceError(
            f"found tables in {work} without a note of what they were made from, expected it in {COUNTED}: give another --work"
        ) from None
    if texts not in (None, of):
        raise SourceError(
            f"found tables in {work} of other texts, another tokenizer or another reference length, expected those of this "
            "--data and --model: give another --work"
        )
    return dict(spent)


def _note(work: Path, spent: dict[str, Any]) -> None:
    unfinished = (work / COUNTED).with_suffix(".new")
    unfinished.write_text(json.dumps(spent), "utf-8")
    unfinished.replace(work / COUNTED)


def _check_space(catalogue: Catalogue, embedder: Embedder, work: Path) -> None:
    if not VectorSpace.of(embedder).same_as(catalogue.space):
        raise SpecError(
            f"{work} has vectors of another embedder than {embedder.name}, expected a folder of its own: give --work"
        )


def references_of(documents: dict[str, str], names: Sequence[str], tokenizer: Any, length: int) -> Iterator[Reference]:
    """References of some documents, in order."""
    for name in names:
        for piece in split(documents[name], tokenizer, length=length):
            yield Reference(piece.text, name, piece.start, piece.end)


def _add(catalogue: Catalogue, references: Sequence[Reference], embedder: Embedder, spent: dict[str, Any]) -> None:
    known = catalogue.locate(reference.id for reference in references)
    new = list({r.id: r for r in references if r.id not in known}.values())
    new.sort(key=lambda reference: len(reference.text))
    if new:
        began = time.process_time()
        vectors = embedder.embed([reference.text for reference in new])
        spent["dense"] += time.process_time() - began
        catalogue.add_memories([Entry(r, 1, (0, 0), vector) for r, vector in zip(new, vectors, strict=True)])
    catalogue.add_spans(references)


class Tables:
    """The tables with an embedder and a decoder, searched as a bank is; memories are encoded when they are first read."""

    def __init__(self, catalogue: Catalogue, embedder: Embedder, decoder: Decoder) -> None:
        self.catalogue, self.embedder, self.decoder, self.space = catalogue, embedder, decoder, catalogue.space
        self.encoded: dict[str, Memory] = {}
        self.vectors_missing = 0
        self.seconds = 0.0

    def search(self, query: str, k: int) -> list[Hit]:
        """By the words."""
        return self.catalogue.search(query, k)

    def nearest(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """By the vectors."""
        return self.catalogue.nearest(self.embedder.embed(queries, query=True), k)

    def unwritten(self, ids: Iterable[str]) -> list[str]:
        """None: what a bank would have is encoded when it is read."""
        return []

    def read(self, ids: Sequence[str]) -> list[Memory]:
        """Memories; a bank has them, so the time of encoding does not count as searching."""
        began = time.perf_counter()
        new = [id for id in ids if id not in self.encoded]
        texts = {id: spans[0].text for id, spans in self.catalogue.references(new).items()}
        for start in range(0, len(new), 64):
            some = new[start : start + 64]
            self.encoded.update(zip(some, self.decoder.encode([texts[id] for id in some]), strict=True))
        found = [self.encoded[id] for id in ids]
        if len(self.encoded) > _MOST_HELD:
            self.encoded.clear()
        self.seconds += time.perf_counter() - began
        return found


def ranks(
    retriever: Retriever, questions: Sequence[Question], right: Sequence[set[str]], tell: Tell | None = None
) -> tuple[list[int], float]:
    """Rank of the first right reference of each question, and the seconds of searching."""
    found, seconds = [], 0.0
    for start in range(0, len(questions), _QUESTIONS_AT_ONCE):
        some = questions[start : start + _QUESTIONS_AT_ONCE]
        began = time.perf_counter()
        encoding = retriever.bank.seconds if isinstance(retriever.bank, Tables) else 0.0
        hits = retriever.search([question.text for question in some], DEPTH)
        seconds += time.perf_counter() - began
        seconds -= retriever.bank.seconds - encoding if isinstance(retriever.bank, Tables) else 0.0
        for n, row in enumerate(hits, start):
            found.append(next((rank for rank, hit in enumerate(row, 1) if hit.id in right[n]), 0))
        if tell:
            tell(len(found), len(questions))
    return found, seconds


def right_references(questions: Sequence[Question], documents: dict[str, str], tokenizer: Any, length: int) -> list[set[str]]:
    """For each question the ids of those references of its document that hold an answer."""
    return [
        {r.id for r in references_of(documents, [q.document], tokenizer, length) if q.is_answered_by(r.text)} for q in questions
    ]


def measure_retrieval(
    decoder: Decoder, data: Path, work: Path, embedder: Embedder, names: Sequence[str] | None, limit: int, tell: Tell
) -> list[Found]:
    """Print a Markdown table: a row per retriever and dataset, and one for the datasets of `TOGETHER`.

    A retriever that reads memories (`internal`) is asked `limit` questions of each dataset only, beside `lexical`: here the memories
    of its candidates are encoded on the way.
    """
    unknown = set(names or ()) - set(RETRIEVERS)
    if unknown:
        raise SpecError(f"found retriever {min(unknown)!r}, expected one of {', '.join(RETRIEVERS)}")
    tokenizer, length = decoder.tokenizer, decoder.spec.reference_length
    documents, questions = documents_and_questions(data)
    catalogue, spent = built(documents, tokenizer, length, work, embedder, tell)
    right = right_references(questions, documents, tokenizer, length)
    asked = [n for n, references in enumerate(right) if references]
    questions, right = [questions[n] for n in asked], [right[n] for n in asked]
    print(
        f"{len(documents):,} documents, {len(catalogue):,} references of at most {length} tokens, {len(questions):,} questions"
    )
    print(HEADER)
    rows = []
    sizes = index_bytes(catalogue)
    for name in names or RETRIEVERS:
        kinds = RETRIEVERS[name].searches
        size, build = sum(sizes[kind] for kind in kinds), sum(spent[kind] for kind in kinds)
        warm = RETRIEVERS[name](Tables(catalogue, embedder, decoder))
        warm.search([question.text for question in questions[:8]], DEPTH)
        asked = _some_of(questions, limit) if RETRIEVERS[name].reads_memories else list(range(len(questions)))
        some, wanted = [questions[n] for n in asked], [right[n] for n in asked]
        ways = {name: warm}
        if len(some) < len(questions):
            ways = {"lexical, the same questions": RETRIEVERS["lexical"](warm.bank), name: warm}
        for way, retriever in ways.items():
            of, seconds = ranks(retriever, some, wanted, tell)
            for label, chosen in _groups(some):
                part = tuple(rank for rank, there in zip(of, chosen, strict=True) if there)
                rows.append(Found(way, label, part, seconds * len(part) / len(of), build, size))
                print(rows[-1].row(), flush=True)
    return rows


def _some_of(questions: Sequence[Question], limit: int) -> list[int]:
    """Up to `limit` questions of each dataset, chosen by a fixed seed, in order."""
    places = list(range(len(questions)))
    random.Random(0).shuffle(places)
    taken: dict[str, list[int]] = {}
    for place in places:
        some = taken.setdefault(questions[place].dataset, [])
        if len(some) < limit:
            some.append(place)
    return sorted(place for some in taken.values() for place in some)


def _groups(questions: Sequence[Question]) -> Iterator[tuple[str, list[bool]]]:
    for name in sorted({question.dataset for question in questions}):
        yield name, [question.dataset == name for question in questions]
    together = [question.dataset in TOGETHER for question in questions]
    if any(together):
        yield " + ".join(TOGETHER), together


def index_bytes(catalogue: Catalogue) -> dict[str, int]:
    """Bytes of what each kind of search reads: the full-text index; the vectors and their index."""
    space = catalogue.space
    assert space is not None
    indexes = catalogue.index_bytes()
    return {"lexical": indexes.get("text", 0), "dense": 2 * space.dimension * len(catalogue) + indexes.get(VECTOR, 0)}
