"""Spatial order: which keys share a cell, so that one bound rules out all of a cell.

A k-d tree, stored as a permutation. Whether a key reaches a high threshold depends
most on its distance from the middle. So that distance is one more coordinate to split
along, with a large weight: on Gaussian keys of size 8 it halves the cells that are left
to look at.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hsrjax._src.core.arrays import gather_rows, norm, positions
from hsrjax._src.core.bitset import WORD

_SAMPLE = 256
_DISTANCE_WEIGHT = 3.0
_LEAST_ROOTS_LOG2 = 2
"""The first split is into 5 to 8 parts: little padding, whatever the size."""


def sample_median(keys: jax.Array, used: jax.Array) -> jax.Array:
    """Coordinate-wise median f32[*B, H] of 256 of the first used i32[*B] keys.

    A few huge or NaN keys cannot move it, so they spoil only their own blocks.
    """
    step = positions(_SAMPLE, used.ndim + 1).astype(jnp.float32) / _SAMPLE
    rows = (step * used[..., None].astype(jnp.float32)).astype(jnp.int32)
    sample = jnp.sort(gather_rows(keys, rows), axis=-2)
    median = sample[..., _SAMPLE // 2, :]
    return jnp.where(jnp.isfinite(median), median, 0.0)


def spatial_order(keys: jax.Array, used: jax.Array) -> jax.Array:
    """Order i32[*B, S] in which runs of 32 keys, and longer ones, are near each other.

    Every node of the tree is sorted along the coordinate in which it is widest and cut
    in half. Cost O(S log^2 S), one row at a time.

    Args:
      keys: f[*B, S, H].
      used: i32[*B], keys from there on stay where they are, at the end.
    """
    slots, h = keys.shape[-2:]
    points = jnp.nan_to_num(keys.astype(jnp.float32))
    middle = sample_median(points, used)
    far = norm(points - middle[..., None, :])[..., None]
    points = jnp.concatenate([points, jnp.nan_to_num(_DISTANCE_WEIGHT * far)], axis=-1)
    flat = points.reshape(-1, slots, h + 1), used.reshape(-1)
    order = jax.lax.map(lambda row: _order(*row), flat).reshape(keys.shape[:-1])
    slot = positions(slots, order.ndim)
    return jnp.where(slot < used[..., None], order, slot)


def _order(points: jax.Array, used: jax.Array) -> jax.Array:
    """The order i32[S] of one row f32[S, F]."""
    slots, width = points.shape
    blocks = -(-slots // WORD)
    levels = max(0, (blocks - 1).bit_length() - _LEAST_ROOTS_LOG2 - 1)
    roots = -(-blocks // (1 << levels))
    padded = WORD * (roots << levels)
    points = jnp.pad(points, [(0, padded - slots), (0, 0)])
    order = jnp.arange(padded, dtype=jnp.int32)
    for nodes in [1, *(roots << level for level in range(levels))]:
        inside = (order < used).reshape(nodes, -1)
        here = points.reshape(nodes, -1, width)
        low, high = (
            reduce(jnp.where(inside[..., None], here, fill), axis=1)
            for reduce, fill in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
        )
        widest = jnp.argmax(high - low, axis=-1)[:, None, None]
        axis = jnp.take_along_axis(here, widest, axis=-1)[..., 0]
        place = _sorted_places(axis, inside)
        size = padded // nodes
        first = size * jnp.arange(nodes, dtype=jnp.int32)[:, None]
        at = (first + place).reshape(-1)
        order, points = order[at], gather_rows(points, at)
    return order[:slots]


def _sorted_places(values: jax.Array, inside: jax.Array) -> jax.Array:
    """Places i32[N, M] of values f32[N, M] in ascending order, others last.

    One integer holds the leading bits of a value and its place: XLA's CPU backend sorts
    single integers six times as fast as pairs. What is lost is little: values count
    from one of them, so that it is their relative distance that is rounded.
    """
    size = values.shape[-1]
    bits = (size - 1).bit_length()
    distance = values - values[:, size // 2, None]
    raw = jax.lax.bitcast_convert_type(distance, jnp.int32)
    ordered = jnp.where(raw < 0, raw ^ jnp.int32(2**31 - 1), raw)
    ordered = jnp.where(inside, ordered, 2**31 - 1)
    place = jnp.arange(size, dtype=jnp.int32)[None]
    keyed = (ordered >> bits) << bits
    return jnp.sort(keyed | place, axis=-1) & (2**bits - 1)
