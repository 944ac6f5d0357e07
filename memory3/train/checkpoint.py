"""Checkpoints of a run: the learned weights, the optimizer's moments, and where the run stood. No pickle.

`checkpoint` is the last one, `checkpoint.old` the one before: a spike may have begun before the last was written. Each is
written whole or not at all, so a killed run finds one of them. Parameters may be sharded by FSDP (version 2): then every
process takes part in gathering, and the main one writes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory3.train.settings import TrainError
from memory3.train.spikes import Watch

LAST, BEFORE = "checkpoint", "checkpoint.old"


@dataclass
class Place:
    """Where a run stands.

    Args:
        step: optimizer steps done.
        position: batches drawn; larger than `step` by those that spikes made it skip.
        micro_batches: of a step, over all processes.
        watch: what the guard against spikes has seen.
        facts: what the run is of, as JSON values (`Settings.facts` and others).
    """

    step: int = 0
    position: int = 0
    micro_batches: int = 1
    watch: Watch = field(default_factory=Watch)
    facts: dict[str, Any] = field(default_factory=dict)


def save(model: Any, optimizer: Any, folder: Path, place: Place, main: bool = True) -> None:
    """Write `folder/checkpoint` (learned weights and moments as safetensors, the place as JSON) and keep the one before.

    Args:
        main: whether this process writes; with FSDP all have to call.
    """
    weights = _gathered(_learned(model), main)
    moments = _gathered(_moments(model, optimizer), main)
    if main:
        _write(folder, weights, moments, place)


def _write(folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], place: Place) -> None:
    from safetensors.torch import save_file

    fresh, final, old = folder / "checkpoint.new", folder / LAST, folder / BEFORE
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(weights, fresh / "model.safetensors")
    save_file(moments, fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps(asdict(place)), "utf-8")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(fresh, final)


def drop_last(folder: Path) -> None:
    """Forget the last checkpoint where there is one before it, which becomes the last."""
    if (folder / BEFORE / "state.json").exists():
        shutil.rmtree(folder / LAST, ignore_errors=True)
        os.replace(folder / BEFORE, folder / LAST)


def restore(
    model: Any, optimizer: Any, folder: Path, micro_batches: int = 1, facts: dict[str, Any] | None = None
) -> Place | None:
    """Load the last whole checkpoint into model and optimizer, in every process; `None` where there is none.

    Raises:
        TrainError: it belongs to another run (`facts`; a `rate` may be lower than it was), to a model of other shapes, or to
            steps of another number of micro-batches.
    """
    found = next((folder / name for name in (LAST, BEFORE) if (folder / name / "state.json").exists()), None)
    if found is None:
        return None
    from safetensors.torch import load_file

    place = _place(json.loads((found / "state.json").read_text("utf-8")), micro_batches)
    facts = place.facts if facts is None else facts
    _same_run(found, place.facts, json.loads(json.dumps(facts)))
    if place.micro_batches != micro_batches:
        raise TrainError(
            f"found a checkpoint of {place.micro_batches} micro-batches a step in {found}, expected {micro_batches}: "
            "choose processes times accumulate as before, or use another --out"
        )
    weights, learned = load_file(found / "model.safetensors"), dict(_learned(model))
    if {n: t.shape for n, t in weights.items()} != {n: p.shape for n, p in learned.items()}:
        raise TrainError(f"found a checkpoint of another model in {found}, expected the shapes of this one: use another --out")
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(_like(parameter, weights[name]))
    optimizer.state.clear()
    for key, tensor in load_file(found / "optimizer.safetensors").items():
        kind, _, name = key.partition("|")
        optimizer.state[learned[name]][kind] = tensor if kind == "step" else _like(learned[name], tensor)
    return replace(place, facts=facts)


def _same_run(found: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """`TrainError` where a fact of a checkpoint is another now; a lower rate is what the guard against spikes advises."""
    other = [name for name in before if name in now and before[name] != now[name]]
    if "rate" in other and now["rate"] < before["rate"]:
        other.remove("rate")
    if other:
        theirs, ours = (" and ".join(f"{name} {_short(facts[name])}" for name in other) for facts in (before, now))
        raise TrainError(
            f"found a checkpoint of {theirs} in {found}, expected {ours}: use another --out, or give all as it was given before"
        )


def _short(value: Any) -> str:
    said = value if isinstance(value, str) else json.dumps(value)
    return said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]}…"


_MOST_SAID = 60


def _place(fields: dict[str, Any], micro_batches: int) -> Place:
    """The place that a checkpoint names; one of an earlier version names the step alone."""
    step = int(fields["step"])
    watch = Watch(**fields.get("watch", {}))
    position, several = int(fields.get("position", step)), int(fields.get("micro_batches", micro_batches))
    return Place(step, position, several, watch, fields.get("facts", {}))


def full_weights(model: Any, main: bool = True) -> dict[str, Tensor]:
    """Every parameter of the model by name, gathered from all processes, in the main one (empty in the others).

    Give it to `save_pretrained(state_dict=...)` after a run with FSDP; all processes have to call.
    """
    return _gathered(((_plain(name), p) for name, p in model.named_parameters()), main)


def _learned(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters that require gradient: frozen ones are those of the model that training started from."""
    return ((_plain(name), p) for name, p in model.named_parameters() if p.requires_grad)


def _plain(name: str) -> str:
    """A parameter's name without what activation checkpointing adds to it."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _moments(model: Any, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _learned(model):
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            yield f"{kind}|{name}", tensor


def _gathered(named: Iterator[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, so that the device need not hold them all at once."""
    whole = {}
    for name, tensor in named:
        full = tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        if keep:
            whole[name] = full.detach().cpu().contiguous()
    return whole


def _like(parameter: Tensor, full: Tensor) -> Tensor:
    """A whole tensor where and as its parameter is: on its device, or sharded like it."""
    if not _is_sharded(parameter):
        return full.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    on: Any = parameter
    return distribute_tensor(full.to(on.device), on.device_mesh, on.placements)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
