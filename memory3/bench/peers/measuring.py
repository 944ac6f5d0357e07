"""Peers beside memory: the same model, references, prompts and number of new tokens, in turns.

A turn of a way is: encode the references once, then answer every prompt behind them, one after the other. What is timed apart is the
encoding, the time to an answer's first token, and the rate of the tokens behind it. Each peer runs in a process of its own interpreter (`process`);
memory and the plain model answer the same questions here (`Own`). References are as long as the spec lets them be; memory reads them from the
files of a bank at every recall, through `generation`, with none held in RAM. So where the next prompt wants other references, memory's time stays as it is, and
peers that encode ahead encode again (`changed_s`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch

from memory3.bank import Bank
from memory3.bench.machine import Machine
from memory3.bench.peers.process import Process, export_gguf
from memory3.bench.peers.venvs import HOME, REQUIRED, PeerError, install, python_of
from memory3.bench.report import Bar, Report
from memory3.bench.scenes import random_text, words
from memory3.bench.turns import in_turns
from memory3.decoder import Decoder
from memory3.generation import Prompt, stream
from memory3.quiet import without_bars
from memory3.recall import Recall
from memory3.spec import Reference, SpecError
from memory3.writing import write

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        prompts: answered in a turn, all behind the same references.
        prompt: tokens of each, without `<s>`.
        output: new tokens of an answer, no fewer.
        repeats: turns of each way, behind one that does not count; the median counts.
        seed: of the texts.
    """

    prompts: int = 8
    prompt: int = 63
    output: int = 64
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("prompt", 1), ("output", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise SpecError(f"found {name}={getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True)
class Scene:
    """What all ways are asked.

    Args:
        texts: the references.
        bos: `<s>`, where the tokenizer has one.
        prefix: `<s>` and the references as text, as token ids.
        prompts: token ids, without `<s>`.
        kept: key-values of a head that memory keeps of all references together.
    """

    texts: tuple[str, ...]
    bos: list[int]
    prefix: list[int]
    prompts: list[list[int]]
    kept: int

    @classmethod
    def of(cls, decoder: Decoder, sizes: Sizes) -> Scene:
        """Random references of full length, and random prompts."""
        rng, spec = np.random.default_rng(sizes.seed), decoder.spec
        texts = tuple(reference_text(decoder, rng) for _ in range(spec.references_per_chunk))
        prefix = decoder.bos_ids + [id for text in texts for id in decoder.tokens(f"{text}\n\n")]
        prompts = [words(decoder, rng, sizes.prompt) for _ in range(sizes.prompts)]
        kept = sum(min(spec.slots, len(decoder.tokens(text))) for text in texts)
        return cls(texts, decoder.bos_ids, prefix, prompts, kept)


def reference_text(decoder: Decoder, rng: np.random.Generator) -> str:
    """A random text of as many tokens as a reference may have, or a few fewer where tokens grow together."""
    text, most = random_text(decoder, rng), decoder.spec.reference_length
    while len(decoder.tokens(text)) > most:
        ends = decoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        text = text[: min(ends[most - 1][1], len(text) - 1)]  # several tokens of one character end at the same place
    return text


class Partner(Protocol):
    """Whoever answers what `worker.py` describes."""

    def ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """One thing to do, and its answer."""


class Own:
    """Memory3 itself in this process: the plain model, and with a bank its memory. It keeps no text as a prefix."""

    def __init__(self, decoder: Decoder, scene: Scene, bank: Bank | None = None) -> None:
        self.decoder, self.scene, self.bank = decoder, scene, bank
        self.recall = (
            None if bank is None else Recall(bank, references=list(map(Reference, scene.texts)), cache_bytes=0, counted=False)
        )

    def ask(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """As `worker.py` answers; encoding is the model's pass over the references, storing them is not in it."""
        began = perf_counter()
        if what["do"] == "encode":
            if self.bank is None:
                return {"seconds": 0.0, "bytes": None}
            self.decoder.encode(self.scene.texts)
            return {"seconds": perf_counter() - began, "bytes": self.bank.record_bytes * len(self.scene.texts)}
        ids, bos, seen = what["prompt"], self.scene.bos, []
        prompt = Prompt((*bos, *ids), (*[False] * len(bos), *[True] * len(ids)))
        config = deepcopy(self.decoder.model.generation_config)
        config.eos_token_id, config.do_sample = [], False  # no token ends an answer
        made = []
        for token in stream(self.decoder, [prompt], recall=self.recall, config=config, max_new_tokens=what["output"]):
            seen.append(perf_counter())
            made.append(token.id)
        return {"ids": made, "first_s": seen[0] - began, "others_s": seen[-1] - seen[0]}


@dataclass(frozen=True)
class Way:
    """A row of the result.

    Args:
        peer: whose process answers; `memory3` is this one.
        title: for people.
        press: class of kvpress that drops key-values.
        text: whether it reads the references as the text of its prefix, all of it: then its answers are those of transformers.
    """

    peer: str
    title: str
    press: str | None = None
    text: bool = False


WAYS = {
    "none": Way("memory3", "memory3, no references"),
    "memory": Way("memory3", "memory3, sparse memory"),
    "transformers": Way("transformers", "transformers, text in the prompt", text=True),
    "llama.cpp": Way("llama.cpp", "llama.cpp, prefix cached", text=True),
    "kvpress": Way("kvpress", "kvpress, nothing dropped", text=True),
    "kvpress-expected-attention": Way("kvpress", "kvpress, ExpectedAttention", "ExpectedAttentionPress"),
    "kvpress-snapkv": Way("kvpress", "kvpress, SnapKV", "SnapKVPress"),
    "kvpress-knorm": Way("kvpress", "kvpress, Knorm", "KnormPress"),
}
"""Every way that is compared."""


@dataclass
class Taken:
    """What the turns of a way brought: `encode_s`, `first_s` (mean of the prompts) and `others_s` (their sum) of each, and the last answers."""

    encode_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    others_s: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    nbytes: int | None = None

    def note(self, encoded: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> None:
        """One more turn."""
        self.encode_s.append(encoded["seconds"])
        self.nbytes = encoded["bytes"]
        self.first_s.append(mean(one["first_s"] for one in answers))
        self.others_s.append(sum(one["others_s"] for one in answers))
        self.answers = [one["ids"] for one in answers]


@dataclass
class Comparison:
    """The partners of one run, and what became of them.

    Args:
        scene: what they are asked.
        sizes: how much.
        partners: by way.
        missing: peers that cannot run, by name, with the reason.
        versions: of the peers that do.
        taken: by way.
    """

    scene: Scene
    sizes: Sizes
    partners: dict[str, Partner]
    missing: dict[str, str]
    versions: dict[str, str]
    taken: dict[str, Taken] = field(default_factory=dict)

    def turn(self, name: str) -> None:
        """Encode the references and answer every prompt; a peer that fails is missing from then on."""
        way = WAYS[name]
        if way.peer in self.missing:
            return
        prefix = self.scene.bos if way.peer == "memory3" else self.scene.prefix
        options = {"press": way.press, "kept": self.scene.kept}
        try:
            self.taken.setdefault(name, Taken()).note(*self.asked(name, prefix, self.scene.prompts, options))
        except PeerError as error:
            self.fail(way.peer, error)

    def asked(
        self, name: str, prefix: list[int], prompts: list[list[int]], options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The answers of a partner to a prefix and to the prompts behind it."""
        partner = self.partners[name]
        encoded = partner.ask({"do": "encode", "prefix": prefix, **options})
        asked = [{"do": "answer", "prompt": prompt, "output": self.sizes.output} for prompt in prompts]
        return encoded, [partner.ask(one) for one in asked]

    def fail(self, peer: str, error: PeerError) -> None:
        """Name the peer with the reason, and forget what it did."""
        self.missing[peer] = str(error)
        self.taken = {name: taken for name, taken in self.taken.items() if WAYS[name].peer != peer}

    def plain(self) -> dict[str, list[list[int]]]:
        """Answers without references, by way, of the peers and of memory3's plain model: those must be the same tokens."""
        found = {"none": self.taken["none"].answers}
        for name in [name for name, taken in self.taken.items() if WAYS[name].text]:
            prompts = [[*self.scene.bos, *prompt] for prompt in self.scene.prompts]
            try:
                found[name] = [one["ids"] for one in self.asked(name, [], prompts, {"press": None, "kept": 0})[1]]
            except PeerError as error:
                self.fail(WAYS[name].peer, error)
        return found

    def agreement(self) -> list[dict[str, Any]]:
        """How far answers are those of transformers, without references and with them as text; empty where it cannot run."""
        plain = self.plain()
        text = {name: taken.answers for name, taken in self.taken.items() if WAYS[name].text}
        rows = []
        for references, answers in ((False, plain), (True, text)):
            for name in (name for name in answers if name != "transformers" and "transformers" in self.taken):
                rows.append({"way": name, "references": references, **alike(answers[name], answers["transformers"])})
        return rows


def alike(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> dict[str, float]:
    """`answers`: share of those that are the same; `tokens`: share of the tokens that come before an answer's first difference."""
    same = [
        next((n for n, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(some, others, strict=True)
    ]
    lengths = [len(one) for one in others]
    return {"tokens": sum(same) / sum(lengths), "answers": mean(float(a == b) for a, b in zip(same, lengths, strict=True))}


def bench_peers(
    decoder: Decoder,
    sizes: Sizes | None = None,
    venvs: Mapping[str, Path] | None = None,
    home: Path = HOME,
    *,
    make: bool = False,
    tell: Tell = lambda done, total: None,
) -> Report:
    """Compare; a peer that cannot run is named in the report with the reason.

    Args:
        decoder: the model; peers are given its weights as they are.
        sizes: how much is measured.
        venvs: folders of venvs by peer.
        home: where venvs of other peers lie.
        make: make the venvs in `home` that were not given.
        tell: told of the turns done.
    """
    sizes, scene = sizes or Sizes(), Scene.of(decoder, sizes or Sizes())
    total = (sizes.repeats + 1) * len(WAYS)
    with compared(decoder, scene, sizes, venvs or {}, home, make) as run:
        ways = {name: _turn(run, name) for name in WAYS}
        in_turns(ways, sizes.repeats, decoder.device, lambda done: tell(done, total))
        return report_of(decoder, run, run.agreement())


def _turn(run: Comparison, name: str) -> Callable[[int], object]:
    return lambda turn: run.turn(name)


@contextmanager
def compared(
    decoder: Decoder, scene: Scene, sizes: Sizes, venvs: Mapping[str, Path], home: Path, make: bool
) -> Iterator[Comparison]:
    """All partners that can run, started; they end on leaving."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="memory3-peers-")))
        bank = stack.enter_context(Bank(folder / "bank", decoder, create=True))
        write(decoder, [Reference(text) for text in scene.texts], bank)
        with without_bars():
            decoder.model.save_pretrained(folder / "model", max_shard_size="1000GB")
        own = {"none": Own(decoder, scene), "memory": Own(decoder, scene, bank)}
        run = Comparison(scene, sizes, {**own}, {}, {})
        for peer in REQUIRED:
            try:
                if make and peer != "transformers" and peer not in venvs:
                    install(peer, home)
                started = _started(decoder, peer, python_of(peer, venvs, home), folder, scene, sizes)
            except PeerError as error:
                run.missing[peer] = str(error)
                continue
            stack.callback(started.close)
            run.versions[peer] = started.version
            run.partners |= {name: started for name, way in WAYS.items() if way.peer == peer}
        yield run


def _started(decoder: Decoder, peer: str, python: Path, folder: Path, scene: Scene, sizes: Sizes) -> Process:
    file = folder / "model.gguf"
    if peer == "llama.cpp":
        export_gguf(python, folder / "model", file)
    setup = {
        "model": str(folder / "model"),
        "gguf": str(file),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": str(decoder.device),
        "threads": torch.get_num_threads(),
        "length": len(scene.prefix) + sizes.prompt + sizes.output + 8,
    }
    return Process(peer, python, setup)


def figures(taken: Taken, sizes: Sizes, references: int, stored: bool) -> dict[str, Any]:
    """Medians of the turns that count; `stored` references need no encoding where a prompt wants others than the one before."""
    encode, first, others = (median(seconds[1:]) for seconds in (taken.encode_s, taken.first_s, taken.others_s))
    return {
        "encode_s": encode,
        "first_token_s": first,
        "changed_s": first if stored else encode + first,
        "tokens_per_s": sizes.prompts * (sizes.output - 1) / others,
        "answer_s": first + others / sizes.prompts,
        "reference_bytes": None if taken.nbytes is None else taken.nbytes // references,
    }


def ratios(ways: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Rates of decoding beside the plain model's, and times to the first token and of a whole answer beside memory's."""
    found = {f"rate_{_key(name)}_over_none": way["tokens_per_s"] / ways["none"]["tokens_per_s"] for name, way in ways.items()}
    for what in ("first_token", "changed", "answer"):
        own = ways["memory"][f"{what}_s"]
        found |= {f"{what}_{_key(name)}_over_memory": way[f"{what}_s"] / own for name, way in ways.items()}
    return {name: value for name, value in found.items() if name not in SAME}


SAME = ("rate_none_over_none", "first_token_memory_over_memory", "changed_memory_over_memory", "answer_memory_over_memory")
"""Ratios of a way to itself."""


def _key(way: str) -> str:
    return way.replace("-", "_").replace(".", "_")


def report_of(decoder: Decoder, run: Comparison, agreement: Sequence[Mapping[str, Any]]) -> Report:
    """The finished comparison; peers that cannot run have a row with the reason."""
    ways = {name: figures(taken, run.sizes, len(run.scene.texts), name == "memory") for name, taken in run.taken.items()}
    found = ratios(ways)
    settings = {
        "model": decoder.name,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        **asdict(run.sizes),
        "references": len(run.scene.texts),
        "prefix": len(run.scene.prefix),
        "kept": run.scene.kept,
    }
    columns = ["way", "tokens/s, median [least, most]", "rate beside no references", "s to the first token", "beside memory"]
    columns += ["s to encode the references", "first token of other references, beside memory", "bytes of a reference"]
    rows = [_cells(name, run, ways[name], found) for name in ways]
    rows += [[peer, f"cannot run here: {reason}", *["-"] * 6] for peer, reason in run.missing.items()]
    return Report(
        "peers",
        Machine.of(decoder.device),
        settings,
        columns,
        rows,
        found,
        {
            "ways": [
                {"way": name, "peer": WAYS[name].peer, "version": run.versions.get(WAYS[name].peer), **way}
                for name, way in ways.items()
            ],
            "missing": [{"peer": peer, "reason": reason} for peer, reason in run.missing.items()],
            "agreement": list(agreement),
        },
        "s of an answer, its first token and the others",
        [Bar(WAYS[name].title, way["answer_s"], *_spread(run.taken[name], run.sizes)) for name, way in ways.items()],
    )


def _cells(name: str, run: Comparison, way: Mapping[str, Any], found: Mapping[str, float]) -> list[str]:
    made, turns = run.sizes.prompts * (run.sizes.output - 1), run.taken[name].others_s[1:]
    beside = found.get(f"rate_{_key(name)}_over_none", 1.0), found.get(f"first_token_{_key(name)}_over_memory", 1.0)
    return [
        WAYS[name].title,
        f"{way['tokens_per_s']:,.0f} [{made / max(turns):,.0f}, {made / min(turns):,.0f}]",
        f"{beside[0]:.3f}",
        f"{way['first_token_s']:.3g}",
        f"{beside[1]:.3g}",
        f"{way['encode_s']:.3g}" if way["reference_bytes"] is not None else "-",
        f"{found.get(f'changed_{_key(name)}_over_memory', 1.0):.3g}",
        f"{way['reference_bytes']:,}" if way["reference_bytes"] is not None else "-",
    ]


def _spread(taken: Taken, sizes: Sizes) -> tuple[float, float]:
    """The least and the most seconds of an answer, by turns; never past the medians' sum."""
    seconds = [first + others / sizes.prompts for first, others in zip(taken.first_s[1:], taken.others_s[1:], strict=True)]
    middle = median(taken.first_s[1:]) + median(taken.others_s[1:]) / sizes.prompts
    return min(*seconds, middle), max(*seconds, middle)
