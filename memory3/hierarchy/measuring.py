"""The costs of a reference's forms in seconds and bytes of this machine, in place of FLOPs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from memory3.bank import Bank
from memory3.bench.scenes import random_text
from memory3.bench.turns import in_turns
from memory3.cost import TEXT_BYTES_PER_TOKEN, Timed
from memory3.decoder import Decoder
from memory3.record import Codec
from memory3.spec import Memory, Reference, SpecError

Tell = Callable[[int, int], None]


def measured_formats(
    decoder: Decoder,
    codec: Codec | None = None,
    *,
    batch: int = 16,
    repeats: int = 5,
    passes: int = 1,
    seed: int = 0,
    tell: Tell = lambda done, total: None,
) -> tuple[Timed, ...]:
    """Text, memory and parameters, in seconds for one reference of full length; medians of several turns.

    * memory, write: encode a batch of references, up to the last memory layer;
    * memory, read: load the record from a bank and let a chunk attend to it: the forward over a chunk with one memory, less the
      same without it; files were written just before, so they come from the page cache;
    * text, read: the forward over reference and chunk, less that over the chunk alone;
    * parameters, write: forward, backward and AdamW over a batch of references as sequences of their own.

    Every figure is of a batch, divided by its references. A difference below zero, which noise can make, counts as none.

    Args:
        decoder: its weights stay as they are.
        codec: of the bank; by default raw.
        batch: references handled together.
        repeats: turns of each way, behind one that does not count.
        passes: times that training sees a reference.
        seed: of the random text.
        tell: told of the turns done.

    Raises:
        SpecError: a size below 1.
    """
    for name, size in {"batch": batch, "repeats": repeats, "passes": passes}.items():
        if size < 1:
            raise SpecError(f"found {name}={size}, expected at least 1")
    rng, spec = np.random.default_rng(seed), decoder.spec
    texts = [decoder.tokens(random_text(decoder, rng))[: spec.reference_length] for _ in range(batch)]
    chunk = decoder.tokens(random_text(decoder, rng))[: spec.chunk_length]
    with tempfile.TemporaryDirectory() as folder, Bank(Path(folder) / "bank", decoder, create=True, codec=codec) as bank:
        bank.add([Reference(f"{n}", f"random:{n}") for n in range(batch)], decoder.encode_tokens(texts))
        ids = bank.ids()
        ways: dict[str, Callable[[int], object]] = {
            "encode": lambda turn: decoder.encode_tokens(texts),
            "load and attend": lambda turn: _attend(decoder, chunk, batch, bank.read(ids, decoder.device)),
            "attend to none": lambda turn: _attend(decoder, chunk, batch),
            "chunk": lambda turn: _forward(decoder, [chunk] * batch),
            "text and chunk": lambda turn: _forward(decoder, [row + chunk for row in texts]),
            "train": _training(decoder, texts),
        }
        turns = (repeats + 1) * len(ways)
        seconds = {name: median(s) for name, s in in_turns(ways, repeats, decoder.device, lambda n: tell(n, turns)).items()}
        record_bytes = bank.record_bytes
    text_bytes = TEXT_BYTES_PER_TOKEN * spec.reference_length
    text = max(0.0, seconds["text and chunk"] - seconds["chunk"]) / batch
    memory = max(0.0, seconds["load and attend"] - seconds["attend to none"]) / batch
    return (
        Timed("text", 0.0, text, text_bytes),
        Timed("memory", seconds["encode"] / batch, memory, text_bytes + record_bytes),
        Timed("parameters", passes * seconds["train"] / batch, 0.0),
    )


@torch.no_grad()
def _forward(decoder: Decoder, rows: Sequence[Sequence[int]]) -> object:
    """The plain model over rows of one length, and the word that comes next."""
    ids = torch.tensor(rows, device=decoder.device)
    return decoder.model(input_ids=ids, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def _attend(decoder: Decoder, chunk: Sequence[int], batch: int, memories: Sequence[Memory] = ()) -> object:
    """The same chunk `batch` times, with a memory each where there are any."""
    layout = decoder.layout([list(chunk)] * batch, grid=[[0] * len(chunk)] * batch)
    reading = decoder.reading(layout.chunks, [[[memory]] for memory in memories]) if memories else None
    return decoder.forward(layout, reading, logits_to_keep=1)


def _training(decoder: Decoder, rows: Sequence[Sequence[int]]) -> Callable[[int], object]:
    """One step of AdamW at a rate of zero, so that the weights stay as they are."""
    learned = [p for p in decoder.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.0, weight_decay=0.0)

    def step(turn: int) -> object:
        ids = torch.tensor(rows, device=decoder.device)
        decoder.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return None

    return step
