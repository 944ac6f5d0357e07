"""`memory3 train`: run or resume a recipe, and put the finished model into a folder of ordinary files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from memory3.decoder import Decoder
from memory3.family import SPEC_FILE
from memory3.spec import MemorySpec
from memory3.train.recipes import Inputs, recipe_of
from memory3.train.settings import Report, TrainError

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
    if done >= planned and is_main_process():
        save_model(made.decoder, inputs.out / "model", made.spec)
    return done, planned


def is_main_process() -> bool:
    """Whether this process writes for all of a run."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def save_model(decoder: Decoder, folder: Path, spec: MemorySpec | None) -> None:
    """Weights in safetensors shards below 16 MB, tokenizer, and the spec the model was trained with."""
    decoder.detach()
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    decoder.model.save_pretrained(fresh, max_shard_size=MAX_SHARD)
    decoder.tokenizer.save_pretrained(fresh)
    if spec is not None:
        (fresh / SPEC_FILE).write_text(json.dumps(spec.to_json(), indent=1) + "\n", "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
