"""Products on matrix units that are as good as float32 ones.

A matrix unit multiplies numbers of 8 or 11 bits exactly and adds in float32. A float32
number is the sum of three of 8 bits, or of three of 11: as many products give what one
of float32 would. Between two arrays of the same 16 bits a single product does.

Queries of 16 bits stay as they came, and their scores are scaled. What is rounded to 16
bits in the end, their sums and gradients of keys and values, is made of two pieces of
each number: 2^-16 of a term is lost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

_BFLOAT16 = -(2**16)
_TF32 = -(2**13)
"""Masks of the bits of a float32 number that such a number has."""


def wide(x: jax.Array, y: jax.Array, pieces: int = 3) -> jax.Array:
    """x f[Q, C] times y f[C, D], f32[Q, D], exact up to float32 summation.

    But for pieces of x that are left out, where it has more bits than y.
    """
    if x.dtype == y.dtype and x.dtype != jnp.float32:
        return triton.dot(x, y, precision=None)
    x = x.astype(jnp.float32)
    return times(split(x, y, pieces), split(y, y, 1), order=pieces)


class Split(NamedTuple):
    """A float32 array as the sum of arrays that matrix units multiply exactly.

    Attributes:
      pieces: f[...], the largest first.
      precision: of their products.
    """

    pieces: tuple[jax.Array, ...]
    precision: Any

    @property
    def T(self) -> Split:
        """Transposed, as of an array."""
        return Split(tuple(x.T for x in self.pieces), self.precision)


def split(x: jax.Array, like: jax.Array, count: int) -> Split:
    """For products with arrays that came in the dtype of `like`.

    Args:
      x: of that dtype, or float32.
      like: whose dtype says what matrix units have to multiply.
      count: pieces of a float32 array; all of it is in 3.
    """
    if like.dtype == jnp.float32:
        return Split((x,), jax.lax.Precision.HIGHEST)
    # float16 fits into TF32; pieces of x may be too large or small for float16.
    short = like.dtype == jnp.bfloat16
    dtype = jnp.bfloat16 if short else jnp.float32
    if x.dtype == like.dtype:
        return Split((x.astype(dtype),), None)
    pieces = []
    for number in range(count):
        last = number == 2
        piece = x if last else _cut(x, _BFLOAT16 if short else _TF32)
        pieces.append(piece.astype(dtype))
        x = x - piece
    return Split(tuple(pieces), None)


def times(x: Split, y: Split, *, order: int) -> jax.Array:
    """x times y, f32, of pieces whose numbers add up to less than `order`.

    With 3 exact up to float32 summation where one of the two is in one piece.
    """
    pairs = [(i, j) for i in range(len(x.pieces)) for j in range(len(y.pieces))]
    pairs = sorted((pair for pair in pairs if sum(pair) < order), key=sum)
    first, *rest = (
        triton.dot(x.pieces[i], y.pieces[j], precision=x.precision) for i, j in pairs
    )
    if not rest:
        return first
    small = sum(reversed(rest[:-1]), rest[-1])
    # Of what is infinite the first piece says all, and the others are not a number.
    return jnp.where(jnp.isnan(small), 0.0, small) + first


def _cut(x, mask):
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & mask
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
