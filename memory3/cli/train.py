"""`memory3 train`: one thin function; heavy imports happen inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memory3.cli.common import Json, Model, Seed, TokensPerHead, spec_of, training

Stage = Annotated[str, typer.Argument(help="warmup, continual, convert, sft, dpo, or reader (a small one from nothing).")]
Recipe = Annotated[str | None, typer.Argument(help="Which recipe of the stage; without, its first. `--list` names them.")]


def train(
    stage: Stage = "",
    recipe: Recipe = None,
    data: Annotated[
        list[str] | None, typer.Option(help="File, folder or hub:NAME of the training data; may be given several times.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of caches, checkpoints, logs and the finished model.")] = None,
    model: Model = None,
    bank: Annotated[str | None, typer.Option(help="continual, sft, dpo: bank whose references are recalled.")] = None,
    spec: Annotated[Path | None, typer.Option(help="JSON of a memory spec, which overrules the model's own.")] = None,
    tokens_per_head: TokensPerHead = None,
    size: Annotated[int, typer.Option(min=1, help="Depth of a fresh model; all its other sizes follow.")] = 6,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    length: Annotated[int | None, typer.Option(min=64, help="warmup, continual: tokens of a sequence.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences or examples of a micro-batch.")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 1,
    minutes: Annotated[float | None, typer.Option(help="Stop with a checkpoint after so long; run again to go on.")] = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    exclude_own: Annotated[
        bool, typer.Option("--exclude-own", help="continual: a chunk never reads references of its own document.")
    ] = False,
    peak_flops: Annotated[float | None, typer.Option(help="Peak of the device per second; its used share is logged.")] = None,
    seed: Seed = 0,
    listing: Annotated[bool, typer.Option("--list", help="Name the recipes, with what each promises, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model to read memory; resumable."""
    import json

    from memory3.train.recipes import RECIPES, Inputs
    from memory3.train.settings import TrainError
    from memory3.train.stages import run_stage

    if listing:
        for name, recipes in RECIPES.items():
            for one, function in recipes.items():
                print(f"{name} {one}\n    {' '.join((function.__doc__ or '').split())}")
        return
    for option, value in (("a stage", stage), ("--data", data), ("--out", out)):
        if not value:
            raise TrainError(
                f"found nothing for {option}, expected memory3 train STAGE RECIPE --data DATA --out FOLDER (--list names them)"
            )
    assert data is not None and out is not None
    with training(as_json) as (tell, report):
        inputs = Inputs(
            tuple(data),
            out,
            model=model,
            bank=bank,
            spec=spec_of(spec, tokens_per_head, model),
            size=size,
            steps=steps,
            rate=rate,
            batch=batch,
            length=length,
            accumulate=accumulate,
            minutes=minutes,
            seed=seed,
            text_field=text_field,
            exclude_own=exclude_own,
            peak_flops=peak_flops,
            tell=tell,
        )
        done, planned = run_stage(stage, recipe, inputs, report)
    _left()
    finished = str(out / "model") if done >= planned else None
    if as_json:
        print(json.dumps({"steps": done, "planned": planned, "model": finished}))
    else:
        more = f", model in {finished}" if finished else "; run the same command again to go on"
        print(f"{done} of {planned} steps done{more}")


def _left() -> None:
    """Processes of torchrun part as they should."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
