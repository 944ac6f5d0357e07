"""Streaming, batches, the chunk grid of recall, and what the answer says about its memories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from memory3.bank import Bank
from memory3.catalogue import Hit
from memory3.decoder import Decoder, attach
from memory3.generation import Prompt, complete, generate, stream
from memory3.recall import Recall, Recalled
from memory3.spec import BankMismatch, Memory, MemorySpec, Reference, SourceError, SpecError
from memory3.writing import write

SPEC = MemorySpec(tokens_per_head=6, chunk_length=8)
FACTS = ("The tower was completed in 1889.", "Salt melts at 801 degrees.", "A group of crows is a murder.")
LONG = GenerationConfig(eos_token_id=-1, do_sample=False)


@dataclass
class Scripted:
    """A recall that gives memories in turn and remembers what it was asked."""

    decoder: Decoder
    turns: Sequence[tuple[int, ...]] = ((0, 1), (2,), (1,))
    asked: list[str] = field(default_factory=list)
    min_score: float | None = None

    def __post_init__(self) -> None:
        self.memories: list[Memory] = self.decoder.encode(FACTS)
        self.texts: list[str] = []

    def check(self, decoder: Decoder) -> None:
        """They are the decoder's own."""

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        found = []
        self.texts += texts or queries
        for query in queries:
            turn = self.turns[len(self.asked) % len(self.turns)]
            self.asked.append(query)
            references = tuple(Reference(FACTS[n]) for n in turn)
            hits = tuple(Hit(r.id, 1.0) for r in references)
            found.append(Recalled(query, hits, tuple(self.memories[n] for n in turn), references))
        return found


class ByText(Scripted):
    """The same query always brings the same memories, so that a batch and a single run see the same."""

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        return [Scripted(self.decoder, (self.turns[len(q) % len(self.turns)],))([q])[0] for q in queries]


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as attached:
        yield attached


def test_the_stream_joined_is_the_completion(decoder: Decoder) -> None:
    tokens = list(generate(decoder, "When?", recall=Scripted(decoder), config=LONG, max_new_tokens=20))
    [whole] = complete(decoder, ["When?"], recall=Scripted(decoder), config=LONG, max_new_tokens=20)
    assert "".join(t.text for t in tokens) == whole.text
    assert tuple(t.id for t in tokens) == whole.ids
    assert len(whole.ids) == 20
    assert tokens[-1].completion is not None


def test_a_batch_gives_what_each_prompt_gives_alone(model: Any, tokenizer: Any) -> None:
    """For every family; prompts of different length, so all but one have padding on the left."""
    prompts = ["When was the tower completed?", "Salt?", "What are crows in a group?"]
    with attach(model, tokenizer, SPEC) as decoder:
        together = complete(decoder, prompts, recall=ByText(decoder), config=LONG, max_new_tokens=18)
        for prompt, found in zip(prompts, together, strict=True):
            [alone] = complete(decoder, [prompt], recall=ByText(decoder), config=LONG, max_new_tokens=18)
            assert alone.ids == found.ids


@pytest.mark.parametrize("name", [*FAMILIES, *(f"{name} with a short window" for name in FAMILIES if FAMILIES[name].window)])
def test_decoding_equals_the_full_forward_across_recalls(name: str) -> None:
    """Every chosen token is the best one of a single pass over prompt and answer, with each chunk's own memories.

    For every family, and where there are windows also with one of eight tokens, which the answer outgrows.
    """
    family, _, window = name.partition(" ")
    with attach(tiny_model(family, **({"sliding_window": 8} if window else {})), tiny_tokenizer(), SPEC) as decoder:
        recall = Scripted(decoder)
        prompt = Prompt.of(decoder, "When was it?")
        [done] = complete(decoder, [prompt], recall=recall, config=LONG, max_new_tokens=20)
        chunks = [r.memories for _, r in done.recalls]
        prompt_chunks = sum(name.startswith("prompt") for name, _ in done.recalls)
        table = [*chunks[:prompt_chunks], chunks[prompt_chunks - 1], *chunks[prompt_chunks:]]
        context = [*prompt.ids, *done.ids[:-1]]
        grid = [n // 8 for n in range(len(prompt.ids))] + [prompt_chunks + n // 8 for n in range(len(done.ids) - 1)]
        layout = decoder.layout([context], grid=[grid])
        logits = decoder.forward(layout, decoder.reading(layout.chunks, [table])).logits[0, -len(done.ids) :]
        without = decoder.forward(layout).logits[0, -len(done.ids) :]
    assert logits.argmax(-1).tolist() == list(done.ids)
    assert float((logits - without).detach().abs().max()) > 0.01


def test_chunks_recall_for_themselves_and_a_generated_chunk_reads_what_the_last_recalled(decoder: Decoder) -> None:
    recall = Scripted(decoder)
    [done] = complete(decoder, ["abcdefghijklmnopqrs"], recall=recall, config=LONG, max_new_tokens=20)
    assert recall.asked[:3] == ["abcdefg", "hijklmno", "pqrs"]  # the first chunk of 8 holds <s>
    assert [name for name, _ in done.recalls] == ["prompt 0", "prompt 1", "prompt 2", "answer 0", "answer 1"]
    texts = [str(decoder.tokenizer.decode(done.ids[n : n + 8], skip_special_tokens=True)).strip() for n in (0, 8)]
    assert recall.asked[3:] == texts


def test_a_chunk_of_template_tokens_asks_nothing_and_keeps_the_memories_before_it(decoder: Decoder) -> None:
    """A chat template's last words may fill the last chunk: the answer must not lose its memories by that."""
    recall = Scripted(decoder)
    prompt = Prompt.of(decoder, "why?" + "[/INST] and so on", "why?")
    [done] = complete(decoder, [prompt], recall=recall, config=LONG, max_new_tokens=4, effect=True)
    assert recall.asked == ["why?"]
    assert [len(r.hits) for _, r in done.recalls] == [2, 2, 2]
    assert [r.query for _, r in done.recalls] == ["why?", "", ""]
    assert done.effect is not None
    assert min(done.effect.attention_mass.values()) > 0


def test_the_overlap_filter_of_an_answer_compares_with_the_whole_prompt(decoder: Decoder) -> None:
    recall = Scripted(decoder)
    complete(decoder, ["When was it? And who?"], recall=recall, config=LONG, max_new_tokens=12)
    assert len(recall.texts) == 4  # three chunks of the prompt, one of the answer
    assert set(recall.texts) == {"When was it? And who?"}


def test_template_tokens_are_no_part_of_a_query(decoder: Decoder) -> None:
    prompt = Prompt.of(decoder, "Q: why?\nA:", "why?")
    assert prompt.query(decoder, 0, 99) == "why?"
    with pytest.raises(SourceError, match="empty prompt"):
        Prompt.of(decoder, "")


def test_an_empty_recall_keeps_the_layout_of_memory(decoder: Decoder) -> None:
    [empty] = complete(decoder, ["When?"], recall=Scripted(decoder, ((),)), config=LONG, max_new_tokens=8, effect=True)
    layout = decoder.layout([decoder.context("When?")])
    assert int(decoder.forward(layout).logits[0, -1].argmax()) == empty.ids[0]
    assert empty.effect is not None
    assert empty.effect.citations == ()
    assert not empty.effect.silent


def test_without_recall_the_tokens_are_those_of_transformers_own_generate() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = torch.tensor([[1, *tokenizer("Once upon", add_special_tokens=False)["input_ids"]]])
    own = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None)
    with attach(model, tokenizer, SPEC) as decoder:
        [ours] = complete(decoder, ["Once upon"], config=LONG, max_new_tokens=12)
    assert list(ours.ids) == own[0, ids.shape[1] :].tolist()


def test_a_seed_reproduces_and_another_differs(decoder: Decoder) -> None:
    config = GenerationConfig(do_sample=True, temperature=1.5, top_k=50, top_p=0.95, eos_token_id=-1)

    def sampled(seed: int) -> tuple[int, ...]:
        return complete(decoder, ["When?"], recall=Scripted(decoder), config=config, max_new_tokens=16, seed=seed)[0].ids

    assert sampled(3) == sampled(3) != sampled(4)


def test_the_end_token_stop_strings_and_criteria_end_a_sequence(decoder: Decoder) -> None:
    [free] = complete(decoder, ["When?"], config=LONG, max_new_tokens=10)
    assert (free.finish, len(free.ids)) == ("length", 10)
    ends = GenerationConfig(do_sample=False, eos_token_id=free.ids[4])
    [ended] = complete(decoder, ["When?"], config=ends, max_new_tokens=10)
    assert (ended.finish, ended.ids[-1]) == ("stop", free.ids[4])
    [cut] = complete(
        decoder, ["When?"], config=LONG, max_new_tokens=10, stopping=[lambda ids, scores: torch.tensor([ids.shape[1] > 8])]
    )
    assert cut.finish == "stop"
    assert len(cut.ids) < 10


def test_citations_are_ordered_by_the_attention_the_answer_paid(decoder: Decoder) -> None:
    [done] = complete(decoder, ["When was it?"], recall=Scripted(decoder), config=LONG, max_new_tokens=20, effect=True)
    effect = done.effect
    assert effect is not None
    shares = [c.share for c in effect.citations]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1.0)
    assert set(effect.attention_mass) == {0, 1}
    assert all(0 < mass < 1 for mass in effect.attention_mass.values())
    assert effect.logit_shift > 0.01
    assert not effect.silent


def test_memories_that_change_nothing_are_called_silent(decoder: Decoder) -> None:
    """Keys so far away that the softmax gives them nothing: recalled, read, and without any effect."""
    recall = Scripted(decoder)
    with torch.no_grad():
        for memory in recall.memories:
            memory.values.zero_()
            memory.keys.zero_()
    original = decoder.forward

    def blind(layout: Any, reading: Any = None, **options: Any) -> Any:
        return original(layout, None, **options)

    decoder.forward = blind  # type: ignore[method-assign]
    [done] = complete(decoder, ["When?"], recall=recall, config=LONG, max_new_tokens=4, effect=True)
    assert done.effect is not None
    assert done.effect.citations
    assert done.effect.silent


@pytest.mark.parametrize(
    "setting",
    [{"num_beams": 2}, {"num_return_sequences": 3, "do_sample": True}, {"guidance_scale": 1.5}, {"penalty_alpha": 0.6}],
)
def test_settings_that_the_loop_cannot_follow_are_refused_by_name(decoder: Decoder, setting: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"found {next(iter(setting))}=.*expected greedy or sampling"):
        next(iter(stream(decoder, ["When?"], config=GenerationConfig(**setting))))


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6},
        {"min_length": 14},
        {"max_length": 16},
        {"suppress_tokens": [7, 100, 230]},
        {"begin_suppress_tokens": [7, 100, 230]},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"bad_words_ids": [[230], [100]]},
        {"stop_strings": ["e"], "max_new_tokens": 10},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_do_what_they_do_in_transformers_own_generate(setting: dict[str, Any]) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = torch.tensor([[1, *tokenizer("Once upon", add_special_tokens=False)["input_ids"]]])
    free = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None)
    ends = int(free[0, ids.shape[1] + 3])  # the greedy answer would end after four tokens
    config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=0, **{"max_new_tokens": 12, **setting})
    if "max_length" in setting:
        config.max_new_tokens = None
    own = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, tokenizer=tokenizer)
    with attach(model, tokenizer, SPEC) as decoder:
        [ours] = complete(decoder, ["Once upon"], config=config)
    assert list(ours.ids) == own[0, ids.shape[1] :].tolist()


def test_settings_about_caches_and_unknown_notes_do_not_matter_and_impossible_ones_are_refused(decoder: Decoder) -> None:
    plain = complete(decoder, ["When?"], config=LONG, max_new_tokens=4)[0].ids
    noted = GenerationConfig(eos_token_id=-1, do_sample=False, cache_implementation="hybrid", encoder_repetition_penalty=1.0)
    noted.chat_format = "chatml"
    assert complete(decoder, ["When?"], config=noted, max_new_tokens=4)[0].ids == plain
    cold = GenerationConfig(do_sample=True)
    cold.temperature = 0.0
    with pytest.raises(SpecError, match="found temperature=0"):
        complete(decoder, ["When?"], config=cold, max_new_tokens=4)
    narrow = GenerationConfig(do_sample=True, top_p=0.0, eos_token_id=-1)  # only the best token is left
    assert complete(decoder, ["When?"], config=narrow, max_new_tokens=4)[0].ids == plain


def test_criteria_are_given_the_scores_of_the_step_and_no_room_is_refused(decoder: Decoder) -> None:
    shapes = []

    def noting(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(scores.shape))
        return torch.tensor([bool(scores.max() > 1e9)])

    complete(decoder, ["When?"], config=LONG, max_new_tokens=3, stopping=[noting])
    assert shapes == [(1, 300)] * 3
    with pytest.raises(SpecError, match="room for 0 new tokens"):
        complete(decoder, ["When?"], config=LONG, max_new_tokens=0)


def test_memories_of_another_model_are_refused(decoder: Decoder, tmp_path: Path) -> None:
    bank = Bank(tmp_path / "bank", decoder, create=True)
    write(decoder, [Reference(fact) for fact in FACTS], bank)
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.1)
    with attach(other, tiny_tokenizer(), SPEC) as stranger, pytest.raises(BankMismatch, match="weights"):
        complete(stranger, ["When?"], recall=Recall(bank), config=LONG, max_new_tokens=2)
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as twin:  # the same weights in another object
        assert complete(twin, ["When?"], recall=Recall(bank), config=LONG, max_new_tokens=2)


def test_text_that_is_no_unicode_is_refused(decoder: Decoder) -> None:
    with pytest.raises(SourceError, match="no valid Unicode"):
        Prompt.of(decoder, "caf\udce9")


def test_nothing_is_printed_while_decoding(decoder: Decoder, capfd: pytest.CaptureFixture[str]) -> None:
    complete(decoder, ["When?"], recall=Scripted(decoder), config=LONG, max_new_tokens=10, effect=True)
    assert capfd.readouterr() == ("", "")


def test_no_prompts_give_nothing(decoder: Decoder) -> None:
    assert complete(decoder, []) == []
