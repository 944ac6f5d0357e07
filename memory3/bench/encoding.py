"""Writing: references a second, and the share of the machine's matrix-multiply peak that they use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from memory3.bank import Bank
from memory3.bench.machine import Machine, peak_flops
from memory3.bench.report import Bar, Report
from memory3.bench.scenes import words
from memory3.bench.turns import in_turns
from memory3.decoder import Decoder
from memory3.spec import Reference, SpecError
from memory3.writing import write

Tell = Callable[[int, int], None]
PEAK_SIZES = (1024, 2048, 4096)
"""Sides of the square matrices whose product is timed; the fastest is the peak."""


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


def write_flops(decoder: Decoder, tokens: int) -> int:
    """FLOPs of writing one reference of so many tokens (design 5): the layers up to the last memory layer, and the scores of the
    selection at the memory layers. The reference BOS is not counted: it is overhead.
    """
    config, layers = decoder.model.config.get_text_config(), decoder.spec.layers
    assert layers is not None
    hidden, width = config.hidden_size, config.num_attention_heads * decoder.head_dim
    run, memory = layers[-1] + 1, len(layers)
    projections = 2 * hidden * width + 2 * hidden * decoder.head_dim * decoder.geometry.num_kv_heads
    attention = 2 * tokens**2 // 2 * width
    scores = memory * tokens**2 * width
    mlp = (run - 1) * tokens * 3 * hidden * config.intermediate_size
    return int(2 * (run * (tokens * projections + attention) + mlp + scores))


def bench_write(decoder: Decoder, load: Load, tell: Tell = lambda done, total: None) -> Report:
    """Encode alone, and write to a bank, in turns; every turn writes to a new bank."""
    rng = np.random.default_rng(load.seed)
    before = _peak(decoder)
    rows = [words(decoder, rng, decoder.spec.reference_length) for _ in range(load.references)]
    references = [_reference(decoder, row, n) for n, row in enumerate(rows)]
    ids = [decoder.tokens(reference.text) for reference in references]
    work = sum(write_flops(decoder, len(row)) for row in ids)
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
    return _report(decoder, load, seconds, work, max(before, _peak(decoder)), sum(map(len, ids)))


def _peak(decoder: Decoder) -> float:
    """FLOPs per second; asked before and after the turns, so that what else the machine does then lowers it less."""
    return max(peak_flops(decoder.device, decoder.dtype, size) for size in PEAK_SIZES)


def _reference(decoder: Decoder, row: list[int], number: int) -> Reference:
    """A text that has at most as many tokens as a reference may have; decoding random tokens may join some of them."""
    text = str(decoder.tokenizer.decode(row)).strip()
    while len(decoder.tokens(text)) > decoder.spec.reference_length:
        text = text[: -max(1, len(text) // 100)]
    return Reference(text, f"random:{number}")


def _report(decoder: Decoder, load: Load, seconds: dict[str, tuple[float, ...]], work: int, peak: float, tokens: int) -> Report:
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
