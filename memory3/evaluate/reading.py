"""Does the model read? Exact match and F1 on dev questions whose gold reference is in memory among four others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

from memory3.answering import question_prompt
from memory3.decoder import Decoder
from memory3.evaluate.outcomes import Outcome
from memory3.generation import Prompt, complete
from memory3.recall import Recalled
from memory3.retrieval import Hit
from memory3.scoring import exact_match, f1, interval
from memory3.spec import Memory, Reference, SourceError
from memory3.splitting import split

OTHERS = 4
"""Wrong references beside the gold one."""
BATCH = 32
NEW_TOKENS = 24
"""Most tokens of an answer."""
SLOTS = (8, 16, 32, 48, 64, None)


@dataclass(frozen=True)
class Case:
    """A question, its accepted answers, its gold reference, others that do not hold the answer, and what stands before gold."""

    dataset: str
    question: str
    answers: tuple[str, ...]
    gold: str
    others: tuple[str, ...]
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """Exact match and F1 of each question under one format; means and their 95 % bootstrap intervals."""

    name: str
    exacts: tuple[float, ...]
    f1s: tuple[float, ...]

    @property
    def count(self) -> int:
        """Questions."""
        return len(self.exacts)

    @property
    def exact(self) -> float:
        """Mean exact match."""
        return sum(self.exacts) / self.count

    @property
    def f1(self) -> float:
        """Mean F1."""
        return sum(self.f1s) / self.count

    @cached_property
    def exact_interval(self) -> tuple[float, float]:
        """Of the mean exact match."""
        return interval(self.exacts)

    @cached_property
    def f1_interval(self) -> tuple[float, float]:
        """Of the mean F1."""
        return interval(self.f1s)

    def part(self, name: str, chosen: Sequence[bool]) -> Score:
        """The score of some of the questions."""
        return Score(name, tuple(compress(self.exacts, chosen)), tuple(compress(self.f1s, chosen)))

    def outcome(self, references: float = 0.0) -> Outcome:
        """As a row beside others; `references` is what a question reads."""
        return Outcome(self.name, references, {"exact match": self.exacts, "f1": self.f1s})

    def row(self) -> str:
        """A row of a Markdown table, in percent."""
        cells = [
            f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            for mean, (low, high) in ((self.exact, self.exact_interval), (self.f1, self.f1_interval))
        ]
        return f"| {self.name} | {self.count} | {cells[0]} | {cells[1]} |"


def dev_cases(decoder: Decoder, data: Path, limit: int, seed: int = 0, inside: bool = False) -> list[Case]:
    """Dev questions of `qa.parquet` (boolq apart) whose answer stands in a reference of at most `reference_length` tokens; with
    `inside` only those where that is not the first reference of its document.
    """
    rng = random.Random(seed)
    rows = shuffled_questions(data, "dev", rng)
    found: list[tuple[dict[str, Any], str, tuple[str, ...]]] = []
    for row in rows:
        pieces = to_gold(decoder, document_of(row["title"], row["passage"]), row["answers"])
        if pieces and (len(pieces) > 1 or not inside):
            found.append((row, pieces[-1], tuple(pieces[:-1])))
        if len(found) == limit:
            break
    pool = [gold for _, gold, _ in found]
    cases = []
    for row, gold, before in found:
        answers = tuple(a.strip() for a in row["answers"] if a.strip())
        innocent = [g for g in rng.sample(pool, min(len(pool), 40)) if g != gold and not any(a in g for a in answers)]
        cases.append(Case(row["dataset"], row["question"].strip(), answers, gold, tuple(innocent[:OTHERS]), before))
    return cases


QUESTIONS = ("dataset", "split", "question", "answers", "title", "passage")
"""Columns of `qa.parquet`."""


def shuffled_questions(data: Path, split: str, rng: random.Random) -> list[dict[str, Any]]:
    """Rows of a split of `qa.parquet`, boolq apart; errors as of `table_rows`."""
    rows = table_rows(data / "qa.parquet", QUESTIONS)
    rows = [row for row in rows if row["split"] == split and row["dataset"] != "boolq"]
    rng.shuffle(rows)
    return rows


def table_rows(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of a Parquet file that has these columns.

    Raises:
        SourceError: it is not there, is damaged, or lacks a column.
    """
    import pyarrow.parquet as pq

    if not file.is_file():
        raise SourceError(f"found no {file}, expected the data: give the folder that holds {file.name} with --data")
    try:
        table = pq.read_table(file)
    except (OSError, ValueError) as error:
        raise SourceError(f"found a damaged {file} ({str(error).splitlines()[0]}), expected a Parquet file") from None
    if missing := [name for name in columns if name not in table.column_names]:
        raise SourceError(f"found no column {missing[0]} in {file}, expected {', '.join(columns)}")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def document_of(title: str | None, text: str) -> str:
    """A passage under its title, as Markdown."""
    heading = (title or "").replace("_", " ")
    return f"# {heading}\n\n{text}" if heading else text


def to_gold(decoder: Decoder, document: str, answers: Sequence[str]) -> list[str]:
    """The references of a document up to the first that holds an answer; none where none does."""
    pieces = [p.text for p in split(document, decoder.tokenizer, length=decoder.spec.reference_length)]
    gold = next((n for n, p in enumerate(pieces) for a in answers if a.strip() and a.strip() in p), None)
    return [] if gold is None else pieces[: gold + 1]


class _Given:
    """A recall that brings the same texts to every chunk of a prompt, whatever is asked.

    Args:
        rows: texts of each prompt.
        memories: of these texts.
        chunks: how many chunks of each prompt ask.
    """

    min_score = None

    def __init__(self, rows: Sequence[Sequence[str]], memories: Mapping[str, Memory], chunks: Sequence[int]) -> None:
        given = [[(t, memories[t]) for t in row] for row in rows]
        self.asked = [row for row, count in zip(given, chunks, strict=True) for _ in range(count)]
        self.by_text: dict[str, list[tuple[str, Memory]]] = {}

    def check(self, decoder: Any) -> None:
        """They were encoded by the decoder itself."""

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        """First all chunks of all prompts ask; a long answer asks again, and is told by its prompt's text."""
        known = texts or queries
        if not self.by_text:
            self.by_text = dict(zip(known, self.asked, strict=True))
            return [self._recalled(query, row) for query, row in zip(queries, self.asked, strict=True)]
        return [self._recalled(query, self.by_text[text]) for query, text in zip(queries, known, strict=True)]

    def _recalled(self, query: str, row: Sequence[tuple[str, Any]]) -> Recalled:
        references = tuple(Reference(text) for text, _ in row)
        hits = tuple(Hit(r.id, 0.0) for r in references)
        return Recalled(query, hits, tuple(m for _, m in row), references)


def _asking_chunks(decoder: Decoder, prompt: Prompt) -> int:
    """Chunks of a prompt that hold words of the user."""
    size = decoder.spec.chunk_length
    return sum(bool(prompt.query(decoder, start, start + size)) for start in range(0, len(prompt.ids), size))


Encode = Callable[[Sequence[str]], list[Memory]]


def encoded(encode: Encode, texts: Iterable[str]) -> dict[str, Memory]:
    """Memories of distinct texts, written in batches."""
    flat = list(dict.fromkeys(texts))
    return dict(zip(flat, [m for n in range(0, len(flat), BATCH) for m in encode(flat[n : n + BATCH])], strict=True))


Given = Callable[[Case], Sequence[str]]


def score_of(
    name: str,
    decoder: Decoder,
    cases: Sequence[Case],
    given: Given | None,
    *,
    as_text: bool = False,
    before: Callable[[Case], Sequence[str]] | None = None,
    encode: Encode | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Score:
    """Answer the cases greedily with what `given` brings, as memories or as text, and score them.

    Every chunk of a prompt reads all that is given. With `before` the memory of the gold reference saw these texts before it.
    `encode` makes memories of texts, by default as the decoder does.

    Raises:
        SourceError: no case, or with `as_text` a prompt and its answer that do not fit the model's window.
    """
    if not cases:
        raise SourceError("found no question that can be asked, expected some: give a larger --limit, or other data")
    if given and as_text:
        _check_window(decoder, cases, given)
    exact: list[float] = []
    overlap: list[float] = []
    for batch in _batches(cases):
        texts = [list(given(c)) if given else [] for c in batch]
        prompts = [question_prompt(decoder, c.question, t if as_text else ()) for c, t in zip(batch, texts, strict=True)]
        recall: Any = None
        if given and not as_text:
            seen = {c.gold: decoder.encode_in_context([*before(c), c.gold])[-1] for c in batch} if before else {}
            written = encoded(encode or decoder.encode, (t for row in texts for t in row if t not in seen))
            recall = _Given(texts, seen | written, [_asking_chunks(decoder, p) for p in prompts])
        for case, done in zip(batch, complete(decoder, prompts, recall=recall, max_new_tokens=NEW_TOKENS), strict=True):
            said = done.text.strip().split("\n")[0]
            exact.append(exact_match(said, case.answers))
            overlap.append(f1(said, case.answers))
        if tell:
            tell(len(exact), len(cases))
    return Score(name, tuple(exact), tuple(overlap))


def _batches(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """In order, at most `BATCH` at a time and no question twice: `_Given` tells a long answer by its question alone."""
    batch: dict[str, Case] = {}
    for case in cases:
        if len(batch) == BATCH or case.question.strip() in batch:
            yield list(batch.values())
            batch = {}
        batch[case.question.strip()] = case
    yield list(batch.values())


def _check_window(decoder: Decoder, cases: Sequence[Case], given: Given) -> None:
    """Refuse references that are too long for one prompt: beyond its positions a model cannot be compared with its memory."""
    longest = max(len(question_prompt(decoder, c.question, list(given(c))).ids) for c in cases)
    if longest + NEW_TOKENS > decoder.window:
        raise SourceError(
            f"found a prompt of {longest} tokens with its references as text, expected at most {decoder.window - NEW_TOKENS} before "
            f"an answer of {NEW_TOKENS}: give fewer references, or a model with a longer window"
        )


def mixed(case: Case) -> Sequence[str]:
    """Gold among the others, at a place that the question decides."""
    return among(case.question, [case.gold], case.others)


def among(question: str, gold: Sequence[str], others: Sequence[str]) -> list[str]:
    """Gold references among others, at a place that the question decides."""
    place = len(question) % (len(others) + 1)
    return [*others[:place], *gold, *others[place:]]


def short_cases(decoder: Decoder, cases: Sequence[Case]) -> list[Case]:
    """Cases whose prompt is one chunk."""
    most = decoder.spec.chunk_length
    return [c for c in cases if len(question_prompt(decoder, c.question).ids) <= most]


def formats(decoder: Decoder, cases: Sequence[Case], tell: Callable[[int, int], None] | None = None) -> list[Score]:
    """Closed book, sparse memory, wrong memory, dense memory, dense memory in all layers, and text in the prompt."""
    assert decoder.spec.layers is not None
    dense = decoder.using(replace(decoder.spec, tokens_per_head=None))
    layers = tuple(range(decoder.geometry.num_layers))
    everywhere = decoder.using(replace(decoder.spec, layers=layers, heads=None, tokens_per_head=None))
    _check_window(decoder, cases, mixed)  # before hours of the other formats
    sparse = score_of(f"sparse memory, {decoder.spec.tokens_per_head} tokens per head", decoder, cases, mixed, tell=tell)
    parts = {name: [c.dataset == name for c in cases] for name in sorted({c.dataset for c in cases})}
    return [
        score_of("closed book", decoder, cases, None, tell=tell),
        sparse,
        *(sparse.part(f"sparse memory, only {name}", chosen) for name, chosen in parts.items()),
        score_of("wrong memory (the four others)", decoder, cases, lambda c: c.others, tell=tell),
        score_of("sparse memory, gold alone", decoder, cases, lambda c: [c.gold], tell=tell),
        score_of("wrong memory, one other alone", decoder, cases, lambda c: c.others[:1], tell=tell),
        score_of("dense memory, gold alone", dense, cases, lambda c: [c.gold], tell=tell),
        score_of("dense memory, all tokens, memory layers", dense, cases, mixed, tell=tell),
        score_of("dense memory, all tokens, all layers", everywhere, cases, mixed, tell=tell),
        score_of("text in the prompt, gold and four others", decoder, cases, mixed, as_text=True, tell=tell),
        score_of("text in the prompt, gold alone", decoder, cases, lambda c: [c.gold], as_text=True, tell=tell),
    ]


def curve(
    decoder: Decoder, cases: Sequence[Case], tell: Callable[[int, int], None] | None = None
) -> list[tuple[int | None, Score]]:
    """Exact match against kept tokens per head, with the gold reference among four others."""
    points = []
    for slots in SLOTS:
        view = decoder.using(replace(decoder.spec, tokens_per_head=slots))
        points.append((slots, score_of(f"{slots or 'all'} tokens per head", view, cases, mixed, tell=tell)))
    return points


def selections(decoder: Decoder, cases: Sequence[Case], tell: Callable[[int, int], None] | None = None) -> list[Score]:
    """Every registered selection at the decoder's own budget."""
    from memory3.selection import SELECTIONS

    return [
        score_of(name, decoder.using(replace(decoder.spec, selection=name)), cases, mixed, tell=tell) for name in SELECTIONS
    ]


def contexts(decoder: Decoder, cases: Sequence[Case], tell: Callable[[int, int], None] | None = None) -> list[Score]:
    """Plain writing, writing in context, and writing in the context of another document (control), of gold references that are
    not the first of their documents.
    """
    others = {case.gold: next((o.before for o in cases if o.before[:1] != case.before[:1]), ()) for case in cases}
    ways: dict[str, Callable[[Case], Sequence[str]] | None] = {
        "encoded alone": None,
        "encoded in context": lambda case: case.before,
        "encoded in the context of another document": lambda case: others[case.gold],
    }
    alone: Given = lambda case: [case.gold]  # noqa: E731
    return [
        score_of(f"{name}, {what}", decoder, cases, given, before=before, tell=tell)
        for what, given in (("gold alone", alone), ("gold among four others", mixed))
        for name, before in ways.items()
    ]


def measure(
    decoder: Decoder, data: Path, what: str, limit: int, out: Path | None, seed: int, tell: Callable[[int, int], None]
) -> list[Score]:
    """Print a Markdown table of `reading`, `slots`, `selections` or `context`; then draw it where `out` says, `slots` as a curve."""
    tables = {"reading": formats, "selections": selections, "context": contexts}
    if what not in (*tables, "slots"):
        raise SourceError(f"found eval {what!r}, expected reading, slots, selections, context, heads, retrieval, fusion or ann")
    cases = short_cases(decoder, dev_cases(decoder, data, limit, seed, inside=what == "context"))
    points = curve(decoder, cases, tell) if what == "slots" else []
    scores = [score for _, score in points] or tables[what](decoder, cases, tell)
    print("| what | questions | exact match, % [95 % interval] | F1, % [95 % interval] |\n|---|---|---|---|")
    for score in scores:
        print(score.row())
    if out is not None:
        from memory3.evaluate.picture import draw_arms, draw_curve

        spec, length = decoder.spec, decoder.spec.reference_length
        if points:
            draw_curve([(spec.pairs * (slots or length), score) for slots, score in points], out)
        else:
            draw_arms([score.outcome() for score in scores], f"{what} on {data.name}, {scores[0].count} dev questions", out)
    return scores
