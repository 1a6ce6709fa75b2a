"""Sums over all the keys that a query sees, in closed form.

Activations that do not vanish below their bias are a line or a constant there. What
that adds up to over all visible keys needs no scores: differences of running sums over
the keys, in O(S + T) for any causality, window, sinks and segments. Running sums are
taken about the mean, which keeps them, and the rounding of their differences, small.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hsrjax.activations import CELU, SELU, Activation, PReLU, normalize_rows
from hsrjax.layout import heads_first, per_row, scale_query
from hsrjax.rows import take_rows
from hsrjax.visible import Visible

_BLOCK = 64


def complete(
    activation: Activation,
    weighted: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: Visible,
    *,
    scale: jax.typing.ArrayLike | None,
) -> jax.Array:
    """Adds to what `core_of(activation)` summed what is a closed form, and divides.

    Args:
      activation: any; what has no closed form comes back as it is.
      weighted: f32[B, T, N, D].
      query: f[B, T, N, H].
      key: f[B, S, K, H].
      value: f[B, S, K, D].
      seen: i32[B, T] or i32[1, T].
      scale: of the scores.

    Returns:
      f32[B, T, N, D]. Cost O((S + T) D) a key head, and H times that for PReLU; memory
      O((S + T) D).
    """
    if not isinstance(activation, (PReLU, CELU, SELU)):
        return weighted
    b, t, n, d = weighted.shape
    seen = jax.tree.map(lambda x: jnp.broadcast_to(x, (b, t)), seen)
    value = _finite(heads_first(value).astype(jnp.float32))  # poison is in `weighted`
    one_per_key_head = sums(value, seen)[:, :, :, None]
    if isinstance(activation, PReLU):
        grouped = (b, t, value.shape[1], -1)
        a = scale_query(query, scale).reshape(*grouped, query.shape[-1])
        bias = per_row("bias", activation.bias, (b, t, n)).reshape(grouped)
        line = _lines(jnp.moveaxis(a, 1, 2), heads_first(key), value, seen)
        line = line - jnp.moveaxis(bias, 1, 2)[..., None] * one_per_key_head
        slope = per_row("slope", activation.slope, (b, t, n))[..., None]
        out = (1.0 - slope) * weighted + slope * _by_query(line, weighted.shape)
    else:
        group = (*one_per_key_head.shape[:3], n // value.shape[1], d)
        constant = jnp.broadcast_to(one_per_key_head, group)
        out = weighted - activation.law.height * _by_query(constant, weighted.shape)
        out = activation.gain * out
    length = seen.count()[..., None]
    return normalize_rows(activation, out, length, jnp.broadcast_to(length, (b, t, n)))


def sums(x: jax.Array, seen: Visible) -> jax.Array:
    """Sums f32[B, K, T, F] of x f32[B, K, S, F] over the keys that each query sees."""
    mean = jnp.mean(x, axis=-2, keepdims=True)
    running = _running_sum(x - mean)

    def before(i: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(i[:, None], (*x.shape[:2], i.shape[-1]))
        return take_rows(running, rows)

    total = before(seen.high)
    if seen.low is not None:
        total -= before(seen.low)
    if seen.sink_high is not None:
        total += before(seen.sink_high)
    if seen.sink_low is not None:
        total -= before(seen.sink_low)
    return total + seen.count().astype(jnp.float32)[:, None, :, None] * mean


def _lines(a, key, value, seen):
    """`sum_s <a, k_s> v_s` f32[B, K, T, G, D] over the keys s that each query sees.

    A coordinate of queries f32[B, K, T, G, H] and keys f[B, K, S, H] at a time.
    """
    key = key.astype(jnp.float32)
    wrong = jnp.any(~jnp.isfinite(key), axis=-1, keepdims=True)
    key = jnp.where(wrong, 0.0, key)

    @jax.checkpoint
    def coordinate(total, pair):
        of_queries, of_keys = pair
        found = sums(of_keys[..., None] * value, seen)
        return total + of_queries[..., None] * found[:, :, :, None], None

    pairs = jnp.moveaxis(a, -1, 0), jnp.moveaxis(key, -1, 0)
    start = jnp.zeros((*a.shape[:-1], value.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(coordinate, start, pairs)
    spoiled = sums(wrong.astype(jnp.float32), seen)[:, :, :, None] > 0.5
    return jnp.where(spoiled, jnp.nan, total)


def _running_sum(x: jax.Array) -> jax.Array:
    """Sums f32[..., S' + 1, F] of the first 0, 1, ... rows of f32[..., S, F].

    In blocks, as products with a triangle of ones; S' is S rounded up to whole blocks.
    """
    *lead, size, width = x.shape
    padding = [(0, 0)] * len(lead) + [(0, -size % _BLOCK), (0, 0)]
    blocks = jnp.pad(x, padding).reshape(*lead, -1, _BLOCK, width)
    ones = jnp.tril(jnp.ones((_BLOCK, _BLOCK), jnp.float32))
    inside = jnp.einsum("st,...tf->...sf", ones, blocks, precision="highest")
    ends = jnp.cumsum(inside[..., -1, :], axis=-2)
    first = jnp.zeros((*lead, 1, width), jnp.float32)
    starts = jnp.concatenate([first, ends[..., :-1, :]], axis=-2)
    found = (inside + starts[..., None, :]).reshape(*lead, -1, width)
    return jnp.concatenate([first, found], axis=-2)


def _by_query(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, K, T, G, D] as [B, T, N, D]."""
    return jnp.moveaxis(x, 2, 1).reshape(shape)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0.0)
