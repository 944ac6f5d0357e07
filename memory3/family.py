"""Which models can read memory, what a look at their layers finds, and the spec that a model was trained with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memory3.attention import KEYWORD, Attended, Original, States
from memory3.rotation import CaughtRotations, rotates
from memory3.spec import MemorySpec, SpecError, UnsupportedModel

SPEC_FILE = "memory_spec.json"
"""Beside the weights of a model that was trained for memory: the spec it was trained with."""


class Stop(Exception):
    """Ends a forward pass once the last memory layer has given its key-values: later layers are never computed."""


@dataclass(frozen=True)
class Geometry:
    """What a probe of the memory layers found: kv heads, head dim, and which layers rotate."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    rotates: dict[int, bool]


class _Probe:
    """Keeps the keys of the first layers of one pass, with and without rotation."""

    def __init__(self, last_layer: int, caught: CaughtRotations) -> None:
        self.last_layer, self.caught = last_layer, caught
        self.keys: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, original: Original, module: nn.Module, states: States, options: dict[str, Any]) -> Attended:
        layer: int = module.layer_idx  # type: ignore[assignment]
        self.keys[layer] = (states.key, self.caught.undo(module, states.query, states.key)[1])
        if layer == self.last_layer:
            raise Stop
        return states.through(original, module, options)


def run_until_stop(model: Any, input_ids: Tensor, mask: Tensor, positions: Tensor, hook: Any) -> Any:
    try:
        return model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False, **{KEYWORD: hook})
    except Stop:
        return None


def checked_family(model: Any) -> None:
    config = model.config.get_text_config()
    kind = config.model_type
    reason = None
    layer_types = set(getattr(config, "layer_types", None) or [])
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder, and memory is read by a decoder's self-attention"
    elif getattr(config, "kv_lora_rank", None) is not None:
        reason = "its latent attention stores compressed key-values, not keys and values per head"
    elif layer_types - {"full_attention", "sliding_attention"}:
        reason = f"its {', '.join(sorted(layer_types - {'full_attention', 'sliding_attention'}))} layers have no plain self-attention to read memory with"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = "some of its layers share the key-values of others"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = (
            "its layers do not attend through transformers' attention interface (linear attention, state space or old code)"
        )
    if reason is not None:
        raise UnsupportedModel(f"found {kind}, expected a decoder with self-attention in every layer: {reason}")


@torch.no_grad()
def probed(model: Any, tokenizer: Any, num_layers: int, last_layer: int) -> Geometry:
    """Run a few tokens at two places through the memory layers; proves that the keyword reaches each of them."""
    size = min(int(model.get_input_embeddings().weight.shape[0]), len(tokenizer) or 1)
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(8, device=device) * 7 + 3).remainder(size).expand(2, -1)
    positions = torch.stack([torch.arange(8, device=device), torch.arange(8, device=device) + 5])
    caught = CaughtRotations()
    probe = _Probe(last_layer, caught)
    was_training = model.training
    model.eval()
    try:
        with caught.catching(model):
            run_until_stop(model.base_model, ids, torch.ones_like(ids), positions, probe)
    finally:
        model.train(was_training)
    missing = [layer for layer in range(last_layer + 1) if layer not in probe.keys]
    if missing:
        raise UnsupportedModel(
            f"found {model.config.model_type} whose layers {missing} were not reached by the memory keyword, expected every "
            "layer up to the last memory layer to attend through transformers' interface"
        )
    shapes = {(int(k.shape[1]), int(k.shape[3])) for k, _ in probe.keys.values()}
    if len(shapes) > 1:
        raise UnsupportedModel(f"found layers of different kv heads and head dims {sorted(shapes)}, expected one shape in all")
    found = {layer: rotates((k[0], k[1]), (u[0], u[1]), layer) for layer, (k, u) in probe.keys.items()}
    ((heads, dim),) = shapes
    return Geometry(num_layers, heads, dim, found)


def file_beside(model: Any, file: str) -> Path | None:
    """A file in the model's folder or, of what this machine has of it, in its hub repository; `None` where there is none."""
    from transformers.utils import cached_file

    name = str(getattr(model.config, "name_or_path", "") or "")
    if not name:
        return None
    found = Path(name, file) if Path(name).is_dir() else None
    if found is None:
        try:
            cached = cached_file(
                name,
                file,
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except (OSError, ValueError):  # a folder that is gone, or no hub name at all
            return None
        found = Path(cached) if cached else None
    return found if found is not None and found.is_file() else None


def trained_spec(model: Any) -> MemorySpec | None:
    """The spec in `memory_spec.json` of the model's folder or hub repository; `None` where there is none."""
    found = file_beside(model, SPEC_FILE)
    if found is None:
        return None
    try:
        fields = json.loads(found.read_text("utf-8"))
    except ValueError as error:
        raise SpecError(
            f"found a broken {found} ({error}), expected the JSON of a MemorySpec: restore it, or remove it"
        ) from None
    return MemorySpec.from_json(fields)
