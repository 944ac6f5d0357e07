"""Is the approximate index fast and true? Latency and recall against exact search, up to a million vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from memory3.catalogue import FOLDER, Catalogue, Entry
from memory3.embedding import Embedder
from memory3.evaluate.retrieval import documents_and_questions, whole_tables
from memory3.scoring import interval
from memory3.spec import Reference
from memory3.tables import VECTOR

K = 20
"""Neighbours that are compared."""
_AT_ONCE = 50_000
_QUESTIONS = 1000


def measure_ann(
    data: Path, work: Path, embedder: Embedder, count: int, seed: int, tell: Callable[[int, int | None], None]
) -> None:
    """Print a Markdown table for tables of `count` vectors.

    The vectors of `memory3 eval retrieval` come first. Beyond these each is synthetic: a mean of two of them at a random weight, with
    noise of a tenth of its length, so that they crowd the same space. Questions are real. The table stays in `work`, one of
    each count and seed.

    Raises:
        SourceError, SpecError: as of `whole_tables`.
    """
    real = whole_tables(work, embedder)
    folder = work / f"ann-{count}-seed-{seed}" / FOLDER
    folder.parent.mkdir(parents=True, exist_ok=True)
    catalogue = Catalogue(folder, create=True, space=real.space)
    _filled(catalogue, real.vectors()[:count], count, seed, tell)
    indexed = VECTOR in catalogue.index_bytes()
    began = time.perf_counter()
    catalogue.optimise()
    built = "-" if indexed else f"{time.perf_counter() - began:.0f}"
    _, questions = documents_and_questions(data)
    step = max(1, len(questions) // _QUESTIONS)
    asked = embedder.embed([question.text for question in questions[::step]][:_QUESTIONS], query=True)
    for vector in asked[:20]:
        catalogue.nearest(vector[None], K)
    shares, seconds = [], []
    truth = _exact(catalogue.vectors(), asked, K)
    ids = catalogue.column_of_ids()
    for vector, right in zip(asked, truth, strict=True):
        began = time.perf_counter()
        [hits] = catalogue.nearest(vector[None], K)
        seconds.append(time.perf_counter() - began)
        shares.append(len({hit.id for hit in hits} & {ids[n] for n in right}) / K)
    low, high = interval(shares)
    p50, p95 = np.percentile(np.array(seconds) * 1000, [50, 95])
    size = catalogue.index_bytes().get(VECTOR, 0)
    print(
        "| vectors | questions | recall@20 against exact search | p50, ms | p95, ms | index, MiB | build, s |\n|---|---|---|---|---|---|---|"
    )
    print(
        f"| {len(catalogue):,} | {len(asked)} | {sum(shares) / len(shares):.3f} [{low:.3f}, {high:.3f}] | {p50:.1f} | {p95:.1f} | "
        f"{size / 2**20:.0f} | {built} |"
    )


def _filled(catalogue: Catalogue, real: np.ndarray, count: int, seed: int, tell: Callable[[int, int | None], None]) -> None:
    done = len(catalogue)
    for start, vectors in _batches(real, count, seed):
        if start + len(vectors) <= done:
            continue
        entries = [
            Entry(Reference(f"synthetic {start + n}"), 2, (0, 0), vector)
            for n, vector in enumerate(vectors)
            if start + n >= done
        ]
        catalogue.add_memories(entries)
        tell(start + len(vectors), count)


def _batches(real: np.ndarray, count: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    random = np.random.default_rng(seed)
    for start in range(0, count, _AT_ONCE):
        size = min(_AT_ONCE, count - start)
        first, second = random.integers(0, len(real), (2, size))
        weight = random.random((size, 1), dtype=np.float32)
        mixed = weight * real[first] + (1 - weight) * real[second]
        noise = random.standard_normal(mixed.shape, dtype=np.float32) * (0.1 / np.sqrt(mixed.shape[1]))
        made = mixed / np.linalg.norm(mixed, axis=1, keepdims=True) + noise
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        own = real[start : start + size]
        made[: len(own)] = own
        yield start, made


def _exact(vectors: np.ndarray, asked: np.ndarray, k: int) -> np.ndarray:
    """Places of the `k` largest products, by going through all of them."""
    best = np.full((len(asked), k), -np.inf, np.float32)
    where = np.zeros((len(asked), k), np.int64)
    for start in range(0, len(vectors), _AT_ONCE):
        products = np.concatenate([best, asked @ vectors[start : start + _AT_ONCE].astype(np.float32).T], axis=1)
        top = np.argpartition(-products, k, axis=1)[:, :k]
        places = np.where(top < k, np.take_along_axis(where, np.minimum(top, k - 1), 1), top - k + start)
        best, where = np.take_along_axis(products, top, 1), places
    return where
