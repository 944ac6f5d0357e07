"""A plain forward pass inside the block is the decoder's own pass with memory; outside it is what it always was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from torch.nn import RMSNorm
from torch.nn.functional import cross_entropy

from memory3.decoder import Decoder, attach
from memory3.forwarding import before_labels, memory_in_forward
from memory3.generation import Prompt, complete
from memory3.recall import Recalled
from memory3.spec import Memory, MemorySpec, SpecError
from memory3.train.grid import Answered

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16, references_per_chunk=2)
LONG = "The river is long and nobody knows where it ends, "


class Written:
    """Recalls two references that are functions of the query, written once; notes what was asked."""

    min_score = None

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.asked = decoder, []  # type: ignore[var-annotated]
        self.memories: dict[str, Memory] = {}

    def check(self, decoder: Any) -> None:
        """They are the decoder's own."""

    def memory(self, text: str) -> Memory:
        if text not in self.memories:
            self.memories[text] = self.decoder.encode([text])[0]
        return self.memories[text]

    def read(self, query: str) -> tuple[Memory, ...]:
        return tuple(self.memory(text) for text in texts_of(query))

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        self.asked += queries
        return [Recalled(query, memories=self.read(query)) for query in queries]


def texts_of(query: str) -> list[str]:
    return [f"It was {query[::-1]}.", f"Not {query[:7]}"]


def as_texts(queries: Sequence[str], texts: Sequence[str]) -> list[list[str]]:
    return [texts_of(query) for query in queries]


def in_float64(model: Any) -> None:
    """All of it: transformers' own norms go through float32."""
    model.double()
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if "norm" in name:
                setattr(module, name, RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64))


def llama(**overrides: Any) -> Decoder:
    return attach(tiny_model("llama", **overrides), tiny_tokenizer(), SPEC)


def padded(rows: list[list[int]], side: str, length: int) -> dict[str, torch.Tensor]:
    """A batch as a collator makes it, with one more column of padding than is needed."""
    ids, mask = [], []
    for row in rows:
        fill = [0] * (length - len(row))
        ids.append(fill + row if side == "left" else row + fill)
        mask.append(fill + [1] * len(row) if side == "left" else [1] * len(row) + fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def cut(logits: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [row[real.bool()] for row, real in zip(logits, mask, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("wide", [0, 1])
def test_logits_inside_are_those_of_layout_reading_and_forward_by_hand(side: str, wide: int) -> None:
    """Bit for bit, at both padding sides, with and without a column that is all padding; the grid is spelled out here."""
    with llama() as decoder, torch.no_grad():
        recall = Written(decoder)
        ids = decoder.tokens(LONG)
        rows, prompts = [ids[:45], ids[3:23]], [20, 20]  # 16 + 4 prompt tokens, then 16 + 9 of a response; all prompt
        call = padded(rows, side, 45 + wide)
        with memory_in_forward(decoder, recall, prompts=lambda call: prompts):
            inside = decoder.model(**call).logits
        words = decoder.tokenizer.decode
        asked = [words(ids[:16]).strip(), words(ids[16:20]).strip(), words(ids[20:36]).strip()]
        also = [words(ids[3:19]).strip(), words(ids[19:23]).strip()]
        assert recall.asked == asked + also
        grid = [[0] * 16 + [1] * 4 + [2] * 16 + [3] * 9, [0] * 16 + [1] * 4]
        memories = [[recall.read(asked[n]) for n in (0, 1, 1, 2)], [recall.read(query) for query in also]]
        layout = decoder.layout(rows, padding_side=side, grid=grid)
        by_hand = decoder.forward(layout, decoder.reading(layout.chunks, memories)).logits
        prefix = len(decoder.prefix_ids)
        wanted = [row[prefix:] for row in cut(by_hand, layout.attention_mask)]
        assert inside.shape[:2] == call["input_ids"].shape
        assert all(torch.equal(a, b) for a, b in zip(cut(inside, call["attention_mask"]), wanted, strict=True))


def test_a_pass_over_prompt_and_response_equals_generation_token_by_token(model: Any, tokenizer: Any) -> None:
    """For each family, over three chunks of prompt and three of response; largest difference of logits seen: 1e-5."""
    with attach(model, tokenizer, replace(SPEC, chunk_length=8)) as decoder, torch.no_grad():
        recall, seen = Written(decoder), []
        plain = decoder.forward

        def recording(*args: Any, **options: Any) -> Any:
            output = plain(*args, **options)
            seen.append(output.logits[:, -1])
            return output

        decoder.forward = recording  # type: ignore[method-assign]
        prompt = Prompt.of(decoder, LONG[:20])
        said = complete(decoder, [prompt], recall=recall, max_new_tokens=19)[0].ids
        assert len(said) == 19
        row = Answered(prompt, said[:-1])
        with memory_in_forward(decoder, recall, prompts=lambda call: [prompt]):
            logits = decoder.model(input_ids=torch.tensor([row.ids])).logits[0]
        torch.testing.assert_close(logits[len(prompt.ids) - 1 :], torch.cat(seen), atol=5e-5, rtol=0)


def test_texts_give_the_same_logits_as_their_memories_and_the_gradient_goes_through_them() -> None:
    """Against a central difference in float64, to five digits; memories that are written already have no gradient to give."""
    with llama() as decoder:
        in_float64(decoder.model)
        call = padded([decoder.tokens(LONG)[:30]], "right", 30)
        weight = decoder.model.model.layers[0].self_attn.k_proj.weight

        def loss_of(recall: Any) -> torch.Tensor:
            with memory_in_forward(decoder, recall):  # the model's own loss is of float32
                logits = decoder.model(**call).logits[0]
            return cross_entropy(logits[:-1], call["input_ids"][0, 1:])

        def gradient(recall: Any) -> tuple[torch.Tensor, torch.Tensor]:
            decoder.model.zero_grad()
            loss = loss_of(recall)
            loss.backward()
            return loss.detach(), weight.grad.clone()

        loss, through = gradient(as_texts)
        same, around = gradient(Written(decoder))
        torch.testing.assert_close(loss, same, rtol=1e-12, atol=0)
        assert not torch.allclose(through, around)
        direction, step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 1e-5
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * step * direction
                ends.append(loss_of(as_texts))
                weight -= sign * step * direction
        difference = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((through * direction).sum(), difference, rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_models_own_loss_counts_the_labels_and_never_a_rows_first_token(side: str) -> None:
    with llama() as decoder, torch.no_grad():
        rows = [decoder.tokens(LONG)[:30], decoder.tokens(LONG)[:19]]
        call = padded(rows, side, 30)
        labels = call["input_ids"].where(call["attention_mask"].bool(), -100)
        with memory_in_forward(decoder, as_texts):
            output = decoder.model(**call, labels=labels)
        logits = torch.cat([row[:-1] for row in cut(output.logits, call["attention_mask"])])
        wanted = cross_entropy(logits, torch.tensor([i for row in rows for i in row[1:]]))
        torch.testing.assert_close(output.loss, wanted, rtol=1e-5, atol=0)


def test_a_prompt_can_be_said_to_end_where_labels_begin() -> None:
    with llama() as decoder, torch.no_grad():
        ids, recall, other = decoder.tokens(LONG)[:40], Written(decoder), Written(decoder)
        call = padded([ids], "left", 42)
        labels = call["input_ids"].clone()
        labels[:, : 2 + 20] = -100
        with memory_in_forward(decoder, recall, prompts=before_labels):
            by_labels = decoder.model(**call, labels=labels).logits
            decoder.model(**call)
        with memory_in_forward(decoder, other, prompts=lambda call: [20]):
            by_length = decoder.model(**call).logits
        assert torch.equal(by_labels, by_length)
        assert len(recall.asked) == 3 + 3  # 16 + 4 prompt tokens and 16 of the response; then 16 + 16 + 8 of prompt alone


def test_a_prompt_that_knows_its_users_words_asks_with_them_alone() -> None:
    with llama() as decoder, torch.no_grad():
        recall, prompt = Written(decoder), Prompt.of(decoder, "Question: why?\nAnswer:", "why?")
        with memory_in_forward(decoder, recall, prompts=lambda call: [prompt]):
            decoder.model(input_ids=torch.tensor([[*prompt.ids, *decoder.tokens(" so")]]))
        assert recall.asked == ["why?"]


def test_hidden_states_and_the_logits_that_are_kept_are_cut_too() -> None:
    with llama() as decoder, torch.no_grad():
        call = padded([decoder.tokens(LONG)[:20], decoder.tokens(LONG)[:9]], "left", 20)
        with memory_in_forward(decoder, as_texts):
            output = decoder.model(**call, output_hidden_states=True)
            last = decoder.model(call["input_ids"], call["attention_mask"], logits_to_keep=3).logits
        assert {tuple(states.shape[:2]) for states in output.hidden_states} == {(2, 20)}
        assert torch.equal(last, output.logits[:, -3:])


def test_after_the_block_the_model_computes_bit_for_bit_what_it_did_before() -> None:
    with llama() as decoder, torch.no_grad():
        call = padded([decoder.tokens(LONG)[:30], decoder.tokens(LONG)[:19]], "left", 30)
        before = decoder.model(**call).logits
        with memory_in_forward(decoder, as_texts):
            assert not torch.equal(decoder.model(**call).logits, before)
        assert torch.equal(decoder.model(**call).logits, before)
        with pytest.raises(ZeroDivisionError), memory_in_forward(decoder, lambda queries, texts: [1 // 0]):  # type: ignore[list-item]
            decoder.model(**call)
        assert torch.equal(decoder.model(**call).logits, before)


def test_a_recall_that_brings_nothing_leaves_the_layout_behind_the_interval() -> None:
    with llama() as decoder, torch.no_grad():
        ids = decoder.tokens(LONG)[:20]
        with memory_in_forward(decoder, lambda queries, texts: [[] for _ in queries]):
            inside = decoder.model(input_ids=torch.tensor([ids])).logits[0]
        outside = decoder.forward(decoder.layout([ids])).logits[0, len(decoder.prefix_ids) :]
        assert torch.equal(inside, outside)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_cache": True}, "found use_cache=True"),
        ({"position_ids": torch.arange(4)[None]}, "found position_ids given"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "found padding inside row 0"),
        ({"attention_mask": torch.zeros(1, 4, dtype=torch.long)}, "found padding inside row 0, or nothing else"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "found an attention_mask of another shape"),
        ({"output_attentions": True}, "found output_attentions"),
    ],
)
def test_what_memory_cannot_be_combined_with_is_refused_and_leaves_the_model_as_it_was(options: Any, what: str) -> None:
    with llama() as decoder, torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        before = decoder.model(ids).logits
        with pytest.raises(SpecError, match=what), memory_in_forward(decoder, as_texts):
            decoder.model(input_ids=ids, **options)
        assert torch.equal(decoder.model(ids).logits, before)


@pytest.mark.parametrize(("prompts", "what"), [([5], "a prompt of 5 tokens in row 0 of 4"), ([0], "a prompt of 0 tokens")])
def test_a_prompt_that_is_no_part_of_its_row_is_refused(prompts: list[int], what: str) -> None:
    with (
        llama() as decoder,
        memory_in_forward(decoder, as_texts, prompts=lambda call: prompts),
        pytest.raises(SpecError, match=what),
    ):
        decoder.model(input_ids=torch.tensor([[5, 6, 7, 8]]))


def test_a_prompt_of_other_tokens_than_its_row_is_refused() -> None:
    prompt = Prompt((5, 9), (True, True))
    with (
        llama() as decoder,
        memory_in_forward(decoder, as_texts, prompts=lambda call: [prompt]),
        pytest.raises(SpecError, match="found other tokens in row 0"),
    ):
        decoder.model(input_ids=torch.tensor([[5, 6, 7, 8]]))


def test_memories_of_another_model_are_refused_on_entering() -> None:
    class Refusing(Written):
        def check(self, decoder: Any) -> None:
            raise SpecError("of another model")

    with llama() as decoder, pytest.raises(SpecError, match="of another model"), memory_in_forward(decoder, Refusing(decoder)):
        pass
