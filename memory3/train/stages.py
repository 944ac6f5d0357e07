"""`memory3 train`: run or resume a recipe, and put the finished model into a folder of ordinary files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory3.decoder import Decoder
from memory3.family import SPEC_FILE
from memory3.quiet import without_bars
from memory3.reader import version_name
from memory3.remote import open_bank
from memory3.spec import MemorySpec
from memory3.train.checkpoint import full_weights
from memory3.train.corpus import data_key
from memory3.train.inputs import Inputs, Run
from memory3.train.recipes import RECIPES, check_options, recipe_of
from memory3.train.settings import Report, TrainError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD = "15MB"


def run_stage(stage: str, recipe: str | None, inputs: Inputs, report: Report = lambda line: None) -> tuple[int, int]:
    """Run or resume a stage; when it is complete, `out/model` holds ordinary transformers files and `memory_spec.json`.

    Returns:
        Steps done and steps planned.

    Raises:
        TrainError: an unknown stage or recipe, an option that it does not use, missing data, or a checkpoint of another run.
    """
    chosen = recipe_of(stage, recipe)
    name = recipe or next(iter(RECIPES[stage]))
    _check_place(inputs)
    try:
        inputs.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(
            f"{inputs.out} cannot be made ({error.strerror}): give a folder that can be written with --out"
        ) from None
    check_options(stage, name, inputs)
    made = chosen(inputs)
    settings = replace(made.settings, facts=_facts(f"{stage} {name}", inputs, made))
    done, planned = made.train(settings, report), settings.schedule.steps
    if done >= planned:
        _saved_once(made, inputs.out / "model")
    return done, planned


def _check_place(inputs: Inputs) -> None:
    """What a run writes must not be read as its data when it goes on."""
    inside = [d for d in inputs.data if Path(d).is_dir() and inputs.out.resolve().is_relative_to(Path(d).resolve())]
    if inside:
        raise TrainError(
            f"found --out {inputs.out} inside --data {inside[0]}, expected a folder beside it: the run would read what it writes"
        )


def _facts(stage: str, inputs: Inputs, made: Run) -> dict[str, Any]:
    """What a checkpoint of this run is of: all that its losses depend on, but for what the loop knows itself."""
    start = made.decoder.identity()["weights"] if inputs.model is not None else "default"
    facts = {"stage": stage, "data": data_key(inputs.data), "model": start, "spec": made.decoder.spec.to_json()}
    facts |= {name: getattr(inputs, name) for name in ("size", "batch", "length", "text_field", "exclude_own")}
    if inputs.bank is not None:
        bank = open_bank(inputs.bank)
        facts["bank"] = f"{bank.manifest.created} {version_name(bank.version)}"
    return facts | ({"steps": made.settings.schedule.steps} if made.stretched else {})


def _saved_once(made: Run, folder: Path) -> None:
    """The finished model in the dtype of the files that it came from, written by the main process; with several, each gives
    what it holds of the weights.
    """
    import torch
    from accelerate import PartialState

    made.decoder.model.to(getattr(torch, str(made.decoder.model.config.dtype or "float32").removeprefix("torch.")))
    state = PartialState()
    weights = full_weights(made.decoder.model, state.is_main_process) if state.num_processes > 1 else None
    if state.is_main_process:
        save_model(made.decoder, folder, made.spec, weights)


def save_model(decoder: Decoder, folder: Path, spec: MemorySpec | None, weights: dict[str, Tensor] | None = None) -> None:
    """Weights in safetensors shards below 16 MB, tokenizer, and the spec the model was trained with; `weights` where the model
    itself holds only a part of them.
    """
    decoder.detach()
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with without_bars():
        decoder.model.save_pretrained(fresh, max_shard_size=MAX_SHARD, state_dict=weights)
        decoder.tokenizer.save_pretrained(fresh)
    if spec is not None:
        (fresh / SPEC_FILE).write_text(json.dumps(spec.to_json(), indent=1) + "\n", "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
