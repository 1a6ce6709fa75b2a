"""Dense sums with all scores of a tile at once, differentiated by JAX itself.

The way of short rows, of decode steps, and of activations for which whole rows say
which keys take part. Tiles go one after the other; the backward pass makes their scores
again, but does not select again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.activations import search
from hsrjax._src.activations.base import SELECTION
from hsrjax._src.core.arrays import (
    dot,
    finite_or_zero,
    norm,
    positions,
    product,
    score_rounding,
    sum_both,
)
from hsrjax._src.core.tiles import Partial, Tiles

_FEW_QUERIES = 16
"""Rows below which a decode step's scores, not its tiles, fill the memory."""


def sum_whole(
    tiles: Tiles, keys: jax.Array, values: jax.Array, ids: jax.Array | None
) -> tuple[Partial, Any]:
    """As `Implementation.sum_all` without chunks."""
    if tiles.queries.shape[0] == 1:
        tile = jax.tree.map(lambda x: x[0], tiles)
        found = _sum_tile(tile, keys, values, ids)
        return jax.tree.map(lambda x: x[None], found)
    # Gradients are summed over tiles in this dtype.
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    policy = jax.checkpoint_policies.save_only_these_names(SELECTION)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
    def one_tile(tile):
        return _sum_tile(tile, keys, values, ids)

    return jax.lax.map(one_tile, tiles)


def _sum_tile(tile, keys, values, ids):
    """For one tile, its axis left out."""
    if tile.queries.shape[-2] >= _FEW_QUERIES:
        return _sum_rows(tile, keys, values, ids)
    lead = keys.shape[:-2]
    flat = lambda x: x.reshape(-1, *x.shape[len(lead) :])
    # With one batch axis XLA's CPU backend writes the weights over the scores.
    found = _sum_rows(*jax.tree.map(flat, (tile, keys, values, ids)))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def _sum_rows(tile, keys, values, ids):
    """The same, whatever the batch axes."""
    law, certificate = tile.activation, None
    slot = positions(keys.shape[-2], keys.ndim) if ids is None else ids[..., None, :]
    visible, sinks = tile.visible.mask(slot), tile.visible.sinks(slot)
    scores = jnp.where(visible, dot(tile.queries, keys), -jnp.inf)
    peak = None
    if law.whole_rows:
        sight = _Sight(scores, visible, sinks, tile.queries, keys)
        _, law, certificate = law.select(sight)
    elif law.relative:
        peak = jnp.max(jax.lax.stop_gradient(scores), axis=-1)
    shift = None if peak is None else finite_or_zero(peak)
    rows = jax.tree.map(lambda x: x[..., None], (law, shift))

    def weigh(nothing: Any = 0.0):
        law, shift = jax.tree.map(lambda x: x + nothing, rows)
        return law.weigh_row(scores, sinks=sinks, peak=shift)

    firing = visible & rows[0].fires(scores, sinks=sinks)
    weights = weigh()
    if scores.shape[-2] < _FEW_QUERIES:
        # Weights for the product are made again once the sums are there, which the law
        # waits for: nothing reads the scores any more, and XLA overwrites them.
        total, count = sum_both(weights, firing.astype(jnp.int32))
        nothing = jnp.where(count < 0, jax.lax.stop_gradient(total), 0.0)
        weights = weigh(nothing[..., None])
    else:
        total = jnp.sum(weights, axis=-1)
        count = jnp.sum(firing, axis=-1, dtype=jnp.int32)
    weighted = product("...qs,...sd->...qd", weights, values.astype(jnp.float32))
    sums = Partial(weighted, total, peak, count, tile.visible.count())
    return sums, certificate


class _Sight(NamedTuple):
    """`Sight` of exact scores f32[*B, Q, S], -inf where not visible."""

    scores: jax.Array
    visible: jax.Array
    sinks: jax.Array | None
    queries: jax.Array
    keys: jax.Array
    values: None = None

    @property
    def lower(self):
        return jax.lax.stop_gradient(self.scores)

    upper = lower

    def look_at(self, kept):
        del kept

    def left_out(self, words):
        del words
        return jnp.zeros_like(self.visible)

    def best(self, words, rank, most=None):
        del most
        scores = self.lower
        peak = jnp.max(scores, axis=-1)
        if not rank:
            return peak, None, words
        others = scores
        if self.sinks is not None:
            others = jnp.where(self.sinks, -jnp.inf, scores)
        return peak, search.at_ranks(others, rank), words

    def fold(self, words):
        del words
        return lambda step, row: step(row, self.lower)

    def rounding(self):
        longest = jnp.max(norm(self.keys.astype(jnp.float32)), axis=-1)
        return score_rounding(self.queries, longest)

    def remade(self):
        return jnp.zeros(self.queries.shape[:-1], jnp.float32)
