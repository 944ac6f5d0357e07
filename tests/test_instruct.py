"""Finetuning: the loss is on the response, the chunks read what generation would read, and rows of each form are understood."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from golden_losses import check_losses
from torch.nn.functional import cross_entropy

from memory3.answering import question_prompt
from memory3.bank import Bank
from memory3.decoder import Decoder, attach
from memory3.generation import Prompt
from memory3.spec import Memory3Error, MemorySpec, Reference, SourceError, SpecError
from memory3.train.grid import Answered, RecalledTexts
from memory3.train.instruct import PEAK, Instruct, LikeLength, answered, cut, examples_of, schedule_of, steps_of
from memory3.train.loop import Settings, run
from memory3.train.settings import TrainError
from memory3.writing import write

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16, references_per_chunk=2)
END = 2
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def llama() -> Decoder:
    return attach(tiny_model("llama"), tiny_tokenizer(), SPEC)


def example(decoder: Decoder, prompt: str, response: str) -> Answered:
    return Answered(Prompt.of(decoder, prompt), (*decoder.tokens(response), END))


def some(decoder: Decoder, count: int) -> list[Answered]:
    """Examples of different lengths, prompts of one chunk or more, responses of one or more."""
    return [example(decoder, f"Number {n}" + " and so on" * (n % 4), f" is {n}" + " indeed" * (n % 5)) for n in range(count)]


def texts_of(query: str) -> list[str]:
    return [f"It was {query[::-1]}.", f"Not {query[:7]}"]


def as_texts(queries: Sequence[str], texts: Sequence[str]) -> list[list[str]]:
    return [texts_of(query) for query in queries]


def test_the_loss_is_that_of_response_and_end_token_alone() -> None:
    """Against passes over single rows, weighted by their tokens."""
    with llama() as decoder, torch.no_grad():
        rows = some(decoder, 5)
        objective = Instruct(rows, size=5, seed=0)
        loss, figures = objective.loss(decoder, objective.batch(0), 0)
        logits, labels = [], []
        for row in rows:
            out = decoder.model(torch.tensor([row.ids])).logits[0]
            logits.append(out[len(row.prompt.ids) - 1 : -1])
            labels += row.response
        assert labels.count(END) == 5
        torch.testing.assert_close(loss, cross_entropy(torch.cat(logits), torch.tensor(labels)), rtol=1e-5, atol=0)
        hits = (torch.cat(logits).argmax(-1) == torch.tensor(labels)).float().mean()
        assert figures["accuracy"] == pytest.approx(float(hits))
        assert objective.tokens(objective.batch(0)) == sum(len(row.ids) for row in rows)


def test_with_recall_the_loss_is_that_of_passes_that_read_the_memories_chunk_by_chunk() -> None:
    with llama() as decoder, torch.no_grad():
        rows = [
            example(decoder, "What is it that we all see here?", " A bird, and then another bird of the sea"),
            *some(decoder, 2),
        ]
        loss, figures = Instruct(rows, 3, 0, as_texts).loss(decoder, [0, 1, 2], 0)
        logits, labels, prefix = [], [], len(decoder.prefix_ids)
        for row in rows:
            own = [row.prompt.ids[n : n + 16] for n in range(0, len(row.prompt.ids), 16)]
            later = [row.response[n : n + 16] for n in range(0, len(row.response) - 16, 16)]
            chunks = [*own, own[-1], *later]  # the first of the response reads what the prompt's last one recalled
            read = [decoder.encode(texts_of(decoder.tokenizer.decode(c, skip_special_tokens=True).strip())) for c in chunks]
            grid = [n // 16 for n in range(len(row.prompt.ids))]
            grid += [len(own) + n // 16 for n in range(len(row.response))]
            layout = decoder.layout([row.ids], grid=[grid])
            out = decoder.forward(layout, decoder.reading(layout.chunks, [read])).logits[0, prefix:]
            logits.append(out[len(row.prompt.ids) - 1 : -1])
            labels += row.response
        torch.testing.assert_close(loss, cross_entropy(torch.cat(logits), torch.tensor(labels)), rtol=1e-5, atol=0)
        assert figures["chunks_with_reference"] == 1


def test_the_gradient_reaches_the_weights_through_the_references() -> None:
    with llama() as decoder:
        rows, taken = some(decoder, 2), []
        for recall in (as_texts, None):
            decoder.model.zero_grad()
            Instruct(rows, 2, 0, recall).loss(decoder, [0, 1], 0)[0].backward()
            taken.append(decoder.model.model.layers[0].self_attn.v_proj.weight.grad.clone())
        assert not torch.allclose(taken[0], taken[1])
        stack = decoder.stack
        decoder.stack = lambda *given: _detached(stack(*given))  # type: ignore[method-assign]
        decoder.model.zero_grad()
        Instruct(rows, 2, 0, as_texts).loss(decoder, [0, 1], 0)[0].backward()
        assert not torch.allclose(taken[0], decoder.model.model.layers[0].self_attn.v_proj.weight.grad)


def _detached(stack: Any) -> Any:
    return type(stack)(stack.keys.detach(), stack.values.detach(), stack.counts, stack.positions)


def test_an_example_recalls_once_however_often_it_is_seen() -> None:
    asked = []

    def counting(queries: Sequence[str], texts: Sequence[str]) -> list[list[str]]:
        asked.extend(queries)
        return as_texts(queries, texts)

    with llama() as decoder, torch.no_grad():
        objective = Instruct(some(decoder, 3), 2, 0, counting)
        losses = [float(objective.loss(decoder, [0, 1], step)[0]) for step in range(2)]
        assert losses[0] == losses[1]
        assert len(asked) == len(set(asked)) > 0


def test_a_bank_gives_texts_but_none_that_repeats_the_row(tmp_path: Path) -> None:
    with llama() as decoder:
        bank = Bank(tmp_path / "bank", decoder, create=True)
        said = "The fox is a small wild dog."
        write(decoder, [Reference(said), Reference("A fox lives in the wild wood.")], bank)
        recall, free = (RecalledTexts(Bank(tmp_path / "bank"), decoder.tokens, 2, max_overlap=m) for m in (0.9, None))
        assert recall(["wild fox"], ["wild fox"])[0] == free(["wild fox"], [said])[0]
        assert recall(["wild fox"], [f"What? {said}"]) == [["A fox lives in the wild wood."]]
        assert len(free(["wild fox"], [said])[0]) == 2
        with pytest.raises(SpecError, match="found retriever 'best'"):
            RecalledTexts(bank, decoder.tokens, 2, "best")
        with pytest.raises(SpecError, match="found count=0"):
            RecalledTexts(bank, decoder.tokens, 0)


# ---- batches and schedule ----


def test_an_epoch_sees_every_row_in_full_batches_of_like_length_and_the_next_one_in_another_order() -> None:
    lengths = [1 + (37 * n) % 100 for n in range(203)]
    batches = LikeLength(lengths, 8, seed=1)
    epochs = [[batches(e * len(batches) + n) for n in range(len(batches))] for e in range(2)]
    for epoch in epochs:
        assert {len(batch) for batch in epoch} == {8}
        seen = [n for batch in epoch for n in batch]
        assert set(seen) == set(range(203))
        assert len(seen) == 208
        padding = sum(max(lengths[n] for n in batch) * 8 - sum(lengths[n] for n in batch) for batch in epoch)
        assert padding < 0.1 * sum(lengths)
    assert epochs[0] != epochs[1]
    assert [LikeLength(lengths, 8, seed=1)(n) for n in (30, 2, 30)] == [epochs[1][4], epochs[0][2], epochs[1][4]]
    assert epochs[0] != [LikeLength(lengths, 8, seed=2)(n) for n in range(len(batches))]


def test_a_batch_is_no_larger_than_the_data_and_no_data_is_refused() -> None:
    assert sorted(LikeLength([3, 1], 8, seed=0)(5)) == [0, 1]
    with pytest.raises(TrainError, match="found 0 rows for batches of 8"):
        LikeLength([], 8, seed=0)


def test_the_schedule_is_the_papers() -> None:
    schedule = schedule_of(PEAK, 100)
    rates = [schedule.rate(step) for step in range(100)]
    assert max(rates) == rates[9] == rates[10] == 5e-5
    assert rates[0] == pytest.approx(5e-6)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-8)


# ---- rows ----


def test_rows_of_each_form_become_prompt_and_response() -> None:
    with llama() as decoder:
        said = decoder.tokens
        raw = answered(decoder, {"prompt": "One plus one", "response": " is two"}, "here")
        assert (raw.prompt.ids, raw.response) == ((1, *said("One plus one")), (*said(" is two"), END))
        asked = answered(decoder, {"question": " Why? ", "answers": ["", "So.", "No."], "split": "train"}, "here")
        assert asked == Answered(question_prompt(decoder, "Why?"), (*said(" So."), END))
        silent = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " "}]
        assert answered(decoder, {"messages": silent}, "here") == Answered(question_prompt(decoder, "Why?"), (END,))
        turns = [("system", "Be brief."), ("user", "Who?"), ("assistant", "Me."), ("user", "Why?"), ("assistant", "So.")]
        chat = answered(decoder, {"messages": [{"role": r, "content": c} for r, c in turns]}, "here")
        text = "Be brief.\n\nQuestion: Who?\nAnswer: Me.\n\nQuestion: Why?\nAnswer:"
        assert chat.prompt.ids == (1, *said(text))
        assert chat.response == (*said(" So."), END)
        assert chat.prompt.query(decoder, 0, len(chat.prompt.ids)) == "Who?Why?"


def test_words_that_somebody_repeats_are_marked_where_the_user_said_them() -> None:
    turns = [("user", "Arven"), ("assistant", "Is Arven a town?"), ("user", "Yes"), ("assistant", "Good."), ("user", "Yes")]
    with llama() as decoder:
        row = {"messages": [{"role": r, "content": c} for r, c in [*turns, ("assistant", "Fine.")]]}
        prompt = answered(decoder, row, "here").prompt
        assert prompt.query(decoder, 0, len(prompt.ids)) == "ArvenYesYes"
        first = next(n for n, mine in enumerate(prompt.content) if mine)
        before = decoder.tokenizer.decode(prompt.ids[:first], skip_special_tokens=True)
        assert before.strip() == "Question:"


def test_a_chat_template_is_used_where_there_is_one_and_its_own_end_of_turn_is_learned() -> None:
    with llama() as decoder:
        decoder.tokenizer = type(decoder.tokenizer)(tokenizer_object=decoder.tokenizer.backend_tokenizer, bos_token="<s>")
        decoder.tokenizer.add_special_tokens({"eos_token": "</s>"})
        decoder.tokenizer.chat_template = CHAT
        row = {"messages": [{"role": "user", "content": " Why? "}, {"role": "assistant", "content": "So.\n"}]}
        made = answered(decoder, row, "here")
        assert made.prompt == question_prompt(decoder, "Why?")
        assert made.response == (*decoder.tokens("So."), END)
        row["messages"] = [*row["messages"], {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
        longer = answered(decoder, row, "here")
        assert longer.prompt.ids == (1, *decoder.tokens("<|user|>Why?\n<|assistant|>So.</s>\n<|user|>Who?\n<|assistant|>"))
        assert longer.prompt.query(decoder, 0, len(longer.prompt.ids)) == "Why?Who?"
        decoder.tokenizer.chat_template = CHAT.replace("m.content", "m.content | upper")
        with pytest.raises(SourceError, match="changes what users said at here"):
            answered(decoder, row, "here")


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_rows_of_another_split_are_left_out_and_long_ones_are_cut_without_a_warning(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"question": "Short?", "answers": ["Yes, " + "very " * 30], "split": "train"},
        {"question": "Held back?", "answers": ["Yes"], "split": "dev"},
        {"question": "Long? " * 20, "answers": ["Yes"], "split": "train"},
    ]
    with llama() as decoder:
        told: list[tuple[int, int]] = []
        monkeypatch.setattr(decoder.tokenizer, "model_max_length", 50)
        found = examples_of(decoder, written(tmp_path / f"rows{kind}", rows), longest=60, tell=lambda *n: told.append(n))
        assert [example.prompt for example in found] == [question_prompt(decoder, "Short?")]
        assert len(found[0].ids) == 60
        assert found[0].response[-1] != END
        assert capfd.readouterr() == ("", "")
        assert told == [(1, 2), (2, 2)]
        assert [len(examples_of(decoder, tmp_path / f"rows{kind}", split=split)) for split in ("dev", "train")] == [1, 2]
        with pytest.raises(TrainError, match="found no example among 3 rows"):
            examples_of(decoder, tmp_path / f"rows{kind}", split="test")
        assert cut(Answered(found[0].prompt, ()), 60) is None


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "A", "response": None}, "found None for a text"),
        ({"prompt": "", "response": "B"}, "found '' for a text"),
        ({"text": "A"}, "expected prompt and response, question and answers, or messages"),
        ({"question": "A", "answers": [" "]}, "found a question without an answer"),
        ({"question": 3, "answers": ["B"]}, "found the message"),
        ({"messages": "A"}, "found no conversation"),
        ({"messages": [{"role": "user", "content": "A"}]}, "found no conversation"),
        ({"messages": [{"role": "user", "content": "A"}, {"role": "tool", "content": "B"}]}, "found the message"),
        ({"messages": [{"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]}, "found roles"),
        ({"messages": [{"role": "user", "content": "A"}] * 2 + [{"role": "assistant", "content": "B"}]}, "found roles"),
        ([1], "is a JSON list, expected one object per line"),
    ],
)
def test_a_row_of_no_known_form_is_refused_with_its_place(row: Any, what: str, tmp_path: Path) -> None:
    with llama() as decoder, pytest.raises(SourceError, match=what) as raised:
        examples_of(decoder, written(tmp_path / "rows.jsonl", [{"prompt": "A", "response": "B"}, row]))
    assert "rows.jsonl:2" in str(raised.value)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b"{"), ("a.jsonl", b"\xff"), ("a.parquet", b"no"), ("a.csv", b"")])
def test_a_file_that_cannot_be_read_is_one_clear_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with llama() as decoder:
        for path in (tmp_path / name, tmp_path / f"missing{Path(name).suffix}"):
            with pytest.raises(Memory3Error, match="expected"):
                examples_of(decoder, path)


def test_an_epoch_is_an_epoch_however_many_batches_a_step_takes() -> None:
    assert [steps_of(12, 4, 3, per_step) for per_step in (1, 2, 3, 4, 100)] == [9, 5, 3, 3, 1]
    assert steps_of(2, 8, 1) == 1
    assert steps_of(9, 8, 1) == len(LikeLength([1] * 9, 8, 0))


def test_ten_golden_losses_of_finetuning_with_memory(tmp_path: Path) -> None:
    with llama() as decoder:
        bank = Bank(tmp_path / "bank", decoder, create=True)
        write(decoder, [Reference(f"Number {n} is indeed a number, and so on.") for n in range(8)], bank)
        recall = RecalledTexts(Bank(tmp_path / "bank"), decoder.tokens, decoder.spec.references_per_chunk)
        objective, lines = Instruct(some(decoder, 12), 4, 0, recall), []
        settings = Settings(tmp_path / "run", schedule_of(2e-3, 10), log_every=1, save_every=100, precision="no")
        assert run(decoder, objective, settings, lines.append) == 10
    assert all(line["chunks_with_reference"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    check_losses("sft", [line["loss"] for line in lines])
