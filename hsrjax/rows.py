"""Gathers and scatters of rows and windows, over any number of leading batch axes.

Written as XLA's CPU backend turns them into vector code; elsewhere they are what they
look like. Every one says what happens past the end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def take_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """table[*B, S, D] at rows i32[*B, C]: [*B, C, D]; rows past the end are zeros."""
    one = lambda t, r: t.at[r].get(mode="fill", fill_value=0)
    return _over_rows(one, table, rows)


def gather_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """table f[*B, S, D] at rows i32[*B, ..., C]: f32[*B, ..., C, D], the fast way.

    Rows past the end are zeros.
    """
    size, width = table.shape[-2:]
    count = table.size // (size * width)

    def batched(table, rows):
        flat = rows.reshape(*table.shape[:-2], -1)
        return take_rows(table, flat).astype(jnp.float32).reshape(*rows.shape, width)

    def vectorized(table, rows):
        # Left to itself, XLA's CPU backend copies a row number by number. With one
        # index a row and a product in the loop it uses vectors, in a third of the time.
        # It cannot know that the factor is one.
        first = size * jnp.arange(count, dtype=jnp.int32)[:, None]
        at = (jnp.minimum(rows, size - 1).reshape(count, -1) + first).reshape(-1)
        one = (at >= 0).astype(jnp.float32)[:, None]
        found = table.reshape(-1, width).at[at].get(mode="promise_in_bounds")
        found = (found.astype(jnp.float32) * one).reshape(*rows.shape, width)
        return jnp.where((rows < size)[..., None], found, 0.0)

    if count * size >= 2**31:
        return batched(table, rows)
    return jax.lax.platform_dependent(table, rows, cpu=vectorized, default=batched)


def take_windows(table: jax.Array, windows: jax.Array, size: int) -> jax.Array:
    """Windows of columns of table[*B, R, S] at i32[*B, ..., C]: [*B, ..., C, R, size].

    Window i begins at column i * size; windows past the end are the last one. Copied as
    whole runs of memory, whatever the dtype: int8 rows are copied byte by byte instead.
    """
    rows = table.shape[-2]
    lead = table.shape[:-2]

    def one(table, window):
        return jax.lax.dynamic_slice(table, (0, window * size), (rows, size))

    take = jax.vmap(one, (None, 0))
    for _ in lead:
        take = jax.vmap(take)
    found = take(table, windows.reshape(*lead, -1))
    return found.reshape(*windows.shape, rows, size)


def put_rows(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Writes values[*B, C, D] into table[*B, S, D]; rows past the end are dropped."""
    one = lambda t, r, v: t.at[r].set(v, mode="drop")
    return _over_rows(one, table, rows, values)


def add_rows(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Adds values[*B, C, D] to table[*B, S, D]; rows past the end are dropped."""
    one = lambda t, r, v: t.at[r].add(v, mode="drop")
    return _over_rows(one, table, rows, values)


def max_rows(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """Raises table[*B, S] at rows i32[*B, C] to values[*B, C], if those are larger.

    Rows past the end are dropped.
    """
    one = lambda t, r, v: t.at[r].max(v, mode="drop")
    return _over_rows(one, table, rows, values)


def _over_rows(one, *arrays):
    rows = arrays[1]
    for _ in range(rows.ndim - 1):
        one = jax.vmap(one)
    return one(*arrays)
