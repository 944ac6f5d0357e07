"""A small tokenizer and a decoder that needs no model: memories are a function of the text."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memory3.spec import Memory, MemorySpec

CORPUS = [
    "The Eiffel Tower was completed in 1889. It stands in Paris, and the river is near.",
    "A bank is a folder. Memories are sparse key-values of a reference; they lie in flat shards of records.",
    "The cat sat on the mat while the rain went on, and nobody knew what the morning would bring.",
]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 pieces: any text has tokens, and decodes to itself."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def count(text: str) -> int:
    """Tokens of a text, special ones not counted."""
    return len(tokenizer()(text, add_special_tokens=False)["input_ids"])


class FakeDecoder:
    """Writes random key-values seeded by the text; `encoded` notes every text it was given."""

    def __init__(self, spec: MemorySpec | None = None, dtype: torch.dtype = torch.bfloat16, **identity: Any) -> None:
        spec = spec or MemorySpec(layers=(0, 2), heads=((0, 1), (1,)), tokens_per_head=4, reference_length=32)
        self.spec, self.dtype, self.head_dim, self.tokenizer = spec, dtype, 8, tokenizer()
        self.encoded: list[str] = []
        self.batches: list[int] = []
        self._identity = {
            "model": "fake",
            "weights": "ab" * 32,
            "tokenizer": "cd" * 32,
            "rotation": {"0": [1.0, 0.1]},
        } | identity

    def identity(self) -> dict[str, Any]:
        shape = {"spec": self.spec.to_json(), "head_dim": self.head_dim, "dtype": str(self.dtype).removeprefix("torch.")}
        return self._identity | shape

    def encode(self, texts: Sequence[str]) -> list[Memory]:
        self.encoded += texts
        self.batches.append(len(texts))
        return [self._memory(text) for text in texts]

    window = 96
    adapters: Sequence[str] = ()

    def encode_in_context(self, texts: Sequence[str]) -> list[Memory]:
        assert sum(map(count, texts)) <= self.window
        self.encoded += texts
        self.batches.append(len(texts))
        return [self._memory(text, "".join(texts[:n])) for n, text in enumerate(texts)]

    def _memory(self, text: str, before: str = "") -> Memory:
        length = min(count(text), self.spec.reference_length)
        kept = min(self.spec.slots, length)
        seed = int.from_bytes(hashlib.blake2b((before + text).encode(), digest_size=7).digest(), "big")
        generator = torch.Generator().manual_seed(seed)
        keys, values = torch.randn(2, self.spec.pairs, kept, self.head_dim, generator=generator).to(self.dtype)
        rows = [torch.randperm(length, generator=generator)[:kept].sort().values for _ in range(self.spec.pairs)]
        return Memory(keys, values, torch.stack(rows).to(torch.uint8))


def same(a: Memory, b: Memory) -> bool:
    """Bit for bit, in shape and dtype too."""
    pairs = ((a.keys, b.keys), (a.values, b.values), (a.positions, b.positions))
    return all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(_bits(x), _bits(y)) for x, y in pairs)


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


class FakeEmbedder:
    """Vectors of 64 numbers: the words of a text, hashed. `seed` makes another embedder of it."""

    def __init__(self, name: str = "fake", seed: int = 0) -> None:
        self.name, self.seed = name, seed
        self.embedded: list[str] = []

    def embed(self, texts: Sequence[str], query: bool = False) -> np.ndarray:
        self.embedded += texts
        rows = np.full((len(texts), 64), 1e-3, np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[zlib.crc32(f"{self.seed}{word}".encode()) % 64] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
