"""What this machine can do at best, measured in the run that is compared with it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memory3.bench.turns import finished

PEAK_SIZES = (1024, 2048, 4096)
"""Sides of the square matrices whose product is timed; the fastest is the peak."""


@dataclass(frozen=True)
class Machine:
    """Where a benchmark ran, in words.

    Args:
        processor: name of the CPU or GPU that computes.
        cores: threads that torch uses on the CPU.
        torch_version: as torch says it.
    """

    processor: str
    cores: int
    torch_version: str

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """The machine as it is now."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        return cls(name, torch.get_num_threads(), torch.__version__)

    def __str__(self) -> str:
        return f"{self.processor}, {self.cores} threads, torch {self.torch_version}"


def _processor() -> str:
    """`/proc/cpuinfo` knows it on Linux, `platform` elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOPs per second of the best of several products of two square matrices, of each of `PEAK_SIZES`; a multiply-add is 2."""
    return max(_product_flops(device, dtype, size, repeats) for size in PEAK_SIZES)


def _product_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: left @ right, device, repeats)


def peak_bandwidth(device: torch.device, size_bytes: int = 2**28, repeats: int = 5) -> float:
    """Bytes per second that the device copies from one place in its memory to another; each byte counts once."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size_bytes / _best(lambda: target.copy_(source), device, repeats)


def _best(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of several runs, behind one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        finished(device)
        began = time.perf_counter()
        work()
        finished(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def read_raw(places: Sequence[tuple[Path, int]], size: int) -> int:
    """Read `size` bytes at each place with `preadv`, the barest way there is to have them; how many came."""
    buffer, opened, total = bytearray(size), dict[Path, int](), 0
    try:
        for path, offset in places:
            if path not in opened:
                opened[path] = os.open(path, os.O_RDONLY)
            total += os.preadv(opened[path], [buffer], offset)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return total


def drop_page_cache(folder: Path) -> None:
    """Ask the system to forget what it holds of the files of a folder, so that the next read comes from the disk.

    Only clean pages that nobody maps go: sync, and close the bank before.
    """
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
