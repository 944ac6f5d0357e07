"""Traces of use: made up, and read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memory3.hierarchy.trace import Trace, read_trace, zipf
from memory3.spec import SourceError


def test_a_seed_gives_the_same_trace_and_another_seed_another() -> None:
    one, again, other = zipf(50, 400, seed=1), zipf(50, 400, seed=1), zipf(50, 400, seed=2)
    assert (one.ids == again.ids).all() and (one.days == again.days).all()
    assert (one.ids != other.ids).any()


def test_without_drift_uses_follow_the_law_of_zipf() -> None:
    trace = zipf(4, 40_000, exponent=1.0, drift=0.0)
    found = np.sort(np.bincount(trace.ids, minlength=4))[::-1] / len(trace)
    weight = 1 / np.arange(1, 5)
    assert np.abs(found - weight / weight.sum()).max() < 0.015  # six standard deviations of a share


def test_drift_changes_who_is_used_most_but_not_the_head() -> None:
    trace = zipf(40, 20_000, exponent=1.0, drift=0.05, head=1, seed=3)
    parts = [np.bincount(part, minlength=40).argsort()[::-1] for part in np.array_split(trace.ids, 4)]
    assert len({int(order[0]) for order in parts}) == 1
    assert len({int(order[1]) for order in parts}) > 1


def test_a_file_says_the_same_in_every_kind_and_order(tmp_path: Path) -> None:
    uses = [("2026-01-02T00:00:00", "b"), ("2026-01-01T00:00:00+00:00", "a"), ("2026-01-01T12:00:00", "b")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"time": t, "id": i}) + "\n" for t, i in uses))
    (tmp_path / "a.csv").write_text("time,id\n1767312000,b\n1767225600,a\n1767268800,b\n")
    pq.write_table(
        pa.table({"time": [1767312000.0, 1767225600.0, 1767268800.0], "id": ["b", "a", "b"]}), tmp_path / "a.parquet"
    )
    for kind in ("jsonl", "csv", "parquet"):
        trace = read_trace(tmp_path / f"a.{kind}", references=5)
        assert trace.days.tolist() == [0.0, 0.5, 1.0]
        assert trace.ids.tolist() == [0, 1, 1]
        assert trace.references == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found no use"),
        ('{"id": "a"}\n', "found no 'time' at"),
        ('{"time": 1}\n', "found no 'id' at"),
        ('{"time": "noon", "id": "a"}\n', "found time 'noon' at"),
        ('{"time": "nan", "id": "a"}\n', "found time 'nan' at"),
        ('{"time": 1, "id": "a"}\n{"time": 2, "id": "b"}\n', "found 2 references"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(SourceError, match=said):
        read_trace(tmp_path / "a.jsonl", references=1)


def test_a_trace_that_goes_back_or_leaves_the_bank_is_refused() -> None:
    for days, ids in (([1.0, 0.0], [0, 0]), ([0.0, 1.0], [0, 3]), ([], [])):
        with pytest.raises(SourceError):
            Trace(np.array(days), np.array(ids, np.int64), 3)
    with pytest.raises(SourceError, match="drift=2"):
        zipf(3, 3, drift=2)
