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
    from memory3.bank import Bank
    from memory3.decoder import Decoder
    from memory3.recall import Recall

Model = Annotated[str | None, typer.Option(help="Folder or hub name of a decoder; by default the model that ships.")]
Banks = Annotated[list[Path] | None, typer.Option("--bank", help="Bank to recall from; may be given several times.")]
Json = Annotated[
    bool, typer.Option("--json", help="JSON on stdout: one document as the last line, or one a line for questions and lists.")
]
MinScore = Annotated[float | None, typer.Option(help="Recall nothing that scores below.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most new tokens.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Sample = Annotated[float | None, typer.Option("--temperature", min=0.0, help="Sample at this temperature; default greedy.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; by default a GPU where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default that of the model's files.")]
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


def recall_of(banks: list[Path] | None, decoder: Decoder, **options: Any) -> Recall:
    from memory3.bank import Bank
    from memory3.recall import Recall
    from memory3.spec import BankError

    if not banks:
        raise BankError(
            "found no --bank, expected one to recall from: write it with `memory3 write SOURCES --bank FOLDER`, or --no-memory"
        )
    opened: list[Bank] = [Bank(path, decoder) for path in banks]
    return Recall(opened, **options)


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
