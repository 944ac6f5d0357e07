"""Recall, step by step: search, look up, load, decode, stack; from the page cache and from the disk, for banks of several sizes."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from memory3.attention import MemoryStack
from memory3.bank import SHARDS, Bank
from memory3.bench.machine import Machine, drop_page_cache, read_raw
from memory3.bench.report import Bar, Report
from memory3.bench.scenes import random_bank
from memory3.bench.turns import finished
from memory3.codec import codec_named
from memory3.decoder import Decoder
from memory3.retrieval import RETRIEVERS
from memory3.spec import SpecError

Tell = Callable[[int, int], None]
WIDTH = 384
"""Numbers of a random vector: as many as the embedder has that works offline."""


@dataclass(frozen=True)
class Plan:
    """What is recalled.

    Args:
        references: sizes of the banks.
        codecs: of the banks.
        batch: queries answered together; each recalls as many references as the spec says.
        repeats: recalls of each kind, all of other references.
        cold: also with the page cache dropped before each recall.
        seed: of texts, vectors and key-values.
        banks: folder in which the banks are made and stay, so that a run that was interrupted goes on, and the next one finds
            them; by default they go.
    """

    references: tuple[int, ...] = (1000, 10_000)
    codecs: tuple[str, ...] = ("raw", "rotated")
    batch: int = 32
    repeats: int = 10
    cold: bool = True
    seed: int = 0
    banks: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "repeats"):
            if getattr(self, name) < 1:
                raise SpecError(f"found {name}={getattr(self, name)}, expected at least 1")
        if not self.references or not self.codecs or min(self.references) < 1:
            raise SpecError(f"found banks of {self.references} references and codecs {self.codecs}, expected some of each")


STEPS = ("search", "texts", "load", "stack", "raw")
"""`search`: ids for the queries, by cosine; `texts`: their texts and sources; `load`: key-values from the files, checked and decoded; `stack`:
to one tensor on the device; `raw`: the bytes of the same records by `preadv`, the control."""


class RandomVectors:
    """Stands in for an embedder: a random direction for each text. A search takes as long as among true vectors, which crowd more."""

    name = "random"

    def embed(self, texts: Sequence[str], query: bool = False) -> np.ndarray:
        """Unit vectors `(N, WIDTH)` float32, the same for the same text."""
        seeds = [zlib.crc32(text.encode()) for text in texts]
        made = np.stack([np.random.default_rng(seed).standard_normal(WIDTH, np.float32) for seed in seeds])
        unit: np.ndarray = made / np.linalg.norm(made, axis=1, keepdims=True)
        return unit


@dataclass(frozen=True)
class Steps:
    """Seconds of each step, one number a recall, of one bank.

    Args:
        references, codec, cold: which bank, and whether its files came from the disk.
        record_bytes: of a reference.
        read: references of one recall.
        seconds: by step of `STEPS`.
    """

    references: int
    codec: str
    cold: bool
    record_bytes: int
    read: int
    seconds: dict[str, list[float]]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.references:,} {self.codec}, {'disk' if self.cold else 'page cache'}"

    def percentile(self, step: str, share: float) -> float:
        """Seconds that so many percent of the recalls stay below."""
        return float(np.percentile(self.seconds[step], share))

    @property
    def whole(self) -> float:
        """Seconds of a whole recall, the sum of its steps' medians without the control."""
        return sum(self.percentile(step, 50) for step in STEPS if step != "raw")

    def rate(self, step: str) -> float:
        """Bytes a second, by the median."""
        return self.record_bytes * self.read / self.percentile(step, 50)


def bench_recall(decoder: Decoder, plan: Plan, tell: Tell = lambda done, total: None) -> Report:
    """Recall from banks of each size and codec; its steps are timed one by one, in turns with the raw read."""
    found: list[Steps] = []
    kinds = [(count, codec) for count in sorted(plan.references) for codec in plan.codecs]
    for done, (count, codec) in enumerate(kinds):
        with _bank(decoder, count, codec, plan, lambda n, d=done: tell(d * 100 + n, len(kinds) * 100)) as bank:  # type: ignore[misc]
            for cold in (False, True) if plan.cold else (False,):
                found.append(_recalls(decoder, bank, plan, cold))
    return _report(decoder, plan, found)


@contextmanager
def _bank(decoder: Decoder, count: int, codec: str, plan: Plan, tell: Callable[[int], None]) -> Iterator[Bank]:
    """A bank of random key-values with random vectors, its indexes built."""
    chosen, told = codec_named(codec, decoder.dtype), partial(_told, tell=tell, count=count)
    with TemporaryDirectory(prefix="memory3-bench-") if plan.banks is None else nullcontext(str(plan.banks)) as folder:
        path = Path(folder) / f"{count}-{codec.replace(':', '-')}-seed-{plan.seed}"
        with random_bank(decoder, path, count, plan.seed, chosen, 4096, RandomVectors(), told) as bank:
            bank.refresh(keep_versions=False)
            yield bank


def _told(done: int, tell: Callable[[int], None], count: int) -> None:
    tell(100 * done // count)


def _recalls(decoder: Decoder, bank: Bank, plan: Plan, cold: bool) -> Steps:
    """`repeats` recalls of a batch, behind one that does not count."""
    rng, count = np.random.default_rng(plan.seed + 1), decoder.spec.references_per_chunk
    retriever, places = RETRIEVERS["dense"](bank), bank.places()
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    names = sorted(places)
    for turn in range(plan.repeats + 1):
        queries = [f"query {turn} {n}" for n in range(plan.batch)]
        spread = [names[int(n)] for n in rng.choice(len(names), min(len(names), plan.batch * count), replace=False)]
        state: dict[str, Any] = {}
        steps: dict[str, Callable[[], object]] = {
            "search": lambda: retriever.search(queries, count),  # noqa: B023
            "texts": lambda: bank.references(spread),  # noqa: B023
            "load": lambda: state.update(memories=bank.read(spread)),  # noqa: B023
            "stack": lambda: MemoryStack.of(state["memories"], decoder.dtype, decoder.device),  # noqa: B023
            "raw": lambda: _raw(bank, [places[id] for id in spread]),  # noqa: B023
        }
        for step, work in steps.items():
            if cold and step in ("load", "raw"):
                bank.close()
                drop_page_cache(bank.path / SHARDS)
            began = time.perf_counter()
            work()
            finished(decoder.device)
            if turn:
                seconds[step].append(time.perf_counter() - began)
    read = min(len(names), plan.batch * count)
    return Steps(len(names), bank.stats()["codec"], cold, bank.record_bytes, read, seconds)


def _raw(bank: Bank, places: Sequence[tuple[int, int]]) -> int:
    size = bank.record_bytes
    return read_raw([(bank.path / SHARDS / f"{shard:05d}.kv", slot * size) for shard, slot in places], size)


def _report(decoder: Decoder, plan: Plan, found: Sequence[Steps]) -> Report:
    rows = [[one.name, *[_cell(one, step) for step in STEPS], f"{one.rate('raw') / 1e6:,.0f}"] for one in found]
    warm = [one for one in found if not one.cold and one.codec == plan.codecs[0].partition(":")[0]]
    ratios = {}
    for one in found:
        kind = f"{one.codec}_{'cold' if one.cold else 'warm'}_{one.references}"
        ratios[f"load_over_raw_{kind}"] = one.percentile("raw", 50) / one.percentile("load", 50)
    if len(warm) > 1:
        ratios[f"recall_at_{warm[-1].references}_over_{warm[0].references}"] = warm[-1].whole / warm[0].whole
    settings = {**asdict(plan), "banks": None if plan.banks is None else str(plan.banks)}
    return Report(
        "recall",
        Machine.of(decoder.device),
        {"model": decoder.name, "dtype": str(decoder.dtype).removeprefix("torch."), **settings},
        ["bank", *[f"{step}, ms p50 / p95" for step in STEPS], "raw, MB/s"],
        rows,
        ratios,
        {"recalls": [asdict(one) for one in found]},
        f"ms for a whole recall of {plan.batch} queries (sum of the steps' medians)",
        [Bar(one.name, 1000 * one.whole, 1000 * one.whole, 1000 * one.whole) for one in found],
    )


def _cell(one: Steps, step: str) -> str:
    return f"{1000 * one.percentile(step, 50):.3g} / {1000 * one.percentile(step, 95):.3g}"
