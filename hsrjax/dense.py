"""Dense attention: every visible key is scored.

The oracle, and the fast path for short rows. Differentiated by JAX itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hsrjax import bitset, bounds, certificates
from hsrjax.activations import (
    Activation,
    Softmax,
    fires,
    normalize_rows,
    power_of,
    weigh,
)
from hsrjax.reported import Info, Tiles, Values


def attend(
    activation: Activation, keys: jax.Array, values: Values, tiles: Tiles
) -> tuple[jax.Array, Info]:
    """Attention of tiles of queries over all their visible keys.

    Args:
      activation: any.
      keys: f[*B, S, H].
      values: rows f[*B, S, D].
      tiles: M tiles of Q queries; dense attention needs no more than one.

    Returns:
      Outputs f32[M, *B, Q, D] and Info, each [M, *B, Q]. Cost O(S (H + D)) a query,
      memory O(M Q S).
    """
    power = power_of(activation)
    slot = bitset.positions(keys.shape[-2], tiles.offsets.ndim + 1)
    visible, sinks = tiles.visible.mask(slot), tiles.visible.sinks(slot)
    scores = bounds.dot(tiles.queries, keys[None])
    scores = jnp.where(visible, scores, -jnp.inf)
    zeros = jnp.zeros_like(tiles.offsets)
    selection = certificates.Selection(tiles.offsets, zeros, zeros, zeros)
    if isinstance(activation, Softmax):
        selection = _select(activation, jax.lax.stop_gradient(scores), sinks)
    offset, shift = selection.offset, selection.shift
    weights = weigh(
        scores, offset[..., None], shift[..., None], power=power, sinks=sinks
    )
    weighted = jnp.einsum(
        "...qs,...sd->...qd",
        weights,
        values.rows[None].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    total = jnp.sum(weights, axis=-1)
    seen = tiles.visible.count()
    out = normalize_rows(activation, weighted, total, seen)
    firing = fires(scores, offset[..., None], power=power, sinks=sinks)
    count = jnp.sum(visible & firing, axis=-1, dtype=jnp.int32)
    missed = bound = jnp.zeros_like(total)
    if isinstance(activation, Softmax) and not activation.is_full:
        rounding = _score_rounding(keys, tiles.queries)
        value_bound = values.bound[..., None][None]
        missed, bound = certificates.error_bound(
            selection, total, count, value_bound, rounding
        )
    overflow = jnp.zeros(count.shape, jnp.bool_)
    info = Info(count, seen, overflow, missed, bound)
    return out, jax.lax.stop_gradient(info)


def _select(
    activation: Softmax, scores: jax.Array, sinks: jax.Array | None
) -> certificates.Selection:
    """What `certificates` selects when both bounds are the scores themselves."""
    peak, top = jnp.max(scores, axis=-1), None
    zeros = jnp.zeros_like(peak)
    if activation.is_full:
        shift = jnp.where(peak == -jnp.inf, 0.0, peak)
        return certificates.Selection(zeros - jnp.inf, shift, zeros, zeros)
    if activation.top_r is None:
        offset = certificates.safe_offset(activation, scores, scores, sinks)
    else:
        offset = zeros
        wanted = activation.top_r + 1
        others = scores if sinks is None else jnp.where(sinks, -jnp.inf, scores)
        top = jax.lax.top_k(others, min(wanted, scores.shape[-1]))[0]
        missing = [(0, 0)] * (top.ndim - 1) + [(0, wanted - top.shape[-1])]
        top = jnp.pad(top, missing, constant_values=-jnp.inf)
    return certificates.select(activation, peak, top, offset, scores, scores, sinks)


def _score_rounding(keys: jax.Array, queries: jax.Array) -> jax.Array:
    """`bounds.score_rounding` from the keys themselves."""
    longest = jnp.max(bounds.norm(keys.astype(jnp.float32)), axis=-1)
    h = keys.shape[-1]
    length = bounds.norm(queries)
    return (2 * h + 32) * 2.0**-24 * length * longest[..., None][None]
