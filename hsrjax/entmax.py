r"""The thresholds of entmax: of whole rows, from bounds on scores, of reported keys.

tau makes sum relu(z - tau)^p = 1 over a row of scores z = (alpha - 1) s, with p = 2 for
alpha = 1.5 and p = 1 for sparsemax. The norm g(tau) = (sum relu(z - tau)^p)^(1/p) falls
and is convex, so that Newton's iterates on g = 1 are at most tau wherever they start,
and rise from there. The best key alone shows that tau is at least its score - 1.

**Bounds.** tau rises with every score and with every further key. What it is for lower
bounds on the scores of some of the keys is therefore at most tau, and a key whose upper
bound is not above that weighs nothing.

**Rounding (u = 2^-24, S scores).** From t >= max z - 1 on all of relu(z_j - t) is at
most 1, and so sum relu^p <= U = sum relu^(p-1). Float32 sums of S such terms have
relative errors of at most (S + 3) u. The step (g - 1) g^(p-1) / U is then off by
(S + 5) u g^p / U <= (S + 5) u, and by (2S + 10) u of its own size, which is at most 1;
adding it to t, and max z - 1, by 3u (1 + |t|). `safe_threshold` takes off
4 (S + 256) u (1 + |t|), which is more than all of it.

**Gradients.** 1 = sum relu(z - tau)^p stays true, so that tau moves by
sum r dz / sum r, with r = relu(z - tau)^(p-1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsrjax import bitset, bounds, certificates, gathered
from hsrjax.index import Index, ids_of
from hsrjax.query import trips
from hsrjax.rows import gather_rows
from hsrjax.visible import Visible

_CLOSE = 2.0**-20
"""A step of less than this, times 1 + |tau|, is the last."""

_KEPT = 512
"""Scores of each set that are kept from one step to the next."""


class _Sums(NamedTuple):
    """What a step needs to know of a row, f32[...] each.

    Attributes:
      peak: the largest score.
      total: sum relu(z - tau)^p.
      slopes: sum relu(z - tau)^(p-1) over the keys above tau.
    """

    peak: jax.Array
    total: jax.Array
    slopes: jax.Array


def threshold(scores: jax.Array, power: int) -> jax.Array:
    """tau f32[...] of scores f32[..., S] that are -inf where not visible; no gradient.

    +inf for rows that see nothing. Cost O(S) a step, mostly four to eight.
    """
    start = jnp.full(scores.shape[:-1], -jnp.inf, jnp.float32)
    return _found(*_rise(lambda tau: _look(scores, tau, power), start, power))


def implicit(scores: jax.Array, tau: jax.Array, power: int) -> jax.Array:
    """tau of `threshold` with its derivative by the scores f32[..., S]."""
    _, total, slopes = _look(scores, tau, power)
    slopes = jax.lax.stop_gradient(jnp.where(slopes > 0, power * slopes, 1.0))
    return tau + (total - jax.lax.stop_gradient(total)) / slopes


def safe_threshold(lower: jax.Array, power: int) -> jax.Array:
    """At most tau of any row whose scores are at least lower f32[..., S]; S = 32 W.

    From the best key of every block of 32: as good as from all keys if no block holds
    two that matter, and cheaper. -inf where nothing is known.
    """
    best = jnp.max(lower.reshape(*lower.shape[:-1], -1, bitset.WORD), axis=-1)
    start = jnp.full(best.shape[:-1], -jnp.inf, jnp.float32)
    tau, _ = _rise(lambda tau: _look(best, tau, power), start, power)
    return tau - (certificates.guard(best.shape[-1]) - 1.0) * (1.0 + jnp.abs(tau))


def find(
    power: int,
    index: Index,
    queries: jax.Array,
    seen: Visible,
    words: jax.Array,
    low: jax.Array,
    *,
    capacity: int,
) -> jax.Array:
    """tau f32[*B, J, R] from the exact scores of reported keys.

    Args:
      power: p.
      index: batch axes *B.
      queries: f32[*B, J, R, H].
      seen: i32[*B, J, R].
      words: u32[*B, J, P/32], which hold every key that weighs anything.
      low: f32[*B, J, R], at most tau; it may be -inf.
      capacity: slots of a pass.
    """
    ranked = bitset.rank(words)
    runs = max(1, min(_KEPT, index.keys.shape[-2]) // capacity)

    def scored(first, count):
        slots = bitset.select(ranked, first + bitset.positions(count, 1))
        at = ids_of(index.ids, slots)[..., None, :]
        scores = bounds.dot(queries, gather_rows(index.keys, slots))
        return jnp.where(seen.mask(at), scores, -jnp.inf)

    kept = scored(0, runs * capacity)

    def look(tau):
        def one_pass(i, sums):
            new = _look(scored(i * capacity, capacity), tau, power)
            peak = jnp.maximum(sums.peak, new.peak)
            return _Sums(peak, sums.total + new.total, sums.slopes + new.slopes)

        first = _look(kept, tau, power)
        return jax.lax.fori_loop(runs, trips(words, capacity), one_pass, first)

    return _found(*_rise(look, low, power))


def settle(
    power: int, capacity: int, sums: tuple[jax.Array, jax.Array], arrays: tuple
) -> tuple[jax.Array, jax.Array]:
    """Sums of `gathered.sums` with the derivative that they have as tau moves.

    Args:
      power: p.
      capacity: slots of a pass.
      sums: weighted values f32[..., D] and weights f32[...], for a constant tau.
      arrays: what they were made from, with tau for offsets.
    """

    @jax.custom_vjp
    def settled(sums, arrays):
        return sums

    def backward(arrays, cotangents):
        """The sum of the weights stays as it is, whatever is asked of it."""
        bar, _ = cotangents
        weighted, slopes, *_ = gathered.sums(power - 1, capacity, False, *arrays)
        moved = jnp.sum(bar * weighted, axis=-1)
        return (bar, -moved / jnp.where(slopes > 0, slopes, 1.0)), None

    settled.defvjp(lambda sums, arrays: (sums, arrays), backward)
    return settled(sums, arrays)


def _look(scores: jax.Array, tau: jax.Array, power: int) -> _Sums:
    """The sums over scores f32[..., S]; zero where tau is infinite."""
    over = jax.nn.relu(scores - jnp.where(tau == -jnp.inf, jnp.inf, tau)[..., None])
    slopes = over if power == 2 else (over > 0).astype(jnp.float32)
    total = jnp.sum(over**power, axis=-1)
    return _Sums(jnp.max(scores, axis=-1), total, jnp.sum(slopes, axis=-1))


def _rise(
    look: Callable[[jax.Array], _Sums], start: jax.Array, power: int
) -> tuple[jax.Array, jax.Array]:
    """tau by Newton's steps from at most tau, and the largest score, f32[...] each."""

    def goes_on(state):
        return state[2]

    def step(state):
        tau = state[0]
        peak, total, slopes = look(tau)
        norm = total if power == 1 else jnp.sqrt(total)
        rise = (norm - 1.0) * norm ** (power - 1) / jnp.where(slopes == 0, 1.0, slopes)
        rise = jnp.where(slopes == 0, total, rise)  # nothing is above, or all is NaN
        new = jnp.maximum(tau + jnp.maximum(rise, 0.0), peak - 1.0)
        return new, peak, jnp.any(new - tau > _CLOSE * (1.0 + jnp.abs(new)))

    begun = start, start, jnp.ones((), jnp.bool_)
    tau, peak, _ = jax.lax.while_loop(goes_on, step, begun)
    return tau, peak


def _found(tau: jax.Array, peak: jax.Array) -> jax.Array:
    """tau as an offset: the best key weighs something, but there is none of -inf."""
    below = jnp.nextafter(peak, jnp.full_like(peak, -jnp.inf))
    return jnp.where(peak == -jnp.inf, jnp.inf, jnp.minimum(tau, below))
