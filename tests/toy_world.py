"""A small world of questions, in the form of the real data: what evaluations and readers are run on at toy size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PLACES = ("river", "tower", "bridge", "harbour", "castle", "market")


def toy_world(folder: Path, questions: int) -> list[dict[str, Any]]:
    """Write `qa.parquet` (every fourth row is of split `train`) and `passages.parquet` into a new folder; the rows of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "dataset": "squad",
            "split": "train" if n % 4 == 3 else "dev",
            "question": f"When is {n}?",
            "answers": [f"in {1900 + n}"],
            "title": f"P{n}",
            "passage": f"The thing {n} was made in {1900 + n} by men.",
        }
        for n in range(questions)
    ]
    texts = [
        {"title": f"Place {n}", "text": f"The {PLACES[n % 6]} number {n} lies near the {PLACES[n % 5]}. " * 4}
        for n in range(60)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "qa.parquet")
    pq.write_table(pa.Table.from_pylist(texts), folder / "passages.parquet")
    return rows
