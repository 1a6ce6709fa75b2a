"""Products on matrix units that are as good as float32 ones.

A matrix unit multiplies numbers of 8 or 11 bits exactly and adds in float32. A float32
number is the sum of three of 8 bits, or of three of 11: as many products give what one
of float32 would. Between two arrays of the same 16 bits a single product does.

Gradients of keys and values of 16 bits are rounded to 16 bits in the end. They, and
what leads to them, are made of two pieces of each number: 2^-16 of a term is lost.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

_BFLOAT16 = -(2**16)
_TF32 = -(2**13)
"""Masks of the bits of a float32 number that such a number has."""


def wide(x: jax.Array, y: jax.Array, *, pieces: int = 3) -> jax.Array:
    """x f[Q, C] times y f[C, D], f32[Q, D], exact up to float32 summation.

    With two pieces up to 2^-16 of a term where x is float32 and y has 16 bits.
    """
    if x.dtype == y.dtype:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return triton.dot(x, y, precision=precision)
    x = x.astype(jnp.float32)
    if y.dtype == jnp.bfloat16:
        return _in_pieces(x, y, _BFLOAT16, pieces)
    # float16 fits into TF32; pieces of x may be too large or small for float16.
    return _in_pieces(x, y.astype(jnp.float32), _TF32, pieces)


def crossed(x: jax.Array, y: jax.Array, like: jax.Array) -> jax.Array:
    """x f32[C, Q] times y f32[Q, D], f32[C, D], as good as the dtype of `like` needs.

    Exact up to float32 summation for float32, else up to 2^-16 of a term.
    """
    if like.dtype == jnp.float32:
        return wide(x, y)
    first = _cut(y, _BFLOAT16)
    rest = (y - first).astype(jnp.bfloat16)
    leading = _cut(x, _BFLOAT16).astype(jnp.bfloat16)
    small = _known(triton.dot(leading, rest, precision=None))
    return small + wide(x, first.astype(jnp.bfloat16), pieces=2)


def _in_pieces(x, y, mask, pieces):
    def times(piece):
        return triton.dot(piece.astype(y.dtype), y, precision=None)

    first = _cut(x, mask)
    second = _cut(x - first, mask)
    rest = times(second)
    if pieces == 3:
        rest = times(x - first - second) + rest
    return _known(rest) + times(first)


def _known(rest):
    """Of what is infinite the first piece says all, and the others are not a number."""
    return jnp.where(jnp.isnan(rest), 0.0, rest)


def _cut(x, mask):
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & mask
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
