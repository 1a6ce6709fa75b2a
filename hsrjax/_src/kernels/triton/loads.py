"""Rows of numbers, padded to the powers of two that Triton works on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LEAST = 16
"""Rows and numbers of a product of matrix units, at least."""
INT8_DEPTH = 32
"""The same of int8 numbers, of which an instruction takes so many."""


def padded(size: int, least: int = LEAST) -> int:
    """A power of two."""
    return max(least, pl.next_power_of_2(size))


def shaped(shape: tuple[int, ...], dtype, like: jax.Array) -> Any:
    """What a kernel writes; inside `jax.shard_map` it differs where `like` does."""
    mark = getattr(jax.typeof(like), "mat", None)
    options = {} if mark is None else {"manual_axis_type": mark}
    return jax.ShapeDtypeStruct(shape, dtype, **options)


def rows_of(ref, where, width: int, there: jax.Array | None = None, *, least=LEAST):
    """Rows [..., D'] of `width` numbers, and zeros.

    Args:
      ref: whose last axis has the numbers.
      where: index of the rows, as i32[C, 1] last where they are many.
      width: D; D' is a power of two.
      there: bool[C], rows that are read; the others are zeros.
      least: D' is no less.
    """
    number = jnp.arange(padded(width, least), dtype=jnp.int32)
    shape = number.shape
    if len(jnp.shape(where[-1])) == 2:
        number, shape = number[None, :], (where[-1].shape[0], *shape)
    mask = None
    if shape[-1] != width:
        mask = jnp.broadcast_to(number < width, shape)
        number = jnp.minimum(number, width - 1)
    if there is not None:
        rows = jnp.broadcast_to(there[:, None], shape)
        mask = rows if mask is None else mask & rows
    if mask is None:
        return triton.load(ref.at[(*where, number)])
    return triton.load(ref.at[(*where, number)], mask=mask, other=0)


def store_rows(ref, lead, rows, x, there) -> None:
    """Writes rows x [C, D'] of as many numbers as `ref` has, where they are `there`.

    Args:
      ref: [*lead, rows, D].
      lead: index of the first axes.
      rows: i32[C], past the end where a row is not there: JAX plays a masked store as
        one of all lanes.
      x: the rows.
      there: bool[C].
    """
    number = jnp.arange(x.shape[-1], dtype=jnp.int32)[None, :]
    mask = there[:, None] & (number < ref.shape[-1])
    triton.store(ref.at[(*lead, rows[:, None], number)], x, mask=mask)
