"""The invariants of design section 7, for every family.

Tolerance: models are float32 with logits of size about 5; equal sums taken in another order differ by up to 1e-5 there,
and every comparison has an effect at least a thousand times larger beside it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, LONG, tiny_model, tiny_tokenizer

from memory3 import encoding
from memory3.decoder import Decoder, attach
from memory3.selection import SELECTIONS
from memory3.spec import Memory, MemorySpec, SpecError, UnsupportedModel

CLOSE = 1e-4
EVERYTHING = MemorySpec(layers=(0, 1, 2, 3), tokens_per_head=None)
SPARSE = MemorySpec(tokens_per_head=4, chunk_length=8)
FACTS = ("The tower was completed in 1889.", "Salt melts at 801 degrees.", "A group of crows is a murder.")


def prompt_ids(decoder: Decoder, text: str = "When was it completed?") -> list[int]:
    return decoder.context(text)


def read(decoder: Decoder, contexts: list[list[int]], memories: Any, **layout: Any) -> list[torch.Tensor]:
    """Logits of each context's own tokens, one forward pass for all."""
    made = decoder.layout(contexts, **layout)
    logits = decoder.forward(made, decoder.reading(made.chunks, memories)).logits
    return [row[mask.bool()][-len(c) :] for row, mask, c in zip(logits, made.attention_mask, contexts, strict=True)]


def furthest(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).detach().abs().max())


def plain_ids(text: str) -> torch.Tensor:
    return torch.tensor([tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]])


def test_without_recall_logits_are_bit_identical_also_after_writing_reading_and_detaching(model: Any, tokenizer: Any) -> None:
    ids = plain_ids("The quick brown fox")
    untouched, implementation = model(ids).logits, model.config._attn_implementation
    with attach(model, tokenizer, SPARSE) as decoder:
        read(decoder, [prompt_ids(decoder)], [[decoder.encode(FACTS)]])
        layout = decoder.layout([ids[0].tolist()], memory=False)
        assert torch.equal(decoder.forward(layout).logits, untouched)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, untouched)


def test_one_dense_reference_is_the_same_as_the_reference_in_context(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, EVERYTHING) as decoder:
        reference, context = decoder.tokens(FACTS[0]), prompt_ids(decoder)
        [with_memory] = read(decoder, [context], [[decoder.encode([FACTS[0]])]])
        [without] = read(decoder, [context], [[]])
        front = decoder.prefix_ids + reference
        ids = torch.tensor([front + context])
        start = decoder.context_start
        positions = torch.tensor([[*range(len(front)), *range(start, start + len(context))]])
        in_context = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[0, len(front) :]
    assert furthest(with_memory, in_context) < CLOSE
    assert furthest(with_memory, without) > 1000 * CLOSE


def test_order_of_references_does_not_matter(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, SPARSE) as decoder:
        memories = decoder.encode(FACTS)
        [forward] = read(decoder, [prompt_ids(decoder)], [[memories, memories[:2], memories]])
        [backward] = read(decoder, [prompt_ids(decoder)], [[memories[::-1], memories[:2][::-1], memories[1:] + memories[:1]]])
        [other] = read(decoder, [prompt_ids(decoder)], [[memories[:1], memories[:2], memories]])
    assert furthest(forward, backward) < CLOSE < furthest(forward, other)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_size_and_padding_side_do_not_matter(model: Any, tokenizer: Any, side: str) -> None:
    with attach(model, tokenizer, SPARSE) as decoder:
        memories = decoder.encode(FACTS)
        contexts = [
            prompt_ids(decoder),
            decoder.context("Salt?"),
            decoder.context("What is a group of crows called, in short?"),
        ]
        tables: list[list[list[Memory]]] = [[memories, memories[:1], []], [[memories[1]]], []]
        together = read(decoder, contexts, tables, padding_side=side)
        for context, table, found in zip(contexts, tables, together, strict=True):
            [alone] = read(decoder, [context], [table])
            assert furthest(alone, found) < CLOSE


def test_write_batch_size_does_not_matter(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, SPARSE) as decoder:
        for text, batched in zip(FACTS, decoder.encode(FACTS), strict=True):
            [alone] = decoder.encode([text])
            assert torch.equal(alone.positions, batched.positions)
            assert furthest(alone.keys, batched.keys) < CLOSE
            assert furthest(alone.values, batched.values) < CLOSE


def test_a_batch_is_selected_from_a_few_references_at_a_time(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    rule = SELECTIONS["received_attention"].score

    def noted(self: Any, states: Any) -> torch.Tensor:
        asked[-1].append(len(states.keys))
        return rule(self, states)

    monkeypatch.setattr(SELECTIONS["received_attention"], "score", noted)
    with attach(model, tokenizer, SPARSE) as decoder:
        length = max(len(decoder.tokens(fact)) for fact in FACTS)
        one = 4 * decoder.model.config.get_text_config().num_attention_heads * length**2
        asked.append([])
        whole = decoder.encode(FACTS)
        for most, sizes in ((0, [1, 1, 1]), (2 * one, [2, 1]), (2**40, [3])):
            monkeypatch.setattr(encoding, "AT_ONCE", most)
            asked.append([])
            written = decoder.encode(FACTS)
            assert asked[-1] == len(decoder.spec.layers or ()) * sizes
            for first, second in zip(whole, written, strict=True):
                assert torch.equal(first.positions, second.positions)
                assert furthest(first.keys, second.keys) < CLOSE


def test_prefill_in_one_pass_equals_the_slow_loop_over_chunks(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, SPARSE) as decoder:
        memories = decoder.encode(FACTS)
        context = decoder.context("When was the tower completed, and at what?")
        chunks = -(-len(context) // SPARSE.chunk_length)
        table = [[memories[c % 3]] if c % 4 else memories for c in range(chunks)]
        [fast] = read(decoder, [context], [table])
        slow = []
        for c in range(chunks):  # every pass reads one chunk's memories; only that chunk's logits count
            end = min((c + 1) * SPARSE.chunk_length, len(context))
            grid = [[0 if i // SPARSE.chunk_length == c else -1 for i in range(end)]]
            slow.append(_with_history(decoder, context[:end], table, grid, c))
    assert furthest(fast, torch.cat(slow)) < CLOSE


def _with_history(decoder: Decoder, context: list[int], table: Any, grid: list[list[int]], chunk: int) -> torch.Tensor:
    """Logits of the last chunk, token by token through a cache, so that each token reads its own chunk's memories."""
    cache, rows = decoder.fresh_cache(), []
    for step, made in enumerate(_one_by_one(decoder, context)):
        own = table[max(step - len(decoder.prefix_ids), 0) // decoder.spec.chunk_length]
        reading = decoder.reading(made.chunks, [[own]])
        rows.append(decoder.forward(made, reading, cache=cache).logits[0, -1])
    return torch.stack(rows[len(decoder.prefix_ids) + chunk * decoder.spec.chunk_length :])


def _one_by_one(decoder: Decoder, context: list[int]) -> Any:
    """The layout of each token of a sequence in turn, for decoding with a cache."""
    from memory3.decoder import Layout

    whole = decoder.layout([context])
    for i in range(whole.input_ids.shape[1]):
        chunk = torch.full((1, 1), -1) if i < len(decoder.prefix_ids) else torch.zeros(1, 1, dtype=torch.long)
        yield Layout(whole.input_ids[:, i : i + 1], whole.attention_mask[:, : i + 1], whole.position_ids[:, i : i + 1], chunk)


def test_the_grid_decides_which_memories_a_token_reads(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, SPARSE) as decoder:
        memories = decoder.encode(FACTS)
        context = prompt_ids(decoder)
        late = [[0 if i < 12 else 1 for i in range(len(context))]]
        [moved] = read(decoder, [context], [[[], memories]], grid=late)
        [none] = read(decoder, [context], [[]])
    assert furthest(moved[:12], none[:12]) < CLOSE < furthest(moved[12:], none[12:])


def test_reading_changes_no_memory(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, SPARSE) as decoder:
        memories = decoder.encode(FACTS)
        before = [(m.keys.clone(), m.values.clone(), m.positions.clone()) for m in memories]
        first = read(decoder, [prompt_ids(decoder)], [[memories]])
        assert torch.equal(first[0], read(decoder, [prompt_ids(decoder)], [[memories]])[0])
        for memory, kept in zip(memories, before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip((memory.keys, memory.values, memory.positions), kept, strict=True))


def test_kept_tokens_are_those_of_the_unrotated_scores(model: Any, tokenizer: Any) -> None:
    """The scores are taken again from keys and queries that were never rotated: the text at position 0 for every token."""
    with attach(model, tokenizer, MemorySpec(layers=(0,), tokens_per_head=6)) as decoder:
        distinct = "abcdefghijklmnopqrstuvwxyz0123456789"  # no token twice, so no ties
        [memory] = decoder.encode([distinct])
        ids = torch.tensor([decoder.prefix_ids + decoder.tokens(distinct)])
        caught = _first_layer(model, ids)
    query, key, scaling = caught
    skip = len(decoder.prefix_ids)
    groups = query.shape[0] // key.shape[0]
    for head in range(key.shape[0]):
        logits = query[head * groups : (head + 1) * groups, skip:] @ key[head, skip:].T * scaling
        received = logits.softmax(-1).sum((0, 1))
        kept = received[memory.positions[head].long()]
        assert len(set(memory.positions[head].tolist())) == 6
        assert kept.sum() > received.topk(6).values.sum() * 0.999  # scores are compared at ten bits


def _first_layer(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries and keys of the first layer with every token at position 0, where rotation does nothing but scale."""
    from memory3.attention import KEYWORD

    kept: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    class Keep:
        def attend(self, original: Any, module: Any, states: Any, options: dict[str, Any]) -> Any:
            if module.layer_idx == 0:
                kept.append((states.query[0], states.key[0], options["scaling"]))
            return states.through(original, module, options)

    with torch.no_grad():
        model(input_ids=ids, position_ids=torch.zeros_like(ids), attention_mask=torch.ones_like(ids), **{KEYWORD: Keep()})
    query, key, scaling = kept[0]
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn":
        stretch = 0.1 * torch.log(torch.tensor(float(rope["factor"]))) + 1
        query, key = query / stretch, key / stretch
    return query, key, scaling


def test_writing_never_runs_the_layers_behind_the_last_memory_layer(model: Any, tokenizer: Any) -> None:
    with attach(model, tokenizer, MemorySpec(layers=(0, 1))) as decoder:
        clean = decoder.encode(FACTS)
        kept = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".layers.2." in name or ".layers.3." in name:
                    parameter.fill_(float("nan"))
        try:
            again = decoder.encode(FACTS)
        finally:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(kept[name])
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(clean, again, strict=True))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.window])
def test_windowed_layers_exempt_memories_from_the_window(name: str) -> None:
    """With a window of 8 the text form loses sight of the reference, as documented; memory does not."""
    model = tiny_model(name, sliding_window=8)
    with attach(model, tiny_tokenizer(), EVERYTHING) as decoder:
        context = decoder.context("When was the tall tower completed?")
        memories = decoder.encode(FACTS[:1])
        [inside] = read(decoder, [context], [[memories]])
        [without] = read(decoder, [context], [[]])
    assert LONG > 8
    assert furthest(inside[-1], without[-1]) > 0.01


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_strays_no_further_with_memory_than_the_plain_model_does(family: str, kind: torch.dtype) -> None:
    """bf16 keeps 8 bits and fp16 11. How far that moves a logit depends on the family, so the yardstick is the family's own:
    its plain model reading the same text in the context, in the same dtype. Three times its error is allowed, and 0.1 where
    that is next to nothing. Mixtures use all of their experts here: rounding may send a token to another one, which moves
    logits by any amount, with memory or without.
    """
    every = {"num_experts_per_tok": 4} if "num_experts_per_tok" in dict(FAMILIES[family].extra) else {}
    errors = []
    for with_memory in (False, True):
        results = []
        for model in (tiny_model(family, **every), tiny_model(family, **every).to(kind)):
            with attach(model, tiny_tokenizer(), EVERYTHING) as decoder:
                memories = decoder.encode(FACTS[:1])
                assert memories[0].keys.dtype == model.dtype
                context = prompt_ids(decoder)
                if with_memory:
                    results.append(read(decoder, [context], [[memories]])[0].float())
                else:
                    text = [*decoder.prefix_ids, *decoder.tokens(FACTS[0]), *context]
                    plain = decoder.layout([text], memory=False)
                    results.append(decoder.forward(plain).logits[0, -len(context) :].detach().float())
        errors.append(furthest(*results))
    plain_error, memory_error = errors
    assert memory_error < max(3 * plain_error, 0.1)


def test_large_keys_do_not_overflow_in_half_precision() -> None:
    """A product of 40 x 40 x 128 is beyond fp16's range of 65,504, its scaled logit is not."""
    from memory3.attention import _Scoring

    query, key = (torch.full((1, 1, 128), 40.0, dtype=torch.float16) for _ in range(2))
    logits = _Scoring(128**-0.5, None, 0.0).logits(query, key)
    assert logits.dtype == torch.float32
    assert float(logits) == pytest.approx(40 * 40 * 128**0.5, rel=2e-3)


def test_a_tokenizer_without_bos_writes_and_reads_without_it() -> None:
    with attach(tiny_model("qwen2"), tiny_tokenizer(bos=False), SPARSE) as decoder:
        assert decoder.bos_ids == []
        assert decoder.prefix_ids == decoder.tokens("Reference:")
        assert len(read(decoder, [decoder.context("ab")], [[decoder.encode(FACTS)]])[0]) == 2


def test_heads_per_layer_read_only_where_memory_is() -> None:
    """Memory in one head of one layer changes logits, and no head but that one sees it."""
    from memory3.attention import Trace

    spec = MemorySpec(layers=(1, 3), heads=((1,), (0, 1)), tokens_per_head=3)
    with attach(tiny_model("llama"), tiny_tokenizer(), spec) as decoder:
        [memory] = decoder.encode(FACTS[:1])
        assert memory.keys.shape == (3, 3, 16)
        layout, trace = decoder.layout([prompt_ids(decoder)]), Trace(tokens_too=True)
        decoder.forward(layout, decoder.reading(layout.chunks, [[[memory]] * 5], trace))
    assert {layer: t.shape[2] for layer, t in trace.tokens.items()} == {1: 2, 3: 4}


def test_over_long_and_empty_references_are_refused() -> None:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPARSE) as decoder:
        with pytest.raises(SpecError, match="found reference 0 with 129 tokens, expected 1 to 128"):
            decoder.encode(["x" * 129])
        with pytest.raises(SpecError, match="0 tokens"):
            decoder.encode([""])


@pytest.mark.parametrize(
    ("kind", "extra", "reason"),
    [
        ("deepseek_v3", {}, "latent attention"),
        ("t5", {}, "encoder-decoder"),
        ("mamba", {}, "linear_attention"),
        ("rwkv", {}, "attention interface"),
        ("qwen3_next", {}, "linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv"),
    ],
)
def test_what_cannot_work_is_refused_by_name_with_the_reason(kind: str, extra: dict[str, Any], reason: str) -> None:
    from transformers import AutoConfig

    class Shell:
        """Stands for a model of that type: the refusal needs its configuration alone."""

        config = AutoConfig.for_model(kind, **extra)
        _supports_attention_backend = kind != "rwkv"

    with pytest.raises(UnsupportedModel, match=reason) as refused:
        attach(Shell(), tiny_tokenizer(), SPARSE)
    assert str(refused.value).startswith(f"found {kind}")


def test_a_rotation_that_changes_with_length_is_pinned_and_refused_beyond() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=160)
    with attach(model, tiny_tokenizer(), SPARSE) as decoder:
        assert len(read(decoder, [decoder.context("short")], [[]])[0]) == 6
        with pytest.raises(UnsupportedModel, match="frequencies change at 160"):
            read(decoder, [decoder.context("x" * 100)], [[]])
        before = decoder.identity()
        long = torch.tensor([decoder.context("x" * 200)])
        without = decoder.forward(decoder.layout(long.tolist(), memory=False)).logits
        assert decoder.identity() == before  # a long text without memory changes the model's current frequencies only
    assert torch.equal(without, model(long).logits)  # and is read as the plain model reads it


def test_a_model_that_has_memory_is_not_given_it_twice() -> None:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPARSE) as decoder, pytest.raises(UnsupportedModel, match="detach it"):
        attach(decoder.model, tiny_tokenizer(), SPARSE)


def test_an_unknown_selection_is_refused_when_attaching() -> None:
    with pytest.raises(SpecError, match="found selection 'best'"):
        attach(tiny_model("llama"), tiny_tokenizer(), MemorySpec(selection="best"))


def test_attaching_warns_of_a_model_never_trained_for_memory() -> None:
    with pytest.warns(UserWarning, match="never trained for memory"):
        attach(tiny_model("llama"), tiny_tokenizer()).detach()


def test_a_model_carries_its_spec_and_overruling_it_warns(tmp_path: Any) -> None:
    import json

    from transformers import AutoModelForCausalLM

    own = MemorySpec(layers=(0, 1), tokens_per_head=5)
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "memory_spec.json").write_text(json.dumps(own.to_json()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with attach(model, tiny_tokenizer()) as decoder:
        assert decoder.trained
        assert decoder.spec.tokens_per_head == 5
    with pytest.warns(UserWarning, match="overrules"):
        attach(model, tiny_tokenizer(), SPARSE).detach()
