"""Exact match, F1 and intervals for short answers."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "’‘“”–—")


def normalised(answer: str) -> str:
    """Lower case without punctuation, articles and extra spaces, as SQuAD's evaluation does (arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction equals an accepted answer after normalisation, else 0."""
    return float(any(normalised(prediction) == normalised(a) for a in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall, the best over the accepted answers."""
    return max((_f1(normalised(prediction).split(), normalised(a).split()) for a in answers), default=0.0)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def interval(values: Sequence[float], *, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean; `ValueError` without values."""
    if not values:
        raise ValueError("found no values, expected at least one")
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(samples))
    return means[int(0.025 * samples)], means[int(0.975 * samples) - 1]
