r"""Offsets and error certificates for softmax attention, from bounds on the scores.

Softmax has no threshold of its own (and the paper gives none), so
one is computed per query from a lower and an upper bound of every score, which the
sketch yields in one pass:

* top r: the r-th largest lower bound is at most the r-th largest score, so the
  half-space at that offset holds the r best keys;
* epsilon: a key whose lower bound reaches the offset o is certainly reported. The mass
  of all others that may be left out is at most sum exp(min(upper, o)), over keys with
  lower < o. The largest o for which this is at most epsilon * sum exp(lower) leaves out
  at most a fraction epsilon, whatever the data.

Sinks are kept whatever they score: they are none of the r, and count in the sum of
exp(lower) but never in what may be left out.

Dense attention calls the same functions with lower = upper = score.

Rounding. A float32 sum of S non-negative terms has relative error at most S u, and
every term exp(x - m) at most 96 u for |x - m| <= 88 (u = 2^-24; smaller terms are
flushed to zero, at most 2^-126 each, against a term of at least the mean). `guard`
multiplies by 1 + 4 (S + 256) u, which covers two such sums and their quotient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsrjax import theory
from hsrjax._src.activations import search
from hsrjax._src.core.arrays import finite_or_zero, guard

_MORE_KEPT = 0.03
"""log of the share of keys kept beyond r that ends the search for an offset."""
_LESS_LEFT_OUT = 0.02
"""log of the share of the mass allowed that may stay unused."""
_RESOLUTION = 2.0**-12
_TYPICAL = 0.125
"""Share of the bound on a rounding error that errors stay below in practice."""
_REMADE = 2.0**-18
"""Share of the largest score that they stay below, too."""
_CAUTION = 0.75
_OF_ONE = 0.25
"""Shares of the mass allowed that a sample, or a key, may leave out."""
_NEAR = 32.0
"""Nats, by which bounds of the best score may differ if one is what weights are
relative to."""
_GROUPS = 64
"""Of a sample, of which the best key counts."""
_SAMPLE = 2**19
"""Scores of a sample, at most."""
_CLOSE = 2.0**-7
"""Nats, by which the offset for a share of the mass may be too low."""


class LeftOut(NamedTuple):
    """What is known of the keys that a softmax row leaves out, f32[...] each.

    Attributes:
      mass: bound on sum exp(score - shift) over them.
      share: what is known of their share of the mass beforehand.
      rounding: bound on the rounding error of a score.
    """

    mass: jax.Array
    share: jax.Array
    rounding: jax.Array


def top_r_offset(
    rank: int, lower: jax.Array, sinks: jax.Array | None = None
) -> jax.Array:
    """An offset f32[*B, Q] that at least r lower bounds reach, and few more.

    Args:
      rank: r.
      lower: f32[*B, Q, S], lower bounds, -inf where a key is not visible.
      sinks: bool[*B, Q, S], keys kept whatever they score, or None.

    Returns:
      A large one: at most 3 % more lower bounds than r reach it, or it is the largest
      to 12 bits; -inf where there is none. Cost O(S) a pass, six or seven of them, no
      sort.
    """
    lower = but(sinks, lower)
    ranked, bracket = search.rank_bracket(lower, rank)
    found = search.largest_offset(
        search.rank_measure(lower, rank),
        bracket,
        slack=_MORE_KEPT,
        resolution=_RESOLUTION,
    )
    return jnp.where(ranked, found.low, -jnp.inf)


def stride_for(rank: int, keys: int, queries: int) -> int:
    """Keys for each one of a sample that says where the r-th best may be.

    Odd: what comes back every so many keys is in the sample as often as other keys.
    """
    stride = max(4, rank / 16, keys * queries / _SAMPLE)
    return 2 ** math.ceil(math.log2(stride)) + 1


def guessed_offset(
    rank: int, scores: jax.Array, stride: int
) -> tuple[jax.Array, Callable[[int], int]]:
    """An offset f32[*B, Q] that at least r scores reach, in all likelihood.

    With one key in `stride` in the sample, about r / stride of it are among the best r;
    4 standard deviations more make it rare that they are not.

    Args:
      rank: r.
      scores: f32[*B, Q, C], of a sample, -inf where a key is not visible.
      stride: keys for each of the sample.

    Returns:
      The offset, -inf where the sample is too small, and how many keys so many queries
      may find to reach it at most.
    """
    expected = rank / stride
    spread = 4 * math.sqrt(expected * (1 - 1 / stride))
    rank = math.ceil(expected + spread)

    def most(queries: int) -> int:
        found = queries * rank
        return int(1.5 * stride * (found + 4 * math.sqrt(found) + 4))

    groups = max(_GROUPS, 4 * rank)  # few of the best share one
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, -scores.shape[-1] % groups)]
    scores = jnp.pad(scores, padding, constant_values=-jnp.inf)
    best = jnp.max(scores.reshape(*scores.shape[:-1], -1, groups), axis=-2)
    reach = best[..., None, :] >= best[..., None]
    # Integers: XLA's CPU backend would write floats to memory before it adds them.
    reached = jnp.sum(reach, axis=-1, dtype=jnp.int32) >= rank
    return jnp.max(jnp.where(reached, best, -jnp.inf), axis=-1), most


def epsilon_offset(
    epsilon: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """An offset f32[*B, Q] below which there is at most a share epsilon of the mass.

    Args:
      epsilon: f32[*B, Q].
      lower: f32[*B, Q, S], lower bounds, -inf where a key is not visible.
      upper: f32[*B, Q, S], upper bounds likewise.
      sinks: bool[*B, Q, S], keys kept whatever they score, or None.

    Returns:
      A large one; -inf where there is none. Cost O(S) a pass.
    """
    highest = jnp.max(lower, axis=-1)
    peak = finite_or_zero(highest)
    total = jnp.sum(jnp.exp(lower - peak[..., None]), axis=-1)
    allowed = epsilon * total / guard(lower.shape[-1])
    return _offset_below(allowed, lower, but(sinks, upper), highest)


def _offset_below(allowed, lower, upper, highest):
    """The largest offset below which at most the mass allowed may be.

    Relative to the highest score f32[*B, Q]; -inf where there is none.
    """
    peak = finite_or_zero(highest)
    heavy = jnp.exp(upper - peak[..., None])

    def measure(offset):
        ratio = allowed / jnp.maximum(_tail(lower, heavy, offset, peak), 2.0**-120)
        return jnp.clip(jnp.log(ratio), -4.0, 4.0)

    # No key outside a half-space so low can have more than its part of the mass.
    low = peak + jnp.log(allowed / lower.shape[-1]) - 0.01
    known = jnp.isfinite(low) & jnp.isfinite(highest)
    low = jnp.where(known, low, 0.0)
    high = jnp.maximum(jnp.where(known, highest, 0.0), low) + 1.0
    bracket = search.Bracket(low, measure(low), high, measure(high))
    found = search.largest_offset(
        measure, bracket, slack=_LESS_LEFT_OUT, resolution=_CLOSE
    )
    found = jnp.where(bracket.at_high >= 0, high, found.low)
    known &= bracket.at_low >= 0
    # Nothing is known of any score: nothing may be left out.
    return jnp.where(known, found, -jnp.inf)


def guessed_epsilon_offset(
    epsilon: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `epsilon_offset`, from a sample, which one more pass over all bounds verifies.

    The mass of all keys is known from their bounds; the sample only says how much of it
    is below an offset, where no single key weighs much.

    Args:
      epsilon: f32[*B, Q].
      lower: f32[*B, Q, S], lower bounds, -inf where a key is not visible.
      upper: f32[*B, Q, S], upper bounds likewise.
      sinks: bool[*B, Q, S], keys kept whatever they score, or None.

    Returns:
      The offset and a shift near the best score, f32[*B, Q], and whether both will do,
      bool[*B, Q].
    """
    highest = jnp.max(lower, axis=-1)
    peak = finite_or_zero(highest)
    total = jnp.sum(jnp.exp(lower - peak[..., None]), axis=-1)
    allowed = epsilon * total
    *_, queries, keys = lower.shape
    stride = stride_for(1, keys, queries)
    sample = lambda x: x[..., stride // 2 :: stride]
    some = sample(lower), sample(but(sinks, upper))
    offset = _offset_below(_CAUTION / stride * allowed, *some, highest)
    offset = jnp.minimum(offset, peak + jnp.log(_OF_ONE * allowed))
    mass = mass_below(offset, peak, lower, upper, sinks)
    close = jnp.max(upper, axis=-1) - peak <= _NEAR
    sound = close & (mass * guard(keys) <= allowed)
    nothing = jnp.max(upper, axis=-1) == -jnp.inf
    return offset, peak, sound | nothing


def between(
    best: tuple[jax.Array, jax.Array], apart: jax.typing.ArrayLike
) -> jax.Array:
    """Between the r-th best score and the next: no rounding changes the set.

    Where they are as good as equal, a little below both, so that none of the best r is
    lost where scores are made again.

    Args:
      best: the two, f32[*B, Q].
      apart: how far, at most; from `as_good_as_equal`.
    """
    last, next_best = best
    # Their sum may overflow, and without the barrier XLA would halve that.
    middle = 0.5 * next_best + jax.lax.optimization_barrier(0.5 * last)
    middle = jnp.where(middle > next_best, middle, last)
    middle = jnp.where(last - next_best <= apart, last - apart, middle)
    return jnp.where(next_best == -jnp.inf, -jnp.inf, middle)


def as_good_as_equal(remade: jax.Array, peak: jax.Array, last: jax.Array) -> jax.Array:
    """How far apart, f32[...], scores may be that may be equal where made again.

    One key of a huge norm, or one that is not finite, spoils the bound `remade` for all
    others. The largest of the scores, the best one `peak` and the r-th best `last`, do
    not know of it.
    """
    largest = jnp.maximum(*(jnp.abs(finite_or_zero(x)) for x in (peak, last)))
    return 2.0 * jnp.fmin(_TYPICAL * remade, _REMADE * largest)


def mass_below(
    offset: jax.Array,
    shift: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Bound f32[*B, Q] on sum exp(score - shift) over keys below an offset."""
    heavy = jnp.exp(but(sinks, upper) - shift[..., None])
    return _tail(lower, heavy, offset, shift) * guard(lower.shape[-1])


def error_bound(
    left_out: LeftOut, total: jax.Array, count: jax.Array, value_bound: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Missed mass and output error bound f32[*B, Q] of a finished softmax row.

    Args:
      left_out: what is known of the keys left out.
      total: f32[*B, Q], sum of the kept weights exp(score - shift).
      count: i32[*B, Q], kept keys.
      value_bound: f32[*B, 1], at least every |value coordinate|.

    Returns:
      (missed, bound): the fraction of the full row's mass left out, and a bound on the
      maximum-norm distance to full softmax in exact arithmetic: Lemma 6.5's
      2 missed max|v|, and the float32 rounding of this row.
    """
    mass, share, rounding = left_out
    there = (total > 0) | (mass > 0)
    missed = mass / jnp.where(there, total + mass, 1.0)
    missed = jnp.minimum(missed * guard(0), share)
    terms = 2.0 * (count.astype(jnp.float32) + 64.0) * 2.0**-24
    rounded = jnp.minimum(2.0 * weight_error(rounding) + terms, 2.0) * value_bound
    return missed, theory.softmax_error_bound(missed, value_bound) + rounded


def _tail(lower, heavy, offset, shift):
    """Bound on sum exp(score - shift) over keys that may score below offset."""
    edge = jnp.exp(jnp.minimum(offset - shift, 88.0))
    term = jnp.minimum(heavy, edge[..., None])
    return search.masked_sum(lower < offset[..., None], term)


def but(sinks: jax.Array | None, bound: jax.Array) -> jax.Array:
    """Bounds of the keys that may be left out, -inf at the others."""
    return bound if sinks is None else jnp.where(sinks, -jnp.inf, bound)


def weight_error(score_rounding: jax.Array) -> jax.Array:
    """Relative error of a weight whose score, and the shift, are off by at most this.

    A score off by r changes its weight by a factor within e^r - 1 <= r e^r of one.
    """
    return 2.0 * score_rounding * jnp.exp(2.0 * score_rounding)
