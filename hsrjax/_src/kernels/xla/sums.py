"""Exact sums over keys, piece by piece, and their gradients: the one VJP.

The scores of a tile against a piece of the keys are made, weighed, multiplied with the
values and forgotten; what the pieces found merges. A piece is a chunk of all keys
(`chunks.Chunks`) or runs of reported ones (`runs.Runs`): a walk says which pieces there
are, and everything else is the same for both. The backward pass makes the scores again.

Weights of ReLU^p just add up. Those of full softmax are relative to the best score so
far, and what was summed is scaled down when a better one comes. A key of weight zero
has gradient zero, so that forward and backward share one walk.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hsrjax._src.core import meshes
from hsrjax._src.core.arrays import dot, finite_or_zero, product, sum_both
from hsrjax._src.core.tiles import Partial, Tiles


def _sum_tiles(plan, counted, tiles, keys, values, ids, words):
    """Sums over the visible keys of a walk, differentiable once.

    Args:
      plan: a class of walk with its static sizes; static.
      counted: whether the numbers of keys are wanted; static.
      tiles: [M, *B, Q], whose activation is the law that weighs.
      keys: f[*B, S, H].
      values: f[*B, S, D].
      ids: i32[*B, S], the position of each key, or None where they are in order.
      words: u32[M, *B, J, S/32], or None for a walk over all keys.

    Returns:
      Partial of [M, *B, Q].
    """
    return _forward(plan, counted, tiles, keys, values, ids, words)


def _forward(plan, counted, tiles, keys, values, ids, words):
    walk = plan.walk(keys, values, ids, words)

    def one_tile(tile):
        tile, tile_words = tile
        rows = walk.by_set(tile)

        def one_piece(piece, sums):
            a, law, seen, _ = piece.of(rows)
            k, v = piece.gather()
            visible, sinks = piece.mask(seen), seen.sinks(piece.at)
            scores = dot(a, k)
            peak = None
            if law.relative:
                scores = jnp.where(visible, scores, -jnp.inf)
                peak = jnp.maximum(sums.peak, jnp.max(scores, axis=-1))
            # The mask comes last: XLA's CPU backend makes that a faster loop.
            weights = jnp.where(visible, _weigh(law, scores, sinks, peak), 0.0)
            weighted = product("...qc,...cd->...qd", weights, v)
            if not counted:
                total = jnp.sum(weights, axis=-1)
                none = jnp.zeros(total.shape, jnp.int32)
                return piece.add(sums, Partial(weighted, total, peak, none, none))
            firing = _each(law).fires(scores, sinks=sinks) & visible
            total, count = sum_both(weights, firing.astype(jnp.int32))
            looked_at = piece.count(visible)
            return piece.add(sums, Partial(weighted, total, peak, count, looked_at))

        start = Partial.zeros(
            rows.queries.shape[:-1],
            values.shape[-1],
            relative=tile.activation.relative,
        )
        start = meshes.varying(start, tile, tile_words, keys, values)
        return walk.by_row(walk.over(tile.visible, tile_words, one_piece, start))

    return jax.lax.map(one_tile, (tiles, words))


def _sums_forward(plan, counted, *arrays):
    sums = _forward(plan, counted, *arrays)
    return sums, (arrays, sums.peak)


def _sums_backward(plan, _, residuals, cotangents):
    """Gradients from scores made anew, over the pieces of the forward pass.

    Those of keys and values are first made as [H, C]: the products that make them so
    are several times faster on CPU than those that make [C, H].
    """
    (tiles, keys, values, ids, words), peaks = residuals
    walk = plan.walk(keys, values, ids, words)

    def one_tile(key_grads, tile):
        tile, tile_words, *others = tile
        rows, others = walk.by_set((tile, others))
        turned = tuple(jnp.swapaxes(x, -1, -2) for x in (rows.queries, others[1]))

        def one_piece(piece, grads):
            row_grads, key_grads = grads
            (a, law, seen, _), (peak, weighted_bar, total_bar) = piece.of(
                (rows, others)
            )
            k, v = piece.gather()
            visible, sinks = piece.mask(seen), seen.sinks(piece.at)

            def weights_of(scores, law):
                # First here: what overflows out of sight would make 0 * inf below.
                scores = jnp.where(visible, scores, -jnp.inf)
                return _weigh(law, scores, sinks, peak)

            weights, pull = jax.vjp(weights_of, dot(a, k), law)
            scores_bar, law_bar = pull(dot(weighted_bar, v) + total_bar[..., None])
            key_grads = tuple(
                piece.add_to_keys(total, product("...dq,...qc->...dc", x, by_key))
                for total, x, by_key in zip(
                    key_grads, piece.of(turned), (scores_bar, weights), strict=True
                )
            )
            new = product("...qc,...ch->...qh", scores_bar, k), law_bar
            return piece.add(row_grads, new), key_grads

        row_grads = jax.tree.map(jnp.zeros_like, rows[:2])
        start = meshes.varying(row_grads, key_grads), key_grads
        found = walk.over(tile.visible, tile_words, one_piece, start)
        return found[1], walk.by_row(found[0])

    bars = cotangents.weighted, cotangents.total
    over = tiles, words, peaks, *bars
    start = meshes.varying(walk.no_key_grads(), over, keys, values)
    found = jax.lax.scan(one_tile, start, over)
    key_grads, (queries_bar, law_bar) = found
    keys_bar, values_bar = (
        walk.key_grads(bar, x) for bar, x in zip(key_grads, (keys, values), strict=True)
    )
    tiles_bar: Any = queries_bar, law_bar, None
    return Tiles(*tiles_bar), keys_bar, values_bar, None, None


sum_tiles: Any = jax.custom_vjp(_sum_tiles, nondiff_argnums=(0, 1))
sum_tiles.defvjp(_sums_forward, _sums_backward)


def _each(law):
    """The law with its fields [..., Q, 1], against scores [..., Q, C]."""
    return jax.tree.map(lambda x: x[..., None], law)


def _weigh(law, scores, sinks, peak):
    shift = None if peak is None else finite_or_zero(peak)[..., None]
    return _each(law).weigh_row(scores, sinks=sinks, peak=shift)
