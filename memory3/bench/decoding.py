"""Decoding with memory beside decoding without, and beside text: the protocol of the paper's Table 21, at any shape.

A batch of prompts is answered greedily, `output` tokens each. Memory is recalled for every chunk of the prompt and for all but the last of
the answer (3 recalls for 128 in and 128 out), each time other references, and none is held in RAM. What text gets:

* `text-once`: the references of one recall stand before the prompt, and are never changed;
* `text-each-refresh`: the same knowledge as memory, so at every recall the new references and all context so far are encoded;
* `text-cached`: the same with a prefix cache: what was encoded stays, and the new references come behind it.

Searching is in none of them: all need the same. Text answers run in a loop of their own that does nothing but the model's pass
and the choice of the largest logit, so its side is not made slower by what `generation` does for its users; single tokens attend as they
do there (`attention.Stepping`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from memory3.attention import KEYWORD, Stepping
from memory3.bank import Bank
from memory3.bench.machine import Machine, drop_page_cache, peak_bandwidth, peak_flops
from memory3.bench.report import Bar, Report
from memory3.bench.scenes import UniqueRecall, random_bank, words
from memory3.bench.turns import in_turns
from memory3.codec import codec_named
from memory3.cost import Shape, memory_read_flops
from memory3.decoder import Decoder
from memory3.generation import Prompt, stream
from memory3.spec import MemorySpec, SpecError

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Protocol:
    """Sizes of the run; the defaults are the paper's.

    Args:
        batch: sequences answered together.
        prompt: tokens of a prompt, its `<s>` among them.
        output: new tokens of an answer, no fewer.
        repeats: turns of each way, behind one that does not count; the median counts.
        codec: of the way `memory-codec`, as `write --codec` takes it.
        seed: of texts and memories.
    """

    batch: int = 32
    prompt: int = 128
    output: int = 128
    repeats: int = 3
    codec: str = "rotated"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "output", "repeats"):
            if getattr(self, name) < 1:
                raise SpecError(f"found {name}={getattr(self, name)}, expected at least 1")

    def chunks(self, decoder: Decoder) -> tuple[int, int]:
        """Recalls for the prompt and for the answer."""
        size = decoder.spec.chunk_length
        return -(-self.prompt // size), -(-self.output // size) - 1


@dataclass
class Scene:
    """What the ways of one run share.

    Args:
        decoder: the model; its spec is that of the sparse memories.
        protocol: sizes.
        folder: for banks.
        prompts: `(batch, prompt)` token ids.
        texts: `(recalls, batch, references * length)` token ids: what text reads in place of memory.
        first_token_s: seconds to the first token, of every turn of every way.
        timings: of the ways through `generation`: recall, prefill and decode seconds of every turn.
        record_bytes: of the banks that were made, by way.
    """

    decoder: Decoder
    protocol: Protocol
    folder: Path
    prompts: torch.Tensor
    texts: torch.Tensor
    first_token_s: dict[str, list[float]] = field(default_factory=dict)
    timings: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    record_bytes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, decoder: Decoder, protocol: Protocol, folder: Path) -> Scene:
        """A scene of random prompts and texts."""
        if protocol.prompt <= len(decoder.bos_ids):
            raise SpecError(f"found prompt={protocol.prompt}, expected at least {len(decoder.bos_ids) + 1}: `<s>` and a word")
        rng, bos = np.random.default_rng(protocol.seed), decoder.bos_ids
        rows = [[*bos, *words(decoder, rng, protocol.prompt - len(bos))] for _ in range(protocol.batch)]
        recalls, spec = sum(protocol.chunks(decoder)), decoder.spec
        length = spec.references_per_chunk * spec.reference_length
        texts = np.array(words(decoder, rng, recalls * protocol.batch * length)).reshape(recalls, protocol.batch, length)
        device = decoder.device
        return cls(decoder, protocol, folder, torch.tensor(rows, device=device), torch.from_numpy(texts).to(device))

    @property
    def references(self) -> int:
        """References that one turn recalls."""
        return len(self.texts) * self.protocol.batch * self.decoder.spec.references_per_chunk

    def bank(self, way: str, spec: MemorySpec, codec: str | None = None) -> tuple[Decoder, Bank]:
        """A bank of one turn's references of random key-values, and the decoder that reads it."""
        decoder = self.decoder if spec == self.decoder.spec else self.decoder.using(spec)
        chosen = None if codec is None else codec_named(codec, decoder.dtype)
        bank = random_bank(decoder, self.folder / way, self.references, self.protocol.seed, chosen, batch=32)
        self.record_bytes[way] = bank.record_bytes
        return decoder, bank

    def answer(self, way: str, decoder: Decoder, recall: UniqueRecall | None) -> None:
        """Answer all prompts through `generation`."""
        bos = len(decoder.bos_ids)
        real = (*[False] * bos, *[True] * (self.protocol.prompt - bos))
        prompts = [Prompt(tuple(row), real) for row in self.prompts.tolist()]
        config = deepcopy(decoder.model.generation_config)
        config.eos_token_id, config.do_sample = [], False  # no token ends an answer
        first = None
        for token in stream(decoder, prompts, recall=recall, config=config, max_new_tokens=self.protocol.output):
            first = first or token.seconds
            if token.completion is not None:
                timings = token.completion.timings
        assert first is not None
        self.first_token_s.setdefault(way, []).append(first)
        self.timings.setdefault(way, []).append((timings.recall_s, timings.prefill_s, timings.decode_s))


Run = Callable[[int], object]
"""One turn of a way; it is given the number of the turn."""
Way = Callable[[Scene, str], Run]


def none(scene: Scene, way: str) -> Run:
    """The plain model."""
    return lambda turn: scene.answer(way, scene.decoder, None)


def memory(scene: Scene, way: str) -> Run:
    """Sparse memories as they are, their files in the page cache."""
    return _recalling(scene, way, *scene.bank(way, scene.decoder.spec))


def memory_cold(scene: Scene, way: str) -> Run:
    """The same from the disk: the page cache is dropped before each turn."""
    decoder, bank = scene.bank(way, scene.decoder.spec)
    run = _recalling(scene, way, decoder, bank)

    def cold(turn: int) -> None:
        bank.close()
        drop_page_cache(bank.path)
        run(turn)

    return cold


def memory_codec(scene: Scene, way: str) -> Run:
    """Sparse memories of a codec, decoded at every recall."""
    return _recalling(scene, way, *scene.bank(way, scene.decoder.spec, scene.protocol.codec))


def dense(scene: Scene, way: str) -> Run:
    """All tokens at all layers, what systems load that keep the key-values of whole texts."""
    every = replace(
        scene.decoder.spec, layers=tuple(range(scene.decoder.geometry.num_layers)), heads=None, tokens_per_head=None
    )
    decoder = scene.decoder.using(every)
    return _recalling(scene, way, *scene.bank(way, decoder.spec))


def _recalling(scene: Scene, way: str, decoder: Decoder, bank: Bank) -> Run:
    recall = UniqueRecall(bank, decoder.spec.references_per_chunk)

    def run(turn: int) -> None:
        recall.restart()
        scene.answer(way, decoder, recall)

    return run


def text_once(scene: Scene, way: str) -> Run:
    """The references of one recall before the prompt."""
    bos = scene.prompts[:, : len(scene.decoder.bos_ids)]
    behind = scene.prompts[:, len(scene.decoder.bos_ids) :]

    def run(turn: int) -> None:
        reader = _Plain(scene)
        reader.read(torch.cat([bos, scene.texts[0], behind], 1))
        scene.first_token_s.setdefault(way, []).append(reader.seconds)
        reader.write(scene.protocol.output)

    return run


def text_each_refresh(scene: Scene, way: str) -> Run:
    """At every recall the new references and all context so far."""
    return _refreshing(scene, way, cached=False)


def text_cached(scene: Scene, way: str) -> Run:
    """At every recall the new references alone, behind everything before them."""
    return _refreshing(scene, way, cached=True)


def _refreshing(scene: Scene, way: str, cached: bool) -> Run:
    size, bos = scene.decoder.spec.chunk_length, scene.prompts[:, : len(scene.decoder.bos_ids)]
    of_prompt, of_answer = scene.protocol.chunks(scene.decoder)

    def run(turn: int) -> None:
        reader = _Plain(scene)
        for n in range(of_prompt):
            end = min((n + 1) * size, scene.protocol.prompt)
            if cached and n:
                reader.read(torch.cat([scene.texts[n], scene.prompts[:, n * size : end]], 1))
            else:
                reader = _Plain(scene, reader.seconds)
                reader.read(torch.cat([bos, scene.texts[n], scene.prompts[:, bos.shape[1] : end]], 1))
        scene.first_token_s.setdefault(way, []).append(reader.seconds)
        context, written = scene.prompts[:, bos.shape[1] :], 0
        for n in range(of_answer + 1):
            new = min(size, scene.protocol.output - written)
            context = torch.cat([context, reader.write(new)], 1)
            written += new
            if n < of_answer:
                texts = scene.texts[of_prompt + n]
                if cached:
                    reader.read(torch.cat([context[:, -1:], texts], 1))
                else:
                    reader = _Plain(scene, reader.seconds)
                    reader.read(torch.cat([bos, texts, context], 1))

    return run


class _Plain:
    """The plain model with a key-value cache, greedily and with nothing around it."""

    def __init__(self, scene: Scene, seconds: float = 0.0) -> None:
        self.decoder, self.cache, self.seconds = scene.decoder, scene.decoder.fresh_cache(), seconds
        self.next = torch.empty(0)

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> None:
        """Encode `(batch, n)` tokens behind the others."""
        began = time.perf_counter()
        keyword = {self.decoder.cache_keyword: self.cache, KEYWORD: Stepping()}
        logits = self.decoder.model(input_ids=ids, use_cache=True, logits_to_keep=1, **keyword).logits
        self.next = logits[:, -1].argmax(-1, keepdim=True)
        self.seconds += time.perf_counter() - began

    def write(self, count: int) -> torch.Tensor:
        """`(batch, count)` new tokens; the last is not encoded yet."""
        found = [self.next]
        for _ in range(count - 1):
            self.read(found[-1])
            found.append(self.next)
        return torch.cat(found, 1)


WAYS: dict[str, Way] = {
    "none": none,
    "memory": memory,
    "memory-cold": memory_cold,
    "memory-codec": memory_codec,
    "dense": dense,
    "text-once": text_once,
    "text-each-refresh": text_each_refresh,
    "text-cached": text_cached,
}
"""Every way of decoding that is compared."""

NAMES = {
    "none": "no memory",
    "memory": "sparse memory, page cache warm",
    "memory-cold": "sparse memory, page cache dropped",
    "memory-codec": "sparse memory, codec",
    "dense": "dense memory: all tokens, all layers",
    "text-once": "text encoded once",
    "text-each-refresh": "text encoded again at each refresh",
    "text-cached": "the same with a prefix cache",
}


def bench_decode(
    decoder: Decoder, protocol: Protocol, ways: Sequence[str] = tuple(WAYS), tell: Tell = lambda done, total: None
) -> Report:
    """Run the ways in turns.

    Raises:
        SpecError: an unknown way, or no `none` to compare with.
    """
    unknown = [way for way in ways if way not in WAYS]
    if unknown or "none" not in ways:
        raise SpecError(f"found ways {', '.join(ways)}, expected none and any others of {', '.join(WAYS)}")
    total = (protocol.repeats + 1) * len(ways)
    with TemporaryDirectory(prefix="memory3-bench-") as folder:
        scene = Scene.of(decoder, protocol, Path(folder))
        runs = {way: WAYS[way](scene, way) for way in ways}
        seconds = in_turns(runs, protocol.repeats, decoder.device, lambda done: tell(done, total))
        peaks = {
            "matmul_flops": peak_flops(decoder.device, decoder.dtype),
            "copy_bytes_per_s": peak_bandwidth(decoder.device),
        }
    return _report(scene, seconds, peaks)


def _report(scene: Scene, seconds: dict[str, tuple[float, ...]], peaks: dict[str, float]) -> Report:
    protocol, decoder = scene.protocol, scene.decoder
    made = protocol.batch * protocol.output
    rate = {way: made / median(turns) for way, turns in seconds.items()}
    first = {way: median(scene.first_token_s[way][1:]) for way in seconds}
    rows, bars = [], []
    for way, turns in seconds.items():
        low, high = made / max(turns), made / min(turns)
        rows.append(
            [
                NAMES[way] + (f" {protocol.codec}" if way == "memory-codec" else ""),
                f"{rate[way]:,.1f} [{low:,.1f}, {high:,.1f}]",
                f"{rate[way] / rate['none']:.3f}",
                f"{first[way]:.3g}",
                f"{scene.record_bytes[way]:,}" if way in scene.record_bytes else "-",
            ]
        )
        bars.append(Bar(NAMES[way], rate[way], low, high))
    settings = {
        "model": decoder.name,
        "layers": decoder.geometry.num_layers,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "batch": protocol.batch,
        "prompt": protocol.prompt,
        "output": protocol.output,
        "repeats": protocol.repeats,
        "recalls": len(scene.texts),
        "references": decoder.spec.references_per_chunk,
        "codec": protocol.codec,
    }
    return Report(
        "decode",
        Machine.of(decoder.device),
        settings,
        ["way", "tokens/s, median [least, most]", "rate beside no memory", "s to the first token", "bytes of a reference"],
        rows,
        _ratios(rate, first) | _refresh_ratio(scene, seconds, peaks),
        {
            "tokens_per_s": rate,
            "first_token_s": first,
            "parts_s": {way: [median(part) for part in zip(*turns[1:], strict=True)] for way, turns in scene.timings.items()},
            "record_bytes": scene.record_bytes,
            "refresh": _refresh(scene, seconds, peaks),
            "peaks": peaks,
        },
        "tokens/s",
        bars,
    )


def _ratios(rate: dict[str, float], first: dict[str, float]) -> dict[str, float]:
    """Each way beside no memory, and sparse memory beside each other way."""
    found = {f"{_key(way)}_over_none": value / rate["none"] for way, value in rate.items() if way != "none"}
    if "memory" in rate:
        others = [way for way in rate if way.startswith("text") or way == "dense"]
        found |= {f"memory_over_{_key(way)}": rate["memory"] / rate[way] for way in others}
        found |= {f"first_token_{_key(way)}_over_memory": first[way] / first["memory"] for way in others}
    return found


def _key(way: str) -> str:
    return way.replace("-", "_")


def _refresh(scene: Scene, seconds: dict[str, tuple[float, ...]], peaks: dict[str, float]) -> dict[str, Any]:
    """What one recall of the whole batch costs: seconds beside no memory, and the least that its bytes and FLOPs could take.

    The bound: bytes of the records over the bandwidth that was measured, and the FLOPs of reading them (`memory3.cost`) over the peak of
    matrix products that was measured. `added_s` is a small difference of two long times; `recall_s`, a part of it, was timed by itself.
    """
    spec, decoder = scene.decoder.spec, scene.decoder
    read = scene.protocol.batch * spec.references_per_chunk
    work = read * memory_read_flops(Shape.of(decoder.model.config), spec)
    found: dict[str, Any] = {}
    for way in (w for w in seconds if w in scene.record_bytes and w != "dense"):
        moved = scene.record_bytes[way] * read
        bound = moved / peaks["copy_bytes_per_s"] + work / peaks["matmul_flops"]
        added = (median(seconds[way]) - median(seconds["none"])) / len(scene.texts)
        recall = median(turn[0] for turn in scene.timings[way][1:]) / len(scene.texts)
        found[way] = {"added_s": added, "recall_s": recall, "bytes": moved, "flops": work, "bound_s": bound}
    return found


def _refresh_ratio(scene: Scene, seconds: dict[str, tuple[float, ...]], peaks: dict[str, float]) -> dict[str, float]:
    """Added cost of one refresh over its bound, and of its recall alone."""
    parts = _refresh(scene, seconds, peaks)
    return {
        f"{what}_{_key(way)}_over_bound": row[f"{name}_s"] / row["bound_s"]
        for way, row in parts.items()
        for what, name in (("refresh", "added"), ("recall", "recall"))
    }
