"""The arms of an evaluation: the same questions and references, given in every way in which knowledge can be given.

Every arm writes the memories of the very texts that the others read, so nothing differs but the form.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from memory3.attention import registered_name
from memory3.codec import CODECS
from memory3.decoder import Decoder, attach
from memory3.evaluate.given import Brought, Tell
from memory3.evaluate.outcomes import Outcome
from memory3.evaluate.reading import encoded
from memory3.identity import tokenizer_fingerprint
from memory3.loading import load
from memory3.reader import BankReader
from memory3.record import Codec, RecordShape
from memory3.spec import Memory, Reference, SourceError

CLOSED, TEXT, SPARSE, WRONG = "closed book", "text in the prompt", "sparse memory", "sparse memory, wrong references"


@dataclass(frozen=True)
class Arm:
    """One way to give references to a model.

    Args:
        name: of the row.
        decoder: the model, under the spec of this arm.
        brings: `nothing`, `right` or `wrong` references.
        as_text: in the prompt, not as memories.
        codec: memories go through its bytes before they are read.
    """

    name: str
    decoder: Decoder
    brings: str = "right"
    as_text: bool = False
    codec: Codec | None = None

    @property
    def remembers(self) -> bool:
        """Whether the context stands behind memories; else the model is run as it is."""
        return self.brings != "nothing" and not self.as_text

    def texts(self, brought: Brought) -> tuple[str, ...]:
        """What this arm gives to a question."""
        return {"nothing": (), "right": brought.right, "wrong": brought.wrong}[self.brings]

    def encode(self, texts: Sequence[str]) -> list[Memory]:
        """One memory per text, as it comes back from the codec."""
        memories = self.decoder.encode(texts)
        if self.codec is None:
            return memories
        return [through(self.codec, self.decoder, text, memory) for text, memory in zip(texts, memories, strict=True)]

    def memories(self, texts: Iterable[str]) -> dict[str, Memory]:
        """Memories of distinct texts."""
        return encoded(self.encode, texts)


def through(codec: Codec, decoder: Decoder, text: str, memory: Memory) -> Memory:
    """A memory as a bank with this codec would give it back: encoded to a record, decoded again, in the model's dtype."""
    shape, id = RecordShape.of(decoder.spec, decoder.head_dim), Reference(text).id
    back = codec.decode(bytearray(codec.encode(memory, shape, id)), shape, id, "the record")
    keys, values = (t.to(decoder.dtype) for t in (back.keys, back.values))
    return Memory(keys, values, back.positions)


def arms(decoder: Decoder, *, untrained: Decoder | None = None, codecs: Sequence[Codec] = ()) -> list[Arm]:
    """All arms of a trained decoder.

    Args:
        decoder: under its own sparse spec.
        untrained: what `untrained_of` gives; without it that row is left out.
        codecs: each is a row; see `quantising_codecs`.
    """
    layers = tuple(range(decoder.geometry.num_layers))
    everywhere = decoder.using(replace(decoder.spec, layers=layers, heads=None, tokens_per_head=None))
    found = [
        Arm(CLOSED, decoder, "nothing"),
        Arm(TEXT, decoder, as_text=True),
        Arm("dense memory, all layers", everywhere),
        Arm(SPARSE, decoder),
        *(Arm(f"{SPARSE}, codec {codec.name}", decoder, codec=codec) for codec in codecs),
        Arm(WRONG, decoder, "wrong"),
    ]
    if untrained is not None:
        found.append(Arm(f"{SPARSE}, untrained ({untrained.name})", untrained))
    return found


def quantising_codecs(decoder: Decoder, banks: Sequence[BankReader] = ()) -> list[Codec]:
    """Every registered codec but `raw` that takes the model's dtype: as the banks hold it, else as it is made without arguments.

    A codec that has to be trained and that no bank holds is left out.
    """
    held = {bank.manifest.codec.name: bank.manifest.codec for bank in banks}
    found = []
    for name, kind in CODECS.items():
        try:
            codec = held.get(name) or kind()
        except TypeError:  # it wants something that it was trained on
            continue
        if name != "raw" and codec.accepts(decoder.dtype):
            found.append(codec)
    return found


def untrained_of(decoder: Decoder, path: str | None = None, seed: int = 0) -> Decoder:
    """The control that memory was never taught: a model before training, under the decoder's spec, in its dtype and on its device.

    Args:
        decoder: the trained one.
        path: folder or hub name of the model that training began with; without it random weights of the same shape.
        seed: of the random weights.

    Raises:
        SourceError: the other model has another tokenizer, so that references have other tokens.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "found no memory_spec|the given memory spec overrules", UserWarning)
        found = _loaded(decoder, path) if path else attach(*_fresh(decoder, seed), decoder.spec)
    if tokenizer_fingerprint(found.tokenizer) != tokenizer_fingerprint(decoder.tokenizer):
        raise SourceError(f"{path} has another tokenizer than {decoder.name}, expected the model that its training began with")
    return found


def _loaded(decoder: Decoder, path: str) -> Decoder:
    return load(path, decoder.spec, device=str(decoder.device), dtype=str(decoder.dtype).removeprefix("torch."))


def _fresh(decoder: Decoder, seed: int) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    config = deepcopy(decoder.model.config)
    config.name_or_path = "random weights"
    original = str(config.get_text_config()._attn_implementation).removeprefix(registered_name(""))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=original)
    return model.to(device=decoder.device, dtype=decoder.dtype).eval(), decoder.tokenizer


Scorer = Callable[[Arm, Tell], Mapping[str, Sequence[float]]]


def side_by_side(arms: Sequence[Arm], brought: Sequence[Brought], score: Scorer, tell: Tell | None = None) -> list[Outcome]:
    """Run every arm on the same questions; `score` gives the values of one arm and tells of its own progress."""
    found = []
    for n, arm in enumerate(arms):

        def told(done: int, total: int, n: int = n) -> None:
            if tell:
                tell(n * total + done, len(arms) * total)

        values = {metric: tuple(row) for metric, row in score(arm, told).items()}
        references = sum(len(arm.texts(b)) for b in brought) / max(1, len(brought))
        found.append(Outcome(arm.name, references, values))
    return found
