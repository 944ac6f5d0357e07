"""Who wrote a bank: fingerprints of model and tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import torch
from torch import nn

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_AFTER_LAYERS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


def weights_fingerprint(model: nn.Module, last_layer: int) -> str:
    """BLAKE2b (32 hex digits) over what writing uses: embeddings and layers up to `last_layer`, adapters included.

    Parameters are hashed in bf16, so one model gives one fingerprint in float32 and bf16 and on any device. In fp16 it gives
    another: what fp16 rounds, bf16 rounds again.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in _used(model, last_layer):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    for name, scaling in _adapter_scalings(model, last_layer):
        digest.update(f"{name} scaling {scaling}".encode())
    return digest.hexdigest()


def weights_state(model: nn.Module, last_layer: int) -> object:
    """What changes when a fingerprint may change: the parameters it covers, where they lie, and torch's count of changes.

    A change in place through `parameter.data` is not counted by torch, and not seen here.
    """
    parameters = [(name, t.data_ptr(), t._version, t.dtype) for name, t in _used(model, last_layer)]
    return parameters, _adapter_scalings(model, last_layer)


def _used(model: nn.Module, last_layer: int) -> list[tuple[str, nn.Parameter]]:
    return [(name, tensor) for name, tensor in sorted(model.named_parameters()) if _is_used(name, last_layer)]


def _adapter_scalings(model: nn.Module, last_layer: int) -> list[tuple[str, str]]:
    """A LoRA layer of peft multiplies its matrices by a plain number; one that is switched off counts as 0."""
    return [
        (name, "0" if getattr(module, "disable_adapters", False) else repr(sorted(module.scaling.items())))
        for name, module in sorted(model.named_modules())
        if isinstance(getattr(module, "scaling", None), dict) and _is_used(f"{name}.", last_layer)
    ]


def _is_used(name: str, last_layer: int) -> bool:
    layer = layer_of(name)
    if layer is not None:
        return layer <= last_layer
    owner = name.split(".")[-2] if "." in name else name
    return not name.startswith(("lm_head", "embed_out")) and owner not in _AFTER_LAYERS


def layer_of(name: str) -> int | None:
    """Number of the layer that a parameter or module is of, by its full name; `None` outside of layers."""
    found = _LAYER.search(f"{name}.")
    return None if found is None else int(found.group(1))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """BLAKE2b (32 hex digits) over the tokenizer's vocabulary, rules and the id of `<s>`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = repr(sorted(tokenizer.get_vocab().items()))
    else:  # padding and truncation are settings of the last call, not rules
        fields = json.loads(backend.to_str())
        rules = json.dumps({name: value for name, value in fields.items() if name not in ("padding", "truncation")})
    return hashlib.blake2b(f"{tokenizer.bos_token_id} {rules}".encode(), digest_size=16).hexdigest()
