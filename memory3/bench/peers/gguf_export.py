"""A Llama decoder as a GGUF file, as a script in llama.cpp's interpreter: `python gguf_export.py FOLDER FILE`.

Names and shapes are mapped here; the `gguf` package writes the file. The vocabulary is written as `none`: token ids go in and come
out, so no tokenizer of llama.cpp's can differ from the model's own. Weights keep their dtype; norms and biases are float32, as llama.cpp
wants them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Modules of a layer by their names in transformers and in GGUF."""
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Of safetensors; numpy has no bfloat16, so its bits are carried as they are."""


def unsupported(config: dict[str, Any]) -> str | None:
    """Why a model of this `config.json` cannot be written, in one sentence; `None` where it can."""
    kind = config.get("model_type")
    if kind != "llama":
        return f"found a model of type {kind!r}, and this export knows llama alone"
    rope = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    if rope != "default":
        return f"found rotation of type {rope!r}, and this export knows the default one alone"
    if config.get("hidden_act", "silu") != "silu":
        return f"found activation {config['hidden_act']!r}, and llama.cpp's llama has silu alone"
    if config.get("mlp_bias"):
        return "found biases in the feed-forward layers, and llama.cpp's llama reads none there"
    return None


def renamed(name: str) -> str:
    """The name of a tensor in GGUF; `ValueError` where there is none."""
    if name in OUTER:
        return OUTER[name]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None or found[2] not in INNER:
        raise ValueError(f"found tensor {name!r}, expected one that GGUF has a name for in a llama")
    return f"blk.{found[1]}.{INNER[found[2]]}.{found[3]}"


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows `(heads * D, ...)` of queries or keys with the halves of each head interleaved.

    transformers turns dimension i with i + D/2, llama.cpp's llama 2i with 2i + 1.
    """
    size = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, size, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def mapped(name: str, tensor: np.ndarray[Any, Any], config: dict[str, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    """Name and values of a tensor in GGUF."""
    heads = config["num_attention_heads"]
    if ".q_proj." in name:
        tensor = interleaved(tensor, heads)
    if ".k_proj." in name:
        tensor = interleaved(tensor, config.get("num_key_value_heads") or heads)
    if tensor.ndim == 1:  # norms and biases
        tensor = widened(tensor)
    return renamed(name), tensor


def widened(tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Float32 values; whole numbers of 16 bits are bfloat16, the upper half of a float32."""
    if tensor.dtype == np.uint16:
        tensor = np.left_shift(tensor.astype(np.uint32), 16).view(np.float32)
    return tensor.astype(np.float32, copy=False)


def tensors(file: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Names and values of a safetensors file: its length of the header, the header in JSON, the bytes."""
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8:start]))
    for name, one in header.items():
        if name != "__metadata__":
            first, last = one["data_offsets"]
            yield name, np.array(data[start + first : start + last]).view(DTYPES[one["dtype"]]).reshape(one["shape"])


def export(folder: Path, file: Path) -> None:
    """Write the model of a folder, in one `model.safetensors`, as GGUF; `ValueError` says why it cannot be."""
    import gguf

    config = json.loads((folder / "config.json").read_text("utf-8"))
    if reason := unsupported(config):
        raise ValueError(reason)
    writer = gguf.GGUFWriter(file, "llama")
    describe(writer, config)
    for name, tensor in tensors(folder / "model.safetensors"):
        name, tensor = mapped(name, tensor, config)
        if tensor.dtype == np.uint16:
            writer.add_tensor(name, np.ascontiguousarray(tensor).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, config: dict[str, Any]) -> None:
    """Sizes, rotation and an empty vocabulary."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
