"""A codebook for a model: trained by FAISS on memories of references that are drawn uniformly from a bank (paper 3.3)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory3.codebook import Codebook, Quantiser, Recipe
from memory3.reader import BankReader
from memory3.spec import BankError

FEWEST_PER_CENTROID = 39
"""Vectors that k-means wants for each centroid: below, FAISS warns that clusters are noise."""

HELD_OUT = 0.05
"""Share of the drawn references that the stated error is measured on."""

_OPQ_ROUNDS, _OPQ_VECTORS = 20, 2**16
_READ_AT_ONCE = 256


def fit_codebook(
    bank: BankReader,
    *,
    keys: str | None = None,
    values: str | None = None,
    references: int | None = None,
    centred: bool = True,
    seed: int = 0,
) -> Codebook:
    """Train a codebook on key-values of a bank; the same bank and seed give the same on one machine.

    Args:
        bank: of raw memories of the model, of more references than will be drawn.
        keys: quantiser of keys; by default the paper's, scaled to the head dim.
        values: the same of values.
        references: how many are drawn; by default as many as give 39 * 4 vectors to each centroid, or all.
        centred: take the mean from the vectors of each (layer, head), and divide them by their size, before. The paper does not say
            that it does; False is the control.
        seed: of the draw.

    Raises:
        BankError: too few vectors, a bank of another codec, quantisers of another head dim, or no FAISS.
    """
    shape = bank.manifest.shape
    recipes = [Recipe.scaled(shape.head_dim) if text is None else Recipe.parse(text) for text in (keys, values)]
    _refuse(bank, recipes)
    drawn = _drawn(bank, recipes, references, seed)
    held = max(1, round(HELD_OUT * len(drawn)))
    if len(drawn) <= held:
        _refuse_few(bank, recipes, 0)
    every = _vectors(bank, drawn[held:])
    trained_on = every[0].shape[0] * every[0].shape[1]
    _refuse_few(bank, recipes, trained_on)
    left = _vectors(bank, drawn[:held])
    fitted = [_fitted(recipe, side, centred, seed) for recipe, side in zip(recipes, every, strict=True)]
    error = max(_error(quantiser, side) for quantiser, side in zip(fitted, left, strict=True))
    identity = bank.manifest.identity
    about = {
        "weights": identity["weights"],
        "model": identity["model"],
        "error": error,
        "vectors": trained_on,
        "seed": seed,
    }
    return Codebook(fitted[0], fitted[1], about)


def _refuse(bank: BankReader, recipes: Sequence[Recipe]) -> None:
    if bank.manifest.codec.name != "raw":
        raise BankError(
            f"{bank.address} has codec {bank.manifest.codec.name}, expected raw memories to train on: write a bank without --codec"
        )
    for recipe in recipes:
        if recipe.head_dim != bank.manifest.shape.head_dim:
            raise BankError(
                f"found quantiser {recipe} for memories of head dim {bank.manifest.shape.head_dim}, expected one that says _"
                f"{bank.manifest.shape.head_dim}: leave it out for {Recipe.scaled(bank.manifest.shape.head_dim)}"
            )


def _drawn(bank: BankReader, recipes: Sequence[Recipe], references: int | None, seed: int) -> list[str]:
    """Ids drawn uniformly, without repetition; the first ones are held out."""
    wanted = 4 * -(-_fewest(recipes) // bank.manifest.shape.vectors) if references is None else references
    ids = sorted(bank.places())
    return random.Random(seed).sample(ids, min(len(ids), wanted + max(1, round(HELD_OUT * wanted))))


def _fewest(recipes: Sequence[Recipe]) -> int:
    """Vectors that the level with most centroids wants."""
    return FEWEST_PER_CENTROID * max(1 << level.bits for recipe in recipes for level in recipe.levels)


def _refuse_few(bank: BankReader, recipes: Sequence[Recipe], found: int) -> None:
    fewest, names = _fewest(recipes), " and ".join(sorted(set(map(str, recipes))))
    if found < fewest:
        references = 1.1 * fewest / bank.manifest.shape.vectors + 2
        raise BankError(
            f"found {found:,} vectors in {bank.address} to train on, expected at least {fewest:,} ({FEWEST_PER_CENTROID} for each of "
            f"{fewest // FEWEST_PER_CENTROID:,} centroids): write about {references:,.0f} references, or name quantisers with fewer bits "
            f"than {names}"
        )


def _vectors(bank: BankReader, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """All keys and all values `(P, V, D)` float32 of some memories."""
    keys, values = [], []
    for start in range(0, len(ids), _READ_AT_ONCE):
        for memory in bank.read(ids[start : start + _READ_AT_ONCE]):
            keys.append(memory.keys.float())
            values.append(memory.values.float())
    return torch.cat(keys, 1), torch.cat(values, 1)


def _fitted(recipe: Recipe, vectors: Tensor, centred: bool, seed: int) -> Quantiser:
    pairs, _, head_dim = vectors.shape
    mean, scale = torch.zeros(pairs, head_dim), torch.ones(pairs, 1)
    if centred:
        mean = vectors.mean(1)
        scale = (vectors - mean[:, None]).square().mean((1, 2)).sqrt()[:, None].clamp(min=1e-6)
    flat = ((vectors - mean[:, None]) / scale[:, None]).flatten(0, 1)
    rotation, centroids = _trained(recipe, flat, seed)
    return Quantiser(recipe, mean, scale, rotation, centroids)


def _trained(recipe: Recipe, vectors: Tensor, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rotation `(D, D)` and the centroids of each level, out of FAISS."""
    faiss = _faiss()
    chain = faiss.index_factory(recipe.head_dim, str(recipe))
    opq, rest = faiss.downcast_VectorTransform(chain.chain.at(0)), faiss.downcast_index(chain.index)
    opq.niter, opq.max_train_points = _OPQ_ROUNDS, _OPQ_VECTORS
    small = faiss.ProductQuantizer(recipe.head_dim, recipe.opq_parts, min(8, recipe.levels[-1].bits))
    opq.pq = small  # its own has 256 centroids, also where the levels have fewer and few vectors are there
    coarse = [faiss.downcast_index(rest.q1.quantizer)] if len(recipe.levels) == 2 else []
    quantisers = [level.pq for level in (*coarse, rest)]
    for quantiser in quantisers:
        quantiser.cp.seed = 1234 + seed
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))
    chain.train(vectors[order].contiguous().numpy())
    rotation = torch.from_numpy(faiss.vector_to_array(opq.A)).reshape(recipe.head_dim, recipe.head_dim)
    centroids = (
        torch.from_numpy(faiss.vector_to_array(quantiser.centroids)).reshape(level.parts, 2**level.bits, -1)
        for level, quantiser in zip(recipe.levels, quantisers, strict=True)
    )
    return rotation, tuple(centroids)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise BankError(
            "found no FAISS, expected it to train a codebook (not to read one): pip install 'memory3[codecs]'"
        ) from None
    return faiss


def _error(quantiser: Quantiser, vectors: Tensor) -> float:
    """Root mean square of |x - decoded x| / |x|."""
    off = quantiser.decode(quantiser.encode(vectors)) - vectors
    share = off.square().sum(-1) / vectors.square().sum(-1).clamp(min=1e-12)
    return float(share.mean().sqrt())


def save_codebook(book: Codebook, file: Path) -> int:
    """Write a codebook to a new file, whole or not at all; its bytes. `BankError` where it exists or cannot be written."""
    data, fresh = book.to_bytes(), file.with_name(f"{file.name}.new")
    if file.exists():
        raise BankError(f"{file} exists, expected a new name: banks may have been written with it")
    try:
        fresh.write_bytes(data)
        fresh.replace(file)
    except OSError as error:
        raise BankError(f"{file} cannot be written ({error.strerror}): give another place") from error
    return len(data)
