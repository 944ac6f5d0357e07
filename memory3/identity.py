"""Who wrote a bank: fingerprints of model and tokenizer."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import nn

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_AFTER_LAYERS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


def weights_fingerprint(model: nn.Module, last_layer: int) -> str:
    """BLAKE2b (32 hex digits) over what writing uses: embeddings and layers up to `last_layer`, adapters included.

    Parameters are hashed in bf16, so one model gives one fingerprint in any dtype and on any device.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.named_parameters()):
        if _is_used(name, last_layer):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_used(name: str, last_layer: int) -> bool:
    layer = _LAYER.search(name)
    if layer is not None:
        return int(layer.group(1)) <= last_layer
    owner = name.split(".")[-2] if "." in name else name
    return not name.startswith(("lm_head", "embed_out")) and owner not in _AFTER_LAYERS


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """BLAKE2b (32 hex digits) over the tokenizer's vocabulary, rules and the id of `<s>`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(f"{tokenizer.bos_token_id} {rules}".encode(), digest_size=16).hexdigest()
