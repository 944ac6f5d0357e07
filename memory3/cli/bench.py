"""`memory3 bench …`: one thin function per benchmark; heavy imports happen inside.

Each prints a table, its ratios and, as the last line, one JSON document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memory3.cli.common import Device, Model, Seed, TokensPerHead, check_picture_file, decoder_of, progress

if TYPE_CHECKING:
    from memory3.decoder import Decoder

bench_app = typer.Typer(no_args_is_help=True, help="Measure time and bytes, as ratios from one run.")

Preset = Annotated[str | None, typer.Option(help="Random weights of a shape: paper-2.4b or paper-0.9b.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16; by default that of the model's files, with --preset bfloat16 where the machine computes in it."
    ),
]
Layers = Annotated[int | None, typer.Option(min=1, help="With --preset: keep so many layers.")]
Picture = Annotated[Path | None, typer.Option(help="Picture of the table.")]
Repeats = Annotated[int, typer.Option(min=1, help="Turns of each way; the median counts.")]


@contextmanager
def benched(
    model: str | None, preset: str | None, layers: int | None, device: str | None, dtype: str | None
) -> Iterator[Decoder]:
    """The decoder that is measured: a finished one, or random weights of a shape (by default in bfloat16 where the machine computes in
    it, else in float32)."""
    import torch

    from memory3.bench.scenes import random_decoder
    from memory3.precision import computes_bf16
    from memory3.spec import SpecError

    if preset is None:
        if layers is not None:
            raise SpecError(f"found --layers {layers} without --preset, expected a shape to cut: --preset paper-2.4b")
        with decoder_of(model, None, device, dtype) as decoder:
            yield decoder
        return
    if model is not None:
        raise SpecError("found both --model and --preset, expected one of them: a preset has random weights")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or ("bfloat16" if computes_bf16(where.type) else "float32"))
    with random_decoder(preset, layers, kind, where) as decoder:
        yield decoder


@bench_app.command()
def decode(
    preset: Preset = None,
    layers: Layers = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences answered together.")] = 32,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, its <s> among them.")] = 128,
    output: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    repeats: Repeats = 3,
    codec: Annotated[str, typer.Option(help="Codec of the way memory-codec.")] = "rotated",
    way: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these ways beside none: memory, memory-cold, memory-codec, dense, text-once, text-each-refresh, text-cached."
        ),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    out: Picture = None,
) -> None:
    """Decoding: without memory, with sparse and dense memory, and with text, by the protocol of the paper's Table 21."""
    from memory3.bench.decoding import WAYS, Protocol, bench_decode

    check_picture_file(out)
    protocol = Protocol(batch, prompt, output, repeats, codec, seed)
    ways = tuple(WAYS) if not way else tuple(dict.fromkeys(["none", *way]))
    with benched(model, preset, layers, device, dtype) as decoder, progress("measuring") as tell:
        report = bench_decode(decoder, protocol, ways, tell)
    report.show(out)


@bench_app.command()
def write(
    preset: Preset = None,
    layers: Layers = None,
    references: Annotated[int, typer.Option(min=1, help="References of a turn, of full length.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="References encoded together.")] = 64,
    repeats: Repeats = 3,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    out: Picture = None,
) -> None:
    """Writing: references a second, and the share of the matrix-multiply peak that was measured in the same run."""
    from memory3.bench.encoding import Load, bench_write

    check_picture_file(out)
    with benched(model, preset, layers, device, dtype) as decoder, progress("measuring") as tell:
        report = bench_write(decoder, Load(references, batch, repeats, seed), tell)
    report.show(out)


@bench_app.command()
def recall(
    preset: Preset = None,
    layers: Layers = None,
    references: Annotated[list[int] | None, typer.Option(min=1, help="Sizes of the banks; by default 1000 and 10000.")] = None,
    codec: Annotated[list[str] | None, typer.Option(help="Codecs of the banks; by default raw and rotated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Queries of a recall.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Recalls of each kind.")] = 10,
    cold: Annotated[bool, typer.Option("--cold/--no-cold", help="Also from the disk, with the page cache dropped.")] = True,
    banks: Annotated[
        Path | None, typer.Option(help="Folder in which the banks stay for the next run; an interrupted one goes on there.")
    ] = None,
    tokens_per_head: TokensPerHead = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    out: Picture = None,
) -> None:
    """Recall step by step: search, texts, load, stack, beside a raw read of the same bytes."""
    from dataclasses import replace

    from memory3.bench.recalls import Plan, bench_recall

    check_picture_file(out)
    plan = Plan(tuple(references or Plan.references), tuple(codec or Plan.codecs), batch, repeats, cold, seed, banks)
    with benched(model, preset, layers, device, dtype) as decoder, progress("measuring") as tell:
        view = decoder if tokens_per_head is None else decoder.using(replace(decoder.spec, tokens_per_head=tokens_per_head))
        report = bench_recall(view, plan, tell)
    report.show(out)


@bench_app.command()
def codec(
    data: Annotated[Path, typer.Option(help="Folder that holds qa.parquet.")],
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Codecs as `write --codec` takes them, product apart; raw in bfloat16 is always there."),
    ] = None,
    codebook: Annotated[list[Path] | None, typer.Option(help="Codebooks of codec product, a row each.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions.")] = 300,
    repeats: Repeats = 3,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    out: Picture = None,
) -> None:
    """Codecs: bytes of a reference, speed, error of the attention output, and exact match, on dev questions."""
    from memory3.bench.codecs import CODECS, Sizes, bench_codec, draw_codecs

    check_picture_file(out)
    sizes = Sizes(limit, repeats=repeats, seed=seed)
    with benched(model, None, None, device, dtype) as decoder, progress("measuring") as tell:
        report = bench_codec(decoder, data, codec or CODECS, codebook or (), sizes, tell)
    report.show()
    if out is not None:
        draw_codecs(report.figures["codecs"], out)


@bench_app.command()
def peers(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a turn, one answered after the other.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, without its <s>.")] = 63,
    output: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    repeats: Repeats = 5,
    install: Annotated[
        bool, typer.Option("--install", help="Make the peers' venvs in --venvs first, by pip; llama.cpp is built from source.")
    ] = False,
    venvs: Annotated[Path, typer.Option(help="Folder of the venvs that --install makes, one for each peer.")] = Path(
        "build/peers"
    ),
    venv: Annotated[
        list[str] | None, typer.Option(help="Venv of one peer, as NAME=FOLDER; may be given several times.")
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    out: Picture = None,
) -> None:
    """Peers: what else reads references on this machine (transformers with text, llama.cpp, kvpress), beside memory."""
    from memory3.bench.peers.measuring import Sizes, bench_peers
    from memory3.bench.peers.venvs import given

    check_picture_file(out)
    sizes, folders = Sizes(prompts, prompt, output, repeats, seed), given(venv or ())
    with benched(model, None, None, device, dtype) as decoder, progress("measuring") as tell:
        report = bench_peers(decoder, sizes, folders, venvs, make=install, tell=tell)
    report.show(out)
