"""Dense attention: every visible key is scored.

The oracle, and the fast path for short rows. Short rows are scored at once and
differentiated by JAX itself; long ones in chunks of keys (`hsrjax.chunked`) or, where
which keys take part depends on whole rows, one tile of queries after the other.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hsrjax import bitset, bounds, certificates, chunked, entmax, search
from hsrjax.activations import (
    Activation,
    Entmax,
    Softmax,
    dense_twin,
    law_of,
    normalize_rows,
)
from hsrjax.reported import Info, Tiles, Values
from hsrjax.weights import fires, weigh

_SELECTION = "selection"
_FEW_QUERIES = 16
"""Rows below which a decode step's scores, not its tiles, fill the memory."""


def attend(
    activation: Activation,
    keys: jax.Array,
    values: Values,
    tiles: Tiles,
    *,
    chunk: int | None = None,
    counted: bool = True,
    ids: jax.Array | None = None,
) -> tuple[jax.Array, Info]:
    """Attention of tiles of queries over all their visible keys.

    Args:
      activation: any.
      keys: f[*B, S, H].
      values: rows f[*B, S, D].
      tiles: M tiles of Q queries, attended to one after the other.
      chunk: C, keys scored at once; None is all of them, and needed where whole rows
        say which keys take part: Softmax(top_r or epsilon), Entmax.
      counted: False may leave Info.count zero, which saves time.
      ids: i32[*B, S], the position of each key, None where they are in order.

    Returns:
      Outputs f32[M, *B, Q, D] and Info, each [M, *B, Q]. Cost O(S (H + D)) a query,
      memory O(Q C) beside operands and results. First derivatives only with chunks.
    """
    activation = dense_twin(activation)
    if chunk is not None:
        return _attend_chunks(
            activation, keys, values, ids, tiles, chunk=chunk, counted=counted
        )
    if tiles.offsets.shape[0] == 1:
        tile = jax.tree.map(lambda x: x[0], tiles)
        out = _attend_tile(activation, keys, values, ids, tile)
        return jax.tree.map(lambda x: x[None], out)
    keys = keys.astype(jnp.float32)  # gradients are summed over tiles in this dtype
    values = values._replace(rows=values.rows.astype(jnp.float32))

    # The backward pass makes the scores again, but does not select again.
    policy = jax.checkpoint_policies.save_only_these_names(_SELECTION)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
    def one_tile(tile):
        return _attend_tile(activation, keys, values, ids, tile)

    return jax.lax.map(one_tile, tiles)


def _attend_chunks(activation, keys, values, ids, tiles, *, chunk, counted):
    """`attend` in linear memory, where each key's weight is its own."""
    law, offsets = law_of(activation), tiles.offsets
    weighted, total, count = chunked.sums(
        law,
        chunk,
        counted,
        tiles.queries,
        keys,
        values.rows,
        ids,
        jnp.full_like(offsets, -jnp.inf) if law is None else offsets,
        tiles.visible,
    )
    weighted = weighted + values.poison[..., None, :][None]
    seen = tiles.visible.count()
    out = normalize_rows(activation, weighted, total, seen)
    zeros = jnp.zeros_like(total)
    info = Info(count, seen, jnp.zeros(count.shape, jnp.bool_), zeros, zeros)
    return out, jax.lax.stop_gradient(info)


def _attend_tile(activation, keys, values, ids, tile):
    """`attend` for one tile, its axis left out, with all scores at once."""
    if tile.offsets.shape[-1] >= _FEW_QUERIES:
        return _attend_whole(activation, keys, values, ids, tile)
    lead = keys.shape[:-2]
    flat = lambda x: x.reshape(-1, *x.shape[len(lead) :])
    # With one batch axis XLA's CPU backend writes the weights over the scores.
    arrays = jax.tree.map(flat, (keys, values, ids, tile))
    found = _attend_whole(activation, *arrays)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def _attend_whole(activation, keys, values, ids, tile):
    """`_attend_tile`, whatever the batch axes."""
    law = law_of(activation)
    slot = bitset.positions(keys.shape[-2], keys.ndim)
    slot = slot if ids is None else ids[..., None, :]
    visible, sinks = tile.visible.mask(slot), tile.visible.sinks(slot)
    scores = jnp.where(visible, bounds.dot(tile.queries, keys), -jnp.inf)
    zeros = jnp.zeros_like(tile.offsets)
    selection = certificates.Selection(tile.offsets, zeros, zeros, zeros)
    if isinstance(activation, Softmax):
        selection = _select(activation, jax.lax.stop_gradient(scores), sinks)
        selection = checkpoint_name(selection, _SELECTION)
    if isinstance(activation, Entmax):
        tau = entmax.threshold(jax.lax.stop_gradient(scores), activation.power)
        tau = checkpoint_name(tau, _SELECTION)
        tau = entmax.implicit(scores, tau, activation.power)
        selection = selection._replace(offset=tau)
    offset, shift = selection.offset[..., None], selection.shift[..., None]
    firing = visible & fires(scores, offset, law=law, sinks=sinks)
    weights = weigh(scores, offset, shift, law=law, sinks=sinks)
    if scores.shape[-2] < _FEW_QUERIES:
        # Weights for the product are made again once the sums are there, which the
        # offset waits for: nothing reads the scores any more, and XLA overwrites them.
        total, count = chunked.sum_both(weights, firing.astype(jnp.int32))
        nothing = jnp.where(count < 0, jax.lax.stop_gradient(total), 0.0)
        offset += nothing[..., None]
        weights = weigh(scores, offset, shift, law=law, sinks=sinks)
    else:
        total = jnp.sum(weights, axis=-1)
        count = jnp.sum(firing, axis=-1, dtype=jnp.int32)
    rows = values.rows.astype(jnp.float32)
    weighted = bounds.product("...qs,...sd->...qd", weights, rows)
    seen = tile.visible.count()
    out = normalize_rows(activation, weighted, total, seen)
    missed = bound = jnp.zeros_like(total)
    if isinstance(activation, Softmax) and not activation.is_full:
        rounding = _score_rounding(keys, tile.queries)
        missed, bound = certificates.error_bound(
            selection, total, count, values.bound[..., None], rounding
        )
    overflow = jnp.zeros(count.shape, jnp.bool_)
    info = Info(count, seen, overflow, missed, bound)
    return out, jax.lax.stop_gradient(info)


def _select(
    activation: Softmax, scores: jax.Array, sinks: jax.Array | None
) -> certificates.Selection:
    """What `certificates` selects when both bounds are the scores themselves."""
    peak, best = jnp.max(scores, axis=-1), None
    if activation.is_full:
        return certificates.everything(peak)
    if activation.top_r is None:
        offset = certificates.safe_offset(activation, scores, scores, sinks)
    else:
        offset = jnp.zeros_like(peak)
        others = scores if sinks is None else jnp.where(sinks, -jnp.inf, scores)
        best = search.at_ranks(others, activation.top_r)
    return certificates.select(activation, peak, best, offset, scores, scores, sinks)


def _score_rounding(keys: jax.Array, queries: jax.Array) -> jax.Array:
    """`bounds.score_rounding` from the keys themselves."""
    longest = jnp.max(bounds.norm(keys.astype(jnp.float32)), axis=-1)
    h = keys.shape[-1]
    length = bounds.norm(queries)
    return (2 * h + 32) * 2.0**-24 * length * longest[..., None]
