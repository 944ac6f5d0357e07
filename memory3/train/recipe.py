"""The recipe of the model that ships: its shape, tokenizer, data and phases."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memory3.decoder import Decoder, attach
from memory3.spec import MemorySpec
from memory3.train.initialise import induction_prior, widen_copying
from memory3.train.loop import Schedule, Settings, TrainError, run
from memory3.train.reading import Passage, Phase, ReadingObjective
from memory3.train.tokenizer import trained_tokenizer

LAYERS = (0, 1, 2, 3)
"""Memory layers, fixed from the first step: the reading heads settle where memory is (design section 4)."""
TOKENS_PER_HEAD = 48
"""Chosen by the curve of exact match over slots in docs/results.md."""
REFERENCE_LENGTH = 64
"""Half of the paper's: a model of this size does not find an answer among more tokens."""
REFERENCES_PER_CHUNK = 1
"""A model of this size reads one reference; it does not tell five apart (docs/results.md)."""
VOCABULARY = 8192
STEPS = 1980
WIDENED_AT = 1000
"""Step at which four more heads may copy (`widen_copying`)."""
QUESTIONS_HEAVY = (("question", 0.6), ("cloze", 0.25), ("completion", 0.15))
PHASES = (
    Phase(
        until=350,
        references=((1, 0.7), (2, 0.3)),
        slots=((None, 1.0),),
        tasks=(("question", 0.2), ("cloze", 0.3), ("completion", 0.5)),
        reference_loss=0.5,
        question_passages=0.4,
    ),
    Phase(
        until=840,
        references=((1, 0.3), (3, 0.4), (5, 0.3)),
        slots=((None, 0.6), (64, 0.25), (32, 0.15)),
        tasks=QUESTIONS_HEAVY,
        reference_loss=0.3,
        question_passages=0.7,
        text_share=0.08,
        contexts=3,
    ),
    Phase(
        until=WIDENED_AT,
        references=((1, 0.6), (2, 0.4)),
        slots=((None, 0.85), (32, 0.15)),
        tasks=(("question", 0.5), ("cloze", 0.45), ("completion", 0.05)),
        reference_loss=0.1,
        question_passages=0.85,
        text_share=0.04,
        batch=24,
        contexts=4,
        longest=(24, 56),
    ),
    Phase(
        until=1200,
        references=((1, 1.0),),
        slots=((None, 1.0),),
        tasks=(("question", 0.55), ("cloze", 0.4), ("completion", 0.05)),
        reference_loss=0.05,
        question_passages=0.9,
        batch=28,
        contexts=3,
        longest=(10, 24),
    ),
    Phase(
        until=1400,
        references=((1, 0.6), (2, 0.4)),
        slots=((None, 0.85), (32, 0.15)),
        tasks=(("question", 0.6), ("cloze", 0.35), ("completion", 0.05)),
        reference_loss=0.0,
        question_passages=0.9,
        text_share=0.04,
        batch=24,
        contexts=3,
        longest=(16, 64),
    ),
    Phase(
        until=STEPS,
        references=((1, 0.75), (3, 0.1), (5, 0.15)),
        slots=((None, 0.65), (32, 0.35)),
        tasks=(("question", 0.65), ("cloze", 0.3), ("completion", 0.05)),
        reference_loss=0.0,
        question_passages=0.9,
        text_share=0.03,
        batch=24,
        contexts=3,
        longest=(16, 64),
    ),
)


def passages(data: Path, plain: int) -> tuple[list[Passage], list[Passage]]:
    """Training passages of `data`: those of `qa.parquet` with their train questions (boolq apart), and `plain` others."""
    import pyarrow.parquet as pq

    for name in ("qa.parquet", "passages.parquet"):
        if not (data / name).is_file():
            raise TrainError(f"found no {name} in {data}, expected the training data: give its folder with --data")
    questions: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in pq.read_table(data / "qa.parquet").to_pylist():
        answer = next((a.strip() for a in row["answers"] if a.strip() and a.strip() in row["passage"]), None)
        if row["split"] == "train" and row["dataset"] != "boolq" and answer and len(answer) < 60:
            questions.setdefault((row["title"] or "", row["passage"]), []).append((row["question"].strip(), answer))
    asked = [Passage(title, text, tuple(pairs)) for (title, text), pairs in questions.items()]
    table = pq.read_table(data / "passages.parquet", columns=["title", "text"])
    stride = max(1, table.num_rows // plain)
    rest = [Passage(r["title"] or "", r["text"]) for r in table.take(list(range(0, table.num_rows, stride))).to_pylist()]
    return asked, [p for p in rest if len(p.text.split()) >= 20]


def fresh_model(tokenizer: Any) -> Any:
    """A Llama-architecture decoder of 6.2 M parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"  # on CPU its backward is faster than the masked sdpa kernel at this length
    model = LlamaForCausalLM(config)
    induction_prior(model)
    return model


def prepared(data: Path, folder: Path, seed: int = 0, plain: int = 60_000) -> tuple[Decoder, ReadingObjective]:
    """The untrained decoder and its objective; the tokenizer is trained once and kept in `folder`."""
    asked, rest = passages(data, plain)
    place = folder / "tokenizer"
    if not (place / "tokenizer.json").exists():
        trained_tokenizer(_texts(asked, rest), VOCABULARY).save_pretrained(place)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    torch.manual_seed(seed)
    model = fresh_model(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is about to be trained for memory
        decoder = attach(model, tokenizer, MemorySpec(layers=LAYERS, tokens_per_head=None, reference_length=REFERENCE_LENGTH))
    return decoder, ReadingObjective(decoder, asked, rest, PHASES, seed)


def _texts(*groups: list[Passage]) -> Iterator[str]:
    for passage in (p for group in groups for p in group):
        yield f"# {passage.title}\n\n{passage.text}"
        yield from (f"Question: {q}\nAnswer: {a}" for q, a in passage.questions)


def train_default(
    data: Path, folder: Path, minutes: float, report: Callable[[dict[str, float]], None], seed: int = 0
) -> tuple[Decoder, int]:
    """One stage of at most `minutes`; called again it goes on from the checkpoint. Returns the decoder and steps done."""
    decoder, objective = prepared(data, folder, seed)
    settings = Settings(folder, Schedule(1.5e-3, STEPS, warmup=50, decay=300), minutes=minutes)

    def logged(line: dict[str, float]) -> None:
        with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        report(line)

    done = run(decoder, objective, replace(settings, stop_at=WIDENED_AT), logged)
    if done >= WIDENED_AT:
        _widen(folder / "checkpoint", decoder)
        done = run(decoder, objective, settings, logged)
    shipped = replace(decoder.spec, tokens_per_head=TOKENS_PER_HEAD, references_per_chunk=REFERENCES_PER_CHUNK)
    return decoder.using(shipped), done


def _widen(checkpoint: Path, decoder: Decoder) -> None:
    """Apply `widen_copying` to a checkpoint that stands at `WIDENED_AT`, once; a later one has it behind it."""
    from safetensors.torch import load_file, save_file

    state = json.loads((checkpoint / "state.json").read_text("utf-8"))
    if state["step"] != WIDENED_AT or state.get("widened"):
        return
    weights = load_file(checkpoint / "model.safetensors")
    widen_copying(weights, decoder.model.config.num_attention_heads, decoder.head_dim)
    save_file(weights, checkpoint / "model.safetensors")
    (checkpoint / "state.json").write_text(json.dumps({**state, "widened": True}), "utf-8")
