"""Codecs beside each other on memories of real references: bytes, speed, error of what attention reads, and exact match.

Each reference is encoded by the model once. Its memory goes through every codec, as a record of a bank, and comes back; questions are then
answered from what came back, their gold reference among four others (`evaluate.reading`). The control is the raw record in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memory3.answering import question_prompt
from memory3.attention import Attended, Original, Reading, States
from memory3.bench.machine import Machine
from memory3.bench.report import Report
from memory3.bench.turns import Timed, in_turns
from memory3.codec import RawCodec, codec_named
from memory3.decoder import Decoder
from memory3.evaluate.outcomes import Outcome
from memory3.evaluate.reading import BATCH, Case, dev_cases, encoded, mixed, score_of
from memory3.product import ProductCodec
from memory3.record import Codec, RecordShape
from memory3.spec import BankError, Memory, Reference, SpecError

Tell = Callable[[int, int], None]
CONTROL = "raw"
CODECS = ("int8", "int4", "rotated", "rotated:key_bits=3,value_bits=3", "rotated:key_bits=2,value_bits=2")
POINT = 0.01
"""What a codec may cost in exact match, by the lower bound of its paired interval."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        limit: questions that are answered.
        attended: of these, how many prompts the error of attention is measured on.
        timed: references that are encoded and decoded in a turn.
        repeats: turns of each codec, behind one that does not count; the median counts.
        seed: of the questions.
    """

    limit: int = 300
    attended: int = 64
    timed: int = 64
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "attended", "timed", "repeats"):
            if getattr(self, name) < 1:
                raise SpecError(f"found {name}={getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Coded:
    """All memories through one codec.

    Args:
        name: of the row.
        codec: that made the records.
        shape: of a record.
        records: by text.
    """

    name: str
    codec: Codec
    shape: RecordShape
    records: Mapping[str, bytes]

    @classmethod
    def of(cls, name: str, codec: Codec, decoder: Decoder, memories: Mapping[str, Memory]) -> Coded:
        """Memories as records of a bank."""
        shape = RecordShape.of(decoder.spec, decoder.head_dim)
        return cls(name, codec, shape, {text: record_of(codec, shape, text, memory) for text, memory in memories.items()})

    @property
    def record_bytes(self) -> int:
        """Bytes of a reference on disk: header, positions, scales and padding are among them."""
        return self.codec.record_bytes(self.shape.pairs, self.shape.slots, self.shape.head_dim)

    def decode(self, texts: Sequence[str], device: torch.device) -> list[Memory]:
        """What comes back."""
        ids = [Reference(text).id for text in texts]
        return self.codec.decode_all([bytearray(self.records[t]) for t in texts], self.shape, ids, ids, device)


def record_of(codec: Codec, shape: RecordShape, text: str, memory: Memory) -> bytes:
    """The record of a memory; the control rounds it to its own dtype first."""
    if isinstance(codec, RawCodec):
        kind = getattr(torch, codec.dtype)
        memory = Memory(memory.keys.to(kind), memory.values.to(kind), memory.positions)
    return codec.encode(memory, shape, Reference(text).id)


@dataclass(frozen=True)
class Compared:
    """A `Hook` that reads with `exact`, and notes how far each other reading is off at the same queries of the same layer.

    Args:
        exact: gives the output that the model goes on with.
        others: by name; of the same chunks.
        squares: by layer the sums of squares of the exact outputs (name "") and of the others' differences from them.
    """

    exact: Reading
    others: Mapping[str, Reading]
    squares: dict[int, dict[str, float]] = field(default_factory=dict)

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        """The exact output; counted are queries that read, at memory heads."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        output, weights = self.exact.attend(original, module, states, options)
        assert self.exact.spec.layers is not None
        if layer in self.exact.spec.layers:
            heads = list(self.exact.spec.heads_of(layer))
            sums = self.squares.setdefault(layer, dict.fromkeys(["", *self.others], 0.0))
            sums[""] += self._square(output, states, heads)
            for name, other in self.others.items():
                sums[name] += self._square(other.attend(original, module, states, options)[0] - output, states, heads)
        return output, weights

    def _square(self, output: Tensor, states: States, heads: Sequence[int]) -> float:
        read = output[self.exact.chunks >= 0].unflatten(1, (states.key.shape[1], -1))[:, heads]
        return float(read.double().square().sum())


def relative(squares: Mapping[int, Mapping[str, float]], name: str) -> float:
    """Relative error of the attention output: root of the share of its squares, mean over memory layers."""
    return sum(sqrt(sums[name] / sums[""]) for sums in squares.values()) / len(squares)


@torch.no_grad()
def attention_errors(decoder: Decoder, cases: Sequence[Case], control: Coded, others: Sequence[Coded]) -> dict[str, float]:
    """Relative error of the attention output at memory layers (memories and context together), of each codec against the control.

    Queries are those of the questions' prompts, which read their five references from the control.
    """
    squares: dict[int, dict[str, float]] = {}
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        layout = decoder.layout([question_prompt(decoder, case.question).ids for case in batch])
        chunks = int(layout.chunks.max()) + 1
        texts = list(dict.fromkeys(text for case in batch for text in mixed(case)))

        def reading(coded: Coded) -> Reading:
            found = dict(zip(texts, coded.decode(texts, decoder.device), strict=True))  # noqa: B023
            made = decoder.reading(layout.chunks, [[[found[t] for t in mixed(case)]] * chunks for case in batch])  # noqa: B023
            assert made is not None
            return made

        decoder.forward(layout, Compared(reading(control), {one.name: reading(one) for one in others}, squares), base=True)
    return {one.name: relative(squares, one.name) for one in others}


@dataclass(frozen=True)
class Row:
    """What was measured of one codec.

    Args:
        codec: its name.
        bytes: of a reference on disk.
        smaller: bytes of the control over these.
        encode, decode: references a second.
        attention: relative error of the attention output.
        exact: exact match.
        change: of the exact match against the control.
        interval: 95 %, paired, of the change.
    """

    codec: str
    bytes: int
    smaller: float
    encode: float
    decode: float
    attention: float
    exact: float
    change: float
    interval: tuple[float, float]

    def cells(self) -> list[str]:
        """As people read it."""
        change = " to ".join(f"{100 * bound:+.1f}" for bound in self.interval)
        numbers = [f"{self.bytes:,}", f"{self.smaller:.2f}", f"{self.encode:,.0f}", f"{self.decode:,.0f}"]
        return [
            self.codec,
            *numbers,
            f"{self.attention:.3f}",
            f"{100 * self.exact:.1f}",
            f"{100 * self.change:+.1f} [{change}]",
        ]


def smallest_within(rows: Sequence[Row], points: float = POINT) -> Row:
    """The codec with the fewest bytes whose lower bound is above minus `points`; the control always is."""
    return max((row for row in rows if row.interval[0] >= -points), key=lambda row: row.smaller)


def bench_codec(
    decoder: Decoder,
    data: Path,
    codecs: Sequence[str] = CODECS,
    codebooks: Sequence[Path] = (),
    sizes: Sizes | None = None,
    tell: Tell = lambda done, total: None,
) -> Report:
    """Measure the codecs on dev questions of `data`; each codebook is a row of codec `product`.

    Raises:
        BankError: a codec that is not there, or a codebook of another model.
        SpecError: no questions.
    """
    sizes = sizes or Sizes()
    chosen = chosen_codecs(decoder, codecs, codebooks)
    cases = dev_cases(decoder, data, sizes.limit, sizes.seed)
    if not cases:
        raise SpecError(f"found no question in {data} that can be asked, expected some: give other data")
    memories = encoded(decoder.encode, (text for case in cases for text in mixed(case)))
    every = [Coded.of(name, codec, decoder, memories) for name, codec in chosen.items()]
    speeds = timed(every, dict(list(memories.items())[: sizes.timed]), sizes.repeats, decoder.device)
    errors = {CONTROL: 0.0} | attention_errors(decoder, cases[: sizes.attended], every[0], every[1:])
    outcomes = []
    for n, one in enumerate(every):
        told = partial(_told, tell, n * len(cases), len(every) * len(cases))
        back = partial(one.decode, device=decoder.device)
        outcomes.append(score_of(one.name, decoder, cases, mixed, encode=back, tell=told).outcome())
    rows = [
        row_of(one, every[0], speeds[one.name], errors[one.name], o, outcomes[0])
        for one, o in zip(every, outcomes, strict=True)
    ]
    return report_of(decoder, rows, sizes, len(cases), len(memories))


def _told(tell: Tell, before: int, total: int, done: int, of: int) -> None:
    tell(before + done, total)


def chosen_codecs(decoder: Decoder, codecs: Sequence[str], codebooks: Sequence[Path]) -> dict[str, Codec]:
    """The control and the codecs by the names of their rows; `BankError` where a codebook is of another model."""
    found: dict[str, Codec] = {CONTROL: RawCodec("bfloat16")}
    found |= {name: codec_named(name, decoder.dtype) for name in codecs if name != CONTROL}
    for file in codebooks:
        codec = codec_named(ProductCodec.name, decoder.dtype, file)
        assert isinstance(codec, ProductCodec)
        if why := codec.misfit(decoder.identity()):
            raise BankError(f"found {file} for another model ({why}): train one with `memory3 bank codebook`")
        found[f"product, keys {codec.keys}, values {codec.values}"] = codec
    return found


def timed(
    every: Sequence[Coded], memories: Mapping[str, Memory], repeats: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """References encoded and decoded a second, by name; all codecs in turns."""
    texts = list(memories)
    ways: dict[str, Callable[[int], object]] = {}
    for one in every:
        ways |= {
            f"encode {one.name}": partial(_encoded, one, memories),
            f"decode {one.name}": partial(_decoded, one, texts, device),
        }
    seconds = in_turns(ways, repeats, device)
    rate = {name: Timed(name, turns, len(texts)).rate for name, turns in seconds.items()}
    return {one.name: (rate[f"encode {one.name}"], rate[f"decode {one.name}"]) for one in every}


def _encoded(one: Coded, memories: Mapping[str, Memory], turn: int) -> list[bytes]:
    return [record_of(one.codec, one.shape, text, memory) for text, memory in memories.items()]


def _decoded(one: Coded, texts: Sequence[str], device: torch.device, turn: int) -> list[Memory]:
    return one.decode(texts, device)


def row_of(one: Coded, control: Coded, speed: tuple[float, float], error: float, outcome: Outcome, against: Outcome) -> Row:
    """The figures of one codec together."""
    metric = "exact match"
    change, interval = outcome.minus(against, metric)
    smaller = control.record_bytes / one.record_bytes
    return Row(one.name, one.record_bytes, smaller, *speed, error, outcome.mean(metric), change, interval)


def report_of(decoder: Decoder, rows: Sequence[Row], sizes: Sizes, questions: int, references: int) -> Report:
    """The finished benchmark."""
    best = smallest_within(rows)
    columns = ["codec", "bytes a reference", "times smaller", "encode, references/s", "decode, references/s"]
    columns += ["attention error", "exact match, %", "change, points [95 % interval, paired]"]
    settings = {"model": decoder.name, **asdict(sizes), "questions": questions, "references": references}
    return Report(
        "codec",
        Machine.of(decoder.device),
        settings,
        columns,
        [row.cells() for row in rows],
        {"smaller_within_one_point": best.smaller} | {f"smaller {row.codec}": row.smaller for row in rows[1:]},
        {"codecs": [asdict(row) for row in rows], "within_one_point": best.codec},
    )


def draw_codecs(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the error of attention, and the change in exact match with its interval, over bytes of a reference.

    Args:
        rows: `codecs` of the document.
        path: of the picture.
    """
    from memory3.evaluate.picture import pyplot_module

    plots = pyplot_module()
    figure, (above, below) = plots.subplots(2, 1, figsize=(8, 7.5), sharex=True, constrained_layout=True)
    for n, row in enumerate(rows):
        colour, (low, high) = f"C{n % 10}", row["interval"]
        spread = [[100 * (row["change"] - low)], [100 * (high - row["change"])]]
        style = {"marker": "os^Dv"[n // 10 % 5], "color": colour, "linestyle": "none"}
        above.plot([row["bytes"]], [row["attention"]], label=f"{row['codec']} ({row['smaller']:.1f}x)", **style)
        below.errorbar([row["bytes"]], [100 * row["change"]], yerr=spread, capsize=3, **style)
    below.axhline(-100 * POINT, color="#999999", linestyle="--", linewidth=1)
    below.set_xscale("log")
    above.set_ylabel("relative error of the attention output")
    below.set_ylabel("change in exact match, points")
    below.set_xlabel("bytes of a reference on disk")
    above.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plots.close(figure)
