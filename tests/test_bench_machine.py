"""Peaks are measured on this machine, and raw reads read what they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import memory3.bench.machine as machine
from memory3.bench.machine import Machine, drop_page_cache, peak_bandwidth, peak_flops, read_raw

CPU = torch.device("cpu")


def test_a_machine_says_what_computes() -> None:
    found = Machine.of(CPU)
    assert found.processor and found.cores == torch.get_num_threads()
    assert torch.__version__ in str(found)


def test_peaks_are_rates_of_work_that_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PEAK_SIZES", (16, 64))
    assert peak_flops(CPU, torch.float32, repeats=2) > 1e6
    assert peak_bandwidth(CPU, size_bytes=2**16, repeats=2) > 1e6


def test_raw_reads_bring_as_many_bytes_as_are_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").write_bytes(b"y" * 25)
    assert read_raw([(tmp_path / "a", 0), (tmp_path / "a", 40), (tmp_path / "b", 10)], 20) == 55


def test_dropping_the_page_cache_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"x" * 10_000)
    drop_page_cache(tmp_path)
    assert (tmp_path / "deep" / "a").read_bytes() == b"x" * 10_000
