"""The recipe of the model that ships: its shape, tokenizer, data and phases."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memory3.decoder import Decoder, attach
from memory3.spec import MemorySpec
from memory3.train.initialise import induction_prior, word_vectors
from memory3.train.loop import Schedule, Settings, TrainError, run
from memory3.train.passages import Passage
from memory3.train.reading import Phase, ReadingObjective
from memory3.train.tokenizer import trained_tokenizer

LAYERS = (1, 2, 3, 4)
"""Memory layers, fixed from the first step: the reading heads settle where memory is (design section 4)."""
TOKENS_PER_HEAD = 64
"""Chosen by the curve of exact match over slots in docs/results.md."""
VOCABULARY = 8192
STEPS = 3800
PHASES = (
    Phase(
        until=600,
        references=((1, 0.5), (2, 0.3), (5, 0.2)),
        slots=((None, 1.0),),
        tasks=(("asked", 0.1), ("question", 0.5), ("cloze", 0.2), ("completion", 0.2)),
        asked_share=0.4,
        reference_loss=0.3,
        longest=(32, 96),
    ),
    Phase(
        until=1400,
        references=((1, 0.1), (3, 0.4), (5, 0.5)),
        slots=((None, 1.0),),
        tasks=(("asked", 0.25), ("question", 0.45), ("cloze", 0.22), ("completion", 0.08)),
        asked_share=0.5,
        reference_loss=0.15,
        text_share=0.05,
        neighbour=0.1,
    ),
    Phase(
        until=2000,
        references=((1, 0.1), (3, 0.2), (5, 0.7)),
        slots=((None, 0.6), (64, 0.4)),
        tasks=(("asked", 0.3), ("question", 0.42), ("cloze", 0.22), ("completion", 0.06)),
        asked_share=0.6,
        text_share=0.05,
        neighbour=0.1,
        longest=(56, 128),
    ),
    Phase(  # rules are learned by now; questions that people asked are the harder half
        until=STEPS,
        references=((1, 0.2), (3, 0.2), (5, 0.6)),
        slots=((None, 0.3), (64, 0.4), (48, 0.3)),
        tasks=(("asked", 0.62), ("question", 0.2), ("cloze", 0.15), ("completion", 0.03)),
        asked_share=0.85,
        text_share=0.04,
        closed_share=0.02,
        neighbour=0.05,
        batch=32,
        contexts=3,
        longest=(48, 128),
    ),
)


def passages(data: Path, plain: int | None = None) -> tuple[list[Passage], list[Passage]]:
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
    stride = max(1, table.num_rows // plain) if plain else 1
    rest = [Passage(r["title"] or "", r["text"]) for r in table.take(list(range(0, table.num_rows, stride))).to_pylist()]
    return asked, [p for p in rest if len(p.text.split()) >= 20]


def fresh_model(tokenizer: Any, vectors: torch.Tensor | None = None) -> Any:
    """A Llama-architecture decoder of 6.2 M parameters that can copy and knows which words are alike."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
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
    induction_prior(model, LAYERS[-1], vectors)
    return model


WIDTH = 256


def prepared(data: Path, folder: Path, seed: int = 0, plain: int | None = None) -> tuple[Decoder, ReadingObjective]:
    """The untrained decoder and its objective; tokenizer and word vectors are made once and kept in `folder`."""
    asked, rest = passages(data, plain)
    place = folder / "tokenizer"
    if not (place / "tokenizer.json").exists():
        trained_tokenizer(_texts(asked, rest[::3]), VOCABULARY).save_pretrained(place)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    torch.manual_seed(seed)
    model = fresh_model(tokenizer, _vectors(folder / "vectors.safetensors", tokenizer, _texts(asked, rest)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is about to be trained for memory
        decoder = attach(model, tokenizer, MemorySpec(layers=LAYERS, tokens_per_head=None))
    return decoder, ReadingObjective(decoder, asked, rest, PHASES, seed)


def _vectors(file: Path, tokenizer: Any, texts: Iterator[str]) -> torch.Tensor:
    from safetensors.torch import load_file, save_file

    if not file.exists():
        rows = (np.array(e.ids) for e in tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False))
        save_file({"vectors": word_vectors(rows, len(tokenizer), WIDTH).contiguous()}, file)
    return load_file(file)["vectors"]


def _texts(*groups: list[Passage]) -> Iterator[str]:
    for passage in (p for group in groups for p in group):
        yield f"# {passage.title}\n\n{passage.text}"
        yield from (f"Question: {q}\nAnswer: {a}" for q, a in passage.questions)


def train_default(
    data: Path, folder: Path, minutes: float, report: Callable[[dict[str, float]], None], seed: int = 0
) -> tuple[Decoder, int]:
    """One stage of at most `minutes`; called again it goes on from the checkpoint. Returns the decoder and steps done."""
    decoder, objective = prepared(data, folder, seed)
    settings = Settings(folder, Schedule(1.5e-3, STEPS, warmup=100, decay=STEPS * 3 // 10), minutes=minutes)

    def logged(line: dict[str, float]) -> None:
        with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        report(line)

    done = run(decoder, objective, settings, logged)
    return decoder.using(replace(decoder.spec, tokens_per_head=TOKENS_PER_HEAD)), done
