"""DPO: trl's loss on passes that read memory, resumed bit for bit without a pickle, and nothing of trl stays or is sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from golden_losses import MADE_HERE, check_losses
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry
from test_instruct import written
from torch import Tensor
from torch.nn.functional import logsigmoid

from memory3.answering import question_prompt
from memory3.decoder import Decoder, attach
from memory3.generation import Prompt
from memory3.spec import MemorySpec, SourceError
from memory3.train.grid import Answered, layout_of, reading_of, recalled
from memory3.train.instruct import schedule_of
from memory3.train.loop import Settings, run
from memory3.train.preference import BETA, Pair, pairs_of, preference
from memory3.train.settings import TrainError

SPEC = MemorySpec(tokens_per_head=4, chunk_length=16, references_per_chunk=2)
END = 2


def llama() -> Decoder:
    return attach(tiny_model("llama"), tiny_tokenizer(), SPEC)


def some(decoder: Decoder, count: int) -> list[Pair]:
    """Pairs of different lengths, over several chunks."""

    def response(text: str) -> tuple[int, ...]:
        return (*decoder.tokens(text), END)

    prompts = [f"Say the number {n}" + ", please" * (n % 3) for n in range(count)]
    return [
        Pair(Prompt.of(decoder, p), response(f" It is {p[15:]}" * 2), response(" No" * n)) for n, p in enumerate(prompts, 1)
    ]


def as_texts(queries: Sequence[str], texts: Sequence[str]) -> list[list[str]]:
    return [[f"It was {query[::-1]}.", f"Not {query[:7]}"] for query in queries]


def log_probability(decoder: Decoder, row: Answered, memory: bool) -> Tensor:
    """Of a response, from a pass over its row alone."""
    if memory:
        layout = layout_of(decoder, [row])
        reading = reading_of(decoder, layout, recalled(decoder, [row], as_texts))
    else:
        layout, reading = decoder.layout([row.ids], memory=False), None
    logits = decoder.forward(layout, reading).logits[0, -len(row.response) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(row.response)[:, None]).sum()


@pytest.mark.parametrize("memory", [False, True])
def test_the_loss_is_that_of_the_formula_on_single_rows_of_policy_and_reference(memory: bool) -> None:
    """`-log sigmoid(beta * ((c - c_ref) - (r - r_ref)))`, after the policy has moved away from the reference model."""
    with llama() as decoder, torch.no_grad():
        pairs = some(decoder, 3)
        with preference(decoder, pairs, 3, 0, as_texts if memory else None, beta=0.1) as objective:
            start = {name: p.clone() for name, p in decoder.model.named_parameters()}
            for parameter in decoder.model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            loss, figures = objective.loss(decoder, objective.batch(0), 0)
            assert all(torch.equal(p, start[name]) for name, p in objective.frozen.model.named_parameters())
            margins = []
            for pair in pairs:
                rows = [Answered(pair.prompt, side) for side in (pair.chosen, pair.rejected)]
                policy, frozen = ([log_probability(d, row, memory) for row in rows] for d in (decoder, objective.frozen))
                margins.append((policy[0] - frozen[0]) - (policy[1] - frozen[1]))
        wanted = -logsigmoid(0.1 * torch.stack(margins)).mean()
        assert abs(float(wanted) - 0.6931) > 1e-3
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=0)
        assert figures["preferred"] == pytest.approx(sum(float(m > 0) for m in margins) / 3)
        assert figures["margin"] == pytest.approx(float(0.1 * torch.stack(margins).mean()), rel=1e-3)
        assert objective.tokens([0]) == sum(len(pairs[0].prompt.ids) + len(s) for s in (pairs[0].chosen, pairs[0].rejected))


def test_the_gradient_reaches_the_weights_through_the_references() -> None:
    with llama() as decoder:
        pairs, taken, stack = some(decoder, 2), [], decoder.stack
        for detached in (False, True):
            if detached:
                decoder.stack = lambda rows: _detached(stack(rows))  # type: ignore[method-assign]
            decoder.model.zero_grad()
            with preference(decoder, pairs, 2, 0, as_texts) as objective:
                objective.loss(decoder, [0, 1], 0)[0].backward()
            taken.append(decoder.model.model.layers[0].self_attn.v_proj.weight.grad.clone())
        assert float(taken[0].abs().sum()) > 0
        assert not torch.allclose(taken[0], taken[1])


def _detached(stack: Any) -> Any:
    return type(stack)(stack.keys.detach(), stack.values.detach(), stack.counts, stack.positions)


def trained(folder: Path, stops: tuple[int | None, ...]) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights and reports of ten steps with memory, stopped and started as told, each time in a new decoder."""
    lines: list[dict[str, float]] = []
    for stop in stops:
        with llama() as decoder, preference(decoder, some(decoder, 6), 2, 0, as_texts, beta=0.1) as objective:
            settings = Settings(folder, schedule_of(1e-4, 10), log_every=1, save_every=100, stop_at=stop, precision="no")
            run(decoder, objective, settings, lines.append)
            weights = {name: p.detach().clone() for name, p in decoder.model.named_parameters()}
    return weights, lines


def test_ten_golden_losses_and_the_same_from_a_run_that_was_stopped_and_resumed(tmp_path: Path) -> None:
    """The reference model of the second half is the first weights again, not those of the checkpoint.

    Their first margin is nothing, and on a CPU with AVX2 alone 4e-7 nats.
    """
    (whole, lines), (broken, parts) = trained(tmp_path / "a", (None,)), trained(tmp_path / "b", (4, None))
    assert [line["loss"] for line in lines] == [line["loss"] for line in parts]
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert lines[0]["margin"] == pytest.approx(0, abs=0.0 if MADE_HERE else 2e-6)
    assert lines[-1]["margin"] > max(0.0, lines[0]["margin"]) + 1e-4
    kinds = {path.suffix for path in (tmp_path / "b").rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    assert kinds <= {".safetensors", ".json", ".jsonl"}
    check_losses("dpo", [line["loss"] for line in lines])


def test_after_the_block_nothing_of_trl_is_left_on_model_and_tokenizer() -> None:
    with llama() as decoder, torch.no_grad():
        decoder.tokenizer = type(decoder.tokenizer)(tokenizer_object=decoder.tokenizer.backend_tokenizer, eos_token="</s>")
        decoder.model.config.pad_token_id = None
        ids = torch.tensor([decoder.tokens("as it was")])
        before, keys = decoder.model(ids).logits, set(vars(decoder.model))
        with preference(decoder, some(decoder, 2), 2, 0):
            assert "forward" in vars(decoder.model)
        assert set(vars(decoder.model)) == keys
        assert decoder.model.config.pad_token_id is None
        assert decoder.tokenizer.pad_token is None
        assert torch.equal(decoder.model(ids).logits, before)


def test_nothing_is_sent_printed_or_warned_of(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def sent(*given: Any) -> None:
        raise AssertionError("telemetry")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", sent)
    monkeypatch.chdir(tmp_path)
    with llama() as decoder, preference(decoder, some(decoder, 2), 2, 0, as_texts) as objective:
        objective.loss(decoder, objective.batch(0), 0)[0].backward()
    assert constants.HF_HUB_DISABLE_TELEMETRY is False
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


# ---- rows ----


def messages(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_pairs_of_plain_text_and_of_messages(kind: str, tmp_path: Path) -> None:
    plain = [
        {"prompt": "Count:", "chosen": " one two", "rejected": " one one"},
        {"prompt": "Same:", "chosen": " one", "rejected": " one"},
        {"prompt": "Long: " * 40, "chosen": " one", "rejected": " two"},
    ]
    chat = [{"chosen": messages("Why?", "So."), "rejected": messages("Why?", "No.")}]
    split = [{"prompt": messages("Why?"), "chosen": messages("", "So.")[1:], "rejected": messages("", "No.")[1:]}]
    with llama() as decoder:
        found = pairs_of(decoder, written(tmp_path / f"plain{kind}", plain), longest=100)
        assert found == [
            Pair(Prompt.of(decoder, "Count:"), (*decoder.tokens(" one two"), END), (*decoder.tokens(" one one"), END))
        ]
        answers = [(*decoder.tokens(f" {text}"), END) for text in ("So.", "No.")]
        wanted = [Pair(question_prompt(decoder, "Why?"), answers[0], answers[1])]
        assert pairs_of(decoder, written(tmp_path / f"chat{kind}", chat)) == wanted
        assert pairs_of(decoder, written(tmp_path / f"split{kind}", split)) == wanted
        parts = [{**plain[0], "split": name, "prompt": name} for name in ("train", "test", "dev")]
        kept = pairs_of(decoder, written(tmp_path / f"parts{kind}", parts))
        assert [pair.prompt for pair in kept] == [Prompt.of(decoder, "train")]
        with pytest.raises(TrainError, match="found no pair of responses among 3 rows"):
            pairs_of(decoder, tmp_path / f"plain{kind}", longest=4)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "A", "chosen": "B"}, "found no pair"),
        ({"chosen": "B", "rejected": "C"}, "found no pair"),
        ({"prompt": " ", "chosen": "B", "rejected": "C"}, "found ' ' for a text"),
        ({"chosen": messages("A", "B"), "rejected": messages("Z", "C")}, "found two responses to different prompts"),
        ({"chosen": messages("A"), "rejected": messages("A")}, "found no conversation"),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_its_place(row: Any, what: str, tmp_path: Path) -> None:
    with llama() as decoder, pytest.raises(SourceError, match=what) as raised:
        pairs_of(decoder, written(tmp_path / "rows.jsonl", [row]))
    assert "rows.jsonl:1" in str(raised.value)


def test_without_trl_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with llama() as decoder:
        pairs = some(decoder, 1)
        with pytest.raises(TrainError, match=r"pip install 'memory3\[train\]'"), preference(decoder, pairs, 1, 0):
            pass


def test_beta_is_the_papers() -> None:
    with llama() as decoder, preference(decoder, some(decoder, 1), 1, 0) as objective:
        assert objective.trainer.beta == BETA == 0.01
