"""Golden losses: the first steps of a stage as lines of text, so that a change of the numbers shows in a diff.

Run a test with `MEMORY3_WRITE_GOLDEN=1` to write its file anew; look at the diff before you keep it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "golden"
RELATIVE = 1e-4
"""Other CPUs and torch builds sum in another order: ten steps of `warmup` with eager instead of sdpa attention differ by 1e-5."""

MADE_HERE = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether this is the kind of CPU that the files were made on."""


def check_losses(
    name: str, losses: Sequence[float], relative: float = RELATIVE, later: float | None = None, settled: int = 5
) -> None:
    """Compare the losses of a run, one per step, with `golden/losses-NAME.txt`; with MEMORY3_WRITE_GOLDEN=1 write it.

    `later` is the tolerance behind the first `settled` steps on another kind of CPU than the files were made on, for runs whose
    first steps are so long that roundings grow.
    """
    file = FOLDER / f"losses-{name}.txt"
    if os.environ.get("MEMORY3_WRITE_GOLDEN") == "1":
        file.write_text("".join(f"{loss:.6f}\n" for loss in losses), "utf-8")
    golden = [float(line) for line in file.read_text("utf-8").splitlines()]
    assert list(losses[:settled]) == pytest.approx(golden[:settled], rel=relative)
    assert list(losses[settled:]) == pytest.approx(golden[settled:], rel=relative if later is None or MADE_HERE else later)
