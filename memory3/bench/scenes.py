"""What is measured on: random decoders of the paper's shapes, random banks, and a recall that never repeats itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memory3.bank import Bank
from memory3.decoder import Decoder, attach
from memory3.embedding import Embedder
from memory3.recall import Recalled
from memory3.record import Codec
from memory3.retrieval import Hit
from memory3.spec import Memory, MemorySpec, Reference, SpecError
from memory3.train.shapes import paper


def random_decoder(preset: str, layers: int | None, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Decoder:
    """A decoder of random weights, which cost the same time as trained ones, with the paper's memory spec: 8 tokens per head, the first
    half of the layers.

    Args:
        preset: row of `memory3.cost.PRESETS`.
        layers: keep so many, by default all. The embeddings stay whole.
        dtype: of the weights.
        device: where they are made.
        seed: of the weights.

    Raises:
        SpecError: an unknown preset, or more layers than it has.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memory3.loading import default_model

    config = paper(preset)
    if layers is not None and not 1 <= layers <= config.num_hidden_layers:
        raise SpecError(f"found {layers} layers, expected 1 to {config.num_hidden_layers}: {preset} has no more")
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.name_or_path = preset
    torch.manual_seed(seed)
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random weights were never trained for memory
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(str(default_model()), trust_remote_code=False)
        return attach(model, tokenizer, MemorySpec())


def words(decoder: Decoder, rng: np.random.Generator, count: int) -> list[int]:
    """Random token ids, none of them special."""
    plain = np.delete(np.arange(len(decoder.tokenizer)), decoder.tokenizer.all_special_ids)
    return [int(n) for n in rng.choice(plain, count)]


def random_text(decoder: Decoder, rng: np.random.Generator) -> str:
    """A random text of at least as many tokens as a reference has, in nearly all cases."""
    return str(decoder.tokenizer.decode(words(decoder, rng, 2 * decoder.spec.reference_length)))


def random_bank(
    decoder: Decoder,
    folder: Path,
    count: int,
    seed: int,
    codec: Codec | None = None,
    batch: int = 64,
    embedder: Embedder | None = None,
    told: Callable[[int], None] = lambda done: None,
) -> Bank:
    """A bank of random texts of about full length with random key-values: reading them takes as long as reading true ones.

    What the folder already holds of it stays, so one that was interrupted goes on, and one that is complete is only opened.

    Args:
        folder: of the bank.
        count: references it shall have.
        seed: of texts and key-values.
        codec: of the bank, by default raw in the dtype of the model.
        batch: references of a commit; another one makes another bank.
        embedder: gives the bank vectors.
        told: of the references done.

    Raises:
        BankMismatch: the folder holds a bank of another model, spec or codec.
    """
    bank, spec = Bank(folder, decoder, create=True, codec=codec, embedder=embedder), decoder.spec
    positions = torch.arange(spec.slots, dtype=torch.uint8).expand(spec.pairs, -1).contiguous()
    shape, done = (2, spec.pairs, spec.slots, decoder.head_dim), len(bank)
    for start in range(done // batch * batch, count, batch) if done < count else ():
        rng = np.random.default_rng([seed, start])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        numbers = range(start, min(count, start + batch))
        texts = [decoder.tokenizer.decode(words(decoder, rng, spec.reference_length)) for _ in numbers]
        some = [Reference(f"{n} {text}", f"random:{n}") for n, text in zip(numbers, texts, strict=True)]
        made = [torch.randn(shape, generator=generator).to(decoder.dtype).unbind() for _ in some]
        bank.add(some, [Memory(keys.contiguous(), values.contiguous(), positions) for keys, values in made])
        told(start + len(some))
    return bank


class UniqueRecall:
    """Every recall brings references that none before it brought, from the bank's files; no cache of ours holds any.

    There is no search: the systems that memory is compared with need the same one.
    """

    min_score: float | None = None

    def __init__(self, bank: Bank, count: int) -> None:
        self.bank, self.count = bank, count
        self.restart()

    def restart(self) -> None:
        """Begin again with the first reference."""
        self.ids = cycle(self.bank.ids())

    def check(self, decoder: Any) -> None:
        """The decoder made the bank."""

    def __call__(self, queries: Sequence[str], texts: Sequence[str] | None = None) -> list[Recalled]:
        """One recall per query, all from one read of the bank."""
        wanted = [list(islice(self.ids, self.count)) for _ in queries]
        ids = [id for some in wanted for id in some]
        found = self.bank.references(ids)
        memories = dict(zip(ids, self.bank.read(ids), strict=True))
        size = self.bank.record_bytes
        return [
            Recalled(
                query,
                tuple(Hit(id, 0.0) for id in some),
                tuple(memories[id] for id in some),
                tuple(found[id][0] for id in some),
                size * len(some),
            )
            for query, some in zip(queries, wanted, strict=True)
        ]
