"""Products on matrix units that are as good as float32 ones.

A matrix unit multiplies numbers of 8 or 11 bits exactly and adds in float32. A float32
number is the sum of three of 8 bits, or of three of 11: as many products give what one
of float32 would. Between two arrays of the same 16 bits a single product does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

_BFLOAT16 = -(2**16)
_TF32 = -(2**13)
"""Masks of the bits of a float32 number that such a number has."""


def wide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x f[Q, C] times y f[C, D], f32[Q, D], exact up to float32 summation."""
    if x.dtype == y.dtype:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return triton.dot(x, y, precision=precision)
    x = x.astype(jnp.float32)
    if y.dtype == jnp.bfloat16:
        return _in_pieces(x, y, _BFLOAT16)
    # float16 fits into TF32; pieces of x may be too large or small for float16.
    return _in_pieces(x, y.astype(jnp.float32), _TF32)


def _in_pieces(x, y, mask):
    def times(piece):
        return triton.dot(piece.astype(y.dtype), y, precision=None)

    first = _cut(x, mask)
    second = _cut(x - first, mask)
    rest = times(x - first - second) + times(second)
    # Of what is infinite the first piece says all, and the others are not a number.
    return jnp.where(jnp.isnan(rest), 0.0, rest) + times(first)


def _cut(x, mask):
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & mask
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
