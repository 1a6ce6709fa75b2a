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

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsrjax import search, theory
from hsrjax.activations import Softmax

_MORE_KEPT = 0.03
"""log of the share of keys kept beyond r that ends the search for an offset."""
_LESS_LEFT_OUT = 0.02
"""log of the share of the mass allowed that may stay unused."""
_RESOLUTION = 2.0**-12
_CLOSE = 2.0**-7
"""Nats, by which the offset for a share of the mass may be too low."""


class Selection(NamedTuple):
    """Which keys a softmax row keeps, and what is known of those it leaves out.

    Attributes:
      offset: f32[...], keys scoring below it are left out.
      shift: f32[...], the largest kept score, subtracted before exp.
      left_out: f32[...], bound on sum exp(score - shift) over keys left out.
      share: f32[...], what is known of the share of the mass left out beforehand.
    """

    offset: jax.Array
    shift: jax.Array
    left_out: jax.Array
    share: jax.Array


def safe_offset(
    activation: Softmax,
    lower: jax.Array,
    upper: jax.Array,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """An offset f32[*B, Q] whose half-space holds every key the activation keeps.

    Args:
      activation: with top_r or epsilon.
      lower: f32[*B, Q, S], lower bounds, -inf where a key is not visible.
      upper: f32[*B, Q, S], upper bounds, -inf where a key is not visible.
      sinks: bool[*B, Q, S], keys kept whatever they score, or None.

    Returns:
      A large one: with top_r at most 3 % more lower bounds than r reach it, or it is
      the largest to 12 bits; -inf where there is none. Cost O(S) a pass, six or seven
      of them, no sort.
    """
    if activation.top_r is None:
        return _epsilon_offset(activation, lower, upper, sinks)
    lower = _but(sinks, lower)
    ranked, bracket = search.rank_bracket(lower, activation.top_r)
    found = search.largest_offset(
        search.rank_measure(lower, activation.top_r),
        bracket,
        slack=_MORE_KEPT,
        resolution=_RESOLUTION,
    )
    return jnp.where(ranked, found.low, -jnp.inf)


def _epsilon_offset(activation, lower, upper, sinks):
    """`safe_offset` of a share of the mass."""
    highest = jnp.max(lower, axis=-1)
    peak = _finite(highest)
    heavy = jnp.exp(_but(sinks, upper) - peak[..., None])
    total = jnp.sum(jnp.exp(lower - peak[..., None]), axis=-1)
    epsilon = jnp.asarray(activation.epsilon, jnp.float32)
    allowed = epsilon * total / guard(lower.shape[-1])

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


def select(
    activation: Softmax,
    peak: jax.Array,
    best: tuple[jax.Array, jax.Array] | None,
    offset: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    sinks: jax.Array | None = None,
) -> Selection:
    """The final offset, given the best exact scores among the survivors.

    Args:
      activation: with top_r or epsilon.
      peak: f32[*B, Q], largest exact score, -inf where there is none.
      best: the r-th largest exact score but sinks' and the one after it, f32[*B, Q],
        -inf where there is none; None for epsilon.
      offset: f32[*B, Q], from `safe_offset`.
      lower: f32[*B, Q, S], as there.
      upper: f32[*B, Q, S], as there.
      sinks: bool[*B, Q, S], as there.
    """
    shift = _finite(peak)
    if best is not None:
        last, next_best = best
        middle = next_best + 0.5 * (last - next_best)
        # Between the r-th and the next: no rounding of either can change the set.
        offset = jnp.where(next_best == -jnp.inf, -jnp.inf, middle)
    heavy = jnp.exp(_but(sinks, upper) - shift[..., None])
    left_out = _tail(lower, heavy, offset, shift) * guard(lower.shape[-1])
    share = 1.0 if activation.epsilon is None else activation.epsilon
    share = jnp.broadcast_to(jnp.asarray(share, jnp.float32), shift.shape)
    return Selection(offset, shift, left_out, share)


def everything(peak: jax.Array) -> Selection:
    """The selection of rows that leave out none of the keys looked at."""
    zeros = jnp.zeros_like(peak)
    return Selection(zeros - jnp.inf, _finite(peak), zeros, zeros)


def error_bound(
    selection: Selection,
    total: jax.Array,
    count: jax.Array,
    value_bound: jax.Array,
    score_rounding: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Missed mass and output error bound f32[*B, Q] of a finished softmax row.

    Args:
      selection: from `select`.
      total: f32[*B, Q], sum of the kept weights exp(score - shift).
      count: i32[*B, Q], kept keys.
      value_bound: f32[*B, 1], at least every |value coordinate|.
      score_rounding: f32[*B, Q], bound on the rounding error of a score.

    Returns:
      (missed, bound): the fraction of the full row's mass left out, and a bound on the
      maximum-norm distance to full softmax in exact arithmetic: Lemma 6.5's
      2 missed max|v|, and the float32 rounding of this row.
    """
    left_out = selection.left_out
    kept = total > 0
    missed = left_out / jnp.where(kept | (left_out > 0), total + left_out, 1.0)
    missed = jnp.minimum(missed * guard(0), selection.share)
    terms = 2.0 * (count.astype(jnp.float32) + 64.0) * 2.0**-24
    rounding = (
        jnp.minimum(2.0 * weight_error(score_rounding) + terms, 2.0) * value_bound
    )
    return missed, theory.softmax_error_bound(missed, value_bound) + rounding


def _tail(lower, heavy, offset, shift):
    """Bound on sum exp(score - shift) over keys that may score below offset."""
    edge = jnp.exp(jnp.minimum(offset - shift, 88.0))
    term = jnp.minimum(heavy, edge[..., None])
    return search.masked_sum(lower < offset[..., None], term)


def _but(sinks: jax.Array | None, bound: jax.Array) -> jax.Array:
    """Bounds of the keys that may be left out, -inf at the others."""
    return bound if sinks is None else jnp.where(sinks, -jnp.inf, bound)


def _finite(x: jax.Array) -> jax.Array:
    """x with -inf (no key) replaced by 0; NaN stays."""
    return jnp.where(x == -jnp.inf, 0.0, x)


def weight_error(score_rounding: jax.Array) -> jax.Array:
    """Relative error of a weight whose score, and the shift, are off by at most this.

    A score off by r changes its weight by a factor within e^r - 1 <= r e^r of one.
    """
    return 2.0 * score_rounding * jnp.exp(2.0 * score_rounding)


def guard(terms: int) -> float:
    """Factor that covers the rounding of float32 sums of so many terms."""
    return 1.0 + 4 * (terms + 256) * 2.0**-24
