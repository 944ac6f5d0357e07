"""Writing: references a second, and the share of the machine's matrix-multiply peak that they use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from memory3.bank import Bank
from memory3.bench.machine import Machine, peak_flops
from memory3.bench.report import Bar, Report
from memory3.bench.scenes import words
from memory3.bench.turns import in_turns
from memory3.cost import Shape, memory_write_flops
from memory3.decoder import Decoder
from memory3.spec import Reference, SpecError
from memory3.writing import write

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Load:
    """What is written in a turn.

    Args:
        references: of full length.
        batch: encoded together.
        repeats: turns of each way, behind one that does not count.
        seed: of the texts.
    """

    references: int = 64
    batch: int = 64
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("references", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise SpecError(f"found {name}={getattr(self, name)}, expected at least 1")


def _work(decoder: Decoder, rows: Sequence[Sequence[int]]) -> float:
    """FLOPs of writing references of these token ids (design 5). The reference BOS is not counted: it is overhead."""
    sizes, spec = Shape.of(decoder.model.config), decoder.spec
    return sum(memory_write_flops(sizes, replace(spec, reference_length=len(row))) for row in rows)


def bench_write(decoder: Decoder, load: Load, tell: Tell = lambda done, total: None) -> Report:
    """Encode alone, and write to a bank, in turns; every turn writes to a new bank."""
    rng = np.random.default_rng(load.seed)
    before = peak_flops(decoder.device, decoder.dtype)
    rows = [words(decoder, rng, decoder.spec.reference_length) for _ in range(load.references)]
    references = [_reference(decoder, row, n) for n, row in enumerate(rows)]
    ids = [decoder.tokens(reference.text) for reference in references]
    work = _work(decoder, ids)
    with TemporaryDirectory(prefix="memory3-bench-") as folder:

        def encode(turn: int) -> None:
            for start in range(0, len(ids), load.batch):
                decoder.encode_tokens(ids[start : start + load.batch])

        def into_bank(turn: int) -> None:
            with Bank(Path(folder) / str(turn), decoder, create=True) as bank:
                write(decoder, references, bank, batch_size=load.batch)

        total = 2 * (load.repeats + 1)
        ways = {"encode": encode, "write": into_bank}
        seconds = in_turns(ways, load.repeats, decoder.device, lambda done: tell(done, total))
    peak = max(before, peak_flops(decoder.device, decoder.dtype))  # what else the machine does now lowers both less
    return _report(decoder, load, seconds, work, peak, sum(map(len, ids)))


def _reference(decoder: Decoder, row: list[int], number: int) -> Reference:
    """A text that has at most as many tokens as a reference may have; decoding random tokens may join some of them."""
    text = str(decoder.tokenizer.decode(row)).strip()
    while len(decoder.tokens(text)) > decoder.spec.reference_length:
        text = text[: -max(1, len(text) // 100)]
    return Reference(text, f"random:{number}")


def _report(
    decoder: Decoder, load: Load, seconds: dict[str, tuple[float, ...]], work: float, peak: float, tokens: int
) -> Report:
    names = {"encode": "encoding alone", "write": "into a bank"}
    rows, bars, shares = [], [], {}
    for way, turns in seconds.items():
        middle = median(turns)
        shares[way] = work / middle / peak
        rate, low, high = (load.references / s for s in (middle, max(turns), min(turns)))
        rows.append([names[way], f"{rate:,.2f} [{low:,.2f}, {high:,.2f}]", f"{work / middle / 1e9:,.0f}", f"{shares[way]:.3f}"])
        bars.append(Bar(names[way], rate, low, high))
    settings = {
        "model": decoder.name,
        "layers": decoder.geometry.num_layers,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "tokens": tokens,
        **asdict(load),
    }
    return Report(
        "write",
        Machine.of(decoder.device),
        settings,
        ["way", "references/s, median [least, most]", "GFLOP/s", f"share of the peak of {peak / 1e9:,.0f} GFLOP/s"],
        rows,
        {f"{way}_share_of_peak": share for way, share in shares.items()},
        {
            "references_per_s": {way: load.references / median(turns) for way, turns in seconds.items()},
            "flops": work,
            "peak_flops": peak,
        },
        "references/s",
        bars,
    )
