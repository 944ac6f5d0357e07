"""`memory3 train`: which stage, on what, and where the finished model goes."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from memory3.bank import Bank
from memory3.decoder import Decoder
from memory3.documents import documents
from memory3.family import SPEC_FILE
from memory3.loading import load
from memory3.spec import MemorySpec
from memory3.train.loop import Objective, Schedule, Settings, TrainError, run
from memory3.train.recipe import STEPS, train_default
from memory3.train.sequences import Continual, Warmup, shuffled

STAGES = ("default", "warmup", "continual")
MAX_SHARD = "15MB"


def run_stage(
    stage: str,
    data: Path,
    out: Path,
    *,
    model: str | None,
    recalled: Path | None,
    steps: int,
    rate: float,
    length: int,
    batch: int,
    minutes: float,
    seed: int,
    report: Callable[[dict[str, float]], None],
) -> tuple[int, int]:
    """Run or resume a stage; when it is complete, `out/model` holds ordinary transformers files and `memory_spec.json`.

    Returns:
        Steps done and steps planned.

    Raises:
        TrainError: an unknown stage, missing data, or a checkpoint of another model.
    """
    if stage not in STAGES:
        raise TrainError(f"found stage {stage!r}, expected one of {', '.join(STAGES)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"{out} cannot be made ({error.strerror}): give a folder that can be written with --out") from None
    if stage == "default":
        decoder, done = train_default(data, out, minutes, report, seed)
        if done >= STEPS:
            save_model(decoder, out / "model", decoder.spec)
        return done, STEPS
    if stage == "continual" and recalled is None:
        raise TrainError(
            "found no --bank, expected one whose references the chunks recall: memory3 write SOURCES --bank FOLDER"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is about to be trained for memory
        decoder = load(model)
    texts = shuffled([document.text for document in documents(data)], seed)
    objective: Objective
    if stage == "warmup":
        objective = Warmup(decoder, texts, length, batch, seed)
    else:
        assert recalled is not None
        objective = Continual(decoder, texts, Bank(recalled), length, batch, seed)
    schedule = Schedule(rate, steps, warmup=max(1, steps // 20), decay=steps // 5)
    done = run(decoder, objective, Settings(out, schedule, minutes=minutes), report)
    if done >= steps:
        save_model(decoder, out / "model", decoder.spec if stage == "continual" else None)
    return done, steps


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
