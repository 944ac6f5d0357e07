"""lm-evaluation-harness reads our decoder: closed book as its own `hf`, with memory by the chunk rules and without a leak."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from memory3.bank import Bank
from memory3.cli import app
from memory3.decoder import Decoder, attach
from memory3.evaluate.harness import NAME, HarnessError, Memory3LM
from memory3.generation import Prompt, complete
from memory3.loading import load
from memory3.recall import EVALUATION_OVERLAP, Recall, Recalled
from memory3.retrieval import Hit
from memory3.spec import Memory3Error, MemorySpec, Reference
from memory3.writing import write

SIZE = 16
SPEC = MemorySpec(tokens_per_head=4, chunk_length=SIZE, reference_length=32, references_per_chunk=2)
PAIRS = [
    ("The sky is", " blue today"),
    ("The sky is", " blue todaz"),
    ("Trailing spaces go to the answer:  ", "yes"),
    ("", "no context at all"),
    ("two\nlines and an é", "\n"),
    ("A long question. " * 5, " A long answer of more than one chunk of tokens, and more."),
]
TEXTS = ["A text of some length that needs windows. " * 3, "short", "é and more than one chunk of it"]


class EchoRecall:
    """Brings the memory of the query itself, and notes what it was asked."""

    min_score = None

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.asked: list[tuple[str, str]] = []

    def check(self, decoder: Any) -> None:
        """Memories are made on the spot."""

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        self.asked += zip(queries, texts or queries, strict=True)
        found = []
        for query in queries:
            memory = self.decoder.encode_tokens([self.decoder.tokens(query)[: SPEC.reference_length]])[0]
            found.append(Recalled(query, (Hit(Reference(query).id, 1.0),), (memory,), (Reference(query),)))
        return found


def asked(kind: Any, args: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=n) for n, a in enumerate(args)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, with a bank that it wrote."""
    root = tmp_path_factory.mktemp("harness")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "model" / "memory_spec.json").write_text(json.dumps(SPEC.to_json()))
    arguments = f"pretrained={root / 'model'},device=cpu"
    lm = Memory3LM.create_from_arg_string(arguments)
    bank = Bank(root / "bank", lm.decoder, create=True)
    write(
        lm.decoder, [Reference("The sky is blue today."), Reference("Dogs sleep."), Reference("The sky, seen by dogs.")], bank
    )
    return root


@pytest.fixture(scope="module")
def closed(folder: Path) -> Memory3LM:
    return Memory3LM.create_from_arg_string(f"pretrained={folder / 'model'},device=cpu,max_length=48,batch_size=4")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFLM:
    return HFLM(str(folder / "model"), device="cpu", dtype="float32", max_length=48, batch_size=4)


@pytest.fixture
def reading() -> Any:
    with attach(tiny_model("llama"), tiny_tokenizer(), SPEC) as decoder:
        yield Memory3LM(decoder, EchoRecall(decoder), batch_size=3)


def test_closed_book_likelihoods_are_those_of_hf_on_the_same_folder(closed: Memory3LM, theirs: HFLM) -> None:
    ours = closed.loglikelihood(asked("loglikelihood", PAIRS[:5]), disable_tqdm=True)
    for (mine, greedy), (wanted, also) in zip(ours, theirs.loglikelihood(asked("loglikelihood", PAIRS[:5])), strict=True):
        assert mine == pytest.approx(wanted, abs=1e-4)
        assert greedy == also


def test_what_is_too_long_loses_its_beginning_as_with_hf(closed: Memory3LM, theirs: HFLM) -> None:
    pair = [("A long question. " * 9, " an answer")]
    (mine, _), (wanted, _) = (lm.loglikelihood(asked("loglikelihood", pair))[0] for lm in (closed, theirs))
    assert mine == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(HarnessError, match="expected at most 48"):
        closed.loglikelihood(asked("loglikelihood", [("q", "long " * 20)]))


def test_closed_book_rolling_windows_are_those_of_hf(closed: Memory3LM, theirs: HFLM) -> None:
    requests = asked("loglikelihood_rolling", [(text,) for text in TEXTS])
    for mine, wanted in zip(closed.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests), strict=True):
        assert mine == pytest.approx(wanted, abs=1e-3)


def test_closed_book_generation_is_that_of_hf(closed: Memory3LM, theirs: HFLM) -> None:
    plain = theirs.generate_until(asked("generate_until", [("Say it", {"until": [], "max_gen_toks": 12})]))[0]
    assert len(plain) > 6
    settings = [
        {"until": [], "max_gen_toks": 12},
        {"until": [plain[3:5]], "max_gen_toks": 12},
        {"until": plain[2], "max_gen_toks": 9},
    ]
    for contexts in (["Say it"], ["Say it", "Something else that is longer"]):
        requests = asked("generate_until", [(c, s) for c in contexts for s in settings])
        assert closed.generate_until(requests) == theirs.generate_until(requests)


def test_a_stop_string_ends_generation_and_not_one_that_the_prompt_began(closed: Memory3LM) -> None:
    plain = closed.generate_until(asked("generate_until", [("Say it", {"until": [], "max_gen_toks": 12})]))[0]
    across = "t" + plain[0]
    found = closed.generate_until(asked("generate_until", [("Say it", {"until": [across], "max_gen_toks": 12})]))[0]
    assert found == plain.split(across)[0]


def test_a_batch_says_what_each_request_says_alone(reading: Memory3LM) -> None:
    together = reading.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    rolled = reading.loglikelihood_rolling(asked("loglikelihood_rolling", [(t,) for t in TEXTS]))
    reading.batch_size = 1
    for pair, (value, greedy) in zip(PAIRS, together, strict=True):
        alone = reading.loglikelihood(asked("loglikelihood", [pair]), disable_tqdm=True)[0]
        assert alone[0] == pytest.approx(value, abs=1e-4)
        assert alone[1] == greedy
    for text, value in zip(TEXTS, rolled, strict=True):
        assert reading.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,)]))[0] == pytest.approx(value, abs=1e-3)


def test_what_generation_writes_with_memory_is_greedy_for_the_likelihood(reading: Memory3LM) -> None:
    decoder, recall = reading.decoder, reading.recall
    prompt = Prompt.of(decoder, "A prompt of more than two chunks, so that each reads.")
    answer = complete(decoder, [prompt], recall=recall, max_new_tokens=3 * SIZE)[0].ids
    assert len(answer) > 2 * SIZE
    assert isinstance(recall, EchoRecall)
    before = list(dict.fromkeys(recall.asked))
    recall.asked.clear()
    (_, greedy) = reading._loglikelihood_tokens([(None, list(prompt.ids), list(answer))], disable_tqdm=True)[0]
    assert greedy
    assert recall.asked == before[: len(recall.asked)]
    (_, greedy) = reading._loglikelihood_tokens([(None, list(prompt.ids), [*answer[:-1], 5])], disable_tqdm=True)[0]
    assert not greedy


def test_no_continuation_is_searched_with_before_it_is_scored(reading: Memory3LM) -> None:
    recall = reading.recall
    assert isinstance(recall, EchoRecall)
    context, chunks = "q" * (SIZE - 1), ["a" * SIZE, "b" * SIZE, "c" * 3]
    reading.loglikelihood(asked("loglikelihood", [(context, "".join(chunks))]), disable_tqdm=True)
    assert recall.asked == [(context, context), (chunks[0], context), (chunks[1], context)]
    recall.asked.clear()
    reading.loglikelihood(asked("loglikelihood", [(context, "a"), (context, "b"), (context, "aa")]), disable_tqdm=True)
    assert recall.asked == [(context, context)]


def test_rolling_probabilities_of_all_next_tokens_sum_to_one(reading: Memory3LM) -> None:
    """A chunk that read what it recalled itself would know its own tokens, and the sum would not be one."""
    start = reading.decoder.tokens("x" * (2 * SIZE + 3))
    rows = {"whole": start} | {str(n): [*start, n] for n in range(300)}
    reading.tok_encode = lambda name, *_: rows[name]  # type: ignore[method-assign]
    reading.batch_size = 50
    totals = torch.tensor(
        reading.loglikelihood_rolling(asked("loglikelihood_rolling", [(n,) for n in rows]), disable_tqdm=True)
    )
    assert float((totals[1:] - totals[0]).exp().sum()) == pytest.approx(1.0, abs=1e-3)
    recall = reading.recall
    assert isinstance(recall, EchoRecall)
    assert {query for query, _ in recall.asked} == {"x" * (SIZE - 1), "x" * SIZE}


def test_rolling_windows_go_on_with_the_chunks_and_memories_of_the_whole_text(reading: Memory3LM) -> None:
    recall = reading.recall
    assert isinstance(recall, EchoRecall)
    text = "a" * (SIZE - 1) + "".join(chr(98 + n) * SIZE for n in range(3))
    whole = [query for row, _ in reading._windows(text) for query in row.queries]
    reading.max_length = 2 * SIZE + 8
    rows = [row for row, _ in reading._windows(text)]
    assert len(rows) == 2
    assert list(dict.fromkeys(query for row in rows for query in row.queries)) == whole
    last = rows[-1]
    assert last.ids[0] == reading.prefix_token_id
    for token, chunk in list(zip(last.ids, last.grid, strict=True))[1:]:
        before = chr(ord(reading._words([token])) - 1)
        assert set(last.queries[last.reads[chunk]]) == {before}


def test_memory_changes_the_likelihood_and_no_memory_does_not_read_it(folder: Path) -> None:
    arguments = f"pretrained={folder / 'model'},device=cpu,bank={folder / 'bank'}"
    pair = asked("loglikelihood", [("What colour has the sky?", " blue")])
    with_memory, without = (Memory3LM.create_from_arg_string(arguments + more) for more in ("", ",no_memory=true"))
    assert without.recall is None
    assert without.get_model_info()["memory"] is None
    assert with_memory.get_model_info()["memory"]["max_overlap"] == EVALUATION_OVERLAP
    (a, _), (b, _) = (lm.loglikelihood(pair, disable_tqdm=True)[0] for lm in (with_memory, without))
    assert abs(a - b) > 1e-3
    plain = HFLM(str(folder / "model"), device="cpu", dtype="float32")
    text = "".join(plain.tokenizer.decode([plain.tokenizer.bos_token_id]))
    spoken = [(text + context, continuation) for context, continuation in (pair[0].args,)]
    assert b == pytest.approx(plain.loglikelihood(asked("loglikelihood", spoken))[0][0], abs=1e-4)


def test_a_reference_that_repeats_the_question_is_dropped_unless_told_otherwise(folder: Path) -> None:
    arguments = f"pretrained={folder / 'model'},device=cpu,bank={folder / 'bank'},retriever=lexical"
    question = "Dogs sleep."
    strict, loose = (Memory3LM.create_from_arg_string(arguments + more).recall for more in ("", ",overlap=off"))
    assert isinstance(strict, Recall) and isinstance(loose, Recall)
    texts = [[r.text for r in recall([question])[0].references] for recall in (strict, loose)]
    assert question in texts[1] and question not in texts[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("bnk=there", "'bnk', expected some of pretrained"),
        ("overlap=3", "overlap=3, expected a share"),
        ("batch_size=0", "batch_size=0, expected a whole number"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(arguments: str, sentence: str) -> None:
    with pytest.raises(HarnessError, match=sentence):
        Memory3LM.create_from_arg_string(arguments)


@pytest.mark.parametrize(
    ("arguments", "options", "device", "size"),
    [
        (",device=cuda:1,batch_size=7", {"device": None, "batch_size": None}, "cuda:1", 7),
        (",device=cpu,batch_size=7", {"device": "cuda:0", "batch_size": 1}, "cpu", 7),
        ("", {"device": "cuda:1", "batch_size": "3"}, "cuda:1", 3),
        ("", {"device": "cuda:0", "batch_size": 1}, None, 1),
    ],
)
def test_model_arguments_go_before_what_the_harness_fills_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, options: dict[str, Any], device: str | None, size: int
) -> None:
    """Without `--device` lm_eval says `None` from Python and `cuda:0` from its command line; its own `hf` takes the CPU then."""
    asked_for: list[str | None] = []

    def noted(model: str, *, device: str | None, dtype: str | None) -> Decoder:
        asked_for.append(device)
        return load(model, device="cpu", dtype=dtype)

    monkeypatch.setattr("memory3.evaluate.harness.load", noted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = Memory3LM.create_from_arg_string(f"pretrained={folder / 'model'}{arguments}", {"max_batch_size": None} | options)
    assert (asked_for, lm.batch_size) == ([device], size)


def test_settings_that_generation_does_not_know_are_refused(closed: Memory3LM) -> None:
    with pytest.raises(HarnessError, match="'presence'"):
        closed.generate_until(asked("generate_until", [("a", {"until": ["x"], "max_gen_toks": 4, "presence": 1})]))
    with pytest.raises(HarnessError, match="max_gen_toks=48"):
        closed.generate_until(asked("generate_until", [("a", {"until": ["x"], "max_gen_toks": 48})]))


def tasks(folder: Path) -> Path:
    """Three toy tasks over two rows."""
    rows = [{"question": "The sky is", "right": 0}, {"question": "Dogs", "right": 1}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "toy_choice": 'output_type: multiple_choice\ndoc_to_choice: ["blue today", "sleep"]\ndoc_to_target: right\n'
        "metric_list:\n  - metric: acc\n",
        "toy_writing": "output_type: generate_until\ndoc_to_target: question\n"
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n',
        "toy_rolling": "output_type: loglikelihood_rolling\ndoc_to_target: question\nmetric_list:\n  - metric: byte_perplexity\n",
    }
    for name, rest in kinds.items():
        text = "" if name == "toy_rolling" else "{{question}}"
        (folder / f"{name}.yaml").write_text(
            f'task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "{folder / "rows.jsonl"}"\n'
            f'test_split: test\ndoc_to_text: "{text}"\n{rest}'
        )
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tasks(tmp_path)


def test_tasks_of_every_kind_run_by_name_and_closed_book_scores_are_those_of_hf(folder: Path, offline: Path) -> None:
    manager = TaskManager(include_path=str(offline), include_defaults=False)
    found = {}
    for model, more in (("memory3", ""), ("hf", ",dtype=float32"), ("memory3", f",bank={folder / 'bank'}")):
        found[model + more] = simple_evaluate(
            model=model,
            model_args=f"pretrained={folder / 'model'}{more}",
            device="cpu",
            batch_size=2,
            tasks=["toy_choice", "toy_writing", "toy_rolling"],
            task_manager=manager,
            bootstrap_iters=0,
        )["results"]
    mine, theirs, read = found.values()
    assert mine["toy_choice"]["acc,none"] == theirs["toy_choice"]["acc,none"]
    assert mine["toy_writing"] == theirs["toy_writing"]
    perplexities = [r["toy_rolling"]["byte_perplexity,none"] for r in (mine, theirs, read)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)
    assert perplexities[2] != pytest.approx(perplexities[0], rel=1e-3)


@pytest.mark.parametrize("model", [("--model", NAME), ()])
def test_the_harness_command_line_knows_the_model_and_takes_it_where_none_is_named(
    folder: Path, offline: Path, monkeypatch: pytest.MonkeyPatch, model: tuple[str, ...]
) -> None:
    monkeypatch.setattr("lm_eval.utils.setup_logging", lambda *_, **__: None)
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda *_, **__: None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    before = sys.argv
    arguments = f"pretrained={folder / 'model'},bank={folder / 'bank'}"
    words = [*model, "--model_args", arguments, "--tasks=toy_choice", f"--include_path={offline}"]
    done = CliRunner().invoke(app, ["eval", "harness", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert sys.argv is before
    assert "toy_choice" in done.stdout


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "memory3.evaluate.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(Memory3Error, match=r"pip install 'memory3\[harness\]'"):
        importlib.import_module("memory3.evaluate.harness")
