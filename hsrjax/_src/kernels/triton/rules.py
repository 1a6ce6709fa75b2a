"""Which of the best keys of a row take part, as kernels find it out.

A rule is static. It guesses from a sample where the keys begin that matter, and settles
with exact scores: those in registers, from the guess on, and then says whether that was
low enough; or all of them, pass by pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_STEPS = 20
"""Halvings of a guess, of which nothing depends but time."""
_BITS = 5
"""What a pass over all keys finds out."""
_LEAST = -(2**31)


class Settled(NamedTuple):
    """What weighs the keys of a row.

    Attributes:
      offset: f32, of the scores that weigh something.
      peak: f32, the largest score; 0 where there is none.
    """

    offset: jax.Array
    peak: jax.Array


class TopR(NamedTuple):
    """The keys whose score is at least the r-th largest; relative to the best one."""

    rank: int
    cautious = False
    """Whether a sample is of lower bounds, or of estimates."""

    def most(self, step: float) -> float:
        """Keys above a guess from one key in `step`, about."""
        return step * float(self._among(self.rank / step))

    def guess(self, sample: jax.Array, step: jax.Array) -> jax.Array:
        """Below the r-th best of all keys, from f32[C], one in `step` of them."""
        wanted = self._among(self.rank / step.astype(jnp.float32))
        reach = lambda offset: jnp.sum((sample >= offset).astype(jnp.float32))
        least = jnp.min(jnp.where(sample > -jnp.inf, sample, jnp.inf))
        low, _ = _halved(lambda x: reach(x) >= wanted, least, jnp.max(sample), _STEPS)
        return jnp.where(reach(least) >= wanted, low, -jnp.inf)

    def settle(self, scores: jax.Array) -> Settled:
        """From scores f32[C], -inf where there is none; NaN spoils it."""
        order = _ordered(scores)

        def bit(i, last):
            higher = last + (jnp.int32(1) << (31 - i))
            enough = jnp.sum((order >= higher).astype(jnp.int32)) >= self.rank
            return jnp.where(enough, higher, last)

        last = jax.lax.fori_loop(0, 32, bit, jnp.int32(_LEAST))
        return self._settled(last, jnp.max(scores))

    def settle_all(self, fold: Callable[[Any, Any], Any], peak: jax.Array) -> Settled:
        """From `fold(f, zeros)`, the sums of f(scores f32[C]) over all scores."""
        digits = jnp.arange(2**_BITS, dtype=jnp.int32)

        def look(i, last):
            shift = 30 - _BITS * i
            higher = last + (digits << shift)
            reach = lambda scores: jnp.sum(
                (_ordered(scores)[:, None] >= higher[None, :]).astype(jnp.int32), axis=0
            )
            enough = fold(reach, jnp.zeros_like(digits)) >= self.rank
            # Of the first two bits there are four digits, and the first always holds.
            enough = (enough & ((i > 0) | (digits < 4))) | (digits == 0)
            digit = jnp.max(jnp.where(enough, digits, 0))
            return last + (digit << shift)

        last = jax.lax.fori_loop(0, 30 // _BITS + 1, look, jnp.int32(_LEAST))
        return self._settled(last, peak)

    def holds(self, by: Settled, guess: jax.Array) -> jax.Array:
        """Whether no score below the guess can matter."""
        return by.offset >= guess

    def fires(self, scores: jax.Array, by: Settled) -> jax.Array:
        """Which of scores f32[C], -inf where there is none."""
        return (scores >= by.offset) & (scores > -jnp.inf)

    def weigh(self, scores: jax.Array, by: Settled) -> jax.Array:
        """exp(score - peak) of those."""
        return jnp.where(self.fires(scores, by), jnp.exp(scores - by.peak), 0.0)

    def _among(self, expected):
        """Of a sample in which so many of the best r are expected: hardly more are."""
        root = math.sqrt if isinstance(expected, float) else jnp.sqrt
        return expected + 4.0 * root(expected) + 4.0

    def _settled(self, last, peak):
        fewer = last <= _ordered(jnp.float32(-jnp.inf))
        last = jnp.where(fewer, -jnp.inf, _ordered_back(last))
        return Settled(last, jnp.where(peak == -jnp.inf, 0.0, peak))


class Gap(NamedTuple):
    """relu(score - tau)^p, with the tau for which they sum to one: entmax.

    tau is at most what it is for more keys, and for higher scores: that of the lower
    bounds of a sample is no guess.
    """

    power: int
    cautious = True

    def most(self, step: float) -> float:
        """As of `TopR`; nobody knows."""
        del step
        return 0.0

    def guess(self, sample: jax.Array, step: jax.Array) -> jax.Array:
        """At most tau, but for rounding."""
        del step
        return self.settle(sample).offset - 2.0**-12

    def settle(self, scores: jax.Array) -> Settled:
        """As of `TopR`."""
        peak = jnp.max(scores)
        enough = lambda tau: jnp.sum(self._over(scores, tau)) >= 1.0
        tau, _ = _halved(enough, peak - 1.0, peak, 30)
        return self._settled(tau, peak)

    def settle_all(self, fold: Callable[[Any, Any], Any], peak: jax.Array) -> Settled:
        """As of `TopR`."""
        digits = jnp.arange(2**_BITS, dtype=jnp.float32)

        def look(i, tau):
            unit = jnp.exp2(-_BITS * (i.astype(jnp.float32) + 1.0))
            higher = tau + digits * unit
            over = lambda scores: jnp.sum(
                self._over(scores[:, None], higher[None, :]), axis=0
            )
            enough = fold(over, jnp.zeros_like(digits)) >= 1.0
            return tau + unit * jnp.max(jnp.where(enough, digits, 0.0))

        tau = jax.lax.fori_loop(0, 30 // _BITS, look, peak - 1.0)
        return self._settled(tau, peak)

    def holds(self, by: Settled, guess: jax.Array) -> jax.Array:
        """As of `TopR`; where no score is known that says nothing."""
        return (by.offset >= guess) & (by.offset < jnp.inf)

    def fires(self, scores: jax.Array, by: Settled) -> jax.Array:
        """Which of scores f32[C], -inf where there is none."""
        return scores > by.offset

    def weigh(self, scores: jax.Array, by: Settled) -> jax.Array:
        """relu(score - tau)^p."""
        return jnp.where(self.fires(scores, by), self._over(scores, by.offset), 0.0)

    def _over(self, scores, tau):
        over = jnp.maximum(scores - tau, 0.0)
        # But where numbers are further apart, and ties with the best share the row.
        return jnp.where(over > 2.0, 1.0, over) ** self.power

    def _settled(self, tau, peak):
        # The best key weighs something.
        below = _ordered_back(_ordered(peak) - 1)
        tau = jnp.where(peak == -jnp.inf, jnp.inf, jnp.minimum(tau, below))
        return Settled(tau, jnp.where(peak == -jnp.inf, 0.0, peak))


Rule = TopR | Gap


def _halved(holds, low, high, steps):
    """Ends around where a condition that holds at `low` ceases to."""

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * low + 0.5 * high
        there = holds(middle)
        return jnp.where(there, middle, low), jnp.where(there, high, middle)

    return jax.lax.fori_loop(0, steps, halve, (low, high))


def _ordered(x):
    """Integers in the order of the numbers, of which the two zeros are one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _ordered_back(order):
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
