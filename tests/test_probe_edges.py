"""Gates on attention edges: open ones change nothing, closed ones are masks, and the gradient is the slope between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import LAYERS, tiny_model, tiny_tokenizer

from memory3.attention import KEYWORD, Trace
from memory3.decoder import Decoder, attach
from memory3.evaluate.masking import DistantMask
from memory3.probe.edges import (
    Edges,
    Gated,
    Subject,
    ablated,
    effects,
    estimates,
    gradients,
    log_likelihoods,
    query_heads,
    weights,
)
from memory3.spec import MemorySpec, SpecError

TEXTS = ["The tower was completed in 1889.", "Salt melts at 801 degrees."]
IDS = [1, *(3 + (n * 7) % 250 for n in range(17))]
SPARSE = MemorySpec(layers=(0, 2), heads=((0,), (0,)), tokens_per_head=5, reference_length=64)


def remembering(decoder: Decoder) -> Subject:
    return Subject.of(decoder, IDS, 12, decoder.encode(TEXTS))


def everywhere(decoder: Decoder, where: torch.Tensor) -> list[Edges]:
    return [Edges(layer, head, where) for layer in range(LAYERS) for head in range(query_heads(decoder))]


def plainly(decoder: Decoder, subject: Subject, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = decoder.forward(subject.layout, **options).logits[0, subject.first - 1 : -1]
    wanted = subject.layout.input_ids[0, subject.first :]
    found: torch.Tensor = logits.log_softmax(-1)[torch.arange(len(wanted)), wanted]
    return found


def test_open_gates_give_the_models_own_log_likelihood_with_memory_and_without(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, SPARSE) as decoder, torch.no_grad():
        subject, closed_book = remembering(decoder), Subject.of(decoder, IDS, 12)
        everything = {
            n: torch.zeros(1, query_heads(decoder), 1, 1).expand(1, -1, subject.columns, subject.slots + subject.columns)
            for n in range(LAYERS)
        }
        wanted = plainly(decoder, subject, reading=subject.reading)
        for gates in (None, everything):
            torch.testing.assert_close(log_likelihoods(decoder, subject, gates)[0], wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            log_likelihoods(decoder, closed_book)[0], plainly(decoder, closed_book), atol=1e-4, rtol=1e-4
        )
        assert float((wanted - plainly(decoder, subject)).abs().max()) > 1e-3  # memory is read


def test_cutting_every_edge_from_memory_is_the_same_layout_without_memory(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, SPARSE) as decoder:
        subject = remembering(decoder)
        [found] = ablated(decoder, subject, [everywhere(decoder, subject.memories())])
        assert found == pytest.approx(float(plainly(decoder, subject).sum()), abs=1e-3)


def test_cutting_distant_edges_of_a_head_is_the_mask_that_hides_distant_tokens(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer) as decoder:
        subject = Subject.of(decoder, IDS, 12)
        far = subject.pairs([(q, k) for q in range(len(IDS)) for k in range(q - 4)])
        group = query_heads(decoder) // decoder.geometry.num_kv_heads
        [found] = ablated(decoder, subject, [[Edges(1, head, far) for head in range(group)]])
        wanted = plainly(decoder, subject, **{KEYWORD: DistantMask({1: [0]}, 4)})
        assert found == pytest.approx(float(wanted.sum()), abs=1e-4)
        assert abs(found - float(plainly(decoder, subject).sum())) > 1e-4


class Zero(torch.nn.Module):
    """Nothing of what comes in."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(states)


def slopes(decoder: Decoder, step: float) -> list[tuple[float, float]]:
    """Gradient and central difference of the gate at four edges: from memory, to memory's readers, and in plain layers."""
    subject = remembering(decoder)
    found, last, slots = gradients(decoder, subject), subject.columns - 2, subject.slots
    pairs = []
    for layer, head, query, key in ((0, 0, last, 3), (2, 0, last - 1, 7), (1, 3, last, slots + 4), (3, 0, last, slots)):
        values = []
        for gate in (1 + step, 1 - step):
            gates = torch.zeros_like(found[:1])
            gates[0, head, query, key] = torch.tensor(gate, dtype=gates.dtype).log()
            with torch.no_grad():
                values.append(float(log_likelihoods(decoder, subject, {layer: gates}).sum()))
        pairs.append((float(found[layer, head, query, key]), (values[0] - values[1]) / (2 * step)))
    assert all(abs(slope) > 1e-4 for _, slope in pairs)
    return pairs


def doubled(name: str) -> Any:
    """A model that computes in float64 throughout: its norms, which transformers runs in float32, are torch's own."""
    model = tiny_model(name).double()
    for parent in list(model.modules()):
        for attribute, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, attribute, norm)
    return model


@pytest.mark.parametrize("name", ["llama", "llama-multi-query", "qwen3", "starcoder2", "gpt-neox"])
def test_in_float64_the_gradient_is_the_finite_difference_of_the_gate(name: str) -> None:
    """Step 1e-4: the difference is off by 1e-8 of the third derivative, and by 1e-12 from rounding."""
    with attach(doubled(name), tiny_tokenizer(), SPARSE) as decoder:
        for gradient, slope in slopes(decoder, 1e-4):
            assert gradient == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["llama-eager", "gemma2", "gemma3", "gpt-oss"])
def test_under_soft_caps_sinks_and_float32_it_is_so_too(name: str) -> None:
    """These compute in float32 whatever their dtype is: a wide step, against rounding, and the tolerance of its curvature."""
    with attach(tiny_model(name), tiny_tokenizer(), SPARSE) as decoder:
        for gradient, slope in slopes(decoder, 0.03):
            assert gradient == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_edges_that_do_not_exist_have_neither_effect_nor_gradient() -> None:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPARSE) as decoder:
        subject = remembering(decoder)
        found, last, prefix = gradients(decoder, subject), subject.columns - 2, len(decoder.prefix_ids)
        absent = {
            "the future": (0, 0, last, subject.slots + last + 1),
            "a layer that reads no memory": (1, 0, last, 0),
            "a head that reads no memory": (0, 3, last, 0),
            "the reference BOS, which reads none": (0, 0, prefix - 1, 0),
        }
        cuts = [[Edges(layer, head, subject.pairs([(query, key)]))] for layer, head, query, key in absent.values()]
        assert [float(found[edge]) for edge in absent.values()] == [0.0] * 4
        assert effects(decoder, subject, cuts) == pytest.approx([0.0] * 4, abs=1e-5)
        there = (0, 1, last, 0)
        assert abs(float(found[there])) > 1e-7


def test_cuts_of_one_batch_do_not_touch_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPARSE) as decoder:
        subject = remembering(decoder)
        cuts = [[Edges(layer, head, subject.memories())] for layer in (0, 2) for head in range(2)]
        together = effects(decoder, subject, cuts)
        monkeypatch.setattr("memory3.probe.edges.LARGEST", 1)
        assert effects(decoder, subject, cuts) == pytest.approx(together, abs=1e-4)
        assert len({round(value, 4) for value in together}) == 4


def test_a_chunk_is_cut_off_from_its_own_memories_alone() -> None:
    """Two chunks read one memory each: the edges from the other's memory do not exist."""
    with attach(tiny_model("llama"), tiny_tokenizer(), SPARSE) as decoder:
        first, second = decoder.encode(TEXTS)
        layout = decoder.layout([IDS], grid=[[0] * 9 + [1] * 9])
        subject = Subject(layout, len(decoder.prefix_ids) + 12, decoder.reading(layout.chunks, [[[first], [second]]]))
        found = gradients(decoder, subject)[0, 0]
        middle, kept = len(decoder.prefix_ids) + 9, first.count
        assert float(found[:middle, kept : 2 * kept].abs().max()) == float(found[middle:, :kept].abs().max()) == 0.0
        assert float(found[middle:, kept : 2 * kept].abs().max()) > 1e-6
        wanted = plainly(decoder, subject, reading=subject.reading)
        with torch.no_grad():
            torch.testing.assert_close(log_likelihoods(decoder, subject)[0], wanted, atol=1e-4, rtol=1e-4)


def test_a_query_is_not_left_without_any_key() -> None:
    with attach(tiny_model("llama"), tiny_tokenizer()) as decoder:
        subject = Subject.of(decoder, IDS, 12)
        with pytest.raises(SpecError, match="nothing to attend to"):
            ablated(decoder, subject, [[Edges(0, 0, subject.pairs([(0, 0)]))]])
        with pytest.raises(SpecError, match="first=18 of 18"):
            Subject.of(decoder, IDS, len(IDS))


def test_weights_are_those_that_memory_received_and_sum_to_one(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, SPARSE) as decoder:
        subject = remembering(decoder)
        found, trace = weights(decoder, subject), Trace(tokens_too=True)
        assert subject.reading is not None
        plainly(decoder, subject, reading=replace(subject.reading, trace=trace))
        group = query_heads(decoder) // decoder.geometry.num_kv_heads
        for layer in (0, 2):
            paid = trace.tokens[layer][0].flatten(2).transpose(0, 1)  # (heads, Q, slots)
            torch.testing.assert_close(found[layer, :group, :, : subject.slots], paid, atol=1e-5, rtol=1e-4)
        assert float(found[1, :, :, : subject.slots].abs().max()) == 0.0
        total = found.sum(-1)
        assert float(total.max()) < 1 + 1e-5
        if "sinks" not in "".join(name for name, _ in decoder.model.named_parameters()):
            assert float(total.min()) > 1 - 1e-5


def test_the_estimate_is_what_masking_an_edge_does_to_what_its_head_gives_on() -> None:
    """In the last layer, without an MLP, norm or softmax behind it, nothing is left to be linear: the estimate is exact."""
    model = doubled("llama")
    last = model.model.layers[-1]
    last.mlp, model.model.norm = torch.nn.Identity(), torch.nn.Identity()
    last.post_attention_layernorm = Zero()
    with attach(model, tokenizer=tiny_tokenizer(), spec=SPARSE) as decoder:
        subject = Subject.of(decoder, IDS, len(IDS) - 1)
        place = subject.columns - 2
        for head, key in ((0, 1), (3, place)):
            cut = subject.pairs([(place, key)])
            with torch.no_grad():
                before = decoder.forward(subject.layout).logits[0, place]
                gates = torch.zeros(1, query_heads(decoder), *cut.shape, dtype=torch.float64)
                gates[0, head].masked_fill_(cut, torch.finfo(torch.float64).min)
                hook: dict[str, Any] = {KEYWORD: Gated(subject, {LAYERS - 1: gates})}
                moved = before - decoder.forward(subject.layout, **hook).logits[0, place]
            slope = before.softmax(-1).neg()
            slope[IDS[-1]] += 1
            estimate = estimates(decoder, subject)[LAYERS - 1, head, place, key]
            assert float(estimate) == pytest.approx(float((slope * moved).sum()), rel=1e-6)
