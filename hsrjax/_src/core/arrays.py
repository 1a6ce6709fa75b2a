"""Array primitives: products and norms in float32, gathers and scatters of rows.

Gathers and scatters take any number of leading batch axes and say what happens past the
end. They are written as XLA's CPU backend turns them into vector code; elsewhere they
are what they look like.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

UNIT = 2.0**-24
"""The unit roundoff of float32, u in the proofs."""
TINY = 2.0**-110
"""Added to a bound: more than flushed subnormal numbers can take from a score."""

_MIN_ROWS = 2
"""int8 products with fewer rows fall off XLA's fast path on CPU."""
_GPU_DEPTH = 32
"""int8 numbers a GPU's matrix instruction takes; untuned, XLA is wrong for fewer."""


def positions(count: int, ndim: int) -> jax.Array:
    """0, 1, ..., count - 1 as i32[1, ..., 1, count] with ndim axes."""
    return jnp.arange(count, dtype=jnp.int32).reshape((1,) * (ndim - 1) + (count,))


def dot(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Exact-stage scores f32[*B, Q, S] of f[*B, Q, H] and f[*B, S, H].

    This one product, float32 at highest precision, defines membership everywhere.
    """
    return product(
        "...qh,...sh->...qs", queries.astype(jnp.float32), keys.astype(jnp.float32)
    )


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of float32 arrays at highest precision."""
    return jnp.einsum(
        spec,
        x,
        y,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def integer_product(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Products i32[*B, Q, S] of codes i8[*B, Q, H] and i8[*B, S, H].

    Off the CPU small heads go by bfloat16: the integers are the same.
    """
    rows, h = queries.shape[-2:]
    if rows < _MIN_ROWS:
        padding = [(0, 0)] * (queries.ndim - 2) + [(0, _MIN_ROWS - rows), (0, 0)]
        queries = jnp.pad(queries, padding)
    if h < _GPU_DEPTH:
        products = jax.lax.platform_dependent(
            queries, keys, cpu=whole_product, default=floating_product
        )
    else:
        products = whole_product(queries, keys)
    return products[..., :rows, :]


def whole_product(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """`integer_product` of as many rows as a fast product needs."""
    return jnp.einsum(
        "...qh,...sh->...qs", queries, keys, preferred_element_type=jnp.int32
    )


def floating_product(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """The same integers from codes in bfloat16, which holds them, added in float32."""
    products = jnp.einsum(
        "...qh,...sh->...qs",
        queries.astype(jnp.bfloat16),
        keys.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    return products.astype(jnp.int32)


def norm(x: jax.Array) -> jax.Array:
    """Euclidean norm over the last axis whose squares neither overflow nor underflow.

    Scaled by powers of two, behind a barrier: XLA is free to turn sum (c x)^2 into
    c^2 sum x^2, and does so, which is what must not happen here.
    """
    largest = jnp.max(jnp.abs(x), axis=-1)
    large, small = largest > 2.0**40, largest < 2.0**-40
    down = jnp.where(large, 2.0**-80, jnp.where(small, 2.0**80, 1.0))
    up = jnp.where(large, 2.0**80, jnp.where(small, 2.0**-80, 1.0))
    scaled = jax.lax.optimization_barrier(x * down[..., None])
    return up * jnp.sqrt(jnp.sum(scaled * scaled, axis=-1))


def reach(x: jax.Array) -> jax.Array:
    """The largest |coordinate| over the last axis, in one pass that XLA can fuse."""
    both = lambda a, b: (jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1]))
    ends = jnp.float32(-jnp.inf), jnp.float32(jnp.inf)
    high, low = jax.lax.reduce((x, x), ends, both, (x.ndim - 1,))
    return jnp.maximum(high, -low)


def sum_pair(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of [..., S] each over the last axis, in one pass that XLA can fuse."""
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    zeros = jnp.zeros((), x.dtype), jnp.zeros((), y.dtype)
    return tuple(jax.lax.reduce((x, y), zeros, add, (x.ndim - 1,)))


def inflation(h: int) -> float:
    """Factor that covers the rounding of a norm, and of a handful of terms of it."""
    return 1.0 + (2 * h + 64) * UNIT


def score_rounding(queries: jax.Array, key_norm: jax.Array) -> jax.Array:
    """Bound f32[*B, Q] on the rounding error of any float32 score of a query.

    Args:
      queries: f[*B, Q, H].
      key_norm: f32[*B], at least the norm of every key.
    """
    h = queries.shape[-1]
    length = norm(queries.astype(jnp.float32))
    return (2 * h + 32) * UNIT * length * key_norm[..., None] + TINY


def order_rounding(queries: jax.Array, key_norm: jax.Array) -> jax.Array:
    """The same bound on how far scores are apart that add in different orders."""
    length, sums = norm(queries.astype(jnp.float32)), queries.shape[-1] - 1
    if not sums:  # and the norm of the keys may be infinite
        return jnp.zeros_like(length)
    return 2 * sums * UNIT * length * key_norm[..., None]


def guard(terms: int) -> float:
    """Factor that covers the rounding of float32 sums of so many terms."""
    return 1.0 + 4 * (terms + 256) * UNIT


def finite_or_zero(x: jax.Array) -> jax.Array:
    """x with -inf (there was no key) replaced by 0; NaN stays."""
    return jnp.where(x == -jnp.inf, 0.0, x)


@jax.custom_jvp
def sum_both(x: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`sum_pair` of f32[..., S] and of i32[..., S], differentiable."""
    return sum_pair(x, numbers)


@sum_both.defjvp
def _sum_both_jvp(primals, tangents):
    sums = sum_both(*primals)
    no_tangent: Any = np.zeros(sums[1].shape, jax.dtypes.float0)
    return sums, (jnp.sum(tangents[0], axis=-1), no_tangent)


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


def take_windows(
    table: jax.Array, windows: jax.Array, size: int, *, axis: int = -1
) -> jax.Array:
    """Windows along an axis of table[*B, R, S] at i32[*B, ..., C].

    [*B, ..., C, R, size], or for axis -2 [*B, ..., C, size, S]. Window i begins at
    i * size; windows past the end are the last one. Copied as whole runs of memory,
    whatever the dtype: int8 rows are copied byte by byte instead.
    """
    lead = table.shape[:-2]

    def one(table, window):
        return jax.lax.dynamic_slice_in_dim(table, window * size, size, axis)

    take = jax.vmap(one, (None, 0))
    for _ in lead:
        take = jax.vmap(take)
    found = take(table, windows.reshape(*lead, -1))
    return found.reshape(*windows.shape, *found.shape[-2:])


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


def shape_text(leaf: Any) -> str:
    """What to show of a field in one line: an array's dtype and shape.

    Args:
      leaf: an array, traced or not, or whatever a tree map has put in its place.
    """
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return " ".join(repr(leaf).split())[:40]
