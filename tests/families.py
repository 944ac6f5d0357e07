"""A tiny random-weight decoder of each supported family, and a tokenizer that needs no file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 300
LAYERS = 4
LONG = 512


@dataclass(frozen=True)
class Family:
    """A model type, what its tiny config adds, and where it differs."""

    kind: str
    extra: tuple[tuple[str, Any], ...] = ()
    window: int | None = None
    kv_heads: int = 2
    attention: str | None = None


WINDOWED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
MIXTURE = (("num_local_experts", 4), ("num_experts", 4), ("num_experts_per_tok", 2))

FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "llama-multi-query": Family("llama", kv_heads=1),
    "llama-full-heads": Family("llama", kv_heads=4),
    "llama-eager": Family("llama", attention="eager"),
    "llama-yarn": Family(
        "llama",
        (
            (
                "rope_parameters",
                {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256},
            ),
        ),
    ),
    "mistral": Family("mistral", (("sliding_window", LONG),), window=LONG),
    "mixtral": Family("mixtral", (*MIXTURE, ("sliding_window", None))),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen3-moe": Family("qwen3_moe", (*MIXTURE, ("moe_intermediate_size", 32))),
    "gemma2": Family(
        "gemma2",
        (("sliding_window", LONG), ("query_pre_attn_scalar", 16), ("attn_logit_softcapping", 2.0)),
        window=LONG,
        attention="eager",
    ),
    "gemma3": Family(
        "gemma3_text", (("sliding_window", LONG), ("query_pre_attn_scalar", 16), ("layer_types", WINDOWED)), window=LONG
    ),
    "phi3": Family("phi3"),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", (("sliding_window", LONG), ("layer_types", WINDOWED)), window=LONG),
    "granite": Family("granite", (("attention_multiplier", 0.2), ("residual_multiplier", 0.5), ("logits_scaling", 2.0))),
    "smollm3": Family("smollm3", (("no_rope_layers", [1, 0, 1, 0]),)),
    "gpt-neox": Family("gpt_neox", (("rotary_pct", 0.5),), kv_heads=4),
    "cohere2": Family("cohere2", (("sliding_window", LONG), ("layer_types", WINDOWED)), window=LONG),
    "starcoder2": Family("starcoder2", (("sliding_window", None),)),
    "glm4": Family("glm4", (("partial_rotary_factor", 0.5),)),
    "gpt-oss": Family(
        "gpt_oss", (*MIXTURE, ("sliding_window", LONG), ("layer_types", WINDOWED)), window=LONG, attention="eager"
    ),
}


def tiny_model(name: str, **overrides: Any) -> Any:
    """A float32 model of the family in eval mode, weights large enough for attention to matter."""
    family = FAMILIES[name]
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": family.kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
        **dict(family.extra),
        **overrides,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=family.attention or "sdpa").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
            elif "sinks" in parameter_name:
                parameter.normal_(0, 1.0)
    return model


@cache
def tiny_tokenizer(bos: bool = True) -> Any:
    """One token per byte, and `<pad>`, `<s>`, `</s>`; without `bos` as in families that have none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **({"bos_token": "<s>"} if bos else {}))
