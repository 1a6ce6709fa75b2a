"""Windows of consecutive rows of a table, read and written where they lie.

Batch rows may begin at different places. Each window is one slice of memory, so what is
read and written is the window, however long the table, and a table that was given away
is changed in place. On TPUs, where XLA copies whole tables for scatters row by row, it
still does to read windows that begin at different places.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hsrjax._src.core.arrays import positions


def read(table: jax.Array, start: jax.Array, size: int, *, axis: int = -2) -> jax.Array:
    """`size` rows of table[*B, S, D] from start on, [*B, size, D].

    Args:
      table: any.
      start: i32 that broadcasts against *B; batch axes of size 1 share one start. A
        window that would reach past an end is moved to end there.
      size: at most S.
      axis: along which the rows are, counted from the end.
    """

    def take(start, table):
        return jax.lax.dynamic_slice_in_dim(
            table, start, size, axis, allow_negative_indices=False
        )

    return _over_starts(take, start, table)


def write(
    table: jax.Array, start: jax.Array, rows: jax.Array, *, axis: int = -2
) -> jax.Array:
    """table[*B, S, D] with rows [*B, U, D] in the window that `read` takes."""

    def put(start, table, rows):
        return jax.lax.dynamic_update_slice_in_dim(
            table, rows, start, axis, allow_negative_indices=False
        )

    return _over_starts(put, start, table, rows)


def append(
    table: jax.Array, held: jax.Array, rows: jax.Array, count: jax.Array
) -> jax.Array:
    """table[*B, S, D] with the first `count` of rows [*B, U, D] behind the `held` ones.

    Args:
      table: of which the first `held` are in use.
      held: i32 that broadcasts against *B, as in `read`.
      rows: in the dtype of the table.
      count: like held, at most U and at most the room left; other rows are not written.
    """
    rows = rows[..., : table.shape[-2], :]  # more cannot fit
    new = rows.shape[-2]
    start = jnp.minimum(held, table.shape[-2] - new)
    ahead = held - start  # of the window's rows, which are in use
    if new > 1:
        padding = [(0, 0)] * (rows.ndim - 2) + [(new, 0), (0, 0)]
        rows = read(jnp.pad(rows, padding), new - ahead, new)
    place = positions(new, held.ndim + 1) - ahead[..., None]
    fresh = (place >= 0) & (place < count[..., None])
    rows = jnp.where(fresh[..., None], rows, read(table, start, new))
    return jax.lax.platform_dependent(
        table, start, rows, cpu=_write_apart, default=write
    )


def _write_apart(table: jax.Array, start: jax.Array, rows: jax.Array) -> jax.Array:
    """`write` as a scatter, of two windows or more: one would be a slice again.

    XLA's CPU backend fuses a slice that is written with each of those that read the
    table, and writes the whole table for each.
    """
    every = jnp.broadcast_to(start, table.shape[:-2])
    if every.size > 1:
        return write(table, every, rows)
    twice = jnp.broadcast_to(rows, (2, *rows.shape))
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, twice.ndim)),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=(table.ndim - 2,),
    )
    at = jnp.broadcast_to(start.reshape(1, 1), (2, 1))
    return jax.lax.scatter(table, at, twice, numbers, mode="clip")


def _over_starts(
    one: Callable[..., jax.Array], start: jax.Array, *tables: jax.Array
) -> jax.Array:
    """one(start i32[], *tables), mapped over the batch axes in which starts differ."""
    axes = [axis for axis, size in enumerate(start.shape) if size != 1]
    for number in reversed(range(len(axes))):
        axis = axes[number] - number
        one = jax.vmap(one, (0, *[axis] * len(tables)), axis)
    return one(start.reshape([start.shape[axis] for axis in axes]), *tables)
