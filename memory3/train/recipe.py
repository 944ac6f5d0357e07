"""The recipe of a small reader on real questions: its shape, tokenizer, data and phases.

An earlier state of it made the model that ships (its card says which).
"""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memory3.decoder import Decoder, attach
from memory3.embedding import OFFLINE, SentenceEmbedder, offline_available
from memory3.identity import tokenizer_fingerprint
from memory3.spec import MemorySpec
from memory3.train.initialise import induction_prior, word_vectors
from memory3.train.kept import kept_tokenizer, one_at_a_time
from memory3.train.meanings import joined, meanings
from memory3.train.passages import Passage
from memory3.train.reading import Phase, ReadingObjective
from memory3.train.settings import Schedule, Settings, TrainError

STEPS = 6000
PHASES = (
    Phase(
        until=600,
        references=((1, 0.5), (2, 0.3), (5, 0.2)),
        slots=((None, 1.0),),
        tasks=(("asked", 0.1), ("question", 0.5), ("cloze", 0.2), ("completion", 0.2)),
        asked_share=0.4,
        reference_loss=0.3,
        sentence_loss=0.2,
        longest=(32, 96),
    ),
    Phase(
        until=1400,
        references=((1, 0.1), (3, 0.4), (5, 0.5)),
        slots=((None, 1.0),),
        tasks=(("asked", 0.25), ("question", 0.45), ("cloze", 0.22), ("completion", 0.08)),
        asked_share=0.5,
        reference_loss=0.15,
        sentence_loss=0.2,
        text_share=0.05,
        neighbour=0.1,
    ),
    Phase(
        until=2200,
        references=((1, 0.1), (3, 0.2), (5, 0.7)),
        slots=((None, 0.6), (64, 0.4)),
        tasks=(("asked", 0.45), ("question", 0.35), ("cloze", 0.15), ("completion", 0.05)),
        asked_share=0.7,
        sentence_loss=0.2,
        text_share=0.05,
        neighbour=0.1,
        longest=(56, 128),
    ),
    Phase(  # rules are learned by now; questions that people asked are the harder half
        until=STEPS,
        references=((1, 0.1), (3, 0.2), (5, 0.7)),
        slots=((None, 0.25), (64, 0.6), (48, 0.15)),
        tasks=(("asked", 0.62), ("question", 0.2), ("cloze", 0.15), ("completion", 0.03)),
        asked_share=0.85,
        sentence_loss=0.2,
        text_share=0.04,
        closed_share=0.02,
        neighbour=0.05,
        batch=28,
        contexts=4,
        longest=(72, 128),
    ),
)
EMBEDDING_RATE = 0.3
"""The vectors know words that no question has; learned at full rate, those that do run away from the rest."""
WIDTH = 256


@dataclass(frozen=True)
class Reader:
    """What can be varied about a reader's run; the rest follows.

    Args:
        steps: of the run; the phases stretch with them.
        layers: memory layers, fixed from the first step: the reading heads settle where memory is (design section 4).
        tokens_per_head: of the finished model, chosen by the curve of exact match over slots in docs/results.md.
        vocabulary: tokens of the tokenizer that is made from the data.
        texts_for_meaning: texts that the sentence-embedding model reads for the first word vectors; none where it is 0 or
            that model is not installed, and vectors come from counts of neighbours alone.
        rate: peak learning rate.
        optimizer: `adamw` or `muon`.
    """

    steps: int = STEPS
    layers: tuple[int, ...] = (1, 2, 3, 4)
    tokens_per_head: int | None = 64
    vocabulary: int = 16384
    texts_for_meaning: int = 12_000
    rate: float = 1.5e-3
    optimizer: str = "adamw"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those of the full run, stretched to the steps of this run; they thin out to its tokens per head."""
        return tuple(
            replace(p, until=max(n, round(p.until * self.steps / STEPS)), slots=tuple((self._kept(k), w) for k, w in p.slots))
            for n, p in enumerate(PHASES, 1)
        )

    def _kept(self, kept: int | None) -> int | None:
        """64 tokens per head in the phases stand for the finished model's number, 48 for three quarters of it."""
        if kept is None or self.tokens_per_head is None:
            return None
        return max(1, kept * self.tokens_per_head // 64)

    def run(
        self, data: Path, folder: Path, minutes: float | None = None, seed: int = 0, accumulate: int = 1, processes: int = 1
    ) -> tuple[Decoder, ReadingObjective, Settings, MemorySpec]:
        """Everything of the run: decoder, objective, settings, and the spec that the finished model is saved with."""
        decoder, objective = self.prepared(data, folder, seed, per_step=accumulate * processes)
        schedule = Schedule(self.rate, self.steps, warmup=min(100, self.steps // 10), decay=self.steps * 3 // 10)
        settings = Settings(
            folder,
            schedule,
            minutes=minutes,
            embedding_rate=EMBEDDING_RATE,
            optimizer=self.optimizer,
            seed=seed,
            accumulate=accumulate,
        )
        return decoder, objective, settings, replace(decoder.spec, tokens_per_head=self.tokens_per_head)

    def prepared(
        self, data: Path, folder: Path, seed: int = 0, plain: int | None = None, per_step: int = 1
    ) -> tuple[Decoder, ReadingObjective]:
        """The untrained decoder and its objective; tokenizer and word vectors are made once and kept in `folder`."""
        asked, rest = passages(data, plain)
        made_of = _digest(_texts(asked, rest))
        tokenizer = kept_tokenizer(folder / "tokenizer", made_of, lambda: _texts(asked, rest[::3]), self.vocabulary)
        vectors = self._vectors(folder, tokenizer, _texts(asked, rest), made_of)
        torch.manual_seed(seed)
        model = fresh_model(tokenizer, self.layers[-1], vectors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it is about to be trained for memory
            decoder = attach(model, tokenizer, MemorySpec(layers=self.layers, tokens_per_head=None))
        return decoder, ReadingObjective(decoder, asked, rest, self.phases, seed, per_step)

    def _vectors(self, folder: Path, tokenizer: Any, texts: Iterable[str], made_of: str) -> torch.Tensor:
        """The first word vectors, made once by one process, of this data and with these settings."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        file = folder / "vectors.safetensors"
        facts = {"made_of": f"{made_of} {tokenizer_fingerprint(tokenizer)} {self.texts_for_meaning}"}
        with one_at_a_time(folder):
            if not file.exists():
                save_file({"vectors": self._made_vectors(tokenizer, list(texts))}, file.with_suffix(".new"), metadata=facts)
                os.replace(file.with_suffix(".new"), file)
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or facts) != facts:
                raise TrainError(f"found word vectors made of other data in {file}, expected those of this: use another --out")
            vectors: torch.Tensor = opened.get_tensor("vectors")
            return vectors

    def _made_vectors(self, tokenizer: Any, texts: list[str]) -> torch.Tensor:
        rows = (np.array(e.ids) for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
        vectors = word_vectors(rows, len(tokenizer), WIDTH)
        if self.texts_for_meaning and offline_available():
            some = random.Random(0).sample(texts, min(len(texts), self.texts_for_meaning))
            vectors = joined(vectors, *meanings([text[:520] for text in some], tokenizer, SentenceEmbedder(OFFLINE)))
        return vectors.contiguous()


SMALL = Reader(steps=500, vocabulary=2048, texts_for_meaning=0, optimizer="muon")
"""The recipe in small: for data of one's own, and for ablations."""


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
    plain_ones = [p for p in rest if len(p.text.split()) >= 20]
    if not asked or not plain_ones:
        raise TrainError(
            f"found {len(asked)} passages with train questions and {len(plain_ones)} others of 20 words or more in {data}, expected "
            "some of each: an answer has to stand word by word in its passage"
        )
    return asked, plain_ones


def fresh_model(tokenizer: Any, pointing_layer: int, vectors: torch.Tensor | None = None) -> Any:
    """A Llama-architecture decoder of 8.3 M parameters at 16,384 tokens that can copy and knows which words are alike."""
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
    induction_prior(model, pointing_layer, vectors)
    return model


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()


def _texts(*groups: list[Passage]) -> Iterator[str]:
    for passage in (p for group in groups for p in group):
        yield f"# {passage.title}\n\n{passage.text}"
        yield from (f"Question: {q}\nAnswer: {a}" for q, a in passage.questions)
