"""A benchmark ends with a table, its ratios, a picture, and one JSON document as the last line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memory3.bench.machine import Machine
from memory3.bench.report import Bar, Report


def test_the_last_line_is_the_document_and_the_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine("a processor", 2, "9.9")
    bars = [Bar("slow", 1.0, 0.9, 1.2), Bar("fast", 4.0, 3.0, 4.5)]
    report = Report("x", machine, {"n": 1}, ["way", "s"], [["slow", "1"]], {"fast_over_slow": 4.0}, {"more": [1]}, "s", bars)
    report.show(tmp_path / "deep" / "x.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a processor, 2 threads, torch 9.9"
    assert lines[2:5] == ["| way | s |", "| --- | --- |", "| slow | 1 |"]
    assert "fast_over_slow 4" in lines
    assert json.loads(lines[-1]) == {
        "benchmark": "x",
        "machine": {"processor": "a processor", "cores": 2, "torch_version": "9.9"},
        "settings": {"n": 1},
        "ratios": {"fast_over_slow": 4.0},
        "more": [1],
    }
    assert (tmp_path / "deep" / "x.png").stat().st_size > 1000
