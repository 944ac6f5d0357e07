"""Model shapes: one dial for small ones, and the two of the paper."""

from __future__ import annotations

from typing import Any

from memory3.cost import Shape, preset
from memory3.train.settings import TrainError

SMALL = 12
"""Up to this depth a head has 32 dimensions, above 64: a narrow model reads better with more heads."""


def shape(depth: int, vocabulary: int) -> Any:
    """A `LlamaConfig` whose sizes all follow from its depth.

    Width is 128/3 of the depth, rounded to two heads; a head has 32 dimensions (64 above depth 12); two query heads share
    a kv head; the MLP is 2.5 times as wide as the model. Depth 6 gives the shape that learned to read in this project
    (design section 4): width 256, 8 query and 4 kv heads, MLP 640, 4.1 M parameters without embeddings.

    Args:
        depth: layers; 4 to 8 train on two cores.
        vocabulary: tokens, of which `<pad>`, `<s>` and `</s>` are the first three, as `trained_tokenizer` makes them.
    """
    for name, value, least in (("depth", depth, 1), ("vocabulary", vocabulary, 4)):
        if value < least:
            raise TrainError(f"found {name} {value}, expected at least {least}")
    head_dim = 32 if depth <= SMALL else 64
    width = 2 * head_dim * max(1, round(depth * 64 / 3 / head_dim))
    heads = width // head_dim
    return _llama(Shape(depth, width, heads, heads // 2, head_dim, width * 5 // 2, vocabulary), tied=True)


def paper(name: str) -> Any:
    """The `LlamaConfig` of a shape of the paper (arXiv 2407.01178, 3.4), by its name in `memory3.cost.PRESETS`."""
    return _llama(preset(name), tied=False)


def _llama(sizes: Shape, tied: bool) -> Any:
    """4096 positions: a sequence of 2048 behind the references' interval, and room."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
