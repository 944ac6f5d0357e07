"""`memory3 train`: run or resume a recipe, and put the finished model into a folder of ordinary files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from memory3.decoder import Decoder
from memory3.family import SPEC_FILE
from memory3.quiet import without_bars
from memory3.spec import MemorySpec
from memory3.train.checkpoint import full_weights
from memory3.train.recipes import Inputs, Run, recipe_of
from memory3.train.settings import Report, TrainError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD = "15MB"


def run_stage(stage: str, recipe: str | None, inputs: Inputs, report: Report = lambda line: None) -> tuple[int, int]:
    """Run or resume a stage; when it is complete, `out/model` holds ordinary transformers files and `memory_spec.json`.

    Returns:
        Steps done and steps planned.

    Raises:
        TrainError: an unknown stage or recipe, missing data, or a checkpoint of another model.
    """
    chosen = recipe_of(stage, recipe)
    try:
        inputs.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(
            f"{inputs.out} cannot be made ({error.strerror}): give a folder that can be written with --out"
        ) from None
    made = chosen(inputs)
    done, planned = made.train(report), made.settings.schedule.steps
    if done >= planned:
        _saved_once(made, inputs.out / "model")
    return done, planned


def _saved_once(made: Run, folder: Path) -> None:
    """The finished model, written by the main process; with several, each gives what it holds of the weights."""
    from accelerate import PartialState

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
