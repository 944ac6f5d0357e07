"""The shape and the spec of a model from its config alone: no weights are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memory3.codebook import Recipe
from memory3.codec import codec_named
from memory3.cost import Shape
from memory3.family import trained_spec
from memory3.loading import ModelError, base_of
from memory3.product import ProductCodec
from memory3.reader import BankReader
from memory3.record import Codec
from memory3.spec import BankMismatch, MemorySpec, SpecError


@dataclass(frozen=True)
class Sizes:
    """What costs depend on.

    Args:
        name: of the model, for people.
        shape: of its decoder.
        spec: resolved.
        dtype: of its key-values.
    """

    name: str
    shape: Shape
    spec: MemorySpec
    dtype: torch.dtype = torch.bfloat16

    def codec(self, name: str, codebook: Path | None = None) -> Codec:
        """The codec of that name; `product` without a codebook is the paper's, scaled to the head dim, for its size alone.

        Raises:
            BankError: unknown, or a codebook that is none.
        """
        if name == ProductCodec.name and codebook is None:
            recipe = str(Recipe.scaled(self.shape.head_dim))
            return ProductCodec(recipe, recipe, "not trained")
        return codec_named(name, self.dtype, codebook)

    def record_bytes(self, codec: Codec) -> int:
        """Bytes of one record with this codec."""
        return codec.record_bytes(self.spec.pairs, self.spec.slots, self.shape.head_dim)


def sizes_of(model: str | os.PathLike[str] | None = None, spec: MemorySpec | None = None) -> Sizes:
    """The sizes that a model's `config.json` says, and the spec in its `memory_spec.json`, or else the paper's.

    Args:
        model: a folder or a hub name; by default the model that ships.
        spec: overrules the model's own.

    Raises:
        ModelError: there is no config.
        UnsupportedModel: the costs of such a model are not known.
        SpecError: the spec does not fit the model.
    """
    from transformers import AutoConfig

    name, _ = base_of(model)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"found no config at {name!r} ({reason}), expected a folder with config.json, or a hub name") from None
    shape = Shape.of(config)
    config.name_or_path = name
    chosen = spec or trained_spec(_Configured(config)) or MemorySpec()
    return Sizes(
        "the shipped model" if model is None else Path(name).name,
        shape,
        chosen.resolved(shape.layers, shape.kv_heads),
        _dtype(config),
    )


@dataclass(frozen=True)
class _Configured:
    """What `trained_spec` asks of a model."""

    config: Any


def _dtype(config: Any) -> torch.dtype:
    """Of the files; bfloat16 where the config does not say."""
    named = getattr(config.get_text_config(), "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.bfloat16


def sizes_of_bank(bank: BankReader, model: str | None) -> Sizes:
    """Of the model that wrote a bank, with the spec of the bank; `BankMismatch` where its memories are of another shape."""
    identity = bank.manifest.identity
    try:
        sizes = sizes_of(model, MemorySpec.from_json(identity["spec"]))
    except SpecError:
        sizes = None
    if sizes is None or sizes.shape.head_dim != identity["head_dim"]:
        raise BankMismatch(
            f"{bank.address} was written by {identity['model']}, its memories do not fit {model or 'the model that ships'}: "
            "give the model that wrote it with --model"
        )
    return sizes


def changed(sizes: Sizes, **fields: int | None) -> Sizes:
    """The same with some fields of the spec overruled; `None` leaves a field as it is. `SpecError` out of range."""
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    return replace(sizes, spec=replace(sizes.spec, **given)) if given else sizes
