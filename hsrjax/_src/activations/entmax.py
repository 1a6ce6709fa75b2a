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

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsrjax._src.activations.base import Activation, Sight, remember
from hsrjax._src.activations.relu import Excess
from hsrjax._src.core import bitset, meshes
from hsrjax._src.core.arrays import guard
from hsrjax._src.core.tiles import Partial

_CLOSE = 2.0**-20
"""A step of less than this, times 1 + |tau|, is the last."""
_FAR = 2.0**40
"""Scores further above a first tau than this count as so far above it."""
_EXPECTED_SHARE = 0.05
"""Keys that a row is expected to keep, as of Softmax(epsilon)."""


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entmax(Activation):
    """Entmax attention weights: `relu((alpha - 1) s - tau)^(1 / (alpha - 1))`.

    With `s = scale <q, k>` and, in every row, the tau for which they sum to one:
    softmax with exact zeros. Bounds on the scores bound tau, so that half-space
    reporting finds the keys which may weigh anything; their scores make tau exact, and
    gradients include its own.

    Args:
      alpha: 1.5, or 2.0 which is sparsemax; static.

    Raises:
      ValueError: another alpha.

    Cost: tau takes a few Newton steps, mostly four to eight; each is O(S) over all
    bounds, and then over the scores of the keys that may weigh anything.

    Example:
      >>> import hsrjax
      >>> hsrjax.Entmax(alpha=2.0)
      Entmax(alpha=2.0)

    Source: Peters, Niculae, Martins 2019; Martins, Astudillo 2016. Not in the paper.
    """

    alpha: float = dataclasses.field(default=1.5, metadata={"static": True})
    whole_rows = True

    def __post_init__(self):
        if self.alpha not in (1.5, 2.0):
            raise ValueError(
                f"Entmax: alpha must be 1.5 or 2.0, got {self.alpha!r}; softmax, which "
                "is alpha = 1, is hsrjax.Softmax()."
            )

    @property
    def score_factor(self) -> float:
        """alpha - 1."""
        return self.alpha - 1.0

    @property
    def power(self) -> int:
        """1 / (alpha - 1): with tau for a bias this is ReLU^p attention."""
        return 2 if self.alpha == 1.5 else 1

    def expected_keys(self, keys: int) -> float:
        """How many of so many keys a row is expected to keep."""
        return _EXPECTED_SHARE * keys

    def select(self, sight: Sight) -> tuple[jax.Array | None, _Gap, None]:
        """The sets to look at, and ReLU^p with tau for a bias."""
        if sight.scores is not None:
            tau = remember(threshold(sight.lower, self.power))
            tau = implicit(sight.scores, tau, self.power)
            return None, _Gap(self.power, tau), None
        low = safe_threshold(sight.lower, self.power)
        words = sight.look_at(~(sight.upper <= low[..., None]))
        fold = sight.fold(words)
        look = lambda tau: _Sums(*fold(functools.partial(_look, self.power), tau))
        return words, _Gap(self.power, _found(*_rise(look, low, self.power))), None

    def settle(
        self, sums: Partial, sum_sets: Callable[..., Partial], arrays: tuple
    ) -> Partial:
        """The sums with the derivative that they have as tau moves."""

        @jax.custom_vjp
        def settled(sums, arrays):
            del arrays
            return sums

        def backward(arrays, cotangents):
            """The sum of the weights stays as it is, whatever is asked of it."""
            bar, _ = cotangents
            tiles, *rest = arrays
            slopes = Excess(self.power - 1, tiles.activation.bias)
            again = sum_sets(tiles._replace(activation=slopes), *rest)
            moved = jnp.sum(bar * again.weighted, axis=-1)
            return (bar, -moved / jnp.where(again.total > 0, again.total, 1.0)), None

        settled.defvjp(lambda sums, arrays: (sums, arrays), backward)
        weighted, total = settled((sums.weighted, sums.total), arrays)
        return sums._replace(weighted=weighted, total=total)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Gap(Excess):
    """ReLU^p above tau, which no score passes by more than one.

    But where the numbers next to a score are further away than that: the keys that tie
    with the best one share the row.
    """

    def weigh(self, scores: jax.Array) -> jax.Array:
        over = jax.nn.relu(scores - self.bias)
        return jnp.where(over > 2.0, 1.0, over) ** self.power


def threshold(scores: jax.Array, power: int) -> jax.Array:
    """tau f32[...] of scores f32[..., S] that are -inf where not visible; no gradient.

    +inf for rows that see nothing. Cost O(S) a step, mostly four to eight.
    """
    start = jnp.full_like(scores[..., 0], -jnp.inf)
    return _found(*_rise(lambda tau: _look(power, tau, scores), start, power))


def implicit(scores: jax.Array, tau: jax.Array, power: int) -> jax.Array:
    """tau of `threshold` with its derivative by the scores f32[..., S]."""
    _, total, slopes = _look(power, tau, scores)
    slopes = jax.lax.stop_gradient(jnp.where(slopes > 0, power * slopes, 1.0))
    return tau + (total - jax.lax.stop_gradient(total)) / slopes


def safe_threshold(lower: jax.Array, power: int) -> jax.Array:
    """At most tau of any row whose scores are at least lower f32[..., S]; S = 32 W.

    From the best key of every block of 32: as good as from all keys if no block holds
    two that matter, and cheaper. -inf where nothing is known.
    """
    best = jnp.max(lower.reshape(*lower.shape[:-1], -1, bitset.WORD), axis=-1)
    start = jnp.full_like(best[..., 0], -jnp.inf)
    tau, _ = _rise(lambda tau: _look(power, tau, best), start, power)
    return tau - (guard(best.shape[-1]) - 1.0) * (1.0 + jnp.abs(tau))


def _look(power: int, tau: jax.Array, scores: jax.Array) -> _Sums:
    """The sums over scores f32[..., S]; zero where tau is infinite."""
    over = jax.nn.relu(scores - jnp.where(tau == -jnp.inf, jnp.inf, tau)[..., None])
    over = jnp.where(over > _FAR, _FAR, over)  # squares are finite; NaN stays
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

    begun = start, start, meshes.varying(jnp.ones((), jnp.bool_), start)
    tau, peak, _ = jax.lax.while_loop(goes_on, step, begun)
    return tau, peak


def _found(tau: jax.Array, peak: jax.Array) -> jax.Array:
    """tau as an offset: the best key weighs something, but there is none of -inf."""
    below = jnp.nextafter(peak, jnp.full_like(peak, -jnp.inf))
    return jnp.where(peak == -jnp.inf, jnp.inf, jnp.minimum(tau, below))
