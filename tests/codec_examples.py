"""Codecs of every row of `CODECS`, for the contract test; the codebook is made here by a few rounds of plain k-means."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from memory3.codebook import Codebook, Quantiser, Recipe
from memory3.codec import RawCodec
from memory3.integers import Int4Codec, Int8Codec
from memory3.product import ProductCodec
from memory3.record import Codec, RecordShape
from memory3.rotated import RotatedCodec, rotation

OBLIVIOUS: list[Codec] = [
    RawCodec(),
    Int8Codec(),
    Int4Codec(),
    RotatedCodec(),
    RotatedCodec(2, 1, seed=7),
    RotatedCodec(3, 4),
]
_KINDS = ("even", "one large number", "many lengths")


@cache
def codebook(shape: RecordShape, keys: str, values: str, weights: str = "ab" * 32) -> bytes:
    """A codebook of normal vectors, for the weights that `FakeDecoder` has."""
    recipes = [Recipe.parse(text) for text in (keys, values)]
    generator = torch.Generator().manual_seed(5)
    train, held = (torch.randn(shape.pairs, n, shape.head_dim, generator=generator) for n in (1000, 300))
    both = [_quantiser(recipe, train) for recipe in recipes]
    error = max(float(((q.decode(q.encode(held)) - held).square().sum(-1) / held.square().sum(-1)).mean().sqrt()) for q in both)
    return Codebook(
        *both, {"weights": weights, "model": "fake", "error": error, "vectors": 1000 * shape.pairs, "seed": 0}
    ).to_bytes()


def _quantiser(recipe: Recipe, vectors: Tensor) -> Quantiser:
    turn = rotation(recipe.head_dim, 3)
    left = vectors.flatten(0, 1) @ turn.T
    centroids = []
    for level in recipe.levels:
        parts = left.unflatten(-1, (level.parts, -1)).transpose(0, 1)
        found = torch.stack([_means(part, 2**level.bits) for part in parts])
        centroids.append(found)
        nearest = torch.cdist(parts, found).argmin(-1)
        left = left - torch.stack([rows[codes] for rows, codes in zip(found, nearest, strict=True)], 1).flatten(1)
    pairs = vectors.shape[0]
    return Quantiser(recipe, torch.zeros(pairs, recipe.head_dim), torch.ones(pairs, 1), turn, tuple(centroids))


def _means(points: Tensor, count: int) -> Tensor:
    centres = points[:count].clone()
    for _ in range(5):
        nearest = torch.cdist(points, centres).argmin(-1)
        sums = torch.zeros_like(centres).index_add(0, nearest, points)
        sizes = nearest.bincount(minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


@cache
def product(shape: RecordShape) -> Codec:
    """Keys with two levels, values with one, in codes of odd widths."""
    parts = 2 if shape.head_dim % 2 == 0 else 1
    dim = shape.head_dim
    return ProductCodec.of(codebook(shape, f"OPQ{parts}_{dim},Residual{parts}x5,PQ{parts}x6", f"OPQ{parts}_{dim},PQ{parts}x9"))


def examples(shape: RecordShape) -> list[Codec]:
    """At least one codec of each row, able to store this shape."""
    return [*OBLIVIOUS, product(shape)]


SHAPES = [RecordShape(20, 40, head_dim) for head_dim in (7, 32, 80)]
CODECS_AT = [(codec, shape, kind) for codec in OBLIVIOUS for shape in SHAPES for kind in _KINDS]
CODECS_AT += [(product(shape), shape, "even") for shape in SHAPES]
"""Codec, shape and kind of vectors at which the stated error must hold; what was trained states it for its own kind alone."""
