"""The shapes have the sizes that the paper states, and the dial gives shapes that exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from memory3.train.figures import flops_per_token
from memory3.train.settings import TrainError
from memory3.train.shapes import paper, shape


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def without_embeddings(model: Any) -> int:
    words = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in words)


def test_the_papers_shapes_have_the_parameters_that_it_states() -> None:
    """Three digits, and two (arXiv 2407.01178, 3.4; design section 4)."""
    assert f"{without_embeddings(on_meta(paper('paper-2.4b'))):.2e}" == "2.43e+09"
    assert f"{without_embeddings(on_meta(paper('paper-0.9b'))):.1e}" == "9.2e+08"
    assert (paper("paper-2.4b").hidden_size, paper("paper-2.4b").vocab_size) == (3200, 60416)


def test_flops_of_a_token_make_the_papers_cost_of_writing_into_parameters() -> None:
    """128 tokens of sequences of 2048: 2.24 TFLOP (Appendix A; design section 5)."""
    assert round(128 * flops_per_token(on_meta(paper("paper-2.4b")), 2048) / 1e12, 2) == 2.24


def test_depth_six_is_the_shape_that_learned_to_read() -> None:
    config = shape(6, 4096)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (256, 8, 4)
    assert (config.head_dim, config.intermediate_size, config.tie_word_embeddings) == (32, 640, True)
    assert 4.1e6 < without_embeddings(on_meta(config)) < 4.2e6


def test_every_depth_gives_a_model_larger_than_the_one_before() -> None:
    sizes = []
    for depth in range(1, 33):
        config = shape(depth, 500)
        assert config.hidden_size == config.num_attention_heads * config.head_dim
        assert config.num_attention_heads == 2 * config.num_key_value_heads
        assert config.num_hidden_layers == depth
        sizes.append(without_embeddings(on_meta(config)))
    assert sizes == sorted(set(sizes))


def test_a_shape_runs() -> None:
    model = AutoModelForCausalLM.from_config(shape(2, 50))
    assert model(input_ids=torch.tensor([[1, 7, 9]])).logits.shape == (1, 3, 50)


@pytest.mark.parametrize(("depth", "vocabulary", "message"), [(0, 100, "found depth 0"), (2, 3, "found vocabulary 3")])
def test_sizes_that_cannot_be_are_refused(depth: int, vocabulary: int, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        shape(depth, vocabulary)
