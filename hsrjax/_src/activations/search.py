"""Offsets at which something counted over a row of scores reaches a value.

Half-space counts and tail sums fall or rise with the offset, so the offset is found by
bracketing: interpolation first, which takes five or six passes over ordinary scores,
then halving in the order-preserving integer picture of float32, which ends for any.

Sums here are written as XLA's CPU backend turns them into vector code: a reduction
fused with a comparison becomes a loop over single numbers, eight times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.core.arrays import product

_INTERPOLATIONS = 12
_MOST_STEPS = 48
"""Halving ends after 32 steps, whatever the two ends."""
_LANES = 64
_MOST_ADDED = 128
"""Ones that are added up in a byte."""


class Bracket(NamedTuple):
    """Two offsets f32[...] with a falling measure f32[...] >= 0 and < 0 there.

    The measure at an end that stays while the other moves twice is halved, which draws
    the next offset towards it (the Illinois rule of false position).
    """

    low: jax.Array
    at_low: jax.Array
    high: jax.Array
    at_high: jax.Array


def count(mask: jax.Array) -> jax.Array:
    """How many of bool[..., S] are True, i32[...]."""
    size = mask.shape[-1]
    added = min(_MOST_ADDED, size // _LANES)
    if added < 2:
        return jnp.sum(mask, axis=-1, dtype=jnp.int32)
    padding = [(0, 0)] * (mask.ndim - 1) + [(0, -size % (added * _LANES))]
    ones = jnp.pad(mask.astype(jnp.uint8), padding)
    ones = ones.reshape(*mask.shape[:-1], -1, added, _LANES)
    by_lane = jnp.sum(ones, axis=-2, dtype=jnp.uint8)
    return jnp.sum(by_lane, axis=(-2, -1), dtype=jnp.int32)


def masked_sum(mask: jax.Array, terms: jax.Array) -> jax.Array:
    """Sum f32[...] of the finite terms f32[..., S] where bool[..., S]."""
    kept = jax.lax.optimization_barrier(mask.astype(jnp.float32) * terms)
    ones = jnp.ones(terms.shape[-1], jnp.float32)
    return product("...s,s->...", kept, ones)


def largest_offset(
    measure: Callable[[jax.Array], jax.Array],
    bracket: Bracket,
    *,
    slack: float,
    resolution: float,
) -> Bracket:
    """Narrows a bracket until its lower end is good enough.

    Args:
      measure: falling, f32[...] of offsets f32[...].
      bracket: finite ends; rows with at_low <= slack are left as they are.
      slack: measure at the lower end that will do.
      resolution: width, relative to the larger end, that will do; 0 goes on until the
        ends are neighbours.

    Returns:
      A bracket inside the one given.
    """

    def open_rows(bracket, least):
        low, _, high, _ = bracket
        reach = jnp.maximum(jnp.abs(low), jnp.abs(high))
        wide = high - low > resolution * jnp.maximum(reach, 1.0)
        apart = _middle(_order(low), _order(high)) > _order(low)
        return (least > slack) & wide & apart

    def go_on(carry):
        step, bracket, least, _ = carry
        return (step < _MOST_STEPS) & jnp.any(open_rows(bracket, least))

    def narrow(carry):
        step, bracket, least, rose = carry
        low, at_low, high, at_high = bracket
        part = (at_low - 0.5 * slack) / (at_low - at_high)
        between = low + (high - low) * jnp.clip(part, 0.0, 1.0)
        first, last = _order(low), _order(high)
        at = jnp.clip(_order(between), first + 1, last - 1)
        at = jnp.where(step < _INTERPOLATIONS, at, _middle(first, last))
        still_open = open_rows(bracket, least)
        offset = jnp.where(still_open, _from_order(at), low)
        found = measure(offset)
        up, down = still_open & (found >= 0), still_open & (found < 0)
        moved = Bracket(
            low=jnp.where(up, offset, low),
            at_low=jnp.where(up, found, jnp.where(rose, at_low, 0.5 * at_low)),
            high=jnp.where(down, offset, high),
            at_high=jnp.where(down, found, jnp.where(rose, 0.5 * at_high, at_high)),
        )
        return step + 1, moved, jnp.where(up, found, least), up

    start = jnp.int32(0), bracket, bracket.at_low, bracket.at_low < 0
    _, found, least, _ = jax.lax.while_loop(go_on, narrow, start)
    return found._replace(at_low=least)


def rank_bracket(scores: jax.Array, rank: int) -> tuple[jax.Array, Bracket]:
    """Between the lowest and the highest score of each row, for `rank_measure`.

    Args:
      scores: f32[..., S], -inf where there is none.
      rank: r.

    Returns:
      Whether a row has r scores and only finite ones, bool[...]; a bracket, which says
      nothing about other rows.
    """
    present = scores > -jnp.inf
    number = count(present)
    lowest = jnp.min(jnp.where(present, scores, jnp.inf), axis=-1)
    highest = jnp.max(scores, axis=-1)
    ranked = (number >= rank) & jnp.isfinite(lowest) & jnp.isfinite(highest)
    low, high = (jnp.where(ranked, x, 0.0) for x in (lowest, highest))
    return ranked, Bracket(
        low=low,
        at_low=jnp.where(ranked, _log_ratio(number, rank), 0.0),
        high=_from_order(_order(high) + 1),
        at_high=_log_ratio(jnp.zeros_like(number), rank),
    )


def rank_measure(scores: jax.Array, rank: int) -> Callable[[jax.Array], jax.Array]:
    """log of (scores that reach an offset) / r: 0 where exactly r do."""
    return lambda offset: _log_ratio(count(~(scores < offset[..., None])), rank)


def at_ranks(scores: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The r-th largest score f32[...] and the one after it, of f32[..., S].

    -inf where there is none, or where a score is not finite. Cost O(S) a pass: five to
    ten, up to 48 where scores are equal or crowd together.
    """
    ranked, bracket = rank_bracket(scores, rank)
    found = largest_offset(
        rank_measure(scores, rank), bracket, slack=0.0, resolution=0.0
    )
    reaches = ~(scores < found.low[..., None])
    last = jnp.min(jnp.where(reaches, scores, jnp.inf), axis=-1)
    after = jnp.max(jnp.where(reaches, -jnp.inf, scores), axis=-1)
    after = jnp.where(found.at_low > 0, last, after)  # equal to the r-th
    return jnp.where(ranked, last, -jnp.inf), jnp.where(ranked, after, -jnp.inf)


def _log_ratio(number: jax.Array, rank: int) -> jax.Array:
    """log(number / rank), with its sign exact."""
    ratio = jnp.maximum(number.astype(jnp.float32), 0.5) / rank
    size = jnp.maximum(jnp.abs(jnp.log(ratio)), 2.0**-24)
    return jnp.sign(number - rank).astype(jnp.float32) * size


def _order(x: jax.Array) -> jax.Array:
    """i32 in the order of the float32 numbers x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)


def _from_order(bits: jax.Array) -> jax.Array:
    raw = jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)
    return jax.lax.bitcast_convert_type(raw, jnp.float32)


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    return (low >> 1) + (high >> 1) + (low & high & 1)
