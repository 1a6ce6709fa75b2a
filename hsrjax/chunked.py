"""Dense attention in linear memory: tiles of queries against chunks of keys.

The scores of a tile against a chunk are made, weighed, multiplied with the values and
forgotten. Weights of ReLU^p just add up; those of softmax are relative to the best
score so far, and what was summed is scaled down when a better one comes. Chunks that no
query of the tile sees are skipped. The backward pass makes the scores again.

Shapes here: M tiles of Q queries with batch axes *B (batch, key heads), against S keys
in chunks of C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hsrjax import bitset, bounds
from hsrjax.visible import Visible
from hsrjax.weights import fires, weigh

_Carry = TypeVar("_Carry")
_Spans = list[tuple[jax.Array, jax.Array]]


def _sum_tiles(law, chunk, counted, queries, keys, values, ids, offsets, seen):
    """Sums over the visible keys of each query, differentiable once.

    Args:
      law: of the weights (`hsrjax.weights`), None is softmax over all keys; static.
      chunk: C <= S, keys that are scored at once; static.
      counted: whether the number of firing keys is wanted; static.
      queries: f32[M, *B, Q, H].
      keys: f[*B, S, H].
      values: f[*B, S, D].
      ids: i32[*B, S], the position of each key, or None where they are in order.
      offsets: f32[M, *B, Q], ReLU biases; -inf for softmax.
      seen: Visible, i32[M, *B, Q].

    Returns:
      Weighted values f32[M, *B, Q, D] and weights f32[M, *B, Q], up to a common factor
      per row for softmax, and how many keys fired, i32[M, *B, Q] (0 if not counted).
      Cost O(S (H + D)) a query, memory O((M Q + S) (H + D)), and O(Q C) for scores.
    """
    return _forward(law, chunk, counted, queries, keys, values, ids, offsets, seen)[0]


def _forward(law, chunk, counted, queries, keys, values, ids, offsets, seen):
    """The sums, and the score f32[M, *B, Q] that softmax weights are relative to."""
    size = keys.shape[-2]

    def one_tile(tile):
        a, offset, tile_seen = tile

        def one_chunk(i, carry):
            (weighted, total, count), peak = carry
            k, v, visible = _cut(i, chunk, keys, values, ids, tile_seen)
            scores = bounds.dot(a, k)
            if law is None:
                scores = jnp.where(visible, scores, -jnp.inf)
                last, peak = peak, jnp.maximum(peak, jnp.max(scores, axis=-1))
                kept = jnp.exp(last - _finite(peak))
                weighted, total = weighted * kept[..., None], total * kept
            weights = _weigh(law, scores, offset, _finite(peak))
            # For ReLU the mask comes last: XLA's CPU backend makes that a faster loop.
            weights = jnp.where(visible, weights, 0.0)
            weighted += bounds.product("...qc,...cd->...qd", weights, v)
            if not counted:
                return (weighted, total + jnp.sum(weights, axis=-1), count), peak
            firing = fires(scores, offset[..., None], law=law) & visible
            new_total, new_count = sum_both(weights, firing.astype(jnp.int32))
            return (weighted, total + new_total, count + new_count), peak

        rows = a.shape[:-1]
        sums = (
            jnp.zeros((*rows, values.shape[-1]), jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(rows, jnp.int32),
        )
        peak = jnp.full(rows, -jnp.inf, jnp.float32)
        return _over_chunks(
            chunk, _spans(tile_seen, ids, size), one_chunk, (sums, peak)
        )

    sums, peaks = jax.lax.map(one_tile, (queries, offsets, seen))
    return sums, _finite(peaks)


def _sums_forward(law, chunk, counted, *arrays):
    sums, shifts = _forward(law, chunk, counted, *arrays)
    return sums, (arrays, shifts)


def _sums_backward(law, chunk, _, residuals, cotangents):
    """Gradients from scores made anew.

    Those of keys and values are summed as [*B, H, S]: the products that make them so
    are several times faster on CPU than those that make [*B, S, H].
    """
    (queries, keys, values, ids, offsets, seen), shifts = residuals
    weighted_bar, total_bar, _ = cotangents
    size = keys.shape[-2]

    def one_tile(key_grads, tile):
        a, offset, tile_seen, shift, out_bar, total_bar = tile
        a_turned, out_bar_turned = _turn(a), _turn(out_bar)

        def one_chunk(i, grads):
            a_bar, offset_bar, keys_bar, values_bar = grads
            k, v, visible = _cut(i, chunk, keys, values, ids, tile_seen)

            def weights_of(scores, offset):
                # First here: what overflows out of sight would make 0 * inf below.
                scores = jnp.where(visible, scores, -jnp.inf)
                return _weigh(law, scores, offset, shift)

            weights, pull = jax.vjp(weights_of, bounds.dot(a, k), offset)
            scores_bar, new_offset = pull(bounds.dot(out_bar, v) + total_bar[..., None])
            new_keys = bounds.product("...hq,...qc->...hc", a_turned, scores_bar)
            new_values = bounds.product("...dq,...qc->...dc", out_bar_turned, weights)
            return (
                a_bar + bounds.product("...qc,...ch->...qh", scores_bar, k),
                offset_bar + new_offset,
                _add(keys_bar, i, new_keys),
                _add(values_bar, i, new_values),
            )

        start = (jnp.zeros_like(a), jnp.zeros_like(offset), *key_grads)
        grads = _over_chunks(chunk, _spans(tile_seen, ids, size), one_chunk, start)
        return grads[2:], grads[:2]

    start = tuple(jnp.zeros_like(_turn(x), jnp.float32) for x in (keys, values))
    tiles = (queries, offsets, seen, shifts, weighted_bar, total_bar)
    key_grads, (queries_bar, offsets_bar) = jax.lax.scan(one_tile, start, tiles)
    keys_bar, values_bar = (
        _turn(bar).astype(x.dtype)
        for bar, x in zip(key_grads, (keys, values), strict=True)
    )
    return queries_bar, keys_bar, values_bar, None, offsets_bar, None


sums = jax.custom_vjp(_sum_tiles, nondiff_argnums=(0, 1, 2))
sums.defvjp(_sums_forward, _sums_backward)


@jax.custom_jvp
def sum_both(x: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of f32[..., S] and of i32[..., S] over the last axis, in one pass."""
    add = lambda sums, new: tuple(a + b for a, b in zip(sums, new, strict=True))
    zeros = jnp.zeros((), x.dtype), jnp.zeros((), numbers.dtype)
    return jax.lax.reduce((x, numbers), zeros, add, (x.ndim - 1,))


@sum_both.defjvp
def _sum_both_jvp(primals, tangents):
    sums = sum_both(*primals)
    no_tangent: Any = np.zeros(sums[1].shape, jax.dtypes.float0)
    return sums, (jnp.sum(tangents[0], axis=-1), no_tangent)


def _over_chunks(
    chunk: int, spans: _Spans, step: Callable[..., _Carry], carry: _Carry
) -> _Carry:
    """Carries step(i, carry) over the chunks that reach into spans, each once."""
    done = jnp.zeros((), jnp.int32)
    for low, high in spans:
        first = jnp.maximum(low // chunk, done)
        done = (high + (chunk - 1)) // chunk
        carry = jax.lax.fori_loop(first, done, step, carry)
    return carry


def _spans(seen: Visible, ids: jax.Array | None, size: int) -> _Spans:
    """Ranges of slots that hold all that any of the queries sees."""
    if ids is None:
        return seen.spans()
    return [(jnp.zeros((), jnp.int32), jnp.asarray(size, jnp.int32))]


def _start(i: jax.Array, chunk: int, size: int) -> jax.Array:
    """First key of chunk i; the last chunk is moved back to end with the keys."""
    return jnp.minimum(i * chunk, size - chunk)


def _cut(i, chunk, keys, values, ids, seen):
    """Keys and values of chunk i, f32[*B, C, :], and which each query sees there."""
    size = keys.shape[-2]
    start = _start(i, chunk, size)
    k, v = (
        jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=-2).astype(jnp.float32)
        for x in (keys, values)
    )
    slots = start + bitset.positions(chunk, keys.ndim)
    places = slots
    if ids is not None:
        places = jax.lax.dynamic_slice_in_dim(ids, start, chunk, axis=-1)[..., None, :]
    visible = seen.mask(places)
    if size % chunk:
        visible &= slots >= i * chunk  # the others were in the chunk before
    return k, v, visible


def _add(total: jax.Array, i: jax.Array, part: jax.Array) -> jax.Array:
    """Adds what chunk i contributes, f32[*B, :, C], to f32[*B, :, S]."""
    start = _start(i, part.shape[-1], total.shape[-1])
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[-1], axis=-1)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=-1)


def _weigh(law, scores, offset, shift):
    return weigh(scores, offset[..., None], shift[..., None], law=law)


def _turn(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _finite(x: jax.Array) -> jax.Array:
    """x with -inf (no key yet) replaced by 0; NaN stays."""
    return jnp.where(x == -jnp.inf, 0.0, x)
