"""`memory3 train`: one thin function; heavy imports happen inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memory3.cli.common import Json, Seed, TokensPerHead, spec_of, training

Stage = Annotated[str, typer.Argument(help="warmup, continual, convert, sft, dpo, or reader (a small one from nothing).")]
Recipe = Annotated[str | None, typer.Argument(help="Which recipe of the stage; without, its first. `--list` names them.")]


def train(
    stage: Stage = "",
    recipe: Recipe = None,
    data: Annotated[
        list[str] | None, typer.Option(help="File, folder or hub:NAME of the training data; may be given several times.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of caches, checkpoints, logs and the finished model.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of the decoder to start from; by default the one that ships. Recipes that begin with fresh weights take none."
        ),
    ] = None,
    bank: Annotated[str | None, typer.Option(help="continual, sft, dpo: bank whose references are recalled.")] = None,
    spec: Annotated[Path | None, typer.Option(help="JSON of a memory spec, which overrules the model's own.")] = None,
    tokens_per_head: TokensPerHead = None,
    size: Annotated[int, typer.Option(min=1, help="Depth of a fresh model; all its other sizes follow.")] = 6,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    rate: Annotated[float | None, typer.Option(help="Peak learning rate, above 0.")] = None,
    length: Annotated[int | None, typer.Option(min=64, help="warmup, continual: tokens of a sequence.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences or examples of a micro-batch.")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 1,
    optimizer: Annotated[str | None, typer.Option(help="adamw or muon; by default the recipe's own.")] = None,
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

    from memory3.train.inputs import Inputs
    from memory3.train.recipes import RECIPES
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
            spec=None if spec is None else spec_of(spec),
            tokens_per_head=tokens_per_head,
            size=size,
            steps=steps,
            rate=rate,
            batch=batch,
            length=length,
            accumulate=accumulate,
            optimizer=optimizer,
            minutes=minutes,
            seed=seed,
            text_field=text_field,
            exclude_own=exclude_own,
            peak_flops=peak_flops,
            tell=tell,
        )
        done, planned = run_stage(stage, recipe, inputs, report)
    if not _left():
        return
    finished = str(out / "model") if done >= planned else None
    if as_json:
        print(json.dumps({"steps": done, "planned": planned, "model": finished}))
    else:
        more = f", model in {finished}" if finished else "; run the same command again to go on"
        print(f"{done} of {planned} steps done{more}")


def _left() -> bool:
    """Processes of torchrun part as they should; whether this one speaks for all."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    main = distributed.get_rank() == 0
    distributed.destroy_process_group()
    return main
